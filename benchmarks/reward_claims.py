"""Two claims about rewards, tried on the tiny world: same model, prompts, plan and updates, another reward.

    python -m benchmarks.reward_claims pref --seeds 0 1 2 --out runs/claims-pref
    python -m benchmarks.reward_claims adv --seeds 0 1 2 --out runs/claims-adv

pref (Pref-GRPO, arXiv 2508.20751): a win rate learns better than the scores of a noisy scorer. Noise is fixed for each
image, and advantages are z-scores of a prompt.

    pointwise       the noisy score
    win_rate        the same scores, compared pairwise
    win_rate_ties   scores no further apart than the noise's standard deviation tie
    win_rate_pairs  a judge with noise of its own in every comparison; it is asked 30 times about each image
    win_rate_flip   the sign of win_rate turned, which must not raise the score
    pref_grpo       the recipe's own judge, without noise

adv (Adv-GRPO, arXiv 2511.20256): a discriminator that learns beside the policy guards a scorer that can be hacked, here
one that also pays for colourful images, better than a KL does.

    none            the hackable scorer
    kl_WEIGHT       with a KL to the starting weights
    adversary       with the discriminator, advantages added
    adv_grpo        the discriminator alone; adv_flip: its sign turned, which must not raise the score

The policy is updated with DiffusionNFT as in the quickstart, which moves it furthest in the time. The score is the
official decision on held-out prompts; in "adv" the judge tiny-clip is what the discriminator starts from, so no
held-out one. Runs are processes of `flowrl train` in folders under --out;
finished ones are kept, and the table is of all that are there, so arms may be run by several commands, also at once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import quickstart
from benchmarks.methods_results import gain, over_seeds, read_run
from benchmarks.quickstart import Job
from benchmarks.runs import Session, launch
from benchmarks.shapes import finite
from flowrl.config import load_config
from flowrl.errors import UserError
from flowrl.summary import read_rows
from reward_models import load
from reward_models.image_stats import saturation
from reward_models.judges.pairwise import Comparison, Pairs
from reward_models.protocol import Metadata, Reward, RewardResult, RewardSpec, checked_score

NOISE = 0.5  # standard deviation; that of shapes-soft in a group of tiny-sd3 is about 0.36
COLOUR = 10.0  # what full saturation pays; its standard deviation in a group is about 0.02
KL = (0.1, 1.0)
HERE = "benchmarks.reward_claims"
COMMON = (
    "threads=1", "logging.samples_every=0", "logging.sample_prompts=0", "eval.baseline_guidance=null",
    "eval.images_per_prompt=4", "checkpoint.every=0", "updates=30", "rollout={steps: 10, kernel: ode}",
    "objective={name: nft, nft: {times: 2, advantage_clip: 2.0}}", "optimizer={lr: 1.0e-3, schedule: linear}",
)  # fmt: skip
RESULT, TABLE = "results.json", "results.md"


# ---------------------------------------------------------------------------------------------------------- the scorers
def noise_of(images: Tensor, seed: int = 0, pairs: Pairs | None = None) -> Tensor:
    """Standard normal numbers that are a function of the seed and of the 8-bit pixels of an image, or of an ordered
    pair of images.

    Args:
        images: (N, 3, H, W) in [0, 1].

    Returns:
        (N,), or one for each pair; float64.
    """
    pixels = [image.numpy().tobytes() for image in (images * 255).round().byte().cpu()]
    contents = pixels if pairs is None else [pixels[i] + pixels[j] for i, j in pairs]
    key = str(seed).encode()
    words = [hashlib.blake2b(content, digest_size=6, key=key).digest() for content in contents]
    uniform = (torch.tensor([int.from_bytes(word, "big") for word in words], dtype=torch.float64) + 0.5) / 2**48
    return torch.special.ndtri(uniform)


class NoisyReward:
    """Another reward with normal noise that is fixed for each image.

    Args:
        of: another reward in any form that a config takes; of scope "point".
        scale: standard deviation of the noise, in units of the reward.
        seed: another seed, other noise.
        device: where the reward computes.
    """

    def __init__(self, of: Any = "shapes-soft", scale: float = NOISE, seed: int = 0, device: str = "cpu") -> None:
        self.reward: Reward = load(of, device)
        self.scale, self.seed = scale, seed
        inner = self.reward.spec
        self.spec = RewardSpec(f"noisy {inner.name}", f"{inner.version} {scale:g} seed {seed}", licence=inner.licence)

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See `reward_models.Reward.score`. The part "exact" is the reward without noise."""
        found = checked_score(self.reward, images, prompts, metadata, groups, all_missing="allow")
        values = (found.values.double() + self.scale * noise_of(images, self.seed)).float()
        return RewardResult(values, {"exact": found.values}, found.reasons)


class NoisyJudge:
    """A judge of pairs: the difference of another reward's scores, with noise of its own in every comparison.

    Args:
        of, scale, seed, device: as for `NoisyReward`; the noise of a difference is sqrt(2) that of a score.
    """

    def __init__(self, of: Any = "shapes-soft", scale: float = NOISE, seed: int = 0, device: str = "cpu") -> None:
        self.noisy = NoisyReward(of, scale, seed, device)
        self.spec = RewardSpec(f"{self.noisy.spec.name} in pairs", self.noisy.spec.version)
        self.score = self.noisy.score

    def compare(self, images: Tensor, pairs: Pairs, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Comparison:
        """See `reward_models.judges.pairwise.PairJudge.compare`."""
        noisy = self.noisy
        exact = checked_score(noisy.reward, images, list(prompts), list(metadata), all_missing="allow").values.double()
        first, second = torch.tensor(list(pairs), dtype=torch.long).reshape(-1, 2).T
        gap = exact[first] - exact[second] + 2**0.5 * noisy.scale * noise_of(images, noisy.seed, pairs)
        reasons = ["an image has no score" if missing else None for missing in gap.isnan().tolist()]
        return Comparison((gap > 0).double().masked_fill(gap.isnan(), torch.nan), reasons)


class HackableReward:
    """shapes-soft and a price for colourful images, `colour` times the mean HSV saturation (in [0, 1])."""

    def __init__(self, colour: float = COLOUR) -> None:
        self.reward, self.colour = load("shapes-soft"), colour
        self.spec = RewardSpec(f"shapes-soft and {colour:g} saturation", self.reward.spec.version)

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See `reward_models.Reward.score`. Parts: "exact", shapes-soft alone; "saturation"."""
        found, colourful = self.reward.score(images, prompts, metadata), saturation(images).cpu()
        values = found.values + self.colour * colourful
        return RewardResult(values, {"exact": found.values, "saturation": colourful}, found.reasons)


# ------------------------------------------------------------------------------------------------------------- the runs
def arms(claim: str, kl: Sequence[float] = KL) -> dict[str, tuple[str, list[str]]]:
    """The arms of a claim by name, the one that others are held against first: (recipe, overrides)."""
    noisy, judge, hackable = (f"{HERE}:{name}" for name in ("NoisyReward", "NoisyJudge", "HackableReward"))

    def rates(judge: str, threshold: float = 0.0, weight: float = 1.0) -> str:
        return f"reward={{win-rate: {{weight: {weight}, judge: '{judge}', threshold: {threshold}}}, shapes-soft: 0.0}}"

    if claim == "pref":
        recipe = "pref_grpo/tiny_sd3"
        return {
            "pointwise": (recipe, [f"reward={{'{noisy}': 1.0, shapes-soft: 0.0}}"]),
            "win_rate": (recipe, [rates(noisy)]),
            "win_rate_ties": (recipe, [rates(noisy, NOISE)]),
            "win_rate_pairs": (recipe, [rates(judge)]),
            "win_rate_flip": (recipe, [rates(noisy, weight=-1.0)]),
            "pref_grpo": (recipe, []),
        }
    recipe, hacked = "adv_grpo/tiny_sd3", f"reward={{'{hackable}': 1.0}}"
    critic = "features: tiny-clip, critic: preference, layers: 2, lr: 1.0e-4, batch: 32, replay: 0"
    guarded = f"reward={{'{hackable}': 1.0, adversarial: {{weight: 1.0, {critic}}}}}"
    turned = f"reward={{adversarial: {{weight: -1.0, {critic}}}}}"
    return {
        "none": (recipe, [hacked, "adversary=null"]),
        **{f"kl_{w:g}": (recipe, [hacked, "adversary=null", f"objective.kl.weight={w}"]) for w in kl},
        "adversary": (recipe, [guarded, "advantage.combine=advantages"]),
        "adv_grpo": (recipe, []),
        "adv_flip": (recipe, [turned]),
    }


def jobs(
    claim: str, seeds: Sequence[int], out: Path, *, chosen: Sequence[str] | None = None, kl: Sequence[float] = KL,
    overrides: Sequence[str] = (),
) -> list[Job]:  # fmt: skip
    """The runs, seed by seed. UserError for an arm that is not there, or settings that cannot be used."""
    known = arms(claim, kl)
    if unknown := sorted(set(chosen or ()) - set(known)):
        raise UserError(f"got the arms {', '.join(unknown)}; expected some of {', '.join(known)}; correct --arms")
    made = []
    for seed in seeds:
        for arm in chosen or known:
            recipe, own = known[arm]
            name = f"{arm}-{seed}"
            settings = [*COMMON, f"method={arm}", *own, *overrides, f"seed={seed}", f"output_dir={out / name}"]
            made.append(Job(name, arm, load_config(recipe, settings)))
    return made


# ----------------------------------------------------------------------------------------------------------- the result
def summarise(claim: str, out: Path, found: Mapping[str, Sequence[Path]]) -> dict[str, Any]:
    """Arms over their seeds (see `methods_results.over_seeds`) from the folders of finished runs.

    "against": final score minus that of the first arm, image by image (same prompt, same noise), over seeds of both.
    """
    rows: dict[str, Any] = {}
    first = next(iter(arms(claim)))
    bases = {folder.name.rpartition("-")[2]: folder for folder in found.get(first, ())}
    for arm, folders in found.items():
        runs = [read_run(folder) for folder in folders]
        score = runs[0]["score"]
        pairs = [(bases[seed], f) for f in folders if (seed := f.name.rpartition("-")[2]) in bases]
        apart = [gain(read_rows(base, "after"), read_rows(f, "after"), "scores", score) for base, f in pairs]
        judged = [run["judge_gain"] for run in runs if run["judge_gain"] is not None]
        rows[arm] = {
            "seeds": [run["seed"] for run in runs],
            "updates": [run["updates"] for run in runs],
            "base": over_seeds([run["base"] for run in runs]),
            "final": over_seeds([run["final"] for run in runs]),
            "gain": over_seeds([run["gain"] for run in runs]),
            "judge_gain": over_seeds(judged) if judged else None,
            "against": over_seeds(apart) if apart and arm != first else None,
            "diversity": [run["eval_diversity"] for run in runs],
            "alarms": [run["alarms"] for run in runs],
        }
    return finite({"benchmark": "reward_claims", "claim": claim, "against": first, "arms": rows})


def markdown(result: Mapping[str, Any]) -> str:
    """The arms as a table."""
    head = ("arm", "seeds", "before", "after", "gain", "judge change", f"against {result['against']}")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for arm, row in result["arms"].items():
        cells = [arm, str(len(row["seeds"])), *(f"{row[key]['mean']:.3f}" for key in ("base", "final"))]
        cells += [_interval(row[key]) for key in ("gain", "judge_gain", "against")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _interval(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return "-"
    low, high = ("?" if end is None else f"{end:+.3f}" for end in value["ci95"])
    return f"{value['mean']:+.3f} [{low}, {high}]"


def measure(
    claim: str, seeds: Sequence[int], out: str | Path, *, chosen: Sequence[str] | None = None,
    kl: Sequence[float] = KL, overrides: Sequence[str] = (), start: Callable[[list[str]], Session] = launch,
) -> dict[str, Any]:  # fmt: skip
    """Run everything that is not there yet; returns what is written to `results.json`."""
    out = Path(out)
    todo = jobs(claim, seeds, out, chosen=chosen, kl=kl, overrides=overrides)
    out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {}
    for job in todo:
        quickstart.run(job, out, start)
        there = sorted(path.parent for path in out.glob("*-*/summary.json"))
        order = dict.fromkeys([*arms(claim, kl), *(folder.name.rpartition("-")[0] for folder in there)])
        found = {arm: [f for f in there if f.name.rpartition("-")[0] == arm] for arm in order}
        result = summarise(claim, out, {arm: folders for arm, folders in found.items() if folders})
        (out / RESULT).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (out / TABLE).write_text(markdown(result), encoding="utf-8")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_intermixed_args(arguments)
    try:
        out = given.out or Path(f"runs/claims-{given.claim}")
        result = measure(given.claim, given.seeds, out, chosen=given.arms, kl=given.kl, overrides=given.overrides)
    except UserError as error:
        print(f"benchmarks.reward_claims: {error}", file=sys.stderr)
        return error.exit_code
    print(markdown(result), end="")
    return 0


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(prog=f"python -m {HERE}", description=str(__doc__).splitlines()[0])
    parser.add_argument("claim", choices=("pref", "adv"))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings to change, with dotted keys")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run of each arm for each")
    parser.add_argument("--arms", nargs="+", help="only these; default: all of the claim")
    parser.add_argument("--kl", type=float, nargs="+", default=list(KL), help="adv: weights of the KL, an arm each")
    parser.add_argument("--out", type=Path, help="folder of the runs; default runs/claims-CLAIM")
    return parser


if __name__ == "__main__":
    sys.exit(main())
