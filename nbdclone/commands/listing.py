"""What there is, and what it takes: ls, tree, info, du."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nbdclone.commands.common import Json, app, open_pool, print_json, progress_bar, show_size, show_time

if TYPE_CHECKING:
    from nbdclone.store.catalog import Info


@app.command()
def ls(as_json: Json = False) -> None:
    """List bases and clones."""
    entries = open_pool().entries()
    if as_json:
        print_json([_as_dict(entry) for entry in entries])
        return
    rows = [
        (
            entry.name,
            entry.kind,
            getattr(entry, "parent", None) or "-",
            show_size(entry.size),
            show_size(entry.allocated),
            _quota(entry),
            show_time(entry.created),
            _state(entry),
        )
        for entry in entries
    ]
    titles = ("NAME", "KIND", "PARENT", "SIZE", "ON DISK", "QUOTA", "CREATED", "STATE")
    _print_table(titles, rows, to_the_right=("SIZE", "ON DISK", "QUOTA"))


@app.command()
def tree(
    all_layers: Annotated[
        bool, typer.Option("--all", help="Also layers without a name: of snapshots that were removed.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Draw bases with their snapshots and clones."""
    entries = open_pool().entries(unnamed=all_layers)
    names = {entry.name for entry in entries}
    children: dict[str | None, list[Info]] = {}
    for entry in entries:
        parent = getattr(entry, "parent", None)
        children.setdefault(parent if parent in names else None, []).append(entry)

    def nested(entry: Info) -> dict[str, Any]:
        return _as_dict(entry) | {"children": [nested(child) for child in children.get(entry.name, ())]}

    def draw(entry: Info, before: str) -> None:
        print(_line(entry))
        for child in (below := children.get(entry.name, [])):
            last = child is below[-1]
            print(f"{before}{'└' if last else '├'}── ", end="")
            draw(child, before + ("    " if last else "│   "))

    roots = sorted(children.get(None, ()), key=lambda entry: entry.kind != "base")
    if as_json:
        print_json([nested(root) for root in roots])
        return
    for root in roots:
        draw(root, "")


@app.command()
def info(name: str, as_json: Json = False) -> None:
    """Say all that is known of a base or clone."""
    entry = open_pool().info(name)
    if as_json:
        print_json(_as_dict(entry))
        return
    shown = _as_dict(entry) | {
        "size": f"{show_size(entry.size)} ({entry.size} bytes)",
        "allocated": f"{show_size(entry.allocated)} ({entry.allocated} bytes)",
        "created": show_time(entry.created),
    }
    if shown.get("quota"):
        shown["quota"] = f"{_quota(entry)} ({shown['quota']} bytes)"
    for several in ("clones", "snapshots"):
        if several in shown:
            shown[several] = ", ".join(shown[several]) or None
    width = max(map(len, shown)) + 2
    for key, value in shown.items():
        if value is not None:
            print(f"{key.replace('_', ' ') + ':':{width}}{value}")


@app.command()
def du(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Bases, clones, snapshots (default: all).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what each takes on the disk, what it shares with others, and what comes free if it goes."""
    from nbdclone.control.client import run_verb

    with progress_bar("reading maps") as progress:
        found = run_verb(open_pool(), "du", {"names": list(names or ())}, progress)
    if as_json:
        print_json(found)
        return
    rows = [
        (
            entry["name"],
            entry["kind"],
            show_size(entry["size"]),
            show_size(entry["own"]),
            show_size(entry["shared"]),
            "needed" if entry["freed"] is None else show_size(entry["freed"]),
            entry["error"] or "",
        )
        for entry in found["entries"]
    ]
    titles = ("NAME", "KIND", "SIZE", "OWN", "SHARED", "FREED", "STATE")
    _print_table(titles, rows, to_the_right=("SIZE", "OWN", "SHARED", "FREED"))
    rest = f", {show_size(found['rest'])} of it the pool's own" if not names else ""
    print(f"on disk: {show_size(found['total'])}{rest}; as full copies: {show_size(found['copies'])}")


def _print_table(titles: Sequence[str], rows: Sequence[Sequence[str]], to_the_right: Collection[str]) -> None:
    """Columns, with a bold head and lines cut to the width on a terminal. (rich takes 0.4 ms for a row.)"""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    form = "  ".join(
        f"{{:{'>' if title in to_the_right else '<'}{width}}}" for title, width in zip(titles, widths, strict=True)
    ).format
    head, *lines = [form(*row).rstrip() for row in (titles, *rows)]
    if sys.stdout.isatty():
        columns = shutil.get_terminal_size().columns
        head, *lines = [line if len(line) <= columns else line[: columns - 1] + "…" for line in (head, *lines)]
        head = f"\x1b[1m{head}\x1b[0m"
    print(head, *lines, sep="\n")


def _as_dict(entry: Info) -> dict[str, Any]:
    return {"kind": entry.kind} | asdict(entry)


def _state(entry: Info) -> str:
    if entry.error:
        return entry.error
    if holder := getattr(entry, "in_use_by", None):
        return f"open in {holder}"
    if getattr(entry, "ephemeral", False):
        return "ephemeral"
    clones = getattr(entry, "clones", ())
    return f"{len(clones)} clone{'' if len(clones) == 1 else 's'}" if entry.kind == "base" else ""


def _line(entry: Info) -> str:
    state = f"  ({entry.error})" if entry.error else ""
    return f"{entry.name}  {show_size(entry.size)}, {show_size(entry.allocated)} on disk{state}"


def _quota(entry: Info) -> str:
    limit = getattr(entry, "quota", None)
    return show_size(limit) if limit else "-"
