"""A diffusers pipeline as a policy: dtype policy, padding, decoding, weight sets, embedding cache."""

import gc
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from flowrl.errors import UserError
from flowrl.policies.conditioning import Conditioning, EmbeddingCache, content_hash
from flowrl.policies.flux import Flux
from flowrl.policies.sd3 import SD3
from flowrl.policies.unet import StableDiffusion, StableDiffusionXL
from flowrl.policies.vp import vp_scale
from flowrl.policies.weights import LoraSettings, WeightSets, add_lora

log = logging.getLogger(__name__)
_ALL: tuple[Any, ...] = (SD3, Flux, StableDiffusion, StableDiffusionXL)
BACKBONES: dict[str, Any] = {name: backbone for backbone in _ALL for name in backbone.pipeline_classes}
ROWS = 8  # model calls have a multiple of this many rows
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class PipelinePolicy:
    """A diffusers pipeline of one of the classes in `BACKBONES` as a trainable flow (see `protocol.Policy`).

    Number formats: latents, velocities, s and everything trainable are float32. The network computes in `dtype` (under
    autocast where that is not float32), its frozen weights and the text encoders are kept in it; the VAE stays float32.
    Modules are always in eval mode, so nothing is random inside the network.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        name: str | None = None,
        dtype: str = "float32",
        device: str | torch.device = "cpu",
        train: str = "lora",
        lora: LoraSettings | None = None,
        gradient_checkpointing: bool = False,
        cache_dir: str | os.PathLike | None = None,
        max_sequence_length: int | None = None,
        reference: bool = True,
    ):
        """pipeline: a loaded diffusers pipeline, which the policy takes over. `load_policy` documents the rest.

        Raises UserError for a pipeline class, train mode or dtype that is not supported.
        """
        kind = type(pipeline).__name__
        if kind not in BACKBONES:
            raise UserError(
                f"got a {kind}; expected one of {sorted(BACKBONES)}; use a model of a supported pipeline class"
            )
        if train not in ("lora", "full", "none"):
            raise UserError(f"got train {train!r}; expected 'lora', 'full' or 'none'")
        if dtype not in DTYPES:
            raise UserError(f"got dtype {dtype!r}; expected one of {sorted(DTYPES)}")
        self.name = name or kind
        self.pipeline = pipeline
        self.device = torch.device(device)
        self.dtype = DTYPES[dtype]
        self.train = train
        self.backbone = BACKBONES[kind](pipeline, max_sequence_length)
        self.resolution = self.backbone.resolution
        self.network = self.denoiser  # what `predict` calls; a trainer may put a wrapped module here
        self.cache_dir = cache_dir
        self._cache: EmbeddingCache | None = None
        self._place(pipeline)
        self._make_trainable(lora, reference)
        if gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()

    @property
    def denoiser(self) -> Any:
        """The pipeline's network itself: its transformer or UNet."""
        return getattr(self.pipeline, self.backbone.network_part)

    def prior_std(self, s: float) -> float:
        """Std of the initial noise at the first time s: 1 for flows; diffusion models begin at x_vp ~ N(0, 1)."""
        return 1.0 if self.backbone.clock is None else 1 / float(vp_scale(s))

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """(C, h, w) of one latent of an image of height x width pixels. Raises UserError for sizes it cannot make."""
        height, width = height or self.resolution, width or self.resolution
        scale, multiple, limit = (
            self.pipeline.vae_scale_factor,
            self.backbone.pixel_multiple,
            self.backbone.latent_limit,
        )
        if height < multiple or width < multiple or height % multiple or width % multiple:
            near = [max(multiple, round(side / multiple) * multiple) for side in (height, width)]
            raise UserError(
                f"got image size {height} x {width}; expected multiples of {multiple} pixels for {self.name}; "
                f"use for example {near[0]} x {near[1]}"
            )
        if limit is not None and max(height, width) > limit * scale:
            raise UserError(
                f"got image size {height} x {width}; expected at most {limit * scale} pixels a side for {self.name}"
            )
        return self.backbone.latent_channels, height // scale, width // scale

    def sigmas(self, steps: int, height: int | None = None, width: int | None = None) -> Tensor:
        """float64 (steps + 1,): the values of the pipeline's own scheduler, bit for bit in float32.

        From 1 to 0 for flows; diffusion models begin below 1, and end above 0 where their scheduler does (see `vp`).
        """
        if steps < 1:
            raise UserError(f"got {steps} denoising steps; expected at least 1")
        _, h, w = self.latent_shape(height, width)
        patch = self.backbone.pixel_multiple // self.pipeline.vae_scale_factor
        return self.backbone.sigmas(steps, (h // patch) * (w // patch)).double().cpu()

    def encode(self, prompts: Sequence[str], negative: str = "") -> Conditioning:
        """Conditioning of N prompts on the policy's device, from the cache on disk where there is one.

        Each prompt is encoded in a batch of fixed shape, so its embedding depends on nothing but the prompt.
        Raises UserError where text encoders were dropped and a prompt is not cached.
        """
        if isinstance(prompts, str) or not prompts:
            raise UserError(f"got prompts {prompts!r}; expected a non-empty list of strings")
        guided = self.backbone.calls(2.0) == 2  # others take guidance as an input and have no unconditional row
        if negative and not guided:
            raise UserError(
                f"got negative prompt {negative!r}; expected none for {self.name}, which cannot use it; leave it out"
            )
        zeros = self.backbone.zero_negative and not negative
        rows = self._embed([*prompts, negative] if guided and not zeros else list(prompts))
        table = {key: torch.cat([rows[prompt][key] for prompt in prompts]).to(self.device) for key in rows[prompts[0]]}
        if not guided:
            return Conditioning(table, None)
        if zeros:
            return Conditioning(table, {key: torch.zeros_like(value[:1]) for key, value in table.items()})
        return Conditioning(table, {key: row.to(self.device) for key, row in rows[negative].items()})

    @torch.no_grad()
    def _embed(self, prompts: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        """prompt -> its rows, each (1, ...)."""
        cache, found = self._open_cache(), {}
        for prompt in dict.fromkeys(prompts):
            rows = cache.get(prompt) if cache else None
            if rows is not None:
                found[prompt] = rows
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in found]
        if not missing:
            return found
        if not self.has_text_encoders:
            raise UserError(
                f"got prompt {missing[0]!r} ({len(missing)} such) after the text encoders were dropped; expected "
                "prompts that are in the embedding cache; encode all prompts once before drop_text_encoders()"
            )
        for part in self.backbone.text_parts:
            if getattr(self.pipeline, part) is not None:
                getattr(self.pipeline, part).to(self.device)
        for start in range(0, len(missing), ROWS):
            batch = missing[start : start + ROWS]
            padded = batch + [batch[-1]] * (ROWS - len(batch))
            encoded = self.backbone.encode(padded, self.device)
            for i, prompt in enumerate(batch):
                found[prompt] = {key: value[i : i + 1] for key, value in encoded.items()}
                if cache:
                    cache.put(prompt, found[prompt])
        return found

    def _open_cache(self) -> EmbeddingCache | None:
        if self.cache_dir is None:
            return None
        if self._cache is None:  # hashing the encoders takes seconds for a large T5: once, when first needed
            parts = [getattr(self.pipeline, part) for part in self.backbone.text_parts]
            tokenizers = [getattr(self.pipeline, part) for part in self.backbone.tokenizers]
            settings = [type(self.pipeline).__name__, self.backbone.max_sequence_length]
            self._cache = EmbeddingCache(self.cache_dir, content_hash(parts, tokenizers, settings))
        return self._cache

    @property
    def has_text_encoders(self) -> bool:
        """False after `drop_text_encoders`."""
        return any(getattr(self.pipeline, part) is not None for part in self.backbone.text_parts)

    def drop_text_encoders(self) -> None:
        """Free the text encoders. Prompts in the embedding cache can still be encoded."""
        self._open_cache()
        for part in self.backbone.text_parts:
            setattr(self.pipeline, part, None)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def predict(self, latents: Tensor, s: Tensor, cond: Conditioning, guidance: float = 1.0) -> Tensor:
        """Velocity v = e - x0, (N, C, h, w) float32, of latents (N, C, h, w) at times s (N,).

        Rows are padded to a multiple of 8 by repeating the last one: in one shape, other rows change no bit of a row.
        `guidance` 1 is none; it is combined from 2 rows per row in one forward (SD3, Stable Diffusion), or is an input
        of the network (FLUX, latent consistency models).
        """
        n = len(latents)
        if not n == len(s) == len(cond):
            raise ValueError(f"got {n} latents, {len(s)} times, {len(cond)} conditioning rows; expected equal numbers")
        if guidance != 1 and self.backbone.calls(guidance) == 2 and cond.uncond is None:
            raise UserError(
                f"got guidance {guidance} for conditioning without an unconditional row; expected guidance 1, or "
                "conditioning from this policy's `encode`"
            )
        cond = cond.to(self.device)
        latents, s = latents.to(self.device, torch.float32), s.to(self.device, torch.float32)
        if n % ROWS:
            index = torch.arange(-(-n // ROWS) * ROWS, device=self.device).clamp(max=n - 1)
            latents, s, cond = latents[index], s[index], cond[index]
        rows = {key: value.to(self.dtype) for key, value in cond.rows.items()}
        uncond = None if cond.uncond is None else {key: value.to(self.dtype) for key, value in cond.uncond.items()}
        with self.autocast():
            v = self.backbone.velocity(self.network, latents, s, rows, uncond, guidance)
        return v[:n]

    def calls(self, guidance: float = 1.0) -> int:
        """Network rows per predicted row (2 under classifier-free guidance)."""
        return self.backbone.calls(guidance)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (N, 3, H, W) float32 in [0, 1] of latents (N, C, h, w) at the last of `sigmas`; differentiable.

        Images are decoded in calls of one fixed shape (8 rows for small images, 1 for large ones) and so depend on
        their latent only; under gradients each call is recomputed in the backward pass. From 1024 px on, tiled.
        """
        vae, scale = self.pipeline.vae, self.pipeline.vae_scale_factor
        pixels = latents.shape[-1] * latents.shape[-2] * scale**2
        vae.enable_tiling() if pixels >= 1024**2 else vae.disable_tiling()
        chunk = max(1, min(ROWS, 1024**2 // pixels))
        shift = vae.config.shift_factor or 0.0
        z = latents.to(self.device, torch.float32)
        if self.backbone.clock is not None:
            z = z * float(vp_scale(self.backbone.clock.final))  # x_vp, in which diffusion models end
        z = z / vae.config.scaling_factor + shift

        def images(part: Tensor) -> Tensor:
            part = part.contiguous(memory_format=torch.channels_last)
            return (vae.decode(part, return_dict=False)[0] / 2 + 0.5).clamp(0, 1).contiguous()

        done = []
        for part in z.split(chunk):
            index = torch.arange(chunk, device=self.device).clamp(max=len(part) - 1)
            if torch.is_grad_enabled() and part.requires_grad:
                done.append(checkpoint(images, part[index], use_reentrant=False)[: len(part)])
            else:
                done.append(images(part[index])[: len(part)])
        return torch.cat(done)

    def weights(self, name: str) -> AbstractContextManager[None]:
        """Use another weight set inside the block.

        "current": the live one. "reference": the base without adapters, or the frozen copy of full fine-tuning (or what
        was copied to "reference"). "old", "ema" and any other name: what `copy_weights` put there.
        """
        return self.sets.use(name)

    @torch.no_grad()
    def copy_weights(self, source: str, target: str, decay: float | None = None) -> None:
        """target <- source, or target <- decay * target + (1 - decay) * source; a missing target becomes a copy."""
        self.sets.copy(source, target, decay)
        self._frozen_reference &= target != "reference"

    def trainable(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Names (of the network's parameters) and parameters that an optimizer may change."""
        return list(self.sets.current.items())

    def named_states(self) -> dict[str, Tensor]:
        """All trained sets as "set/parameter", live tensors.

        The frozen copy of full fine-tuning is left out as long as it is what loading the model gives.
        """
        states = self.sets.states()
        return {
            key: value for key, value in states.items() if not (self._frozen_reference and key.startswith("reference/"))
        }

    @torch.no_grad()
    def load_named_states(self, states: dict[str, Tensor]) -> None:
        """Put back what `named_states` gave. Raises UserError, and changes nothing, where they do not fit."""
        self.sets.load(states)
        self._frozen_reference &= not any(key.startswith("reference/") for key in states)

    def memory(self) -> dict[str, int]:
        """Bytes by part: "transformer" or "unet", "vae", "text_encoders", "trainable", each kept set as "set:NAME"."""
        parts = {self.backbone.network_part: [self.denoiser], "vae": [self.pipeline.vae]}
        parts["text_encoders"] = [getattr(self.pipeline, part) for part in self.backbone.text_parts]
        sizes = {
            name: sum(p.nbytes for module in modules if module is not None for p in module.parameters())
            for name, modules in parts.items()
        }
        sets = self.sets.nbytes()
        return sizes | {"trainable": sets.pop("current")} | {f"set:{name}": size for name, size in sets.items()}

    def _place(self, pipeline: Any) -> None:
        """Freeze, set eval mode, and bring each part to its number format and device."""
        for part in (self.backbone.network_part, "vae", *self.backbone.text_parts):
            if getattr(pipeline, part) is not None:
                getattr(pipeline, part).requires_grad_(False).eval()
        _move(pipeline.vae, self.device, torch.float32)
        pipeline.vae.to(memory_format=torch.channels_last)  # a fifth faster, on CPUs too
        if not getattr(self.denoiser, "is_quantized", False):  # those are loaded in their final form and place
            # full fine-tuning updates float32 master weights
            _move(self.denoiser, self.device, torch.float32 if self.train == "full" else self.dtype)
        # text encoders stay where they are until first used

    def _make_trainable(self, lora: LoraSettings | None, reference: bool) -> None:
        denoiser = self.denoiser
        self._frozen_reference = False  # True: the set "reference" is the base as loaded
        if self.train == "full":
            if lora is not None and lora.source is not None:
                raise UserError(
                    f"got a LoRA to start from ({lora.source!r}) with train 'full'; expected train 'lora'; "
                    "to train all weights on top of a LoRA, fuse it into the model first"
                )
            if getattr(denoiser, "is_quantized", False):
                raise UserError(
                    "got train 'full' with a quantised base; expected train 'lora'; quantised weights are fixed"
                )
            denoiser.requires_grad_(True)
            self.sets = WeightSets(dict(denoiser.named_parameters()))
            if not reference:
                return
            with torch.no_grad():
                self.sets.copy("current", "reference")
            self._frozen_reference = True
            size = self.sets.nbytes()["reference"] / 2**20
            log.info("full fine-tuning keeps a frozen float32 copy of the network: %.0f MiB on %s", size, self.device)
            return
        if self.train == "none" and (lora is None or lora.source is None):
            self.sets = WeightSets({}, adapters=lambda on: None)
            return
        add_lora(self.pipeline, self.backbone.network_part, lora or LoraSettings(), self.backbone.lora_targets)
        adapter = {name: p for name, p in denoiser.named_parameters() if ".lora_" in name}
        for parameter in adapter.values():
            parameter.data = parameter.data.to(self.device, torch.float32)
            parameter.requires_grad_(self.train == "lora")
        denoiser.eval()

        def switch(on: bool) -> None:
            denoiser.enable_adapters() if on else denoiser.disable_adapters()
            for parameter in adapter.values():  # switching on makes peft ask for gradients, wanted or not
                parameter.requires_grad_(on and self.train == "lora")

        self.sets = WeightSets(adapter if self.train == "lora" else {}, adapters=switch)

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Compute in `dtype`. On a CPU the fused attention is slow backwards in bfloat16 (a fifth of an update of a
        small model), so it is left out there, in rollouts too: both must compute the same bits. But not with gradient
        checkpointing, whose recomputation comes after this context."""
        with ExitStack() as stack:
            if self.dtype != torch.float32:
                stack.enter_context(torch.autocast(self.device.type, self.dtype))
                if self.device.type == "cpu" and not self.denoiser.is_gradient_checkpointing:
                    stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            yield


def _move(module: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """To a device and a number format; diffusers warns about every cast, needed or not, so cast only where needed."""
    module.to(device)
    if any(parameter.dtype != dtype for parameter in module.parameters()):
        module.to(dtype)
