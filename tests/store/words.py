"""Errors as a person meets them."""

from __future__ import annotations

from collections.abc import Callable

from nbdclone.errors import NBDCloneError


def refusal(attempt: Callable[[], object]) -> str | None:
    """What the attempt was refused with, one line; None if it was not. Any other exception passes."""
    try:
        attempt()
    except NBDCloneError as error:
        message = str(error)
        if not message or "\n" in message:
            raise AssertionError(f"no message for a person: {message!r}") from error
        return message
    return None
