"""The checklist reward: rules by hand, and a small BLIP-VQA against its parts called one by one."""

from __future__ import annotations

import math

import pytest
import tiny_scorers
import torch

from reward_models import RewardError, checked_score
from reward_models.checklist import (
    RULES,
    BlipAnswerer,
    ChecklistReward,
    Question,
    load_answerer,
    marks,
    parse_questions,
)


@pytest.mark.parametrize(
    ("rule", "value"),
    [("mean", (0.9 + 3 * 0.4) / 4), ("product", 0.9 * 0.4**3), ("geometric", (0.9 * 0.4**3) ** 0.25), ("least", 0.4)],
)
def test_rules_with_weights(rule, value):
    assert RULES[rule]([0.9, 0.4], [1.0, 3.0]) == pytest.approx(value)


@pytest.mark.parametrize("rule", RULES)
def test_rules_at_their_ends(rule):
    assert RULES[rule]([1.0, 1.0], [1.0, 2.0]) == 1
    assert RULES[rule]([0.0, 0.0], [1.0, 2.0]) == 0
    assert math.isnan(RULES[rule]([1.0, math.nan], [1.0, 2.0]))


def test_marks_follow_answers_and_needs():
    questions = [Question("a"), Question("b", yes=False), Question("c", needs=(0, 1)), Question("d", needs=(2,))]
    assert marks([0.9, 0.2, 0.7, 0.6], questions) == pytest.approx([0.9, 0.8, 0.7, 0.6])
    assert marks([0.9, 0.5, 0.7, 0.6], questions) == pytest.approx([0.9, 0.5, 0, 0])  # 1/2 is not a yes
    assert marks([math.nan, 0.2, 0.7, 0.6], questions) == pytest.approx(
        [math.nan, 0.8, math.nan, math.nan], nan_ok=True
    )


def test_questions_are_read():
    given = ["Is there a cat?", {"question": "Is it a dog?", "answer": False, "needs": [0], "weight": 2}]
    assert parse_questions({"questions": given}) == [
        Question("Is there a cat?"),
        Question("Is it a dog?", False, (0,), 2.0),
    ]
    filled = {"question": "Is there a cat?", "answer": None, "needs": None, "weight": None}  # as tables fill up
    assert parse_questions({"questions": [filled]}) == [Question("Is there a cat?")]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, "no 'questions'"),
        ([], "no 'questions'"),
        (["Is it?", 3], "question 1"),
        ([" "], "expected a text"),
        ([{"question": "Is it?", "answer": "perhaps"}], "perhaps"),
        ([{"question": "Is it?", "needs": [0]}], "earlier"),
        (["Is it?", {"question": "Is it not?", "needs": 0}], "earlier"),
        ([{"question": "Is it?", "answer": ["yes"]}], "neither"),
        ([{"question": "Is it?", "answer": 1}], "neither"),
        ([{"question": "Is it?", "weight": 0}], "positive"),
    ],
)
def test_checklists_that_cannot_be_read(given, says):
    assert says in parse_questions({"questions": given})


def brightness(images, questions):
    """Yes to everything, as surely as the image is bright; no answer to questions about sound."""
    means = images.flatten(1).mean(1).tolist()
    return [math.nan if "sound" in q else m for m, q in zip(means, questions, strict=True)]


def test_the_reward():
    images = torch.tensor([0.8, 0.2, 1.0, 1.0]).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    questions = {"questions": ["Is it day?", {"question": "Is it night?", "answer": "no", "weight": 3}]}
    metadata = [questions, questions, {"questions": ["Is there sound?", "Is it day?"]}, {}]
    result = checked_score(ChecklistReward("product", brightness), images, [""] * 4, metadata)
    assert result.values[:2].tolist() == pytest.approx([0.8 * 0.2**3, 0.2 * 0.8**3], rel=1e-5)
    assert result.missing.tolist() == [False, False, True, True]
    assert result.parts["checklist-passed"][:2].tolist() == [0.5, 0.5]
    assert "night" in result.reasons[0] and "day" in result.reasons[1] and "sound" in result.reasons[2]
    flipped = checked_score(ChecklistReward("product", brightness), images.flip(0), [""] * 4, metadata[::-1])
    assert torch.equal(flipped.values.flip(0)[:2], result.values[:2])
    nothing = checked_score(ChecklistReward(answerer=brightness), images[:1], [""], [{}], all_missing="allow")
    assert nothing.missing.all()


@pytest.mark.parametrize("answers", [[0.5], [0.5, 1.5]])
def test_an_answerer_that_breaks_its_word_is_named(answers):
    reward = ChecklistReward(answerer=lambda images, questions: answers)
    with pytest.raises(RewardError, match="probabilities"):
        checked_score(reward, torch.rand(1, 3, 2, 2), [""], [{"questions": ["Is it?", "Is it not?"]}])


def test_names():
    with pytest.raises(ValueError, match="geometric"):
        ChecklistReward("median", brightness)
    with pytest.raises(ValueError, match="module:attribute"):
        load_answerer("no_such_module:answer")
    assert load_answerer("math:hypot") is math.hypot


# --- BLIP -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    """A small BLIP-VQA with a small vocabulary; [DEC] and [ENC] are its last words, as in the published one."""
    from transformers import BertTokenizer, BlipConfig, BlipForQuestionAnswering

    folder = tmp_path_factory.mktemp("blip")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "yes", "no", "is", "it", "a", "red", "cat", "?", *"bdefgh"]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = small | {
        "vocab_size": len(words) + 2, "encoder_hidden_size": 16, "max_position_embeddings": 16, "projection_dim": 8,
        "bos_token_id": len(words), "pad_token_id": 0, "sep_token_id": 3, "eos_token_id": 3,
    }  # fmt: skip
    torch.manual_seed(0)
    config = BlipConfig(text_config=text, vision_config=small | {"image_size": 32, "patch_size": 8})
    model = BlipForQuestionAnswering(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_blip_against_one_question_at_a_time_without_padding(blip):
    from transformers import AutoTokenizer, BlipForQuestionAnswering

    images = tiny_scorers.pictures(3, 48, 40)
    questions = ["is it a red cat?", "is it red?", "a cat?"]
    answerer = BlipAnswerer(blip, chunk=2)
    given = answerer(images, questions)
    assert given.shape == (3,) and len(set(given.tolist())) == 3
    model, tokenizer = BlipForQuestionAnswering.from_pretrained(blip).eval(), AutoTokenizer.from_pretrained(blip)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (answerer.fit.mean, answerer.fit.std))
    for image, question, probability in zip(images, questions, given.tolist(), strict=True):
        small = torch.nn.functional.interpolate(image[None], (32, 32), mode="bicubic", antialias=True)
        tokens = tokenizer(question, return_tensors="pt")
        ids = tokens["input_ids"].clone()
        ids[0, 0] = len(tokenizer) + 1
        with torch.no_grad():
            seen = model.vision_model(pixel_values=(small - mean) / std).last_hidden_state
            states = model.text_encoder(input_ids=ids, encoder_hidden_states=seen).last_hidden_state
            start = torch.tensor([[len(tokenizer)]])
            decoded = model.text_decoder(input_ids=start, encoder_hidden_states=states).logits[0, 0]
        shares = decoded.softmax(0)
        expected = float(shares[5] / (shares[5] + shares[6]))
        assert probability == pytest.approx(expected, abs=5e-6)


def test_blip_through_the_reward(blip):
    images = tiny_scorers.pictures(2, 20, 30)
    reward = ChecklistReward("mean", str(blip))
    asked = {"questions": ["is it red?", {"question": "is it a cat?", "answer": "no"}]}
    values = checked_score(reward, images, ["", ""], [asked, asked]).values
    p = reward.answerer(images[[0, 0]], ["is it red?", "is it a cat?"])
    assert values[0].item() == pytest.approx((p[0].item() + 1 - p[1].item()) / 2, abs=1e-6)
    assert reward.spec.version.endswith(reward.answerer.version) and "blip" in reward.answerer.version


def test_a_tokenizer_without_yes_is_refused(blip, tmp_path):
    import shutil

    from transformers import BertTokenizer

    folder = shutil.copytree(blip, tmp_path / "blip")
    for file in folder.glob("*token*"):
        file.unlink()
    BertTokenizer(vocab={w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])}).save_pretrained(
        folder
    )
    with pytest.raises(ValueError, match="yes"):
        BlipAnswerer(folder)
