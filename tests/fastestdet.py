"""A small real detector of COCO classes for tests: FastestDet (github.com/dog-qiuqiu/FastestDet, BSD-3) as ONNX.

The weights are data that may lie beside the repository; a test that needs them is skipped where they are not.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from reward_models.detectors import COCO_CLASSES
from reward_models.geneval import Detection
from reward_models.layout import box_iou

WEIGHTS = Path(__file__).parents[1].parent / "shared" / "weights" / "fastestdet" / "FastestDet.onnx"
SIDE = 352


class FastestDet:
    """Detector of the 80 COCO classes; per cell an objectness, offsets (tanh), sides (sigmoid) and class scores."""

    classes = COCO_CLASSES
    version = "fastestdet"

    def __init__(self) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(WEIGHTS), options, providers=["CPUExecutionProvider"])

    def detect(self, images: Tensor) -> list[list[Detection]]:
        return [self._detect(image) for image in images]

    def _detect(self, image: Tensor) -> list[Detection]:
        height, width = image.shape[-2:]
        picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
        pixels = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32) / 255
        pixels = pixels[..., ::-1].transpose(2, 0, 1)[None]  # blue, green, red
        cells = self.session.run(None, {self.session.get_inputs()[0].name: np.ascontiguousarray(pixels)})[0][0]
        rows, columns = cells.shape[1:]
        scores = cells[0] * cells[5:].max(0)
        found: list[Detection] = []
        for y, x in zip(*np.where(scores > 0.2), strict=True):
            dx, dy = np.tanh(cells[1:3, y, x])
            w, h = 1 / (1 + np.exp(-cells[3:5, y, x]))
            cx, cy = (x + dx) / columns, (y + dy) / rows
            box = ((cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height)
            label = COCO_CLASSES[int(cells[5:, y, x].argmax())]
            found.append(Detection(label, tuple(map(float, box)), float(scores[y, x])))
        kept: list[Detection] = []
        for best in sorted(found, key=lambda d: -d.score):
            if all(best.label != d.label or box_iou(best.box, d.box) < 0.45 for d in kept):
                kept.append(best)
        return kept
