"""The one training loop of the pretraining stages: AdamW or Muon + AdamW, warm-up and cosine, EMA, resumable."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowrl.checkpoint import Checkpoint, flatten_state, load_latest, save_checkpoint, unflatten_state, writer_lock
from flowrl.distributed import World
from flowrl.errors import UserError

Loss = Callable[[int], tuple[Tensor, dict[str, float]]]
CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


def share(rows: Tensor, world: World) -> Tensor:
    """This process's rows of a batch; all processes together have each row once."""
    return rows[world.rank :: world.size]


@contextmanager
def fast_precision(device: torch.device) -> Iterator[None]:
    """bfloat16 where the processor multiplies it faster than float32; elsewhere float32.

    On a CPU the fused attention is slow backwards in bfloat16 (a third of a small model's step): it is left out.
    """
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, torch.bfloat16, enabled=fast))
        if device.type == "cpu" and fast:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def schedule(step: int, steps: int, warmup: int = 200) -> float:
    """Factor on the learning rate: linear warm-up, then a cosine to 0."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def optimizers(model: nn.Module, lr: float, muon_lr: float | None = None) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the matrices of attention and feed-forward and AdamW for the rest."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if muon_lr is None:
        return [torch.optim.AdamW([p for _, p in named], lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)]
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, p in named:
        inside = p.ndim == 2 and ("blocks" in name or "layers" in name)
        groups[inside and "norm" not in name and "embed" not in name].append(p)
    return [
        torch.optim.Muon(groups[True], lr=muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups[False], lr=lr, betas=(0.9, 0.99), weight_decay=1e-4),
    ]


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
    settings: dict[str, Any] | None = None,
    world: World = ALONE,
) -> dict[str, Tensor]:
    """Train in place and return the EMA of the weights; a second call with the same folder goes on from its checkpoint.

    ``loss(step)`` makes its own batch from the step number, so the stream of batches needs no state; of several
    processes each takes its ``share`` of that batch, and returns the sum over it divided by the whole batch's size.
    ``settings`` are the caller's own numbers (seed, batch, ...): they are kept in the checkpoint, for the model card.

    Raises:
        UserError: the folder holds a run with other settings.
        FloatingPointError: the loss is not finite.
    """
    optims = optimizers(model, lr, muon_lr)
    base_lrs = [group["lr"] for o in optims for group in o.param_groups]
    trained = [p for p in model.parameters() if p.requires_grad]
    ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
    facts = {"steps": steps, "lr": lr, "muon_lr": muon_lr, "ema_decay": ema_decay, **(settings or {})}
    with writer_lock(folder) if world.main else nullcontext():
        first, seconds = 0, 0.0
        if (found := load_latest(folder)) is not None:
            _check_same_run(found, facts)
            first, seconds = found.step, found.state["seconds"]
            _restore(found, model, ema, optims)
            _say(world, f"resumed at step {first} of {steps}")
        world.barrier()  # nobody may save before all have looked
        start, totals, counted = time.perf_counter(), dict[str, float](), 0
        for step in range(first, steps):
            factor = schedule(step, steps)
            for group, base in zip((g for o in optims for g in o.param_groups), base_lrs, strict=True):
                group["lr"] = base * factor
            value, parts = loss(step)
            if not torch.isfinite(value):
                raise FloatingPointError(f"loss is {value.item()} at step {step}; expected a finite number; lower lr")
            value.backward()
            world.sum_gradients(trained)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optims:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            decay = min(ema_decay, (1 + step) / (10 + step))
            with torch.no_grad():
                for k, v in model.state_dict().items():
                    ema[k].lerp_(v, 1 - decay) if v.is_floating_point() else ema[k].copy_(v)
            totals, counted = {k: totals.get(k, 0.0) + v for k, v in parts.items()}, counted + 1
            now = seconds + time.perf_counter() - start
            if (step + 1) % log_every == 0 or step + 1 == steps:
                rate = (step + 1 - first) / (now - seconds)
                numbers = "  ".join(f"{k} {v / counted:.4f}" for k, v in totals.items())
                left = (steps - step - 1) / rate / 60
                line = f"step {step + 1}/{steps}  {numbers}  {rate:.2f} steps/s  {left:.1f} min left"
                _say(world, line)
                totals, counted = {}, 0
            if world.main and ((step + 1) % save_every == 0 or step + 1 == steps):
                tensors, skeleton = flatten_state(_state(model, ema, optims))
                state = {"run": facts, "seconds": now, "on": machine(world), "skeleton": skeleton}
                save_checkpoint(folder, step + 1, tensors, state)
                if on_save is not None:
                    on_save(step + 1)
    return ema


def load_ema(model: nn.Module, folder: Path) -> dict[str, Any]:
    """Load the EMA weights of the newest checkpoint into ``model``; returns what the stage knows of itself.

    That is its settings, ``done`` (steps taken), ``seconds`` (time in the loop) and ``on`` (what it ran on).

    Raises:
        UserError: there is no checkpoint.
    """
    found = load_latest(folder)
    if found is None:
        raise UserError(f"{folder} holds no checkpoint; expected a trained stage; run that stage first")
    model.load_state_dict(unflatten_state(found.tensors, found.state["skeleton"])["ema"])
    return {**found.state["run"], "done": found.step, "seconds": found.state["seconds"], "on": found.state["on"]}


def machine(world: World) -> str:
    """What a stage runs on, in words for a model card."""
    if world.device.type == "cuda":
        return f"{world.size} x {torch.cuda.get_device_name(world.device)}"
    threads = torch.get_num_threads()
    each = f"{threads} CPU thread{'s' if threads > 1 else ''}"
    return each if world.size == 1 else f"{world.size} processes of {each}"


def _say(world: World, line: str) -> None:
    if world.main:
        print(line, flush=True)


def _state(model: nn.Module, ema: dict[str, Tensor], optims: list[torch.optim.Optimizer]) -> dict[str, Any]:
    return {"model": model.state_dict(), "ema": ema, "optimizers": [o.state_dict() for o in optims]}


def _restore(found: Checkpoint, model: nn.Module, ema: dict[str, Tensor], optims: list[torch.optim.Optimizer]) -> None:
    state = unflatten_state(found.tensors, found.state["skeleton"])
    model.load_state_dict(state["model"])
    for name, tensor in state["ema"].items():
        ema[name].copy_(tensor)
    for optimizer, saved in zip(optims, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)


def _check_same_run(found: Checkpoint, facts: dict[str, Any]) -> None:
    was = found.state["run"]
    changed = [f"{k} {was.get(k)!r} (now {facts.get(k)!r})" for k in {**was, **facts} if was.get(k) != facts.get(k)]
    if changed:
        raise UserError(
            f"{found.path.parent} holds a run with {', '.join(changed)}; expected the same settings; give them, or "
            "choose another --out"
        )
