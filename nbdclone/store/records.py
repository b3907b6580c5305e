"""Small records in JSON, a file for each: read with a limit, and every way in which one can be wrong is one error."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from nbdclone.errors import NotFound, StorageError
from nbdclone.store.fs import FileSystem

T = TypeVar("T")

# They have some 200 bytes; whatever is longer is none.
MAX_RECORD = 4096


def load_record(path: Path, fs: FileSystem, wrong: str, parse: Callable[[dict[str, Any]], T]) -> T:
    """What ``parse`` makes of the fields at ``path``. ``wrong`` says what is the matter where it makes nothing of them.

    Raises NotFound, StorageError, OSError, and what of NBDCloneError ``parse`` raises.
    """
    try:
        fd = fs.open_file(path, os.O_RDONLY)
    except FileNotFoundError:
        raise NotFound(f"{path} is missing") from None
    try:
        with open(fd, encoding="ascii") as file:
            return parse(json.loads(file.read(MAX_RECORD)))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise StorageError(f"{path}: {wrong} ({error})") from None


def hex_bytes(length: int, text: str) -> bytes:
    """So many bytes, written as hex. Raises ValueError, TypeError."""
    value = bytes.fromhex(text)
    if len(value) != length:
        raise ValueError(f"expected {length} bytes")
    return value
