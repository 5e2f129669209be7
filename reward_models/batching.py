"""Many small requests, one reward: a thread that scores what is waiting, in batches.

A reward is called from one thread only. Requests to a point-wise reward whose images have one size are scored
together, and a request is never cut, so a server with ``batch=1`` calls the reward exactly as its clients do. A reward
of groups or sets gets each request by itself, with the group numbers as they were sent.

If a call fails, its images (groups, sets) are scored one by one, so that only those which cannot be scored are missing.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .protocol import Metadata, Reward, RewardError, RewardResult, checked_score
from .wire import join, missing, take

logger = logging.getLogger(__name__)
PATHS = re.compile(r"(?:[A-Za-z]:)?(?:[/\\][\w.@+~-]+){2,}")


class QueueFull(Exception):
    """More images are waiting than may wait; `retry_s` is when to come back."""

    def __init__(self, retry_s: float) -> None:
        super().__init__(f"come back in {retry_s:.0f} s")
        self.retry_s = retry_s


class Expired(Exception):
    """Nobody asked for the job any more before its turn came."""


@dataclass(eq=False)
class Job:
    """One request: N images of one size, and the future of their scores.

    images: (N, 3, H, W) uint8. expires: on the clock of time.monotonic; whoever still waits for it moves it on.
    """

    images: Tensor
    prompts: list[str]
    metadata: list[Metadata]
    groups: Tensor | None
    expires: float
    future: Future[RewardResult] = field(default_factory=Future)


@dataclass
class Counts:
    """What a batcher has done so far."""

    calls: int = 0
    images: int = 0
    missing: int = 0
    failed_calls: int = 0
    seconds: float = 0.0


class Batcher:
    """Scores jobs in a thread of its own.

    Args:
        reward: see ``Reward``.
        batch: most images of a call that is made of several requests.
        wait_s: how long the first request of a batch waits for others.
        queue: most images that wait; one request alone may be larger.
    """

    def __init__(self, reward: Reward, *, batch: int = 32, wait_s: float = 0.005, queue: int = 2048) -> None:
        self.reward, self.batch, self.wait_s, self.queue = reward, batch, wait_s, queue
        self.counts = Counts()
        self.busy_since: float | None = None
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"reward {reward.spec.name}", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Images that wait for their turn."""
        with self._changed:
            return self._waiting()

    def _waiting(self) -> int:
        return sum(len(job.prompts) for job in self._jobs)

    def submit(self, job: Job) -> None:
        """Queue a job; its future gets the scores.

        Raises:
            QueueFull: too many images wait already, or the batcher is closed.
        """
        with self._changed:
            waiting = self._waiting()
            if self._closed or (self._jobs and waiting + len(job.prompts) > self.queue):
                pace = self.counts.seconds / max(self.counts.images, 1)
                raise QueueFull(min(max(1.0, pace * waiting), 30.0))
            self._jobs.append(job)
            self._changed.notify()

    def close(self, patience_s: float = 0.0) -> None:
        """Take no more jobs, finish those that wait, and return when that is done or after `patience_s`."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(patience_s)

    def _run(self) -> None:
        while (jobs := self._next()) is not None:
            jobs = [job for job in jobs if _begun(job)]
            if not jobs:
                continue
            self.busy_since = time.monotonic()
            try:
                self._answer(jobs)
            except BaseException as error:  # the thread outlives whatever a reward does, and nobody waits in vain
                logger.exception("%s failed", self.reward.spec.name)
                for job in jobs:
                    if not job.future.done():
                        job.future.set_exception(RewardError(public(error)))
            finally:
                self.counts.seconds += time.monotonic() - self.busy_since
                self.busy_since = None
            del jobs  # their pixels, while others are waited for

    def _next(self) -> list[Job] | None:
        """The oldest job and those that can be scored with it; None when closed and all is done."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closed)
            if not self._jobs:
                return None
            if self.reward.spec.scope != "point":
                return [self._jobs.popleft()]
            first = self._jobs[0].images.shape[1:]
            fitting = lambda: sum(len(j.prompts) for j in self._jobs if j.images.shape[1:] == first)  # noqa: E731
            self._changed.wait_for(lambda: self._closed or fitting() >= self.batch, self.wait_s)
            taken: list[Job] = []
            total = 0
            for job in list(self._jobs):
                size = len(job.prompts)
                if job.images.shape[1:] == first and (not taken or total + size <= self.batch):
                    taken.append(job)
                    total += size
                    self._jobs.remove(job)
            return taken

    def _answer(self, jobs: list[Job]) -> None:
        try:
            whole = self._call(
                torch.cat([job.images for job in jobs]) if len(jobs) > 1 else jobs[0].images,
                [prompt for job in jobs for prompt in job.prompts],
                [entry for job in jobs for entry in job.metadata],
                jobs[0].groups if len(jobs) == 1 else None,  # a reward of single images does not read them
            )
        except (RewardError, ValueError, torch.OutOfMemoryError) as error:
            self.counts.failed_calls += 1
            logger.warning("%s could not score a batch; one by one now", self.reward.spec.name, exc_info=error)
            results = [self._piecewise(job, error if len(jobs) == 1 else None) for job in jobs]
        else:
            ends = torch.tensor([len(job.prompts) for job in jobs]).cumsum(0).tolist()
            results = [take(whole, range(end - len(job.prompts), end)) for job, end in zip(jobs, ends, strict=True)]
        for job, result in zip(jobs, results, strict=True):
            self.counts.images += len(job.prompts)
            self.counts.missing += int(result.missing.sum())
            job.future.set_result(result)

    def _piecewise(self, job: Job, failed: Exception | None) -> RewardResult:
        """Scores of a job, each image (group) by itself; `failed` is why the whole of it could not be scored."""
        pieces: list[tuple[Sequence[int], RewardResult]] = []
        units = self._units(job)
        for index in units:
            groups = None if job.groups is None else job.groups[list(index)]
            try:
                if failed is not None and len(units) == 1:
                    raise failed
                prompts, metadata = [job.prompts[i] for i in index], [job.metadata[i] for i in index]
                pieces.append((index, self._call(job.images[list(index)], prompts, metadata, groups)))
            except (RewardError, ValueError, torch.OutOfMemoryError) as error:
                pieces.append((index, missing(len(index), public(error))))
        return join(len(job.prompts), pieces)

    def _units(self, job: Job) -> list[list[int]]:
        """What a failure may be blamed on: single images, groups, or all of it."""
        everything = list(range(len(job.prompts)))
        if self.reward.spec.scope == "point":
            return [[i] for i in everything]
        if self.reward.spec.scope == "set" or job.groups is None:
            return [everything]
        numbers = job.groups.tolist()
        return [[i for i in everything if numbers[i] == number] for number in dict.fromkeys(numbers)]

    def _call(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None
    ) -> RewardResult:
        self.counts.calls += 1
        return checked_score(self.reward, images, prompts, metadata, groups, all_missing="allow")


def _begun(job: Job) -> bool:
    """Whether the job is still wanted; from then on it cannot be cancelled."""
    if job.expires < time.monotonic():
        job.future.set_exception(Expired())
        return False
    return job.future.set_running_or_notify_cancel()


def public(error: BaseException) -> str:
    """An error's text for those outside: short, and without paths of this machine (the log has the traceback)."""
    text = str(error) if isinstance(error, RewardError) else f"{type(error).__name__}: {error}"
    return PATHS.sub("[path]", text)[:500]
