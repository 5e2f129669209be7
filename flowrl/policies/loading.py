"""Find, check and load a policy: bundled name, folder or hub id."""

import difflib
import json
import os
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

from flowrl.errors import UserError
from flowrl.policies.pipeline import BACKBONES, DTYPES, PipelinePolicy
from flowrl.policies.weights import LoraSettings
from reward_models.torchvision_ops import ready as torchvision_ready

QUANTIZE = ("int8", "nf4")
ATTENTION = ("native", "xformers", "flash")
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # parts of pipelines that are not loaded
MODELS = Path(__file__).resolve().parent.parent / "models"


def native_dtype(device: str = "auto") -> str:
    """The type to compute in: "bfloat16" where the device has instructions for it (AVX512-BF16, AMX), else "float32".

    On such a CPU a small transformer runs two to four times as fast as in float32; on others several times slower.
    """
    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bfloat16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "float32"


def load_policy(
    path: str | os.PathLike,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    quantize: str | None = None,
    attention: str = "native",
    gradient_checkpointing: bool = False,
    lora: LoraSettings | None = None,
    train: str = "lora",
    cache_dir: str | os.PathLike | None = None,
    revision: str | None = None,
    max_sequence_length: int | None = None,
    reference: bool = True,
) -> PipelinePolicy:
    """Load a diffusers pipeline as a policy: SD3, FLUX.1, Stable Diffusion 1.x and 2.x, SDXL, or an LCM.

    Args:
        path: name of a bundled model ("tiny-sd3"), a pipeline folder, or a hub id ("owner/name"). A folder that has the
            name of a bundled model is written "./tiny-sd3".
        dtype: what the network computes in: "float32", "bfloat16" or "float16". Latents, trained weights stay float32.
        device: "cpu", "cuda", "cuda:1" or "auto" (CUDA if there is one).
        quantize: keep the frozen network as "int8" or "nf4" (bitsandbytes through diffusers; needs CUDA).
        attention: "native" (PyTorch), "xformers" or "flash", where the model class can use it.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        lora: adapter settings; None for the defaults.
        train: "lora"; "full" (all network weights); "none" (nothing; a LoRA given by `lora.source` still applies).
        cache_dir: folder for the prompt-embedding cache; None for no cache.
        revision: branch, tag or commit of a hub model.
        max_sequence_length: T5 tokens; None for the pipeline's default (0 where an SD3 folder's T5 is a zero stand-in).
            Models without a T5 take none.
        reference: whether full fine-tuning keeps a frozen float32 copy as weights("reference"); LoRA has it for free.

    Raises UserError, which says what to do, for everything a user can get wrong here.
    """
    where = find_device(device)
    for name, value, allowed in (
        ("dtype", dtype, tuple(DTYPES)),
        ("quantize", quantize, (None, *QUANTIZE)),
        ("attention", attention, ATTENTION),
        ("train", train, ("lora", "full", "none")),
    ):
        if value not in allowed:
            raise UserError(f"got {name} {value!r}; expected one of {', '.join(str(item) for item in allowed)}")
    if quantize is not None:
        _check_quantize(quantize, where, train)
    if attention != "native" and where.type != "cuda":
        raise UserError(
            f"got attention {attention!r} on device {where}; expected 'native' there; use it on a CUDA device"
        )
    source = resolve(path)
    index = model_index(source, revision)
    with torch.cuda.device(where) if where.type == "cuda" else nullcontext():  # quantised weights go to the current one
        pipeline = _load_pipeline(source, index, DTYPES[dtype], quantize, revision, train)
    if attention != "native":
        set_attention(getattr(pipeline, BACKBONES[index["_class_name"]].network_part), attention)
    return PipelinePolicy(
        pipeline, name=str(path), dtype=dtype, device=where, train=train, lora=lora, cache_dir=cache_dir,
        gradient_checkpointing=gradient_checkpointing, max_sequence_length=max_sequence_length,
        reference=reference,
    )  # fmt: skip


def bundled() -> list[str]:
    """Names of the models in the box."""
    return sorted(folder.parent.name for folder in MODELS.glob("*/model_index.json"))


def resolve(path: str | os.PathLike) -> str:
    """The folder or hub id that `path` stands for. Raises UserError where it is neither."""
    text = os.fspath(path)
    if text in bundled():
        return str(MODELS / text)
    folder = Path(text).expanduser()
    if folder.is_dir():
        return str(folder)
    if folder.is_file():
        raise UserError(
            f"got {text!r}, which is a file; expected a diffusers pipeline folder; convert single-file checkpoints "
            "with diffusers' from_single_file and save_pretrained"
        )
    if text.count("/") == 1 and not text.startswith((".", "~", "/")) and not text.endswith("/"):
        return text
    near = difflib.get_close_matches(text, bundled(), n=1)
    hint = f"did you mean {near[0]!r}?" if near else "check the spelling and the working directory"
    raise UserError(
        f"got model {text!r}, which does not exist; expected a pipeline folder, a hub id 'owner/name', or one of "
        f"{bundled()}; {hint}"
    )


def find_device(name: str | torch.device) -> torch.device:
    """The device that "auto", "cpu", "cuda" or "cuda:N" stands for. Raises UserError where there is none such."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", str(name)):
        raise UserError(f"got device {str(name)!r}; expected 'auto', 'cpu', 'cuda' or 'cuda:N'")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"got device {name!r}, but PyTorch sees no CUDA device here; expected 'cpu' or 'auto'; "
            "or install a CUDA build of PyTorch and check that nvidia-smi lists a GPU"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"got device {name!r}; expected an index below {torch.cuda.device_count()}")
    return device


def _check_quantize(quantize: str, device: torch.device, train: str) -> None:
    if train == "full":
        raise UserError(
            f"got quantize {quantize!r} with train 'full'; expected train 'lora'; quantised weights are fixed"
        )
    if device.type != "cuda":  # bitsandbytes has CPU kernels, but diffusers refuses to quantise without a GPU
        raise UserError(
            f"got quantize {quantize!r} on device {device}; expected a CUDA device, which diffusers' bitsandbytes "
            "quantisation needs; set quantize to null"
        )
    from diffusers.utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        raise UserError(
            f"got quantize {quantize!r} without bitsandbytes; expected it installed; pip install bitsandbytes"
        )


def set_attention(network: Any, attention: str) -> None:
    """Choose the attention backend by diffusers' own switch.

    Raises UserError where the backend's package is missing, or the model class would ignore the switch without a word.
    """
    if not any(hasattr(getattr(module, "processor", None), "_attention_backend") for module in network.modules()):
        raise UserError(
            f"got attention {attention!r} for {type(network).__name__}, which ignores diffusers' attention switch; "
            "expected 'native', which uses PyTorch's fused kernels; set attention to native"
        )
    try:
        network.set_attention_backend(attention)
    except (RuntimeError, ImportError, ValueError) as error:  # the package is missing, too old, or cannot run here
        package = {"xformers": "xformers", "flash": "flash-attn"}[attention]
        raise UserError(
            f"got attention {attention!r}, which is not usable here ({error}); expected the package {package} for this "
            f"PyTorch and GPU; pip install {package}, or set attention to native"
        ) from error


def model_index(source: str, revision: str | None) -> dict:
    """The pipeline's model_index.json, its class checked."""
    if Path(source).is_dir():
        file = Path(source) / "model_index.json"
        if not file.is_file():
            inside = sorted(entry.name for entry in Path(source).iterdir())[:6]
            raise UserError(
                f"got folder {source!r} without model_index.json (it holds {inside}); expected a diffusers pipeline "
                "folder, as save_pretrained writes it; point to the folder that holds model_index.json"
            )
    else:
        file = Path(_hub_file(source, revision))
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"got an unreadable {file} ({error}); expected JSON; download or save the model again"
        ) from error
    kind = index.get("_class_name") if isinstance(index, dict) else None
    if kind not in BACKBONES:
        raise UserError(
            f"got a model of pipeline class {kind!r}; expected one of {sorted(BACKBONES)}; "
            "use a text-to-image model of Stable Diffusion (1.x, 2.x, XL, 3.x), FLUX.1 or an LCM"
        )
    if Path(source).is_dir():  # a tokenizer without files would load, and fail at the first prompt
        parts = [name for name, entry in index.items() if isinstance(entry, list) and entry[0] and name not in UNUSED]
        absent = [name for name in parts if not (Path(source) / name).is_dir()]
        if absent:
            raise UserError(
                f"got model {source!r} without {', '.join(absent)}; expected a complete pipeline folder, with every "
                "part that its model_index.json names; download or save it again"
            )
    return index


def _hub_file(repo: str, revision: str | None) -> str:
    """Fetch model_index.json from the hub; its failures are the ones a whole download would have."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub import errors as hub

    try:
        return hf_hub_download(repo, "model_index.json", revision=revision)
    except hub.GatedRepoError as error:
        raise UserError(
            f"got hub model {repo!r}, which is gated; expected an account that accepted its licence; open "
            f"https://huggingface.co/{repo}, accept the terms, then run `hf auth login` (or set HF_TOKEN)"
        ) from error
    except hub.RevisionNotFoundError as error:
        raise UserError(
            f"got revision {revision!r}, which hub model {repo!r} does not have; expected a branch, tag or commit of "
            f"it; see https://huggingface.co/{repo}/tree/main"
        ) from error
    except hub.RepositoryNotFoundError as error:
        raise UserError(
            f"got model {repo!r}: no such folder here, and no such model on the hub that you may read; expected a "
            f"pipeline folder, a hub id, or one of {bundled()}; check the spelling, or `hf auth login` if it is private"
        ) from error
    except hub.LocalEntryNotFoundError as error:  # covers offline mode, which raises it for files not in the cache
        offline = constants.HF_HUB_OFFLINE
        why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        how = "unset HF_HUB_OFFLINE to download it" if offline else "check the connection"
        raise UserError(
            f"got model {repo!r}: no such folder here, not in the local hub cache, and {why}; expected a pipeline "
            f"folder, a model already downloaded, or one of {bundled()}; {how}, or give the path of a local copy"
        ) from error
    except hub.EntryNotFoundError as error:
        raise UserError(
            f"got hub model {repo!r}, which has no model_index.json; expected a diffusers pipeline; look for a "
            "repository with '-diffusers' in its name or convert the checkpoint"
        ) from error
    except hub.HFValidationError as error:
        raise UserError(f"got model {repo!r}; expected a pipeline folder or a hub id 'owner/name' ({error})") from error


def _load_pipeline(
    source: str, index: dict, dtype: torch.dtype, quantize: str | None, revision: str | None, train: str
) -> Any:
    torchvision_ready()  # transformers imports it where it is installed
    import diffusers
    from safetensors import SafetensorError

    pipeline_class = getattr(diffusers, index["_class_name"])
    # diffusers 0.42 renamed torch_dtype to dtype
    dtype_key = "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"
    master = torch.float32 if train == "full" else dtype  # full fine-tuning updates float32 weights
    part = BACKBONES[index["_class_name"]].network_part
    parts: dict[str, Any] = {name: None for name in UNUSED if name in index}
    if "requires_safety_checker" in index:
        parts["requires_safety_checker"] = False
    if index["_class_name"] == "StableDiffusion3Pipeline":  # from_pretrained must be told that a model has no T5
        parts |= {name: None for name in ("text_encoder_3", "tokenizer_3") if not index.get(name, [None])[0]}
    try:
        if quantize is not None:
            parts[part] = getattr(diffusers, index[part][1]).from_pretrained(
                source, subfolder=part, revision=revision,
                quantization_config=_quantization(quantize, dtype), **{dtype_key: dtype},
            )  # fmt: skip
        dtypes = {part: master, "vae": torch.float32, "default": dtype}
        return pipeline_class.from_pretrained(source, revision=revision, **{dtype_key: dtypes}, **parts)
    except (OSError, ValueError, SafetensorError) as error:  # absent, cut short, or weights of another config
        raise UserError(
            f"got model {source!r}, of which a part is missing or unreadable ({error}); expected a complete pipeline "
            "folder; download or save it again"
        ) from error


def _quantization(quantize: str, dtype: torch.dtype) -> Any:
    from diffusers import BitsAndBytesConfig

    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
