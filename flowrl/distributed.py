"""The processes of a run. Everything above this file is written once, for one process or for many.

Processes are started by `accelerate launch` or torchrun; the unit of work is one prompt's whole group. They exchange
tensors only, and every exchange is a function of all ranks in rank order, so that a run does not depend on timing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from flowrl.errors import UserError
from flowrl.policies.loading import find_device


@dataclass(frozen=True)
class World:
    """This process among all: rank of size, on its device."""

    rank: int
    size: int
    device: torch.device

    @staticmethod
    def join(device: str = "auto") -> World:
        """Join the processes that the launcher announced (none: a world of one). `device`: auto, cpu, cuda or cuda:N.

        Raises UserError when CUDA is asked for where there is none.
        """
        found = find_device(device)
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return World(0, 1, found)
        from accelerate import PartialState  # it knows every launcher's variables

        state = PartialState(cpu=found.type == "cpu")
        # the launcher numbers CPUs too ("cpu:0"), which nothing else understands
        return World(state.process_index, state.num_processes, found if found.type == "cpu" else state.device)

    @property
    def main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all processes, on the device it came from; added in rank order, so that it is reproducible."""
        if self.size == 1:
            return values
        return self.gather(values.unsqueeze(0)).sum(0)

    def max(self, values: Tensor) -> Tensor:
        """Largest value over all processes; NaN wins."""
        if self.size == 1:
            return values
        return self.gather(values.unsqueeze(0)).amax(0)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        return bool(self.max(torch.tensor([float(flag)])).item()) if self.size > 1 else flag

    def gather(self, rows: Tensor) -> Tensor:
        """(n_rank, ...) of every process, joined in rank order on every process; n may differ between ranks."""
        if self.size == 1:
            return rows
        wire = rows.detach().to(self.device)
        counts = [torch.zeros(1, dtype=torch.long, device=self.device) for _ in range(self.size)]
        dist.all_gather(counts, torch.tensor([len(wire)], device=self.device))
        longest = max(int(count) for count in counts)
        padded = wire.new_zeros(longest, *wire.shape[1:])
        padded[: len(wire)] = wire
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded.contiguous())
        return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)]).to(rows.device)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work that ends on all processes as soon as it fails on one: there with its own error, elsewhere a UserError.

        Every process must come here, and the work may exchange nothing; all wait for each other at its end.
        """
        try:
            yield
        except Exception:  # whatever it is: it goes on as soon as the others know
            self.any(True)
            raise
        if self.any(False):
            raise UserError("another process of this run has stopped; its message says why")

    def sum_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Replace every gradient by its sum over processes (the loss is already divided by the global count).

        A parameter without one gets zeros, so that the optimizer takes the same step however the work was split.
        """
        gradients = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        if self.size == 1:
            return
        total = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(total)  # not `sum`: nobody could hold all processes' gradients of a whole model
        for gradient, part in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()

    def leave(self) -> None:
        """End the process group."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()
