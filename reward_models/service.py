"""What the reward server does with a request: checks, unpacking, joining of repeated requests, the answer, counters.

The checks go from cheap to dear: length that the request announces, whole request, size in each PNG's header; only
then is a pixel unpacked. Nothing here knows the web framework (that is `server`).
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from . import wire
from .batching import Batcher, Expired, Job, QueueFull
from .protocol import Reward, RewardError, RewardResult

INT64 = 2**63
REMEMBERED = 1024  # requests that may be repeated


@dataclass(frozen=True)
class Limits:
    """What the server takes on; beyond it a request is refused with 413, 422 or 503.

    Attributes:
        items: images of a request.
        body: bytes of a request.
        image_pixels: pixels of an image.
        request_pixels: pixels of all images of a request together.
        prompt: characters of a prompt.
        queue: images that wait for a reward.
        entries: commas and opening brackets of a request, which bound the objects that its JSON is read into.
        memory: bytes of all requests that are being read, unpacked or waiting; pixels count three bytes.
        timeout_s: how long a request may take to arrive, and then to be scored.
        remembered: bytes of past answers that are kept for requests that are repeated.
    """

    items: int = 256
    body: int = 2**28
    image_pixels: int = 2**24
    request_pixels: int = 2**26
    prompt: int = 20_000
    entries: int = 2**20
    queue: int = 2048
    memory: int = 2**31
    timeout_s: float = 120.0
    remembered: int = 2**26

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise ValueError(f"got the limit {name} = {value}, expected a positive number. Correct it.")


class Item(BaseModel):
    """One image of a request."""

    model_config = ConfigDict(extra="forbid", strict=True)
    image: str
    prompt: str
    metadata: dict[str, Any] = Field(default_factory=dict)
    group: int | None = Field(None, ge=-INT64, lt=INT64)


class Call(BaseModel):
    """A request to score images."""

    model_config = ConfigDict(extra="forbid", strict=True)
    reward: str | None = None
    id: str | None = Field(None, pattern=r"^[\w-]{1,64}$")
    items: list[Item] = Field(min_length=1)


class Refusal(Exception):
    """A request that is not served: status, what to tell, and after how many seconds to come back if at all."""

    def __init__(self, status: int, message: str, retry_s: float | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_s = status, message, retry_s


class Budget:
    """Bytes that requests hold at a time, over all threads."""

    def __init__(self, total: int) -> None:
        self.total, self.used, self._lock = total, 0, threading.Lock()

    @contextlib.contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Raises Refusal (503) where no room is left."""
        with self._lock:
            if self.used + size > self.total:
                raise Refusal(503, f"got {size} bytes, expected less while others are served. Try again", 1.0)
            self.used += size
        try:
            yield
        finally:
            with self._lock:
                self.used -= size


class Pending:
    """A request that is worked on or was answered lately; `job` is what waits to be scored, None before and after."""

    task: asyncio.Task[bytes]
    job: Job | None = None


def _failed(task: asyncio.Task[bytes]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)


class Service:
    """What the endpoints do. Built and used inside one event loop.

    Args: see `create_app`.
    """

    def __init__(self, rewards: Mapping[str, Reward], limits: Limits, batch: int, wait_s: float) -> None:
        self.limits = limits
        self.batchers = {
            name: Batcher(reward, batch=batch, wait_s=wait_s, queue=limits.queue) for name, reward in rewards.items()
        }
        self.budget = Budget(limits.memory)
        self.answered: Counter[int] = Counter()  # requests to /score by status
        self.seconds = 0.0
        self._pending: OrderedDict[tuple[str, str], Pending] = OrderedDict()

    async def score(self, headers: Mapping[str, str], stream: AsyncIterator[bytes]) -> bytes:
        """POST /score: the answer's JSON.

        Args:
            headers: of the request, by names in lower case.
            stream: its body.

        Raises:
            Refusal: it is not served.
        """
        started, status = time.monotonic(), 500
        try:
            answer = await self._score(headers, stream)
            status = 200
            return answer
        except Refusal as refusal:
            status = refusal.status
            raise
        finally:
            self.answered[status] += 1
            self.seconds += time.monotonic() - started

    async def _score(self, headers: Mapping[str, str], stream: AsyncIterator[bytes]) -> bytes:
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refusal(415, f"got content type {kind[:80]!r}, expected application/json")
        length = headers.get("content-length", "")
        if not length.isdecimal() or len(length) > 18:
            raise Refusal(
                411, "got no usable Content-Length, expected the length of the body. Do not send it in chunks"
            )
        if int(length) > self.limits.body:
            raise Refusal(413, f"got {length} bytes, expected at most {self.limits.body}. Send fewer images at a time")
        with self.budget.hold(int(length)):
            body = await self._body(stream, int(length))
            digest = await asyncio.to_thread(wire.digest, body)
            if headers.get(wire.DIGEST, digest) != digest:
                raise Refusal(
                    400, "got a body that does not fit its Content-Digest, expected it undamaged. Send it again"
                )
            call = await asyncio.to_thread(self._parsed, body)
            del body
            key = None if call.id is None else (call.id, digest)
            pending = self._pending.get(key) if key else None
            if pending is None or _failed(pending.task):
                pending = self._begin(call, key)
            elif pending.job is not None:
                pending.job.expires = self._expiry()
            try:
                async with asyncio.timeout(self.limits.timeout_s):
                    return await asyncio.shield(pending.task)
            except TimeoutError as error:
                raise Refusal(
                    504, f"got no score within {self.limits.timeout_s:g} s. Ask again under the same id", 1.0
                ) from error
            except Expired as error:
                raise Refusal(504, "waited for too long. Ask again", 1.0) from error
            except RewardError as error:
                raise Refusal(500, f"the reward broke ({error})", 1.0) from error

    async def _body(self, stream: AsyncIterator[bytes], length: int) -> bytearray:
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.timeout_s):
                async for chunk in stream:
                    body += chunk
                    if len(body) > length:  # sent in chunks besides, which take precedence in HTTP
                        raise Refusal(400, f"got more than the {length} bytes of its Content-Length, expected no more")
        except TimeoutError as error:
            raise Refusal(408, f"got no whole body within {self.limits.timeout_s:g} s. Send it faster") from error
        return body

    def _parsed(self, body: bytearray) -> Call:
        entries = sum(body.count(mark) for mark in (b",", b"[", b"{"))
        if entries > self.limits.entries:
            raise Refusal(413, f"got JSON of {entries} entries, expected at most {self.limits.entries}. Send fewer")
        try:
            call = Call.model_validate_json(body)
        except ValidationError as error:
            found = error.errors(include_url=False, include_input=False, include_context=False)
            lines = [f"{'.'.join(map(str, one['loc'])) or 'body'}: {one['msg']}" for one in found[:3]]
            raise Refusal(422, f"got a request that cannot be read ({'; '.join(lines)[:500]})") from error
        if call.reward is None and len(self.batchers) == 1:
            call.reward = next(iter(self.batchers))
        if call.reward not in self.batchers:
            raise Refusal(404, f"got no reward of that name, expected one of {', '.join(self.batchers)}")
        if len(call.items) > self.limits.items:
            raise Refusal(
                413, f"got {len(call.items)} items, expected at most {self.limits.items}. Send fewer at a time"
            )
        if (longest := max(len(item.prompt) for item in call.items)) > self.limits.prompt:
            raise Refusal(413, f"got a prompt of {longest} characters, expected at most {self.limits.prompt}. Cut it")
        if len({item.group is None for item in call.items}) > 1:
            raise Refusal(422, "got items with and without a group, expected one for all or for none")
        return call

    def _expiry(self) -> float:
        return time.monotonic() + 2 * self.limits.timeout_s  # time for whoever got a 504 to ask again

    async def _work(self, call: Call, pending: Pending) -> bytes:
        """Unpack, score, and write the answer."""
        assert call.reward is not None
        batcher, n = self.batchers[call.reward], len(call.items)
        files, reasons, pixels = await asyncio.to_thread(self._headers, call.items)
        with self.budget.hold(3 * pixels):
            good, images = await asyncio.to_thread(_unpacked, files, reasons, call.items, batcher.reward.spec.scope)
            del files
            pieces: list[tuple[Sequence[int], RewardResult]] = [
                ([i], wire.missing(1, str(reason))) for i, reason in enumerate(reasons) if reason is not None
            ]
            if good:
                chosen = [call.items[i] for i in good]
                groups = [item.group for item in chosen]
                pending.job = job = Job(
                    images, [item.prompt for item in chosen], [item.metadata for item in chosen],
                    None if groups[0] is None else torch.tensor(groups, dtype=torch.long), self._expiry(),
                )  # fmt: skip
                try:
                    batcher.submit(job)
                    pieces.append((good, await asyncio.wrap_future(job.future)))
                except QueueFull as full:
                    raise Refusal(503, f"too many images wait; {full}", full.retry_s) from full
                finally:
                    pending.job = None  # the answer is kept for who asks again, its pixels are not
        spec = batcher.reward.spec
        head = {"protocol": wire.PROTOCOL, "id": call.id, "name": spec.name, "version": spec.version}
        return wire.to_json(head | wire.result_to_json(wire.join(n, pieces)))

    def _headers(self, items: Sequence[Item]) -> tuple[list[bytes], list[str | None], int]:
        """The PNG files, why some cannot be taken, and how many pixels the others have, by their headers."""
        files: list[bytes] = []
        reasons: list[str | None] = []
        size: tuple[int, int] | None = None
        pixels = 0
        for item in items:
            files.append(b"")
            reasons.append(None)
            try:
                files[-1], item.image = wire.from_base64(item.image), ""  # one of them is enough to keep
                width, height = wire.png_size(files[-1])
                if width * height > self.limits.image_pixels:
                    raise ValueError(
                        f"got an image of {width} x {height}, expected at most {self.limits.image_pixels} pixels. "
                        "Make it smaller"
                    )
                if size not in (None, (width, height)):
                    raise ValueError(f"got an image of {width} x {height} beside one of {size}, expected one size")
            except ValueError as error:
                reasons[-1] = f"image refused: {error}"
                continue
            size = (width, height)
            pixels += width * height
        if pixels > self.limits.request_pixels:
            raise Refusal(
                413, f"got {pixels} pixels, expected at most {self.limits.request_pixels}. Send fewer images at a time"
            )
        return files, reasons, pixels

    def _begin(self, call: Call, key: tuple[str, str] | None) -> Pending:
        """Start to work on a request, and forget the oldest answers if they are too many."""
        pending = Pending()
        pending.task = asyncio.create_task(self._work(call, pending))
        pending.task.add_done_callback(_failed)  # looks at an error that nobody may be waiting for any more
        if key is not None:
            done = {old: p.task for old, p in self._pending.items() if p.task.done()}
            sizes = {old: 0 if _failed(task) else len(task.result()) for old, task in done.items()}
            total = sum(sizes.values())
            for old, size in sizes.items():
                if total > self.limits.remembered or len(self._pending) >= REMEMBERED:
                    del self._pending[old]
                    total -= size
            self._pending[key] = pending
            self._pending.move_to_end(key)
        return pending

    def health(self) -> dict[str, Any]:
        """GET /health."""
        now = time.monotonic()
        busy = {name: now - (b.busy_since or now) for name, b in self.batchers.items()}
        return {
            "protocol": wire.PROTOCOL,
            "status": "stalled" if max(busy.values()) > self.limits.timeout_s else "ok",
            "rewards": {name: wire.spec_to_json(batcher.reward.spec) for name, batcher in self.batchers.items()},
            "limits": asdict(self.limits) | {"batch": next(iter(self.batchers.values())).batch},
        }

    def metrics(self) -> str:
        """GET /metrics: https://prometheus.io/docs/instrumenting/exposition_formats, version 0.0.4."""
        requests = [(f'{{code="{code}"}}', float(count)) for code, count in sorted(self.answered.items())]
        table: list[tuple[str, str, str, list[tuple[str, float]]]] = [
            ("requests_total", "counter", "requests to /score by status", requests),
            ("request_seconds_sum", "counter", "seconds from a request to its answer", [("", self.seconds)]),
            ("request_seconds_count", "counter", "requests in it", [("", self.answered.total())]),
            ("memory_bytes", "gauge", "held by requests", [("", self.budget.used)]),
        ]
        each: list[tuple[str, str, str, Callable[[Batcher], float]]] = [
            ("images_total", "counter", "images that a reward was asked for", lambda b: b.counts.images),
            ("images_missing_total", "counter", "of these, without a score", lambda b: b.counts.missing),
            ("calls_total", "counter", "calls of a reward", lambda b: b.counts.calls),
            ("calls_failed_total", "counter", "of these, failed", lambda b: b.counts.failed_calls),
            ("score_seconds_total", "counter", "seconds spent in a reward", lambda b: b.counts.seconds),
            ("images_waiting", "gauge", "images in the queue", lambda b: b.waiting),
        ]
        for name, kind, about, value in each:
            rows = [(f'{{reward="{_escaped(n)}"}}', value(b)) for n, b in self.batchers.items()]
            table.append((name, kind, about, rows))
        lines: list[str] = []
        for name, kind, about, rows in table:
            lines += [f"# HELP flowrl_{name} {about}", f"# TYPE flowrl_{name} {kind}"]
            lines += [f"flowrl_{name}{labels} {float(value):.10g}" for labels, value in rows]
        return "\n".join(lines) + "\n"

    def close(self) -> None:
        """Finish what waits, for as long as a request may take."""
        for batcher in self.batchers.values():
            batcher.close(self.limits.timeout_s)


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _unpacked(
    files: Sequence[bytes], reasons: list[str | None], items: Sequence[Item], scope: str
) -> tuple[list[int], Tensor]:
    """Numbers of the images to score and their pixels, (N, 3, H, W) uint8; writes down why the others are not."""
    images: dict[int, Tensor] = {}
    for i, data in enumerate(files):
        if reasons[i] is None:
            try:
                images[i] = wire.decode_png(data)
            except ValueError as error:
                reasons[i] = f"image refused: {error}"
    lost = {items[i].group for i, reason in enumerate(reasons) if reason is not None}
    if scope != "point" and lost:  # a group (set) with a lost image is another one, so all of it is missing
        for i, item in enumerate(items):
            if scope == "set" or item.group in lost:
                reasons[i] = reasons[i] or "another image of its group was refused"
    good = [i for i, reason in enumerate(reasons) if reason is None]
    return good, torch.stack([images[i] for i in good]) if good else torch.empty(0)
