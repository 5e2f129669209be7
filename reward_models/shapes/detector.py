"""A rule-based detector and colour classifier for Shapes images, fast enough to sit inside a training loop.

How an image is read:

1. The ground is the median of the border. A pixel is a mixture ``ground + alpha (colour - ground)``; for each palette
   colour this is a ray in RGB space, and the nearest ray gives the pixel's alpha and colour. Soft edges (anti-aliasing,
   blur) lie on the ray of their own shape, so they make no objects of their own.
2. Pixels with alpha >= 1/2 form connected components. A component of more than one colour is several shapes that touch,
   and is split by palette colour.
3. Alpha is measured again with the component's own colour. This soft mask is moved to a common frame (centroid at 0,
   square root of its area = 1, both of which blur leaves alone) and compared, by soft intersection over union, with
   soft templates of every shape, drawn by the renderer at a similar size and at several small rotations.
4. The best template names the shape. What its overlap lacks, in units of what the most similar other shape lacks, is
   calibrated to a score, which is lowered for uneven colour, blurred outlines and crumbs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from ..geneval import Detection
from ..preprocess import resize
from .grammar import COLOURS, SHAPES
from .render import PALETTE, SIZE, Scene, Shape, render

Floats = NDArray[np.float32]
Ints = NDArray[np.intp]

RGB = np.array([PALETTE[c] for c in COLOURS], np.float32) / 255
LEAST_CONTRAST = 0.15  # RGB distance from the ground below which a pixel is ground
LEAST_AREA = 20  # pixels; the smallest shape that is drawn has about 60
MOST_SPREAD = 0.10  # RGB standard deviation inside a shape of one colour
FARTHEST_COLOUR = 0.25  # RGB distance from a palette colour; the closest two colours are 0.34 apart
STEEPNESS = 1.6  # of soft edges in the comparison with templates; above 1 forgives some blur
GRID, REACH = 24, 1.1  # points per side of the common frame, and half its side in square roots of the area
SIZES = (7.5, 9.5, 12.0, 15.0, 19.0)  # square roots of the templates' areas, pixels
ANGLES = np.linspace(-0.24, 0.24, 7)  # radians; drawn shapes stay within 0.12
# (value that costs nothing, value that costs everything) of the four measures of damage
SHAPE_FAULT = (
    0.20,
    0.42,
)  # (1 - overlap) / (1 - overlap of the most similar other shape); drawn shapes have 0.2 or less
COLOUR_FAULT = (0.12, 0.25)  # RGB standard deviation inside
EDGE_FAULT = (1.2, 2.4)  # blur of the outline, pixels; a rendered one has 0.3
SMALL_FAULT = (-6.8, -5.5)  # minus the square root of the area, pixels; the smallest drawn shape has -7.8
CHUNK = 64  # images read at once, which bounds the memory
IN_PLANE = np.zeros((3, 3, 3), bool)  # neighbours within an image, none across the batch
IN_PLANE[1] = ndimage.generate_binary_structure(2, 1)


@dataclass(frozen=True)
class Templates:
    """What whole shapes look like.

    Attributes:
        masks: (sizes, shapes * angles, GRID^2) soft masks in the common frame.
        gaps: (shapes,) 1 - overlap with the most similar other shape.
        edges: (shapes,) sum of alpha (1 - alpha) over an outline blurred by one pixel, at area 1.
    """

    masks: Floats
    gaps: Floats
    edges: Floats


@dataclass
class Components:
    """Connected components of a batch; row 0 of every array but ``labels`` stands for the ground.

    Attributes:
        labels: (N, H, W), 0 for ground.
        image: (M,) number of the image.
        area: (M,) pixels.
        colour: (M, 3) mean RGB of the inside.
        spread: (M,) RGB standard deviation of the inside.
    """

    labels: Ints
    image: Ints
    area: Ints
    colour: Floats
    spread: Floats


def ground_colours(pixels: Floats) -> Floats:
    """(N, H, W, 3) -> (N, 3): median of the outermost pixels."""
    rim = np.concatenate([pixels[:, 0], pixels[:, -1], pixels[:, 1:-1, 0], pixels[:, 1:-1, -1]], axis=1)
    return np.median(rim, axis=1)


def nearest_rays(contrast: Floats, rays: Floats) -> tuple[Floats, Ints]:
    """Alpha and palette index of M pixels.

    Args:
        contrast: (M, 3) colour minus ground.
        rays: (M, C, 3) palette colours minus ground.
    """
    length = np.einsum("mck,mck->mc", rays, rays)
    along = np.einsum("mk,mck->mc", contrast, rays)
    alpha = np.clip(along / np.maximum(length, 1e-4), 0, 1.15)
    # |contrast - alpha ray|^2 without |contrast|^2, which all rays share
    best = (alpha * (alpha * length - 2 * along)).argmin(1)
    return alpha[np.arange(len(best)), best], best


def find_components(pixels: Floats, ground: Floats) -> Components:
    """Objects of (N, H, W, 3) images, each of one colour; debris is left out."""
    contrast = pixels - ground[:, None, None]
    near = np.square(contrast).sum(-1) > LEAST_CONTRAST**2
    alpha, palette = np.zeros(near.shape, np.float32), np.zeros(near.shape, np.intp)
    rays = RGB[None] - ground[:, None]
    alpha[near], palette[near] = nearest_rays(contrast[near], rays[near.nonzero()[0]])
    labels, _ = ndimage.label(alpha >= 0.5, structure=IN_PLANE)
    found = _measure(_without_debris(labels), pixels, alpha)
    mixed = np.flatnonzero(found.spread > MOST_SPREAD)
    if not len(mixed):
        return found
    return _measure(_without_debris(_split(found, mixed, palette)), pixels, alpha)


def _without_debris(labels: Ints) -> Ints:
    """Labels renumbered without gaps, components smaller than LEAST_AREA becoming ground."""
    kept = np.bincount(labels.ravel()) >= LEAST_AREA
    kept[0] = False
    number = np.where(kept, np.cumsum(kept), 0)
    return number[labels]


def _measure(labels: Ints, pixels: Floats, alpha: Floats) -> Components:
    m, flat = int(labels.max()) + 1, labels.ravel()
    image = np.zeros(m, np.intp)
    on = np.flatnonzero(flat)
    image[flat[on]] = on // labels[0].size
    # the inside first, where soft edges do not reach; a thin component has none and uses all its pixels
    inside = ndimage.binary_erosion(labels > 0, IN_PLANE).ravel() & (alpha.ravel() > 0.8)
    counted = flat * inside
    thin = np.bincount(counted, minlength=m) == 0
    core = np.flatnonzero(inside & (flat > 0) | thin[flat] & (flat > 0))
    who, rgb = flat[core], pixels.reshape(-1, 3)[core].astype(np.float64)
    count = np.maximum(np.bincount(who, minlength=m), 1)[:, None]
    mean, square = (np.stack([np.bincount(who, v[:, k], m) for k in range(3)], 1) / count for v in (rgb, rgb**2))
    spread = np.sqrt(np.maximum(square - mean**2, 0).sum(1))
    return Components(labels, image, np.bincount(flat, minlength=m), mean.astype(np.float32), spread.astype(np.float32))


def _split(found: Components, mixed: Ints, palette: Ints) -> Ints:
    """Labels with the components ``mixed`` cut by palette colour; rims of mixed colour go to the nearest piece."""
    labels, following = found.labels.copy(), len(found.area)
    for i in mixed:
        plane, colours = labels[found.image[i]], palette[found.image[i]]
        own = plane == i
        pieces = np.zeros_like(plane)
        for colour in np.unique(colours[own]):
            parts, number = ndimage.label(own & (colours == colour))
            for part in 1 + np.flatnonzero(np.bincount(parts.ravel(), minlength=number + 1)[1:] >= LEAST_AREA):
                pieces[parts == part] = following
                following += 1
        if pieces.any():
            nearest = ndimage.distance_transform_edt(pieces == 0, return_distances=False, return_indices=True)
            plane[own] = pieces[tuple(nearest)][own]
    return labels


def soft_masks(found: Components, pixels: Floats, ground: Floats) -> tuple[Ints, Floats]:
    """To which component each pixel belongs, its soft edge of two pixels included, and its alpha for that component."""
    labels = found.labels
    for _ in range(2):
        labels = np.where(labels == 0, ndimage.grey_dilation(labels, footprint=IN_PLANE), labels)
    ray = found.colour - ground[found.image]
    length = np.maximum(np.square(ray).sum(1), 1e-4)
    alpha = np.zeros(labels.shape, np.float32)
    on = labels > 0
    who = labels[on]
    z = on.nonzero()[0]
    alpha[on] = np.clip(((pixels[on] - ground[z]) * ray[who]).sum(-1) / length[who], 0, 1)
    return labels, alpha


def common_frame(labels: Ints, alpha: Floats, image: Ints) -> tuple[Floats, Floats]:
    """Square roots of the areas, (M,), and soft masks in the common frame, (M, GRID^2).

    Args:
        labels: (N, H, W) in 0..M - 1.
        alpha: (N, H, W) in [0, 1].
        image: (M,) number of the image of each component.
    """
    m, (_, h, w) = len(image), labels.shape
    on = labels.ravel().nonzero()[0]
    who, weight = labels.ravel()[on], alpha.ravel()[on].astype(np.float64)
    _, y, x = np.unravel_index(on, labels.shape)
    mass = np.maximum(np.bincount(who, weight, m), 1e-6)
    size = np.sqrt(mass)
    steps = np.linspace(-REACH, REACH, GRID)
    ys = (np.bincount(who, weight * y, m) / mass)[:, None] + size[:, None] * steps
    xs = (np.bincount(who, weight * x, m) / mass)[:, None] + size[:, None] * steps
    # bilinear samples of each component's own alpha: neighbours do not leak in, and outside of the image there is none
    low_y, low_x = np.floor(ys).astype(np.intp), np.floor(xs).astype(np.intp)
    masks = np.zeros((m, GRID, GRID), np.float32)
    for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
        yy, xx = low_y + dy, low_x + dx
        weight_y = (1 - np.abs(ys - yy)) * ((yy >= 0) & (yy < h))
        weight_x = (1 - np.abs(xs - xx)) * ((xx >= 0) & (xx < w))
        at = (image[:, None] * h + yy.clip(0, h - 1))[:, :, None] * w + xx.clip(0, w - 1)[:, None]
        own = labels.ravel()[at] == np.arange(m)[:, None, None]
        masks += alpha.ravel()[at] * own * (weight_y[:, :, None] * weight_x[:, None]).astype(np.float32)
    return size.astype(np.float32), ((masks - 0.5) * STEEPNESS + 0.5).clip(0, 1).reshape(m, -1)


def overlap(a: Floats, b: Floats) -> Floats:
    """Soft intersection over union of masks (M, D) and (K, D): ``a.b / (a.a + b.b - a.b)``, (M, K)."""
    dot = a @ b.T
    return dot / np.maximum(np.square(a).sum(1)[:, None] + np.square(b).sum(1) - dot, 1e-6)


def edge_sums(labels: Ints, alpha: Floats, m: int) -> Floats:
    """(M,) sum of alpha (1 - alpha) over each component's soft edge; proportional to outline length times blur."""
    soft = alpha * (1 - alpha)
    return np.bincount(labels.ravel(), (soft * (soft > 0.08)).ravel(), m).astype(np.float32)


@lru_cache(maxsize=1)
def templates() -> Templates:
    """Soft templates of all shapes, drawn by the renderer."""
    one = np.array([0, 0])

    def drawn(name: str, size: float, angle: float, blur: float) -> Floats:
        radius = size / 1.3
        for _ in range(3):  # the area is quadratic in the radius up to the pixel grid
            black = Shape(name, "black", SIZE / 2, SIZE / 2, radius, angle, (0, 0, 0))
            alpha = 1 - render(Scene((black,), (255, 255, 255)))[..., 0].astype(np.float32) / 255
            radius *= size / float(np.sqrt(alpha.sum()))
        return ndimage.gaussian_filter(alpha, blur)[None]

    everywhere = np.ones((1, SIZE, SIZE), np.intp)
    masks = np.array(
        [
            common_frame(everywhere, drawn(name, size, float(angle), 0.3), one)[1][1]
            for size in SIZES
            for name in SHAPES
            for angle in ANGLES
        ]
    ).reshape(len(SIZES), -1, GRID * GRID)
    n = len(SHAPES)
    middle = masks[len(SIZES) // 2]
    similar = overlap(middle, middle).reshape(n, len(ANGLES), n, len(ANGLES)).max((1, 3))
    np.fill_diagonal(similar, 0)
    edges = [edge_sums(everywhere, drawn(name, SIZES[-1], 0.0, 1.0), 2)[1] / SIZES[-1] for name in SHAPES]
    return Templates(masks, 1 - similar.max(1), np.array(edges, np.float32))


def _soundness(fault: Floats, costs: tuple[float, float]) -> Floats:
    """1 where a fault costs nothing, 0 where it costs everything, linear between."""
    free, total = costs
    return ((total - fault) / (total - free)).clip(0, 1)


def fitted(images: Tensor) -> Tensor:
    """Images (N, 3, H, W) at the size of the Shapes world, as the rules are in pixels: the area of 64x64 px, the ratio
    of the sides kept (to whole pixels). Those of 64x64 px are returned as they are."""
    height, width = images.shape[-2:]
    scale = SIZE / math.sqrt(height * width)
    return resize(images, max(round(height * scale), 1), max(round(width * scale), 1), mode="bilinear")


def enlarged(found: Detection, height: int, width: int) -> Detection:
    """A detection in an image of another size: box and mask (nearest pixel) go with it."""
    assert found.mask is not None, "the Shapes detector gives a mask with every detection"
    h, w = found.mask.shape
    y, x = height / h, width / w
    rows, columns = ((np.arange(n) + 0.5) / n for n in (height, width))
    mask = found.mask[np.ix_((rows * h).astype(np.intp), (columns * w).astype(np.intp))]
    left, top, right, bottom = found.box
    return replace(found, box=(left * x, top * y, right * x, bottom * y), mask=mask)


class ShapesDetector:
    """Detector of the six shapes. Boxes are [xmin, ymin, xmax + 1, ymax + 1] of the pixels with alpha >= 1/2."""

    classes: Sequence[str] = SHAPES
    preprocessing = f"bilinear with antialias to the area of {SIZE}x{SIZE} px, ratio kept, unless of that size; float32"

    def detect(self, images: Tensor) -> list[list[Detection]]:
        """See ``Detector.detect``; boxes and masks are in pixels of the images as given."""
        height, width = images.shape[-2:]
        found: list[list[Detection]] = []
        for start in range(0, len(images), CHUNK):
            chunk = fitted(images[start : start + CHUNK].detach().float().cpu())
            found += self._detect(np.ascontiguousarray(chunk.permute(0, 2, 3, 1).numpy()))
        if images.shape[-2:] == (SIZE, SIZE):
            return found
        return [[enlarged(one, height, width) for one in each] for each in found]

    def _detect(self, pixels: Floats) -> list[list[Detection]]:
        ground = ground_colours(pixels)
        objects = find_components(pixels, ground)
        labels, alpha = soft_masks(objects, pixels, ground)
        size, masks = common_frame(labels, alpha, objects.image)
        known = templates()
        bucket = np.abs(np.log(np.maximum(size, 1)[:, None] / np.array(SIZES))).argmin(1)
        overlaps = np.zeros((len(size), len(SHAPES)), np.float32)
        for b in np.unique(bucket):
            rows = bucket == b
            overlaps[rows] = overlap(masks[rows], known.masks[b]).reshape(-1, len(SHAPES), len(ANGLES)).max(2)
        kind = overlaps.argmax(1)
        blur = edge_sums(labels, alpha, len(size)) / (np.maximum(size, 1) * known.edges[kind])
        score = _soundness((1 - overlaps.max(1)) / known.gaps[kind], SHAPE_FAULT)
        score *= (
            _soundness(objects.spread, COLOUR_FAULT) * _soundness(blur, EDGE_FAULT) * _soundness(-size, SMALL_FAULT)
        )
        found: list[list[Detection]] = [[] for _ in pixels]
        solid = labels * (alpha >= 0.49)  # anti-aliased edges are often covered by exactly one half
        for i, region in enumerate(ndimage.find_objects(solid, len(size) - 1), start=1):
            if region is not None:  # None: no pixel is half covered, once measured with the component's own colour
                z, ys, xs = objects.image[i], region[1], region[2]
                box = (float(xs.start), float(ys.start), float(xs.stop), float(ys.stop))
                found[z].append(Detection(SHAPES[kind[i]], box, float(score[i]), solid[z] == i))
        return found


class PaletteColours:
    """Names the colour of an object: the palette colour nearest to its median, "other" if none is near."""

    colours: Sequence[str] = COLOURS

    def classify(self, image: Tensor, objects: Sequence[Detection]) -> list[str]:
        """See ``ColourClassifier.classify``; the objects need masks."""
        pixels = image.detach().float().cpu().permute(1, 2, 0).numpy()
        names = []
        for found in objects:
            assert found.mask is not None, "the Shapes detector gives a mask with every detection"
            inside = ndimage.binary_erosion(found.mask)
            colour = np.median(pixels[inside if inside.any() else found.mask], axis=0)
            distance = np.sqrt(np.square(RGB - colour).sum(1))
            names.append(COLOURS[int(distance.argmin())] if distance.min() <= FARTHEST_COLOUR else "other")
        return names
