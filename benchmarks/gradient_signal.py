"""Which kernel, level, steps and density give a policy gradient that can be heard?

    python -m benchmarks.gradient_signal
    python -m benchmarks.gradient_signal --updates 6 --setting "as it is:" --setting "cps 0.5: rollout.level=0.5"

The gradient of an update is a signal and the noise of the few prompts and images it was drawn from: g = mu + e. The
gradients of independent updates share the signal alone, so their cosine is in the mean, for many parameters,

    cos(g, g') = |mu|^2 / (|mu|^2 + E |e|^2),

the share of a gradient that is signal. At 0 nothing is learnt. It grows with the images of an update, so settings are
compared with equal numbers, and the time of an update stands beside.

Every setting is the config with some overrides. It draws a number of Flow-GRPO updates from the weights that the config
starts from, with the seeds SEED, SEED + 1, ... and no optimizer step between them, as the trainer draws its first one.
What is measured is the gradient of all trained steps together, as an optimizer would see it, and of each step alone.

Pairs share updates and are not independent, so the standard error is a jackknife over updates, and the interval its
95 % one by Student's t. The jackknife errs on the safe side: without any signal it is about 1.4 times too large.
"""

from __future__ import annotations

import json
import platform
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

import samplers
from flowrl import load_policy
from flowrl.assign import assign
from flowrl.cli import verb
from flowrl.config import Config, apply_overrides, load_config, parse_config
from flowrl.errors import UserError
from flowrl.objectives import get_objective
from flowrl.planning import make_plan
from flowrl.policies import LoraSettings, PipelinePolicy, Policy
from flowrl.policies.loading import find_device
from flowrl.prompts import Prompt, Slot, load_prompts, prompt_batch
from flowrl.rewards import load_reward
from flowrl.update import Batch, RootConditioning, UpdateSettings, accumulate_gradients
from reward_models.protocol import Reward, checked_score, to_8bit

FEWEST = 3  # updates that a jackknife of pairs needs
NO_CLIP = 0.5  # on-policy every ratio is 1 up to rounding, which a published clip range may be smaller than

_FLOW = ("rollout.kernel=flow", "rollout.level=0.7", "rollout.density=gaussian")
_CPS = ("rollout.kernel=cps", "rollout.level=0.8", "rollout.density=unscaled")
_DANCE = ("rollout.kernel=dance", "rollout.level=0.3", "rollout.density=gaussian")
_ALL, _EARLY = "rollout.window=null", "rollout.window={size: 2, low: 2, high: 4}"
SETTINGS: dict[str, tuple[str, ...]] = {
    "flow, all steps": (*_FLOW, _ALL),
    "flow, steps 2 and 3": (*_FLOW, _EARLY),
    "cps unscaled, steps 2 and 3": (*_CPS, _EARLY),  # as in flow_grpo_fast/tiny_sd3
    "dance, all steps": (*_DANCE, _ALL),
}


# ------------------------------------------------------------------------------------------------------------ estimator
class Cosine(NamedTuple):
    """Mean cosine over the pairs of some gradients, its standard error and its 95 % interval."""

    mean: float
    se: float
    low: float
    high: float


def mean_cosine(gradients: Tensor, minus: Tensor | None = None) -> Cosine:
    """Mean cosine over all pairs of U gradients (U, D), U >= 3; one of zeros has the cosine 0 with every other.

    Jackknife over gradients, theta_i being the mean without gradient i: se^2 = (U - 1) / U sum_i (theta_i - theta)^2.
    minus: gradients (U, D) of the same updates in another setting, whose mean cosine is subtracted; the interval is
    then that of the difference.
    """
    n = len(gradients)
    if n < FEWEST:
        raise ValueError(f"got {n} gradients; expected at least {FEWEST}; draw more updates")
    mean, without = _cosines(gradients)
    if minus is not None:
        if len(minus) != n:
            raise ValueError(f"got {n} gradients minus {len(minus)}; expected pairs; draw the same updates")
        other = _cosines(minus)
        mean, without = mean - other[0], without - other[1]
    se = float((n - 1) ** 0.5 * without.std(correction=0))
    reach = float(stats.t.ppf(0.975, n - 1)) * se
    return Cosine(mean, se, mean - reach, mean + reach)


def _cosines(gradients: Tensor) -> tuple[float, Tensor]:
    """The mean cosine of all pairs, and (U,) those without each of the gradients."""
    n = len(gradients)
    unit = F.normalize(gradients.double(), dim=1)
    cosines = (unit @ unit.T).fill_diagonal_(0)
    of_each = cosines.sum(1)
    total = of_each.sum() / 2
    return float(total / (n * (n - 1) / 2)), (total - of_each) / ((n - 1) * (n - 2) / 2)


# -------------------------------------------------------------------------------------------------------------- updates
@dataclass(frozen=True)
class Update:
    """One update: its gradient by trained step, each (D,) float32; mean reward of its images; seconds it took."""

    steps: dict[int, Tensor]
    reward: float
    seconds: float

    @property
    def gradient(self) -> Tensor:
        """(D,) of all steps: what an optimizer would be given."""
        return torch.stack(list(self.steps.values())).sum(0)


class Drawn(NamedTuple):
    """A rollout and its rewards.

    tree: of R roots with L leaves each. cond: of the roots. place: (R,) which of the update's prompts a root has.
    images: (R L, 3, H, W) in [0, 1]. rewards: (R, L), NaN = missing.
    """

    tree: samplers.Tree
    cond: RootConditioning
    place: Tensor
    images: Tensor
    rewards: Tensor


def roll_out(
    config: Config,
    policy: Policy,
    prompts: Sequence[Prompt],
    reward: Reward,
    slots: Sequence[Slot],
    plan: samplers.Plan | None = None,
) -> Drawn:
    """The first rollout of a run: `config.group_size` images for every slot. plan: instead of the config's."""
    r = config.rollout
    if plan is None:
        plan = make_plan(config, policy.sigmas(r.steps, r.height, r.width), 0)
    roots = range(plan.roots(config.group_size))
    place = torch.arange(len(slots)).repeat_interleave(len(roots))
    cond = RootConditioning(policy.encode([prompts[slot.prompt].text for slot in slots]), place)
    keys = [samplers.Key(config.seed, "rollout", 0, slot.prompt, slot.occurrence, k) for slot in slots for k in roots]

    def predict(x: Tensor, s: Tensor, index: Tensor) -> Tensor:
        return policy.predict(x, s, cond[index], r.guidance)

    tree = samplers.rollout(
        predict, plan, keys, latent_shape=policy.latent_shape(r.height, r.width), chunk=r.chunk, device=policy.device,
        density=samplers.Density(r.kernel, r.reduction, r.density), prior_std=policy.prior_std(plan.s[0]),
        init_keys=[key._replace(root=None) for key in keys] if r.shared_noise else keys,
    )  # fmt: skip
    with torch.no_grad():
        images = torch.cat([to_8bit(policy.decode(part)).cpu() for part in tree.leaves.flatten(0, 1).split(r.chunk)])
    leaves = place.repeat_interleave(len(plan.leaves))
    chosen = [prompts[slots[number].prompt] for number in leaves.tolist()]
    scored = checked_score(reward, images, [p.text for p in chosen], [p.metadata for p in chosen], leaves)
    return Drawn(tree, cond, place, images, scored.values.view(len(keys), -1))


def step_gradients(config: Config, policy: Policy, drawn: Drawn) -> dict[int, Tensor]:
    """The gradient (D,) of a rollout's loss by trained step; the policy is left as it was."""
    tree, place, roots = drawn.tree, drawn.place, len(drawn.place)
    credit = assign(
        config, tree.plan, drawn.rewards, place, prompts=place, rows=torch.arange(roots), total=roots, history=None,
        reduce=lambda sums: sums,
    ).credit  # fmt: skip
    edges = (tree.edges.root, tree.edges.node)
    step = torch.tensor(tree.plan.depths)[tree.states.node]  # each step as an "inner update" of its own
    batch = Batch(tree, drawn.cond, credit.advantages[edges].float(), credit.weights[edges], place, step)
    return {int(k): gradient(config, policy, batch, int(k)) for k in step.unique()}


def draw(config: Config, policy: Policy, prompts: Sequence[Prompt], reward: Reward, seed: int) -> Update:
    """The first update of a run of this seed, up to its gradient; the policy is left as it was."""
    start = time.perf_counter()
    config = config.model_copy(update={"seed": seed})
    drawn = roll_out(config, policy, prompts, reward, prompt_batch(len(prompts), config.prompts_per_update, seed, 0))
    gradients = step_gradients(config, policy, drawn)
    return Update(gradients, float(drawn.rewards.nanmean()), time.perf_counter() - start)


def gradient(config: Config, policy: Policy, batch: Batch, part: int) -> Tensor:
    """(D,) what the states of one part add to the gradient of the whole batch's loss, on the CPU."""
    o, parameters = config.objective, [parameter for _, parameter in policy.trainable()]
    objective = get_objective(o.name, clip_range=NO_CLIP, kl_weight=o.kl.weight)
    settings = UpdateSettings(config.rollout.guidance, config.optimizer.micro_batch, o.kl.form)
    normaliser = float(batch.weight.double().sum()) or 1.0
    accumulate_gradients(policy, batch, part, objective, normaliser, settings)
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return torch.cat([grad.flatten() for grad in found]).float().cpu()


# ------------------------------------------------------------------------------------------------------------- settings
def measure(
    config: Config,
    policy: Policy,
    seeds: Sequence[int],
    on_update: Callable[[int, Update], None] = lambda number, update: None,
) -> dict[str, Any]:
    """Cosine, norm, reward and time of one setting, and cosine and norm of each step that enough updates trained.

    seeds: one update each. on_update(number from 1, update) is called after every one.
    """
    prompts = load_prompts(**config.prompts.model_dump())
    reward = load_reward(config.reward, device=policy.device)
    updates: list[Update] = []
    for number, seed in enumerate(seeds, start=1):
        updates.append(draw(config, policy, prompts, reward, seed))
        on_update(number, updates[-1])
    sigmas = policy.sigmas(config.rollout.steps, config.rollout.height, config.rollout.width).tolist()
    by_step: dict[int, list[Tensor]] = {}
    for update in updates:
        for step, found in update.steps.items():
            by_step.setdefault(step, []).append(found)
    return {
        **_summary([update.gradient for update in updates]),
        "reward": sum(update.reward for update in updates) / len(updates),
        "seconds_per_update": sum(update.seconds for update in updates) / len(updates),
        "steps": [
            {"step": step, "s": sigmas[step], "s_next": sigmas[step + 1], **_summary(found)}
            for step, found in sorted(by_step.items())
            if len(found) >= FEWEST  # a random window may visit a step less often
        ],
    }


def _summary(gradients: list[Tensor]) -> dict[str, Any]:
    stacked = torch.stack(gradients)
    found = mean_cosine(stacked)
    return {
        "updates": len(gradients),
        "cosine": found.mean,
        "se": found.se,
        "ci95": [found.low, found.high],
        "norm": float(stacked.double().norm(dim=1).mean()),
    }


def configure(base: Config, overrides: Sequence[str]) -> Config:
    """The base config with a setting's overrides; clip range and KL weight follow it to its density.

    A setting that names a kernel and no level has the published level of that kernel.
    """
    data, found = apply_overrides(base.model_dump(mode="json", by_alias=True), overrides)
    if isinstance(data["rollout"], dict) and isinstance(data["objective"], dict):
        named = {override.partition("=")[0] for override in overrides}
        if "rollout.kernel" in named and "rollout.level" not in named:
            data["rollout"]["level"] = None
        parts = ("kernel", "reduction", "density")
        data["objective"]["measured_with"] = {k: data["rollout"][k] for k in parts if k in data["rollout"]}
    return parse_config(data, already=found)


def parse_settings(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Settings written as "NAME: KEY=VALUE KEY=VALUE"; quotes keep a value with blanks together."""
    found: dict[str, tuple[str, ...]] = {}
    for text in texts:
        name, colon, rest = (part.strip() for part in text.partition(":"))
        try:
            overrides = tuple(shlex.split(rest))
        except ValueError as error:  # an open quote
            raise UserError(f"got --setting {text!r} ({error}); expected quotes in pairs; close the quote") from error
        if not colon or not name or name in found:
            raise UserError(
                f"got --setting {text!r}; expected NAME: KEY=VALUE ... with a name of its own; "
                'write for example "precise: rollout.kernel=precise rollout.level=1.2"'
            )
        found[name] = overrides
    return found


def load(config: Config) -> PipelinePolicy:
    """The policy that a run of this config starts from."""
    p, targets = config.policy, config.policy.lora.targets
    if p.dtype == "float16":
        raise UserError(
            "got policy.dtype float16, whose gradients need a loss scale; expected float32 or bfloat16; "
            "set policy.dtype=bfloat16"
        )
    lora = LoraSettings(
        p.lora.rank, p.lora.alpha, None if targets is None else tuple(targets), p.lora.init, p.lora.start_from,
        config.seed,
    )  # fmt: skip
    return load_policy(
        p.path, dtype=p.dtype, device=p.device, quantize=p.quantize, attention=p.attention, train=p.train,
        gradient_checkpointing=p.gradient_checkpointing, revision=p.revision, lora=lora,
        reference=p.reference and config.objective.kl.weight > 0,
    )  # fmt: skip


def compare(
    base: Config,
    settings: Mapping[str, Sequence[str]],
    updates: int,
    *,
    say: Callable[[str], None] = print,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure all settings with the same seeds, say each one's lines as soon as they are known, return everything."""
    configs = {name: configure(base, overrides) for name, overrides in settings.items()}  # all mistakes come first
    seeds = range(base.seed, base.seed + updates)
    rows: list[dict[str, Any]] = []
    loaded: tuple[Any, PipelinePolicy] | None = None
    for name, config in configs.items():
        if loaded is None or loaded[0] != config.policy:
            loaded = config.policy, load(config)

        def tell(number: int, update: Update, name: str = name) -> None:
            progress(f"{name}: update {number} of {updates}, {update.seconds:.1f} s, reward {update.reward:.3f}")

        row = {"name": name, "overrides": list(settings[name])} | measure(config, loaded[1], seeds, tell)
        for line in lines(row, header=not rows):
            say(line)
        rows.append(row)
    return {
        "benchmark": "gradient_signal",
        "policy": base.policy.path,
        "dtype": base.policy.dtype,
        "device": find_device(base.policy.device).type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "seeds": list(seeds),
        "images_per_update": base.prompts_per_update * base.group_size,
        "settings": rows,
    }


def lines(row: dict[str, Any], header: bool = False) -> list[str]:
    """One setting and its steps as lines of a table."""
    out = [f"{'':<32}{'cosine':>8}   95 % interval     {'norm':>9}{'reward':>8}{'s/update':>10}"] if header else []
    out.append(f"{row['name']:<32}{_cells(row)}{row['reward']:>8.3f}{row['seconds_per_update']:>10.1f}")
    for step in row["steps"]:
        label = f"  step {step['step']}: s {step['s']:.3f} to {step['s_next']:.3f}"
        drawn = "" if step["updates"] == row["updates"] else f"   in {step['updates']} updates"
        out.append(f"{label:<32}{_cells(step)}{drawn}")
    return out


def _cells(found: dict[str, Any]) -> str:
    low, high = found["ci95"]
    return f"{found['cosine']:>8.3f}   {f'{low:+.3f} to {high:+.3f}':<18}{found['norm']:>9.1e}"


# --------------------------------------------------------------------------------------------------------- command line
app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
@verb
def main(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to the config of all settings.")
    ] = None,
    config: Annotated[str, typer.Option(help="A YAML file or a shipped config.")] = "flow_grpo_fast/tiny_sd3",
    setting: Annotated[
        list[str] | None,
        typer.Option(help='"NAME: KEY=VALUE ...", instead of the built-in settings; repeat it to compare several.'),
    ] = None,
    updates: Annotated[int, typer.Option(min=FEWEST, help="Updates drawn for each setting.")] = 24,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the first update; default: the config's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the result to this JSON file.")] = None,
) -> None:
    """Mean cosine between the gradients of independent updates: the signal's share of a gradient.

    Built-in settings: flow with all steps, flow in steps 2 and 3, cps without its
    scale in steps 2 and 3 (as in flow_grpo_fast/tiny_sd3), dance. They take about ten minutes
    on one quiet core. A setting "NAME:" without overrides is the config as it is.

    Example: python -m benchmarks.gradient_signal --updates 6 --out signal.json
    --setting "as it is:" --setting "precise: rollout.kernel=precise"
    """
    settings = parse_settings(setting) if setting else SETTINGS
    base = load_config(config, [*(overrides or []), *([] if seed is None else [f"seed={seed}"])])
    if base.threads:
        torch.set_num_threads(base.threads)
    result = compare(base, settings, updates, say=typer.echo, progress=lambda line: typer.echo(line, err=True))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        typer.echo(f"written to {out}")


if __name__ == "__main__":
    app()
