"""Trained weights for other programs: a LoRA that loads at full strength everywhere, or merged full weights.

A LoRA adds `(alpha / rank) B A` to a weight. Readers disagree on where alpha is found: diffusers looks into the file's
header, ComfyUI for tensors that the diffusers SD3 loader refuses, and both take alpha = rank when they find nothing, so
that an adapter trained with alpha = 2 rank loads without an error at half strength. The export therefore folds the
factor into B and says alpha = rank: `B' = (alpha / rank) B`. The file is written by the pipeline class itself.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flowrl.errors import UserError

if TYPE_CHECKING:
    from flowrl.policies.pipeline import PipelinePolicy
    from flowrl.sampling import SampleSettings

ADAPTER = "default"
WEIGHTS = "weights/"  # where a checkpoint keeps the policy's named states
SETTINGS = ("force_zeros_for_empty_prompt", "requires_safety_checker")  # of pipelines, beside their parts
STRENGTHS = (0.0, 0.5, 1.0, 1.5)


def export(
    run_folder: str | Path, out: str | Path, *, merge: bool = False, device: str = "auto", sheet: bool = True
) -> Path:
    """Export the latest checkpoint of a run (its moving average, if it kept one) into the new folder `out`.

    `merge`: full weights as a pipeline folder instead of a LoRA. `sheet`: also draw the strength sheet, which samples
    a few pictures. Raises UserError for a folder that is no run, has no checkpoint, or an `out` that holds something.
    """
    from flowrl.checkpoint import load_latest
    from flowrl.config import load_config
    from flowrl.policies import load_policy

    run, out = Path(run_folder), Path(out)
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} holds no config.yaml, expected the folder of a run; give the output_dir of a run")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already exists, expected a new or empty folder; choose another one")
    config = load_config(run / "config.yaml")
    checkpoint = load_latest(run / "checkpoints")
    if checkpoint is None:
        raise UserError(
            f"{run / 'checkpoints'} holds no checkpoint yet, so there is nothing to export; "
            "let the run reach its first save, or set checkpoint.every lower"
        )
    chosen = config.policy
    policy = load_policy(
        chosen.path, dtype=chosen.dtype, device=device, train=chosen.train, revision=chosen.revision,
        quantize=None if merge else chosen.quantize, lora=_lora_settings(chosen), reference=False,
    )  # fmt: skip
    states = {
        name.removeprefix(WEIGHTS): tensor for name, tensor in checkpoint.tensors.items() if name.startswith(WEIGHTS)
    }
    policy.load_named_states(states)
    return export_policy(policy, run, out, merge=merge, sheet=sheet)


def export_policy(
    policy: PipelinePolicy, run_folder: str | Path, out: str | Path, *, merge: bool = False, sheet: bool = True
) -> Path:
    """Export a loaded policy (its moving average, if it has one) with a model card made from the run's files.

    Full fine-tuning has no LoRA: its weights are always exported whole. The strength sheet shows the first prompts of
    the run's evaluation. Returns `out`; files of an earlier export are replaced.
    """
    from flowrl.card import write_card

    out = Path(out)
    merge = merge or policy.train == "full"
    weights = "ema" if any(name.startswith("ema/") for name in policy.named_states()) else "current"
    (export_merged if merge else export_lora)(policy, out, weights=weights)
    config_file = Path(run_folder) / "config.yaml"
    if config_file.is_file():
        shutil.copyfile(config_file, out / "config.yaml")
    drawn = not merge and sheet and _draw_strengths(policy, Path(run_folder), out, weights)
    write_card(run_folder, out, merged=merge, weights=weights, sheet=drawn)
    return out


def export_lora(policy: PipelinePolicy, out: str | Path, *, weights: str = "current") -> Path:
    """Write the adapter as `pytorch_lora_weights.safetensors` in diffusers' layout, alpha folded in; returns the file.

    `weights`: the named weight set ("current", "ema", "old"). Raises UserError if the policy trains no LoRA.
    """
    if policy.train == "full" or not _layers(policy):
        raise UserError(
            f"the policy {policy.name} has no LoRA adapter (train: {policy.train}), expected train: lora; "
            "export full weights instead (--merge)"
        )
    with policy.weights(weights):
        folded, metadata = fold(policy.denoiser)
        part = policy.backbone.network_part
        policy.pipeline.save_lora_weights(
            str(out), **{f"{part}_lora_layers": folded, f"{part}_lora_adapter_metadata": metadata}
        )
    return Path(out) / "pytorch_lora_weights.safetensors"


def fold(network: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The adapter of a network as (state in peft's layout with `B' = scale B`, settings that say alpha = rank).

    Scale is the one the layer computes with (alpha / rank, or alpha / sqrt(rank) of rank-stabilised LoRA).
    """
    from peft.utils import get_peft_model_state_dict

    scales = {name: layer.scaling[ADAPTER] for name, layer in _lora_layers(network)}
    state = {}
    for key, value in get_peft_model_state_dict(network, adapter_name=ADAPTER).items():
        layer, found, _ = key.partition(".lora_B.")  # weight, and bias where there is one
        state[key] = (value.detach().float() * (scales[layer] if found else 1.0)).cpu().contiguous()
    ranks = {
        layer: value.shape[0] for key, value in state.items() if (layer := key.partition(".lora_A.weight")[0]) != key
    }
    rank = max(ranks.values(), key=list(ranks.values()).count)
    odd = {layer: other for layer, other in ranks.items() if other != rank}
    metadata = {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": odd,
        "alpha_pattern": odd,
        "target_modules": sorted(ranks),
    }
    if any("lora_magnitude_vector" in key for key in state):
        metadata["use_dora"] = True
    if any(key.endswith(".lora_B.bias") for key in state):
        metadata["lora_bias"] = True
    return state, metadata


def export_merged(policy: PipelinePolicy, out: str | Path, *, weights: str = "current") -> Path:
    """Write full weights, `W + scale B A` in place of W, as a pipeline folder; the policy itself is not changed.

    Where the text encoders were dropped (a run that is still in memory), the folder holds the network alone, in
    `transformer/` or `unet/`. Raises UserError for a quantised base or an adapter that is no plain LoRA.
    """
    pipeline, network, part = policy.pipeline, policy.denoiser, policy.backbone.network_part
    if getattr(network, "is_quantized", False):
        raise UserError(
            f"the base weights of {policy.name} are quantised and cannot hold a merged update, expected plain weights; "
            "use `flowrl export RUN --merge`, which loads them anew, or export the LoRA"
        )
    with policy.weights(weights), torch.no_grad():
        state = merged_state(network)
        with torch.device("meta"):  # takes the tensors of `state` without a copy of its own
            merged = type(network).from_config(network.config)
        merged.load_state_dict(state, assign=True)
        if policy.has_text_encoders:
            settings = {name: pipeline.config[name] for name in SETTINGS if name in pipeline.config}
            type(pipeline)(**{**pipeline.components, part: merged}, **settings).save_pretrained(out)
        else:
            merged.save_pretrained(Path(out) / part)
    return Path(out)


def merged_state(network: nn.Module) -> dict[str, Tensor]:
    """State of the network without adapters that computes the same: `W + scale B A`, in W's number format."""
    layers = dict(_lora_layers(network))
    state: dict[str, Tensor] = {}
    for key, value in network.state_dict().items():
        name, adapted, rest = key.rpartition(".base_layer.")
        if adapted:
            layer = layers[name]
            if layer.use_dora.get(ADAPTER) or layer.lora_bias.get(ADAPTER):
                raise UserError(
                    f"the adapter of {name} is a DoRA or has a bias, expected a plain LoRA to merge; export the LoRA"
                )
            if rest == "weight":
                value = (value.float() + layer.get_delta_weight(ADAPTER).float()).to(value.dtype)
            state[f"{name}.{rest}"] = value
        elif ".lora_" not in key:
            state[key] = value
    return state


@contextmanager
def lora_strength(policy: PipelinePolicy, strength: float) -> Iterator[None]:
    """Inside the block the adapter counts `strength` times: 0 is the base model, 1 what was trained."""
    layers = _layers(policy)
    before = [layer.scaling[ADAPTER] for _, layer in layers]
    for (_, layer), scale in zip(layers, before, strict=True):
        layer.scaling[ADAPTER] = scale * strength
    try:
        yield
    finally:
        for (_, layer), scale in zip(layers, before, strict=True):
            layer.scaling[ADAPTER] = scale


def strength_pictures(
    policy: PipelinePolicy,
    prompts: Sequence[str],
    settings: SampleSettings,
    strengths: Sequence[float] = STRENGTHS,
    weights: str = "current",
) -> list[list[Tensor]]:
    """One picture (3, H, W) per prompt and strength, from the same noise: `pictures[prompt][strength]`."""
    from flowrl.sampling import generate

    columns = []
    for strength in strengths:
        with policy.weights(weights), lora_strength(policy, strength):
            columns.append([images[0] for _, images in generate(policy, prompts, settings)])
    return [list(row) for row in zip(*columns, strict=True)]


def _draw_strengths(policy: PipelinePolicy, run: Path, out: Path, weights: str) -> bool:
    """Write `strengths.png` for the first prompt of each task of the run's evaluation; False if there was none."""
    from flowrl.sampling import SampleSettings
    from flowrl.sheets import strength_sheet
    from flowrl.summary import read_rows

    first = {row["tag"] or row["prompt"]: row["prompt"] for row in reversed(read_rows(run, "before"))}
    prompts = list(reversed(first.values()))[:6]
    if not prompts:
        return False
    import yaml

    chosen = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")).get("eval") or {}
    known = {key: chosen[key] for key in ("steps", "guidance", "height", "width") if chosen.get(key) is not None}
    settings = SampleSettings(**known, images_per_prompt=1)
    labels = [f"{strength:g}" + {0.0: " (base)", 1.0: " (as trained)"}.get(strength, "") for strength in STRENGTHS]
    pictures = strength_pictures(policy, prompts, settings, STRENGTHS, weights)
    strength_sheet(prompts, pictures, labels).save(out / "strengths.png")
    return True


def _lora_settings(chosen: Any) -> Any:
    from flowrl.policies import LoraSettings

    lora = chosen.lora
    targets = None if lora.targets is None else tuple(lora.targets)
    return LoraSettings(rank=lora.rank, alpha=lora.alpha, targets=targets, init=lora.init, source=lora.start_from)


def _layers(policy: PipelinePolicy) -> list[tuple[str, Any]]:
    return _lora_layers(policy.denoiser)


def _lora_layers(network: nn.Module) -> list[tuple[str, Any]]:
    """(name, layer) of every layer that carries the adapter."""
    from peft.tuners.lora import LoraLayer

    named = network.named_modules()
    return [(name, layer) for name, layer in named if isinstance(layer, LoraLayer) and ADAPTER in layer.scaling]
