"""Rewards of sets of images (DRAGON, arXiv 2504.15217): distance from an exemplar set, diversity.

A set has one value V (more is better: minus the Frechet or kernel distance, or the Vendi score). What an image earns of
it is its credit:

    leave_one_out   c_i = V(S) - V(S without i);  values are V(S) + c_i - mean c, so that their mean is the set's value
    swap            1 for images of the good and 0 for those of the bad set of DRAGON's greedy split into pairs

The images must come together, so the reward runs where the whole set is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .combine import group_index
from .distributions import KERNELS, Frechet, Gaussian, Mmd, Statistic, Vendi, greedy_swap
from .exemplar import file_hashes, read_texts, text_features
from .features import ImageFeatures, load_features
from .protocol import Metadata, RewardResult, RewardSpec
from .references import References, load_references, read_image

RULE = "1"  # number of the rules above
LEAST = {"frechet": 3, "kid": 3, "vendi": 2}  # images of a set whose value is known without any one of them
CREDITS = ("leave_one_out", "swap")
SCOPES = ("set", "group", "image")


@dataclass(frozen=True)
class Share:
    """What the images of one set earn: values and credits (n,), value of the set, why a value is missing (or None)."""

    values: Tensor
    credit: Tensor
    total: float
    reasons: list[str | None]


class SetReward:
    """A statistic of a set of images as the reward of each of them; see the module.

    Args:
        statistic: "frechet", "kid" (unbiased kernel distance) or "vendi" (no references).
        references: folder or manifest, see ``references``; all its images are one exemplar set.
        texts: instead: texts, or a file with one on each line; the features must have a text tower. Texts and images
            lie apart even in a joint space, so that the distance never comes near 0.
        features: backbone, see ``features``.
        credit: "leave_one_out" or "swap".
        scope: "set" (all images that come together), "group" (those of one prompt each) or "image": instance to
            distribution, the patches of one image against those of the references, or its feature against texts
            (frechet only; nothing to share out).
        kernel: of "kid": "cubic" (KID) or "gaussian" (CMMD).
        unit: whether features are made unit vectors; None: for texts and the gaussian kernel.
        sweeps: of the swap, at most.
        device: where to compute.
        chunk: images per forward of the backbone.

    Raises:
        ValueError: options that do not fit, or too few references.
    """

    def __init__(
        self,
        statistic: str = "frechet",
        references: str | Path | References | None = None,
        *,
        texts: str | Path | Sequence[str] | None = None,
        features: str | Mapping[str, Any] | ImageFeatures = "dino",
        credit: str = "leave_one_out",
        scope: str = "set",
        kernel: str = "cubic",
        unit: bool | None = None,
        sweeps: int = 10,
        device: str | torch.device = "cpu",
        chunk: int = 32,
    ) -> None:
        _check(statistic, references, texts, credit, scope, kernel)
        self.statistic, self.credit, self.scope, self.sweeps = statistic, credit, scope, sweeps
        self.kernel = KERNELS[kernel]
        self.unit = (texts is not None or kernel == "gaussian") if unit is None else unit
        self.backbone = load_features(features, device, chunk)
        self.patches = scope == "image" and texts is None
        files = None if references is None else load_references(references)
        sentences = None if texts is None else read_texts(texts)
        self._reference: Tensor | None = None
        self._gaussian: Gaussian | None = None
        if statistic == "frechet":
            self._gaussian = Gaussian.of(self._exemplars(files, sentences))
        elif statistic == "kid":
            self._reference = torch.cat(list(self._exemplars(files, sentences)))
            if len(self._reference) < 2:
                raise ValueError("got one reference for a kernel distance, expected at least 2. Add references.")
        exemplars = hashlib.sha256(repr((file_hashes(files), sentences)).encode()).hexdigest()[:12]
        self.spec = RewardSpec(
            name=f"{statistic}-{self.backbone.name}",
            version=f"{RULE}-{self.backbone.version}-{exemplars}",
            scope=cast('Literal["point", "group", "set"]', "point" if scope == "image" else scope),
            range=(0.0, 1.0) if credit == "swap" else (-torch.inf, torch.inf),
            licence=self.backbone.licence,
            preprocessing=f"{self.backbone.prepare}; {'patches' if self.patches else 'one vector'} of an image"
            f"{', unit length' if self.unit else ''}; {kernel if statistic == 'kid' else statistic}, {credit}",
        )

    def _vectors(self, images: Tensor) -> Tensor:
        """(N, E) features, or (N, M, D) patches."""
        x = self.backbone.tokens(images)[1] if self.patches else self.backbone.features(images)
        return normalize(x, dim=-1) if self.unit else x

    @torch.no_grad()
    def _exemplars(self, references: References | None, texts: list[str] | None) -> Iterator[Tensor]:
        """The references' vectors (n, D), image by image, as their sizes may differ."""
        if texts is not None:
            x = text_features(self.backbone, texts)
            yield normalize(x, dim=1) if self.unit else x
        for file in references.files if references else ():
            yield self._vectors(read_image(file)[None].float() / 255).flatten(0, -2)

    def _prepared(self, x: Tensor) -> Statistic:
        if self._gaussian is not None:
            return Frechet(x, self._gaussian)
        return Vendi(x) if self._reference is None else Mmd(x, self._reference, self.kernel)

    @torch.no_grad()
    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``; metadata is not read. Without groups, images of equal prompts are a group.

        Parts: "set_value", the value of the set an image is in, and "credit"."""
        if not len(images):
            none = torch.zeros(0)
            return RewardResult(none, {} if self.scope == "image" else {"set_value": none, "credit": none})
        x = self._vectors(images)
        if self.scope == "image":
            own = [self._prepared(v.reshape(-1, v.shape[-1])).value() for v in x]
            return RewardResult(-torch.tensor(own, dtype=torch.float64).float())
        numbers = group_index(groups, prompts)
        values, credit, totals = (torch.full((len(images),), torch.nan, dtype=torch.float64) for _ in range(3))
        reasons: list[str | None] = [None] * len(images)
        sets = [torch.arange(len(images))] if self.scope == "set" else [
            (numbers == number).nonzero().flatten() for number in numbers.unique()
        ]  # fmt: skip
        for index in sets:
            share = self._share(x[index.to(x.device)], numbers[index])
            values[index], credit[index], totals[index] = share.values, share.credit, share.total
            for i, reason in zip(index.tolist(), share.reasons, strict=True):
                reasons[i] = reason
        return RewardResult(values.float(), {"set_value": totals.float(), "credit": credit.float()}, reasons)

    def _share(self, x: Tensor, groups: Tensor) -> Share:
        n, none = len(x), torch.full((len(x),), torch.nan, dtype=torch.float64)
        if n < LEAST[self.statistic]:
            reason = f"{self.statistic} of a set of {n} images, needs at least {LEAST[self.statistic]}"
            return Share(none, none, torch.nan, [reason] * n)
        prepared, sign = self._prepared(x), 1.0 if self.statistic == "vendi" else -1.0
        total = sign * prepared.value()
        if self.credit == "leave_one_out":
            credit = total - sign * prepared.leave_one_out().cpu()
            return Share(total + credit - credit.mean(), credit, total, [None] * n)
        pairs = pairs_of(groups)
        values = none.clone()
        if len(pairs) >= 2:  # a good set of one image has no statistics
            good = greedy_swap(prepared, pairs, maximise=sign > 0, sweeps=self.sweeps)
            rows = torch.arange(len(pairs))
            values[pairs[rows, good]], values[pairs[rows, 1 - good]] = 1.0, 0.0
        unpaired = "no other image of its prompt to be paired with" if len(pairs) >= 2 else "fewer than two pairs"
        return Share(values, values, total, [unpaired if v != v else None for v in values.tolist()])


def pairs_of(groups: Tensor) -> Tensor:
    """(P, 2) numbers of images: first with second of each group, third with fourth, and so on; an odd one is left."""
    pairs = []
    for number in groups.unique().tolist():
        members = (groups == number).nonzero().flatten()
        pairs.append(members[: len(members) // 2 * 2].reshape(-1, 2))
    return torch.cat(pairs) if pairs else torch.zeros(0, 2, dtype=torch.long)


def _check(statistic: str, references: Any, texts: Any, credit: str, scope: str, kernel: str) -> None:
    faults = {
        f"statistic {statistic!r}": statistic in LEAST,
        f"credit {credit!r}": credit in CREDITS,
        f"scope {scope!r}": scope in SCOPES,
        f"kernel {kernel!r}": kernel in KERNELS,
    }
    wrong = [fault for fault, fine in faults.items() if not fine]
    if wrong:
        raise ValueError(
            f"got {', '.join(wrong)}, expected one of {', '.join(LEAST)}; {', '.join(CREDITS)}; {', '.join(SCOPES)}; "
            f"{', '.join(KERNELS)}. Correct it."
        )
    given = (references is not None) + (texts is not None)
    if given != (0 if statistic == "vendi" else 1):
        raise ValueError(
            f"got {given} exemplar sets for {statistic!r}, expected {'none' if statistic == 'vendi' else 'one'}. "
            "Give either references or texts to frechet and kid, and nothing to vendi."
        )
    if scope == "image" and (statistic != "frechet" or credit != "leave_one_out"):
        raise ValueError(
            f"got scope 'image' with {statistic!r} and credit {credit!r}, expected 'frechet' and no credit. One image "
            "has nothing to share out."
        )
