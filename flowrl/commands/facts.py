"""`flowrl doctor` and `flowrl list`: what is here, and what can be named. Both return lines of text."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import time
from collections.abc import Iterator

from flowrl import __version__
from flowrl.config import descriptions, shipped_configs

REQUIRED = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "numpy", "pydantic", "typer")
OPTIONAL = {  # package -> what it is for
    "bitsandbytes": "policy.quantize and optimizer.name: adamw8bit (pip install flowrl[quant])",
    "xformers": "policy.attention: xformers (pip install flowrl[xformers])",
    "flash_attn": "policy.attention: flash (pip install flash-attn)",
    "datasets": "prompts from the hub (pip install flowrl[hub])",
    "fastapi": "flowrl serve (pip install flowrl[serve])",
    "uvicorn": "flowrl serve (pip install flowrl[serve])",
    "tensorboard": "logging.trackers: [tensorboard] (pip install flowrl[tracking])",
    "wandb": "logging.trackers: [wandb] (pip install flowrl[tracking])",
}
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def doctor() -> Iterator[str]:
    """Versions, devices, threads, and which optional parts are usable, as lines."""
    yield f"flowrl {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    for name in REQUIRED:
        yield f"  {name:<14}{_version(name) or 'MISSING: pip install flowrl'}"
    yield "optional"
    for name, purpose in OPTIONAL.items():
        usable = importlib.util.find_spec(name) is not None
        yield f"  {name:<14}{(_version(name) or 'yes') if usable else f'absent; for {purpose}'}"
    yield from _devices()
    yield from _threads()
    yield "in the box"
    yield f"  models        {', '.join(_models()) or 'none: reinstall flowrl'}"
    yield f"  configs       {', '.join(shipped_configs())}"
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    yield f"hub: {'offline (HF_HUB_OFFLINE is set)' if offline else 'allowed'}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[str]:
    import torch

    yield f"devices: {os.cpu_count()} CPU cores, {torch.cuda.device_count()} CUDA"
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        low = "bfloat16 and float16" if torch.cuda.is_bf16_supported() else "float16"
        yield f"  cuda:{index}        {card.name}, {card.total_memory / 2**30:.0f} GiB, {low}"
    if torch.cuda.device_count() == 0:
        why = "this torch is built without CUDA" if torch.version.cuda is None else "no GPU is visible"
        yield f"  policy.device: auto runs on the CPU ({why})"


def _threads() -> Iterator[str]:
    """Thread settings, and a measurement: on a busy machine a second thread can make small operations far slower."""
    import torch

    threads = torch.get_num_threads()
    values = ", ".join(f"{name}={os.environ[name]}" for name in THREAD_VARIABLES if name in os.environ)
    yield f"threads: torch uses {threads}; {values or 'no thread variable is set'}"
    now = _small_products(threads)
    line = f"  200 small matrix products take {1000 * now:.0f} ms with {threads} thread{'s' * (threads > 1)}"
    if threads > 1:
        alone = _small_products(1)
        torch.set_num_threads(threads)
        line += f", {1000 * alone:.0f} ms with 1"
        if alone < 0.67 * now:
            line += (
                "; the cores are busy: set threads: 1 in the config, or OMP_NUM_THREADS=1, or OMP_WAIT_POLICY=passive"
            )
    yield line


def _small_products(threads: int) -> float:
    import torch

    torch.set_num_threads(threads)
    x = torch.ones(256, 256)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(200):
            torch.mm(x, x)
        best = min(best, time.perf_counter() - start)
    return best


def _models() -> list[str]:
    from flowrl.policies.loading import bundled

    return bundled()


KINDS = ("configs", "models", "rewards", "kernels", "objectives", "prompts", "keys")


def listing(kind: str) -> Iterator[str]:
    """The names of one kind (see KINDS), each with a word about it, as lines."""
    if kind == "configs":
        yield from shipped_configs()
    elif kind == "models":
        yield from _models()
    elif kind == "rewards":
        from reward_models import names

        yield from (f"{name:<18}{about}" for name, about in names().items())
        yield f"{'module:attribute':<18}a function or class of your own"
    elif kind == "kernels":
        from samplers import get_kernel, kernel_names

        for name in kernel_names():
            kernel = get_kernel(name)
            low, high = kernel.level_range
            yield f"{name:<18}level {low:g} to {high:g}, usual {kernel.default_level:g}; {', '.join(kernel.densities)}"
    elif kind == "objectives":
        from flowrl.objectives import OBJECTIVES

        yield from sorted(OBJECTIVES)
    elif kind == "prompts":
        yield "shapes:train  shapes:test  shapes:held_out"
        yield "FILE.txt  FILE.jsonl  FILE.csv  hub:dataset[:split]#column"
    else:
        yield from (f"{name:<34}{about}" for name, about in descriptions().items())
