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
from nbdclone.server.templates import DEFAULT_LIMIT, Template, Templates
from nbdclone.store.fs import FILE_SYSTEM
from nbdclone.store.layer import BLOCK_SIZE
from nbdclone.store.names import is_name, split_name

_SIZE = re.compile(r"(\d{1,18})([KMGT]?)(?:i?B)?", re.IGNORECASE)
# No more than a disk may have bytes: so that nothing is infinite but what is said to be.
MAX_RATE = 1 << 62
# More than any machine serves, and no slip of a finger.
MAX_CLONES = 100_000
# The lifetime of a clone that goes when its last client has gone.
CONNECTED = "connected"
_TIME = re.compile(r"(\d{1,9})([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Settings:
    """What the file says."""

    access: Access = field(default_factory=Access)
    limits: Limits = field(default_factory=Limits)
    templates: Templates = field(default_factory=Templates)


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
        refuse_unknown(settings, ("access", "limit", "template"), "")
        limits = read_table(settings.get("limit", {}), "limit")
        templates = read_table(settings.get("template", {}), "template")
        return Settings(
            read_access(settings),
            Limits(default, {name: _read_limit(name, given) for name, given in limits.items()}),
            Templates({name: _read_template(name, given) for name, given in templates.items()}),
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


def _read_template(name: str, given: Any) -> Template:
    key = f"template.{name}"
    table = read_table(given, key)
    refuse_unknown(table, ("pattern", "source", "lifetime", "quota", "limit"), f"{key}.")
    pattern, source = (_read_string(table, key, each) for each in ("pattern", "source"))
    read_pattern(pattern, f"{key}.pattern")
    base, snapshot = split_name(source)
    if not is_name(base) or not (snapshot is None or is_name(snapshot)):
        raise ValueError(f"{key}.source: {source!r} is to be a base, or a snapshot: CLONE@NAME")
    limit = table.get("limit", DEFAULT_LIMIT)
    if not isinstance(limit, int) or isinstance(limit, bool) or not 1 <= limit <= MAX_CLONES:
        raise ValueError(f"{key}.limit: {limit!r} is to be a number of clones, from 1 to {MAX_CLONES}")
    return Template(name, pattern, source, _read_lifetime(table, key), _read_quota(table, key), limit)


def _read_string(table: dict[str, Any], key: str, name: str) -> str:
    value = table.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{key}.{name}: {'is missing' if value is None else 'is to be a string, in quotes'}")
    return value


def _read_lifetime(table: dict[str, Any], key: str) -> float | None:
    """``"connected"``, or a time: ``"90s"``, ``"30m"``, ``"8h"``, ``"7d"``."""
    value = table.get("lifetime", CONNECTED)
    if value == CONNECTED:
        return None
    match = _TIME.fullmatch(value) if isinstance(value, str) else None
    if match is None or not int(match[1]):
        raise ValueError(f'{key}.lifetime: {value!r} is to be "{CONNECTED}", or a time like "90s", "30m", "8h", "7d"')
    return float(int(match[1]) * _SECONDS[match[2]])


def _read_quota(table: dict[str, Any], key: str) -> int | None:
    value = table.get("quota")
    if value is None:
        return None
    if isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        value = int(match[1]) << (10 * " KMGT".index(match[2].upper() or " "))
    if not isinstance(value, int) or isinstance(value, bool) or not BLOCK_SIZE <= value <= MAX_RATE:
        raise ValueError(f'{key}.quota: {value!r} is to be a size like "20G"')
    return value
