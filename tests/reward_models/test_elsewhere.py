"""Servers that rewards need are asked in seconds, and before any weights load."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from judge_server import serve
from PIL import Image

from flowrl.commands import reward as reward_commands
from flowrl.commands import scoring
from flowrl.commands.check import served
from flowrl.config import load_config
from flowrl.errors import UserError
from flowrl.trainer import train
from reward_models import RewardError, RewardSpec, load, server
from reward_models.elsewhere import ask_elsewhere, elsewhere

HEAVY = """
from pathlib import Path

class Heavy:
    "Leaves a file behind when it is built, as if it had loaded weights."
    def __init__(self):
        Path(__file__).with_name("loaded").touch()
    def score(self, images, prompts, metadata):
        return [0.0] * len(images)

class Own:
    def __init__(self, ready):
        self.ready = ready
    def preflight(self):
        if not self.ready:
            raise RuntimeError("the camera is off")
    def score(self, images, prompts, metadata):
        return [0.0] * len(images)
"""


@pytest.fixture
def heavy(tmp_path: Path) -> str:
    (tmp_path / "heavy.py").write_text(HEAVY)
    return f"{tmp_path}/heavy.py:Heavy"


@pytest.fixture
def dead() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def judged(url: str) -> dict[str, dict[str, Any]]:
    """Every way in which a config can name a judge behind an endpoint, and a reward server."""
    at = {"endpoint": url, "model": "judge"}
    return {
        "unified-reward": at,
        "unified-reward-think": at,
        "unified-reward-flex": at,
        "edit-score": at,
        "viescore": at,
        "vlm-judge": {"endpoint": {"url": url, "model": "judge"}},
        "unigenbench": at,
        "win-rate": {"judge": {"vlm-judge": {**at, "mode": "four_way"}}},
    }


@pytest.mark.parametrize("name", judged(""))
def test_every_judge_asks_its_endpoint_when_it_is_loaded(name: str, dead: str) -> None:
    with pytest.raises(RewardError, match="does not answer"):
        load(name, **judged(dead)[name])
    with serve(lambda *_: "") as alive:
        load(name, **judged(alive.url)[name])
        with pytest.raises(RewardError, match="serves judge, expected 'other'"):
            load("vlm-judge", endpoint=alive.url, model="other")
        assert not alive.bodies  # no question was asked


def test_a_listener_s_endpoint_is_asked_too(dead: str) -> None:
    with serve(lambda *_: "") as alive, pytest.raises(RewardError, match="does not answer"):
        listener = {"endpoint": dead, "model": "judge"}
        load("win-rate", judge={"vlm-judge": {"endpoint": alive.url, "model": "judge"}}, listener=listener)


@pytest.mark.parametrize("inside", ["sum", "combine", "transform"])
@pytest.mark.parametrize("what", ["judge", "server"])
def test_a_dead_server_is_told_before_another_reward_loads(
    inside: str, what: str, heavy: str, dead: str, tmp_path: Path
) -> None:
    far = dead if what == "server" else {"unified-reward": {"weight": 1.0, "endpoint": dead}}
    entry = {"weight": 1.0, "reward": dead} if what == "server" else {"weight": 1.0, "reward": "unified-reward"}
    if what == "judge":
        entry["endpoint"] = dead
    mixed: dict[str, Any] = {heavy: 1.0, "far": entry}
    spec = {
        "sum": mixed,
        "combine": {"combine": "product", "of": mixed},
        "transform": {"transform": "par", "of": mixed},
    }[inside]
    with pytest.raises(RewardError, match="answer"):
        load(spec)
    assert not (tmp_path / "loaded").exists()
    with pytest.raises(RewardError, match="answer"):
        load(far)


def test_which_rewards_are_elsewhere() -> None:
    url, at = "http://h:1#a", {"endpoint": "http://h"}
    spec = {
        "jpeg": 1.0,
        "far": {"weight": 0.5, "reward": url},
        "vlm-judge": {"weight": 1.0, **at},
        "x": {"reward": url},
    }
    assert [each.name for each in elsewhere(spec)] == [url, "vlm-judge", url]
    assert [each.name for each in elsewhere({"combine": "gate", "of": {"value": url, "gate": "jpeg"}})] == [url]
    for judge, there in ((url, 1), ({"vlm-judge": at}, 1), ("jpeg", 0), ({"jpeg": 1.0, "vlm-judge": at}, 0)):
        assert len(list(elsewhere({"win-rate": {"judge": judge}}))) == there
    assert not list(elsewhere("jpeg")) and not list(elsewhere({"tiny-clip": {"device": "cpu"}}))


def test_a_reward_of_one_s_own_may_ask_as_well(heavy: str) -> None:
    own = heavy.replace("Heavy", "Own")
    load(own, ready=True)
    with pytest.raises(RuntimeError, match="camera"):
        load(own, ready=False)


def test_training_and_scoring_ask_first(heavy: str, dead: str, tmp_path: Path) -> None:
    judge = f"{{weight: 1, endpoint: '{dead}'}}"
    for overrides in (
        [f"reward={{'{heavy}': 1, unified-reward: {judge}}}"],
        [f"reward={{'{heavy}': 1}}", f"eval.rewards={{unified-reward: {judge}}}"],
        [f"reward={{'{heavy}': 1}}", f"eval.rewards={{'{dead}': 1}}"],
    ):
        config = load_config("quickstart", [*overrides, f"output_dir={tmp_path}/run", "policy.device=cpu"])
        for run in (lambda config: list(served(config)), train):
            with pytest.raises(UserError, match="answer"):
                run(config)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for reward in (f"[{heavy}, {{vlm-judge: {{endpoint: '{dead}', model: m}}}}]", f"{heavy},{dead}"):
        with pytest.raises(UserError, match="answer"):
            scoring.score([tmp_path / "a.png"], reward, texts=["a"], outs=[tmp_path / "s.jsonl"], device="cpu")
    (tmp_path / "images.csv").write_text("prompt,image\na,a.png\n")
    with pytest.raises(UserError, match="answer"):
        reward_commands.pairs(
            tmp_path / "images.csv", tmp_path / "p.jsonl", rank=f"{{unified-reward-think: {{endpoint: '{dead}'}}}}",
            score=heavy, device="cpu",
        )  # fmt: skip
    assert not (tmp_path / "loaded").exists() and not (tmp_path / "run").exists()


class Zero:
    spec = RewardSpec("zero")

    def score(self, images: torch.Tensor, prompts: Any, metadata: Any, groups: Any = None) -> Any:
        raise NotImplementedError


def test_validate_says_who_is_there() -> None:
    with server.running({"zero": Zero()}) as url, serve(lambda *_: "", model="UnifiedReward") as judge:
        overrides = [f"reward={{far: {{weight: 1, reward: '{url}'}}}}", "eval.judge={tiny-clip: {chunk: 8}}"]
        overrides += [f"eval.rewards={{unified-reward: {{weight: 1, endpoint: '{judge.url}'}}}}"]
        first, second = served(load_config("quickstart", overrides))
        assert first == f"reward server: {url} serves zero, version 1"
        assert second.startswith(f"judge: unified-reward is there, version UnifiedReward@{judge.url}/v1")
        assert set(ask_elsewhere(url, "jpeg")) == {url}
