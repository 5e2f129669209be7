"""The benchmarks of trees: what they count, that ways which are compared are comparable, and their statistics."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import tiny_sd3
from typer.testing import CliRunner

import samplers
from benchmarks import overhead, tree_costs, tree_diversity, trees
from benchmarks.gradient_signal import configure, mean_cosine
from flowrl.config import load_config
from flowrl.planning import make_plan
from flowrl.policies import LoraSettings, PipelinePolicy
from flowrl.schema import Config
from samplers import plans

ROOT = Path(__file__).parents[2]
SMALL = ("rollout.height=16", "rollout.width=16", "policy.lora.rank=2", "prompts.limit=4", "reward=jpeg", "eval=null")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> PipelinePolicy:
    folder = tmp_path_factory.mktemp("model")
    return PipelinePolicy(tiny_sd3(folder), name="tiny", lora=LoraSettings(rank=2), max_sequence_length=8)


def recipe(*overrides: str) -> Config:
    return load_config(trees.CONFIG, [*trees.BASE, *SMALL, *overrides])


def rows_of(policy: PipelinePolicy, run: Callable[[], object]) -> list[int]:
    """Rows of every network call that `run` makes."""
    seen: list[int] = []
    handle = policy.network.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    run()
    handle.remove()
    return seen


# ------------------------------------------------------------------------------------------------------------- forwards
def test_the_four_figures(policy: PipelinePolicy) -> None:
    found = tree_costs.forwards(recipe(), policy, trees=2, repeats=1, clock="cpu")
    assert [row["training"]["calls"] for row in found["rows"]] == [15, 30, 64, 144]
    tree = 2 + (1 + 2 + 4 + 8) + 4 * 16
    assert [row["sampling"]["calls"] for row in found["rows"]] == [tree, tree, 160, 160]
    first, *others = found["rows"]
    assert first["training"]["ratio"] == 1 and all(row["training"]["seconds"] > 0 for row in others)
    lines = tree_costs.forwards_lines(found)
    assert len({line.count("|") for line in lines}) == 1 and "| 144 |" in lines[-1]


def test_a_forward_per_edge_has_the_gradient_of_shared_ones(policy: PipelinePolicy) -> None:
    config = configure(recipe("group_size=8"), [tree_costs.window(1, 3), "rollout.tree={branch: 2}"])
    shared = overhead.Bench(config, policy, batch=8, images=16)
    alone = shared.with_tree(tree_costs.one_state_per_edge(shared.tree))
    assert (len(shared.tree.states), len(alone.tree.states)) == (14, 28)
    assert sum(rows_of(policy, shared.gradients)) == 16 and sum(rows_of(policy, alone.gradients)) == 32  # padded

    def gradient(bench: overhead.Bench) -> torch.Tensor:
        found: list[torch.Tensor] = []
        parameters = [parameter for _, parameter in policy.trainable()]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                bench, "_clear", lambda: found.extend(p.grad.flatten() for p in parameters if p.grad is not None)
            )
            bench.gradients()
        for parameter in parameters:
            parameter.grad = None
        return torch.cat(found)

    one, other = gradient(shared), gradient(alone)
    assert one.norm() > 0 and (one - other).norm() <= 1e-5 * one.norm()


# ------------------------------------------------------------------------------------------------------------- overhead
@pytest.mark.parametrize(("roots", "splits"), [(1, 2), (3, 1), (16, 2)])
def test_bare_calls_have_the_rows_that_the_plan_counts(policy: PipelinePolicy, roots: int, splits: int) -> None:
    shape = [tree_costs.window(2, splits), "rollout.tree={branch: 2}", f"group_size={roots * 2**splits}"]
    bench = overhead.Bench(configure(recipe("prompts_per_update=1"), shape), policy, batch=64)
    fronts = [len(front.parents) * roots for front in bench.plan.frontiers]
    assert rows_of(policy, bench.bare_rollout) == fronts
    assert rows_of(policy, bench.rollout) == [-(-rows // 8) * 8 for rows in fronts]
    cost = bench.plan.cost() * roots
    assert sum(rows_of(policy, bench.bare_rollout)) == cost.sampling_calls
    assert sum(rows_of(policy, bench.bare_update)) == cost.training_forwards


def test_targets_follow_the_smallest_frontier(policy: PipelinePolicy) -> None:
    found = tree_costs.overhead(recipe(), policy, [(2, 1), (16, 1)], repeats=2, clock="cpu")
    assert [(row["part"], row["frontiers"], row["target"]) for row in found["rows"]] == [
        ("rollout", [2, 4], 1.5), ("update", [2, 2], 1.5), ("rollout", [16, 32], 1.15), ("update", [16, 16], 1.15),
    ]  # fmt: skip
    for row in found["rows"]:
        low, high = row["quartiles"]
        assert low <= row["ratio"] <= high and row["within"] == (row["ratio"] <= row["target"])
    lines = tree_costs.overhead_lines(found)
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 6


def test_runs_take_turns_at_being_first(policy: PipelinePolicy) -> None:
    order: list[str] = []
    runs = {name: partial(order.append, name) for name in "abc"}
    taken = overhead.interleaved(runs, 2, policy)
    assert "".join(order) == "cba" + "abc" + "cba"
    assert {name: len(seconds) for name, seconds in taken.items()} == {"a": 2, "b": 2, "c": 2}  # not the first round


def test_images_must_fill_trees(policy: PipelinePolicy) -> None:
    config = configure(recipe(), [tree_costs.window(0, 2), "rollout.tree={branch: 2}"])
    with pytest.raises(overhead.UserError, match="multiple of 4, the leaves"):
        overhead.Bench(config, policy, batch=8, images=6)


# ----------------------------------------------------------------------------------------------------------- statistics
def test_the_ratio_of_means_and_its_interval() -> None:
    theirs = [0.5, 1.0, 2.0, 4.0]
    exact = tree_diversity.ratio_ci([2 * x for x in theirs], theirs)
    assert (exact.mean, exact.low, exact.high, exact.prompts) == pytest.approx((2, 2, 2, 4))
    assert tree_diversity.ratio_ci([1.0, 3, float("nan")], [2.0, 2, 9]).mean == 1  # (1 + 3) / (2 + 2)

    generator = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(100):
        b = 1 + 0.3 * torch.randn(24, generator=generator)
        a = 0.8 * b + 0.1 * torch.randn(24, generator=generator)
        found = tree_diversity.ratio_ci(a.tolist(), b.tolist())
        inside += found.low <= 0.8 <= found.high
    assert inside >= 84  # 95 less what the percentile bootstrap of 24 falls short, and three standard errors


def test_variance_between_siblings_by_hand() -> None:
    plan = plans.sliding_tree(samplers.sd3_sigmas(4), (1, 3))
    rewards = torch.tensor([[0.0, 2, 6, 8], [1, 1, 1, 1]])  # means of the first split: 1 and 7, then 1 and 1
    found = tree_diversity.sibling_variance(rewards, plan, torch.tensor([0, 1]))
    assert {step: value.tolist() for step, value in found.items()} == {1: [18.0, 0.0], 2: [2.0, 0.0]}
    own = tree_diversity.own_variance(found, plan)
    assert {step: value.tolist() for step, value in own.items()} == {1: [17.0, 0.0], 2: [2.0, 0.0]}
    both = tree_diversity.sibling_variance(rewards, plan, torch.tensor([0, 0]))  # two trees of one prompt
    assert {step: value.tolist() for step, value in both.items()} == {1: [9.0], 2: [1.0]}


def test_own_variances_are_those_that_were_drawn() -> None:
    plan = plans.tree(samplers.sd3_sigmas(6), {1: 3, 2: 2, 4: 2}, noisy=range(1, 5))
    std, roots = {1: 0.5, 2: 2.0, 4: 1.0}, 4000
    generator = torch.Generator().manual_seed(1)
    value = torch.zeros(roots, len(plan))
    for node in range(1, len(plan)):
        step = plan.depths[node] - 1
        drawn = torch.randn(roots, generator=generator) * std.get(step, 0.0)
        value[:, node] = value[:, plan.parent[node]] + drawn
    value += torch.randn(roots, 1, generator=generator) * 3  # what a tree has in common does not count
    between = tree_diversity.sibling_variance(value[:, list(plan.leaves)], plan, torch.arange(roots))
    for step, own in tree_diversity.own_variance(between, plan).items():
        error = float(own.std()) / roots**0.5
        assert float(own.mean()) == pytest.approx(std[step] ** 2, abs=4 * error)


def test_spread_is_that_of_each_group() -> None:
    class Judge:
        def features(self, images: torch.Tensor) -> torch.Tensor:
            return images[:, :2, 0, 0]

    images = torch.zeros(4, 3, 1, 1)
    images[:, :2, 0, 0] = torch.tensor([[1.0, 0], [0, 1], [1, 1], [2, 2]])  # at right angles; parallel
    found = tree_diversity.spread(images, torch.tensor([1.0, 3, 5, float("nan")]), 2, Judge())
    assert found.diversity.tolist() == pytest.approx([1, 0], abs=1e-6)
    assert found.reward_std[0] == pytest.approx(2**0.5) and found.reward_std[1].isnan()
    assert found.reward[0] == 2


def test_a_difference_of_cosines_is_paired() -> None:
    a, b = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(2)) + 0.7
    found = mean_cosine(a, b)
    assert found.mean == pytest.approx(mean_cosine(a).mean - mean_cosine(b).mean)
    assert mean_cosine(a, 4 * a) == pytest.approx((0, 0, 0, 0), abs=1e-12)
    without = [mean_cosine(a[keep], b[keep]).mean for keep in (torch.arange(5) != i for i in range(5))]
    assert found.se == pytest.approx((5 - 1) ** 0.5 * float(torch.tensor(without).std(correction=0)), rel=1e-5)
    with pytest.raises(ValueError, match="pairs"):
        mean_cosine(a, b[:4])


# ---------------------------------------------------------------------------------------------------------------- plans
ALL = {**tree_diversity.PLANS, **tree_diversity.SCHEDULES}
NAMED = [(part, name) for part, rows in ALL.items() for name in rows]


@pytest.mark.parametrize(("part", "name"), NAMED, ids=[f"{part}: {name}" for part, name in NAMED])
def test_built_in_plans_make_groups_of_16(part: str, name: str) -> None:
    config = configure(load_config(trees.CONFIG, trees.BASE), ALL[part][name])
    sigmas = samplers.sd3_sigmas(10)
    plan = make_plan(config, sigmas, 0)
    assert plan.roots(config.group_size) * len(plan.leaves) == 16
    path = tree_diversity.alone(make_plan(configure(config, ["rollout.tail=null"]), sigmas, 0))
    assert len(path.leaves) == 1 and path.cost().sampling_calls == 10
    noisy = {(s, kernel, level) for s, kernel, level in zip(plan.s, plan.kernel, plan.level, strict=True) if level}
    assert noisy == {(s, k, level) for s, k, level in zip(path.s, path.kernel, path.level, strict=True) if level}


@pytest.mark.parametrize("part", ["schedule of cps 0.5", *tree_diversity.SCHEDULES])
def test_schedules_have_one_budget(part: str) -> None:
    base = load_config(trees.CONFIG, trees.BASE)
    found = [
        tree_diversity.alone(make_plan(configure(base, overrides), samplers.sd3_sigmas(10), 0)).level
        for overrides in ALL[part].values()
    ]
    budgets = [sum(level**2 for level in levels) for levels in found]
    assert budgets == pytest.approx([budgets[0]] * len(budgets)) and len(set(found)) == len(found)


# --------------------------------------------------------------------------------------------------------- command line
@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_sd3(folder / "parts").save_pretrained(folder / "model")
    return str(folder / "model")


def command(what: str, model: str, out: Path, *options: str) -> tuple[str, dict[str, Any]]:
    given = [f"policy.path={model}", *SMALL, "policy.dtype=float32", "rollout.steps=10"]
    given = [option for option in given if not option.startswith("prompts.limit")]
    result = CliRunner().invoke(trees.app, [what, *given, "--quick", *options, "--out", str(out)])
    assert result.exit_code == 0, result.output
    return result.output, json.loads(out.read_text())


def test_the_commands_of_costs(model: str, tmp_path: Path) -> None:
    text, found = command("forwards", model, tmp_path / "deep" / "forwards.json", "--clock", "cpu")
    assert "| 30 |" in text and (found["benchmark"], found["clock"], found["steps"]) == ("trees forwards", "cpu", 10)
    text, found = command("overhead", model, tmp_path / "overhead.json", "--clock", "cpu")
    assert "1 x 2" in text and len(found["rows"]) == 4


def test_the_command_of_diversity(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"roots": {"16": tree_diversity.PLANS["roots"]["16 roots"]}, "window": tree_diversity.PLANS["window"]}
    monkeypatch.setattr(tree_diversity, "PLANS", few)
    text, found = command("diversity", model, tmp_path / "diversity.json")
    same, tree = found["rows"]
    for what in ("diversity_ratio", "reward_std_ratio"):
        assert (same[what]["mean"], same[what]["low"], same[what]["high"]) == pytest.approx((1, 1, 1))
    assert same["sampling_ratio"] == same["calls_ratio"] == 1 and not same["reached"]
    assert tree["sampling_ratio"] == 111 / 160 and tree["diversity"]["mean"] != same["diversity"]["mean"]
    assert tree["diversity_alone"]["mean"] != same["diversity_alone"]["mean"]  # another window, another path
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_the_command_of_noise(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, rows = next(iter(tree_diversity.SCHEDULES.items()))
    monkeypatch.setattr(tree_diversity, "SCHEDULES", {kernel: rows})
    text, found = command("noise", model, tmp_path / "noise.json")
    constant, growing = found["rows"]
    assert (found["updates"], found["images_per_update"]) == (3, 32)
    assert constant["cosine_difference"]["mean"] == 0 and constant["diversity_ratio"]["mean"] == 1
    assert growing["cosine_difference"]["mean"] == pytest.approx(growing["cosine"]["mean"] - constant["cosine"]["mean"])
    assert list(growing["steps"]) == ["2", "3", "4", "5"] and growing["levels"] == sorted(growing["levels"])
    assert growing["diversity"]["prompts"] == 3 * 2 and "growing (0.5)" in text


# ------------------------------------------------------------------------------------------------------------- the page
PAGE = (ROOT / "docs" / "trees.md").read_text(encoding="utf-8")
DRAWN = re.findall(r"```python\n(.*?)```\s*```text\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize(("code", "drawing"), DRAWN, ids=range(len(DRAWN)))
def test_drawings_are_what_the_code_beside_them_prints(code: str, drawing: str) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    assert printed.getvalue() == drawing


def test_the_page_draws() -> None:
    assert len(DRAWN) > 4
