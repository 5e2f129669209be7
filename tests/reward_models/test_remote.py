"""A remote reward behaves as the local one, and under faults nothing is lost, doubled or wrong."""

from __future__ import annotations

import http.server
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from benchmarks.service import Numbered, numbered_images, soak, value_of
from flowrl.commands.check import served
from flowrl.config import load_config
from flowrl.errors import UserError
from reward_models import RewardError, RewardResult, RewardSpec, checked_score, load, server, wire
from reward_models.loading import UserReward
from reward_models.remote import LIMITS, TOKEN_VARIABLE, RemoteReward
from reward_models.service import Limits
from reward_models.shapes import grammar

TOKEN = "0123456789abcdef-token"


def same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def equal(a: RewardResult, b: RewardResult) -> bool:
    """Equal to the last bit in all that a result holds."""
    return (
        same(a.values, b.values)
        and list(a.parts) == list(b.parts)
        and all(same(a.parts[name], b.parts[name]) for name in b.parts)
        and a.reasons == b.reasons
        and same(a.uncertainty, b.uncertainty)
        and same(a.region_map, b.region_map)
    )


class Everything:
    """A result with every field, NaN with and without a reason, and prompts and metadata in use."""

    def __init__(self, scope: Any = "point") -> None:
        self.spec = RewardSpec("everything", "7", scope, (0.0, float("inf")), False, "MIT", "none", True)
        self.calls: list[tuple[list[str], list[int] | None]] = []

    def score(self, images: Tensor, prompts: Any, metadata: Any, groups: Tensor | None = None) -> RewardResult:
        self.calls.append((list(prompts), None if groups is None else groups.tolist()))
        values = images.double().mean((1, 2, 3)) * torch.tensor([entry.get("scale", 1.0) for entry in metadata])
        if self.spec.scope != "point":
            ids = torch.zeros(len(images)) if groups is None or self.spec.scope == "set" else groups
            values = torch.stack([value - values[ids == i].mean() for value, i in zip(values, ids, strict=True)])
        values[[i for i, prompt in enumerate(prompts) if "lost" in prompt]] = float("nan")
        reasons = ["because ü" if prompt == "lost" else "as said" if prompt == "red" else None for prompt in prompts]
        red = images[:, 0].mean((1, 2))
        return RewardResult(
            values, {"red": red, "a/b ü": values}, reasons, red.sqrt().double(), images[:, 0, ::3, ::2].half()
        )


def batch(n: int, size: tuple[int, int] = (9, 14)) -> tuple[Tensor, list[str], list[dict[str, Any]]]:
    images = torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(n))  # not yet on the 8-bit grid
    prompts = [("red", "lost", "lost for good", "", "日本語 🎨 " * 50)[i % 5] for i in range(n)]
    return images, prompts, [{"scale": 0.1 * i, "nested": {"a": [None, True, "x"]}} if i % 2 else {} for i in range(n)]


@pytest.mark.parametrize("scope", ["point", "group", "set"])
@pytest.mark.parametrize("n", [1, 5, 37])
def test_remote_is_local_to_the_last_bit(scope: str, n: int) -> None:
    images, prompts, metadata = batch(n)
    groups = torch.arange(n) * 7 % 4 - 2
    if n == 5:
        images = (images * 255).byte()
    local, behind = Everything(scope), Everything(scope)
    with server.running({"everything": behind}, batch=5) as url:
        remote = RemoteReward(url, parallel=3)
        for given in (groups, None):
            there = checked_score(remote, images, prompts, metadata, given, all_missing="allow")
            assert equal(there, checked_score(local, images, prompts, metadata, given, all_missing="allow"))
        assert remote.spec.version == "7" and remote.spec.scope == scope and not remote.spec.higher_is_better
        assert not remote.spec.differentiable and not hasattr(remote, "differentiable")
        remote.close()
    if scope == "set":
        assert [len(prompts) for prompts, _ in behind.calls] == [n, n]
    if scope == "group":  # whole groups, under their own numbers; all of it where the groups are not known
        for found, numbers in behind.calls[:-1]:
            assert numbers is not None and len(found) == sum((groups == g).sum() for g in set(numbers))
        assert behind.calls[-1] == (prompts, None)
    if scope == "point":
        assert all(numbers is None and len(found) <= 5 for found, numbers in behind.calls)


def test_a_function_that_asks_for_groups_gets_them_whole() -> None:
    def same_group(images: Tensor, prompts: Any, metadata: Any, groups: Tensor) -> Tensor:
        return (groups[:, None] == groups).sum(1).double()

    reward = UserReward("mine", same_group)
    assert reward.spec.scope == "group"
    with server.running({"mine": reward}, batch=2) as url:
        values = load(url).score(torch.rand(7, 3, 4, 4), [""] * 7, [{}] * 7, torch.tensor([0, 1, 0, 2, 0, 2, 9])).values
    assert values.tolist() == [3, 1, 3, 2, 3, 2, 1]


def test_a_shipped_reward_and_a_sum_with_a_remote_part_agree_with_local_ones() -> None:
    metadata = grammar.prompts("test", per_task=2)[:12]
    images = torch.rand(12, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    texts = [str(entry["prompt"]) for entry in metadata]
    with server.running({"shapes-soft": load("shapes-soft"), "jpeg": load("jpeg")}) as url:
        whole = {
            "soft": {"weight": 0.3, "reward": f"{url}#shapes-soft"},
            "jpeg": {"weight": 2, "reward": f"{url}#jpeg"},
        }
        there = checked_score(load(whole), images, texts, metadata)
        here = checked_score(
            load({"soft": {"weight": 0.3, "reward": "shapes-soft"}, "jpeg": 2}), images, texts, metadata
        )
    assert equal(there, here)


def test_a_network_agrees_to_the_last_bit_where_calls_are_kept() -> None:
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 77), torch.nn.Tanh(), torch.nn.Linear(77, 1))

    class Net:
        spec = RewardSpec("net")

        def score(self, images: Tensor, prompts: Any, metadata: Any, groups: Any = None) -> RewardResult:
            with torch.no_grad():
                return RewardResult(layers(images)[:, 0])

    images = torch.rand(23, 3, 8, 8)
    with server.running({"net": Net()}, batch=1) as url:
        there = checked_score(RemoteReward(url, per_request=23), images, [""] * 23)
    assert torch.equal(there.values, checked_score(Net(), images, [""] * 23).values)


# ---- the check at the start


def seconds(call: Callable[[], Any]) -> float:
    begun = time.monotonic()
    call()
    return time.monotonic() - begun


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


def test_a_server_that_is_not_there_is_told_in_seconds() -> None:
    url = f"http://127.0.0.1:{free_port()}"

    def try_it() -> None:
        with pytest.raises(RewardError, match=rf"no answer from {url} .*flowrl serve clip --port"):
            load(f"{url}#clip")

    assert seconds(try_it) < 5


def test_wrong_names_tokens_and_urls_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with server.running({"a": Numbered(), "b": Numbered()}, token=TOKEN) as url:
        with pytest.raises(ValueError, match=f"environment variable {TOKEN_VARIABLE}"):
            load(f"{url}#a")
        monkeypatch.setenv("MY_TOKEN", TOKEN + "x")
        with pytest.raises(ValueError, match="environment variable MY_TOKEN") as caught:
            load(f"{url}#a", token_env="MY_TOKEN")
        assert TOKEN not in str(caught.value)
        monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
        assert load(f"{url}#a").spec.name == "numbered"
        for wrong in (url, f"{url}#c"):
            with pytest.raises(ValueError, match="expected one of a, b"):
                load(wrong)
        with pytest.raises(ValueError, match="two|names 'a'"):
            RemoteReward(f"{url}#a", "b")
    for wrong in ("http://", "ftp://a", "http://user:secret@host", "http://host:99999", "http://h?x=1"):
        with pytest.raises(ValueError, match="expected http://HOST:PORT") as caught:
            RemoteReward(wrong)
        assert "secret" not in str(caught.value)
    with pytest.raises(ValueError, match="expected those of"):
        load("http://127.0.0.1:1", tiemout=3)
    with pytest.raises(ValueError, match="deadline 0"):
        RemoteReward("http://127.0.0.1:1", deadline=0)


class Canned(http.server.BaseHTTPRequestHandler):
    """Answers from `replies`, a list of (status, body) that lasts; None sends a byte now and then, for ever."""

    replies: list[tuple[int, bytes] | None] = []
    asked = 0
    digest = False

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        type(self).asked += 1
        reply = self.replies[0] if len(self.replies) == 1 else self.replies.pop(0)
        if reply is None:
            self.send_response(200)
            self.send_header("content-length", "100000")
            self.end_headers()
            try:
                for _ in range(200):
                    self.wfile.write(b" ")
                    time.sleep(0.05)
            except OSError:
                return
        else:
            self.send_response(reply[0])
            self.send_header("content-length", str(len(reply[1])))
            if self.digest:
                self.send_header(wire.DIGEST, wire.digest(reply[1]))
            self.end_headers()
            self.wfile.write(reply[1])

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.do_GET()


@pytest.fixture
def canned() -> Iterator[tuple[str, type[Canned]]]:
    handler = type("Handler", (Canned,), {"replies": [], "asked": 0, "digest": False})
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    httpd.daemon_threads = True
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}", handler
    httpd.shutdown()
    httpd.server_close()


def health(**changes: Any) -> bytes:
    app = server.create_app({"numbered": Numbered()})
    return json.dumps(app.state.service.health() | changes).encode()


@pytest.mark.parametrize(
    "reply",
    [
        (200, b"<html>hello</html>"), (500, b""), (200, b"[]"), (200, b'{"protocol": 1}'), (404, b"{}"),
        (200, health(protocol=99)), (200, health(rewards={})), (200, health(limits={})),
        (200, health(rewards={"a": {"name": "a"}})), (200, health(limits=dict.fromkeys(LIMITS, "many"))),
        (200, health(limits=dict.fromkeys(LIMITS, 0))),
    ],
)  # fmt: skip
def test_what_is_no_reward_server_is_told(canned: Any, reply: tuple[int, bytes]) -> None:
    url, handler = canned
    handler.replies = [reply]
    with pytest.raises(RewardError, match="no reward server of protocol|same version"):
        RemoteReward(url)


def test_validate_asks_the_servers_that_a_config_names() -> None:
    with server.running({"numbered": Numbered()}) as url:
        config = load_config("quickstart", [f"reward={{far: {{weight: 1, reward: '{url}'}}, shapes: 1}}"])
        assert list(served(config)) == [f"reward server: {url} serves numbered, version 1"]
    with pytest.raises(UserError, match="no answer from"):
        list(served(config))


# ---- faults


def test_faults_lose_nothing_and_double_nothing() -> None:
    found = soak(800, 16, 0.2, slow_s=0.2, hasty=2, seed=3, calls=5)
    assert found["right"] + found["missing"] == 800 and found["right"] > 600
    assert not found["wrong"] and not found["lost"] and not found["scored_twice"] and not found["unexplained"]
    assert set(found["reasons"]) <= {"unknown", "cannot score that", "gave no score"}
    assert sum(count for kind, count in found["faults"].items() if kind != "none") > 5


def test_without_faults_only_what_has_no_score_is_missing() -> None:
    found = soak(500, 16, 0.0, fails=97, unknown=89)
    assert found["missing"] == 500 // 97 + 500 // 89 and found["right"] == 500 - found["missing"]


def test_batches_are_full_and_scoring_dominates() -> None:
    scorer = Numbered(seconds=0.02)
    numbers = list(range(1, 97))
    images = numbered_images(numbers, 256)
    with server.running({"n": scorer}, batch=32) as url:
        reward = RemoteReward(url)
        checked_score(reward, images[:1], [""])
        begun = time.process_time()  # not the clock on the wall, which other programs may hold up
        values = checked_score(reward, images, [""] * 96).values
        took = time.process_time() - begun
        assert 'flowrl_calls_total{reward="n"} 4' in httpx.get(f"{url}/metrics").text
    assert torch.equal(values, value_of(torch.tensor(numbers)))
    assert took < 0.33 * 96 * 0.02, "client and server together leave two thirds of a core to the scorer"


def test_a_request_is_sent_in_pieces_of_one_image() -> None:
    """As one string of many megabytes, it would be copied again each time the socket has taken a part of it."""
    seen: list[Any] = []

    class Recorder(httpx.BaseTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            seen.append((request.headers, [len(piece) for piece in request.stream]))  # type: ignore[union-attr]
            return httpx.Response(503, stream=httpx.ByteStream(b""))

    with server.running({"n": Numbered()}) as url:
        reward = RemoteReward(url, deadline=0.2, per_request=8)
        reward.close()
    reward._http = httpx.Client(transport=Recorder())
    assert reward.score(numbered_images(list(range(8)), 64), [""] * 8, [{}] * 8).missing.all()
    for headers, sizes in seen:
        assert len(sizes) == 9 and max(sizes) < 2 * 64 * 64 * 4
        assert headers["content-length"] == str(sum(sizes)) and "transfer-encoding" not in headers


def scored(url: str, n: int = 3, **options: Any) -> RewardResult:
    reward = RemoteReward(url, **options)
    try:
        return checked_score(reward, numbered_images(list(range(1, n + 1))), [""] * n, all_missing="allow")
    finally:
        reward.close()


def test_a_busy_server_is_asked_again_when_it_says_so() -> None:
    waits: Counter[str] = Counter()

    def wrap(app: Any) -> Any:
        async def twice_busy(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http" and scope["path"] == "/score" and waits["busy"] < 2:
                waits["busy"] += 1
                head = [(b"content-length", b"0"), (b"retry-after", b"1")]
                await send({"type": "http.response.start", "status": 503, "headers": head})
                await send({"type": "http.response.body", "body": b""})
            else:
                await app(scope, receive, send)

        return twice_busy

    with server.running({"n": Numbered()}, wrap=wrap) as url:
        begun = time.monotonic()
        assert not scored(url).missing.any()
        assert time.monotonic() - begun > 1.9 and waits["busy"] == 2


def test_a_server_that_dies_makes_images_missing_within_the_deadline() -> None:
    with server.running({"n": Numbered()}) as url:
        reward = RemoteReward(url, deadline=0.5, per_request=1, parallel=4)
        assert not checked_score(reward, numbered_images([1, 2]), ["", ""]).missing.any()
    begun = time.monotonic()
    found = checked_score(reward, numbered_images(list(range(1, 41))), [""] * 40, all_missing="allow")
    assert time.monotonic() - begun < 5, "one deadline for all forty requests, not one for each"
    assert found.missing.all() and all("gave no score within 0.5 s" in str(reason) for reason in found.reasons)
    with pytest.raises(RewardError, match="NaN for all"):
        checked_score(reward, numbered_images([1]), [""])


def test_refusals_are_not_repeated(canned: Any) -> None:
    url, handler = canned
    handler.replies = [(200, health()), (413, b'{"error": "too large"}')]
    found = scored(url, per_request=3)
    assert found.missing.all() and "refused the request: status 413" in str(found.reasons[0])
    assert handler.asked == 2


def test_an_answer_to_another_request_is_not_taken(canned: Any) -> None:
    url, handler = canned
    other = wire.result_to_json(RewardResult(torch.tensor([0.5]), {}, [None]))
    answer = wire.to_json({"protocol": 1, "id": "f" * 32, "name": "numbered", "version": "1"} | other)
    handler.replies, handler.digest = [(200, health()), (200, answer)], True
    found = scored(url, n=1, deadline=0.4)
    assert found.missing.all() and "answers another request" in str(found.reasons[0]) and handler.asked > 2


def test_an_answer_that_never_ends_is_given_up(canned: Any) -> None:
    url, handler = canned
    handler.replies = [(200, health()), None]
    begun = time.monotonic()
    found = scored(url, timeout=0.2, deadline=0.5)
    assert found.missing.all() and "longer than" in str(found.reasons[0]) and time.monotonic() - begun < 5


def test_another_version_behind_the_url_is_an_error() -> None:
    scorer = Numbered()
    with server.running({"n": scorer}) as url:
        reward = RemoteReward(url)
        scorer.spec = RewardSpec("numbered", version="2", range=(-1.0, 1.0))
        with pytest.raises(RewardError, match="was numbered of version 1 and is now numbered of version 2"):
            checked_score(reward, numbered_images([1]), [""])


def test_what_cannot_be_sent_is_told_before_it_is_sent() -> None:
    with server.running({"n": Everything("group")}, limits=Limits(items=4, body=30_000)) as url:
        reward = RemoteReward(url)
        images = torch.rand(5, 3, 4, 4)
        with pytest.raises(ValueError, match="5 images .* exceeds the items"):
            reward.score(images, [""] * 5, [{}] * 5, torch.zeros(5))
        with pytest.raises(ValueError, match="exceeds the body"):
            reward.score(torch.rand(2, 3, 64, 64), [""] * 2, [{}] * 2, torch.zeros(2))
        with pytest.raises(ValueError, match=r"metadata 1\.a"):
            reward.score(images[:2], [""] * 2, [{}, {"a": float("nan")}])
        assert reward.score(images, [""] * 5, [{}] * 5, torch.tensor([0, 0, 0, 1, 1])).values.shape == (5,)
        assert reward.score(images[:0], [], []).values.shape == (0,)


def test_requests_keep_to_the_limits_of_the_server() -> None:
    with server.running({"n": Numbered()}, limits=Limits(items=3, body=10_000, request_pixels=130)) as url:
        found = scored(url, n=9, per_request=100)
        assert not found.missing.any()
        reward = RemoteReward(url)
        rows = [wire.to_json({"prompt": "", "metadata": {}})] * 9
        assert [len(r) for r in reward._requests(rows, 8, 8, None)] == [2, 2, 2, 2, 1]
        rows = [wire.to_json({"prompt": "a" * 3000, "metadata": {}})] * 5
        assert [len(r) for r in reward._requests(rows, 4, 4, None)] == [1, 1, 1, 1, 1]


def test_the_wire_has_room_for_any_png() -> None:
    """What the client reserves for an image is never less than what the image takes."""
    for size in ((1, 1), (7, 3), (64, 64), (300, 200), (1, 20_000), (20_000, 1)):
        noise = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
        assert len(wire.base64_of(wire.encode_png(noise))) <= wire.room(*size)
