"""What a run will need, before it runs: memory, time per update, disk. No weights are loaded for the sizes.

The network is built from its config.json on torch's meta device, where tensors have shapes but no storage. One forward
of one row there gives its exact matrix-product FLOPs, and autograd's hooks the bytes it keeps for the backward.
Everything else is arithmetic on the config. Time is measured where the policy is local and small, otherwise it is
FLOPs over the throughput of a matrix product on this machine. Expect the truth within a factor of about 1.5.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import samplers
from flowrl.config import Config
from flowrl.errors import UserError
from flowrl.policies import LoraSettings, load_policy
from flowrl.policies.loading import DTYPES, find_device, model_index, resolve
from flowrl.policies.pipeline import BACKBONES
from flowrl.prompts import load_prompts

GIB = 2**30
SMALL = 100_000_000  # parameters up to which a policy is loaded and timed
EFFICIENCY = 0.5  # of a large matrix product's throughput, reached by a whole network
BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.05, "nf4": 0.56}  # with their scales


@dataclass(frozen=True)
class Network:
    """Sizes of a policy. `flops`: one row, forward. `kept`: bytes one row keeps for the backward."""

    parameters: int
    trainable: int
    flops: float
    kept: float
    latent: int
    text_tokens: int
    text_width: int
    calls: int
    other: dict[str, int]


@dataclass(frozen=True)
class Estimate:
    """memory, disk: bytes by what needs them; seconds of one update; calls of one update; notes on what was assumed."""

    memory: dict[str, float]
    disk: dict[str, float]
    seconds: dict[str, float]
    cost: samplers.Cost
    network: Network
    notes: list[str]

    def lines(self) -> Iterator[str]:
        """For people."""
        n, total = self.network, sum(self.memory.values())
        yield f"network: {n.parameters / 1e6:,.1f} M parameters, {n.trainable / 1e6:,.2f} M trained"
        yield (
            f"per update: {self.cost.images} images, {self.cost.sampling_calls} sampling calls, "
            f"{self.cost.training_forwards} training forwards and backwards"
        )
        for title, values, form in (
            (f"memory, one process: about {_size(total)}", self.memory, _size),
            (f"time per update: about {_time(sum(self.seconds.values()))}", self.seconds, _time),
            (f"disk: about {_size(sum(self.disk.values()))}", self.disk, _size),
        ):
            yield title
            yield from (f"  {name:<28}{form(value)}" for name, value in values.items())
        yield from self.notes


def estimate(config: Config, processes: int = 1) -> Estimate:
    """Estimate one process of a run on this machine. Reads config files, and weights of small policies."""
    policy, rollout = config.policy, config.rollout
    device = find_device(policy.device)
    network = describe(config)
    groups = -(-config.prompts_per_update // processes)
    plan = samplers.plans.straight(
        torch.linspace(1, 0, rollout.steps + 1, dtype=torch.float64), trained=_trained(config)
    )
    cost = plan.cost() * (groups * config.group_size)
    if network.calls == 2:
        cost = cost.guided()
    notes = [f"these numbers are for {device} here and {_processes(processes)}; expect them within a factor of 1.5"]
    seconds = _seconds(config, network, cost, device, notes)
    return Estimate(_memory(config, network, groups, device), _disk(config, network), seconds, cost, network, notes)


def _processes(processes: int) -> str:
    return "one process" if processes == 1 else f"one of {processes} processes"


def _trained(config: Config) -> range:
    window = config.rollout.window
    return range(config.rollout.trained_steps if window is None else window.size)


def describe(config: Config) -> Network:
    """Sizes of the policy that a config names, from its config files."""
    source = resolve(config.policy.path)
    index = model_index(source, config.policy.revision)
    kind = BACKBONES[index["_class_name"]]
    network_config = _read(source, "transformer/config.json", config)
    vae = _read(source, "vae/config.json", config)
    scale = 2 ** (len(vae["block_out_channels"]) - 1)
    flux = index["_class_name"] == "FluxPipeline"
    side = 128 if flux else network_config["sample_size"]
    height, width = ((pixels or side * scale) // scale for pixels in (config.rollout.height, config.rollout.width))
    text = _text_tokens(source, config, flux)
    model = _on_meta(index["transformer"][1], network_config, config, kind.lora_targets)
    inputs = (
        _flux_inputs(network_config, height, width, text) if flux else _sd3_inputs(network_config, height, width, text)
    )
    flops, kept = _one_row(model, inputs)
    own = sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
    other = {name: _size_of(source, name, index, config) for name in ("vae", *kind.text_parts)}
    channels = network_config["in_channels"] // (4 if flux else 1)
    guided = not flux and config.rollout.guidance != 1.0
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    width_of_text = network_config["joint_attention_dim"]
    latent = channels * height * width
    return Network(own, trained, flops, kept, latent, text, width_of_text, 2 if guided else 1, other)


def _read(source: str, file: str, config: Config) -> dict[str, Any]:
    path = Path(source) / file
    if not Path(source).is_dir():
        from huggingface_hub import errors, hf_hub_download

        try:
            path = Path(hf_hub_download(source, file, revision=config.policy.revision))
        except (errors.HfHubHTTPError, errors.EntryNotFoundError, OSError) as error:
            raise UserError(
                f"cannot read {file} of hub model {source!r} ({error}); expected a connection or a local copy; "
                "download it first with `hf download`, or leave --estimate out"
            ) from error
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"cannot read {path} ({error}); expected a complete pipeline folder; download it again"
        ) from error


def _text_tokens(source: str, config: Config, flux: bool) -> int:
    if flux:
        return 512
    clip = _read(source, "tokenizer/tokenizer_config.json", config).get("model_max_length", 77)
    index = model_index(source, config.policy.revision)
    if index.get("text_encoder_3", [None])[0] is None:
        return clip
    return clip + (
        256 if _read(source, "text_encoder_3/config.json", config)["num_layers"] > 1 else 0
    )  # else a stand-in


def _on_meta(name: str, network: dict[str, Any], config: Config, targets: tuple[str, ...]) -> torch.nn.Module:
    import diffusers
    from peft import LoraConfig

    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[config.policy.dtype])
    try:
        with torch.device("meta"):
            model = getattr(diffusers, name).from_config(network)
            if config.policy.train == "lora":
                model.requires_grad_(False)
                lora = config.policy.lora
                model.add_adapter(
                    LoraConfig(r=lora.rank, lora_alpha=int(lora.alpha), target_modules=list(lora.targets or targets))
                )
            if config.policy.gradient_checkpointing:
                model.enable_gradient_checkpointing()
    finally:
        torch.set_default_dtype(before)
    return model


def _sd3_inputs(network: dict[str, Any], height: int, width: int, text: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: {
        "hidden_states": torch.zeros(1, network["in_channels"], height, width),
        "encoder_hidden_states": torch.zeros(1, text, network["joint_attention_dim"]),
        "pooled_projections": torch.zeros(1, network["pooled_projection_dim"]),
        "timestep": torch.zeros(1),
    }


def _flux_inputs(network: dict[str, Any], height: int, width: int, text: int) -> Callable[[], dict[str, Tensor]]:
    tokens = height * width // 4
    return lambda: {
        "hidden_states": torch.zeros(1, tokens, network["in_channels"]),
        "encoder_hidden_states": torch.zeros(1, text, network["joint_attention_dim"]),
        "pooled_projections": torch.zeros(1, network["pooled_projection_dim"]),
        "timestep": torch.zeros(1),
        "img_ids": torch.zeros(tokens, 3),
        "txt_ids": torch.zeros(text, 3),
        **({"guidance": torch.ones(1)} if network.get("guidance_embeds") else {}),
    }


def _one_row(model: torch.nn.Module, inputs: Callable[[], dict[str, Tensor]]) -> tuple[float, float]:
    """(forward FLOPs, bytes kept for the backward) of one row, on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        scores = tensor.ndim >= 3 and tensor.shape[-1] == tensor.shape[-2]  # attention scores: fused kernels keep none
        if storage not in own and not scores:
            kept[storage] = tensor
        return tensor

    before = torch.get_default_dtype()
    torch.set_default_dtype(next(model.parameters()).dtype)
    try:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            given = inputs()
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                model(**given)
    finally:
        torch.set_default_dtype(before)
    return float(counter.get_total_flops()), float(sum(t.numel() * t.element_size() for t in kept.values()))


def _size_of(source: str, part: str, index: dict[str, Any], config: Config) -> int:
    """Number of parameters of a part of the pipeline that is not trained."""
    library, name = index.get(part, [None, None])
    if library is None:
        return 0
    found = _read(source, f"{part}/config.json", config)
    with torch.device("meta"):
        if library == "diffusers":
            import diffusers

            model = getattr(diffusers, name).from_config(found)
        else:
            import transformers

            model = getattr(transformers, name)(transformers.AutoConfig.for_model(**found))
    return sum(p.numel() for p in model.parameters())


def _memory(config: Config, network: Network, groups: int, device: torch.device) -> dict[str, float]:
    policy, optimizer = config.policy, config.optimizer
    base = BYTES[policy.quantize or policy.dtype]
    full = policy.train == "full"
    states = 2.0 if optimizer.name == "adamw8bit" else 8.0
    copies = 1 + (config.ema is not None)  # gradients, and the average where there is one
    rows = min(optimizer.micro_batch, groups * config.group_size * len(_trained(config))) * network.calls
    encoders = sum(n for name, n in network.other.items() if name != "vae") * BYTES[policy.dtype]
    latents = groups * config.group_size * (len(_trained(config)) + 2) * network.latent * 4.0
    found = {
        "network": network.parameters * (4.0 if full else base),
        "frozen copy": network.parameters * 4.0 if full and policy.reference else 0.0,
        "adapters": 0.0 if full else network.trainable * 4.0,
        "gradients and average": network.trainable * 4.0 * copies,
        "optimizer": network.trainable * states,
        f"activations of {rows} rows": rows * network.kept,
        "latents": latents,
        "vae": network.other["vae"] * 4.0,
        "text encoders": 0.0 if policy.embedding_cache else encoders,
        "libraries": (0.6 if device.type == "cuda" else 0.5) * GIB,
    }
    # Encoding comes before the first update: it adds only what exceeds all that is allocated later.
    later = sum(found.values()) - found["network"] - found["libraries"] - found["vae"]
    found["encoding, before training"] = max(0.0, encoders - later) if policy.embedding_cache else 0.0
    return {name: size for name, size in found.items() if size > 0}


def _disk(config: Config, network: Network) -> dict[str, float]:
    states = 4.0 + (2.0 if config.optimizer.name == "adamw8bit" else 8.0) + (4.0 if config.ema is not None else 0.0)
    found = {
        f"{config.checkpoint.keep + 1} checkpoints": (config.checkpoint.keep + 1) * network.trainable * states,
        "exported weights": network.trainable * 4.0,
    }
    if config.policy.embedding_cache and not config.prompts.source.startswith("hub:"):
        prompts = config.prompts
        count = len(
            load_prompts(prompts.source, tasks=prompts.tasks, text_column=prompts.text_column, limit=prompts.limit)
        )
        row = network.text_tokens * network.text_width * BYTES[config.policy.dtype]
        found[f"embeddings of {count} prompts"] = count * row
    return found


def _seconds(
    config: Config, network: Network, cost: samplers.Cost, device: torch.device, notes: list[str]
) -> dict[str, float]:
    local = Path(resolve(config.policy.path)).is_dir()
    if local and network.parameters <= SMALL:
        forward = _measured(config, network) / network.calls
        notes.append("time: measured with this policy; a backward is taken as two forwards")
    else:
        rate = EFFICIENCY * _throughput(device, DTYPES[config.policy.dtype])
        forward = network.flops / rate
        notes.append(
            f"time: {network.flops / 1e12:.2f} TFLOP per call at {rate / 1e12:.2f} TFLOP/s, which is half of what a "
            f"matrix product reaches on {device}"
        )
    again = 1.33 if config.policy.gradient_checkpointing else 1.0
    reference = cost.training_forwards * forward if config.objective.kl.weight > 0 else 0.0
    return {
        "sampling": cost.sampling_calls * forward,
        "update": (cost.training_forwards * forward * 3.0 * again + reference) * config.optimizer.epochs,
    }


def _measured(config: Config, network: Network) -> float:
    """Seconds per predicted row of the policy itself, at the rollout's chunk."""
    policy = load_policy(
        config.policy.path, dtype=config.policy.dtype, device=config.policy.device, train="lora", lora=LoraSettings()
    )
    rows = min(config.rollout.chunk, config.prompts_per_update * config.group_size)
    cond = policy.encode(["a"])[torch.zeros(rows, dtype=torch.long)]
    x = torch.zeros(rows, *policy.latent_shape(config.rollout.height, config.rollout.width), device=policy.device)
    s = torch.full((rows,), 0.5, device=policy.device)

    def call() -> None:
        with torch.no_grad():
            policy.predict(x, s, cond, config.rollout.guidance)

    return _fastest(call, policy.device) / rows


def _throughput(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a matrix product that fills the device."""
    n = 4096 if device.type == "cuda" else 512
    x = torch.ones(n, n, device=device, dtype=dtype)
    return 2 * n**3 / _fastest(lambda: torch.mm(x, x), device)


def _fastest(call: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def _size(value: float) -> str:
    return f"{value / GIB:.2f} GiB" if value >= GIB / 10 else f"{value / 2**20:.1f} MiB"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
