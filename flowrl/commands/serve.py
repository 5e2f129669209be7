"""`flowrl serve`: rewards behind HTTP. Imports neither diffusers nor transformers, so that it runs beside old ones."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from flowrl.errors import UserError
from flowrl.rewards import load_reward

if TYPE_CHECKING:
    from reward_models.protocol import Reward

NAMED = re.compile(r"([\w.-]+)=(.+)", re.DOTALL)


def rewards(words: Sequence[str], device: str = "auto") -> dict[str, Reward]:
    """The rewards that the command line names: NAME, module:attribute, and either with another name, as in fast=clip.

    Args:
        words: of the command line; a mapping in braces needs a name in front of it, as in mix={shapes: 1, jpeg: 0.1}.
        device: auto, cpu, cuda or cuda:N.

    Raises:
        UserError: two of one name, a mapping without one, or a reward that cannot be loaded.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    found: dict[str, Reward] = {}
    for word in words:
        match = NAMED.fullmatch(word)
        name, text = match.groups() if match else (word, word)
        spec: Any = text
        if text.lstrip().startswith("{"):
            if match is None:
                raise UserError(f"got the mapping {word}; expected a name for it, as in mix={word}")
            from flowrl.config import parse_yaml

            spec = parse_yaml(text, name)
        if name in found:
            raise UserError(f"got two rewards named {name}; expected one; write OTHER={text} for the second")
        found[name] = load_reward(spec, device)
    return found


def token_from(variable: str | None) -> str | None:
    """The token in an environment variable; None without a variable."""
    if variable is None:
        return None
    token = os.environ.get(variable, "").strip()
    if not token:
        raise UserError(f"got --token-env {variable}, which is not set; expected the token in it; export it first")
    return token


def serve(
    words: Sequence[str],
    *,
    host: str,
    port: int,
    token_env: str | None,
    device: str,
    limits: dict[str, Any],
    say: Callable[[str], None],
    **options: Any,
) -> None:
    """Load the rewards and serve them until a signal ends it.

    Args:
        words, device: see `rewards`.
        host, port, options: see `reward_models.server.serve`.
        token_env: see `token_from`.
        limits: of `reward_models.service.Limits`.
        say: told the URL when it is open.
    """
    token = token_from(token_env)
    try:
        from reward_models import server
        from reward_models.service import Limits

        if token is None and not server.is_loopback(host):
            server.listen(host, port, token)  # says what is missing, before weights are loaded
        loaded = rewards(words, device)

        def ready(url: str) -> None:
            say(f"serving {', '.join(loaded)} at {url}")

        server.serve(loaded, host=host, port=port, token=token, limits=Limits(**limits), ready=ready, **options)
    except ValueError as error:
        raise UserError(str(error)) from error
