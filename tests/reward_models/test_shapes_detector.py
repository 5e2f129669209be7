"""The Shapes detector on fresh, blurred, touching and damaged pictures."""

import itertools
import math
import time

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from scipy import ndimage

from reward_models.clip_score import bundled_model
from reward_models.shapes import grammar, render
from reward_models.shapes.detector import PaletteColours, ShapesDetector, fitted, overlap, templates

DETECTOR, COLOURS = ShapesDetector(), PaletteColours()
GROUND = (236, 233, 235)


def to_images(pictures, blur=0.0, noise=0.0, seed=0):
    x = np.stack([np.asarray(p, np.float32) for p in pictures]) / 255
    x = ndimage.gaussian_filter(x, (0, blur, blur, 0)) if blur else x
    x = x + noise * np.random.default_rng(seed).standard_normal(x.shape)
    return torch.tensor(np.round(255 * x.clip(0, 1)) / 255, dtype=torch.float32).permute(0, 3, 1, 2).contiguous()


def seen(image, detections, threshold=0.9):
    """Names and colours of what was found, sorted; and whether nothing else was nearly found."""
    sure = [d for d in detections if d.score > threshold]
    return sorted(zip((d.label for d in sure), COLOURS.classify(image, sure), strict=True))


def draw(*shapes):
    return render.render(render.Scene(shapes, GROUND))


def shape(name, colour="red", x=32.0, y=32.0, radius=10.0, angle=0.0):
    return render.Shape(name, colour, x, y, radius, angle, render.PALETTE[colour])


def polygon(points, colour="red"):
    image = Image.new("RGB", (256, 256), GROUND)
    ImageDraw.Draw(image).polygon([(4 * x, 4 * y) for x, y in points], fill=render.PALETTE[colour])
    return np.asarray(image.reduce(4))


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(20)
    return [render.sample_scene(m, rng) for split in grammar.SPLITS for m in grammar.prompts(split, per_task=12)]


@pytest.mark.parametrize(
    ("blur", "noise", "least"),
    [(0.0, 0.0, 0.98), (0.5, 0.02, 0.95), (0.7, 0.02, 0.95)],
    ids=["fresh", "soft", "softer"],
)
def test_scenes_are_read_right(scenes, blur, noise, least):
    images = to_images([render.render(s) for s in scenes], blur, noise)
    found = DETECTOR.detect(images)
    right = [
        seen(image, ds) == sorted((s.name, s.colour) for s in scene.shapes) and len(ds) == len(scene.shapes)
        for image, ds, scene in zip(images, found, scenes, strict=True)
    ]
    assert np.mean(right) >= least


def test_boxes_and_masks_are_those_of_the_shapes(scenes):
    for scene, detections in zip(scenes, DETECTOR.detect(to_images([render.render(s) for s in scenes])), strict=True):
        for s in scene.shapes:
            true = render.mask(s)
            best = max(detections, key=lambda d: (d.mask & true).sum())
            assert (best.mask & true).sum() / (best.mask | true).sum() > 0.95
            ys, xs = true.nonzero()
            edges = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            assert max(abs(a - b) for a, b in zip(best.box, edges, strict=True)) <= 1


@pytest.mark.parametrize("gap", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("blur", [0.0, 0.6])
def test_shapes_of_two_colours_that_touch_are_two(gap, blur):
    pictures, truth = [], []
    for (a, b), (first, second) in zip(
        itertools.permutations(grammar.COLOURS, 2), itertools.cycle(itertools.permutations(grammar.SHAPES, 2))
    ):
        left = shape(first, a, x=20.0)
        right = shape(second, b, x=0.0)
        right = shape(second, b, x=float(left.outline()[:, 0].max() - right.outline()[:, 0].min()) + gap)
        pictures.append(draw(left, right))
        truth.append(sorted([(first, a), (second, b)]))
    images = to_images(pictures, blur, 0.02 if blur else 0.0)
    right_ones = [seen(i, d, 0.3) == t for i, d, t in zip(images, DETECTOR.detect(images), truth, strict=True)]
    assert np.mean(right_ones) > 0.95


def half(picture, axis):
    cut = picture.copy()
    cut[(slice(None),) * axis + (slice(0, 32),)] = GROUND
    return cut


def with_holes(picture, mask, rng):
    cut = picture.copy()
    cut[mask & (rng.random(mask.shape) < 0.3)] = GROUND
    return cut


def damaged(kind):
    rng = np.random.default_rng(4)
    for name, colour, radius in itertools.product(grammar.SHAPES, ("red", "yellow", "black"), (8.0, 12.0)):
        whole = shape(name, colour, radius=radius, angle=float(rng.uniform(-0.12, 0.12)))
        picture, mask = draw(whole), render.mask(whole)
        if kind == "half":
            yield half(picture, 0)
            if name != "square":  # its half of a half is a square
                yield half(half(picture, 0), 1)
            yield half(picture, 1)
        elif kind == "merged":
            turn = rng.uniform(0, 2 * math.pi)
            x, y = 32 + radius * math.cos(turn), 32 + radius * math.sin(turn)
            yield draw(whole, shape(name, colour, x, y, radius, whole.angle))
            yield draw(whole, shape(grammar.SHAPES[grammar.SHAPES.index(name) - 1], colour, x, y, radius))
        elif kind == "two colours":
            other = picture.copy()
            other[mask & (np.arange(64) < 32)] = render.PALETTE["blue"]
            yield other
            board = picture.copy()
            board[mask & (np.indices((64, 64)).sum(0) // 2 % 2 == 0)] = render.PALETTE["blue"]
            yield board
        elif kind == "pierced":
            yield with_holes(picture, mask, rng)
            ring = picture.copy()
            ring[np.hypot(*(np.indices((64, 64)) - 32)) < radius / 2] = GROUND
            yield ring
        elif kind == "faint":
            yield np.array(GROUND) + 0.35 * (picture - np.array(GROUND, float))
        elif kind == "stretched":
            yield polygon((whole.outline() - 32) * [1.35, 0.75] + 32, colour)
        elif kind == "noisy":
            yield picture + rng.normal(0, 80, picture.shape)


def circle_points(n, start, *radii):
    return [
        (32 + radii[i % len(radii)] * math.cos(start + 2 * math.pi * i / n),
         32 + radii[i % len(radii)] * math.sin(start + 2 * math.pi * i / n))
        for i in range(n)
    ]  # fmt: skip


def wrong():
    yield polygon(circle_points(4, 0.0, 12))  # a diamond is no square
    yield polygon(circle_points(3, math.pi / 2, 12))  # nor this a triangle: it stands on its tip
    yield polygon([(20, 26), (44, 26), (44, 38), (20, 38)])
    yield polygon([(10, 30), (54, 30), (54, 34), (10, 34)])
    yield polygon([(24, 22), (31, 22), (31, 34), (42, 34), (42, 41), (24, 41)])
    yield polygon([(24, 42), (24, 22), (42, 42)])
    yield polygon(circle_points(8, 0.0, 12, 5))  # a star of four points
    yield polygon(circle_points(12, 0.0, 12, 6.5))  # and of six
    yield draw(shape("heart"))[::-1]
    yield draw(shape("cross", angle=math.pi / 4))


def no_picture():
    rng = np.random.default_rng(5)
    yield np.full((64, 64, 3), GROUND)
    for colour in grammar.COLOURS:
        yield np.full((64, 64, 3), render.PALETTE[colour])
    for _ in range(6):
        yield rng.integers(0, 256, (64, 64, 3))
        yield ndimage.zoom(rng.uniform(0, 255, (8, 8, 3)), (8, 8, 1), order=0)[:, :, :1] * [1, 1, 1]
        yield GROUND + rng.normal(0, 12, (64, 64, 3))
    yield np.where(np.arange(64)[None, :, None] // 5 % 2, GROUND, render.PALETTE["red"]) * np.ones((64, 1, 1))


@pytest.mark.parametrize("kind", ["half", "merged", "two colours", "pierced", "faint", "stretched", "noisy"])
def test_damaged_shapes_do_not_count(kind):
    pictures = list(damaged(kind))
    scores = [max((d.score for d in ds), default=0.0) for ds in DETECTOR.detect(to_images(pictures))]
    assert len(scores) >= 36 and np.mean(np.array(scores) < 0.3) >= 0.98, np.sort(scores)[-5:]


def test_other_shapes_do_not_count():
    assert max(d.score for ds in DETECTOR.detect(to_images(list(wrong()))) for d in ds) < 0.3


def test_pictures_of_nothing_hold_nothing():
    for detections in DETECTOR.detect(to_images(list(no_picture()))):
        assert all(d.score < 0.3 for d in detections if d.label != "square"), detections  # noise of square blocks aside


def test_blur_lowers_the_score_gradually():
    pictures = [draw(shape(name, radius=9.0)) for name in grammar.SHAPES]

    def own(blur):
        found = zip(grammar.SHAPES, DETECTOR.detect(to_images(pictures, blur)), strict=True)
        return np.mean([max((d.score for d in ds if d.label == name), default=0.0) for name, ds in found])

    means = [own(blur) for blur in (0.0, 0.7, 1.5, 2.0, 4.0)]
    assert means[0] == 1 and means[1] > 0.95 and means[-1] < 0.3
    assert all(a >= b for a, b in itertools.pairwise(means))


def test_colours_of_jittered_shapes_and_of_none_of_the_palette():
    for name, rgb in render.PALETTE.items():
        for change in itertools.product((-12, 12), repeat=3):
            colour = tuple(int(np.clip(v + c, 0, 255)) for v, c in zip(rgb, change, strict=True))
            one = render.Shape("square", name, 32, 32, 10, 0.05, colour)
            image = to_images([draw(one)], 0.5)
            assert seen(image[0], DETECTOR.detect(image)[0]) == [("square", name)]
    brown = render.Shape("square", "red", 32, 32, 10, 0, (120, 90, 60))
    image = to_images([draw(brown)])
    assert COLOURS.classify(image[0], DETECTOR.detect(image)[0]) == ["other"]


def test_batch_and_order_change_nothing(scenes):
    images = to_images([render.render(s) for s in scenes[:70]], 0.5, 0.02)
    whole = DETECTOR.detect(images)
    assert DETECTOR.detect(images[[65, 3]]) == [whole[65], whole[3]]
    assert DETECTOR.detect(images[:0]) == []


def test_images_of_the_world_s_size_are_not_touched(scenes):
    images = to_images([render.render(s) for s in scenes[:3]])
    assert fitted(images) is images
    assert fitted(images[..., :32]).shape == (3, 3, 91, 45)  # the same area, the ratio to whole pixels
    assert fitted(images[..., :1, :1]).shape == (3, 3, 64, 64)


@pytest.mark.parametrize("size", [48, 100, 256])
def test_boxes_and_masks_of_other_sizes_are_in_pixels_of_the_image(scenes, size):
    few = scenes[::9]
    pictures = to_images([render.render(scene, size) for scene in few])
    for picture, scene, detections in zip(pictures, few, DETECTOR.detect(pictures), strict=True):
        assert seen(picture, detections, 0.3) == sorted((s.name, s.colour) for s in scene.shapes)
        for s in scene.shapes:
            true = render.mask(s, size)
            best = max(detections, key=lambda d: (d.mask & true).sum())
            assert best.mask.shape == (size, size)
            assert (best.mask & true).sum() / (best.mask | true).sum() > 0.8
            ys, xs = true.nonzero()
            edges = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            assert max(abs(a - b) for a, b in zip(best.box, edges, strict=True)) <= 1.6 * max(size / 64, 1)


def test_templates_are_whole_and_distinct():
    known = templates()
    assert ((known.gaps > 0.08) & (known.gaps < 0.4)).all()
    masks = known.masks[2]
    assert np.allclose(np.diag(overlap(masks, masks)), 1, atol=1e-5)


def test_it_is_fast(scenes):
    images = to_images([render.render(s) for s in scenes[:128]], 0.5, 0.02)
    DETECTOR.detect(images[:8])  # draws the templates

    def seconds():
        start = time.process_time()
        DETECTOR.detect(images)
        return time.process_time() - start

    assert min(seconds() for _ in range(3)) / len(images) < 4e-3  # about 0.5 ms on an idle core


def test_reconstructed_scenes_are_read_right(scenes):
    """Through the autoencoder in the box, which is what the detector really sees."""
    diffusers = pytest.importorskip("diffusers")
    try:
        folder = bundled_model("tiny-sd3") / "vae"
    except ValueError as error:
        pytest.skip(str(error))
    vae = diffusers.AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).eval()
    images = to_images([render.render(s) for s in scenes])
    with torch.no_grad():
        decoded = [vae.decode(vae.encode(2 * x - 1).latent_dist.mode()).sample / 2 + 0.5 for x in images.split(32)]
    images = torch.cat(decoded).clamp(0, 1)
    right = [
        seen(image, ds) == sorted((s.name, s.colour) for s in scene.shapes)
        for image, ds, scene in zip(images, DETECTOR.detect(images), scenes, strict=True)
    ]
    assert np.mean(right) >= 0.95
