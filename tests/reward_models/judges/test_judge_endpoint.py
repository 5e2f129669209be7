"""The endpoint's client against a server that behaves, and one that does not."""

import io
import json
import socket

import numpy as np
import pytest
import torch
from judge_server import decode, greys, serve
from PIL import Image

from reward_models.judges.endpoint import Answer, AnswerCache, ChatEndpoint, Question, ask_parsed, pictures
from reward_models.judges.grammars import final_score
from reward_models.protocol import RewardError


def level(text, images, body):
    """The mean pixel of each image, as text."""
    return " ".join(f"{image.mean():.0f}" for image in images)


def quick(url, **options):
    return ChatEndpoint(url, "judge", **{"pause": 0.01, "deadline": 5.0, **options})


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_what_is_sent():
    images = pictures(greys(0.2, 0.8))
    with serve(level) as server:
        [answer] = quick(server.url, seed=7, max_tokens=55, thinking=False, extra={"top_p": 0.5}).ask(
            [Question("which?", tuple(images), seed=3)]
        )
    assert answer == Answer("51 204")
    [body] = server.bodies
    content = body.pop("messages")[0]["content"]
    assert body == {
        "model": "judge",
        "temperature": 0.0,
        "seed": 10,
        "max_tokens": 55,
        "top_p": 0.5,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert [part["type"] for part in content] == ["image_url", "image_url", "text"]
    assert content[0]["image_url"]["url"].startswith("data:image/png;base64,")


def test_png_arrives_bit_for_bit_and_other_forms_as_they_are_called():
    image = torch.rand(1, 3, 30, 17, generator=torch.Generator().manual_seed(0))
    expected = (image * 255).round().byte()[0].permute(1, 2, 0).numpy()
    assert np.array_equal(decode(pictures(image)[0].url), expected)
    assert decode(pictures(image, "png512")[0].url).shape == (512, 512, 3)
    assert pictures(image, "png512")[0].url.startswith("data:image;base64,")
    jpeg = io.BytesIO()
    Image.fromarray(expected).save(jpeg, format="JPEG", quality=95)
    assert np.array_equal(decode(pictures(image, "jpeg")[0].url), np.asarray(Image.open(jpeg)))


def test_digests_tell_content_shape_and_form_apart():
    image = torch.rand(1, 3, 4, 6)
    digests = {
        pictures(x, f)[0].digest for x, f in ((image, "png"), (image, "jpeg"), (image.reshape(1, 3, 6, 4), "png"))
    }
    assert len(digests) == 3 and pictures(image)[0].digest == pictures(image.clone())[0].digest


def test_equal_questions_are_asked_once_and_kept():
    a, b = pictures(greys(0.2, 0.8))
    with serve(level) as server:
        endpoint = quick(server.url)
        questions = [Question("?", (a,)), Question("?", (b,)), Question("?", (a,)), Question("!", (a,))]
        assert [answer.text for answer in endpoint.ask(questions)] == ["51", "204", "51", "51"]
        assert len(server.bodies) == 3
        endpoint.ask(questions)
        endpoint.ask([Question("?", (a,), seed=1)])
        assert len(server.bodies) == 4
    assert endpoint.counts == {"asked": 9, "cached": 5, "tries": 4}


def test_a_folder_keeps_answers_over_runs(tmp_path):
    question = Question("?", tuple(pictures(greys(0.2))))
    with serve(level) as server:
        for options in ({}, {}, {"temperature": 0.5}, {"max_tokens": 9}, {"seed": 4}, {"version": "a"}):
            assert quick(server.url, cache=tmp_path, **options).ask([question])[0].text == "51"
        assert len(server.bodies) == 5  # only the second found its answer
        with serve(level) as moved:  # the same weights at another address
            quick(moved.url, cache=tmp_path, version="a").ask([question])
            assert not moved.bodies
    files = list(tmp_path.rglob("*.json"))
    assert len(files) == 5 and not [f for f in tmp_path.rglob("*") if f.is_file() and f.suffix != ".json"]
    assert json.loads(files[0].read_text())["text"] == "51"


def test_a_spoilt_file_is_asked_again(tmp_path):
    cache = AnswerCache(tmp_path)
    cache.put("abc", Answer("text", reasoning="why", cut=True))
    assert AnswerCache(tmp_path).get("abc") == Answer("text", reasoning="why", cut=True)
    for content in ("{", "[]", '{"other": 1}'):
        (tmp_path / "ab" / "abc.json").write_text(content)
        assert AnswerCache(tmp_path).get("abc") is None
    small = AnswerCache(size=2)
    for key in "abc":
        small.put(key, Answer(key))
    assert small.get("a") is None and small.get("c") == Answer("c")


@pytest.mark.parametrize("fault", ["500", "502", "503", "429", "408", "drop", "garbage", "wrong", "empty", "huge"])
def test_faults_that_pass_are_waited_for(fault):
    with serve(level, iter([fault, fault])) as server:
        [answer] = quick(server.url).ask([Question("?", tuple(pictures(greys(0.2))))])
    assert answer.text == "51" and len(server.bodies) == 3


def test_a_pause_that_is_no_number_is_not_waited_for():
    with serve(level, iter(["429 \u00b2"])) as server:
        assert quick(server.url).ask([Question("?")])[0].text == ""
    assert len(server.bodies) == 2


@pytest.mark.parametrize("fault", ["400", "401", "404", "422", "cut"])
def test_faults_that_stay_are_not_tried_again(fault):
    with serve(level, iter([fault] * 9)) as server:
        [answer] = quick(server.url).ask([Question("?")])
    assert answer.text is None and len(server.bodies) == 1
    assert ("raise max_tokens" if fault == "cut" else f"HTTP {fault}") in answer.reason


def test_failures_are_not_kept():
    with serve(level, iter(["400"])) as server:
        endpoint = quick(server.url)
        assert endpoint.ask([Question("?")])[0].text is None
        assert endpoint.ask([Question("?")])[0].text == ""
    assert endpoint.counts["failed"] == 1


def test_a_slow_answer_runs_into_the_timeout_and_is_asked_for_again():
    with serve(level, iter(["slow"])) as server:
        [answer] = quick(server.url, timeout=0.5, deadline=60).ask([Question("?", tuple(pictures(greys(0.2))))])
    assert answer.text == "51" and len(server.bodies) > 1


def test_an_answer_without_end_is_left_at_the_deadline():
    with serve(level, iter(["drip"] * 9)) as server:
        [answer] = quick(server.url, deadline=0.5).ask([Question("?")])
    assert answer.text is None and "tries in" in answer.reason and len(server.bodies) <= 1


def test_a_dead_server_costs_one_deadline():
    endpoint = quick(f"http://127.0.0.1:{free_port()}", deadline=0.5, workers=2)
    answers = endpoint.ask([Question(str(i)) for i in range(40)])
    assert all(a.text is None and "ConnectError" in a.reason for a in answers)
    waited = {float(a.reason.rpartition(" tries in ")[2].removesuffix(" s)")) for a in answers}
    assert len(waited) <= 2  # the two that were in flight; the others were given up with them
    with pytest.raises(RewardError, match="Start the server"):
        endpoint.check()


def test_a_closed_door_is_knocked_at_once():
    with serve(level, iter(["401"] * 99)) as server:
        answers = quick(server.url, workers=2).ask([Question(str(i)) for i in range(40)])
    assert all("HTTP 401" in a.reason for a in answers) and len(server.bodies) <= 2


def test_one_question_that_always_fails_does_not_stop_the_others():
    def brain(text, images, body):
        if text == "3":
            raise OSError  # the connection ends without an answer
        return text

    with serve(brain, delay=0.05) as server:
        answers = quick(server.url, deadline=2.0, workers=2).ask([Question(str(i)) for i in range(30)])
    assert [a.text for a in answers] == [None if i == 3 else str(i) for i in range(30)]


def test_no_more_questions_in_flight_than_workers():
    with serve(level, delay=0.02) as server:
        quick(server.url, workers=3).ask([Question(str(i)) for i in range(20)])
    assert server.busiest <= 3 and len(server.bodies) == 20


def test_many_questions_under_many_faults_all_come_back_right():
    kinds = ["", "", "", "500", "", "drop", "", "garbage", "", "429", "wrong", ""]
    with serve(lambda text, *_: f"echo {text}", iter(kinds * 100)) as server:
        answers = quick(server.url, workers=8, deadline=30).ask([Question(str(i)) for i in range(200)])
    assert [a.text for a in answers] == [f"echo {i}" for i in range(200)]


def test_reasoning_beside_the_answer_is_kept():
    from judge_server import completion

    from reward_models.judges.endpoint import _read

    answer = _read(completion("Final Score: 2", "length", reasoning_content="because"))
    assert answer == Answer("Final Score: 2", reasoning="because", cut=True)
    assert _read(completion([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])).text == "ab"


def test_unparsable_answers_are_asked_again_only_at_a_temperature():
    said = iter(["hm", "well", "Final Score: 4", "hm", "hm", "hm"])
    with serve(lambda *_: next(said)) as server:
        endpoint = quick(server.url, temperature=0.7, workers=1)
        first, second = (ask_parsed(endpoint, [Question(q)], [final_score], attempts=3)[0] for q in "ab")
        with pytest.raises(ValueError, match="temperature 0"):
            ask_parsed(quick(server.url), [Question("?")], [final_score], attempts=2)
    assert (first.value, first.reason) == (4.0, None)
    assert second.value is None and "no final score" in second.reason
    assert len({body["seed"] for body in server.bodies}) == 3


def test_check():
    with serve(level) as server:
        quick(server.url).check()
        with pytest.raises(RewardError, match="serves judge, expected 'other'"):
            ChatEndpoint(server.url, "other").check()
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(RewardError, match="ReadTimeout"):
        quick(f"http://127.0.0.1:{silent.getsockname()[1]}").check(timeout=0.2)
    with serve(level, model="models/judge") as server:
        quick(server.url).check()
    for status, there in ((404, True), (405, True), (401, False), (503, False)):
        with serve(level, listing=status) as server:
            if there:
                quick(server.url).check()
            else:
                with pytest.raises(RewardError, match=str(status)):
                    quick(server.url).check()


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serve(level) as server:
        quick(server.url).check()
        assert quick(server.url).ask([Question("?", tuple(pictures(greys(0.2))))])[0].text == "51"


def test_what_changes_answers_changes_the_fingerprint():
    url = "http://127.0.0.1:9"
    others = ({"temperature": 0.5}, {"seed": 4}, {"max_tokens": 9}, {"thinking": True}, {"version": "a"})
    prints = {quick(url, **options).fingerprint for options in ({}, *others)}
    assert len(prints) == 6 and quick(url, workers=2, timeout=3.0).fingerprint in prints


def test_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    with serve(level) as server:
        endpoint = quick(server.url, api_key_env="JUDGE_KEY")
        endpoint.ask([Question("?")])
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert "secret" not in endpoint.identity + repr(endpoint.settings)
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ValueError, match="JUDGE_KEY"):
        quick("http://127.0.0.1:1", api_key_env="JUDGE_KEY")


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("http://h:1", "http://h:1/v1/chat/completions"),
        ("http://h:1/v1/", "http://h:1/v1/chat/completions"),
        ("https://h/x/v1/chat/completions", "https://h/x/v1/chat/completions"),
    ],
)
def test_urls(given, used):
    assert ChatEndpoint(given, "m").url == used


@pytest.mark.parametrize(
    "options",
    [
        {"url": "h:1"},
        {"url": "http://h:port"},
        {"workers": 0},
        {"max_tokens": 0},
        {"deadline": 0.0},
        {"timeout": -1.0},
        {"extra": {"seed": 1}},
    ],
)
def test_impossible_settings(options):
    with pytest.raises(ValueError, match="expected"):
        ChatEndpoint(**{"url": "http://h:1", "model": "m", **options})
