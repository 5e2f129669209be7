"""Named weight sets, and LoRA adapters through peft."""

import difflib
import inspect
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowrl.errors import UserError

log = logging.getLogger(__name__)
ADAPTER = "default"


@dataclass(frozen=True)
class LoraSettings:
    """A low-rank adapter W + (alpha / rank) B A on chosen linear layers (arXiv 2106.09685).

    `targets`: ends of module names, None for those published with Flow-GRPO for the model class.
    `init`: "gaussian" (A ~ N(0, 1/rank)) or "kaiming"; B starts at 0 either way, so that training starts at the base.
    `source`: file, folder or hub id of a LoRA to start from; its own rank, alpha and targets then hold.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] | None = None
    init: str = "gaussian"
    source: str | None = None
    seed: int = 0


class WeightSets:
    """Copies of the trainable parameters under names, swapped in without moving data.

    "current" are the live parameters. "reference" is the policy without its adapters where `adapters` (a function that
    switches them on and off) is given, else whatever was copied there. Other names exist once copied to.
    """

    def __init__(self, current: Mapping[str, nn.Parameter], adapters: Callable[[bool], None] | None = None):
        self.current = dict(current)
        self.adapters = adapters or (lambda on: None)
        self.has_adapters = adapters is not None
        self.sets: dict[str, dict[str, Tensor]] = {}
        self.active = "current"

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Run the block with the weights `name`. Blocks nest; each puts back what it found.

        Parameters keep their identity and change their data, so a graph made outside the block must not be
        back-propagated inside it.
        """
        before = self.active
        self._activate(name)
        try:
            yield
        finally:
            self._activate(before)

    def copy(self, source: str, target: str, decay: float | None = None) -> None:
        """target <- source, or decay * target + (1 - decay) * source; a missing target starts as a copy.

        Args: decay in [0, 1], None for a plain copy. Raises UserError for an unknown source.
        """
        if self.active != "current":
            raise RuntimeError(f"weights were copied while {self.active!r} was in use; copy outside the block")
        if decay is not None and not 0 <= decay <= 1:
            raise ValueError(f"got decay {decay}; expected a number in [0, 1]")
        values = self._values(source)
        if target != "current" and target not in self.sets:
            self.sets[target] = {name: value.detach().clone() for name, value in values.items()}
            return
        for name, value in self._values(target).items():
            value.copy_(values[name]) if decay is None else value.lerp_(values[name], 1 - decay)

    def states(self) -> dict[str, Tensor]:
        """All sets as "set/parameter" (live tensors, not copies)."""
        if self.active != "current":
            raise RuntimeError(f"weights were read while {self.active!r} was in use; read outside the block")
        names = ["current", *self.sets]
        return {f"{set_}/{name}": value for set_ in names for name, value in self._values(set_).items()}

    def load(self, states: Mapping[str, Tensor]) -> None:
        """Put `states` back, creating sets as needed. Nothing changes unless every name and shape fits (UserError)."""
        groups: dict[str, dict[str, Tensor]] = {}
        for key, value in states.items():
            set_, _, name = key.rpartition("/")
            groups.setdefault(set_, {})[name] = value
        for set_, values in groups.items():
            wrong = sorted(values.keys() ^ self.current.keys())
            wrong += [
                name for name in values.keys() & self.current.keys() if values[name].shape != self.current[name].shape
            ]
            if wrong:
                raise UserError(
                    f"got weights {set_!r} that do not fit this policy (first: {wrong[0]!r}, {len(wrong)} in all); "
                    f"expected the {len(self.current)} trainable tensors of this policy; "
                    "use the policy, LoRA rank and targets that the weights were saved with"
                )
        if "current" not in groups:
            raise UserError(
                f"got weight sets {sorted(groups)}; expected 'current' among them; use a complete checkpoint"
            )
        for set_, values in groups.items():
            if set_ != "current" and set_ not in self.sets:
                self.sets[set_] = {name: value.detach().clone() for name, value in self.current.items()}
            for name, value in self._values(set_).items():
                value.copy_(values[name])

    def nbytes(self) -> dict[str, int]:
        """Bytes held by each set."""
        return {set_: sum(v.nbytes for v in self._values(set_).values()) for set_ in ["current", *self.sets]}

    def _values(self, name: str) -> dict[str, Tensor]:
        if name == "current":
            return {key: parameter.data for key, parameter in self.current.items()}
        if name not in self.sets:
            known = ["current", *sorted(self.sets)]
            raise UserError(f"got weight set {name!r}; expected one of {known}; make it first with copy_weights")
        return self.sets[name]

    def _activate(self, name: str) -> None:
        adapters_off = name == "reference" and name not in self.sets and self.has_adapters
        if name != "current" and not adapters_off:
            self._values(name)  # unknown names fail before anything is touched
        if self.active == name:
            return
        if self.active == "reference" and "reference" not in self.sets:
            self.adapters(True)
        elif self.active != "current":
            self._swap(self.active)
        if adapters_off:
            self.adapters(False)
        elif name != "current":
            self._swap(name)
        self.active = name

    def _swap(self, name: str) -> None:
        """Exchange the storages of the live parameters and of set `name`: doing it twice changes nothing."""
        stored = self.sets[name]
        for key, parameter in self.current.items():
            parameter.data, stored[key] = stored[key], parameter.data


def add_lora(pipeline: Any, part: str, settings: LoraSettings, targets: tuple[str, ...]) -> None:
    """Put an adapter on the pipeline's network (`part`: "transformer" or "unet"), fresh or from `settings.source`.

    Raises UserError for unusable settings, targets that match nothing, or a file that is no LoRA of this network.
    """
    if settings.source is not None:
        _load_lora(pipeline, part, settings.source)
        return
    network = getattr(pipeline, part)
    from peft import LoraConfig

    targets = tuple(settings.targets or targets)
    if settings.rank < 1 or settings.alpha <= 0:
        raise UserError(f"got LoRA rank {settings.rank}, alpha {settings.alpha}; expected rank >= 1 and alpha > 0")
    inits: dict[str, Any] = {"gaussian": "gaussian", "kaiming": True}
    if settings.init not in inits:  # others (pissa, olora) rewrite the base, and with it the reference
        raise UserError(f"got LoRA init {settings.init!r}; expected one of {sorted(inits)}")
    _check_targets(network, targets)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # divided by r, so any number will do
        init_lora_weights=inits[settings.init],
        target_modules=list(targets),
    )
    with torch.random.fork_rng():  # the adapter is a function of its seed, not of what was drawn before
        torch.manual_seed(settings.seed)
        network.add_adapter(config, adapter_name=ADAPTER)


def _check_targets(network: nn.Module, targets: tuple[str, ...]) -> None:
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            ends = sorted({name.split(".", 2)[-1] for name in linear if name.count(".") >= 2})
            near = difflib.get_close_matches(target, ends, n=3) or ends[:8]
            raise UserError(
                f"got LoRA target {target!r}, which is no linear layer of {type(network).__name__}; "
                f"expected the end of a layer's name, such as {near}; or leave `targets` out for the published ones"
            )


def _load_lora(pipeline: Any, part: str, source: str) -> None:
    """Load a diffusers, kohya or peft LoRA of the network as the adapter to be trained."""
    from safetensors import SafetensorError

    path = Path(source).expanduser()
    what = f"got LoRA {source!r}"
    fix = (
        "expected a .safetensors file, a folder with pytorch_lora_weights.safetensors or adapter_model.safetensors, "
        "or a hub id"
    )
    looks_local = (
        path.suffix == ".safetensors" or path.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1
    )
    if not path.exists() and looks_local:
        raise UserError(f"{what}, which does not exist; {fix}; check the path")
    try:
        state, alphas, metadata = _read_lora(pipeline, part, path if path.exists() else source)
    except (OSError, SafetensorError, ValueError) as error:  # ValueError: a layout diffusers does not know
        raise UserError(
            f"{what}, which cannot be read ({error}); {fix}; check the path, or that the hub is reachable"
        ) from error
    if not any(key.startswith(f"{part}.") for key in state):
        raise UserError(
            f"{what}, which holds no layer of a {part} (first key: {next(iter(state), None)!r}); "
            f"expected keys that start with '{part}.'; use a LoRA made for {type(pipeline).__name__}"
        )
    other = sorted({key.split(".")[0] for key in state} - {part})
    if other:
        raise UserError(
            f"{what}, which also changes {other}; expected a LoRA of the {part} only, for text encoders are not "
            "trained; fuse those parts into the model first"
        )
    network = getattr(pipeline, part)
    missing = _missing_layers(network, part, state)
    if missing:
        raise UserError(
            f"{what}, whose layer {missing[0]!r} does not exist or has another shape here ({len(missing)} such); "
            f"expected a LoRA made for this {type(network).__name__}; use the base model it was trained on"
        )
    load = getattr(pipeline, f"load_lora_into_{part}")
    arguments = {part: network} | ({"network_alphas": alphas} if _takes_alphas(load) else {})
    load(state, adapter_name=ADAPTER, metadata=metadata, **arguments)
    log.info("LoRA from %s: its own rank, alpha and targets hold", source)


def _read_lora(pipeline: Any, part: str, path: Path | str) -> tuple[dict[str, Tensor], dict | None, dict | None]:
    """(state with keys `PART.LAYER.lora_A.weight`, alphas per layer, LoraConfig fields)."""
    from safetensors.torch import load_file

    if isinstance(path, Path) and path.is_dir() and (path / "adapter_config.json").is_file():  # peft's own layout
        prefix = "base_model.model."
        state = {
            f"{part}.{key.removeprefix(prefix)}": value
            for key, value in load_file(path / "adapter_model.safetensors").items()
        }
        config = json.loads((path / "adapter_config.json").read_text())
        fields = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_dora", "lora_bias")
        return state, None, {f"{part}.{field}": config[field] for field in fields if field in config}
    if isinstance(path, Path) and path.is_dir():
        path = _only_lora(path)
    folder, name = (str(path.parent), path.name) if isinstance(path, Path) else (path, None)
    flags: dict[str, Any] = {}
    if part == "unet":
        flags["unet_config"] = pipeline.unet.config  # by which the blocks of kohya's SDXL files get diffusers' numbers
    elif _takes_alphas(pipeline.load_lora_into_transformer):
        flags["return_alphas"] = True
    state, *alphas, metadata = pipeline.lora_state_dict(
        folder, weight_name=name, return_lora_metadata=True, use_safetensors=True, **flags
    )
    return (_peft_names(state) if part == "unet" else state), (alphas[0] if alphas else None), metadata


def _only_lora(folder: Path) -> Path:
    """The LoRA file in a folder: the one of diffusers' name, else the only safetensors file (FileNotFoundError)."""
    usual, files = folder / "pytorch_lora_weights.safetensors", sorted(folder.glob("*.safetensors"))
    if usual not in files and len(files) != 1:
        raise FileNotFoundError(f"{len(files)} safetensors files in it, none named {usual.name}")
    return usual if usual in files else files[0]


def _takes_alphas(load: Callable[..., Any]) -> bool:
    """Loaders of FLUX and UNets take files with an alpha per layer (kohya's); SD3's refuses them."""
    return "network_alphas" in inspect.signature(load).parameters


def _peft_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Older names of UNet adapters as peft has them: `LAYER.lora.down.weight` is `LAYER.lora_A.weight`."""
    from diffusers.utils import convert_unet_state_dict_to_peft

    return convert_unet_state_dict_to_peft(dict(state))


def _missing_layers(network: nn.Module, part: str, state: Mapping[str, Tensor]) -> list[str]:
    """Adapter layers of `state` without a layer of matching shape in the network."""
    modules = dict(network.named_modules())
    missing = []
    for key, value in state.items():
        layer, found, _ = key.removeprefix(f"{part}.").partition(".lora_")
        weight = getattr(modules.get(layer), "weight", None)
        if not found or weight is None:
            missing.append(layer)
        elif key.endswith("lora_A.weight") and weight.ndim == 2 and value.shape[1] != modules[layer].in_features:
            missing.append(layer)
        elif key.endswith("lora_B.weight") and weight.ndim == 2 and value.shape[0] != modules[layer].out_features:
            missing.append(layer)
    return missing
