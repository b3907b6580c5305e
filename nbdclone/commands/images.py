"""Images of other programs: import and export."""

from __future__ import annotations

import contextlib
import secrets
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nbdclone.commands.common import Json, app, open_pool, print_json, progress_bar, show_size

if TYPE_CHECKING:
    from nbdclone.store.pool import Pool


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
    as_clone: Annotated[
        str | None,
        typer.Option(
            "--as-clone", metavar="CLONE", help="FILE is a qcow2 overlay: a clone of what it stands on, once imported."
        ),
    ] = None,
    with_base: Annotated[
        bool, typer.Option("--with-base", help="With --as-clone: import that as well, if it is no base yet.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a base from an image file, or a clone from a qcow2 overlay."""
    if as_clone is not None:
        if force or immutable:
            raise typer.BadParameter("--force and --immutable are for bases", param_hint="--as-clone")
        if name is not None and not with_base:
            raise typer.BadParameter("with --as-clone it is the base's name: give --with-base too", param_hint="--name")
        _import_as_clone(file, as_clone, with_base, name, as_json)
        return
    if with_base:
        raise typer.BadParameter("it goes with --as-clone", param_hint="--with-base")
    with progress_bar(f"importing {file.name}") as progress:
        info = open_pool(create=True).import_base(file, name, force=force, immutable=immutable, progress=progress)
    if as_json:
        print_json({"kind": "base"} | asdict(info))
    else:
        print(f"base '{info.name}': {show_size(info.size)}, {show_size(info.allocated)} on disk")


def _import_as_clone(overlay: Path, name: str, with_base: bool, base_name: str | None, as_json: bool) -> None:
    from nbdclone.exchange.adopt import import_as_clone

    pool = open_pool(create=with_base)
    with progress_bar(f"importing {overlay.name}") as progress:
        done = import_as_clone(pool, overlay, name, with_base=with_base, base_name=base_name, progress=progress)
    if done.snapshots:
        print(f"nbdclone: {done.snapshots} snapshot(s) inside the images stayed there", file=sys.stderr)
    if as_json:
        facts = {"base_imported": done.base_imported, "snapshots_left_out": done.snapshots}
        print_json({"kind": "clone"} | asdict(done.clone) | facts)
        return
    if done.base_imported:
        print(f"base '{done.base}': imported too")
    clone = done.clone
    print(f"clone '{name}' of '{done.base}': {show_size(clone.size)}, {show_size(clone.allocated)} on disk")


@app.command("export")
def export(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A base, clone or snapshot.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to make; '-' for raw on standard output.")],
    image_format: Annotated[
        str | None,
        typer.Option(
            "--format", metavar="raw|qcow2|vmdk|vhdx|vdi|vpc", help="Default: by the name's ending, else raw."
        ),
    ] = None,
    link: Annotated[
        bool,
        typer.Option(
            "--link",
            help="A qcow2 overlay with what the clone has of its own, over the base's image. The base must not be "
            "changed or removed as long as there is the overlay: qemu would not notice.",
        ),
    ] = False,
    relative: Annotated[
        bool, typer.Option("--relative", help="With --link: name the base's image as seen from FILE.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")] = False,
    as_json: Json = False,
) -> None:
    """Write a base, clone or snapshot to an image file, for other programs; a clone also while it is served."""
    if relative and not link:
        raise typer.BadParameter("it goes with --link", param_hint="--relative")
    pool = open_pool()
    if str(file) == "-":
        _export_to_stdout(pool, name, image_format, link)
        return
    from nbdclone.exchange.export import export_image

    with _at_rest(pool, name) as source, progress_bar(f"exporting {name}") as progress:
        done = export_image(
            pool, source, file, image_format=image_format, link=link, relative=relative, force=force, progress=progress
        )
    if as_json:
        print_json(asdict(done))
    else:
        over = f" over {done.backing}" if done.backing else ""
        sizes = f"{show_size(done.size)}, {show_size(done.allocated)} on disk"
        print(f"{done.file}: '{name}' as {done.format}{over}: {sizes}")


def _export_to_stdout(pool: Pool, name: str, image_format: str | None, link: bool) -> None:
    from nbdclone.store.exporting import open_for_reading, stdout_for_image, stream_raw

    if link or image_format not in (None, "raw"):
        raise typer.BadParameter("only a raw image goes to standard output", param_hint="FILE")
    fd = stdout_for_image()
    bar = progress_bar(f"exporting {name}")
    with _at_rest(pool, name) as source, open_for_reading(pool, source) as clone, bar as progress:
        stream_raw(clone, fd, progress)


@contextlib.contextmanager
def _at_rest(pool: Pool, name: str) -> Iterator[str]:
    """The name of what is to be read: itself; or, of a clone that a server has open, a snapshot taken for the while."""
    from nbdclone.control.client import Control, run_verb

    if not getattr(pool.info(name), "in_use_by", None) or Control.of(pool.path) is None:
        yield name
        return
    snapshot = f"{name}@export-{secrets.token_hex(4)}"
    run_verb(pool, "snapshot", {"name": snapshot})
    try:
        yield snapshot
    finally:
        run_verb(pool, "rm", {"names": [snapshot], "dry_run": False})
