"""Is the text that the prompt puts between quotation marks in the image? OCR and an edit distance.

Source: the OCR reward of Flow-GRPO (arXiv 2505.05470, github.com/yifan123/flow_grpo). Differences from the published
behaviour, of which ``compat="flow_grpo"`` brings back the first four:

* curly quotation marks count as well as straight ones, and all quoted spans are joined, not the first alone;
* pieces of text are joined in reading order (lines from the top, each from the left), not in the detector's order;
* the reader gets the channels in the order that it expects (published: red and blue exchanged);
* any white space is dropped, not only the blank; composed letters (NFC) and full-width forms of ASCII are unified;
* a prompt without quoted text is missing (published: the whole batch fails);
* what the reader raises is raised (published: reward 0);
* the reader is PP-OCRv6 from rapidocr's wheel, the published one PaddleOCR 2.9.1.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .protocol import Metadata, RewardResult, RewardSpec, pixels_of
from .torchvision_ops import optional

MARKS = '"“”„‟'
QUOTED = re.compile(f"[{MARKS}]([^{MARKS}]*)[{MARKS}]")
WIDE = {0xFF01 + i: 0x21 + i for i in range(94)}  # full-width forms of ASCII, which readers of Chinese often give
RULES = ("edit", "ned")
Compat = Literal["flow_grpo"]


@dataclass(frozen=True)
class Piece:
    """One piece of text found in an image: confidence in [0, 1], corners ((x, y), ...) in pixels, y downwards."""

    text: str
    confidence: float
    corners: tuple[tuple[float, float], ...]

    @property
    def centre(self) -> tuple[float, float]:
        xs, ys = zip(*self.corners, strict=True)
        return (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2

    @property
    def height(self) -> float:
        ys = [y for _, y in self.corners]
        return max(ys) - min(ys)


Reader = Callable[[np.ndarray], Sequence[Piece]]  # (H, W, 3) uint8 in the order blue, green, red -> pieces, any order


def normalised(text: str, compat: Compat | None = None) -> str:
    """What is compared: lower case without white space (compat: without blanks)."""
    if compat:
        return text.replace(" ", "").lower()
    return "".join(unicodedata.normalize("NFC", text).translate(WIDE).lower().split())


def target_text(prompt: str, compat: Compat | None = None) -> str | None:
    """The normalised text to be rendered: all quoted spans of the prompt, joined in order; None if there is none.

    Any double quotation mark, straight or curly, opens a span and the next one closes it; a last one without a partner
    (an inch sign) is left out. compat: between the first two straight ones.
    """
    spans = prompt.split('"')[1:2] if compat else QUOTED.findall(prompt)
    if compat and prompt.count('"') < 2:
        return None
    return normalised("".join(spans), compat) or None


def reading_order(pieces: Sequence[Piece]) -> list[Piece]:
    """Pieces by lines from the top, within a line from the left.

    A piece belongs to a line if its centre is less than half a height (of the smaller of the two) off the centre of the
    line's first piece.
    """
    lines: list[list[Piece]] = []
    for piece in sorted(pieces, key=lambda p: (p.centre[1], p.centre[0])):
        first = lines[-1][0] if lines else None
        if first and abs(piece.centre[1] - first.centre[1]) < min(piece.height, first.height) / 2:
            lines[-1].append(piece)
        else:
            lines.append([piece])
    return [piece for line in lines for piece in sorted(line, key=lambda p: p.centre[0])]


def similarities(recognised: str, target: str) -> tuple[float, float]:
    """Two scores in [0, 1] of normalised texts, from the Levenshtein distance d.

    edit: 1 if the target is part of what was recognised, else ``1 - min(d, len(target)) / len(target)``, so that extra
    text costs nothing once the target is complete.
    ned: ``1 - d / max(len)``, to which extra text counts.

    Raises:
        ValueError: the target is empty.
    """
    levenshtein: Any = optional("rapidfuzz.distance", "rapidfuzz", "ocr").Levenshtein
    if not target:
        raise ValueError("got an empty target, expected text. Leave out prompts that ask for none.")
    distance = levenshtein.distance(recognised, target)
    edit = 1.0 if target in recognised else 1 - min(distance, len(target)) / len(target)
    return edit, 1 - distance / max(len(recognised), len(target))


class RapidReader:
    """PP-OCR through rapidocr: finds lines of text and reads them, without the classifier for upside-down text.

    Args:
        threads: of onnxruntime; more help a large image on a quiet machine.

    Raises:
        ValueError: rapidocr or onnxruntime is not installed.
    """

    def __init__(self, threads: int = 1) -> None:
        rapidocr: Any = optional("rapidocr", "rapidocr", "ocr")
        optional("onnxruntime", "onnxruntime", "ocr")  # rapidocr takes any of several engines, and asks for none
        self.engine: Any = rapidocr.RapidOCR(
            params={
                "Global.text_score": 0.0,  # the reward has a limit of its own
                "Global.use_cls": False,
                "Global.log_level": "critical",  # it warns of every image without text
                # the published reader's limit; rapidocr's own enlarges the shorter side to 736 px, which costs twice
                # the time at 512 px and without bound in a very narrow image
                "Det.limit_type": "max",
                "Det.limit_side_len": 960,
                "EngineConfig.onnxruntime.intra_op_num_threads": threads,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
        )
        digest = hashlib.sha256()
        for file in sorted((Path(rapidocr.__file__).parent / "models").glob("PP-OCR*.onnx")):
            digest.update(file.read_bytes())
        self.version = f"rapidocr {importlib.metadata.version('rapidocr')} {digest.hexdigest()[:12]}"

    def __call__(self, pixels: np.ndarray) -> list[Piece]:
        """Pieces of text in one image, (H, W, 3) uint8, channels blue, green, red."""
        found = self.engine(pixels)
        if not len(found):
            return []
        corners = np.asarray(found.boxes, dtype=np.float64).tolist()
        return [
            Piece(text, float(score), tuple((x, y) for x, y in box))
            for text, score, box in zip(found.txts, found.scores, corners, strict=True)
        ]


class OcrReward:
    """How much of the quoted text of the prompt can be read in the image, in [0, 1]; 1 is all of it.

    ``parts``: "ocr-edit" and "ocr-ned" (see ``similarities``), whichever is the value. ``reasons`` say what was read.
    Prompts without quoted text are missing.

    Args:
        rule: "edit" (published) or "ned", which also counts superfluous text.
        compat: "flow_grpo" brings back the published behaviour (see the head of the module).
        min_confidence: pieces count if the reader is surer than that.
        threads: of the reader.
        reader: another reader than rapidocr.

    Raises:
        ValueError: unknown rule or compat, or the extra `ocr` is not installed.
    """

    def __init__(
        self,
        rule: str = "edit",
        compat: Compat | None = None,
        min_confidence: float = 0.0,
        threads: int = 1,
        reader: Reader | None = None,
    ) -> None:
        if rule not in RULES or compat not in (None, "flow_grpo"):
            raise ValueError(
                f"got OCR rule {rule!r} and compat {compat!r}, expected a rule of {', '.join(RULES)} and compat "
                "'flow_grpo' or none. Use one of these."
            )
        self.rule, self.compat, self.min_confidence = rule, compat, min_confidence
        self.reader = RapidReader(threads) if reader is None else reader
        version = getattr(self.reader, "version", "own reader")
        self.spec = RewardSpec(
            name="ocr" if rule == "edit" else "ocr-ned",
            version=f"1 {compat or ''} > {min_confidence:g}, {version}".replace("  ", " "),
            range=(0.0, 1.0),
            licence="Apache-2.0",
            preprocessing=f"8-bit {'RGB read as BGR' if compat else 'BGR'}; the reader's own resize",
        )

    def read(self, image: Tensor) -> str:
        """The normalised text of one image, (3, H, W) in [0, 1]."""
        pixels = pixels_of(image)
        pieces = self.reader(np.ascontiguousarray(pixels if self.compat else pixels[..., ::-1]))
        sure = [piece for piece in pieces if piece.confidence > self.min_confidence]
        ordered = sure if self.compat else reading_order(sure)
        return normalised("".join(piece.text for piece in ordered), self.compat)

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``; metadata is not read."""
        rows: list[tuple[float, float]] = []
        reasons: list[str | None] = []
        for image, prompt in zip(images, prompts, strict=True):
            target = target_text(prompt, self.compat)
            if target is None:
                rows.append((math.nan, math.nan))
                reasons.append(f'no text between double quotation marks in the prompt "{prompt[:60]}"')
            else:
                recognised = self.read(image)
                rows.append(similarities(recognised, target))
                reasons.append(None if recognised == target else f"expected {target!r}, read {recognised!r}")
        edit, ned = torch.tensor(rows, dtype=torch.float32).reshape(-1, 2).unbind(1)
        return RewardResult(edit if self.rule == "edit" else ned, {"ocr-edit": edit, "ocr-ned": ned}, reasons)
