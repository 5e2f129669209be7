"""`flowrl bench SUITE`: the steps of a suite as the command line asks for them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.suites import suites
from benchmarks.suites.by_task import ByTask
from benchmarks.suites.suite import (
    FACTS,
    Suite,
    generate,
    listed,
    missing,
    prepare,
    read_facts,
    report,
    score,
    tags,
)  # fmt: skip
from flowrl.commands.scoring import check_rewards, load_rewards
from flowrl.errors import UserError

if TYPE_CHECKING:
    from flowrl.policies import Policy
    from flowrl.sampling import SampleSettings
    from reward_models.protocol import Reward

STEPS = ("generate", "score", "report")


def run(
    name: str, out: Path, *, steps: Sequence[str], open_policy: Callable[[], Policy] | None, settings: SampleSettings,
    drawn: dict[str, Any], source: str | None, rewards: Sequence[str], limit: int | None, images: int | None,
    device: str, say: Callable[[str], None],
) -> dict[str, Any] | None:  # fmt: skip
    """Run some steps of a suite over the folder `out`; returns the summary if a report was written.

    open_policy: loads the model, called only if an image is missing; None: the images are there already.
    """
    if wrong := [step for step in steps if step not in STEPS]:
        raise UserError(f"got --step {wrong[0]}; expected one of {', '.join(STEPS)}")
    suite: Suite = suites()[name]
    new = not (out / FACTS).exists()
    if new or open_policy is not None:
        prepare(suite, out, source=source, limit=limit, images=images, drawn=drawn)
    elif (source, limit, images) != (None, None, None):  # what is asked for must be what is there
        prepare(suite, out, source=source, limit=limit, images=images, drawn=read_facts(out)["drawn"])
    read_facts(out, suite)
    asked = scorers(suite, rewards, tags(out)) if "score" in steps else {}
    for text in itertools.chain.from_iterable(asked.values()):
        check_rewards(text)  # now, and not after hours of drawing
    if "generate" in steps or new:
        if open_policy is not None and missing(out):
            say(f"{generate(out, open_policy(), settings, say)} images drawn")
        listed(out)
    if "score" in steps:
        loaded = load_scorers(suite, asked, device)
        done = score(out, {name: suite.wrap(out, each) for name, each in loaded.items()}, say)
        say(done.throughput())
    if "report" not in steps:
        return None
    return report(suite, out)


def scorers(suite: Suite, texts: Sequence[str], tags: Sequence[str]) -> dict[str | None, list[str]]:
    """Task (None: every task) -> the rewards that are to score it, each as `flowrl score` takes them.

    texts: what `--reward` says, each such rewards or TASK=REWARD. tags: the tasks that there are.

    Raises:
        UserError: no scorer, or one for a task that is not there.
    """
    if not texts and suite.reward is None:
        raise UserError(
            f"{suite.name} has no scorer of its own; expected --reward NAME (see `flowrl list rewards`); choose one"
        )
    found: dict[str | None, list[str]] = {}
    for text in texts or [str(suite.reward)]:
        task, equals, reward = text.partition("=")
        if equals and task in tags:
            found.setdefault(task, []).append(reward)
        elif equals and re.fullmatch(r"[\w &-]+", task):
            raise UserError(f"got --reward {text}; expected TASK=REWARD with one of the tasks {', '.join(tags)}")
        else:
            found.setdefault(None, []).append(text)
    return found


def load_scorers(suite: Suite, asked: Mapping[str | None, Sequence[str]], device: str) -> dict[str, Reward]:
    """Column -> scorer, from what `scorers` found; those of single tasks are one column."""
    routed: dict[str, Reward] = {}
    found: dict[str, Reward] = {}
    for task, texts in asked.items():
        loaded: dict[str, Reward] = {}
        for text in texts:
            loaded |= load_rewards(text, device)
        if task is None:
            found |= loaded
        elif len(loaded) == 1 == len(texts):
            (routed[task],) = loaded.values()
        else:
            raise UserError(f"got --reward {task}={','.join(texts)}; expected one scorer for {task}")
    if routed and suite.name in found:
        raise UserError(
            f"got --reward {suite.name} beside scorers of single tasks, which make a column of the same name; expected "
            "one of the two; score the other into another --out"
        )
    return found | ({suite.name: ByTask(routed)} if routed else {})
