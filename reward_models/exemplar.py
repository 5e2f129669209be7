"""Similarity of an image to reference images, or to texts: an exemplar set as the reward.

The idea is in Adv-GRPO (arXiv 2511.20256: image similarity as the greatest cosine over the references) and DRAGON
(arXiv 2504.15217: an encoder and exemplars, also of another modality). Patch-wise similarities are ours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .features import ImageFeatures, load_features
from .protocol import Metadata, RewardResult, RewardSpec
from .references import References, load_references, read_image

REMEMBERED = 256  # sets of references whose features are kept
EPSILON = 0.01  # of the transport, in units of 1 - cosine
PAIRS = 1 << 24  # pairs of patches compared at once: 128 MiB in the transport's float64


def cosine(x: Tensor, references: Tensor) -> Tensor:
    """Unit vectors (..., D) and (R, D) -> (..., R) in [-1, 1]."""
    return x @ references.T


def nearest_patch(x: Tensor, references: Tensor) -> Tensor:
    """Mean cosine of each patch to its nearest patch, averaged over both directions.

    One direction alone would be full for a picture that repeats a single patch of the reference.

    Args:
        x: (M, D) unit vectors, the patches of an image.
        references: (R, K, D), those of R references.

    Returns:
        (R,) in [-1, 1].
    """
    similarity = torch.einsum("md,rkd->rmk", x, references)
    return (similarity.amax(2).mean(1) + similarity.amax(1).mean(1)) / 2


def transport_plan(cost: Tensor, epsilon: float = EPSILON, iterations: int = 50) -> Tensor:
    """Entropy-regularised optimal transport between equally weighted points (Cuturi 2013), by Sinkhorn on logarithms.

    The regularisation is halved from the size of the costs down to epsilon (Schmitzer 2019); the last plan is rounded
    to exact marginals (Altschuler et al. 2017, algorithm 2), so its cost is never below the optimum. Above it by at
    most ``epsilon log min(M, K)`` once converged.

    Args:
        cost: (..., M, K).
        epsilon: in units of the cost.
        iterations: at each regularisation.

    Returns:
        (..., M, K), rows sum to 1 / M and columns to 1 / K.
    """
    m, k = cost.shape[-2:]
    f, g = cost.new_zeros(cost.shape[:-1]), cost.new_zeros((*cost.shape[:-2], k))
    level = max(epsilon, float(cost.abs().amax()) if cost.numel() else 0.0)
    while True:
        for _ in range(iterations):
            f = -level * torch.logsumexp((g.unsqueeze(-2) - cost) / level - _log(k), -1)
            g = -level * torch.logsumexp((f.unsqueeze(-1) - cost) / level - _log(m), -2)
        if level <= epsilon:
            break
        level = max(level / 2, epsilon)
    plan = ((f.unsqueeze(-1) + g.unsqueeze(-2) - cost) / level).exp() / (m * k)
    plan = plan * (1 / (m * plan.sum(-1, keepdim=True))).clamp_max(1)
    plan = plan * (1 / (k * plan.sum(-2, keepdim=True))).clamp_max(1)
    rows, columns = 1 / m - plan.sum(-1), 1 / k - plan.sum(-2)
    lacking = rows.sum(-1)[..., None, None].clamp_min(torch.finfo(plan.dtype).tiny)
    return plan + rows.unsqueeze(-1) * columns.unsqueeze(-2) / lacking


def _log(n: int) -> float:
    return float(torch.log(torch.tensor(float(n), dtype=torch.float64)))


def transport(x: Tensor, references: Tensor, epsilon: float = EPSILON) -> Tensor:
    """``1 - <plan, 1 - cosine>`` with the optimal transport between the patches: each patch has to find a partner.

    The gradient holds the plan fixed, which is exact for the regularised cost (envelope theorem).

    Args:
        x: (M, D) unit vectors.
        references: (R, K, D).
        epsilon: see ``transport_plan``.

    Returns:
        (R,) in [-1, 1].
    """
    cost = 1 - torch.einsum("md,rkd->rmk", x, references)
    with torch.no_grad():
        plan = transport_plan(cost.double(), epsilon).to(cost.dtype)
    return 1 - (plan * cost).sum((1, 2))


SIMILARITIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": cosine,
    "patch": nearest_patch,
    "transport": transport,
}


class ExemplarReward:
    """How similar an image is to the references of its prompt, in [-1, 1].

    An image whose prompt has no references is missing.

    Args:
        references: folder (serves every prompt) or manifest, see ``references``.
        texts: instead: texts, or a file with one on each line; the features must have a text tower.
        features: backbone, see ``features``; "dino" is DINOv2 ViT-B/14.
        similarity: "cosine" of the features, "patch" (nearest patches) or "transport" (optimal, of patches).
        over: "max" or "mean" over the references.
        device: where to compute.
        chunk: images per forward of the backbone.

    Raises:
        ValueError: neither or both of references and texts, or options that do not fit.
    """

    def __init__(
        self,
        references: str | Path | References | None = None,
        *,
        texts: str | Path | Sequence[str] | None = None,
        features: str | Mapping[str, Any] | ImageFeatures = "dino",
        similarity: str = "cosine",
        over: Literal["max", "mean"] = "max",
        device: str | torch.device = "cpu",
        chunk: int = 32,
    ) -> None:
        if similarity not in SIMILARITIES or over not in ("max", "mean"):
            raise ValueError(
                f"got similarity {similarity!r} over {over!r}, expected one of {', '.join(SIMILARITIES)} and max or "
                "mean. Use these."
            )
        if (references is None) == (texts is None):
            raise ValueError("got neither or both of references and texts, expected one of them. Give one.")
        if texts is not None and similarity != "cosine":
            raise ValueError(f"got similarity {similarity!r} with texts, which have no patches. Use 'cosine'.")
        self.references = None if references is None else load_references(references)
        self.backbone = load_features(features, device, chunk)
        self.similarity, self.over = similarity, over
        self._kept: dict[tuple[Path, ...], Tensor] = {}
        self._texts = None if texts is None else normalize(text_features(self.backbone, read_texts(texts)), dim=1)
        exemplars = ("texts", read_texts(texts)) if texts is not None else ("images", file_hashes(self.references))
        self.spec = RewardSpec(
            name=f"exemplar-{self.backbone.name}",
            version=f"{self.backbone.version}-{hashlib.sha256(repr(exemplars).encode()).hexdigest()[:12]}",
            range=(-1.0, 1.0),
            licence=self.backbone.licence,
            preprocessing=f"{self.backbone.prepare}; {similarity}, {over} over references",
            differentiable=True,
        )

    def _own(self, images: Tensor) -> Tensor:
        """Unit vectors of images: (N, E), or (N, M, D) of their patches."""
        if self.similarity == "cosine":
            return normalize(self.backbone.features(images), dim=1)
        return normalize(self.backbone.tokens(images)[1], dim=2)

    def _exemplars(self, prompt: str) -> Tensor | None:
        """Unit vectors of a prompt's references, (R, E) or (R, M, D); None where it has none."""
        if self.references is None:
            return self._texts
        files = self.references.of(prompt)
        if not files:
            return None
        if files not in self._kept:
            if len(self._kept) >= REMEMBERED:
                self._kept.pop(next(iter(self._kept)))
            with torch.no_grad():  # one by one, as their sizes may differ
                self._kept[files] = torch.cat([self._own(read_image(file)[None].float() / 255) for file in files])
        return self._kept[files]

    def _similarities(self, vectors: Tensor, exemplars: Tensor) -> Tensor:
        """(R,) of one image; all pairs of patches with hundreds of references would not fit into memory."""
        measure = SIMILARITIES[self.similarity]
        if self.similarity == "cosine":
            return measure(vectors, exemplars)
        together = max(1, PAIRS // (len(vectors) * exemplars.shape[1]))
        return torch.cat([measure(vectors, part) for part in exemplars.split(together)])

    def _values(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        values = []
        for vectors, prompt in zip(self._own(images), prompts, strict=True):
            exemplars = self._exemplars(prompt)
            if exemplars is None:
                values.append(vectors.new_full((), torch.nan))
            else:
                found = self._similarities(vectors, exemplars)
                values.append(found.amax() if self.over == "max" else found.mean())
        return torch.stack(values)

    def differentiable(self, images: Tensor, prompts: list[str]) -> Tensor:
        """The score with a gradient with respect to the images: (N, 3, H, W), N prompts -> (N,)."""
        return self._values(images, prompts)

    @torch.no_grad()
    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``; metadata is not read."""
        if not len(images):
            return RewardResult(torch.zeros(0))
        values = self._values(images, prompts).cpu()
        reasons: list[str | None] = [
            f"no references for the prompt {prompt!r}" if missing else None
            for prompt, missing in zip(prompts, values.isnan().tolist(), strict=True)
        ]
        return RewardResult(values, reasons=reasons)


def read_texts(source: str | Path | Sequence[str]) -> list[str]:
    """Texts as given, or the lines of a file that are not empty. Raises ValueError where there are none."""
    texts = list(source) if not isinstance(source, str | Path) else []
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if not path.is_file():
            raise ValueError(f"got texts {str(source)!r}, expected a list or a file with one on each line. Correct it.")
        texts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not texts:
        raise ValueError(f"got no texts in {source!r}, expected at least one. Add some.")
    return texts


def text_features(backbone: ImageFeatures, texts: list[str]) -> Tensor:
    """(R, E), not normalised; ValueError where the backbone has no text tower."""
    if backbone.text is None:
        raise ValueError(f"got texts for {backbone.name!r}, which has no text tower, expected CLIP or SigLIP features.")
    return backbone.text(texts)


def file_hashes(references: References | None) -> list[tuple[str, str]]:
    """(prompt or "", hash of the file's bytes) of all references, in order: what a score depends on."""
    if references is None:
        return []
    listed = [(prompt, file) for prompt, files in references.by_prompt.items() for file in files]
    listed += [("", file) for file in references.shared]
    return [(prompt, hashlib.sha256(file.read_bytes()).hexdigest()) for prompt, file in listed]
