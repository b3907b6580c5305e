"""What bases, clones and snapshots may be called."""

from __future__ import annotations

import re

from nbdclone.errors import InvalidName

# Names are directory names and export names, are typed by people and pasted into URIs. '@' and '+' are kept free.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def is_name(text: str) -> bool:
    """Can a base, clone or snapshot be called that?"""
    return _NAME.fullmatch(text) is not None


def validate_name(name: str) -> None:
    """Raises InvalidName that says what a name may be."""
    if not is_name(name):
        shown = name if len(name) <= 40 else name[:40] + "..."
        raise InvalidName(
            f"{shown!r} cannot be a name: 1 to 100 letters, digits, '.', '-' and '_', the first a letter or digit"
        )


def split_name(name: str) -> tuple[str, str | None]:
    """``web1@golden`` is the snapshot ``golden`` of ``web1``; ``web1`` has None."""
    clone, at, snapshot = name.partition("@")
    return clone, snapshot if at else None


def validate_snapshot_name(name: str) -> tuple[str, str]:
    """The two parts of ``clone@snapshot``. Raises InvalidName."""
    clone, snapshot = split_name(name)
    if snapshot is None:
        raise InvalidName(f"{name[:100]!r} is no snapshot: write CLONE@NAME")
    validate_name(clone)
    validate_name(snapshot)
    return clone, snapshot
