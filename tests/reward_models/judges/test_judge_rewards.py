"""Judges under the names by which configs know them, against a server whose model sees how bright images are."""

import json
import math

import pytest
import torch
from judge_server import decode, greys, serve
from PIL import Image

from reward_models import RewardError, checked_score, load
from reward_models.judges import build, wording
from reward_models.judges.endpoint import ChatEndpoint
from reward_models.judges.listener import (
    ListenerAudit,
    agreement,
    calibration_error,
    contradiction_rate,
    without_verdict,
)
from reward_models.judges.pairwise import EndpointPairJudge, ScorerJudge, judge_pairs
from reward_models.judges.pointwise import source_picture

FOUR = greys(0.9, 0.1, 0.6, 0.3)
RATES = [1, 0, 2 / 3, 1 / 3]
AXES = ("Alignment", "Coherence", "Style")


def at(server, **options):
    return {"url": server.url, "model": "judge", "pause": 0.01, "deadline": 5.0, **options}


def score(reward, images=FOUR, prompts=None, metadata=None, **options):
    return checked_score(
        reward, images, prompts or ["a {prompt} é"] * len(images), metadata, all_missing="allow", **options
    )


def brain(text, images, body):
    """Answers in the form that the text asks for; brighter is better."""
    level = [float(image.mean()) / 255 for image in images]
    assert "a {prompt} é" in text or "levels" in text or "how it looks" in text
    if len(images) == 2 and '"score"' not in text:
        winner = 1 if level[0] > level[1] else 2
        if "<confidence>" in text:
            return f"<confidence>{level[0] / sum(level):.3f}</confidence>"
        if "cat_winner" in text:
            rows = [
                {"name": n, "cat_winner": f"Image {w}"} for n, w in (("s", winner), ("q", 3 - winner), ("a", winner))
            ]
            return json.dumps({"categories": rows, "winner": f"Image {winner}"})
        if "share one point" in text:
            a = level[0] / sum(level)
            return "\n".join(
                f"{n} Score:\n Image 1: {a:.4f}\n Image 2: {1 - a:.4f}" for n in ("Alignment", "Coherence", "Style")
            )
        said = f"Image {winner} is better"
        return f"<think>so</think><answer>{said}</answer>" if "<answer>" in text else f"{said}."
    if '"score"' in text:
        high = 25 if "25" in text else 10
        if len(images) == 2:
            return json.dumps({"reasoning": "", "score": [level[1] * high, level[0] * high]})
        return json.dumps({"score": [level[0] * high, high] if "Naturalness" in text else [level[0] * high]})
    if "Alignment Score" in text:
        return "\n".join(f"{n} Score (1-5): {1 + 4 * level[0]:.2f}" for n in AXES)
    if "levels" in text:
        return f"<Thought>calm</Thought><Score>{1 + round(4 * level[0])}</Score>"
    return f"Final Score: {1 + 4 * level[0]:.2f}"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("unified-reward-think", {}),
        ("unified-reward-think", {"reasoning": False}),
        ("unified-reward-think", {"order": "random", "aggregate": "win_rate"}),
        ("unified-reward", {"mode": "pair_rank"}),
        ("unified-reward", {"mode": "pair_score"}),
        ("vlm-judge", {"mode": "pair"}),
        ("vlm-judge", {"mode": "pair", "reasoning": True}),
        ("unified-reward-flex", {"category_weight": 0.0}),
    ],
)
def test_pairs(name, options):
    with serve(brain) as server:
        result = score(load(name, endpoint=at(server), **options))
    assert result.values.tolist() == pytest.approx(RATES)
    assert len(server.bodies) == (6 if "order" in options else 12)
    assert all(body["temperature"] == 0 and body["seed"] == 0 for body in server.bodies)
    switches = {json.dumps(body.get("chat_template_kwargs")) for body in server.bodies}
    assert switches == {'{"enable_thinking": true}' if name == "vlm-judge" and "reasoning" in options else "null"}


def test_flex_mixes_overall_and_categories():
    with serve(brain) as server:
        reward = load("unified-reward-flex", endpoint=at(server))
        released = load("unified-reward-flex", endpoint=at(server), compat="pref_grpo")
        assert score(reward).values.tolist() == pytest.approx([(w + (w + (1 - w) + w) / 3) / 2 for w in RATES])
        assert score(released).values.tolist() == pytest.approx([0.834, 0.167, 0.612, 0.389], abs=1e-6)
        assert set(score(released).parts) >= {"category/s", "category/q", "category/a"}
        with pytest.raises(ValueError, match="category weights"):
            load("unified-reward-flex", endpoint=at(server), category_weights={"beauty": 1.0})


def test_released_round_of_pref_grpo():
    """One order, JPEG, ties where nothing can be parsed, three decimals."""

    def says(text, images, body):
        dark, bright = (image.mean() for image in images)
        return "cannot tell" if abs(dark - bright) > 100 else "<answer>Image 1 is better</answer>"

    with serve(says) as server:
        result = score(load("unified-reward-think", endpoint=at(server), compat="pref_grpo"), greys(0.9, 0.6, 0.3))
        url = server.bodies[0]["messages"][0]["content"][0]["image_url"]["url"]
    assert len(server.bodies) == 3 and url.startswith("data:image/jpeg;base64,")
    assert result.values.tolist() == [0.75, 0.5, 0.25]  # 0-1 first, 0-2 unread, 1-2 first


def test_pointwise():
    with serve(brain) as server:
        expected = [1 + 4 * round(x * 255) / 255 for x in (0.9, 0.1, 0.6, 0.3)]
        for name, options in (("unified-reward", {}), ("unified-reward", {"mode": "acs"}), ("vlm-judge", {})):
            result = score(load(name, endpoint=at(server), **options))
            assert result.values.tolist() == pytest.approx(expected, abs=0.006)
        acs = score(load("unified-reward", endpoint=at(server), mode="acs", weights={"style": 1.0}))
        assert set(acs.parts) == {"alignment", "coherence", "style"}
        assert score(load("vlm-judge", endpoint=at(server), mode="aesthetic")).values.tolist() == [5, 1, 3, 2]


def test_pointwise_as_released():
    said = iter(["Final Score: 4", "no idea"])
    with serve(lambda *_: next(said)) as server:
        reward = load("unified-reward", endpoint=at(server, workers=1), compat="flow_grpo")
        assert score(reward, FOUR[:2]).values.tolist() == pytest.approx([0.8, 0])
        url = server.bodies[0]["messages"][0]["content"][0]["image_url"]["url"]
        assert url.startswith("data:image;base64,") and reward.spec.range == (0, 1)


def test_acs_as_released_takes_the_mean_of_the_batch():
    said = iter(["Style Score (1-5): 2\nAlignment Score (1-5): 5\nCoherence Score (1-5): 2", "Style Score (1-5): 4"])
    with serve(lambda *_: next(said)) as server:
        reward = load("unified-reward", endpoint=at(server, workers=1), mode="acs", compat="pref_grpo")
        result = score(reward, FOUR[:2])
    assert result.values.tolist() == pytest.approx([3, (5 + 2 + 4) / 3])
    said = iter(["Style Score (1-5): 2\nAlignment Score (1-5): 5\nCoherence Score (1-5): 2", "Style Score (1-5): 4"])
    with serve(lambda *_: next(said)) as server:
        result = score(load("unified-reward", endpoint=at(server, workers=1), mode="acs"), FOUR[:2])
    assert result.values[0] == 3 and math.isnan(result.values[1]) and "alignment, coherence" in result.reasons[1]
    assert result.parts["style"].tolist() == [2, 4]


def test_what_cannot_be_had_is_missing_with_its_reason_and_never_zero():
    with serve(lambda text, images, body: "hm" if images[0].mean() < 50 else "Final Score: 1") as server:
        result = score(load("unified-reward", endpoint=at(server)))
    assert result.values.isnan().tolist() == [False, True, False, False]
    assert "no final score" in result.reasons[1] and result.values[0] == 1
    with serve(brain, iter(["400"] * 9)) as server:
        reward = load("vlm-judge", endpoint=at(server, extra={"top_p": 0.9}))
        assert score(reward).values.isnan().all()
        with pytest.raises(RewardError, match="no answer from the judge: HTTP 400"):
            checked_score(reward, FOUR, ["a"] * 4)


def test_edit_score_by_hand(tmp_path):
    """Scores: the edit's own brightness and the source's; then the edit's brightness and the full 25."""
    Image.new("RGB", (4, 4), (128, 128, 128)).save(tmp_path / "source.png")
    source = torch.full((3, 4, 4), 128 / 255)
    metadata = [{"source": str(tmp_path / "source.png")}, {"source": source}, {}, {"source": source}]
    with serve(brain) as server:
        result = score(load("edit-score", endpoint=at(server)), metadata=metadata)
    levels = [round(x * 255) / 255 for x in (0.9, 0.1, 0.6, 0.3)]
    expected = [math.sqrt(min(x, 128 / 255) * x) * 10 for x in levels]
    assert result.values[[0, 1, 3]].tolist() == pytest.approx([expected[i] for i in (0, 1, 3)])
    assert math.isnan(result.values[2]) and "no source image" in result.reasons[2]
    assert len(server.bodies) == 6 and result.parts["passes"].tolist() == [1, 1, 0, 1]


def test_viescore_by_hand():
    with serve(brain) as server:
        result = score(load("viescore", endpoint=at(server)))
    assert result.values.tolist() == pytest.approx([10 * round(x * 255) / 255 for x in (0.9, 0.1, 0.6, 0.3)])


def test_self_ensemble_averages_usable_passes_and_tells_their_spread():
    """Passes by seed: 16, unreadable, 4 (of 25, both questions alike)."""

    def by_seed(text, images, body):
        return {0: '{"score": [16, 20]}', 1: "sorry", 2: '{"score": [25, 4]}'}[body["seed"]]

    metadata = [{"source": FOUR[0]}]
    with serve(by_seed) as server:
        reward = load("edit-score", endpoint=at(server), passes=3)
        result = score(reward, FOUR[:1], metadata=metadata)
        middle = score(
            load("edit-score", endpoint=at(server), passes=3, compat="editscore"), FOUR[:1], metadata=metadata
        )
    assert reward.endpoint.temperature == 0.7
    assert result.values.tolist() == pytest.approx([(6.4 + 1.6) / 2]) and result.parts["passes"].tolist() == [2]
    assert result.uncertainty.tolist() == pytest.approx([4.8 / math.sqrt(2)])
    assert middle.values.tolist() == pytest.approx([(6.4 + 5 + 1.6) / 3])
    with pytest.raises(ValueError, match="temperature"):
        load("edit-score", endpoint={"url": "http://h", "temperature": 0.0}, passes=2)


def test_one_pass_knows_no_uncertainty():
    with serve(brain) as server:
        assert score(load("viescore", endpoint=at(server))).uncertainty is None


def test_what_changes_scores_changes_the_version():
    at_rest = {"endpoint": "http://127.0.0.1:9", "model": "m"}
    for build_one, options in (
        (build.unified_reward, ({}, {"mode": "acs"}, {"mode": "acs", "weights": {"style": 1.0}})),
        (build.unified_reward_think, ({}, {"compat": "pref_grpo"}, {"reasoning": False}, {"opponents": 2})),
        (build.unified_reward_flex, ({}, {"overall_weight": 2.0}, {"category_weights": {"quality": 0.5}})),
        (build.vlm_judge, ({}, {"reasoning": False}, {"mode": "pair"}, {"mode": "four_way"})),
        (build.edit_score, ({}, {"passes": 2}, {"passes": 2, "reduction": "means"}, {"compat": "editscore"})),
    ):
        versions = {build_one(**at_rest, **each).spec.version for each in options}
        versions.add(build_one(endpoint={"url": "http://127.0.0.1:9", "model": "m", "temperature": 0.3}).spec.version)
        assert len(versions) == len(options) + 1, build_one
    rates = {build.win_rate(judge="jpeg", aggregate="bradley_terry", prior=p).spec.version for p in (0.1, 1.0)}
    assert len(rates) == 2
    judges = {build.unified_reward_think(**at_rest, compat=c).judge.spec.version for c in (None, "pref_grpo")}
    assert len(judges) == 2


def test_a_learned_listener_computes_where_the_rewards_do(tmp_path):
    (tmp_path / "where.py").write_text(
        "import torch\nfrom reward_models import RewardResult, RewardSpec\n"
        "class Where:\n    spec = RewardSpec('where')\n"
        "    def __init__(self, device): self.device = device\n"
        "    def score(self, images, prompts, metadata, groups=None): return RewardResult(torch.zeros(len(images)))\n"
    )
    for name, options in (("unified-reward-think", {}), ("unified-reward-flex", {}), ("vlm-judge", {"mode": "pair"})):
        with serve(brain) as server:
            reward = load(name, "meta", endpoint=at(server), listener=f"{tmp_path}/where.py:Where", **options)
        assert reward.judge.listener.reward.device == "meta"


def test_images_of_different_sizes_are_compared_as_they_are():
    """Benchmarks pair images of models whose sizes differ; the judge must see each as it is."""
    images = [greys(0.9, size=6)[0], greys(0.1, size=4)[0], greys(0.6, size=4)[0]]
    pairs, prompts = [(0, 1), (1, 2), (2, 0)], ["a {prompt} é"] * 3
    with serve(brain) as server:
        for judge in (
            load("vlm-judge", endpoint=at(server), mode="pair").judge,
            ScorerJudge(load("vlm-judge", endpoint=at(server))),
        ):
            judged = judge_pairs(judge, images, pairs, prompts, [{}] * 3)
            assert judged.preference.tolist() == [1, 0, 0] and not any(judged.reasons)
        shapes = {
            decode(part["image_url"]["url"]).shape
            for body in server.bodies
            for part in body["messages"][0]["content"][:-1]
        }
    assert shapes == {(6, 6, 3), (4, 4, 3)}


def test_four_verdicts_in_both_orders():
    """Bright images are good and dark ones bad; the judge cannot tell close ones apart, and errs about one of them."""

    def says(text, images, body):
        a, b = (image.mean() for image in images)
        if abs(a - b) < 40:
            return f"so [[A=B={'Good' if a > 128 else 'Bad'}]]"
        return "[[A>B]]" if a > b else "[[B>A]]"

    images = greys(0.9, 0.85, 0.1, 0.15, 0.45, 0.55)
    pairs = [(0, 1), (2, 3), (0, 2), (2, 0), (4, 5)]
    with serve(says) as server:
        reward = load("vlm-judge", endpoint=at(server), mode="four_way")
        judged = judge_pairs(reward.judge, images, pairs, ["a"] * 6, [{}] * 6)
        text = server.bodies[0]["messages"][0]["content"][-1]["text"]
        ordinary = judge_pairs(
            load("vlm-judge", endpoint=at(server), mode="pair").judge, images, pairs, ["a"] * 6, [{}] * 6
        )
    assert judged.preference.tolist() == [0.5, 0.5, 1, 0, 0.5]
    assert judged.good[:2].tolist() == [1, 0] and judged.good[2:4].isnan().all() and judged.good[4] == 0.5
    assert judged.flips.tolist() == [0, 0, 0, 0, 1] and judged.bias.tolist() == [0] * 5
    assert "[[A=B=Bad]]" in text and ordinary.good is None


def test_sources_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        source_picture({"source": str(tmp_path / "none.png")})
    with pytest.raises(ValueError, match="expected a path"):
        source_picture({"source": 3})


def test_win_rate_by_a_named_judge():
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 0.2, 0.6]).view(
        -1, 1, 1, 1
    )
    by_size = score(load("win-rate", judge="jpeg-incompress"), images)
    assert by_size.values.tolist() == [1, 0, 0.5]
    assert score(load({"win-rate": {"weight": 2.0, "judge": "jpeg-incompress"}}), images).values.tolist() == [2, 0, 1]
    assert score(load("win-rate", judge={"jpeg-incompress": -1.0}), images).values.tolist() == [0, 1, 0.5]
    assert score(load("win-rate", judge="jpeg-incompress", threshold=100.0), images).values.tolist() == [0.5] * 3
    with serve(brain) as server:
        nested = load("win-rate", judge={"unified-reward-think": {"endpoint": at(server)}}, opponents=2)
        assert isinstance(nested.judge, EndpointPairJudge)
        assert score(nested).values[0] == 1
        two = load("win-rate", judge={"vlm-judge": {"endpoint": at(server)}})
        assert isinstance(two.judge, ScorerJudge) and score(two).values.tolist() == pytest.approx(RATES)
    with pytest.raises(ValueError, match="compare"):
        load("win-rate", judge=3)


def test_who_can_judge():
    scorer = load("jpeg")
    judge = ScorerJudge(scorer)
    assert build.as_judge(judge) is judge and build.as_judge(build.win_rate(judge=judge)) is judge
    named = [build.as_judge(given) for given in (scorer, "jpeg", {"jpeg": {}}, {"win-rate": {"judge": "jpeg"}})]
    assert {one.spec for one in named} == {judge.spec}
    assert build.as_judge({"jpeg": 2.0}).spec.name == "2 jpeg as judge"
    with pytest.raises(ValueError, match="scope 'group'"):
        build.as_judge({"win-rate": {"weight": 1.0, "judge": "jpeg"}})  # a sum of one, which compares nothing
    with pytest.raises(ValueError, match="compare"):
        build.as_judge(3)


def test_a_listener_s_agreement_weighs_the_verdicts():
    """The judge always names the first image; the listener sees brightness, so one order counts and the other not."""
    with serve(lambda *_: "<answer>Image 1 is better</answer>") as loud, serve(brain) as quiet:
        for listener in ({"vlm-judge": {"endpoint": at(quiet), "mode": "pair"}}, {"endpoint": at(quiet)}):
            reward = load("unified-reward-think", endpoint=at(loud), order="given", listener=listener)
            assert isinstance(reward.judge, ListenerAudit)
            result = score(reward, greys(0.9, 0.3, 0.6))
            weights = [1.0, 1.0, 0.0] if "endpoint" not in listener else [230 / 306, 230 / 383, 76 / 229]
            rates = [1, weights[2] / (weights[0] + weights[2]), 0]
            assert result.values.tolist() == pytest.approx(rates, abs=2e-3)
            assert result.parts["agreement"][0] == pytest.approx((weights[0] + weights[1]) / 2, abs=1e-3)
    heard = json.dumps(quiet.bodies[-1])
    assert "Reasons:" in heard and "is better</answer>" not in heard


def test_a_silent_listener_leaves_no_verdict():
    with serve(brain) as loud, serve(lambda *_: "hm") as quiet:
        reward = load("unified-reward-think", endpoint=at(loud), listener={"endpoint": at(quiet)})
        result = score(reward)
    assert result.values.isnan().all() and "listener" in result.reasons[0] and "<confidence>" in result.reasons[0]


def test_reasons_without_the_verdict():
    chain, verdict = "<think>Image 1 has 8+7=15. Image 2 is sharper.", "Image 2 is better"
    told = without_verdict(f"{chain} So {verdict}!</think><answer>{verdict}</answer>")
    assert told == f"{chain}</think><answer></answer>"
    category = {"name": "S", "cat_reason": "red", "cat_winner": "Image 1"}
    flex = without_verdict(json.dumps({"categories": [category], "reason": "so", "winner": "Image 1"}))
    assert "Image 1" not in flex and '"cat_reason": "red"' in flex


def test_metrics_of_listeners():
    judge, listener = torch.tensor([1.0, 1.0, 0.0, 0.5, math.nan]), torch.tensor([0.9, 0.2, 0.1, 1.0, 1.0])
    assert agreement(judge, listener)[:4].tolist() == pytest.approx([0.9, 0.2, 0.9, 0.5], abs=1e-6)
    assert contradiction_rate(judge, listener) == pytest.approx(1 / 3)
    confidence, right = torch.tensor([0.95, 0.93, 0.1, 0.15]), torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert calibration_error(confidence, right) == pytest.approx((abs(1 - 1.88) + 0.25) / 4, abs=1e-6)
    assert calibration_error(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0])) == 0


def test_templates(tmp_path):
    for file in wording.TEMPLATES.glob("*.txt"):
        filled = wording.load(file.stem).fill(
            prompt="a {high} {x}", high="25", reasons="r", points="p", definitions="d", descriptions="e"
        )
        assert "{prompt}" not in filled and "{points}" not in filled, file
        if "{prompt}" in wording.load(file.stem).text:
            assert "a {high} {x}" in filled, file  # what a prompt holds is not filled again
    own = tmp_path / "own.txt"
    own.write_text('Judge "{prompt}" {"json": 1}')
    told = wording.load("unified_reward_point", own)
    assert (
        told.fill(prompt="x") == 'Judge "x" {"json": 1}' and told.digest != wording.load("unified_reward_point").digest
    )
    own.write_text("no place")
    with pytest.raises(ValueError, match="{prompt}"):
        wording.load("unified_reward_point", own)
    with pytest.raises(ValueError, match="expected a text file"):
        wording.load("unified_reward_point", tmp_path / "none.txt")


def test_an_own_template_is_what_the_judge_reads_and_changes_the_version(tmp_path):
    (tmp_path / "own.txt").write_text("original words: a {prompt}")
    with serve(lambda text, *_: f"Final Score: {4 if text == 'original words: a cat' else 1}") as server:
        reward = load("unified-reward", endpoint=at(server), template_path=str(tmp_path / "own.txt"))
        assert score(reward, FOUR[:1], ["cat"]).values.tolist() == [4]
        assert reward.spec.version != load("unified-reward", endpoint=at(server)).spec.version


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("unified-reward", {}),
        ("unified-reward", {"mode": "triple"}),
        ("unified-reward", {"compat": "pref_grpo"}),
        ("unified-reward", {"mode": "acs", "weights": {"beauty": 1.0}}),
        ("unified-reward", {"mode": "acs", "weights": {"style": 0.0}}),
        ("unified-reward", {"endpoint": {"url": "http://h", "speed": 3}}),
        ("vlm-judge", {"endpoint": "http://h"}),
        ("vlm-judge", {"model": "m", "grammar": "pair_rank"}),
        ("vlm-judge", {"model": "m", "mode": "pair", "grammar": "final_score"}),
        ("unified-reward-think", {"compat": "flow_grpo"}),
        ("unified-reward", {"order": "random"}),
        ("unified-reward", {"weights": {"style": 1.0}}),
        ("vlm-judge", {"model": "m", "listener": "jpeg"}),
        ("win-rate", {"judge": "jpeg", "opponents": 2.5}),
        ("edit-score", {"reduction": "median"}),
        ("edit-score", {"passes": 0}),
        ("win-rate", {"judge": "unified-reward"}),
        ("win-rate", {"judge": {"jpeg": 1.0}, "opponents": 0}),
    ],
)
def test_wrong_options_are_named(name, options):
    if name not in ("win-rate",) and options:
        options = {"endpoint": "http://127.0.0.1:9", **options}
    with pytest.raises(ValueError, match="expected|missing"):
        load(name, **options)


def test_an_endpoint_can_be_given_ready():
    endpoint = ChatEndpoint("http://127.0.0.1:9", "m")
    assert build.open_endpoint(endpoint) is endpoint
    assert build.unified_reward(endpoint=endpoint).spec.version.startswith("m@http://127.0.0.1:9/v1")


@pytest.mark.parametrize("options", [{}, {"mode": "pair"}])
def test_batches_and_sizes_do_not_matter(options):
    images = torch.cat([FOUR, greys(0.5)])
    with serve(brain) as server:
        together = score(load("vlm-judge", endpoint=at(server), **options), images).values
        order = torch.tensor([3, 1, 4, 0, 2])
        mixed = score(load("vlm-judge", endpoint=at(server), **options), images[order]).values
        wide = score(load("vlm-judge", endpoint=at(server), **options), images[..., :1, :].expand(-1, -1, 3, -1)).values
        assert score(load("vlm-judge", endpoint=at(server), **options), images[:0]).values.shape == (0,)
    assert mixed.tolist() == together[order].tolist() and wide.tolist() == together.tolist()
