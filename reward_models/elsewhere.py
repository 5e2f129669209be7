"""Rewards that are computed elsewhere, by a reward server or by a judge behind an endpoint.

Loading one asks its server in seconds whether it is there: a remote reward reads its spec there, a judge looks for its
model (``protocol.preflight``). Whoever loads weights, or several rewards, has these asked first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from . import recipe
from .loading import load
from .protocol import RewardSpec
from .recipe import Named


def elsewhere(spec: Any) -> Iterator[Named]:
    """The rewards in a specification that ask a server and load nothing here.

    Args:
        spec: as for ``load``; weights may be left out, as in ``{name: {option: value}}``.
    """
    return filter(_asks_a_server, _named(spec))


def _named(spec: Any) -> Iterator[Named]:
    plain = isinstance(spec, Mapping) and not {"combine", "transform"} & set(spec)
    return recipe.named(recipe.parse({"combine": "sum", "of": spec} if plain else spec))


def _asks_a_server(reward: Named) -> bool:
    judge = reward.options.get("judge")  # of a win rate
    return (
        reward.name.startswith(("http://", "https://"))
        or "endpoint" in reward.options
        or (isinstance(judge, str | Mapping) and all(map(_asks_a_server, _named(judge))))
    )


def ask_elsewhere(*specs: Any) -> dict[str, RewardSpec]:
    """Ask the servers of all rewards that are computed elsewhere; returns the specs of these rewards by name.

    Raises:
        ValueError: a specification or its options are wrong, or the server has no such reward.
        RewardError: a server does not answer, or not as expected.
    """
    return {each.name: load(each.name, **each.options).spec for spec in specs for each in elsewhere(spec)}
