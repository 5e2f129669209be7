"""What a CLIP-type scorer costs on top of its network: images and prompts to scores against bare forwards.

    python -m benchmarks.scoring
    python -m benchmarks.scoring --model ViT-L-14 --batch 32 --device cuda

scoring: images on the 8-bit grid and prompts it has not seen, through ``checked_score``: checks, resize, crop,
         normalisation, tokens, both towers, the product.
bare:    both towers on ready pixels and tokens, in batches of the same size.
fitting: resize, crop and normalisation alone, as a share of scoring.

Weights are random, as speed does not depend on them. Both kinds of timing alternate, and a ratio is taken between
neighbours, so that a change in the machine's load meets both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flowrl.errors import UserError
from reward_models import checked_score, two_towers
from reward_models.clip_score import ClipScore
from reward_models.preprocess import Preprocessing
from reward_models.torchvision_ops import optional

TARGET = 1.15
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def random_scorer(architecture: str, batch: int, device: str) -> ClipScore:
    """A scorer with open_clip's network of this name and random weights.

    Raises:
        UserError: open_clip knows no such network.
    """
    open_clip: Any = optional("open_clip", "open_clip_torch", "clip")
    if architecture not in open_clip.list_models():
        raise UserError(
            f"got --model {architecture!r}, expected one of open_clip.list_models(). Use ViT-B-32 or ViT-L-14."
        )
    torch.manual_seed(0)
    model = open_clip.create_model(architecture, pretrained=None)
    towers = two_towers.around_open_clip(model, Preprocessing, name=architecture, digest="random", device=device)
    return ClipScore(towers, chunk=batch)


def measure(
    scorer: ClipScore, batch: int, batches: int, size: int, repeats: int, clock: str = "wall"
) -> dict[str, list[float]]:
    """Seconds of ``repeats`` runs over ``batch * batches`` images of ``size`` px: scoring, bare, fitting."""
    open_clip: Any = optional("open_clip", "open_clip_torch", "clip")
    n, device, model = batch * batches, scorer.device, scorer.model
    images = torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(1)).float() / 255
    with torch.no_grad():
        pixels = [scorer.preprocessing(part.to(device)) for part in images.split(batch)]
    seen: dict[str, list[float]] = {"scoring": [], "bare": [], "fitting": []}

    def timed(kind: str, run: Any) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = CLOCKS[clock]()
        with torch.no_grad():
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seen[kind].append(CLOCKS[clock]() - start)

    for repeat in range(repeats + 1):
        prompts = [f"picture number {i} of run {repeat} with a dog" for i in range(n)]
        tokens = open_clip.tokenize(prompts).to(device).split(batch)
        timed("scoring", lambda prompts=prompts: checked_score(scorer, images, prompts))
        timed("bare", lambda tokens=tokens: [model(p, t) for p, t in zip(pixels, tokens, strict=True)])
        timed("fitting", lambda: [scorer.preprocessing(part.to(device)) for part in images.split(batch)])
    return {kind: times[1:] for kind, times in seen.items()}  # the first run warms up


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0 if the median ratio keeps the target, else 1."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scoring", description="Scoring against bare forwards.")
    parser.add_argument("--model", default="ViT-B-32", help="network of open_clip")
    parser.add_argument("--batch", type=int, default=16, help="images per forward")
    parser.add_argument("--batches", type=int, default=2, help="batches per run")
    parser.add_argument("--size", type=int, default=512, help="of the images, in pixels")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="cpu on a busy machine")
    parser.add_argument("--json", type=Path, help="write the timings here")
    options = parser.parse_args(arguments)
    try:
        if min(options.batch, options.batches, options.size, options.repeats) < 1:
            raise UserError("got a number below 1, expected at least 1 for batch, batches, size and repeats.")
        scorer = random_scorer(options.model, options.batch, options.device)
    except (UserError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    seen = measure(scorer, options.batch, options.batches, options.size, options.repeats, options.clock)
    ratios = [a / b for a, b in zip(seen["scoring"], seen["bare"], strict=True)]
    share = statistics.median(seen["fitting"]) / statistics.median(seen["scoring"])
    images = options.batch * options.batches
    rate = images / statistics.median(seen["scoring"])
    ratio = statistics.median(ratios)
    print(
        f"{options.model}, {options.device}, {options.batches} x {options.batch} images of {options.size} px, "
        f"{torch.get_num_threads()} threads, {options.clock} clock\n"
        f"scoring / bare {ratio:.3f} (of {len(ratios)}: {min(ratios):.3f} to {max(ratios):.3f}; target {TARGET})\n"
        f"fitting {share:.1%} of scoring; {rate:.1f} images per second"
    )
    if options.json:
        options.json.write_text(json.dumps(vars(options) | {"json": None, "ratio": ratio, **seen}, indent=1) + "\n")
    return 0 if ratio <= TARGET else 1


if __name__ == "__main__":
    raise SystemExit(main())
