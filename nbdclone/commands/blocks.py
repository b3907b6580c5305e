"""What a clone has of its own: flatten and compact."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from nbdclone.commands.common import Json, app, open_pool, print_json, progress_bar, show_size
from nbdclone.errors import NBDCloneError

if TYPE_CHECKING:
    from nbdclone.store.pool import Pool

CloneName = Annotated[str, typer.Argument(metavar="CLONE", help="A clone, served or not.")]


@app.command()
def flatten(name: CloneName, as_json: Json = False) -> None:
    """Cut a clone free of what is beneath it: its base can go. Its snapshots stay over the base."""
    from nbdclone.control.client import run_verb

    with progress_bar(f"flattening {name}") as progress:
        done = run_verb(open_pool(), "flatten", {"name": name}, progress)
    if as_json:
        print_json(done)
        return
    if done["was_over"] is None:
        print(f"clone '{name}' has nothing beneath it")
    else:
        print(f"clone '{name}' needs '{done['was_over']}' no more: {show_size(done['copied'])} copied")
    if kept := done["snapshots_over_it"]:
        print(f"{len(kept)} snapshot(s) stay over what it was over: {', '.join(kept)}")


@app.command()
def compact(
    name: CloneName,
    online: Annotated[bool, typer.Option("--online", help="While clients go on.")] = False,
    as_json: Json = False,
) -> None:
    """Give back the space of blocks that equal what lies beneath, and of zeros."""
    from nbdclone.control.client import run_verb

    with progress_bar(f"compacting {name}") as progress:
        done = run_verb(open_pool(), "compact", {"name": name, "online": online}, progress)
    if as_json:
        print_json(done)
    else:
        print(f"clone '{name}': {show_size(done['before'])} on disk before, {show_size(done['after'])} now")


def merge_layers(pool: Pool, done: str = "removed") -> None:
    """Merge the layers that have no name, unless there is a server, which does it by itself. ``done``: the occasion."""
    from nbdclone.store.merging import is_work

    with contextlib.suppress(NBDCloneError):  # what cannot be told now is found by the next
        if not is_work(pool.places):
            return
        from nbdclone.control.client import Control, run_verb

        if Control.of(pool.path) is not None:
            return
        with progress_bar("merging its data into what is above it") as progress:
            try:
                left = run_verb(pool, "merge", {}, progress)["left"]
            except KeyboardInterrupt:
                print(
                    f"nbdclone: {done}; its data is not merged yet: the next rm, or a server, goes on",
                    file=sys.stderr,
                )
                return
        for each in left:
            print(f"nbdclone: {done}; its data stays for now: {each['why']}", file=sys.stderr)
