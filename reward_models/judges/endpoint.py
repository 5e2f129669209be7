"""Questions to a vision-language model behind an OpenAI-compatible chat endpoint (vLLM, SGLang, and others).

A question that gets no answer (no connection, errors, garbage, deadline) is answered by a reason; nothing is made up.
Differences from Pref-GRPO's client: temperature and seed are sent, as vLLM ignores ``do_sample`` and would otherwise
draw answers at the temperature of the model's generation config; images are PNG by default; retries end at a deadline.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import itertools
import json
import os
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ..protocol import RewardError
from .grammars import tried

BUSY = {408, 425, 429, 500, 502, 503, 504}  # worth another try
CLOSED = {401, 403, 404, 405}  # what fails one question fails all of them
UNLISTED = {404, 405, 501}  # the server is there, but does not tell its models
RESERVED = {"model", "temperature", "seed", "max_tokens", "messages", "stream", "n"}
LOOPBACK = {"127.0.0.1", "localhost", "::1"}  # a proxy of the environment is for the outside world
LARGEST = 8_000_000  # bytes of an answer; a server that sends more has lost its way


@dataclass(frozen=True, eq=False)
class Picture:
    """An image to be shown to a judge.

    Attributes:
        pixels: (H, W, 3) uint8.
        form: how it is sent: "png"; "jpeg", of quality 95 as Pref-GRPO sends it; "png512", as flow_grpo sends it to
            UnifiedReward: resized to 512 x 512 (bicubic, whatever its shape) and without the kind of file in its URL.
    """

    pixels: np.ndarray
    form: str = "png"

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of pixels, shape and form."""
        head = f"{self.form} {self.pixels.shape} "
        return hashlib.sha256(head.encode() + self.pixels.tobytes()).hexdigest()

    @functools.cached_property
    def url(self) -> str:
        """The image as a data URL."""
        image, buffer = Image.fromarray(self.pixels), io.BytesIO()
        if self.form == "jpeg":
            image.save(buffer, format="JPEG", quality=95)
        else:
            image = image.resize((512, 512)) if self.form == "png512" else image
            image.save(buffer, format="PNG", compress_level=1)
        kind = {"png": "image/png", "jpeg": "image/jpeg", "png512": "image"}[self.form]
        return f"data:{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def pictures(images: Tensor | Sequence[Tensor], form: str = "png") -> list[Picture]:
    """(N, 3, H, W), or N images (3, H, W) of any sizes, in [0, 1] -> N pictures."""
    pixels = [(image.detach().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu() for image in images]
    return [Picture(image.contiguous().numpy(), form) for image in pixels]


@dataclass(frozen=True)
class Question:
    """One user message: images first, then the text; ``seed`` is added to that of the endpoint."""

    text: str
    images: tuple[Picture, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        text: the answer, or None if there is none.
        reason: why there is none.
        reasoning: the chain of thought, where the server sends it apart.
        cut: whether the answer ended at ``max_tokens``.
    """

    text: str | None
    reason: str | None = None
    reasoning: str = ""
    cut: bool = False


class AnswerCache:
    """Answers by the hash of everything that was asked: in memory, and in a folder if one is given.

    A folder may be shared by processes: files are written under another name and then renamed.

    Args:
        folder: one JSON file for each answer, or None for memory only.
        size: answers kept in memory; the oldest go first.
    """

    def __init__(self, folder: str | Path | None = None, size: int = 50_000) -> None:
        self.folder, self.size = Path(folder).expanduser() if folder else None, size
        self._kept: dict[str, Answer] = {}
        self._lock = threading.Lock()

    def _file(self, key: str) -> Path | None:
        return self.folder / key[:2] / f"{key}.json" if self.folder else None

    def get(self, key: str) -> Answer | None:
        """The answer, or None. A file that cannot be read as one counts as absent: the question is asked again."""
        if (known := self._kept.get(key)) is not None:
            return known
        file = self._file(key)
        if file is None or not file.is_file():
            return None
        try:
            answer = Answer(**json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            return None
        self._remember(key, answer)
        return answer

    def _remember(self, key: str, answer: Answer) -> None:
        with self._lock:
            self._kept[key] = answer
            while len(self._kept) > self.size:
                del self._kept[next(iter(self._kept))]

    def put(self, key: str, answer: Answer) -> None:
        """Keep an answer."""
        self._remember(key, answer)
        if (file := self._file(key)) is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
            content = {"text": answer.text, "reasoning": answer.reasoning, "cut": answer.cut}
            unfinished.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
            os.replace(unfinished, file)


class _Failed(Exception):
    """One try failed: why, whether another may help, and how long the server asks to wait."""

    def __init__(self, reason: str, *, again: bool = True, closed: bool = False, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.reason, self.again, self.closed, self.wait = reason, again, closed, wait


@dataclass
class _Batch:
    """State shared by the questions of one call: when an answer last came, and why the rest need not be asked."""

    answered: float = 0.0
    closed: str | None = None
    stopped: threading.Event = field(default_factory=threading.Event)


class ChatEndpoint:
    """A model behind ``/v1/chat/completions``.

    Args:
        url: of the server, for example "http://127.0.0.1:8080"; "/v1/chat/completions" is added where it is missing.
        model: the name under which the server knows the model.
        temperature: 0 by default; then equal questions have one answer, and several passes need another temperature.
        seed: sent with every question.
        max_tokens: of an answer.
        timeout: seconds for one try.
        deadline: seconds for one question with all its retries (the last try may end up to ``timeout`` later if the
            server sends bytes without end). If nothing at all was answered in that time, the questions that wait
            behind it are given up as well, so a dead server costs one deadline and not one for each question.
        pause: seconds before the second try, doubled for each later one up to 10, and shortened by up to a half at
            random; a server's Retry-After is heard.
        workers: questions in flight at once.
        cache: folder in which answers are kept over runs, or None: in memory only.
        version: of the weights behind ``model``. It stands in the cache's key and in the rewards' ``spec``; without it
            the URL does, so that another server with the same name does not inherit answers. A hash of temperature,
            seed and the other settings stands there besides.
        thinking: switch of hybrid reasoners, sent as ``chat_template_kwargs: {enable_thinking: ...}``; None: not sent.
        api_key_env: environment variable that holds the key. The key itself never enters a config.
        extra: further fields of every request, for example ``{top_p: 0.9}``.

    Raises:
        ValueError: a setting is impossible, or the variable with the key is not set.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        max_tokens: int = 4096,
        timeout: float = 160.0,
        deadline: float = 300.0,
        pause: float = 1.0,
        workers: int = 16,
        cache: str | Path | None = None,
        version: str | None = None,
        thinking: bool | None = None,
        api_key_env: str | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        for name, value in (("max_tokens", max_tokens), ("workers", workers)):
            if value < 1:
                raise ValueError(f"got {name} {value} for a judge's endpoint, expected at least 1. Correct it.")
        for name, seconds in (("timeout", timeout), ("deadline", deadline)):
            if not seconds > 0:
                raise ValueError(f"got {name} {seconds} s for a judge's endpoint, expected more than 0. Correct it.")
        if taken := RESERVED & set(extra or {}):
            raise ValueError(f"got {sorted(taken)} in extra, expected other fields. Give these by their own options.")
        self.url, self.model = _chat_url(url), model
        self.temperature, self.seed, self.workers = temperature, seed, workers
        self.timeout, self.deadline, self.pause = timeout, deadline, pause
        self.identity = f"{model}@{version or self.url}"
        self.settings: dict[str, Any] = {
            "model": model,
            "temperature": temperature,
            "max_tokens": max_tokens,
            **({} if thinking is None else {"chat_template_kwargs": {"enable_thinking": thinking}}),
            **(extra or {}),
        }
        asked = json.dumps({**self.settings, "seed": seed}, sort_keys=True)
        self.fingerprint = f"{self.identity} {hashlib.sha256(asked.encode()).hexdigest()[:8]}"  # what answers depend on
        self.cache = AnswerCache(cache)
        self.counts: Counter[str] = Counter()  # asked, cached, tries, failed: since this object was made
        self._lock = threading.Lock()
        self._client = self._open(api_key_env)

    def _open(self, api_key_env: str | None) -> Any:
        try:
            import httpx
        except ImportError as error:
            raise ValueError(
                "judges behind an endpoint need httpx, which is not installed: pip install httpx"
            ) from error
        try:
            host = httpx.URL(self.url).host
        except httpx.InvalidURL as error:
            raise ValueError(f"got endpoint {self.url!r}, expected a URL ({error}). Correct it.") from error
        if not host:
            raise ValueError(f"got endpoint {self.url!r} without a host. Write it like http://127.0.0.1:8080.")
        headers = {}
        if api_key_env:
            if not (key := os.environ.get(api_key_env)):
                raise ValueError(f"got api_key_env {api_key_env!r}, but no such environment variable is set. Set it.")
            headers["Authorization"] = f"Bearer {key}"
        limits = httpx.Limits(max_connections=self.workers, max_keepalive_connections=self.workers)
        return httpx.Client(headers=headers, limits=limits, trust_env=host not in LOOPBACK)

    def check(self, timeout: float = 5.0) -> None:
        """Ask the server in a moment whether it is there and serves the model.

        A server without a list of models (404, 405, 501) is taken at its word, as the protocol does not demand one.
        "models/NAME" in the list counts as NAME.

        Raises:
            RewardError: it is not, or does not.
        """
        import httpx

        url = self.url.removesuffix("chat/completions") + "models"
        try:
            response = self._client.get(url, timeout=timeout)
            if response.status_code in UNLISTED:
                return
            response.raise_for_status()
            served = [str(row["id"]) for row in response.json()["data"]]
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise RewardError(
                f"the judge's endpoint {url} does not answer as expected ({type(error).__name__}: {error}). Start the "
                "server, or correct the endpoint."
            ) from error
        if self.model not in {name.removeprefix("models/") for name in served} | set(served):
            raise RewardError(
                f"the judge's endpoint serves {', '.join(served) or 'no model'}, expected {self.model!r}. Correct the "
                "model's name, or serve it under this one (--served-model-name)."
            )

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Ask questions, at most ``workers`` at once; equal questions are asked once.

        Returns:
            One answer for each question, in their order; failures have a reason and are not kept.
        """
        keys = [self._key(question) for question in questions]
        answers = {key: known for key in set(keys) if (known := self.cache.get(key)) is not None}
        open_ = {key: question for key, question in zip(keys, questions, strict=True) if key not in answers}
        self._count(asked=len(questions), cached=len(questions) - len(open_))
        if open_:
            batch = _Batch()

            def ask(key: str) -> Answer:
                answer = self._ask(open_[key], batch)
                if answer.text is not None:
                    self.cache.put(key, answer)  # at once: what is paid for survives an interrupt
                return answer

            pool = ThreadPoolExecutor(min(self.workers, len(open_)), thread_name_prefix="judge")
            try:
                answers |= dict(zip(open_, pool.map(ask, open_), strict=True))
            finally:
                batch.stopped.set()  # an interrupt reaches the tries that sleep
                pool.shutdown(wait=True, cancel_futures=True)
        return [answers[key] for key in keys]

    def _key(self, question: Question) -> str:
        content = {
            "identity": self.identity,
            "settings": self.settings,
            "seed": self.seed + question.seed,
            "text": question.text,
            "images": [picture.digest for picture in question.images],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _count(self, **numbers: int) -> None:
        with self._lock:
            self.counts.update(numbers)

    def _ask(self, question: Question, batch: _Batch) -> Answer:
        """One question with its retries."""
        start, shown = time.monotonic(), [{"type": "image_url", "image_url": {"url": p.url}} for p in question.images]
        message = {"role": "user", "content": [*shown, {"type": "text", "text": question.text}]}
        body = {**self.settings, "seed": self.seed + question.seed, "messages": [message]}
        for attempt in itertools.count(1):
            if batch.closed is not None:
                return self._give_up(batch.closed)
            self._count(tries=1)
            try:
                answer = self._try(body, start + self.deadline)
            except _Failed as failure:
                failed = failure
            else:
                batch.answered = time.monotonic()
                return answer
            doubled = min(self.pause * 2.0 ** (attempt - 1), 10.0)
            wait = max(failed.wait, doubled * random.uniform(0.5, 1))  # spreads the load; no result depends on it
            over = time.monotonic() + wait > start + self.deadline
            if over or not failed.again:
                reason = f"{failed.reason} ({attempt} tries in {time.monotonic() - start:.1f} s)"
                if failed.closed or (over and batch.answered < start):
                    batch.closed = reason
                return self._give_up(reason)
            if batch.stopped.wait(wait):
                return self._give_up("interrupted")
        raise AssertionError  # the loop has no other end

    def _give_up(self, reason: str) -> Answer:
        self._count(failed=1)
        return Answer(None, f"no answer from the judge: {reason}")

    def _try(self, body: Mapping[str, Any], end: float) -> Answer:
        """Send a request once.

        Raises:
            _Failed: it brought no answer.
        """
        import httpx

        timeout = httpx.Timeout(max(min(self.timeout, end - time.monotonic()), 0.01), pool=None)
        raw = bytearray()
        try:
            with self._client.stream("POST", self.url, json=body, timeout=timeout) as response:
                for chunk in response.iter_bytes():
                    raw += chunk
                    if len(raw) > LARGEST:
                        raise _Failed(f"the answer exceeds {LARGEST} bytes")
                    if time.monotonic() > end:  # httpx's timeout is that of one read
                        raise _Failed("the answer did not end before the deadline")
        except httpx.HTTPError as error:
            raise _Failed(f"{type(error).__name__}: {error}".rstrip(": ")) from error
        status = response.status_code
        if status != 200:
            said = bytes(raw[:200]).decode(errors="replace").strip()
            asked = response.headers.get("retry-after", "")
            raise _Failed(
                f"HTTP {status} {said}".rstrip(),
                again=status in BUSY,
                closed=status in CLOSED,
                wait=min(float(asked), 60.0) if asked.isdecimal() else 0.0,
            )
        return _read(bytes(raw))


def _chat_url(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"got endpoint {url!r}, expected a URL such as http://127.0.0.1:8080. Write it with http://.")
    url = url.rstrip("/")
    if url.endswith("/chat/completions"):
        return url
    return f"{url}/chat/completions" if url.endswith("/v1") else f"{url}/v1/chat/completions"


def _read(raw: bytes) -> Answer:
    """The answer in the body of a response.

    Raises:
        _Failed: it is not what the protocol says.
    """
    try:
        choice = json.loads(raw)["choices"][0]
        message = choice["message"]
        content, cut = message.get("content"), choice.get("finish_reason") == "length"
        reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise _Failed(f"the response is no chat completion ({type(error).__name__})") from error
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    if not isinstance(content, str) or not isinstance(reasoning, str):
        if cut:
            raise _Failed("the answer was cut before it began; raise max_tokens", again=False)
        raise _Failed("the response holds no text")
    return Answer(content, reasoning=reasoning, cut=cut)


@dataclass(frozen=True)
class Reply:
    """An answer as a grammar read it: ``value``, or None and ``reason``."""

    value: Any
    reason: str | None
    answer: Answer

    @property
    def unread(self) -> bool:
        """Whether there was an answer, but not in the form that was asked for."""
        return self.value is None and self.answer.text is not None


def ask_parsed(
    endpoint: ChatEndpoint, questions: Sequence[Question], parse: Sequence[Callable[[str], Any]], attempts: int = 1
) -> list[Reply]:
    """Ask, and read each answer with its grammar; an answer that cannot be read is asked for again, with a new seed.

    Args:
        endpoint: where to ask.
        questions: M questions.
        parse: M grammars.
        attempts: how often a question is asked until its answer can be parsed.

    Raises:
        ValueError: several attempts at temperature 0, at which a model only repeats itself.
    """
    if attempts > 1 and endpoint.temperature == 0:
        raise ValueError(
            f"got {attempts} attempts at temperature 0, expected 1: the model would repeat itself. Set a temperature."
        )
    replies: dict[int, Reply] = {}
    for attempt in range(attempts):
        again = [m for m in range(len(questions)) if m not in replies or replies[m].unread]
        later = attempt * 1_000_003  # far from the seeds of passes
        asked = [replace(questions[m], seed=questions[m].seed + later) for m in again]
        for m, answer in zip(again, endpoint.ask(asked), strict=True):
            replies[m] = _reply(answer, parse[m])
    return [replies[m] for m in range(len(questions))]


def _reply(answer: Answer, parse: Callable[[str], Any]) -> Reply:
    if answer.text is None:
        return Reply(None, answer.reason, answer)
    value, reason = tried(parse, answer.text)
    if reason is not None:
        reason = f"the judge's answer cannot be used: {reason}{' (cut at max_tokens)' if answer.cut else ''}"
    return Reply(value, reason, answer)
