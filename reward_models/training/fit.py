"""The fit of a scorer: seeded, checkpointed, resumable bit for bit, and judged on prompts that it never saw.

    fitted = fit(training, pairs, settings, folder)      # training: ``scorer.HeadTraining`` or ``ModelTraining``
    save(fitted, folder, ...)                            # a folder that ``reward_models.load`` opens

The batch of a step is a function of (seed, step): every epoch is a new permutation. A checkpoint is one safetensors
file with the trained weights and Adam's moments, written beside its place and renamed, so a killed run loses at most
the steps since the last one.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..protocol import RewardError
from .losses import LOSSES, MOST_LOGIT_SCALE, comparison_loss
from .manifest import Pair, aspects, fingerprint, prompt_weights, split
from .scorer import DESCRIPTION, HEAD, HeadTraining, ModelTraining

CHECKPOINT = "checkpoint.safetensors"
MODEL_FILES = (
    "tokenizer*",
    "vocab*",
    "merges*",
    "special_tokens*",
    "added_tokens*",
    "spiece*",
    "preprocessor_config.json",
)


@dataclass(frozen=True)
class Settings:
    """How to fit.

    Attributes:
        loss: one of ``losses.LOSSES``. margin: of the triplet loss, in units of the score.
        steps, batch: optimizer steps, and pairs in each.
        lr, weight_decay: of AdamW; the rate falls to 0 as a cosine. None: 1e-3 for a head, 1e-4 for LoRA, 3e-6 for the
            model's own weights (HPSv2 and PickScore trained with about that).
        held_out: share of the prompts that are only judged on. seed: of split, batches and first weights.
        balance: prompts count alike, however many pairs they have.
        save_every: steps between two checkpoints. grad_clip: largest gradient norm.
    """

    loss: Literal["bradley_terry", "cross_entropy", "triplet"] = "cross_entropy"
    margin: float = 0.2
    steps: int = 500
    batch: int = 64
    lr: float | None = None
    weight_decay: float = 0.01
    held_out: float = 0.1
    seed: int = 0
    balance: bool = True
    save_every: int = 100
    grad_clip: float = 1.0

    def check(self) -> None:
        """ValueError for values out of range, all of them together."""
        wrong = []
        if self.loss not in LOSSES:
            wrong.append(f"loss {self.loss!r}, expected one of {', '.join(LOSSES)}")
        for name in ("steps", "batch", "save_every"):
            if getattr(self, name) < 1:
                wrong.append(f"{name} {getattr(self, name)}, expected at least 1")
        for name in ("margin", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                wrong.append(f"{name} {getattr(self, name)}, expected a number >= 0")
        if self.lr is not None and not 0 < self.lr < math.inf:
            wrong.append(f"lr {self.lr}, expected a number above 0")
        if not 0 <= self.held_out < 1:
            wrong.append(f"held_out {self.held_out}, expected a share in [0, 1)")
        if wrong:
            raise ValueError(f"got {'; '.join(wrong)}. Correct them.")


@dataclass
class Fitted:
    """A fit that ended.

    Attributes:
        training: with the trained weights. aspects: their names. settings: as given.
        learnt, held_out: numbers of pairs.
        outcomes: prompt -> 1 (right), 0 (wrong) or 0.5 (equal scores) for each held-out pair with a winner.
        aspect_outcomes: aspect -> the same. losses: mean loss since the last report, by step.
    """

    training: HeadTraining | ModelTraining
    aspects: list[str]
    settings: Settings
    learnt: int
    held_out: int
    outcomes: dict[str, list[float]] = field(default_factory=dict)
    aspect_outcomes: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)


def fit(
    training: HeadTraining | ModelTraining,
    pairs: Sequence[Pair],
    settings: Settings,
    folder: str | Path,
    *,
    resume: bool = False,
    stop_after: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Fitted:
    """Train on the pairs of most prompts and judge on the others.

    Args:
        training: what learns. pairs: from ``manifest.read``. folder: for the checkpoint.
        resume: go on from the checkpoint in ``folder``, if there is one.
        stop_after: leave after so many steps of this call, with a checkpoint (a run that is cut into pieces).
        say: told of progress in lines of text.

    Raises:
        ValueError: bad settings, no pairs to learn from, a checkpoint of another run.
        RewardError: the loss or its gradient is not finite; the last checkpoint is kept.
    """
    settings.check()
    names = aspects(pairs)
    if isinstance(training, ModelTraining) and len(names) > 1:
        raise ValueError(f"got aspects {names} for a model's cosine, expected one label. Train a head for aspects.")
    learn, judge = split(pairs, settings.held_out, settings.seed)
    if not learn:
        raise ValueError(f"got {len(pairs)} pairs, none of them to learn from. Give more prompts, or hold out fewer.")
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    run = _Run(training, learn, names, settings)
    start = run.load(place / CHECKPOINT) if resume and (place / CHECKPOINT).is_file() else 0
    files = [file for pair in pairs for file in (pair.first, pair.second)]
    training.prepare(files, [pair.prompt for pair in pairs], lambda done, of: say(f"features of {done} of {of} images"))
    until = settings.steps if stop_after is None else min(settings.steps, start + stop_after)
    losses: dict[int, float] = {}
    for step in range(start, until):
        loss = run.step(step)
        losses[step + 1] = loss
        if (step + 1) % settings.save_every == 0 or step + 1 == until:
            run.save(place / CHECKPOINT, step + 1)
            recent = list(losses.values())[-settings.save_every :]
            say(f"step {step + 1} of {settings.steps}: loss {sum(recent) / len(recent):.4f}")
    fitted = Fitted(training, names, settings, len(learn), len(judge), losses=losses)
    if until == settings.steps:
        fitted.outcomes, fitted.aspect_outcomes = outcomes(training, judge, names)
    return fitted


class _Run:
    """Optimizer and batches of one fit."""

    def __init__(
        self, training: HeadTraining | ModelTraining, pairs: Sequence[Pair], names: list[str], settings: Settings
    ) -> None:
        self.training, self.pairs, self.names, self.settings = training, pairs, names, settings
        self.parameters = training.named_parameters()
        usual = 1e-3 if isinstance(training, HeadTraining) else 1e-4 if training.peft is not None else 3e-6
        self.rate = usual if settings.lr is None else settings.lr
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=self.rate, weight_decay=settings.weight_decay)
        self.weights = prompt_weights(pairs) if settings.balance else [1.0] * len(pairs)
        self.about = {
            "settings": asdict(settings), "data": fingerprint(pairs), "rate": self.rate, "trained": training.about(),
        }  # fmt: skip

    def batch(self, step: int) -> list[int]:
        """Numbers of the pairs of a step."""
        n, size = len(self.pairs), min(self.settings.batch, len(self.pairs))
        epoch, place = divmod(step, math.ceil(n / size))
        draw = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
        return torch.randperm(n, generator=draw)[place * size : (place + 1) * size].tolist()

    def step(self, step: int) -> float:
        """One optimizer step; returns its loss."""
        chosen = [self.pairs[i] for i in self.batch(step)]
        gap = gaps(self.training, chosen)
        labels = label_table(chosen, self.names).to(gap)
        weights = torch.tensor([self.weights[i] for i in self.batch(step)]).to(gap)
        loss = comparison_loss(self.settings.loss, gap, labels, weights, self.settings.margin)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.grad_clip)
        if not bool(torch.isfinite(loss) & torch.isfinite(norm)):
            raise RewardError(
                f"training a scorer: loss {float(loss.detach())} and gradient norm {float(norm)} in step {step + 1}, "
                "expected finite numbers. Lower the learning rate; the last checkpoint is kept."
            )
        fall = (1 + math.cos(math.pi * step / self.settings.steps)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * fall
        self.optimizer.step()
        with torch.no_grad():
            if "logit_scale" in self.parameters:
                self.parameters["logit_scale"].clamp_(max=MOST_LOGIT_SCALE)
        return float(loss.detach())

    def save(self, file: Path, step: int) -> None:
        """Write weights and moments, then put them in their place."""
        tensors = {f"weight/{name}": p.detach().cpu().contiguous() for name, p in self.parameters.items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam/{number}/{key}": value.detach().cpu().contiguous() for key, value in state.items()}
        beside = file.with_name(f"{file.name}.tmp-{os.getpid()}")
        save_file(tensors, beside, metadata={"run": json.dumps({**self.about, "step": step})})
        with open(beside, "rb") as written:
            os.fsync(written.fileno())
        os.replace(beside, file)

    def load(self, file: Path) -> int:
        """Take up a checkpoint; returns the steps that it has behind it."""
        with safe_open(file, "pt") as stored:
            about = json.loads(stored.metadata()["run"])
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        step = about.pop("step")
        if about != self.about:
            other = [key for key in self.about if about.get(key) != self.about[key]]
            raise ValueError(
                f"got {str(file)!r}, the checkpoint of a run with other {', '.join(other)}; expected one of the same "
                "run. Restore settings and data, or choose another folder."
            )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"weight/{name}"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("adam/"):
                _, number, key = name.split("/")
                state.setdefault(int(number), {})[key] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        return int(step)


def gaps(training: HeadTraining | ModelTraining, pairs: Sequence[Pair]) -> Tensor:
    """Scores of the first images minus those of the second: (B, A) with a gradient."""
    prompts = [pair.prompt for pair in pairs]
    both = training.scores([p.first for p in pairs] + [p.second for p in pairs], prompts + prompts)
    return both[: len(pairs)] - both[len(pairs) :]


def label_table(pairs: Sequence[Pair], names: Sequence[str]) -> Tensor:
    """(B, A) shares for the first, NaN where an aspect was not judged."""
    return torch.tensor([[pair.labels.get(name, math.nan) for name in names] for pair in pairs])


@torch.no_grad()
def outcomes(
    training: HeadTraining | ModelTraining, pairs: Sequence[Pair], names: Sequence[str], batch: int = 64
) -> tuple[dict[str, list[float]], dict[str, dict[str, list[float]]]]:
    """Whether the better image of each pair scores higher: prompt -> 1, 0 or 0.5 (equal), over all and by aspect.

    With aspects, "over all" is the mean score against the mean label. Pairs without a winner are left out.
    """
    overall: dict[str, list[float]] = {}
    each: dict[str, dict[str, list[float]]] = {name: {} for name in names if name}
    for start in range(0, len(pairs), batch):
        part = pairs[start : start + batch]
        found, labels = gaps(training, part).cpu(), label_table(part, names)
        for row, pair in enumerate(part):
            _note(overall, pair.prompt, float(found[row].mean()), float(labels[row].nanmean()))
            for column, name in enumerate(names):
                if name:
                    _note(each[name], pair.prompt, float(found[row, column]), float(labels[row, column]))
    return overall, each


def _note(table: dict[str, list[float]], prompt: str, gap: float, label: float) -> None:
    if not math.isnan(label) and label != 0.5:
        right = 0.5 if gap == 0 else float((gap > 0) == (label > 0.5))
        table.setdefault(prompt, []).append(right)


def save(
    fitted: Fitted,
    folder: str | Path,
    *,
    name: str,
    body: str,
    held_out: Mapping[str, Any] | None = None,
    licence: str = "that of the body and of the data",
) -> Path:
    """Write the scorer with its description and card, and remove the checkpoint. Returns the folder.

    Args:
        fitted: from ``fit``. folder: of the scorer. name: for its spec.
        body: name or path of the body, written down for a head. held_out: accuracies for the card, any JSON.
        licence: for the spec.
    """
    place, training = Path(folder), fitted.training
    place.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {
        "name": name,
        "licence": licence,
        "body": body,
        "body_digest": training.body.towers.digest,
        "settings": asdict(fitted.settings),
        "pairs": {"learnt": fitted.learnt, "held_out": fitted.held_out},
        "accuracy": dict(held_out or {}),
    }
    if isinstance(training, HeadTraining):
        head = training.head
        widths = [layer.out_features for layer in head.layers]
        about |= {"kind": "head", "hidden": widths[:-1], "inputs": head.inputs, "aspects": fitted.aspects}
        save_file({key: value.cpu().contiguous() for key, value in head.state_dict().items()}, place / HEAD)
    else:
        about["kind"] = "model"
        training.merged().save_pretrained(place)
        _copy_processor(body, place)
    (place / "README.md").write_text(card(about), encoding="utf-8")
    # the description comes last: a folder with it is whole
    (place / DESCRIPTION).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    (place / CHECKPOINT).unlink(missing_ok=True)
    return place


def _copy_processor(body: str, place: Path) -> None:
    from ..clip_score import model_folder

    folder = model_folder(body)
    for pattern in MODEL_FILES:
        for file in folder.glob(pattern):
            shutil.copyfile(file, place / file.name)


def card(about: Mapping[str, Any]) -> str:
    """The model card as Markdown."""
    rows = [
        f"| {what or 'all'} | {x['accuracy']:.3f} | {x['low']:.3f} to {x['high']:.3f} | {x['pairs']} | {x['prompts']} |"
        for what, x in about["accuracy"].items()
    ]
    table = ["| aspect | accuracy | 95 % interval | pairs | prompts |", "|---|---|---|---|---|", *rows]
    what = "A head on the frozen features of" if about["kind"] == "head" else "A fine-tuned copy of"
    s = about["settings"]
    return "\n".join(
        [
            f"# {about['name']}",
            "",
            f"{what} `{about['body']}` (weights {about['body_digest'][:12]}), trained to prefer the better of two "
            f"images of a prompt. Licence: {about['licence']}.",
            "",
            f"Trained on {about['pairs']['learnt']} pairs for {s['steps']} steps of {s['batch']} with the loss "
            f"{s['loss']}, seed {s['seed']}. Accuracy on prompts that it never saw:",
            "",
            *(table if rows else ["None were held out."]),
            "",
            "```python",
            'reward = reward_models.load("this/folder")',
            "```",
            "",
        ]
    )
