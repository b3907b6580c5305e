"""Images of other programs: import and export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nbdclone.commands.common import app, open_pool, progress_bar, show_size


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="raw, qcow2, vmdk, vhdx, vdi, or a block device")],
    name: Annotated[str | None, typer.Option("--name", help="Default: the file's name.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Import it although it seems truncated.")] = False,
    immutable: Annotated[
        bool,
        typer.Option(
            "--immutable", help="Nobody can change or remove it but through 'nbdclone rm' (takes root; rm -rf fails)."
        ),
    ] = False,
) -> None:
    """Make a base from an image file."""
    with progress_bar(f"importing {file.name}") as progress:
        info = open_pool(create=True).import_base(file, name, force=force, immutable=immutable, progress=progress)
    print(f"base '{info.name}': {show_size(info.size)}, {show_size(info.allocated)} on disk")
