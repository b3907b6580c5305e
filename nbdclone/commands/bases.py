"""Verbs that make something last: ``promote`` and ``keep``."""

from __future__ import annotations

from typing import Annotated

import typer

from nbdclone.commands.blocks import merge_layers
from nbdclone.commands.common import Json, app, open_pool, print_json, progress_bar, show_size


@app.command()
def promote(
    name: Annotated[str, typer.Argument(metavar="CLONE[@NAME]", help="A snapshot, or a clone as it is now.")],
    new: Annotated[str, typer.Argument(metavar="NEWBASE", help="What the base is to be called.")],
    as_json: Json = False,
) -> None:
    """Make a base of what a clone or snapshot reads; it and all others go on as they were."""
    from nbdclone.control.client import run_verb

    pool = open_pool()
    with progress_bar(f"promoting {name}") as progress:
        made = run_verb(pool, "promote", {"name": name, "new": new}, progress)
    if "@" not in name:
        merge_layers(pool, "promoted")
    if as_json:
        print_json(made)
    else:
        print(f"base '{new}': {show_size(made['size'])}, {show_size(made['allocated'])} on disk")


@app.command()
def keep(
    name: Annotated[str, typer.Argument(metavar="NAME", help="An ephemeral clone.")], as_json: Json = False
) -> None:
    """Make an ephemeral clone stay."""
    from nbdclone.control.client import run_verb

    kept = run_verb(open_pool(), "keep", {"name": name})
    if as_json:
        print_json(kept)
    else:
        print(f"clone '{name}' stays")
