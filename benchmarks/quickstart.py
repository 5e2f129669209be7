"""Does the quickstart learn, and does it learn what it is rewarded for? Several seeds, and two controls.

    python -m benchmarks.quickstart --seeds 0 1 2 --control flip shuffle --out runs/bench-quickstart

flip:    the reward's sign is turned: the score must fall.
shuffle: rewards change places within their group, so that images and rewards have nothing to do with each other while
         their distribution stays: the score must not rise.

Every run is a process of its own, `flowrl train` as a user starts it, in a folder under --out. Finished runs are kept
and a stopped one goes on when the same command is given again. Writes `results.json` and `results.md`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.runs import SESSIONS, Session, launch, prepare, record
from flowrl.config import Config, load_config, parse_config
from flowrl.errors import UserError
from flowrl.runlog import read_jsonl
from reward_models import load
from reward_models.protocol import Metadata, Reward, RewardResult, RewardSpec, checked_score

CONTROLS = ("flip", "shuffle")
MAX_WALL_S, MAX_RSS_MB = 480.0, 2500.0
LEAST_GAIN, LEAST_LOW = 0.15, 0.05  # of a seed, and of the lower end of its interval
RESULT, TABLE = "results.json", "results.md"


# --------------------------------------------------------------------------------------------------------- the controls
class ShuffledReward:
    """The values of another reward, permuted among the images of each group.

    The permutation orders the images by a hash of (seed, pixels). So it is fixed by the images alone, whatever the
    process or the number of calls before, and tells nothing about their value.

    Args:
        of: the reward to shuffle, in any form that a config takes.
        seed: another seed, another permutation.
        device: where the reward computes.
    """

    def __init__(self, of: Any, seed: int = 0, device: str = "cpu") -> None:
        self.reward: Reward = load(of, device)
        self.seed = seed
        inner = self.reward.spec
        self.spec = RewardSpec(
            f"shuffled {inner.name}", inner.version, "group", inner.range, inner.higher_is_better, inner.licence,
            inner.preprocessing,
        )  # fmt: skip

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See `reward_models.Reward.score`; ValueError without groups."""
        if groups is None:
            raise ValueError("got no groups; expected the group of each image; score through a trainer")
        result = checked_score(self.reward, images, prompts, metadata, groups, all_missing="allow")
        levels = (images * 255).round().byte().cpu()
        seed = str(self.seed).encode()
        order = [hashlib.blake2b(image.numpy().tobytes(), digest_size=16, key=seed).digest() for image in levels]
        source = torch.arange(len(images))
        for group in groups.unique():
            rows = (groups == group).nonzero().flatten().tolist()
            source[rows] = torch.tensor(sorted(rows, key=order.__getitem__))
        reasons = [result.reasons[i] for i in source.tolist()]
        return RewardResult(result.values[source], reasons=reasons)


def flipped(reward: Any) -> dict[str, Any]:
    """The reward of a config with every weight negated."""
    spec = {reward: 1.0} if isinstance(reward, str) else reward
    if "combine" in spec or "transform" in spec:
        return {"flipped": {"weight": -1.0, "reward": spec}}
    return {
        name: {**entry, "weight": -entry["weight"]} if isinstance(entry, Mapping) else -entry
        for name, entry in spec.items()
    }


def control(kind: str, reward: Any) -> Any:
    """The reward of a control run, from that of the recipe. kind: "flip" or "shuffle"."""
    if kind == "flip":
        return flipped(reward)
    return {"benchmarks.quickstart:ShuffledReward": {"weight": 1.0, "of": reward}}


# ------------------------------------------------------------------------------------------------------------- the runs
@dataclass(frozen=True)
class Job:
    """One run: its name under --out, what it is ("seed", "flip" or "shuffle"), and its config."""

    name: str
    kind: str
    config: Config


Launch = Callable[[list[str]], Session]


def jobs(config: Config, seeds: Sequence[int], controls: Sequence[str], out: Path) -> list[Job]:
    """The runs of a benchmark: the recipe with every seed, then the controls with the first."""
    wanted = [(f"seed-{seed}", "seed", seed, config.reward) for seed in seeds]
    wanted += [(f"{kind}-{seeds[0]}", kind, seeds[0], control(kind, config.reward)) for kind in controls]
    made = []
    for name, kind, seed, reward in wanted:
        data = config.model_dump(mode="json", by_alias=True)
        data |= {"seed": seed, "reward": reward, "output_dir": str(out / name)}
        made.append(Job(name, kind, parse_config(data)))
    return made


def run(job: Job, out: Path, start: Launch = launch) -> None:
    """Bring a run to its end, from wherever it is. UserError when the folder holds another one or the run fails."""
    arguments = prepare(job.name, job.config, out)
    if arguments is None:
        return
    session = start(arguments)
    record(job.name, out, session)
    if session.exit_code:
        raise UserError(
            f"run {job.name} ended with code {session.exit_code} (see {Path(job.config.output_dir) / 'run.log'}); "
            "expected 0; the same command goes on from its last checkpoint"
        )


# ----------------------------------------------------------------------------------------------------------- the result
def row(job: Job, out: Path) -> dict[str, Any]:
    """The numbers of a finished run and which targets it meets (None: not measured)."""
    summary = json.loads((Path(job.config.output_dir) / "summary.json").read_text(encoding="utf-8"))
    sessions = [entry for entry in read_jsonl(out / SESSIONS) if entry["run"] == job.name]
    evaluation = summary["eval"]
    paired = evaluation["paired"]
    wanted = job.config.eval.rewards if job.config.eval else {}
    asked = [wanted] if isinstance(wanted, str) else list(wanted)
    score = next(name for name in [*asked, *paired] if name in paired and name != "held_out")
    held_out = next(iter(paired["held_out"]), None)
    gain, judge = paired[score], paired["held_out"].get(held_out)
    # a session that was killed together with the benchmark was not recorded, but the run's own clock counted it
    wall = max(summary["wall_s"], sum(entry["seconds"] for entry in sessions))
    peak = max([summary["peak_rss_mb"], *(entry["peak_rss_mb"] for entry in sessions)])
    guided = evaluation["before_guided"]
    low, high = gain["ci95"]
    direction = {"seed": low > 0, "flip": high < 0, "shuffle": low <= 0}[job.kind]
    targets: dict[str, bool | None] = {"direction": direction}
    if job.kind == "seed":
        targets |= {
            "gain": gain["mean_diff"] >= LEAST_GAIN and low > LEAST_LOW,
            "judge": None if judge is None else judge["ci95"][1] >= 0,
            "wall": wall <= MAX_WALL_S,
            "memory": peak <= MAX_RSS_MB,
        }
    return {
        "run": job.name,
        "kind": job.kind,
        "seed": summary["seed"],
        "updates": summary["updates"],
        "score": score,
        "before": evaluation["before"][score],
        "before_guided": guided and guided[score],
        "after": evaluation["after"][score],
        "gain": gain,
        "judge": None if judge is None else {"name": held_out, **judge},
        "diversity": [evaluation["before"]["diversity"], evaluation["after"]["diversity"]],
        "wall_s": wall,
        "peak_rss_mb": peak,
        "sessions": len(sessions),
        "alarms": summary["alarms"],
        "targets": targets,
    }


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table."""
    head = ("run", "before", "guided base", "after", "paired gain", "judge change", "wall", "peak", "targets")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in rows:
        judge, guided = r["judge"], r["before_guided"]
        missed = [name for name, met in r["targets"].items() if met is False]
        verdict = "missed: " + ", ".join(missed) if missed else "met"
        cells = (
            r["run"],
            f"{r['before']['mean']:.3f}",
            f"{guided['mean']:.3f}" if guided else "-",
            f"{r['after']['mean']:.3f}",
            _interval(r["gain"]["mean_diff"], r["gain"]["ci95"]),
            _interval(judge["mean_diff"], judge["ci95"]) if judge else "-",
            f"{r['wall_s'] / 60:.1f} min",
            f"{r['peak_rss_mb'] / 1000:.2f} GB",
            verdict,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _interval(mean: float, ends: Sequence[float]) -> str:
    return f"{mean:+.3f} [{ends[0]:+.3f}, {ends[1]:+.3f}]"


def measure(
    config: Config, seeds: Sequence[int], controls: Sequence[str], out: str | Path, start: Launch = launch
) -> dict[str, Any]:
    """Run everything that is not yet there; returns what is written to `results.json`."""
    out = Path(out)
    if config.eval is None:
        raise UserError("the config has no eval section, so nothing would be measured; expected one; add it")
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    for job in jobs(config, seeds, controls, out):
        run(job, out, start)
        rows.append(row(job, out))
        e = config.eval
        result = {
            "benchmark": "quickstart",
            "policy": config.policy.path,
            "reward": config.reward,
            "eval": {"prompts": e.prompts, "tasks": e.tasks, "steps": e.steps, "guidance": e.guidance},
            "threads": torch.get_num_threads() if config.threads is None else config.threads,
            "runs": rows,
            "met": all(met is not False for r in rows for met in r["targets"].values()),
        }
        (out / RESULT).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (out / TABLE).write_text(markdown(rows), encoding="utf-8")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_intermixed_args(arguments)
    try:
        result = measure(load_config(given.config, given.overrides), given.seeds, given.control, given.out)
    except UserError as error:
        print(f"benchmarks.quickstart: {error}", file=sys.stderr)
        return error.exit_code
    print(markdown(result["runs"]), end="")
    print(f"written to {given.out / RESULT} and {given.out / TABLE}; targets {'met' if result['met'] else 'MISSED'}")
    return 0 if result["met"] else 1


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quickstart", description=str(__doc__).splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings to change, with dotted keys")
    parser.add_argument("--config", default="quickstart", help="a YAML file or the name of a shipped config")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run each")
    parser.add_argument("--control", nargs="+", choices=CONTROLS, default=[], help="control runs, with the first seed")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-quickstart"), help="folder of the runs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
