"""The one training loop of the pretraining stages: AdamW or Muon + AdamW, warm-up and cosine, EMA, resumable."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Loss = Callable[[int], tuple[Tensor, dict[str, float]]]


def schedule(step: int, steps: int, warmup: int = 200) -> float:
    """Factor on the learning rate: linear warm-up, then a cosine to 0."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def optimizers(model: nn.Module, lr: float, muon_lr: float | None = None) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the matrices of attention and feed-forward and AdamW for the rest."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    inside = [(name, p) for name, p in named if p.ndim == 2 and ("blocks" in name or "layers" in name)]
    hidden = [p for name, p in inside if "norm" not in name and "embed" not in name]
    if muon_lr is None:
        return [torch.optim.AdamW([p for _, p in named], lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)]
    rest = [p for _, p in named if not any(p is h for h in hidden)]
    return [
        torch.optim.Muon(hidden, lr=muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=1e-4),
    ]


def _state_tensors(model: nn.Module, ema: dict[str, Tensor], optims: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    tensors = {f"model/{k}": v for k, v in model.state_dict().items()} | {f"ema/{k}": v for k, v in ema.items()}
    for i, optimizer in enumerate(optims):
        for p, slots in optimizer.state_dict()["state"].items():
            tensors |= {f"optim/{i}/{p}/{slot}": torch.as_tensor(value) for slot, value in slots.items()}
    return {k: v.detach().clone().contiguous() for k, v in tensors.items()}


def _restore(tensors: dict[str, Tensor], model: nn.Module, ema: dict[str, Tensor], optims: list) -> None:
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model/")})
    for k, v in tensors.items():
        if k.startswith("ema/"):
            ema[k[4:]].copy_(v)
    for i, optimizer in enumerate(optims):
        state: dict[int, dict[str, Tensor]] = {}
        for k, v in tensors.items():
            if k.startswith(f"optim/{i}/"):
                _, _, p, slot = k.split("/")
                state.setdefault(int(p), {})[slot] = v
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def fit(
    model: nn.Module,
    loss: Loss,
    folder: Path,
    *,
    steps: int,
    lr: float,
    muon_lr: float | None = None,
    ema_decay: float = 0.999,
    save_every: int = 500,
    log_every: int = 50,
    on_save: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Train in place and return the EMA of the weights; a second call with the same folder goes on from its checkpoint.

    ``loss(step)`` makes its own batch from the step number, so the stream of batches needs no state.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "state.safetensors"
    optims = optimizers(model, lr, muon_lr)
    base_lrs = [group["lr"] for o in optims for group in o.param_groups]
    ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
    first = 0
    if path.exists():
        tensors = load_file(path)
        first = int(tensors.pop("step"))
        _restore(tensors, model, ema, optims)
        print(f"resumed at step {first} of {steps}", flush=True)
    start, totals = time.time(), {}
    for step in range(first, steps):
        factor = schedule(step, steps)
        for group, base in zip((g for o in optims for g in o.param_groups), base_lrs, strict=True):
            group["lr"] = base * factor
        value, parts = loss(step)
        if not torch.isfinite(value):
            raise FloatingPointError(f"loss is {value.item()} at step {step}; expected a finite number")
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optims:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for k, v in model.state_dict().items():
                ema[k].lerp_(v, 1 - decay) if v.is_floating_point() else ema[k].copy_(v)
        for k, v in parts.items():
            totals[k] = totals.get(k, 0.0) + v / log_every
        if (step + 1) % log_every == 0:
            rate = (step + 1 - first) / (time.time() - start)
            numbers = "  ".join(f"{k} {v:.4f}" for k, v in totals.items())
            left = (steps - step - 1) / rate / 60
            print(f"step {step + 1}/{steps}  {numbers}  {rate:.2f} steps/s  {left:.1f} min left", flush=True)
            totals = {}
        if (step + 1) % save_every == 0 or step + 1 == steps:
            temporary = path.with_suffix(".tmp")
            save_file(_state_tensors(model, ema, optims) | {"step": torch.tensor(step + 1)}, temporary)
            temporary.replace(path)
            if on_save is not None:
                on_save(step + 1)
    return ema
