"""`flowrl bench SUITE`: the steps of a suite as the command line asks for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.suites import suites
from benchmarks.suites.by_task import ByTask
from benchmarks.suites.suite import FACTS, Suite, generate, listed, missing, prepare, report, score
from flowrl.commands.scoring import load_rewards
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
    if "generate" in steps or not (out / FACTS).exists():
        if open_policy is not None or not (out / FACTS).exists():
            prepare(suite, out, source=source, limit=limit, images=images, drawn=drawn)
        if open_policy is not None and (lacking := missing(out)):
            drew = generate(out, open_policy(), settings)
            say(f"{drew} images drawn, as {len(lacking)} were missing")
        listed(out)
    if "score" in steps:
        wrapped = {name: suite.wrap(out, each) for name, each in given_rewards(suite, rewards, device).items()}
        done = score(out, wrapped)
        say(done.throughput())
    if "report" not in steps:
        return None
    return report(suite, out)


def given_rewards(suite: Suite, texts: Sequence[str], device: str) -> dict[str, Reward]:
    """Column -> scorer: each text is rewards as `flowrl score` takes them, or TASK=REWARD for one task."""
    texts = list(texts) or ([suite.reward] if suite.reward else [])
    if not texts:
        raise UserError(
            f"{suite.name} has no scorer of its own; expected --reward NAME (see `flowrl list rewards`); choose one"
        )
    routed: dict[str, Reward] = {}
    found: dict[str, Reward] = {}
    for text in texts:
        task, equals, inner = text.partition("=")
        if equals and task.replace("-", "_").replace("_", "").isalnum():
            loaded = load_rewards(inner, device)
            if len(loaded) != 1:
                raise UserError(f"got --reward {text}; expected one scorer for {task}")
            routed[task] = next(iter(loaded.values()))
        else:
            found |= load_rewards(text, device)
    return found | ({suite.name: ByTask(routed)} if routed else {})
