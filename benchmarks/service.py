"""The reward service under load, under faults and under attack.

    python -m benchmarks.service soak --images 10000 --clients 16 --faults 0.2
    python -m benchmarks.service throughput --size 512
    python -m benchmarks.service fuzz --requests 2000

soak: clients score numbered images through a server that delays, breaks, forges and drops a share of its answers, with
      a scorer that fails for some images and knows no score for others. Every image must come back exactly once,
      scored right or missing with a reason, and reach the scorer at most once.
throughput: images per second of a scorer that sleeps 20 ms per image, called here in batches of 32, and behind
      `flowrl serve` in another process.
fuzz: malformed, oversized and unauthenticated requests. Each must be refused (or answered, where a mutation happens to
      be harmless), and afterwards the server must score as before.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import io
import json
import logging
import random
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import torch
import typer
from PIL import Image
from torch import Tensor

from flowrl.errors import UserError
from reward_models import wire
from reward_models.protocol import Metadata, RewardResult, RewardSpec, checked_score
from reward_models.remote import RemoteReward

TARGET = 0.8  # remote against local throughput
app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode=None)


def numbered_images(numbers: list[int], size: int = 8) -> Tensor:
    """(N, 3, size, size) noise on the 8-bit grid whose first pixel holds the image's number, below 2^24."""
    noise = torch.Generator().manual_seed(numbers[0])
    images = torch.randint(0, 256, (len(numbers), 3, size, size), generator=noise, dtype=torch.uint8)
    for place, shift in enumerate((16, 8, 0)):
        images[:, place, 0, 0] = torch.tensor([(number >> shift) & 255 for number in numbers])
    return images.float() / 255


def value_of(numbers: Tensor) -> Tensor:
    """What `Numbered` gives an image: a number with all bits of a float32 in use."""
    return numbers.double().sin().float()


class Numbered:
    """Reads an image's number and scores it; counts how often each number was scored.

    Args:
        seconds: how long an image takes.
        fails: a call with a number divisible by it raises; 0 for none.
        unknown: numbers divisible by it are missing; 0 for none.
    """

    spec = RewardSpec("numbered", range=(-1.0, 1.0), licence="Apache-2.0")

    def __init__(self, seconds: float = 0.0, fails: int = 0, unknown: int = 0) -> None:
        self.seconds, self.fails, self.unknown = seconds, fails, unknown
        self.scored: Counter[int] = Counter()

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``."""
        time.sleep(self.seconds * len(images))
        red, green, blue = (images[:, :, 0, 0] * 255).round().long().unbind(1)
        numbers = (red << 16) + (green << 8) + blue
        if self.fails and bool((numbers % self.fails == 0).any()):
            raise RuntimeError("cannot score that")
        self.scored.update(numbers.tolist())
        values = value_of(numbers)
        reasons: list[str | None] = [None] * len(numbers)
        if self.unknown:
            for i in (numbers % self.unknown == 0).nonzero().flatten().tolist():
                values[i], reasons[i] = float("nan"), "unknown"
        return RewardResult(values, {"number": numbers.float()}, reasons)


class Sleeper(Numbered):
    """`Numbered` at 20 ms per image, to be named on the command line."""

    def __init__(self) -> None:
        super().__init__(seconds=0.02)


@dataclass
class Faults:
    """ASGI middleware that spoils a share of the answers to POST /score.

    slow: the answer comes late. error: 500 instead of being served. drop: the connection ends, before or after scoring.
    garbage: no JSON, half of the answer, changed numbers, or a well-formed answer to another question.
    """

    app: Any
    share: float
    seed: int = 0
    slow_s: float = 1.0
    done: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """See the ASGI specification."""
        kinds = ("slow", "error", "drop before", "drop after", "garbage")
        hit = scope["type"] == "http" and scope["path"] == "/score" and self._random.random() < self.share
        kind = self._random.choice(kinds) if hit else "none"
        self.done[kind] += scope["type"] == "http" and scope["path"] == "/score"
        if kind == "none":
            await self.app(scope, receive, send)
        elif kind == "slow":
            await asyncio.sleep(self.slow_s * self._random.random())
            await self.app(scope, receive, send)
        elif kind == "error":
            await _reply(send, 500, b"internal error")
        elif kind == "drop before":
            await _cut(send, b'{"values": [')
        else:
            answer, headers = await self._answer(scope, receive)
            if kind == "drop after":
                await _cut(send, answer[: len(answer) // 2])
            else:
                await self._garbage(send, answer, headers)

    async def _answer(self, scope: Any, receive: Any) -> tuple[bytes, list[Any]]:
        body, headers = bytearray(), []

        async def keep(message: Any) -> None:
            headers.extend(message.get("headers", ()))
            body.extend(message.get("body", b""))

        await self.app(scope, receive, keep)
        return bytes(body), headers

    async def _garbage(self, send: Any, answer: bytes, headers: list[Any]) -> None:
        digest = [pair for pair in headers if pair[0].decode() == wire.DIGEST]
        kind = self._random.randrange(5)
        if kind == 0:
            await _reply(send, 200, b"<html>gateway</html>")
        elif kind == 1:
            await _reply(send, 200, answer[: len(answer) // 2], digest)
        elif kind == 2:
            await _reply(send, 200, answer.replace(b"0.", b"1.", 1), digest)
        elif kind == 3:
            other = json.dumps({"values": [0.5], "parts": {}, "reasons": [None]}).encode()
            await _reply(send, 200, other, [(wire.DIGEST.encode(), wire.digest(other).encode())])
        else:
            await _reply(send, 200, self._random.randbytes(200))


async def _reply(send: Any, status: int, body: bytes, headers: list[Any] | None = None) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [length, *(headers or [])]})
    await send({"type": "http.response.body", "body": body})


async def _cut(send: Any, body: bytes) -> None:
    """Promise more than is sent; the server then closes the connection."""
    headers = [(b"content-length", str(len(body) + 1000).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": True})


def soak(
    images: int = 10_000, clients: int = 16, faults: float = 0.2, *, fails: int = 97, unknown: int = 89,
    slow_s: float = 1.0, deadline_s: float = 60.0, hasty: int = 0, seed: int = 0, size: int = 8, calls: int = 4,
) -> dict[str, Any]:  # fmt: skip
    """Score `images` numbered images through `clients` parallel clients and compare with what each should have got.

    Args:
        faults: share of the answers that is spoiled.
        fails, unknown: see `Numbered`.
        hasty: of the clients, so many give up after half a second.
        calls: calls of `score` by each client.

    Returns:
        right, missing, wrong, lost: numbers of images, together `images`; scored_twice: images that reached the scorer
        more than once; unexplained: missing ones without a reason; faults: how many of which kind; seconds.
    """
    from reward_models import server

    scorer = Numbered(fails=fails, unknown=unknown)
    spoiled: list[Faults] = []

    def wrap(application: Any) -> Any:
        spoiled.append(Faults(application, faults, seed, slow_s))
        return spoiled[-1]

    outcome: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    lock = threading.Lock()
    begun = time.monotonic()

    with _quiet(), server.running({"numbered": scorer}, wrap=wrap) as url:

        def client(k: int) -> None:
            reward = RemoteReward(url, deadline=0.5 if k < hasty else deadline_s, parallel=2, per_request=16)
            mine = list(range(1 + k, 1 + images, clients))
            for c in range(calls):
                numbers = mine[c::calls]
                if not numbers:
                    continue
                result = checked_score(
                    reward, numbered_images(numbers, size), [str(n) for n in numbers], all_missing="allow"
                )
                expected = value_of(torch.tensor(numbers))
                with lock:
                    for i in range(len(numbers)):
                        if bool(result.missing[i]):
                            outcome["missing"] += 1
                            reasons[_kind(result.reasons[i])] += 1
                        else:
                            right = result.values[i] == expected[i] and result.parts["number"][i] == numbers[i]
                            outcome["right" if right else "wrong"] += 1
                    outcome["lost"] += len(numbers) - len(result.values)
            reward.close()

        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(client, range(clients)))
    return {
        **{name: outcome[name] for name in ("right", "missing", "wrong", "lost")},
        "scored_twice": sum(count > 1 for count in scorer.scored.values()),
        "unexplained": reasons["none"],
        "reasons": dict(reasons),
        "faults": dict(spoiled[0].done),
        "seconds": round(time.monotonic() - begun, 1),
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the complaints of a server that is treated badly."""
    loggers = [logging.getLogger(name) for name in ("uvicorn.error", "reward_models.batching")]
    for logger in loggers:
        logger.addFilter(_nothing)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False


def _kind(reason: str | None) -> str:
    if not reason:
        return "none"
    return next((kind for kind in ("unknown", "cannot score that", "gave no score") if kind in reason), reason)


@dataclass(frozen=True)
class Throughput:
    """Images per second, called here and behind a server."""

    local: float
    remote: float
    size: int
    images: int

    @property
    def ratio(self) -> float:
        """Remote over local."""
        return self.remote / self.local


def throughput(images: int = 640, size: int = 64, batch: int = 32, parallel: int = 4) -> Throughput:
    """Time `Sleeper` here, in batches of `batch`, and behind `flowrl serve` in another process.

    Raises:
        UserError: the server does not start.
    """
    numbers = list(range(images))
    pixels, prompts = numbered_images(numbers, size), [""] * images
    local = Sleeper()
    begun = time.perf_counter()
    for start in range(0, images, batch):
        checked_score(local, pixels[start : start + batch], prompts[start : start + batch])
    here = time.perf_counter() - begun
    command = [sys.executable, "-m", "flowrl", "serve", f"sleeper={__spec__.name}:Sleeper"]
    child = subprocess.Popen([*command, "--port", "0", "--batch", str(batch)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        line = next((line for line in child.stdout if "http://" in line), "")
        if not line:
            raise UserError("the server did not start; expected its URL; run `flowrl serve jpeg` to see why")
        reward = RemoteReward(line.split()[-1], parallel=parallel)
        checked_score(reward, pixels[:1], prompts[:1])  # the first connection
        begun = time.perf_counter()
        checked_score(reward, pixels, prompts)
        there = time.perf_counter() - begun
        reward.close()
    finally:
        child.terminate()
        child.wait()
    return Throughput(images / here, images / there, size, images)


@functools.cache
def _zeros(size: int) -> bytes:
    return zlib.compress(bytes(size), 9)


def bad_files(seed: int) -> dict[str, bytes]:
    """Images that a server must not take, or not be hurt by."""
    noise = random.Random(seed)
    whole = wire.encode_png(
        torch.randint(0, 256, (3, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    )

    def saved(mode: str, kind: str = "PNG") -> bytes:
        out = io.BytesIO()
        Image.new(mode, (8, 8)).save(out, kind)
        return out.getvalue()

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    def png(header: tuple[int, int, int, int], *chunks: bytes) -> bytes:
        start = chunk(b"IHDR", struct.pack(">IIBBBBB", *header, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + start + b"".join(chunks) + chunk(b"IEND", b"")

    pixels = chunk(b"IDAT", zlib.compress(b"\0" * (8 * 25)))
    bomb = chunk(b"IDAT", _zeros(10_000_000))
    second = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0))
    place = noise.randrange(40, len(whole) - 20)  # among the pixels: the end of a PNG may be missing
    return {
        "bytes": noise.randbytes(100),
        "empty": b"",
        "jpeg": saved("RGB", "JPEG"),
        "gif": saved("P", "GIF"),
        **{mode: saved(mode) for mode in ("RGBA", "L", "P", "1", "I;16")},
        "cut": whole[:place],
        "flipped": whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :],
        "huge": png((2**31 - 1, 2**31 - 1, 8, 2), pixels),
        "bomb": png((60_000, 60_000, 8, 2), bomb),
        "more pixels than said": png((8, 8, 8, 2), bomb),
        "two headers": png((8, 8, 8, 2), second, pixels),
        "two small headers": png((8, 8, 8, 2), chunk(b"IHDR", struct.pack(">IIBBBBB", 9, 9, 8, 2, 0, 0, 0)), bomb),
        "no size": png((0, 8, 8, 2), pixels),
        "16 bit": png((8, 8, 16, 2), pixels),
        "no pixels": png((8, 8, 8, 2)),
        "text bomb": png((8, 8, 8, 2), chunk(b"zTXt", b"k\0\0" + _zeros(5_000_000)), pixels),
    }


def bad_messages(seed: int) -> dict[str, Any]:
    """Bodies of requests that are no sound request, by what is wrong with them; bytes as they are, others as JSON."""
    noise = random.Random(seed)
    item = {"image": base64.b64encode(wire.encode_png(torch.zeros(3, 8, 8, dtype=torch.uint8))).decode(), "prompt": "a"}
    whole = json.dumps({"items": [item]}).encode()
    place = noise.randrange(len(whole))
    deep: Any = "x"
    for _ in range(500):
        deep = [deep]
    files = {
        f"image {name}": {"items": [item | {"image": base64.b64encode(data).decode()}]}
        for name, data in bad_files(seed).items()
    }
    return {
        **files,
        "random bytes": noise.randbytes(noise.randrange(1, 3000)),
        "nothing": b"",
        "cut": whole[:place],
        "flipped": whole[:place] + bytes([whole[place] ^ (1 << noise.randrange(8))]) + whole[place + 1 :],
        "nested": b"[" * 100_000,
        "nested metadata": {"items": [item | {"metadata": {"a": deep}}]},
        "long number": b'{"items": [' + b"9" * 10_000 + b"]}",
        "NaN": whole.replace(b'"a"', b"NaN"),
        "surrogate": whole.replace(b'"a"', rb'"\ud800"'),
        "two keys": b'{"items": [], "items": 3}',
        "no items": {"items": []},
        "items is text": {"items": "abc"},
        "null": None,
        "list": [item],
        "extra key": {"items": [item], "path": "/etc/passwd"},
        "extra field": {"items": [item | {"file": "/etc/passwd"}]},
        "no image": {"items": [{"prompt": "a"}]},
        "image is a path": {"items": [item | {"image": "/etc/passwd"}]},
        "image is a number": {"items": [item | {"image": 3}]},
        "prompt is a list": {"items": [item | {"prompt": ["a"]}]},
        "prompt too long": {"items": [item | {"prompt": "a" * 30_000}]},
        "metadata is a list": {"items": [item | {"metadata": []}]},
        "group is text": {"items": [item | {"group": "a"}]},
        "group is huge": {"items": [item | {"group": 2**63}]},
        "groups for some": {"items": [item, item | {"group": 1}]},
        "many entries": b'{"items": [' + b"[]," * 600_000 + b"]}",
        "unknown reward": {"reward": noise.choice(["", "x" * 1000, "../../etc", "os:system"]), "items": [item]},
        "reward is a number": {"reward": 1, "items": [item]},
        "id": {"id": "a b\n" * noise.randrange(1, 99), "items": [item]},
        "too many items": {"items": [item] * 300},
    }


def bad_connections(seed: int, token: str) -> dict[str, bytes]:
    """What goes over the wire that is no sound HTTP, or promises what does not come."""
    noise = random.Random(seed)
    head = f"POST /score HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {token}\r\ncontent-type: application/json\r\n"
    start = head.encode()
    return {
        "noise": noise.randbytes(500),
        "half a line": b"POST /sco",
        "half a head": start,
        "no length": start + b"\r\n{}",
        "chunks": start + b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n",
        "both lengths": start + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n4\r\n{  }\r\n0\r\n\r\n",
        "body too short": start + b"content-length: 100\r\n\r\n{}",
        "length too large": start + b"content-length: 99999999999\r\n\r\n{}",
        "length of many digits": start + b"content-length: " + b"9" * 500 + b"\r\n\r\n{}",
        "negative length": start + b"content-length: -1\r\n\r\n{}",
        "two lengths": start + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}{",
        "long head": start + b"x: " + b"a" * 100_000 + b"\r\n\r\n",
        "other protocol": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + noise.randbytes(100),
        "old protocol": b"GET /health\r\n\r\n",
    }


def fuzz(requests: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Send bad requests to a server of one reward, and see whether it still scores.

    Returns:
        sent; statuses: how many answers of which status (0: none, the connection was closed); server_errors: answers of
        500 and more, by what was sent; alive: whether a sound request is scored right afterwards; memory: bytes that
        the server still holds for requests.
    """
    from reward_models import server

    token = "a-token-for-this-test-only"
    statuses: Counter[int] = Counter()
    failed: list[str] = []
    with _quiet(), server.running({"numbered": Numbered()}, token=token) as url:
        with httpx.Client(base_url=url, timeout=30, trust_env=False) as http:
            for what, status in _attacks(http, url, token, requests, seed):
                statuses[status] += 1
                if status >= 500:
                    failed.append(what)
            key = {"authorization": f"Bearer {token}"}
            memory = next(
                float(line.split()[1])
                for line in http.get("/metrics", headers=key).text.splitlines()
                if line.startswith("flowrl_memory_bytes ")
            )
        reward = RemoteReward(url, token=token)
        result = checked_score(reward, numbered_images([5, 6]), ["a", "b"])
        alive = torch.equal(result.values, value_of(torch.tensor([5, 6])))
        reward.close()
    return {
        "sent": statuses.total(), "statuses": dict(sorted(statuses.items())), "server_errors": failed, "alive": alive,
        "memory": memory,
    }  # fmt: skip


def _attacks(http: httpx.Client, url: str, token: str, requests: int, seed: int) -> Iterator[tuple[str, int]]:
    """Send `requests` bad requests; yields what was wrong and the status of the answer (0: none)."""
    noise = random.Random(seed)
    key = {"authorization": f"Bearer {token}", "content-type": "application/json"}
    strangers = ["", "Bearer", "bearer x", f"Bearer {token}x", f"Bearer {token[:-1]}", f"Basic {token}", "Bearer \xff"]
    port = httpx.URL(url).port or 80
    for i in range(requests):
        pick = noise.random()
        if pick < 0.65:
            what, body = noise.choice(list(bad_messages(seed + i).items()))
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            yield what, http.post("/score", content=data, headers=key).status_code
        elif pick < 0.8:
            given = noise.choice(strangers)
            path = noise.choice(["/score", "/health", "/metrics"])
            method = "POST" if path == "/score" else "GET"
            headers = [(b"authorization", given.encode("latin-1"))]
            status = http.request(method, path, content=b"{}", headers=headers).status_code
            yield f"token {given!r}", status if status == 401 else 599  # entry without a token is the worst of errors
        elif pick < 0.9:
            method = noise.choice(["GET", "PUT", "DELETE", "PATCH", "OPTIONS"])
            path = noise.choice(["/score", "/docs", "/openapi.json", "/../../etc/passwd", "/%00", "/score/x"])
            yield f"{method} {path}", http.request(method, path, headers=key).status_code
        else:
            what, data = noise.choice(list(bad_connections(seed + i, token).items()))
            with socket.create_connection(("127.0.0.1", port), timeout=30) as raw:
                raw.sendall(data)
                raw.shutdown(socket.SHUT_WR)
                try:
                    answer = raw.recv(64)
                except ConnectionError:
                    answer = b""
            first = answer.split(b" ")[1:2]
            yield what, int(first[0]) if first and first[0].isdigit() else 0


def _write(found: dict[str, Any], path: Path | None) -> None:
    text = json.dumps(found, indent=2)
    typer.echo(text)
    if path is not None:
        path.write_text(text + "\n", encoding="utf-8")


Json = Annotated[Path | None, typer.Option("--json", help="Also write the result there.")]


@app.command("soak")
def soak_command(
    images: int = 10_000, clients: int = 16, faults: float = 0.2, hasty: int = 2, seed: int = 0, json_path: Json = None
) -> None:
    """Exactly-once scoring under faults."""
    found = soak(images, clients, faults, hasty=hasty, seed=seed)
    _write(found, json_path)
    if found["wrong"] or found["lost"] or found["scored_twice"] or found["unexplained"]:
        raise typer.Exit(1)


@app.command("throughput")
def throughput_command(images: int = 640, size: int = 64, parallel: int = 4, json_path: Json = None) -> None:
    """Images per second behind the server, against here."""
    found = throughput(images, size, parallel=parallel)
    _write(asdict(found) | {"ratio": round(found.ratio, 3), "target": TARGET}, json_path)
    if found.ratio < TARGET:
        raise typer.Exit(1)


@app.command("fuzz")
def fuzz_command(requests: int = 2000, seed: int = 0, json_path: Json = None) -> None:
    """Bad requests."""
    found = fuzz(requests, seed)
    _write(found, json_path)
    if found["server_errors"] or not found["alive"] or found["memory"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
