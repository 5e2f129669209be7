"""What a run will need, before it runs: memory, time per update, disk. No weights are loaded for the sizes.

Network and decoder are built from their config.json on torch's meta device, where tensors have shapes but no storage.
One forward of one row gives the network's exact matrix-product FLOPs. For memory a micro-batch goes forward and
backward there, and a decoder call forward, and after every operation the bytes that are alive are counted:

    activations  most bytes alive at once in forward and backward of a micro-batch, as the policy pads it: what is kept
                 for the backward, the block that gradient checkpointing recomputes, gradients on their way
    decoding     most bytes alive in one decoder call + the images of one chunk, at the larger size of rollout and eval

They take turns, so the larger counts. Everything else is arithmetic on the config. Not counted: what rewards need, the
workspaces of convolutions, and what autocast keeps in float32 (in bfloat16 on a CPU, where attention is not fused, the
activations of the model in the box are 1.4 times what is said here). Time is measured where the policy is local and
small, otherwise it is FLOPs over the throughput of a matrix product on this machine. Expect the truth within a factor
of 1.5.
"""

from __future__ import annotations

import json
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import samplers
from flowrl.config import Config
from flowrl.errors import UserError
from flowrl.leaves import leaf_times
from flowrl.objectives import NFT
from flowrl.parts import keeps_sampling_weights, make_objective
from flowrl.planning import first_plan
from flowrl.policies import LoraSettings, load_policy
from flowrl.policies.loading import DTYPES, find_device, model_index, resolve
from flowrl.policies.pipeline import BACKBONES, ROWS
from flowrl.prompts import load_prompts
from flowrl.schema import EvalConfig, RolloutConfig
from flowrl.update import UpdateSettings, forwards_per_row
from reward_models.torchvision_ops import ready as torchvision_ready
from samplers.regrow import block_roots
from samplers.rollout import regrown_steps

GIB = 2**30
SMALL = 100_000_000  # parameters up to which a policy is loaded and timed
EFFICIENCY = 0.5  # of a large matrix product's throughput, reached by a whole network
BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.05, "nf4": 0.56}  # with their scales
Inputs = Callable[[int], dict[str, Any]]  # of a network, for so many rows


@dataclass(frozen=True)
class Network:
    """Sizes of a policy. `flops`: one row, forward. `rows`: of a micro-batch, as the network sees them.

    `activations`, `decoding`: bytes, see the module.
    """

    parameters: int
    trainable: int
    flops: float
    rows: int
    activations: float
    decoding: float
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
            f"{self.cost.training_forwards} training forwards, {self.cost.training_backwards} backwards"
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
    torchvision_ready()  # diffusers and transformers import it where it is installed
    device = find_device(config.policy.device)
    groups = -(-config.prompts_per_update // processes)
    network = describe(config, groups)
    cost = planned_cost(config) * groups + samplers.Cost(_regrown_calls(config, groups))
    if network.calls == 2:
        cost = cost.guided()
    notes = [f"these numbers are for {device} here and {_processes(processes)}; expect them within a factor of 1.5"]
    seconds = _seconds(config, network, cost, device, notes)
    return Estimate(_memory(config, network, groups, device), _disk(config, network), seconds, cost, network, notes)


def _processes(processes: int) -> str:
    return "one process" if processes == 1 else f"one of {processes} processes"


def _kept_latents(config: Config, groups: int) -> int:
    """Latents that a rollout of so many groups keeps: both ends of trained edges, once each, and the images."""
    plan = first_plan(config)
    ends = {node for i in range(len(plan)) if plan.trained[i] for node in (i, plan.parent[i])}
    roots = groups * plan.roots(config.group_size)
    kept = min(roots, block_roots(plan, config.rollout.chunk)) if config.rollout.recompute else roots
    return kept * len(ends) + roots * len(plan.leaves)


def _regrown_calls(config: Config, groups: int) -> int:
    """Sampling calls of an update of so many groups that grow its latents again, without guidance."""
    if not config.rollout.recompute:
        return 0
    plan, o = first_plan(config), config.optimizer
    roots = groups * plan.roots(config.group_size)
    blocks = -(-roots // (o.inner_updates * block_roots(plan, config.rollout.chunk)))  # of one optimizer step
    if blocks * o.inner_updates == 1:
        return 0  # it is still there
    passes = o.epochs * (1 + (make_objective(config).coupled and blocks > 1))
    return passes * roots * sum(len(front.parents) for front in plan.frontiers[: regrown_steps(plan)])


def planned_cost(config: Config) -> samplers.Cost:
    """Model calls of one group in the first update, without guidance; objectives on leaves train on noised images."""
    plan = first_plan(config)
    objective = make_objective(config)
    cost = plan.cost() * plan.roots(config.group_size)
    if isinstance(objective, NFT):
        times = len(leaf_times(plan, objective.time_fraction))
        rows = config.group_size * min(times, objective.times or times)
        cost = replace(cost, training_forwards=rows, training_backwards=rows)
    # guard, dppo and nft also ask the weights that sampled, after the first optimizer step of an update
    o = config.optimizer
    on_policy = o.inner_updates * o.epochs == 1 and not isinstance(objective, NFT)
    forwards = forwards_per_row(objective, UpdateSettings(1.0, o.micro_batch, on_policy=on_policy))
    return replace(cost, training_forwards=cost.training_forwards * forwards * (1 + objective.coupled))


def describe(config: Config, groups: int | None = None) -> Network:
    """Sizes of the policy that a config names, from its config files. groups: of this process; default all."""
    source = resolve(config.policy.path)
    index = model_index(source, config.policy.revision)
    kind = BACKBONES[index["_class_name"]]
    network_config = _read(source, f"{kind.network_part}/config.json", config)
    vae = _read(source, "vae/config.json", config)
    scale = 2 ** (len(vae["block_out_channels"]) - 1)
    flux = index["_class_name"] == "FluxPipeline"
    side = 128 if flux else network_config["sample_size"]

    def latent_size(section: RolloutConfig | EvalConfig) -> tuple[int, int]:
        return (section.height or side * scale) // scale, (section.width or side * scale) // scale

    height, width = latent_size(config.rollout)
    text = _text_tokens(source, config, flux)
    model = _on_meta(index[kind.network_part][1], network_config, config, kind.lora_targets)
    unet = kind.network_part == "unet"
    make_inputs = _flux_inputs if flux else _unet_inputs if unet else _sd3_inputs
    inputs = make_inputs(network_config, height, width, text)
    guidance_is_input = flux or network_config.get("time_cond_proj_dim") is not None
    calls = 1 if guidance_is_input or config.rollout.guidance == 1.0 else 2
    states = (groups or config.prompts_per_update) * planned_cost(config).training_backwards
    rows = _padded(min(config.optimizer.micro_batch, states)) * calls
    flops, activations = _flops(model, inputs), _activations(model, inputs, rows)
    own = sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
    other = {name: _size_of(source, name, index, config) for name in ("vae", *kind.text_parts)}
    channels = network_config["in_channels"] // (4 if flux else 1)
    decoded = {latent_size(section) for section in (config.rollout, config.eval) if section is not None}
    decoding = max(_decoding(vae, channels, *size, config.rollout.chunk) for size in decoded)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    width_of_text = network_config["cross_attention_dim" if unet else "joint_attention_dim"]
    latent = channels * height * width
    return Network(own, trained, flops, rows, activations, decoding, latent, text, width_of_text, calls, other)


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

    with _meta(DTYPES[config.policy.dtype]):
        model = getattr(diffusers, name).from_config(network)
        if config.policy.train == "lora":
            model.requires_grad_(False)
            lora = config.policy.lora
            model.add_adapter(
                LoraConfig(r=lora.rank, lora_alpha=int(lora.alpha), target_modules=list(lora.targets or targets))
            )
    if config.policy.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model


def _sd3_inputs(network: dict[str, Any], height: int, width: int, text: int) -> Inputs:
    return lambda rows: {
        "hidden_states": torch.zeros(rows, network["in_channels"], height, width),
        "encoder_hidden_states": torch.zeros(rows, text, network["joint_attention_dim"]),
        "pooled_projections": torch.zeros(rows, network["pooled_projection_dim"]),
        "timestep": torch.zeros(rows),
    }


def _flux_inputs(network: dict[str, Any], height: int, width: int, text: int) -> Inputs:
    tokens = height * width // 4
    return lambda rows: {
        "hidden_states": torch.zeros(rows, tokens, network["in_channels"]),
        "encoder_hidden_states": torch.zeros(rows, text, network["joint_attention_dim"]),
        "pooled_projections": torch.zeros(rows, network["pooled_projection_dim"]),
        "timestep": torch.zeros(rows),
        "img_ids": torch.zeros(tokens, 3),
        "txt_ids": torch.zeros(text, 3),
        **({"guidance": torch.ones(rows)} if network.get("guidance_embeds") else {}),
    }


def _unet_inputs(network: dict[str, Any], height: int, width: int, text: int) -> Inputs:
    def inputs(rows: int) -> dict[str, Any]:
        found: dict[str, Any] = {
            "sample": torch.zeros(rows, network["in_channels"], height, width),
            "encoder_hidden_states": torch.zeros(rows, text, network["cross_attention_dim"]),
            "timestep": torch.zeros(rows),
        }
        if network.get("time_cond_proj_dim") is not None:  # latent consistency models: guidance
            found["timestep_cond"] = torch.zeros(rows, network["time_cond_proj_dim"])
        if network.get("addition_embed_type") == "text_time":  # SDXL: the pooled text, and six numbers of sizes
            pooled = network["projection_class_embeddings_input_dim"] - 6 * network["addition_time_embed_dim"]
            found["added_cond_kwargs"] = {"text_embeds": torch.zeros(rows, pooled), "time_ids": torch.zeros(rows, 6)}
        return found

    return inputs


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As the kernels of real devices have it, which keep no scores; on meta torch would take attention apart."""
    fused = torch.ops.aten._scaled_dot_product_efficient_attention
    return fused(query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale)[0]


@contextmanager
def _meta(dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """New tensors have this number format and no storage; attention is `_attention`."""
    before = torch.get_default_dtype(), F.scaled_dot_product_attention
    torch.set_default_dtype(dtype)
    F.scaled_dot_product_attention = _attention  # not a function mode: those are off while a backward recomputes
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before[0])
        F.scaled_dot_product_attention = before[1]


def _flops(model: torch.nn.Module, inputs: Inputs) -> float:
    """Of the matrix products in the forward of one row."""
    from torch.utils.flop_counter import FlopCounterMode

    with _meta(next(model.parameters()).dtype), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs(1))
    return float(counter.get_total_flops())


def _activations(model: torch.nn.Module, inputs: Inputs, rows: int) -> float:
    """Most bytes alive in forward and backward of so many rows; weights and their gradients are not among them."""
    with _meta(next(model.parameters()).dtype):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        weights = [tensor for p in model.parameters() for tensor in (p, p.grad) if tensor is not None]
        with _Live(weights) as live:
            model(**inputs(rows), return_dict=False)[0].square().mean().backward()
    return float(live.peak)


class _Live(TorchDispatchMode):
    """`peak`: most bytes alive at one time of the tensors made inside; `given` were made before and do not count."""

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in given}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.known:
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        number, size = storage._cdata, storage.nbytes()
        self.known.add(number)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, number, size)

    def _free(self, number: int, size: int) -> None:
        self.known.discard(number)
        self.now -= size


def _decoding(vae: dict[str, Any], channels: int, height: int, width: int, chunk: int) -> float:
    """Most bytes alive while a chunk of latents (channels, height, width) is decoded, its images so far included.

    The calls are those of `PipelinePolicy.decode`: few rows at a time, large images in tiles.
    """
    import diffusers

    scale = 2 ** (len(vae["block_out_channels"]) - 1)
    pixels = height * width * scale**2
    with _meta(), torch.no_grad():
        model = diffusers.AutoencoderKL.from_config(vae)
        if pixels >= 1024**2:
            model.enable_tiling()
        latents = torch.zeros(max(1, min(ROWS, 1024**2 // pixels)), channels, height, width)
        with _Live([latents, *model.parameters()]) as live:
            model.decode(latents, return_dict=False)
    return float(live.peak + 4 * 3 * pixels * chunk)


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
    encoders = sum(n for name, n in network.other.items() if name != "vae") * BYTES[policy.dtype]
    latents = _kept_latents(config, groups) * network.latent * 4.0
    sampling = keeps_sampling_weights(config, make_objective(config))
    found = {
        "network": network.parameters * (4.0 if full else base),
        "frozen copy": network.parameters * 4.0 if full and policy.reference else 0.0,
        "adapters": 0.0 if full else network.trainable * 4.0,
        "gradients and average": network.trainable * 4.0 * copies,
        "weights that sampled": network.trainable * 4.0 * sampling,
        "optimizer": network.trainable * states,
        f"activations of {network.rows} rows": network.activations,
        "more, while decoding": max(0.0, network.decoding - network.activations),  # the two take turns
        "latents": latents,
        "vae": network.other["vae"] * 4.0,
        "text encoders": 0.0 if policy.embedding_cache else encoders,
        "libraries": (0.6 if device.type == "cuda" else 0.5) * GIB,
    }
    # Encoding comes before the first update: it adds only what exceeds all that is allocated later.
    later = sum(found.values()) - found["network"] - found["libraries"] - found["vae"]
    found["encoding, before training"] = max(0.0, encoders - later) if policy.embedding_cache else 0.0
    return {name: size for name, size in found.items() if size > 0}


def _padded(rows: int) -> int:
    """The rows that the network is given for these."""
    return -(-rows // ROWS) * ROWS


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
    chunk, micro_batch = config.rollout.chunk, config.optimizer.micro_batch  # padded, where they are small
    trained = cost.training_backwards * 3.0 * again  # a forward and a backward, which is two; others look only
    update = (trained + cost.training_forwards - cost.training_backwards) * forward * config.optimizer.epochs
    return {
        "sampling": cost.sampling_calls * forward * _padded(chunk) / chunk,
        "update": update * _padded(micro_batch) / micro_batch,
    }


def _measured(config: Config, network: Network) -> float:
    """Seconds per predicted row of the policy itself, at the rollout's chunk, padded."""
    policy = load_policy(
        config.policy.path, dtype=config.policy.dtype, device=config.policy.device, train="lora", lora=LoraSettings()
    )
    rows = _padded(min(config.rollout.chunk, config.prompts_per_update * config.group_size))
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
