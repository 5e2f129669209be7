"""Who learns from the next rollout: schedules of adversarial training, as pure functions.

Adv-GRPO (arXiv 2511.20256) draws a rollout for the discriminator and throws it away: with its ratio of 9 to 1, nine of
ten rollouts never reach the generator. Sampling is the dear part, so here (``reuse``, the default) every rollout trains
the generator, and where it is the discriminator's turn, the same images train the discriminator first. The order is

    rollout -> discriminator's steps on these images -> score them -> generator's update

so that the generator is paid by the newest discriminator, and steps per generator update keep the published ratio.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Turn:
    """What the next update trains.

    Attributes:
        discriminator: its steps on the images of this update, before they are scored.
        generator: whether the generator is updated.
    """

    discriminator: int
    generator: bool


def alternate(update: int, discriminator: int = 9, generator: int = 1, *, reuse: bool = True) -> Turn:
    """A fixed ratio of discriminator steps to generator updates.

    Args:
        update: number of finished updates, from 0.
        discriminator, generator: the ratio; 9 and 1 in the published code.
        reuse: True: the generator learns at every update, the discriminator makes its steps at once on the images of
            each `generator`-th one, the first included. False: as published, first `discriminator` updates that train
            only the discriminator, one step each, then `generator` updates that train only the generator.

    Raises:
        ValueError: a negative number or ratio.
    """
    if update < 0 or discriminator < 0 or generator < 1:
        raise ValueError(
            f"got update {update} and {discriminator} to {generator} steps, expected update >= 0, discriminator >= 0 "
            "and generator >= 1. Correct the schedule."
        )
    if reuse:
        return Turn(discriminator if update % generator == 0 else 0, True)
    first = update % (discriminator + generator) < discriminator
    return Turn(1, False) if first else Turn(0, True)


def trigger(mean_reference: float, mean_sample: float, steps: int = 1, *, reuse: bool = True) -> Turn:
    """The discriminator learns only when it is fooled: when references score below samples on average.

    Args:
        mean_reference, mean_sample: mean rewards of both under the present discriminator.
        steps: of the discriminator when it is fooled.
        reuse: whether the generator also learns then, from scores made after these steps (as published: not).

    Raises:
        ValueError: a mean that is not finite.
    """
    if not abs(mean_reference) + abs(mean_sample) < float("inf"):
        raise ValueError(
            f"got mean rewards {mean_reference} of references and {mean_sample} of samples, expected finite ones. "
            "Leave missing rewards out of the mean."
        )
    fooled = mean_reference < mean_sample
    return Turn(steps if fooled else 0, reuse or not fooled)
