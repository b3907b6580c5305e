"""POOL/settings.toml: what a server of the pool obeys. docs/access.md and docs/limits.md say what it means."""

from __future__ import annotations

import math
import os
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nbdclone.errors import StorageError, UsageError
from nbdclone.server.access import Access, in_a_line, read_access, read_pattern, read_table, refuse_unknown
from nbdclone.server.limits import UNLIMITED, Limit, Limits, Rule
from nbdclone.store.fs import FILE_SYSTEM

_SIZE = re.compile(r"(\d{1,18})([KMGT]?)(?:i?B)?", re.IGNORECASE)
# No more than a disk may have bytes: so that nothing is infinite but what is said to be.
MAX_RATE = 1 << 62


@dataclass(frozen=True)
class Settings:
    """What the file says."""

    access: Access = field(default_factory=Access)
    limits: Limits = field(default_factory=Limits)


def read_settings(path: Path, default: Limit = UNLIMITED) -> Settings:
    """Read the file; ``default`` holds for exports that it gives no limit.

    Raises UsageError: file, key, what is wrong.
    """
    return parse_settings(read_text(path), path, default)


def read_text(path: Path) -> str:
    """What is in the file; a missing one says nothing. Raises UsageError."""
    try:
        with open(FILE_SYSTEM.open_file(path, os.O_RDONLY), encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return ""
    except StorageError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        raise UsageError(f"{path}: {os.strerror(error.errno or 0)}") from None
    except ValueError as error:
        raise UsageError(f"{path}: {in_a_line(error)}") from None


def parse_settings(text: str, path: Path, default: Limit = UNLIMITED) -> Settings:
    """The settings that this text of the file at ``path`` says. Raises UsageError."""
    try:
        settings = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: {in_a_line(error)}") from None
    try:
        refuse_unknown(settings, ("access", "limit"), "")
        limits = read_table(settings.get("limit", {}), "limit")
        return Settings(
            read_access(settings), Limits(default, {name: _read_limit(name, given) for name, given in limits.items()})
        )
    except ValueError as error:
        raise UsageError(f"{path}: {in_a_line(error)}") from None


def _read_limit(name: str, given: Any) -> Rule:
    key = f'limit."{name}"'
    read_pattern(name, key)
    rule = read_table(given, key)
    refuse_unknown(rule, ("iops", "bps"), f"{key}.")
    if not rule:
        raise ValueError(f"{key}: says nothing: give iops or bps")
    return Rule(_read_rate(rule, key, "iops"), _read_rate(rule, key, "bps"))


def _read_rate(rule: dict[str, Any], key: str, name: str) -> float | None:
    """A number from 1 on; of bytes, also as ``"50M"``; ``"none"`` for no limit."""
    value = rule.get(name)
    if value is None:
        return None
    if value == "none":
        return math.inf
    if name == "bps" and isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        value = int(match[1]) << (10 * " KMGT".index(match[2].upper() or " "))
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_RATE:
        form = 'a number from 1 on, a size like "50M",' if name == "bps" else "a number from 1 on"
        raise ValueError(f'{key}.{name}: {value!r} is to be {form} or "none"')
    return value
