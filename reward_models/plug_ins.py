"""Detectors, readers and other helpers of a user, by name."""

from __future__ import annotations

import importlib
from typing import Any


def plug_in(spec: str, what: str, expected: str) -> Any:
    """The object that "module:attribute" names; a class is called without arguments.

    Args:
        spec: the name. what: "detector", for the message. expected: what could stand there, for the message.

    Raises:
        ValueError: the name leads nowhere.
    """
    module, _, attribute = spec.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:  # ValueError: there is no module before the colon
        raise ValueError(
            f"got {what} {spec!r}, which is not there ({error}), expected {expected}. Correct the name."
        ) from error
    return found() if isinstance(found, type) else found
