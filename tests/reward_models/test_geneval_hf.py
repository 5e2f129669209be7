"""GenEval on real images: post-processing by hand, colours against transformers' own classes, a real detector."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tiny_scorers
import torch
from fastestdet import WEIGHTS, FastestDet
from PIL import Image

from reward_models import RewardError, checked_score, load
from reward_models.detectors import (
    COCO_CLASSES,
    Mask2FormerDetector,
    fitted_size,
    instances,
    load_detector,
    mask_box,
    self_check,
    self_check_image,
)
from reward_models.geneval import Detection
from reward_models.geneval_hf import COLOURS, TEMPLATES, ClipColours, GenevalReward, cut_out, remembering, resized_crop
from reward_models.geneval_stored import judge_row, row_of

NAMES = ("cat", "dog")


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# --- post-processing by hand ------------------------------------------------------------------------------------------


def test_the_classes_are_those_of_the_benchmark():
    assert len(COCO_CLASSES) == len(set(COCO_CLASSES)) == 80
    assert COCO_CLASSES[0] == "person" and COCO_CLASSES[-1] == "toothbrush"
    assert [COCO_CLASSES.index(n) for n in ("stop sign", "computer mouse", "tv remote")] == [11, 64, 65]
    path = WEIGHTS.parents[2] / "data" / "geneval" / "object_names.txt"
    if path.exists():
        assert list(COCO_CLASSES) == path.read_text().split("\n")[:80]


@pytest.mark.parametrize(
    ("size", "fitted"),
    [((512, 512), (800, 800)), ((1024, 1024), (800, 800)), ((512, 1024), (667, 1333)), ((64, 32), (1333, 667))],
)
def test_the_image_is_fitted(size, fitted):
    assert fitted_size(*size) == fitted


def test_boxes_of_masks():
    mask = np.zeros((5, 7), bool)
    assert mask_box(mask) == (0, 0, 0, 0)
    mask[1:3, 2:6] = True
    assert mask_box(mask) == (2, 1, 6, 3)
    mask[4, 0] = True  # crumbs count
    assert mask_box(mask) == (0, 1, 6, 5)


def test_instances_by_hand():
    # probabilities of cat, dog, stuff, nothing: query 0 (.5, .25, .125, .125), query 1 (.1, .1, .7, .1)
    probabilities = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.1, 0.1, 0.7, 0.1]])
    masks = torch.full((2, 2, 3), -1.0)
    masks[0, 0, 1:] = torch.tensor([2.0, 1.0])  # query 0: two pixels; query 1: none
    size = (2, 3)
    found = instances(probabilities.log() + 3, masks, size, size, size, NAMES)
    quality = (sigmoid(2) + sigmoid(1)) / 2
    assert [(d.label, d.box) for d in found] == [
        ("cat", (1, 0, 3, 1)),
        ("dog", (1, 0, 3, 1)),  # the same query again
        ("cat", (0, 0, 0, 0)),
        ("dog", (0, 0, 0, 0)),
    ]
    assert [d.score for d in found] == pytest.approx([0.5 * quality, 0.25 * quality, 0, 0], abs=1e-6)
    assert found[0].mask.tolist() == [[False, True, True], [False] * 3]
    best = instances(probabilities.log(), masks, size, size, size, NAMES, top=2)
    assert [d.label for d in best] == ["cat"]  # the two most probable entries are stuff and cat
    assert len(instances(probabilities.log(), masks, size, size, size, NAMES, floor=0.2)) == 2


def test_the_padding_is_cut_before_the_mask_goes_back_to_the_original_size():
    row = torch.tensor([-1.0, 1.0])  # twice as wide, edges half a pixel off: -1, -0.5, 0.5, 1
    logits = row.expand(1, 1, 2)
    (found,) = instances(torch.tensor([[9.0, 0.0]]), logits, (1, 4), (1, 3), (1, 3), ["cat"])
    assert found.box == (2, 0, 3, 1)
    assert found.score == pytest.approx(math.exp(9) / (1 + math.exp(9)) * sigmoid(0.5), rel=1e-5)
    # three columns -1, -0.5, 0.5 back to six: -1, -0.875, -0.625, -0.25, 0.25, 0.5
    (wide,) = instances(torch.tensor([[9.0, 0.0]]), logits, (1, 4), (1, 3), (1, 6), ["cat"])
    assert wide.box == (4, 0, 6, 1)
    assert wide.score == pytest.approx((sigmoid(0.25) + sigmoid(0.5)) / 2, rel=1e-3)


# --- a small Mask2Former ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=32, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=2,
        out_features=[f"stage{i}" for i in range(1, 5)],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=16, hidden_dim=32, encoder_feedforward_dim=16,
        dim_feedforward=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=6, num_labels=3,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("mask2former")
    Mask2FormerForUniversalSegmentation(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def detector(folder):
    return Mask2FormerDetector(folder, classes=NAMES, long=96, short=64, floor=0.0)


def test_the_detector_against_numpy(detector):
    image = tiny_scorers.pictures(1, 64, 96)  # fits as it is, and needs no padding
    found = detector.detect(image)[0]
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = (image.numpy().astype(np.float64) - mean[:, None, None]) / std[:, None, None]
    out = detector.model(pixel_values=torch.from_numpy(pixels).float())
    logits = out.class_queries_logits[0].double().numpy()
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    masks = out.masks_queries_logits[0].double()
    large = torch.nn.functional.interpolate(masks[None], (64, 96), mode="bilinear", align_corners=False)[0].numpy()
    expected = []
    for query in range(6):
        inside = large[query] > 0
        quality = (1 / (1 + np.exp(-large[query][inside]))).sum() / (inside.sum() + 1e-6)
        expected += [(probabilities[query, label] * quality, NAMES[label]) for label in range(2)]
    expected.sort(reverse=True)
    assert len(found) == 12  # six queries, two named classes; the third is stuff
    assert [d.score for d in found] == pytest.approx([score for score, _ in expected], abs=1e-5)
    assert {d.mask.shape for d in found} == {(64, 96)}


def test_batches_and_sizes_do_not_matter(detector):
    images = tiny_scorers.pictures(3, 50, 37)
    together, apart = detector.detect(images), [detector.detect(image[None])[0] for image in images.flip(0)]
    assert together == apart[::-1]
    assert {d.mask.shape for found in together for d in found} == {(50, 37)}
    assert all(0 <= x1 <= x2 <= 37 and 0 <= y1 <= y2 <= 50 for x1, y1, x2, y2 in (d.box for d in together[0]))
    assert len(detector.detect(tiny_scorers.pictures(1, 1, 1))[0]) == 12


def test_detectors_by_name(folder, detector):
    assert load_detector(detector) is detector
    assert "circle" in load_detector("shapes").classes
    assert load_detector("test_plug_ins:BLIND", self_check=False) is BLIND  # an object is given as it is
    with pytest.raises(ValueError, match="a tuple"):
        load_detector("fastestdet:COCO_CLASSES")
    with pytest.raises(ValueError, match="module:attribute"):
        load_detector("no_such_module:Detector")
    with pytest.raises(ValueError, match="at least 80"):
        load_detector(str(folder))
    with pytest.raises(ValueError, match="no folder here"):
        load_detector("nowhere to be found")


class Blind:
    """Knows stop signs, and finds none."""

    classes = COCO_CLASSES

    def detect(self, images):
        return [[] for _ in images]


BLIND = Blind()


@pytest.fixture(autouse=True)
def plug_ins(monkeypatch):
    """This module under a name by which detectors and colours can be asked for."""
    import sys

    monkeypatch.setitem(sys.modules, "test_plug_ins", sys.modules[__name__])


def test_a_detector_of_stop_signs_is_checked_when_it_is_loaded_by_name(clip):
    for name in ("test_plug_ins:BLIND", "test_plug_ins:Blind"):
        for reward, options in (
            ("geneval-hf", {"colours": str(clip)}),
            ("layout-iou", {}),
            ("t2i-compbench", {"clip": None}),
        ):
            with pytest.raises(RewardError, match=r"self-check.*`self_check: false`"):
                load(reward, detector=name, **options)
            assert load(reward, detector=name, self_check=False, **options).detector.classes is COCO_CLASSES
    assert load_detector("shapes").classes[0] == "circle"  # knows none: nothing to check


# --- colours ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_scorers.clip_folder(tmp_path_factory.mktemp("clip"))


def test_cut_outs():
    whole = Image.new("RGB", (6, 4), (255, 0, 0))
    mask = np.zeros((4, 6), bool)
    mask[1:3, 2:4] = True
    found = Detection("cat", (1.6, 0.4, 4.0, 3.0), 1.0, mask)
    cut = np.array(cut_out(whole, found))
    assert cut.shape == (3, 2, 3)  # x from 2 to 4, y from 0 to 3
    assert cut[0].tolist() == [[153] * 3] * 2 and cut[1:].reshape(-1, 3).tolist() == [[255, 0, 0]] * 4
    assert np.array(cut_out(whole, found, background=None))[0].tolist() == [[255, 0, 0]] * 2
    assert np.array(cut_out(whole, found, crop=False)).shape == (4, 6, 3)
    assert cut_out(whole, Detection("cat", (2.0, 2.0, 2.0, 2.0), 1.0)).size == (1, 1)


@pytest.mark.parametrize("size", [(40, 90), (33, 32), (7, 5), (300, 1)])
def test_the_crop_is_that_of_the_published_processor(size):
    from torchvision.transforms import CenterCrop, Compose, Resize, ToTensor
    from torchvision.transforms.functional import InterpolationMode

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    published = Compose([Resize(32, InterpolationMode.BICUBIC), CenterCrop(32), ToTensor()])
    assert torch.equal(resized_crop(picture, 32), published(picture))


def test_colours_against_plain_transformers(clip):
    from transformers import AutoTokenizer, CLIPModel

    classifier = ClipColours(clip, chunk=2)
    image = tiny_scorers.pictures(1, 48, 48)[0]
    mask = np.zeros((48, 48), bool)
    mask[5:30, 8:40] = True
    objects = [
        Detection("cat", (8.0, 5.0, 40.0, 30.0), 0.9, mask),
        Detection("dog", (0.0, 0.0, 20.0, 48.0), 0.8),
        Detection("cat", (20.0, 10.0, 33.0, 44.0), 0.7),
    ]
    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), AutoTokenizer.from_pretrained(clip)

    def unit(x):
        x = getattr(x, "pooler_output", x)
        return x / x.norm(dim=-1, keepdim=True)

    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (classifier.towers.preprocessing.mean, (1.0,) * 3))
    std = torch.tensor(classifier.towers.preprocessing.std).view(3, 1, 1)
    whole = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
    for found, said in zip(objects, classifier.classify(image, objects), strict=True):
        logits = []
        for colour in COLOURS:
            texts = [t.format(colour=colour, label=found.label) for t in TEMPLATES]
            tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=16, return_tensors="pt")
            with torch.no_grad():
                text = unit(unit(model.get_text_features(**tokens)).mean(0))
                pixels = (resized_crop(cut_out(whole, found), 32) - mean) / std
                seen = unit(model.get_image_features(pixel_values=pixels[None]))[0]
            logits.append(float(100 * seen @ text))
        assert said == COLOURS[int(np.argmax(logits))]
        own = (classifier.class_features(found.label) @ seen * 100).tolist()
        assert own == pytest.approx(logits, abs=1e-3)
    assert classifier.classify(image, []) == []


def test_another_activation_is_refused(tmp_path):
    with pytest.raises(ValueError, match="quick_gelu"):
        ClipColours(tiny_scorers.clip_folder(tmp_path, act="gelu"))


def test_colours_by_name(clip):
    reward = load("geneval-hf", detector=BLIND, colours="test_plug_ins:Seen")
    assert isinstance(reward.colours, Seen) and "Seen" in reward.spec.version
    with pytest.raises(ValueError, match="classify"):
        load("geneval-hf", detector=BLIND, colours="nowhere:Seen")


def test_an_object_is_classified_once():
    asked = []

    def colours_of(objects):
        asked.extend(objects)
        return ["red" for _ in objects]

    memory: dict[Detection, str] = {}
    ask = remembering(colours_of, memory)
    a, b = Detection("cat", (0, 0, 1, 1), 0.9), Detection("cat", (0, 0, 2, 2), 0.8)
    assert ask([a]) == ["red"] and ask([a, b]) == ["red", "red"] and asked == [a, b] and memory.keys() == {a, b}


# --- the reward -------------------------------------------------------------------------------------------------------

TAGGED = {"tag": "single_object", "include": [{"class": "cat", "count": 1}]}


def test_the_whole_path_with_small_models(detector, clip):
    """Random weights find no cat above 0.3; a threshold below their scores finds several."""
    images = tiny_scorers.pictures(2, 40, 60)
    usual = GenevalReward(detector=detector, colours=str(clip))
    assert checked_score(usual, images, ["", ""], [TAGGED, TAGGED]).values.tolist() == [0, 0]
    wanted = TAGGED | {"include": [{"class": "cat", "count": 1, "color": "red"}]}
    low = GenevalReward("geneval-hf-soft", detector, str(clip), options={"threshold": 0.0})
    result = checked_score(low, images, ["", ""], [wanted, {}])
    number = len(low.judge(images, [wanted, {}])[0][0].objects["cat"])
    assert number > 1 and result.values[0] == pytest.approx((1 - (number - 1)) / 2)  # a colour that is not asked: 0
    assert result.missing.tolist() == [False, True] and "tag" in result.reasons[1]
    assert set(result.parts) == {"geneval-hf", "geneval-hf-strict", "geneval-hf-soft"}
    assert usual.spec.version != low.spec.version and detector.version in usual.spec.version


def test_options_of_the_reward(detector, clip):
    reward = load("geneval-hf-soft", detector=detector, colours=str(clip), flow_grpo_compat=True)
    assert reward.options.flow_grpo_compat and reward.spec.range == (-14, 1)
    with pytest.raises(ValueError, match="geneval-hf"):
        GenevalReward("geneval", detector, str(clip))
    with pytest.raises(ValueError, match="fields of"):
        GenevalReward(detector=detector, colours=str(clip), options={"treshold": 0.1})


# --- a real detector --------------------------------------------------------------------------------------------------


class Seen:
    """Colours from the mean pixel of the box: enough for a drawn sign and a grey uniform."""

    colours = COLOURS

    def classify(self, image, objects):
        names = []
        for found in objects:
            x1, y1, x2, y2 = (max(int(edge), 0) for edge in found.box)
            r, g, b = image[:, y1:y2, x1:x2].flatten(1).mean(1).tolist()
            names.append("red" if r > 1.5 * max(g, b) else "blue" if b > 1.5 * max(r, g) else "white")
        return names


real = pytest.mark.skipif(not WEIGHTS.exists(), reason="needs the FastestDet weights")


@pytest.fixture(scope="module")
def fastestdet():
    pytest.importorskip("onnxruntime")
    return FastestDet()


@real
def test_the_self_check_passes_with_a_real_detector_and_not_with_a_broken_one(fastestdet):
    assert self_check(fastestdet) > 0.8
    assert load_detector("fastestdet:FastestDet").version == "fastestdet"  # checked by the way

    class Broken:
        classes = COCO_CLASSES

        def detect(self, images):
            return fastestdet.detect(images * 0)

    with pytest.raises(RewardError, match="stop sign"):
        self_check(Broken())


@real
def test_a_drawn_sign_by_a_real_detector(fastestdet):
    image, expected = self_check_image()
    reward = GenevalReward(detector=fastestdet, colours=Seen())
    red, blue = (
        {"tag": "colors", "include": [{"class": "stop sign", "count": 1, "color": colour}]}
        for colour in ("red", "blue")
    )
    result = checked_score(reward, image.repeat(2, 1, 1, 1), ["", ""], [red, blue])
    assert result.values.tolist() == [1, 0] and "blue stop sign" in result.reasons[1]


@real
def test_a_photograph_by_a_real_detector_through_the_results_file(fastestdet):
    """Matplotlib's sample portrait: one person with a tie below her face's centre."""
    from matplotlib.cbook import get_sample_data

    picture = np.array(Image.open(get_sample_data("grace_hopper.jpg")).convert("RGB"))
    photo = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    include = [{"class": "person", "count": 1}, {"class": "tie", "count": 1, "position": ["below", 0]}]
    cases = [
        {"tag": "single_object", "include": include[:1]},
        {"tag": "position", "include": include},
        {"tag": "colors", "include": [{"class": "tie", "count": 1, "color": "red"}]},
        {"tag": "single_object", "include": [{"class": "zebra", "count": 1}]},
    ]
    reward = GenevalReward(detector=fastestdet, colours=Seen())
    judged = reward.judge(photo.repeat(4, 1, 1, 1), cases)
    assert [answer.correct for answer, _ in judged] == [True, True, False, False]
    rows = [row_of("0.png", case, answer, seen) for case, (answer, seen) in zip(cases, judged, strict=True)]
    assert [judge_row(row).correct for row in rows] == [True, True, False, False]
