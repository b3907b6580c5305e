"""What a clone has of its own: flatten and compact."""

from __future__ import annotations

from typing import Annotated

import typer

from nbdclone.commands.common import Json, app, open_pool, print_json, progress_bar, show_size

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
