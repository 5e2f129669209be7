"""A reward that learns beside the policy: turns, references, state, several processes, and that it works."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gaussian_adversary import Discriminator, write_references
from gaussian_runs import PROMPTS, TARGET, config
from safetensors.torch import load_file

from flowrl.adversary import Adversary, reference_source, trainable_parts
from flowrl.errors import GuardStop, UserError
from flowrl.policies.gaussian import GaussianPolicy, LinearChain
from flowrl.prompts import Prompt, load_prompts
from flowrl.rewards import load_reward
from flowrl.schema import AdversaryConfig
from flowrl.scores import everyones, score_update
from flowrl.trainer import train
from reward_models.protocol import RewardResult, RewardSpec

ONE = SimpleNamespace(size=1, rank=0)
REWARD = "reward=gaussian_adversary:Discriminator"


class Recorder:
    """A reward that learns and remembers what it was shown; it likes bright images."""

    spec = RewardSpec("recorder")

    def __init__(self) -> None:
        self.shown: list[dict[str, Any]] = []

    def score(self, images: Any, prompts: Any, metadata: Any, groups: Any = None) -> RewardResult:
        return RewardResult(images.flatten(1).mean(1))

    def update(self, fakes: Any, reals: Any, key: int, **options: Any) -> dict[str, float]:
        self.shown.append({"fakes": fakes, "reals": reals, "key": key, **options})
        return {"accuracy": 0.75}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        pass


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt(text, {"prompt": text}) for text in texts]


def adversary(brightness: float = 0.5, **settings: Any) -> Adversary:
    made = AdversaryConfig(references="unused", **{"per_prompt": 2, **settings})
    return Adversary(Recorder(), lambda prompt, count, key, size: torch.full((count, 3, *size), brightness), made, 5)


def images(*brightness: float) -> torch.Tensor:
    return torch.stack([torch.full((3, 4, 4), b) for b in brightness])


def test_the_reward_learns_from_all_images_and_references_of_their_prompts() -> None:
    one, place = adversary(discriminator=3), torch.tensor([0, 0, 1, 1])
    turn, found = one.learn(0, images(0, 0.2, 0.4, 0.6), place, prompts("a", "b"), ONE)  # type: ignore[arg-type]
    (shown,) = one.reward.shown
    assert turn.discriminator == 3 and turn.generator and found == {"accuracy": 0.75}
    assert shown["steps"] == 3 and shown["prompts"] == ["a", "a", "b", "b"]
    assert shown["real_prompts"] == ["a", "a", "b", "b"] and shown["reals"].shape == (4, 3, 4, 4)
    again, _ = adversary(discriminator=3), one.learn(1, images(0), place[:1], prompts("a"), ONE)  # type: ignore[arg-type]
    again.learn(0, images(0), place[:1], prompts("a"), ONE)  # type: ignore[arg-type]
    assert again.reward.shown[0]["key"] == shown["key"] != one.reward.shown[1]["key"]  # a function of (seed, update)


def test_published_cadence_gives_whole_rollouts_to_one_side() -> None:
    one, place = adversary(discriminator=2, generator=1, reuse=False), torch.tensor([0])
    turns = [one.learn(u, images(0), place, prompts("a"), ONE)[0] for u in range(6)]  # type: ignore[arg-type]
    assert [turn.generator for turn in turns] == [False, False, True] * 2 and len(one.reward.shown) == 4


@pytest.mark.parametrize("brightness, learns", [(0.1, True), (0.9, False)])
def test_the_trigger_asks_who_scores_higher(brightness: float, learns: bool) -> None:
    one = adversary(brightness, schedule="trigger", discriminator=1)
    turn, _ = one.learn(0, images(0.4, 0.6), torch.tensor([0, 0]), prompts("a"), ONE)  # type: ignore[arg-type]
    assert bool(turn.discriminator) == learns == bool(one.reward.shown) and turn.generator


def test_rewards_that_learn_are_found_inside_others() -> None:
    inner = {"gaussian_adversary:Discriminator": {"weight": 2.0, "hidden": 4}, "gaussian_runs:quadratic": 1.0}
    (found,) = trainable_parts(load_reward(inner))
    assert isinstance(found, Discriminator) and not list(trainable_parts(load_reward("jpeg")))


def test_section_and_reward_belong_together(tmp_path: Path) -> None:
    learning, section = Discriminator(), AdversaryConfig(references=str(write_references(tmp_path / "refs", 2)))
    assert Adversary.make(None, load_reward("jpeg"), 0) is None
    for settings, reward in ((None, learning), (section, load_reward("jpeg"))):
        with pytest.raises(UserError, match="adversary"):
            Adversary.make(settings, reward, 0)
    with pytest.raises(UserError, match=r"adversary.references: got references"):
        Adversary.make(AdversaryConfig(references=str(tmp_path / "nothing")), learning, 0)


def test_few_references_can_be_asked_for(tmp_path: Path) -> None:
    folder = write_references(tmp_path / "refs", 12)

    def different(limit: int | None, seed: int = 0) -> int:
        drawn = reference_source(str(folder), limit=limit, seed=seed)(Prompt("a", {}), 12, 0, (1, 1))
        return len(drawn.unique(dim=0))

    assert different(3) == 3 < different(None)
    with pytest.raises(UserError, match="adversary.limit 3"):
        reference_source("shapes:draw", limit=3)


def test_a_manifest_that_lacks_a_prompt_is_refused_at_the_start(tmp_path: Path) -> None:
    file = write_references(tmp_path / "refs", 2) / "000.png"
    (tmp_path / "m.json").write_text(json.dumps({"a": [str(file)], "b": [str(file)]}))
    section = AdversaryConfig(references=str(tmp_path / "m.json"))
    assert Adversary.make(section, Discriminator(), 0, prompts("a", "b")) is not None
    with pytest.raises(UserError, match="no images of 1 of 2 prompts, such as 'c'"):
        Adversary.make(section, Discriminator(), 0, prompts("a", "c"))
    everyone = AdversaryConfig(references=str(tmp_path / "refs"))  # a folder serves all
    assert Adversary.make(everyone, Discriminator(), 0, prompts("c")) is not None


def test_drawn_references_are_right_pictures_of_their_prompt() -> None:
    chosen = load_prompts("shapes:train", limit=12)
    source, judge = reference_source("shapes:draw"), load_reward("shapes")
    drawn = torch.cat([source(prompt, 2, 3, (64, 64)) for prompt in chosen])
    texts, data = [p.text for p in chosen for _ in range(2)], [p.metadata for p in chosen for _ in range(2)]
    assert judge.score(drawn, texts, data).values.mean() > 0.9  # the detector is not perfect
    assert torch.equal(source(chosen[0], 2, 3, (64, 64)), drawn[:2])
    assert not torch.equal(source(chosen[0], 2, 4, (64, 64)), drawn[:2])
    with pytest.raises(UserError, match="shapes:draw"):
        source(Prompt("a cat", {}), 1, 0, (64, 64))


class Ranks:
    """What `World.gather` gives on one of several processes, from the rows of all of them."""

    def __init__(self, rank: int, rows: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.rank, self.size, self.rows, self.turn = rank, len(rows), rows, 0

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        self.turn += 1
        if self.turn == 1:
            return torch.cat([(x * 255).round().byte() for x, _ in self.rows])
        if self.turn == 2:
            return torch.cat([place for _, place in self.rows])
        return torch.cat([torch.full_like(place, rank) for rank, (_, place) in enumerate(self.rows)])


def test_all_processes_see_the_images_in_one_order() -> None:
    x = torch.arange(8).view(8, 1, 1, 1).expand(8, 3, 2, 2) / 255
    place = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    parts = [(x[place % 2 == r], place[place % 2 == r]) for r in (0, 1)]  # prompts are dealt out in turn
    for rank in (0, 1):
        found, places, mine = everyones(*parts[rank], Ranks(rank, parts))  # type: ignore[arg-type]
        assert torch.equal(found, x) and torch.equal(places, place)
        assert torch.equal(found[mine], parts[rank][0])


def test_a_set_reward_sees_everyones_images_and_answers_for_its_own() -> None:
    class Rank:
        spec = RewardSpec("rank", scope="set")

        def score(self, images: Any, prompts: Any, metadata: Any, groups: Any = None) -> RewardResult:
            order = images.flatten(1).mean(1).argsort().argsort().float()
            return RewardResult(order, {"twice": 2 * order}, [p for p in prompts])

    x = torch.tensor([3, 0, 2, 1]).view(4, 1, 1, 1).expand(4, 3, 2, 2) / 255
    place = torch.tensor([0, 1, 2, 3])
    parts = [(x[place % 2 == r], place[place % 2 == r]) for r in (0, 1)]

    class Two(Ranks):
        def together(self) -> Any:
            from contextlib import nullcontext

            return nullcontext()

        def any(self, flag: bool) -> bool:
            return flag

    for rank, expected in ((0, [3.0, 2.0]), (1, [0.0, 1.0])):
        world: Any = Two(rank, parts)
        result = score_update(Rank(), *parts[rank], prompts("a", "b", "c", "d"), world)
        assert result.values.tolist() == expected and result.parts["twice"].tolist() == [2 * v for v in expected]
        assert result.reasons == (["a", "c"] if rank == 0 else ["b", "d"])


# ------------------------------------------------------------------------------------------------------- in the loop
def settings(folder: Path, *more: str) -> list[str]:
    references = write_references(folder / "references")
    section = f"adversary={{references: {references}, per_prompt: 4, discriminator: 4}}"
    return [REWARD, section, "advantage.std=global", "updates=40", "checkpoint.every=0", *more]


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowrl.report.write_report", lambda folder: folder / "report.html")


def distance(policy: GaussianPolicy) -> float:
    """Mean distance of the images' mean from the references', over the prompts."""
    gain = LinearChain.make(policy.sigmas(5), policy.std, "ode", 0.0).gain()
    means = policy.encode(PROMPTS).rows["mean"].double()
    learnt = means + means @ policy.weight.detach().double().T + policy.bias.detach().double()
    return float((gain * learnt - TARGET.double()).norm(dim=1).mean())


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_adv_grpo_learns_what_the_references_show_and_flipped_it_does_not(tmp_path: Path, seed: int) -> None:
    start = distance(GaussianPolicy())
    learnt, flipped = GaussianPolicy(), GaussianPolicy()
    train(config(tmp_path / "a", *settings(tmp_path, f"seed={seed}")), policy=learnt)
    turned = "reward={'gaussian_adversary:Discriminator': {weight: -1.0}}"
    train(config(tmp_path / "b", *settings(tmp_path, f"seed={seed}"), turned), policy=flipped)
    assert distance(learnt) < 0.6 * start < start < distance(flipped)


def weights(run: Path, update: int) -> dict[str, torch.Tensor]:
    (found,) = (run / "checkpoints").glob(f"*{update}")
    return load_file(next(found.glob("*.safetensors")))


def test_both_sides_resume_bit_for_bit(tmp_path: Path) -> None:
    original = Adversary.learn
    for name, stopped in (("whole", False), ("parts", True)):
        more = settings(tmp_path, "updates=6", "checkpoint.every=3")
        if stopped:
            stop = {"seen": 0}

            def stopping(self: Any, *args: Any, stop: dict[str, int] = stop, **kwargs: Any) -> Any:
                stop["seen"] += 1
                if stop["seen"] > 4:  # in the fifth update, after three saved ones and one that is lost
                    raise GuardStop("stop here")
                return original(self, *args, **kwargs)

            Adversary.learn = stopping  # type: ignore[method-assign]
            try:
                with pytest.raises(GuardStop):
                    train(config(tmp_path / name, *more), policy=GaussianPolicy())
            finally:
                Adversary.learn = original  # type: ignore[method-assign]
            train(config(tmp_path / name, *more), resume=True, policy=GaussianPolicy())
        else:
            train(config(tmp_path / name, *more), policy=GaussianPolicy())
    whole, parts = (weights(tmp_path / name / "run", 6) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and any(name.startswith("adversary/") for name in whole)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("where", ["scores", "its steps"])
def test_a_stop_after_the_reward_has_learned_keeps_the_boundary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """The reward moved on within the update that failed, or half of it: what is saved is from before it."""
    more, calls = settings(tmp_path, "updates=4"), {"n": 0}
    train(config(tmp_path / "whole", *more), policy=GaussianPolicy())
    learn = Discriminator.update

    def failing(*arguments: Any, **options: Any) -> Any:
        calls["n"] += 1
        if calls["n"] == 3:
            if where == "its steps":
                learn(*arguments, **{**options, "steps": 1})
            raise GuardStop("the third update cannot go on")
        return (score_update if where == "scores" else learn)(*arguments, **options)

    if where == "scores":
        monkeypatch.setattr("flowrl.trainer.score_update", failing)
    else:
        monkeypatch.setattr(Discriminator, "update", failing)
    with pytest.raises(GuardStop):
        train(config(tmp_path / "parts", *more), policy=GaussianPolicy())
    train(config(tmp_path / "parts", *more), resume=True, policy=GaussianPolicy())
    whole, parts = (weights(tmp_path / name / "run", 4) for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_its_health_is_logged(tmp_path: Path) -> None:
    train(config(tmp_path, *settings(tmp_path, "updates=2")), policy=GaussianPolicy())
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"adversary/accuracy", "adversary/gap", "adversary/logit_real"} <= rows[-1].keys()
