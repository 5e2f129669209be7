"""Child processes that have everything imported already, to be killed, launched in pairs, or limited.

They are forked from a server that has imported the heavy libraries once, so that a child costs milliseconds.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

PRELOAD = ["pytest", "flowrl.trainer", "flowrl.report", "flowrl.card", "accelerate", "gaussian_runs", "tiny_pipelines"]
PATIENCE_S = 300  # for machines that are busy with something else


def start(target: Callable[..., None], *arguments: Any, environment: dict[str, str] | None = None) -> BaseProcess:
    """Run `target(*arguments)` in a child process, with one torch thread. Its exit code is 1 if it raised."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    child = context.Process(target=_run, args=(target, arguments, environment or {}), daemon=True)
    child.start()
    return child


def wait(*children: BaseProcess) -> list[int]:
    """Exit codes of the children; a negative one is the signal that ended it. Fails if they hang."""
    for child in children:
        child.join(PATIENCE_S)
        if child.is_alive():
            child.kill()
            raise AssertionError(f"process {child.pid} did not end")
    return [int(child.exitcode or 0) for child in children]


def launched(target: Callable[..., None], *arguments: Any, size: int = 2) -> list[int]:
    """Run `target` in `size` processes with the variables that torchrun and `accelerate launch` set; exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
    return wait(*(start(target, *arguments, environment=rank) for rank in ranks))


def _run(target: Callable[..., None], arguments: tuple[Any, ...], environment: dict[str, str]) -> None:
    import torch

    os.environ.update(environment, HF_HUB_OFFLINE="1")
    torch.set_num_threads(1)
    try:
        target(*arguments)
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None
