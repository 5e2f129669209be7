"""What changes while a run trains, beside the policy's weights, and how it is saved: optimizer, averages, counters."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

import samplers
from flowrl import __version__
from flowrl.adversary import Adversary
from flowrl.checkpoint import Checkpoint, flatten_state, unflatten_state
from flowrl.config import Config
from flowrl.distributed import World
from flowrl.ema import Ema
from flowrl.errors import UserError
from flowrl.guards import Alarms, Limits, ScaleSkips, require_finite
from flowrl.policies import Policy
from flowrl.selection import PromptHistory

FORMAT = 3  # of what `State.pack` gives; raise it whenever a key comes, goes or changes its meaning


def make_optimizer(config: Config, policy: Policy) -> torch.optim.Optimizer:
    """AdamW over the policy's trainable parameters; UserError where the 8-bit one cannot run."""
    o = config.optimizer
    parameters = [parameter for _, parameter in policy.trainable()]
    settings: dict[str, Any] = {"lr": o.lr, "betas": tuple(o.betas), "weight_decay": o.weight_decay, "eps": o.eps}
    if o.name == "adamw":
        return torch.optim.AdamW(parameters, **settings)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            f"optimizer.name adamw8bit needs bitsandbytes, which cannot be imported ({error}); expected it installed; "
            "pip install flowrl[quant], or set optimizer.name=adamw"
        ) from error
    if policy.device.type != "cuda":
        raise UserError(
            f"got optimizer.name adamw8bit on device {policy.device}; expected a CUDA device; set optimizer.name=adamw"
        )
    return AdamW8bit(parameters, **settings)


@dataclass
class State:
    """State of a run at an update boundary; `update` counts finished updates."""

    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: Ema | None
    alarms: Alarms
    skips: ScaleSkips = field(default_factory=ScaleSkips)
    update: int = 0
    cost: samplers.Cost = field(default_factory=samplers.Cost)
    ratio_max_dev: float | None = None
    wall_s: float = 0.0  # of earlier sessions
    train_s: float = 0.0  # of all sessions, by the training clock
    success: float = 0.5  # moving average that reward-driven levels follow
    history: PromptHistory | None = None  # of prompts' rewards, for advantage.std: history
    history_updates: int = 8
    adversary: Adversary | None = None  # the reward that learns

    @staticmethod
    def create(config: Config, policy: Policy, adversary: Adversary | None = None) -> State:
        """The state before the first update."""
        ema = None if config.ema is None else Ema(config.ema.decay, config.ema.ramp, config.ema.every)
        if ema is not None:
            ema.start(policy)
        a = config.alarms
        limits = Limits(a.window, a.judge_drop, a.diversity_drop, a.statistic_change)
        fp16 = config.policy.dtype == "float16"
        scaler = torch.amp.GradScaler(policy.device.type, enabled=fp16)
        scaler.scale(torch.zeros((), device=policy.device))  # it makes its scale now, not when a loss first needs it
        if config.objective.name == "nft":  # it samples with weights that follow the trained ones
            policy.copy_weights("current", "old")
        return State(
            make_optimizer(config, policy), scaler, ema, Alarms(limits), history_updates=config.advantage.updates,
            adversary=adversary,
        )  # fmt: skip

    # ---- one optimizer step

    def set_learning_rate(self, config: Config) -> float:
        """The learning rate of the coming update, also set in the optimizer; returns it.

            lr min(1, (n + 1) / warmup) f(p),    f(p) = 1, 1 - p or (1 + cos(pi p)) / 2

        with n finished updates and p the finished share of the run, by updates or by `budget_s`, whichever is more.
        """
        o = config.optimizer
        rise = min(1.0, (self.update + 1) / o.warmup) if o.warmup else 1.0
        p = min(1.0, max(self.update / config.updates, self.train_s / config.budget_s if config.budget_s else 0.0))
        fall = {"constant": 1.0, "linear": 1 - p, "cosine": (1 + math.cos(math.pi * p)) / 2}[o.schedule]
        rate = o.lr * rise * fall
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def step(self, config: Config, policy: Policy, parameters: list, world: World, loss: float) -> float | None:
        """One optimizer step on the gradients that lie in the parameters; returns their norm.

        None where the fp16 scaler skipped the step. GuardStop on a loss or gradient that is not finite, before the step
        and on all processes together.
        """
        where = f"update {self.update + 1}"
        require_finite({"the loss": loss}, where, world.max)
        self.scaler.unscale_(self.optimizer)
        bound = config.optimizer.grad_clip or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(parameters, bound)
        if self.scaler.is_enabled():
            before = self.scaler.get_scale()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            skipped = self.scaler.get_scale() < before
            self.skips.add(skipped)
            if skipped:
                return None
        else:
            require_finite({"the gradient norm": norm}, where, world.max)
            self.optimizer.step()
        if self.ema is not None:
            self.ema.step(policy)
        return float(norm)

    # ---- saving

    def pack(self, policy: Policy) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, JSON state) of the run: weight sets, optimizer, counters."""
        tensors, skeleton = flatten_state(self.optimizer.state_dict(), "optimizer")
        tensors |= {f"weights/{name}": tensor.detach() for name, tensor in policy.named_states().items()}
        learned, adversary = flatten_state(self.adversary.state_dict() if self.adversary else None, "adversary")
        tensors |= learned
        counters = {
            "format": FORMAT,
            "update": self.update,
            "wall_s": self.wall_s,
            "train_s": self.train_s,
            "success": self.success,
            "history": self.history.state_dict() if self.history else None,
            "cost": asdict(self.cost),
            "ratio_max_dev": self.ratio_max_dev,
            "optimizer": skeleton,
            "adversary": adversary,
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "alarms": self.alarms.state_dict(),
            "skips": self.skips.state_dict(),
        }
        return tensors, counters

    def unpack(self, policy: Policy, found: Checkpoint) -> None:
        """Inverse of `pack`, in place. UserError where the checkpoint is of another format or lacks something."""
        _check_format(found, self.pack(policy)[1])
        tensors, counters, prefix = found.tensors, found.state, "weights/"
        weights = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        policy.load_named_states(weights)
        self.optimizer.load_state_dict(unflatten_state(tensors, counters["optimizer"]))
        self.scaler.load_state_dict(counters["scaler"])
        if self.ema:
            self.ema.load_state_dict(counters["ema"])
        self.alarms.load_state_dict(counters["alarms"])
        self.skips.load_state_dict(counters["skips"])
        self.update, self.wall_s = counters["update"], counters["wall_s"]
        self.cost = samplers.Cost(**counters["cost"])
        self.ratio_max_dev = counters["ratio_max_dev"]
        self.train_s, self.success = counters["train_s"], counters["success"]
        if self.adversary:
            self.adversary.load_state_dict(unflatten_state(tensors, counters["adversary"]))
        if counters["history"] is not None:
            self.history = PromptHistory(self.history_updates)
            self.history.load_state_dict(counters["history"])


def _check_format(found: Checkpoint, expected: dict[str, Any]) -> None:
    """UserError unless the state in `found` has this format and all keys that the `expected` one has."""
    number = found.state.get("format", 1)  # which at first was not written
    absent = sorted(_keys(expected) - _keys({"format": number, **found.state}))
    if number == FORMAT and not absent:
        return
    got = f"of format {number}" if number != FORMAT else f"without {', '.join(absent)}"
    by = found.manifest["versions"]["flowrl"]
    raise UserError(
        f"{found.path} holds the state of a run {got}, saved by flowrl {by}; expected a complete one of format "
        f"{FORMAT}, as flowrl {__version__} needs; continue with the flowrl that saved it, or start again in a "
        "new output_dir"
    )


def _keys(state: dict[str, Any]) -> set[str]:
    """Names of the entries and of what is directly inside them: "alarms", "alarms.held", ..."""
    inner = {f"{name}.{key}" for name, part in state.items() if isinstance(part, dict) for key in part}
    return {*state, *inner}
