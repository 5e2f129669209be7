"""What flowrl costs on top of the network: rollout and update against bare calls of the same network.

    python -m benchmarks.overhead
    python -m benchmarks.overhead flow_grpo_fast/tiny_sd3 policy.dtype=bfloat16 --batches 16 64 --json overhead.json

rollout: `samplers.rollout` through `policy.predict`: conditioning, padding, keyed noise, steps, log-probs, storage.
         Bare: the network called with prepared tensors, the same numbers of rows in the same order, no gradient.
update:  an update of the recipe: forwards, log-probs, objective, metrics, backwards, gradient clipping, optimizer, EMA.
         Bare: forward and backward of the network for the same micro-batches, nothing else.

Decoding and rewards are in neither. The bare network keeps its LoRA and its autocast. Timings of both kinds alternate,
and a ratio is taken between neighbours, so that a change in the machine's load meets both. Reported: the median of the
ratios and their quartiles.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

import samplers
from flowrl.config import Config, load_config
from flowrl.distributed import World
from flowrl.errors import UserError
from flowrl.objectives import get_objective
from flowrl.planning import make_plan
from flowrl.policies import PipelinePolicy, load_policy
from flowrl.policies.weights import LoraSettings
from flowrl.prompts import load_prompts
from flowrl.state import State
from flowrl.update import Batch, RootConditioning, UpdateSettings, accumulate_gradients

TARGETS = {"rollout": 1.10, "update": 1.15}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
ROWS = 8  # policies pad small batches to a multiple of it
K = TypeVar("K")


@dataclass(frozen=True)
class Ratio:
    """Seconds of ours and of the bare network, one pair per repeat."""

    ours: tuple[float, ...]
    bare: tuple[float, ...]

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """(lower quartile, median, upper quartile) of ours / bare."""
        ratios = [a / b for a, b in zip(self.ours, self.bare, strict=True)]
        if len(ratios) == 1:
            return ratios[0], ratios[0], ratios[0]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return low, middle, high


class Bench:
    """A recipe's rollout and update, and the bare calls that they are made of, on batches of one size.

    config: a run's, of trajectories or of trees. policy: its policy. batch: most rows per model call, a multiple of 8.
    images: of one rollout, a multiple of the leaves of a root; default the recipe's. The bare calls have the rows that
    the plan counts: without those that the policy adds to a small batch.
    """

    def __init__(self, config: Config, policy: PipelinePolicy, batch: int, images: int | None = None) -> None:
        images = images or config.prompts_per_update * config.group_size
        if batch < ROWS or batch % ROWS:
            raise UserError(
                f"got batch {batch}; expected a multiple of {ROWS}, the rows that policies pad to; change --batches"
            )
        self.config, self.policy, self.batch = config, policy, batch
        self.shape = policy.latent_shape(config.rollout.height, config.rollout.width)
        self.plan = make_plan(
            config, policy.sigmas(config.rollout.steps, config.rollout.height, config.rollout.width), 0
        )
        groups = max(1, images // config.group_size)
        texts = [prompt.text for prompt in load_prompts(**config.prompts.model_dump())[:groups]]
        roots, rest = divmod(images, len(self.plan.leaves))
        if roots < 1 or rest:
            raise UserError(
                f"got {images} images; expected a multiple of {len(self.plan.leaves)}, the leaves of a root; "
                "change --images"
            )
        self.group = torch.arange(roots) * len(texts) // roots
        self.cond = RootConditioning(policy.encode(texts), self.group)
        self.keys = [samplers.Key(config.seed, "overhead", 0, int(g), 0, k) for k, g in enumerate(self.group)]
        self.objective = get_objective(
            config.objective.name, clip_range=config.objective.clip, kl_weight=config.objective.kl.weight
        )
        self.settings = UpdateSettings(config.rollout.guidance, batch, config.objective.kl.form)
        self.state = State.create(config, policy)
        self.world = World(0, 1, policy.device)
        self._train_on(self.rollout())

    def with_tree(self, tree: samplers.Tree) -> Bench:
        """The same bench, whose updates train on this tree instead of its first rollout."""
        other = copy.copy(self)
        other._train_on(tree)
        return other

    def _train_on(self, tree: samplers.Tree) -> None:
        self.tree = tree
        edges = len(tree.edges)
        advantage = torch.randn(edges, generator=torch.Generator().manual_seed(0))
        part = (self.group % self.config.optimizer.inner_updates)[tree.states.root]
        self.data = Batch(tree, self.cond, advantage, torch.ones(edges), self.group, part)
        micro = itertools.chain.from_iterable(self._micro_batches(inner) for inner in self._inner())
        self.micro_batches = tuple(micro)
        sizes = {*tree.calls, *self.micro_batches}
        self.inputs = {size: self._capture(size) for size in sorted(sizes)}

    def rollout(self) -> samplers.Tree:
        """One rollout of all images."""
        r = self.config.rollout

        def predict(x: Tensor, s: Tensor, index: Tensor) -> Tensor:
            return self.policy.predict(x, s, self.cond[index], r.guidance)

        return samplers.rollout(
            predict, self.plan, self.keys, latent_shape=self.shape, chunk=self.batch, device=self.policy.device,
            density=samplers.Density(r.kernel, r.reduction, r.density), prior_std=self.policy.prior_std(self.plan.s[0]),
        )  # fmt: skip

    def update(self) -> None:
        """One update on the first rollout, optimizer steps included."""
        for inner in self._inner():
            loss = self._accumulate(inner)
            parameters = [parameter for _, parameter in self.policy.trainable()]
            self.state.step(self.config, self.policy, parameters, self.world, loss=loss)
            self._clear()

    def gradients(self) -> None:
        """The same without optimizer steps."""
        for inner in self._inner():
            self._accumulate(inner)
        self._clear()

    @torch.no_grad()
    def bare_rollout(self) -> None:
        """The network calls of `rollout`."""
        for size in self.tree.calls:
            self._call(size)

    def bare_update(self) -> None:
        """The network calls of `update` with their backward passes."""
        for size in self.micro_batches:
            self._call(size).float().mean().backward()
        self._clear()

    def _accumulate(self, inner: int) -> float:
        weight = float((self.data.part[self.tree.edges.state] == inner).sum())
        found, _ = accumulate_gradients(
            self.policy, self.data, inner, self.objective, weight, self.settings, scale=self.state.scaler.scale
        )
        return found.loss

    def _clear(self) -> None:
        for _, parameter in self.policy.trainable():
            parameter.grad = None

    def _inner(self) -> range:
        return range(self.config.optimizer.inner_updates)

    def _micro_batches(self, inner: int) -> list[int]:
        rows = int((self.data.part == inner).sum())
        return [min(self.batch, rows - start) for start in range(0, rows, self.batch)]

    def _call(self, size: int) -> Tensor:
        with self.policy.autocast():
            return self.policy.network(**self.inputs[size])[0]

    @torch.no_grad()
    def _capture(self, size: int) -> dict[str, Any]:
        """What the policy hands to its network for `size` rows, without the rows that it adds to them."""
        seen: list[dict[str, Any]] = []
        handle = self.policy.network.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
        )
        try:
            rows = torch.arange(size) % len(self.keys)
            x = torch.randn(size, *self.shape, generator=torch.Generator().manual_seed(0))
            self.policy.predict(
                x.to(self.policy.device), torch.full((size,), 0.5), self.cond[rows], self.settings.guidance
            )
        finally:
            handle.remove()
        rows_sent = size * self.policy.calls(self.settings.guidance)
        return {
            name: value.detach()[: None if name.endswith("_ids") else rows_sent]  # ids of places: all rows share them
            if isinstance(value, Tensor)
            else value
            for name, value in seen[0].items()
        }


def measure(
    config: Config,
    policy: PipelinePolicy,
    batches: Sequence[int],
    repeats: int,
    *,
    images: int | None = None,
    clock: str = "wall",
) -> dict[int, dict[str, Ratio]]:
    """Ratios of rollout and update for each batch size. One round of everything runs before the first measurement."""
    benches = [Bench(config, policy, batch, images) for batch in batches]
    runs: dict[tuple[int, str, str], Callable[[], object]] = {}
    for bench in benches:
        runs[bench.batch, "rollout", "ours"], runs[bench.batch, "rollout", "bare"] = bench.rollout, bench.bare_rollout
        runs[bench.batch, "update", "ours"], runs[bench.batch, "update", "bare"] = bench.update, bench.bare_update
    times = interleaved(runs, repeats, policy, clock)
    return {
        bench.batch: {
            what: Ratio(times[bench.batch, what, "ours"], times[bench.batch, what, "bare"])
            for what in ("rollout", "update")
        }
        for bench in benches
    }


def interleaved(
    runs: Mapping[K, Callable[[], object]], repeats: int, policy: PipelinePolicy, clock: str = "wall"
) -> dict[K, tuple[float, ...]]:
    """Seconds of each run in each repeat. The order is turned round every time, so that neither of two neighbours is
    always first; one round of everything comes before the first measurement."""

    def seconds(run: Callable[[], object]) -> float:
        _wait(policy)
        start = CLOCKS[clock]()
        run()
        _wait(policy)
        return CLOCKS[clock]() - start

    rounds = []
    for repeat in range(repeats + 1):
        names = list(runs) if repeat % 2 else list(runs)[::-1]
        rounds.append({name: seconds(runs[name]) for name in names})
    return {name: tuple(taken[name] for taken in rounds[1:]) for name in runs}


def _wait(policy: PipelinePolicy) -> None:
    if policy.device.type == "cuda":
        torch.cuda.synchronize(policy.device)


def as_json(
    found: dict[int, dict[str, Ratio]], config: Config, policy: PipelinePolicy, images: int, clock: str
) -> dict[str, Any]:
    """Everything that the ratios depend on, and the ratios."""
    rows = []
    for batch, ratios in found.items():
        for what, ratio in ratios.items():
            low, middle, high = ratio.quartiles
            rows.append(
                {
                    "batch": batch,
                    "part": what,
                    "ratio": middle,
                    "quartiles": [low, high],
                    "ours_s": statistics.median(ratio.ours),
                    "bare_s": statistics.median(ratio.bare),
                    "repeats": len(ratio.ours),
                    "target": TARGETS[what],
                    "within": middle <= TARGETS[what],
                }
            )
    return {
        "benchmark": "overhead",
        "policy": policy.name,
        "dtype": config.policy.dtype,
        "device": policy.device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "clock": clock,
        "images": images,
        "steps": config.rollout.steps,
        "guidance": config.rollout.guidance,
        "rows": rows,
    }


def lines(result: dict[str, Any]) -> list[str]:
    """The result as a table for people."""
    where = f"{result['dtype']} on {result['device']}, {result['threads']} thread(s), torch {result['torch']}"
    out = [
        f"{result['policy']}, {where}",
        f"{result['images']} images of {result['steps']} steps per rollout, {result['clock']} clock",
        f"{'batch':>5}  {'part':<8}{'ours':>10}{'bare':>10}{'ratio':>8}   quartiles       target",
    ]
    for row in result["rows"]:
        low, high = row["quartiles"]
        verdict = "within" if row["within"] else "ABOVE"
        out.append(
            f"{row['batch']:>5}  {row['part']:<8}{row['ours_s']:>9.3f}s{row['bare_s']:>9.3f}s{row['ratio']:>8.3f}"
            f"   {low:.3f} to {high:.3f}  {verdict} {row['target']:.2f}"
        )
    return out


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    given = parser().parse_intermixed_args(arguments)
    if given.repeats < 1:
        parser().error(f"got --repeats {given.repeats}; expected at least 1")
    if "=" in given.config:
        given.config, given.overrides = "flow_grpo_fast/tiny_sd3", [given.config, *given.overrides]
    config = load_config(given.config, given.overrides)
    if given.threads:
        torch.set_num_threads(given.threads)
    p, targets = config.policy, config.policy.lora.targets
    chosen = None if targets is None else tuple(targets)
    lora = LoraSettings(p.lora.rank, p.lora.alpha, chosen, p.lora.init, seed=config.seed)
    policy = load_policy(
        p.path, dtype=p.dtype, device=p.device, quantize=p.quantize, attention=p.attention, train=p.train,
        gradient_checkpointing=p.gradient_checkpointing, revision=p.revision, lora=lora,
    )  # fmt: skip
    found = measure(config, policy, given.batches, given.repeats, images=given.images, clock=given.clock)
    images = given.images or config.prompts_per_update * config.group_size
    result = as_json(found, config, policy, images, given.clock)
    print("\n".join(lines(result)))
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=str(__doc__).splitlines()[0])
    parser.add_argument("config", nargs="?", default="flow_grpo_fast/tiny_sd3", help="a YAML file or a shipped config")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings to change, with dotted keys")
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 48, 64], help="rows per model call")
    parser.add_argument("--repeats", type=int, default=7, help="pairs of measurements")
    parser.add_argument("--images", type=int, help="images per rollout; default: the recipe's")
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    parser.add_argument(
        "--clock",
        choices=sorted(CLOCKS),
        default="wall",
        help="cpu counts processor time, where other jobs disturb less",
    )
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    return parser


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"benchmarks.overhead: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
