"""What the verbs share: the program that they belong to, the pool, sizes in words, progress, JSON."""

from __future__ import annotations

import contextlib
import json
import re
import resource
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from nbdclone.store.pool import Pool

# What the verbs of all modules are registered on.
app = typer.Typer(
    name="nbdclone",
    help="Linked clones of disk images, served over NBD.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

# Two descriptors for each clone that is open, or about to be removed, and one for each connection; the usual soft limit
# is 1,024.
WANTED_FILES = 65536
_SIZE = re.compile(r"(\d+)([KMGT]?)(?:i?B)?", re.IGNORECASE)
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class State:
    """What was said before the verb."""

    pool_path = Path()


def open_pool(*, create: bool = False) -> Pool:
    """The pool that the command line names."""
    from nbdclone.store.pool import Pool

    return Pool.open(State.pool_path, create=create)


def parse_size(text: str) -> int:
    """``20G``, ``512M``, ``4096``: bytes, with powers of 1024."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is no size: give bytes, or a number with K, M, G or T")
    return int(match[1]) << (10 * " KMGT".index(match[2].upper() or " "))


def show_size(size: int) -> str:
    """A size for a person: three digits or so, and the unit."""
    value = float(size)
    for unit in _UNITS:
        if value < 1024 or unit == _UNITS[-1]:
            break
        value /= 1024
    return f"{size} B" if unit == "B" else f"{value:.3g} {unit}" if value < 999.5 else f"{value:.0f} {unit}"


def show_time(seconds: float) -> str:
    """A moment for a person, in local time."""
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M") if seconds else "-"


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on a terminal; nothing in a pipe."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_json(value: Any) -> None:
    """JSON as every verb prints it."""
    print(json.dumps(value, indent=2))


def raise_file_limit() -> None:
    """As many files as this user may have open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_FILES if hard == resource.RLIM_INFINITY else min(WANTED_FILES, hard)
    if soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
