"""From what a config says about rewards to reward objects."""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import recipe
from .protocol import Metadata, Reward, RewardError, RewardResult, RewardSpec, as_result, preflight

# name -> (what it is, class, fixed arguments); classes are imported on use, as some need heavy libraries
BUILT_IN: dict[str, tuple[str, str, dict[str, Any]]] = {
    "shapes": (
        "GenEval's official decision on Shapes images, 0 or 1",
        "shapes.reward:ShapesReward",
        {"kind": "shapes"},
    ),
    "shapes-strict": ("the same with exact counts, 0 or 1", "shapes.reward:ShapesReward", {"kind": "shapes-strict"}),
    "shapes-soft": (
        "how much of the prompt is right, at most 1",
        "shapes.reward:ShapesReward",
        {"kind": "shapes-soft"},
    ),
    "jpeg": ("compressibility: minus the JPEG size in kB / 500", "rules:JpegReward", {"incompressible": False}),
    "jpeg-incompress": ("incompressibility: the JPEG size in kB", "rules:JpegReward", {"incompressible": True}),
    "ocr": ("how much of the quoted text of the prompt can be read in the image, 0 to 1", "ocr:OcrReward", {}),
    "geneval-hf": (
        "GenEval's official decision with Mask2Former of transformers and CLIP colours, 0 or 1",
        "geneval_hf:GenevalReward",
        {"kind": "geneval-hf"},
    ),
    "geneval-hf-strict": (
        "the same with exact counts, 0 or 1",
        "geneval_hf:GenevalReward",
        {"kind": "geneval-hf-strict"},
    ),
    "geneval-hf-soft": (
        "how much of the prompt is right, at most 1",
        "geneval_hf:GenevalReward",
        {"kind": "geneval-hf-soft"},
    ),
    "geneval-stored": ("GenEval from detections in the metadata", "geneval_stored:GenevalStoredReward", {}),
    "layout-iou": ("how well detected boxes meet the layout of the metadata, 0 to 1", "layout:LayoutReward", {}),
    "checklist": ("yes/no questions of the metadata, answered by BLIP-VQA, 0 to 1", "checklist:ChecklistReward", {}),
    "t2i-compbench": (
        "T2I-CompBench's rule for the prompt's category; give it a detector and an answerer",
        "compbench_reward:CompBench",
        {},
    ),
    "validity": ("1 unless the image is blank, dark, flat or of the wrong size", "gates:ValidityReward", {}),
    "tiny-clip": ("cosine of image and prompt in the box's CLIP model", "clip_score:ClipScore", {"path": "tiny-clip"}),
    "trained": (
        "a scorer that `flowrl reward train` wrote: {trained: {weight: 1, path: FOLDER}}, or the folder as the name",
        "training.scorer:open_trained",
        {},
    ),
    "clip": (
        "cosine of image and prompt in any CLIPModel folder: {clip: {weight: 1, path: FOLDER}}",
        "clip_score:ClipScore",
        {},
    ),
    "clip-score": (
        "CLIPScore: 2.5 max(cosine, 0), CLIP ViT-B/32",
        "clip_score:ClipScore",
        {
            "path": "openai/clip-vit-base-patch32",
            "name": "clip-score",
            "formula": "hessel",
            "licence": "MIT",
            "chunk": 32,
        },
    ),
    "clip-cosine": (
        "cosine of image and prompt in CLIP ViT-B/32",
        "clip_score:ClipScore",
        {"path": "openai/clip-vit-base-patch32", "name": "clip-cosine", "licence": "MIT", "chunk": 32},
    ),
    "clip-logit-30": (
        "logit of CLIP ViT-L/14 / 30 after a bilinear resize (Adv-GRPO's CLIP score)",
        "clip_score:flow_grpo_clip",
        {"divisor": 30},
    ),
    "clip-logit-100": ("the same / 100 (DiffusionNFT's CLIP score)", "clip_score:flow_grpo_clip", {"divisor": 100}),
    "pickscore": (
        "PickScore v1: the logit of its CLIP ViT-H/14, about 18 to 24",
        "clip_score:ClipScore",
        {
            "path": "yuvalkirstain/PickScore_v1",
            "processor": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
            "name": "pickscore",
            "formula": "logit",
            "chunk": 32,
        },
    ),
    "hpsv2": (
        "HPSv2: a cosine, about 0.2 to 0.35",
        "clip_score:hpsv2",
        {"path": "xswu/HPSv2:HPS_v2_compressed.pt", "name": "hpsv2"},
    ),
    "hpsv2.1": (
        "HPSv2.1: a cosine, about 0.2 to 0.35",
        "clip_score:hpsv2",
        {"path": "xswu/HPSv2:HPS_v2.1_compressed.pt", "name": "hpsv2.1"},
    ),
    "siglip": (
        "cosine of image and prompt in SigLIP so400m; {formula: logit} or probability for its own",
        "clip_score:ClipScore",
        {"path": "google/siglip-so400m-patch14-384", "name": "siglip", "licence": "Apache-2.0", "chunk": 32},
    ),
    "aesthetic": ("LAION aesthetic predictor v2 on CLIP ViT-L/14, about 1 to 10", "aesthetic:Aesthetic", {}),
    "imagereward": ("ImageReward: BLIP with a head, about N(0, 1)", "image_reward:ImageReward", {}),
    "exemplar": (
        "likeness to reference images or texts: {references: FOLDER, features: clip}",
        "exemplar:ExemplarReward",
        {},
    ),
    "dino-similarity": (
        "likeness to reference images in DINOv2 ViT-B/14",
        "exemplar:ExemplarReward",
        {"features": "dino"},
    ),
    "adversarial": (
        "logit of a discriminator that is trained online against reference images (Adv-GRPO)",
        "adversarial:AdversarialReward",
        {},
    ),
    "frechet": (
        "each image's share of minus the Frechet distance from reference images",
        "sets:SetReward",
        {"statistic": "frechet"},
    ),
    "kid": (
        "each image's share of minus the kernel distance from reference images",
        "sets:SetReward",
        {"statistic": "kid"},
    ),
    "vendi": (
        "each image's share of the Vendi score: how different the images are",
        "sets:SetReward",
        {"statistic": "vendi"},
    ),
    "win-rate": ("share of its prompt's images that a judge finds worse", "judges.build:win_rate", {}),
    "unified-reward": ("UnifiedReward behind an endpoint: one image or pairs", "judges.build:unified_reward", {}),
    "unified-reward-think": (
        "win rate by UnifiedReward-Think behind an endpoint",
        "judges.build:unified_reward_think",
        {},
    ),
    "unified-reward-flex": (
        "overall and category win rates by UnifiedReward-Flex behind an endpoint",
        "judges.build:unified_reward_flex",
        {},
    ),
    "edit-score": ("EditScore behind an endpoint, 0 to 10; needs source images", "judges.build:edit_score", {}),
    "viescore": ("VIEScore by a model behind an endpoint, 0 to 10", "judges.build:viescore", {}),
    "vlm-judge": ("any model behind an endpoint: rates, or compares", "judges.build:vlm_judge", {}),
    "unigenbench": ("share of UniGenBench's test points that an image passes", "judges.build:unigenbench", {}),
}


def names() -> dict[str, str]:
    """Names of the built-in rewards, each with one line about it."""
    return {name: about for name, (about, *_) in BUILT_IN.items()}


def load(
    spec: str | Mapping[str, float | Mapping[str, Any]], device: str | torch.device = "cpu", **options: Any
) -> Reward:
    """Build the reward that a config asks for.

    Args:
        spec: one of
            a built-in name (see ``names()``), or the folder of a trained scorer (see ``training``);
            ``"module:attribute"`` or ``"file.py:attribute"``: a function ``(images, prompts, metadata)`` that returns
            N numbers (None: missing) or a ``RewardResult``, or a class whose ``score`` does the same. Either may have a
            parameter ``groups`` besides;
            ``"http://HOST:PORT"`` or ``"http://HOST:PORT#NAME"``: a reward of a server (see ``remote``);
            a mapping ``{name: weight}`` or ``{name: {weight: w, option: value, ...}}``: the weighted sum;
            a mapping ``{combine: ...}`` or ``{transform: ...}``, see ``recipe``.
        device: where learned rewards compute.
        options: passed to the reward (single names only).

    Raises:
        ValueError: unknown name (the nearest is suggested), import path that leads nowhere, bad options or weights.
        RewardError: a user's module or class raised while it was being loaded, or a server that the reward needs does
            not answer; in a mapping those are asked before anything else is loaded.
    """
    if isinstance(spec, str):
        reward = _load_named(spec, device, options)
        preflight(reward)
        return reward
    from .elsewhere import ask_elsewhere

    node = recipe.parse(spec, options)
    ask_elsewhere(spec)
    return recipe.build(node, lambda named: load(named.name, device, **named.options), device)


def _load_named(spec: str, device: str | torch.device, options: dict[str, Any]) -> Reward:
    if spec.startswith(("http://", "https://")):
        from .remote import RemoteReward  # brings httpx

        return RemoteReward(**_checked_options(spec, RemoteReward, device, {"url": spec, **options}))
    if is_folder(spec):
        spec, options = "trained", {"path": spec, **options}
    if ":" in spec:
        return _load_user(spec, device, options)
    if spec not in BUILT_IN:
        near = difflib.get_close_matches(spec, BUILT_IN, n=1, cutoff=0.4)
        hint = f"Did you mean {near[0]!r}?" if near else "For a function of your own write 'module:function'."
        raise ValueError(f"got unknown reward {spec!r}, expected one of {', '.join(BUILT_IN)}. {hint}")
    _, where, fixed = BUILT_IN[spec]
    module, _, name = where.partition(":")
    target = functools.partial(getattr(importlib.import_module(f".{module}", __package__), name), **fixed)
    return target(**_checked_options(spec, target, device, options))


def is_folder(name: str) -> bool:
    """Whether this is the folder of a reward that `flowrl reward train` wrote."""
    return (Path(name).expanduser() / "reward.json").is_file()


def _checked_options(
    name: str, target: Callable[..., Any], device: str | torch.device, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The options with which to build a reward: the given ones, and the device where one is wanted.

    Raises:
        ValueError: the target takes no such options, or needs others.
    """
    signature = inspect.signature(target)
    wanted = {"device": device, **options} if "device" in signature.parameters else dict(options)
    try:
        signature.bind(**wanted)
    except TypeError as error:
        raise ValueError(
            f"got options {wanted} for reward {name!r}, expected those of {signature} ({error}). Correct them."
        ) from error
    return wanted


def _load_user(spec: str, device: str | torch.device, options: dict[str, Any]) -> Reward:
    where, _, attribute = spec.rpartition(":")
    module = _import(where, spec)
    target = getattr(module, attribute, None)
    if target is None:
        near = difflib.get_close_matches(attribute, dir(module), n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Define {attribute!r} there."
        raise ValueError(f"got reward {spec!r}, expected {where!r} to hold {attribute!r}, which it does not. {hint}")
    if inspect.isclass(target):
        options = _checked_options(spec, target, device, options)
        try:
            target = target(**options)
        except Exception as error:  # a user's constructor may raise anything; it is reported under the reward's name
            raise RewardError(f"reward {spec!r} raised {type(error).__name__} while it was built: {error}") from error
        options = {}
    scorer = getattr(target, "score", target)
    if not callable(scorer):
        raise ValueError(
            f"got reward {spec!r}, which is neither a function nor a class with a method score(). Give one of these."
        )
    if isinstance(target, Reward) and isinstance(target.spec, RewardSpec):
        return target
    preflight(target)  # which the wrapper does not have
    return UserReward(spec, scorer, options)


def _run_file(path: Path) -> ModuleType:
    found = importlib.util.spec_from_file_location(f"user_reward_{path.stem}", path)
    assert found is not None and found.loader is not None  # a .py file always has a loader
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module  # dataclasses look their module up; the prefix keeps it from hiding another one
    found.loader.exec_module(module)
    return module


def _import(where: str, spec: str) -> ModuleType:
    load_module: Callable[[], ModuleType]
    if where.endswith(".py"):
        path = Path(where).expanduser().resolve()
        if not path.is_file():
            raise ValueError(f"got reward {spec!r}, but there is no file {where!r}. Correct the path.")
        load_module = functools.partial(_run_file, path)
    else:
        if not {"", str(Path.cwd())} & set(sys.path):
            sys.path.append(str(Path.cwd()))  # a console script does not look into the current folder by itself
        load_module = functools.partial(importlib.import_module, where)
    try:
        return load_module()
    except ModuleNotFoundError as error:
        if error.name is None or not (where == error.name or where.startswith(error.name + ".")):
            raise RewardError(f"reward {spec!r} needs {error.name!r}, which is not installed. Install it.") from error
        raise ValueError(
            f"got reward {spec!r}, but there is no module {where!r}. Run from the folder that holds it, install it, or "
            "write 'path/to/file.py:function'."
        ) from error
    except Exception as error:  # whatever a user's module raises on import is reported under the reward's name
        raise RewardError(f"reward {spec!r}: importing it raised {type(error).__name__}: {error}") from error


class UserReward:
    """A user's function, or the ``score`` of a user's object without a spec, as a reward.

    Args:
        name: its import path.
        function: ``(images, prompts, metadata)`` and, if it has a parameter of this name, ``groups``; returns N numbers
            or a RewardResult.
        options: further keyword arguments of the function.

    Raises:
        ValueError: it cannot be called like that.
    """

    def __init__(self, name: str, function: Callable[..., Any], options: Mapping[str, Any] | None = None) -> None:
        self.function, self.options = function, dict(options or {})
        signature = inspect.signature(function)
        self._takes_groups = "groups" in signature.parameters
        # what asks for groups must see them whole, and is not cut into batches
        self.spec = RewardSpec(name=name, version="user", scope="group" if self._takes_groups else "point")
        try:
            signature.bind(None, None, None, **self._keywords(None))
        except TypeError as error:
            raise ValueError(
                f"got reward {name!r} with parameters {signature} and options {self.options}, expected "
                f"(images, prompts, metadata) and parameters for all options ({error}). Give it these."
            ) from error

    def _keywords(self, groups: Tensor | None) -> dict[str, Any]:
        return {"groups": groups, **self.options} if self._takes_groups else self.options

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``."""
        answer = self.function(images, prompts, metadata, **self._keywords(groups))
        return as_result(answer, len(images), self.spec.name)
