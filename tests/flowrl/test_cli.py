"""The command line: its frozen options, its help, its exit codes, and the verbs that need no training."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image
from tiny_pipelines import tiny_sd3
from typer.testing import CliRunner

from flowrl import __version__
from flowrl.cli import app
from flowrl.commands.suites import SUITES
from flowrl.errors import GuardStop, UserError
from flowrl.policies.loading import MODELS
from reward_models import RewardError

ROOT = Path(__file__).parents[2]
DRAW = {"--images", "--steps", "--guidance", "--seed", "--chunk", "--lora", "--device", "--dtype", "--out"}
# Changing this table changes what users have in their scripts: say so in CHANGELOG.md.
OPTIONS = {
    "": {"--version"},
    "train": {"CONFIG", "[KEY=VALUE]...", "--resume"},
    "sample": {"POLICY", "--prompt", "-p", "--prompts", "--limit", "--height", "--width", *DRAW},
    "score": {"IMAGES...", "--reward", "--prompts", "--prompt", "-p", "--out", "--device"},
    "compare": {"A", "B", "--score", "--out"},
    "bench": set(),
    "bench shapes": {"POLICY", "--split", "--task", "--limit", *DRAW},
    **{
        f"bench {suite}": {"[POLICY]", "--reward", "--prompts", "--step", "--limit", "--height", "--width", *DRAW}
        for suite in SUITES
    },
    "bench methods": {
        "METHOD... [KEY=VALUE]...",
        "--seeds",
        "--budget",
        "--clock",
        "--processes",
        "--baseline",
        "--out",
    },
    "reward": set(),
    "reward bench": {
        "FORMAT",
        "LABELS",
        "--reward",
        "--images",
        "--validation",
        "--scale",
        "--limit",
        "--out",
        "--device",
    },
    "reward train": {
        "MANIFEST",
        "--out",
        "--body",
        "--train",
        "--loss",
        "--steps",
        "--batch",
        "--lr",
        "--hidden",
        "--inputs",
        "--layers",
        "--rank",
        "--margin",
        "--held-out",
        "--confidence",
        "--strength",
        "--most",
        "--save-every",
        "--seed",
        "--resume",
        "--device",
    },
    "reward pairs": {"IMAGES", "--rank", "--score", "--out", "--order", "--least", "--seed", "--device"},
    "report": {"RUN"},
    "validate": {"CONFIG", "[KEY=VALUE]...", "--estimate", "--show"},
    "serve": {
        "REWARD...",
        "--host",
        "--port",
        "--token-env",
        "--batch",
        "--wait-ms",
        "--queue",
        "--timeout",
        "--max-items",
        "--max-mb",
        "--max-pixels",
        "--device",
    },
    "doctor": set(),
    "list": {"[KIND]", "--path"},
    "export": {"RUN", "--out", "--merge", "--sheet", "--no-sheet", "--device"},
}


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def options_of(command: Any, name: str = "") -> dict[str, set[str]]:
    found = {name: set()}
    for parameter in command.params:
        names = (
            {*parameter.opts, *parameter.secondary_opts}
            if parameter.param_type_name == "option"
            else {parameter.metavar}
        )
        found[name] |= names - {"-h", "--help"}
    for child, inner in getattr(command, "commands", {}).items():
        found |= options_of(inner, f"{name} {child}".strip())
    return found


def test_the_option_list_is_frozen() -> None:
    assert options_of(typer.main.get_command(app)) == OPTIONS


@pytest.mark.parametrize("name", [name for name in OPTIONS if name])
def test_every_help_has_an_example(name: str) -> None:
    result = run(*name.split(), "--help")
    assert result.exit_code == 0 and f"flowrl {name.split()[0]}" in result.output and "Example:" in result.output


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0 and result.output.strip() == f"flowrl {__version__}"


class Stopped(Exception):
    """Stand-in for the trainer's exception of the same name."""

    exit_code = 143


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, 0),
        (UserError("your input"), 2),
        (GuardStop("a guard"), 3),
        (RewardError("a reward"), 1),
        (KeyboardInterrupt(), 130),
        (Stopped("a signal"), 143),
    ],
)
def test_exit_codes_and_messages_without_traceback(
    monkeypatch: pytest.MonkeyPatch, error: BaseException | None, code: int
) -> None:
    calls = []

    def train(config: Any, resume: bool) -> dict[str, Any]:
        calls.append((config.seed, config.updates, resume))
        if error is not None:
            raise error
        return {}

    fake = types.ModuleType("flowrl.trainer")
    fake.train, fake.Stopped = train, Stopped  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flowrl.trainer", fake)
    result = run("train", "quickstart", "seed=5", "--resume", "updates=3")
    assert result.exit_code == code
    assert calls == [(5, 3, True)]
    assert "Traceback" not in result.output
    assert error is None or str(error) in result.output


def test_an_unexpected_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr("flowrl.commands.facts.doctor", broken)
    result = run("doctor")
    assert result.exit_code == 1 and isinstance(result.exception, RuntimeError)


def test_a_wrong_config_is_reported_before_anything_is_loaded() -> None:
    result = run("train", "quickstart", "polcy.path=x", "group_size=1", "rollout.level=-1")
    assert result.exit_code == 2
    assert "3 problems" in result.output and "did you mean policy?" in result.output
    assert run("train").exit_code == 2
    assert run("nosuchverb").exit_code == 2


def test_validate(tmp_path: Path) -> None:
    result = run("validate", "flow_grpo/flux_dev", "prompts_per_update=12", "--show")
    assert result.exit_code == 0
    assert "12 groups of 24, 288 images" in result.output and "black-forest-labs/FLUX.1-dev" in result.output
    (tmp_path / "p.txt").write_text("\n")
    result = run(
        "validate", "quickstart", f"prompts.source={tmp_path / 'p.txt'}", "prompts.tasks=null", "eval.prompts=no.txt"
    )
    assert result.exit_code == 2 and "holds no prompts" in result.output and "No such file" in result.output


def test_list_and_doctor() -> None:
    everything = run("list").output
    assert all(name in everything for name in ("quickstart", "shapes-soft", "cps", "clipped", "shapes:held_out"))
    assert "optimizer.lr" in run("list", "keys").output
    assert run("list", "nonsense").exit_code == 2
    assert Path(run("list", "--path", "accelerate/cpu_gloo_2").output.strip()).is_file()
    result = run("doctor")
    assert result.exit_code == 0 and "torch" in result.output and "matrix products" in result.output


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    tiny_sd3(root / "tokenizer").save_pretrained(root / "tiny")
    return root / "tiny"


def test_sample_then_score(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    draw = ("sample", model, "-p", "a red star", "-p", "two circles", "--images", 2, "--steps", 2, "--out", out)
    assert run(*map(str, draw)).exit_code == 0
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["a red star"] * 2 + ["two circles"] * 2
    assert all((out / row["image"]).is_file() for row in rows) and (out / "sheet.png").is_file()
    again = run(*map(str, draw))
    assert again.exit_code == 2 and "already holds samples" in again.output

    result = run("score", out, "--reward", "{jpeg: 1, jpeg-incompress: 0.5}")
    assert result.exit_code == 0 and "of 4 images, 0 without a score" in result.output
    scores = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert [row["image"] for row in scores] == [row["image"] for row in rows]
    for row in scores:  # jpeg is minus kB / 500 of the same file size
        ((name, score),) = row["scores"].items()
        parts = row["parts"][name]
        assert score == pytest.approx(parts["jpeg"] + 0.5 * parts["jpeg-incompress"], rel=1e-5)

    (out / "samples.jsonl").unlink()
    assert "--prompts FILE" in run("score", out, "--reward", "jpeg").output
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    assert "4 images and 2 prompts" in run("score", out, "--reward", "jpeg", "--prompts", tmp_path / "p.txt").output
    (tmp_path / "p.txt").write_text("one\ntwo\nthree\nfour\n")
    scored = run("score", out, "--reward", "jpeg", "--prompts", tmp_path / "p.txt", "--out", tmp_path / "x.jsonl")
    assert scored.exit_code == 0 and len((tmp_path / "x.jsonl").read_text().splitlines()) == 4
    assert run("score", out, "--reward", "jpgg", "--prompts", tmp_path / "p.txt").exit_code == 2
    asked = run("score", out, "--reward", "jpeg", "--prompts", tmp_path / "p.txt", "--device", "tpu")
    assert asked.exit_code == 2 and "got device 'tpu'" in asked.output
    assert run("score", tmp_path / "none", "--reward", "jpeg").exit_code == 2


COUNTING = """
import torch
from reward_models import RewardResult, RewardSpec

class Count:
    def __init__(self, scope: str) -> None:
        self.spec = RewardSpec("count", scope=scope)

    def score(self, images, prompts, metadata, groups=None):
        return RewardResult(torch.full((len(images),), float(len(images))))
"""


@pytest.mark.parametrize(("scope", "seen"), [("point", {64.0: 64, 6.0: 6}), ("set", {70.0: 70})])
def test_a_reward_of_sets_sees_the_whole_set(tmp_path: Path, scope: str, seen: dict[float, int]) -> None:
    """70 images; the score of each is the number of images that were scored together."""
    (tmp_path / "scorer.py").write_text(COUNTING)
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(70):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{i:02d}.png")
    (tmp_path / "p.txt").write_text("".join(f"prompt {i}\n" for i in range(70)))
    reward = f"{{'{tmp_path / 'scorer.py'}:Count': {{weight: 1.0, scope: {scope}}}}}"
    result = run("score", folder, "--reward", reward, "--prompts", tmp_path / "p.txt")
    assert result.exit_code == 0, result.output
    lines = (folder / "scores.jsonl").read_text().splitlines()
    (scores,) = zip(*(json.loads(line)["scores"].values() for line in lines), strict=True)
    assert {score: scores.count(score) for score in scores} == seen


CHATTER = ("it/s", "requires torchvision", "gemm_4bit", "Token indices")


def child(command: list[str], **chosen: str) -> subprocess.CompletedProcess[str]:
    """Run a command with these and none other of the variables that say how much the libraries talk."""
    others = {name: value for name, value in os.environ.items() if not name.startswith(("TQDM", "TRANSFORMERS"))}
    return subprocess.run(command, cwd=ROOT, env=others | chosen, capture_output=True, text=True, check=True)


def test_libraries_are_quiet_but_for_what_concerns_the_user(model: Path, tmp_path: Path) -> None:
    long = "a red star and " * 30
    command = [sys.executable, "-m", "flowrl", "sample", model, "-p", long, "--images", "1", "--steps", "1"]
    done = child([*map(str, command), "--out", str(tmp_path / "s")])
    assert not [words for words in CHATTER if words in done.stderr], done.stderr
    assert "was truncated because CLIP can only handle" in done.stderr


def test_a_verbosity_that_the_user_chose_stays() -> None:
    """What `main` leaves to the libraries, in a process that imports none of them."""
    show = "print(repr(os.environ.get('TQDM_DISABLE')), logging.getLogger('transformers.utils.import_utils').level)"
    code = f"import logging, os, sys; from flowrl import cli; cli.app = lambda: None; cli.main(); {show}"
    code += "; assert not {'torch', 'transformers', 'diffusers'} & set(sys.modules)"
    assert child([sys.executable, "-c", code]).stdout.strip() == f"'1' {logging.ERROR}"
    chosen = child([sys.executable, "-c", code], TQDM_DISABLE="", TRANSFORMERS_VERBOSITY="info")
    assert chosen.stdout.strip() == "'' 0"


def test_bench_shapes(tmp_path: Path) -> None:
    out = tmp_path / "b"
    arguments = ["bench", "shapes", "tiny-sd3", "--limit", "6", "--images", "1", "--steps", "2", "--out", out]
    if not (MODELS / "tiny-clip").is_dir():
        pytest.skip("the judge in the box is not built yet")
    result = run(*map(str, arguments))
    assert result.exit_code == 0, result.output
    summary = json.loads((out / "summary.json").read_text())
    assert summary["prompts"] == 6 and set(summary["tasks"]) == {
        "single_object", "two_object", "counting", "colors", "position", "color_attr"
    }  # fmt: skip
    mean = sum(task["mean"] for task in summary["tasks"].values()) / 6
    assert summary["scores"]["shapes"]["mean"] == pytest.approx(mean)
    assert summary["correct_images"] == summary["prompts_with_a_correct_image"] == pytest.approx(mean)  # 1 image each
    assert run(*map(str, arguments)).exit_code == 2


def test_bad_models_and_prompts_are_explained(tmp_path: Path) -> None:
    assert "no prompt given" in run("sample", "tiny-sd3").output
    result = run("sample", tmp_path, "-p", "a")
    assert result.exit_code == 2 and "model_index.json" in result.output
    (tmp_path / "config.yaml").write_text("policy: {path: x}\n")
    assert "without a finished adapter/" in run("sample", tmp_path, "-p", "a").output
