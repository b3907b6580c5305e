"""What clones stand on: rebase, hoist."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from nbdclone.commands.blocks import merge_layers
from nbdclone.commands.common import Json, app, open_pool, print_json, progress_bar, show_size
from nbdclone.errors import UsageError

_KEEP_CHANGES = (
    "What these clones did not change becomes what the new base has, in the midst of their file systems. Only a guest "
    "that does not care what stands in the blocks that it did not write can live with that."
)


@app.command()
def rebase(
    clones: Annotated[list[str], typer.Argument(metavar="CLONE...", help="Clones of other bases.")],
    onto: Annotated[str, typer.Option("--onto", metavar="BASE", help="The base that they are to stand on.")],
    keep_content: Annotated[
        bool, typer.Option("--keep-content", help="What they read stays the same (default).")
    ] = False,
    keep_changes: Annotated[
        bool, typer.Option("--keep-changes", help="The blocks that they changed stay; all others are the new base's.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take, and change nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Let clones stand on another base."""
    from nbdclone.control.client import run_verb

    if keep_content and keep_changes:
        raise typer.BadParameter("--keep-content and --keep-changes are two ways: choose one")
    if keep_changes and not dry_run:
        print(_KEEP_CHANGES, file=sys.stderr)
        _confirm(yes)
    arguments = {"names": clones, "onto": onto, "keep_changes": keep_changes, "dry_run": dry_run}
    with progress_bar(f"rebase onto {onto}") as progress:
        result = run_verb(open_pool(), "rebase", arguments, progress)
    if as_json:
        print_json(result)
    else:
        _tell(result, onto, keep_changes, dry_run)
    if not dry_run:
        merge_layers(open_pool(), "rebased")  # it may have left one that has one clone by now


def _tell(result: dict[str, Any], onto: str, keep_changes: bool, dry_run: bool) -> None:
    for line in result["clones"]:
        print(_line(line, onto, keep_changes))
    if result["shared"]:
        now = "would be" if dry_run else "is"
        print(f"{show_size(result['shared'])} of what they have otherwise than '{onto}' {now} in a layer beneath them")


@app.command()
def hoist(
    base: Annotated[str, typer.Argument(metavar="BASE", help="A base.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take, and change nothing.")] = False,
    min_clones: Annotated[
        int | None, typer.Option("--min-clones", min=2, metavar="N", help="How many are many (default: half of them).")
    ] = None,
    dedupe: Annotated[
        bool, typer.Option("--dedupe", help="Let XFS or btrfs share what is alike, wherever it stands; move no clone.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Keep once what many clones of a base have alike at the same place."""
    from nbdclone.control.client import run_verb

    if dedupe and min_clones is not None:
        raise typer.BadParameter("--dedupe shares whatever is there twice: it takes no --min-clones")
    arguments = {"base": base, "min_clones": min_clones, "dry_run": dry_run, "dedupe": dedupe}
    pool = open_pool()
    try:
        with progress_bar(f"hoist {base}") as progress:
            result = run_verb(pool, "hoist", arguments, progress)
    except UsageError:
        if not dry_run and not dedupe:
            merge_layers(pool, "refused")  # it may have left a layer on which nobody stands
        raise
    if as_json:
        print_json(result)
    elif dedupe:
        print(_shared_line(result, base))
    elif not result["clones"]:
        print(f"the clones of '{base}' have nothing alike that would be worth a layer")
    else:
        count, layer = len(result["clones"]), show_size(result["layer"])
        now = "would be" if dry_run else "is"
        before, after = show_size(result["before"]), show_size(result["after"])
        print(f"{layer} {now} shared by {count} clones of '{base}': {before} on disk before, {after} after")
        for left in result["left_out"]:
            print(f"'{left['name']}' stays as it was: {left['why']}")
    if not dry_run and not dedupe:
        merge_layers(pool, "hoisted")


def _shared_line(result: dict[str, Any], base: str) -> str:
    alike, shared = show_size(result["alike"]), show_size(result["shared"])
    if not result["alike"]:
        return f"'{base}' and what stands on it have nothing alike that is not shared already"
    if result["dry_run"]:
        return f"{alike} in what stands on '{base}' could be shared"
    left = "" if result["shared"] == result["alike"] else f" of {alike} that was found alike"
    return f"{shared}{left} in what stands on '{base}' is shared now"


def _confirm(yes: bool) -> None:
    """Ask on a terminal; in a pipe, ``--yes`` is the answer."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise typer.BadParameter("give --yes to say that you mean it: there is no terminal to ask on")
    typer.confirm("Go on?", abort=True, err=True)


def _line(line: dict[str, Any], onto: str, keep_changes: bool) -> str:
    name, conflicts = line["name"], show_size(line["conflicts"])
    if line["state"] == "already":
        return f"'{name}' is on '{onto}' already"
    if line["state"] == "done" and keep_changes:
        return f"'{name}' is on '{onto}' now, with its own blocks as they were"
    delta = f"delta {show_size(line['before'])}, then {show_size(line['after'])}"
    with_snapshots = ", along with the snapshots beneath" if line.get("layer") else ""
    if line["state"] == "dry run":
        to_copy = show_size(line["copied"])
        return f"'{name}': {delta}; {to_copy} to copy, {conflicts} in conflict{with_snapshots}"
    copied, dropped = show_size(line["copied"]), show_size(line["dropped"])
    return f"'{name}' is on '{onto}' now: {delta}; {copied} copied, {conflicts} in conflict, {dropped} dropped"
