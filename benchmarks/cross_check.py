"""A built-in scorer beside the official package of the same weights, on images of one's own: do they agree?

    python -m benchmarks.cross_check hpsv2.1 IMAGES
    python -m benchmarks.cross_check imagereward IMAGES --against http://127.0.0.1:8401
    python -m benchmarks.cross_check pickscore IMAGES --against my_module:Original --tolerance 0.01

IMAGES: what `flowrl score` takes. It needs the weights of both sides, and for

hpsv2, hpsv2.1: the extra `hpsv2` in an environment without pytest 8 (the package pins pytest 7.2); it fetches 4 GB of
                other weights first, and reads its checkpoint again for every prompt: a few prompts are enough.
imagereward:    the package in an environment of its own behind `flowrl serve` (docs/serve.md has the commands); by
                default at http://127.0.0.1:8401.

Exit code 0 if no score differs by more than the tolerance, 1 if one does, 2 if the input is wrong. The tolerances allow
for what is known to differ and are no measurements: the package of HPSv2 computes in float16 on a GPU, whose steps are
2.4e-4 at these values; that of ImageReward resizes in 8 bits.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from flowrl.commands.scoring import score_items
from flowrl.errors import UserError
from flowrl.images import find
from flowrl.policies.loading import find_device
from reward_models import RewardError, load

PACKAGE = "reward_models.hpsv2_package:Hpsv2Package"
# name -> what it is compared with, its options, tolerance
OFFICIAL: dict[str, tuple[str, dict[str, Any], float]] = {
    "hpsv2": (PACKAGE, {"version": "v2.0"}, 1e-3),
    "hpsv2.1": (PACKAGE, {"version": "v2.1"}, 1e-3),
    "imagereward": ("http://127.0.0.1:8401", {}, 0.05),
}


@dataclass(frozen=True)
class Agreement:
    """Two columns of scores side by side.

    Attributes:
        images: with both scores.
        missing: without one of them.
        largest, mean: absolute difference.
        spread: standard deviation of the first column, to see the differences against.
        correlation: of ranks (Spearman); NaN where a column is constant.
    """

    images: int
    missing: int
    largest: float
    mean: float
    spread: float
    correlation: float


def agreement(ours: Sequence[float | None], theirs: Sequence[float | None]) -> Agreement:
    """Compare scores of the same images; None is a missing one.

    Raises:
        UserError: no image has both.
    """
    pairs = np.array([ours, theirs], dtype=np.float64)
    both = pairs[:, ~np.isnan(pairs).any(0)]
    a, b = both
    if not len(a):
        raise UserError("no image has both scores; expected at least one; see the reasons in `flowrl score`")
    ranks = rankdata(both, axis=1)
    varied = bool((ranks.std(1) > 0).all())
    return Agreement(
        images=len(a),
        missing=pairs.shape[1] - len(a),
        largest=float(np.abs(a - b).max()),
        mean=float(np.abs(a - b).mean()),
        spread=float(a.std()),
        correlation=float(np.corrcoef(ranks)[0, 1]) if varied else math.nan,
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(prog="python -m benchmarks.cross_check", description=__doc__.partition("\n")[0])
    found.add_argument("reward", help=f"built-in scorer: {', '.join(OFFICIAL)}, or any with --against")
    found.add_argument("images", nargs="+", help="as for `flowrl score`")
    found.add_argument("--prompts", help="file with one prompt for each image")
    found.add_argument("--prompt", action="append", default=[], help="for all images, or once for each")
    found.add_argument("--against", help="another reward: module:Class or the address of a reward server")
    found.add_argument("--tolerance", type=float, help="largest difference that is no fault")
    found.add_argument("--path", help="the weights, also for the package hpsv2, where they are not to be fetched")
    found.add_argument("--device", default="auto")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    given = parser().parse_args(arguments)
    try:
        if given.reward not in OFFICIAL and (given.against is None or given.tolerance is None):
            raise UserError(
                f"got {given.reward!r}, for which no package is known; expected one of {', '.join(OFFICIAL)}, or "
                "--against and --tolerance; give both"
            )
        other, options, tolerance = OFFICIAL.get(given.reward, ("", {}, 0.0))
        if given.against is not None:
            other, options = given.against, {}
        tolerance = tolerance if given.tolerance is None else given.tolerance
        items, device = find(given.images, given.prompts, given.prompt), find_device(given.device)
        weights = {} if given.path is None else {"path": given.path}
        theirs = load(other, device, **options, **(weights if other == PACKAGE else {}))  # first: it may not be there
        ours = load(given.reward, device, **weights)
        with tempfile.TemporaryDirectory() as folder:
            rows = score_items(items, {"ours": ours, "theirs": theirs}, Path(folder) / "scores.jsonl").rows
        found = agreement(*([row["scores"].get(side) for row in rows] for side in ("ours", "theirs")))
    except (UserError, ValueError, RewardError) as error:
        print(error, file=sys.stderr)
        return 2
    agreed = found.largest <= tolerance
    print(
        f"{given.reward} ({ours.spec.version}) and {other} ({theirs.spec.version})\n"
        f"{found.images} images, {found.missing} without one of the scores\n"
        f"largest difference {found.largest:.3g}, mean {found.mean:.3g}; spread of the scores {found.spread:.3g}; "
        f"rank correlation {found.correlation:.4f}\n"
        f"{'agree' if agreed else 'DO NOT AGREE'} to {tolerance:g}"
    )
    return 0 if agreed else 1


if __name__ == "__main__":
    raise SystemExit(main())
