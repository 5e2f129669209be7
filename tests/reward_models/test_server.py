"""The reward server: who may ask, what it takes, how it batches, and that nothing takes it down."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from benchmarks.service import Numbered, bad_files, fuzz, numbered_images, value_of
from reward_models import RewardError, RewardResult, RewardSpec, load, server, wire
from reward_models.batching import PATHS, public
from reward_models.service import Limits

TOKEN = "0123456789abcdef-token"
HTTP = httpx.Client(timeout=60, trust_env=False)


class Grouped:
    """Each image's share of the brightness of its group."""

    spec = RewardSpec("grouped", scope="group")

    def score(self, images: Any, prompts: Any, metadata: Any, groups: Any = None) -> RewardResult:
        assert "bad" not in prompts
        light = images.mean((1, 2, 3))
        return RewardResult(torch.stack([light[i] / light[groups == groups[i]].sum() for i in range(len(light))]))


class Gate:
    """Scores nothing before `open` is set."""

    spec = RewardSpec("gate")

    def __init__(self) -> None:
        self.open, self.calls = threading.Event(), 0

    def score(self, images: Any, prompts: Any, metadata: Any, groups: Any = None) -> RewardResult:
        assert self.open.wait(60)
        self.calls += 1
        return RewardResult(images.mean((1, 2, 3)))


def items(numbers: list[int], size: int = 8, **more: Any) -> list[dict[str, Any]]:
    pixels = (numbered_images(numbers, size) * 255).round().to(torch.uint8)
    return [
        {"image": wire.base64_of(wire.encode_png(image)), "prompt": str(n), **more}
        for n, image in zip(numbers, pixels, strict=True)
    ]


def ask(url: str, rows: list[dict[str, Any]], **more: Any) -> httpx.Response:
    return HTTP.post(f"{url}/score", json={"items": rows, **more})


def wait_for(url: str, metric: str, reached: Callable[[float], bool]) -> None:
    for _ in range(1000):
        text = HTTP.get(f"{url}/metrics").text
        if reached(float(re.search(rf"^flowrl_{metric}\S* (\S+)$", text, re.MULTILINE)[1])):  # type: ignore[index]
            return
        time.sleep(0.01)
    pytest.fail(f"{metric} stayed where it was")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server of several rewards with small limits."""
    rewards = {
        "numbered": Numbered(fails=97, unknown=89),
        "plain": Numbered(),
        "grouped": Grouped(),
        'a "b"\\': load("jpeg"),
    }
    limits = Limits(items=60, body=200_000, image_pixels=10_000, request_pixels=12_000, prompt=50)
    with server.running(rewards, limits=limits) as found:
        yield found


def test_health_tells_specs_and_limits(url: str) -> None:
    found = HTTP.get(f"{url}/health").json()
    assert found["status"] == "ok" and found["protocol"] == wire.PROTOCOL
    assert wire.spec_from_json(found["rewards"]["numbered"]) == Numbered.spec
    assert found["limits"]["items"] == 60 and found["limits"]["batch"] == 32


def test_metrics_follow_prometheus_and_count(url: str) -> None:
    def read() -> dict[str, float]:
        lines = HTTP.get(f"{url}/metrics").text.splitlines()
        sample = re.compile(r'flowrl_\w+(\{\w+="(\\.|[^"\\])*"\})? [-+0-9.e]+')
        assert all(line.startswith(("# HELP flowrl_", "# TYPE flowrl_")) or sample.fullmatch(line) for line in lines)
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    before = read()
    ask(url, items([1, 2, 89, 97]), reward="numbered")
    after = read()
    assert 'flowrl_calls_total{reward="a \\"b\\"\\\\"}' in after
    grown = {key: after[key] - before.get(key, 0) for key in after}
    assert grown['flowrl_images_total{reward="numbered"}'] == 4
    assert grown['flowrl_images_missing_total{reward="numbered"}'] == 2
    assert grown['flowrl_calls_failed_total{reward="numbered"}'] == 1
    assert grown['flowrl_requests_total{code="200"}'] == 1


def test_bad_images_are_missing_and_their_neighbours_are_scored(url: str) -> None:
    bad = [{"image": base64.b64encode(data).decode(), "prompt": ""} for data in bad_files(3).values()]
    bad.append({"image": "not base64!", "prompt": ""})
    numbers = list(range(1, len(bad) + 1))
    rows = [row for pair in zip(items(numbers), bad, strict=True) for row in pair]
    found = ask(url, rows, reward="plain").json()
    assert found["values"][::2] == value_of(torch.tensor(numbers)).tolist()
    assert found["reasons"][::2] == [None] * len(bad)
    harmless = list(bad_files(3)).index("more pixels than said")
    for i, (value, reason) in enumerate(zip(found["values"][1::2], found["reasons"][1::2], strict=True)):
        assert (value is not None) == (i == harmless)
        assert i == harmless or (reason.startswith("image refused: got") and "expected" in reason)


def test_only_the_images_that_fail_are_missing(url: str) -> None:
    found = ask(url, items([1, 97, 89, 2]), reward="numbered").json()
    assert [value is None for value in found["values"]] == [False, True, True, False]
    assert found["parts"]["number"] == [1, None, 89, 2]
    assert "cannot score that" in found["reasons"][1] and found["reasons"][2] == "unknown"


def test_images_of_a_request_have_one_size(url: str) -> None:
    rows = items([1]) + [items([2])[0] | {"image": wire.base64_of(wire.encode_png(torch.zeros(3, 4, 8).byte()))}]
    found = ask(url, rows, reward="numbered").json()
    assert found["values"][0] is not None and "expected one size" in found["reasons"][1]


def test_a_group_with_a_refused_image_is_missing_whole(url: str) -> None:
    rows = items([1, 2, 3, 4])
    for row, group in zip(rows, (7, -7, 7, -7), strict=True):
        row["group"] = group
    whole = ask(url, rows, reward="grouped").json()["values"]
    assert whole[0] + whole[2] == pytest.approx(1) and whole[1] + whole[3] == pytest.approx(1)
    rows[1]["image"] = ""
    found = ask(url, rows, reward="grouped").json()
    assert found["values"] == [whole[0], None, whole[2], None]
    assert "refused" in found["reasons"][1] and found["reasons"][3] == "another image of its group was refused"


def test_only_the_group_that_fails_is_missing(url: str) -> None:
    rows = items([1, 2, 3, 4, 5])
    for row, group in zip(rows, (7, -7, 7, 5, -7), strict=True):
        row["group"] = group
    whole = ask(url, rows, reward="grouped").json()["values"]
    rows[3]["prompt"] = "bad"
    found = ask(url, rows, reward="grouped").json()
    assert found["values"] == [*whole[:3], None, whole[4]] and "AssertionError" in found["reasons"][3]


@pytest.mark.parametrize(
    ("rows", "more", "status", "says"),
    [
        (items([1]) * 61, {}, 413, "at most 60"),
        ([items([1])[0] | {"prompt": "a" * 51}], {}, 413, "at most 50"),
        ([items([1])[0] | {"image": "A" * 300_000}], {}, 413, "at most 200000"),
        ([], {}, 422, "items"),
        (items([1]), {"id": "white space"}, 422, "id"),
        (items([1]), {"reward": "other"}, 404, "numbered, plain, grouped"),
        ([items([1])[0], items([1], group=1)[0]], {}, 422, "with and without a group"),
    ],
)
def test_what_exceeds_a_limit_is_refused(url: str, rows: Any, more: Any, status: int, says: str) -> None:
    response = ask(url, rows, **({"reward": "numbered"} | more))
    assert response.status_code == status and says in response.json()["error"]


def test_pixels_are_counted_over_a_request(url: str) -> None:
    large = wire.base64_of(wire.encode_png(torch.zeros(3, 80, 80).byte()))
    one = {"image": large, "prompt": ""}
    assert ask(url, [one], reward="numbered").status_code == 200
    assert ask(url, [one, one], reward="numbered").status_code == 413
    huge = wire.base64_of(wire.encode_png(torch.zeros(3, 101, 100).byte()))
    assert "10000 pixels" in ask(url, [{"image": huge, "prompt": ""}], reward="numbered").json()["reasons"][0]


def test_damaged_and_unframed_bodies_are_refused(url: str) -> None:
    body = wire.to_json({"reward": "numbered", "items": items([1])})
    head = {"content-type": "application/json"}
    response = HTTP.post(f"{url}/score", content=body, headers=head | {wire.DIGEST: wire.digest(body + b" ")})
    assert response.status_code == 400
    assert HTTP.post(f"{url}/score", content=iter([body]), headers=head).status_code == 411  # sent in chunks
    assert HTTP.post(f"{url}/score", content=body, headers={"content-type": "text/plain"}).status_code == 415
    answer = HTTP.post(f"{url}/score", content=body, headers=head)
    assert answer.headers[wire.DIGEST] == wire.digest(answer.content)


def test_chunks_do_not_get_round_the_length(url: str) -> None:
    """HTTP reads a body that is sent in chunks by these, whatever length it announces besides."""
    head = b"POST /score HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", httpx.URL(url).port or 80), timeout=30) as raw:
        raw.sendall(head + b"content-length: 9\r\ntransfer-encoding: chunked\r\n\r\n")
        with contextlib.suppress(OSError):  # it hangs up in between
            for _ in range(2000):
                raw.sendall(b"400\r\n" + b" " * 1024 + b"\r\n")
                time.sleep(0.0005)
            pytest.fail("took two megabytes for nine bytes")
    assert HTTP.get(f"{url}/health").status_code == 200


def test_what_json_is_read_into_is_bounded(url: str) -> None:
    limits = Limits(entries=1000)
    with server.running({"n": Numbered()}, limits=limits) as small:
        assert ask(small, [items([1])[0] | {"metadata": {"a": [[]] * 400}}]).status_code == 200
        refused = ask(small, [items([1])[0] | {"metadata": {"a": [[]] * 600}}])
    assert refused.status_code == 413 and "at most 1000" in refused.json()["error"]


def test_answers_are_kept_without_pixels() -> None:
    apps: list[Any] = []

    def keep(app: Any) -> Any:
        apps.append(app)
        return app

    with server.running({"n": Numbered()}, wrap=keep) as url:
        for n in (1, 2):
            assert ask(url, items([n]), id=f"n{n}").status_code == 200
        kept = apps[0].state.service._pending
        assert len(kept) == 2 and all(pending.job is None for pending in kept.values())


def test_the_token_is_asked_for_everywhere() -> None:
    with server.running({"n": Numbered()}, token=TOKEN) as url:
        for given in ("", TOKEN, f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", f"bearer {TOKEN}", "Bearer ü"):
            head = {"authorization": given.encode()}
            for path in ("/health", "/metrics"):
                assert HTTP.get(url + path, headers=head).status_code == 401
            refused = HTTP.post(f"{url}/score", content=b"x" * 1000, headers=head)
            assert refused.status_code == 401 and TOKEN not in refused.text
        assert HTTP.get(f"{url}/health", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200


def test_who_sends_no_request_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_S", 0.2)
    rows, gate = items([1]), Gate()
    with server.running({"gate": gate}, token=TOKEN) as url, ThreadPoolExecutor(1) as pool:
        head = {"authorization": f"Bearer {TOKEN}"}
        slow = pool.submit(HTTP.post, f"{url}/score", json={"items": rows}, headers=head)
        for start in (b"", b"GET /health HTTP/1.1\r\nhost", b"GET /a HTTP/1.1\r\nhost: a\r\n\r\nGET"):
            with socket.create_connection(("127.0.0.1", httpx.URL(url).port or 80), timeout=30) as raw:
                raw.sendall(start)
                while raw.recv(1000):
                    pass  # the end, and not a timeout
        gate.open.set()
        assert slow.result().status_code == 200, "to wait for a score is another thing"


def test_what_others_can_reach_needs_a_token() -> None:
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        assert not server.is_loopback(host)
        with pytest.raises(ValueError, match="without a token"):
            server.serve({"n": Numbered()}, host=host)
    assert all(server.is_loopback(host) for host in ("localhost", "127.0.0.1", "127.1.2.3", "::1"))
    with pytest.raises(ValueError, match="at least 16"):
        server.create_app({"n": Numbered()}, token="short")
    with pytest.raises(ValueError, match="at least one"):
        server.create_app({})
    with pytest.raises(ValueError, match="limit queue = 0"):
        Limits(queue=0)
    taken = server.listen("127.0.0.1", 0, None)
    with taken, pytest.raises(ValueError, match="expected a free one"):
        server.listen("127.0.0.1", taken.getsockname()[1], None)


def test_requests_that_wait_are_scored_together_and_each_gets_its_own() -> None:
    scorer = Numbered(seconds=0.002)
    with server.running({"n": scorer}, batch=8, wait_s=0.05) as url, ThreadPoolExecutor(12) as pool:
        numbers = list(range(1, 49))
        found = list(pool.map(lambda n: ask(url, items([n], 8 - n % 2)).json()["values"][0], numbers))
        text = HTTP.get(f"{url}/metrics").text
    assert found == value_of(torch.tensor(numbers)).tolist()
    calls = int(re.search(r"^flowrl_calls_total.* (\d+)$", text, re.MULTILINE)[1])  # type: ignore[index]
    assert 6 <= calls <= 24, "48 requests of two sizes in calls of at most 8"
    assert set(scorer.scored.values()) == {1}


def test_a_full_queue_says_when_to_come_back_and_late_answers_are_kept() -> None:
    gate = Gate()
    limits = Limits(queue=2, timeout_s=0.3)
    with server.running({"gate": gate}, limits=limits, batch=1) as url, ThreadPoolExecutor(4) as pool:
        first = ask(url, items([1]), id="first")  # is being scored when its time is over
        assert first.status_code == 504 and "Ask again" in first.json()["error"]
        waiting = [pool.submit(ask, url, items([n]), id=f"w{n}") for n in (2, 3)]
        wait_for(url, "images_waiting", lambda images: images == 2)
        full = ask(url, items([4]))
        assert full.status_code == 503 and int(full.headers["retry-after"]) >= 1
        assert [w.result().status_code for w in waiting] == [504, 504]
        assert HTTP.get(f"{url}/health").json()["status"] == "stalled"
        gate.open.set()
        again = [ask(url, items([n]), id=name).json() for n, name in ((1, "first"), (2, "w2"), (3, "w3"))]
        assert all(answer["values"][0] is not None for answer in again) and gate.calls == 3
        assert HTTP.get(f"{url}/health").json()["status"] == "ok"


def test_what_nobody_asks_for_any_more_is_not_scored() -> None:
    gate = Gate()
    with server.running({"gate": gate}, limits=Limits(timeout_s=0.05), batch=1) as url:
        for n in (1, 2):
            assert ask(url, items([n]), id=f"n{n}").status_code == 504
        time.sleep(0.15)
        gate.open.set()
        assert ask(url, items([1]), id="n1").json()["values"][0] is not None
        assert gate.calls == 1  # the second was forgotten by whoever sent it


def test_the_same_request_is_scored_once() -> None:
    scorer = Numbered(seconds=0.05)
    with server.running({"n": scorer}) as url, ThreadPoolExecutor(4) as pool:
        rows = items([5, 6])
        answers = [f.result().json() for f in [pool.submit(ask, url, rows, id="x") for _ in range(4)]]
        answers.append(ask(url, rows, id="x").json())
        assert all(answer == answers[0] for answer in answers) and scorer.scored == {5: 1, 6: 1}
        ask(url, items([5]), id="x")  # another request under the same id
        ask(url, rows)  # and without one
        assert scorer.scored == {5: 3, 6: 2}


def test_memory_is_bounded_and_given_back() -> None:
    gate = Gate()
    rows = [{"image": wire.base64_of(wire.encode_png(torch.zeros(3, 100, 100).byte())), "prompt": ""}]
    with server.running({"gate": gate}, limits=Limits(memory=80_000)) as url, ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, url, rows)
        wait_for(url, "memory_bytes", lambda held: held > 70_000)  # four bytes a pixel in transit, and three unpacked
        refused = ask(url, [rows[0] | {"image": "A" * 20_000}])
        assert refused.status_code == 503 and "retry-after" in refused.headers
        gate.open.set()
        assert first.result().status_code == 200
        wait_for(url, "memory_bytes", lambda held: held == 0)


def test_a_reward_that_breaks_its_thread_breaks_only_its_request() -> None:
    def leaves(images: Any, prompts: Any, metadata: Any) -> Any:
        raise SystemExit(1) if prompts[0] == "1" else RuntimeError("in /home/someone/secret/model.py")

    reward = type("Leaves", (), {"spec": RewardSpec("leaves"), "score": lambda self, *a: leaves(*a[:3])})()
    with server.running({"leaves": reward}) as url:
        assert ask(url, items([1])).status_code == 500
        reason = ask(url, items([2])).json()["reasons"][0]
        assert "RuntimeError" in reason and "[path]" in reason and "someone" not in reason


def test_paths_are_taken_out_of_messages() -> None:
    assert public(ValueError("no file /data/weights/x.pt here")) == "ValueError: no file [path] here"
    assert PATHS.sub("", "values in [0, 1] and/or a/b") == "values in [0, 1] and/or a/b"


def test_bad_requests_never_take_it_down() -> None:
    found = fuzz(500, seed=1)
    assert found["sent"] == 500 and found["alive"] and not found["server_errors"] and found["memory"] == 0
    assert found["statuses"][401] > 30 and found["statuses"][422] > 50


CHILD = """
import sys, time
import torch

def heavy(images, prompts, metadata):
    time.sleep(float(prompts[0]))
    return [float(bool({"diffusers", "transformers", "timm", "torchvision"} & set(sys.modules)))] * len(images)
"""


def test_the_command_serves_without_heavy_libraries_and_ends_when_all_is_answered(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(CHILD)
    command = [sys.executable, "-m", "flowrl", "serve", "slow=mine.py:heavy", "--port", "0", "--token-env", "KEY"]
    environment = {**os.environ, "PYTHONPATH": str(Path(server.__file__).parents[1]), "KEY": TOKEN}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            url = child.stdout.readline().split()[-1]
            head = {"authorization": f"Bearer {TOKEN}"}
            HTTP.get(f"{url}/health", headers=head).raise_for_status()
            with ThreadPoolExecutor(1) as pool:
                body = {"items": [items([1])[0] | {"prompt": "1.0"}]}
                answer = pool.submit(HTTP.post, f"{url}/score", json=body, headers=head)
                time.sleep(0.5)
                child.send_signal(signal.SIGTERM)
                assert json.loads(answer.result().content)["values"] == [0.0]
            assert child.wait(60) == -signal.SIGTERM
        finally:
            child.kill()


def test_the_official_package_gets_prompt_and_picture_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the package, which cannot be installed beside the other requirements."""
    seen: list[Any] = []

    class Model:
        def eval(self) -> Model:
            return self

        def score(self, prompt: str, image: Any) -> float:
            seen.append((prompt, image.mode, image.size, image.getpixel((2, 1))))
            return float(len(prompt))

    package = types.SimpleNamespace(load=lambda name, device, med_config: Model())
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.5")
    monkeypatch.setitem(sys.modules, "ImageReward", package)
    reward = load("reward_models.image_reward_package:ImageRewardPackage")
    images = numbered_images([1, 2], size=5)
    assert reward.score(images, ["ab", "c"], [{}, {}]).values.tolist() == [2, 1]
    pixels = (images[:, :, 1, 2] * 255).round().int().tolist()
    assert seen == [("ab", "RGB", (5, 5), tuple(pixels[0])), ("c", "RGB", (5, 5), tuple(pixels[1]))]
    assert reward.spec.version == "1.5 ImageReward-v1.0"
    monkeypatch.setitem(sys.modules, "ImageReward", None)
    with pytest.raises(RewardError, match="image_reward.txt"):
        load("reward_models.image_reward_package:ImageRewardPackage")
