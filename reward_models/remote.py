"""A reward that runs behind `reward_models.server`, with the face of a local one.

Scores agree with those of the same reward here to the last bit: pixels, float32 values, parts, reasons, uncertainty and
region maps travel exactly, and neither groups nor sets are cut. (A network whose last bits depend on how many images
share a call agrees so only where the server keeps the calls as they come, ``--batch 1``, and one request holds them
all.) What fails is tried again until a deadline; an image without an answer by then is missing, with the reason.

Deviations from a local reward: one that raises makes the images missing that it cannot score, instead of ending the
call; tuples in metadata arrive as lists; there is no gradient.
"""

from __future__ import annotations

import os
import threading
import time
import urllib.parse
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import torch
from torch import Tensor

from . import wire
from .protocol import Metadata, RewardError, RewardResult, RewardSpec

TOKEN_VARIABLE = "FLOWRL_REWARD_TOKEN"
TRY_AGAIN = frozenset({400, 408, 425, 429, 500, 502, 503, 504})  # 400: the body was damaged on its way
PATIENCE_S = (5.0, 10.0)  # of the check at the start: to connect, to answer
PAUSE_S = (0.1, 5.0)  # between tries: the first, and the longest
LIMITS = ("timeout_s", "batch", "items", "body", "request_pixels")  # of a server, that its clients keep to
GRACE_S = 5.0  # a client waits so much longer than the server, so that the server's word comes first


class _Again(Exception):
    """A try failed in a way that another may not; `pause_s` is what the server asked for."""

    def __init__(self, message: str, pause_s: float = 0.0) -> None:
        super().__init__(message)
        self.pause_s = pause_s


class _Refused(Exception):
    """The server will never serve this request."""


@dataclass
class _Progress:
    """Of one call of `score`, shared by its requests: when the server last answered, and whether to stop."""

    answered: float
    stop: threading.Event


class RemoteReward:
    """A reward of a server.

    Args:
        url: ``http://HOST:PORT``, with ``#NAME`` behind it for one of several rewards.
        reward: its name on the server, if not in the url; not needed where the server has only one.
        token: the server's token; default: the environment variable `token_env`, which no config file shows.
        token_env: see `token`.
        timeout: seconds for one try; default: a little more than the server allows itself.
        deadline: seconds after which a request is given up, and after which a silent server is.
        parallel: requests under way at a time.
        per_request: images per request, where they may be cut; default: the server's batch.

    Raises:
        ValueError: the url is none, the token is wrong, or the server has no such reward.
        RewardError: nothing answers there, or something that is no reward server.
    """

    rounds = True  # images are put on the 8-bit grid as they are sent, and need not be copied whole before

    def __init__(
        self,
        url: str,
        reward: str | None = None,
        *,
        token: str | None = None,
        token_env: str = TOKEN_VARIABLE,
        timeout: float | None = None,
        deadline: float = 600.0,
        parallel: int = 4,
        per_request: int | None = None,
    ) -> None:
        for what, number in (("timeout", timeout), ("deadline", deadline), ("parallel", parallel)):
            if number is not None and not number > 0:
                raise ValueError(f"got {what} {number}, expected a positive number. Correct it.")
        if per_request is not None and per_request < 1:
            raise ValueError(f"got per_request {per_request}, expected a positive number. Correct it.")
        self.url, self.name = _parts(url, reward)
        token = token or os.environ.get(token_env)
        self._http = httpx.Client(
            headers={"authorization": f"Bearer {token}"} if token else {},
            limits=httpx.Limits(max_connections=parallel, max_keepalive_connections=parallel),
            trust_env=False,  # a proxy of the environment is for the outside world
        )
        health = self._health(token_env)
        self.name, self.spec = self._chosen(health)
        self.limits: dict[str, float] = health["limits"]
        self.timeout = timeout or self.limits["timeout_s"] + GRACE_S
        self.deadline, self.parallel = deadline, parallel
        self.per_request = min(per_request or int(self.limits["batch"]), int(self.limits["items"]))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _health(self, token_env: str) -> dict[str, Any]:
        """What the server says about itself; this is the check before anything else is loaded."""
        start = f"Start it with `flowrl serve {self.name or 'REWARD'} --port {httpx.URL(self.url).port or 80}`"
        try:
            response = self._http.get(f"{self.url}/health", timeout=httpx.Timeout(PATIENCE_S[1], connect=PATIENCE_S[0]))
        except httpx.HTTPError as error:
            raise RewardError(
                f"got no answer from {self.url} ({_said(error)}), expected a reward server there. {start}, or correct "
                "the url."
            ) from error
        if response.status_code == 401:
            raise ValueError(
                f"got no entry to {self.url}: the token is wrong or missing, expected the server's. Set it in the "
                f"environment variable {token_env}."
            )
        try:
            found = response.json()
            if response.status_code != 200 or found["protocol"] != wire.PROTOCOL:
                raise ValueError(f"status {response.status_code}, protocol {found.get('protocol')!r}")
            limits = {what: float(found["limits"][what]) for what in LIMITS}
            if not found["rewards"] or not min(limits.values()) > 0:
                raise ValueError("no rewards, or limits that are not positive")
            return {"rewards": dict(found["rewards"]), "limits": limits}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RewardError(
                f"got something from {self.url} that is no reward server of protocol {wire.PROTOCOL} ({error}), "
                f"expected one. {start} of the same version, or correct the url."
            ) from error

    def _chosen(self, health: dict[str, Any]) -> tuple[str, RewardSpec]:
        names = list(health["rewards"])
        name = self.name or (names[0] if len(names) == 1 else None)
        if name is None or name not in names:
            raise ValueError(
                f"got reward {name!r} of {self.url}, expected one of {', '.join(names)}. "
                f"Name it: {self.url}#{names[0]}."
            )
        try:
            return name, wire.spec_from_json(health["rewards"][name])
        except ValueError as error:
            raise RewardError(f"{self.url}: {error}. Run the same version of flowrl on both sides.") from error

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``; images without an answer within `deadline` are missing.

        Raises:
            ValueError: metadata that JSON cannot hold, or a group that exceeds the server's limits.
            RewardError: another reward or version answers than at the start: its scores would not be comparable.
        """
        n = len(images)
        if n == 0:
            return RewardResult(torch.zeros(0))
        for i, entry in enumerate(metadata):
            wire.check_metadata(dict(entry), f"metadata {i}")
        numbers = None if groups is None or self.spec.scope == "point" else [int(number) for number in groups]
        rows = [
            wire.to_json({"prompt": prompt, "metadata": dict(entry)} | ({"group": numbers[i]} if numbers else {}))
            for i, (prompt, entry) in enumerate(zip(prompts, metadata, strict=True))
        ]
        requests = self._requests(rows, images.shape[-2], images.shape[-1], numbers)
        progress = _Progress(time.monotonic(), threading.Event())

        def one(index: Sequence[int]) -> tuple[Sequence[int], RewardResult]:
            return index, self._request([images[i] for i in index], [rows[i] for i in index], progress)

        with ThreadPoolExecutor(min(self.parallel, len(requests)), "reward client") as pool:
            try:
                return wire.join(n, list(pool.map(one, requests)))
            except BaseException:  # also Ctrl-C: the others shall not go on for minutes
                progress.stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _requests(
        self, rows: Sequence[bytes], height: int, width: int, groups: Sequence[int] | None
    ) -> list[list[int]]:
        """Numbers of the images of each request: as many as allowed, but never part of a group (set)."""
        everything = list(range(len(rows)))
        if self.spec.scope == "point":
            units = [[i] for i in everything]
        elif self.spec.scope == "set" or groups is None:
            units = [everything]
        else:
            members: dict[int, list[int]] = {number: [] for number in groups}
            for i, number in enumerate(groups):
                members[number].append(i)
            units = list(members.values())
        room = {"items": self.limits["items"], "request_pixels": self.limits["request_pixels"]} | {
            "body": self.limits["body"] - 1000
        }
        requests: list[list[int]] = []
        used: dict[str, int] = {}
        for unit in units:
            need = {"items": len(unit), "request_pixels": height * width * len(unit)}
            need["body"] = sum(len(rows[i]) for i in unit) + len(unit) * wire.room(height, width)
            for limit, most in room.items():
                if need[limit] > most:
                    raise ValueError(
                        f"got {len(unit)} images of {height, width} that must be scored together, which "
                        f"exceeds the {limit} of a request to {self.url} ({need[limit]} of {most:.0f}). Start the "
                        "server with a higher limit."
                    )
            total = {limit: used.get(limit, 0) + need[limit] for limit in need}
            if requests and total["items"] <= self.per_request and all(total[k] <= room[k] for k in room):
                requests[-1] += unit
                used = total
            else:
                requests.append(list(unit))
                used = need
        return requests

    def _request(self, images: Sequence[Tensor], rows: Sequence[bytes], progress: _Progress) -> RewardResult:
        """One request, tried until it is answered, refused, or given up."""
        name = uuid.uuid4().hex  # the server answers a repeated request without scoring it again
        body = wire.request(self.name, name, rows, images)
        head = {"content-type": "application/json", "content-length": str(sum(map(len, body)))}
        head[wire.DIGEST] = wire.digest(*body)
        begun, tries, pause, last = time.monotonic(), 0, PAUSE_S[0], "never tried"
        while not progress.stop.is_set():
            left = min(begun, progress.answered) + self.deadline - time.monotonic()
            if left <= 0:
                break
            tries += 1
            try:
                result = self._attempt(body, head, name, len(rows), min(self.timeout, left), progress)
            except _Refused as error:
                return wire.missing(len(rows), f"{self.url} refused the request: {error}")
            except _Again as error:
                last = str(error)
                jitter = 0.5 + 0.5 * int(name[tries % 32], 16) / 15  # so that clients do not come back all at once
                progress.stop.wait(max(0.0, min(max(pause * jitter, error.pause_s), left)))
                pause = min(2 * pause, PAUSE_S[1])
            else:
                progress.answered = time.monotonic()
                return result
        return wire.missing(
            len(rows), f"{self.url} gave no score within {self.deadline:g} s ({tries} tries; the last: {last})"
        )

    def _attempt(
        self, body: list[bytes], head: dict[str, str], name: str, n: int, seconds: float, progress: _Progress
    ) -> RewardResult:
        until = time.monotonic() + seconds
        answer = bytearray()
        try:
            with self._http.stream(
                "POST", f"{self.url}/score", content=body, headers=head, timeout=seconds
            ) as response:
                for chunk in response.iter_raw():
                    answer += chunk
                    if time.monotonic() > until or progress.stop.is_set():  # the timeout above is one of each chunk
                        raise _Again(f"the answer took longer than {seconds:.0f} s")
        except httpx.HTTPError as error:
            raise _Again(_said(error)) from error
        status = response.status_code
        if status != 200:
            text = bytes(answer[:300]).decode("utf-8", "replace")
            if status in TRY_AGAIN:
                raise _Again(f"status {status}: {text}", _seconds(response.headers.get("retry-after")))
            raise _Refused(f"status {status}: {text}")
        if response.headers.get(wire.DIGEST) != wire.digest(bytes(answer)):
            raise _Again("the answer arrived damaged")
        try:
            found = wire.from_json(bytes(answer))
            if found["id"] != name:
                raise ValueError("it answers another request")
            identity = found["name"], found["version"]
            result = wire.result_from_json(found, n)
        except (ValueError, KeyError, TypeError) as error:
            raise _Again(f"the answer cannot be read ({error})") from error
        if identity != (self.spec.name, self.spec.version):
            raise RewardError(
                f"the reward at {self.url}#{self.name} was {self.spec.name} of version {self.spec.version} and is now "
                f"{identity[0]} of version {identity[1]}: their scores cannot be compared. Serve the first one again, "
                "or start anew."
            )
        return result


def _parts(url: str, reward: str | None) -> tuple[str, str | None]:
    """(url without the name and the last slash, name)."""
    parts = urllib.parse.urlsplit(url)
    try:
        sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        sound = False
    if not sound or parts.query or parts.username or parts.password:
        raise ValueError(
            f"got reward url {parts._replace(netloc=parts.netloc.rpartition('@')[2]).geturl()!r}, expected "
            "http://HOST:PORT or http://HOST:PORT#NAME. A token goes into an environment variable."
        )
    name = urllib.parse.unquote(parts.fragment) or None
    if name and reward and name != reward:
        raise ValueError(f"got the names {name!r} in the url and {reward!r} besides, expected one. Leave one out.")
    return parts._replace(fragment="").geturl().rstrip("/"), reward or name


def _seconds(header: str | None) -> float:
    """Retry-After in seconds; dates are not read."""
    return min(float(header), 60.0) if header and header.isdecimal() else 0.0


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
