"""What is done to bases, clones and snapshots as they are: snapshot, rollback, reset, rename, resize, rm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from nbdclone.commands.blocks import merge_layers
from nbdclone.commands.common import Json, app, open_pool, parse_size, print_json, raise_file_limit, show_size

Disconnect = Annotated[bool, typer.Option("--disconnect", help="Send away the clients that are connected.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]


def _run(verb: str, arguments: Mapping[str, Any]) -> Any:
    from nbdclone.control.client import run_verb

    return run_verb(open_pool(), verb, arguments)


@app.command()
def snapshot(
    name: Annotated[
        str, typer.Argument(metavar="CLONE@NAME", help="The clone, and what the snapshot is to be called.")
    ],
    as_json: Json = False,
) -> None:
    """Seal what a clone is now, also while it is served: clones can start from it, and the clone go back to it."""
    made = _run("snapshot", {"name": name})
    if as_json:
        print_json(made)
    else:
        print(f"snapshot '{made['name']}': {show_size(made['allocated'])} on disk")


@app.command()
def rollback(
    name: Annotated[str, typer.Argument(metavar="CLONE@NAME", help="The snapshot to go back to.")],
    disconnect: Disconnect = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Let a clone be as its snapshot is. What it changed since is gone; later snapshots stay."""
    _tell_return(_run("rollback", {"name": name, "disconnect": disconnect, "dry_run": dry_run}), as_json)


@app.command()
def reset(
    name: Annotated[str, typer.Argument(metavar="CLONE", help="A clone.")],
    disconnect: Disconnect = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Let a clone be as what it was made from is. What it changed since is gone; its snapshots stay."""
    _tell_return(_run("reset", {"name": name, "disconnect": disconnect, "dry_run": dry_run}), as_json)


def _tell_return(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(report)
        return
    would = "is " if report["done"] else "would be "
    layers = f", with {len(report['layers'])} layer(s)" if report["layers"] else ""
    stay = f"; later snapshots that stay: {', '.join(report['later'])}" if report["later"] else ""
    freed = f"{show_size(report['freed'])} {would}freed{layers}"
    print(f"clone '{report['name']}' {would}as '{report['to']}': {freed}{stay}{_connected(report)}")


def _connected(report: Mapping[str, Any]) -> str:
    from nbdclone.control.clients import describe_clients

    if not report["clients"]:
        return ""
    return f"; connected{'' if report['done'] else ' now'}: {describe_clients(report['clients'])}"


@app.command()
def rename(
    old: Annotated[str, typer.Argument(metavar="OLD", help="A base, a clone, or a snapshot: CLONE@NAME.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="Of a snapshot: CLONE@NEW.")],
    disconnect: Disconnect = False,
    as_json: Json = False,
) -> None:
    """Give another name. Clones of it stay what they are; rules in settings.toml that name it do not follow."""
    done = _run("rename", {"old": old, "new": new, "disconnect": disconnect})
    if as_json:
        print_json(done)
    else:
        print(f"'{old}' is called '{new}' now")


@app.command()
def resize(
    name: Annotated[str, typer.Argument(metavar="CLONE", help="A clone.")],
    size: Annotated[int, typer.Argument(parser=parse_size, metavar="SIZE", help="What it is to have.")],
    force: Annotated[bool, typer.Option("--force", help="Make it smaller: what is behind the end is lost.")] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Make a clone larger, also while it is served: who connects from then on sees it. What is new reads as zeros."""
    report = _run("resize", {"name": name, "size": size, "force": force, "dry_run": dry_run})
    if as_json:
        print_json(report)
        return
    cut = f"{show_size(report['cut'])} cut off, {show_size(report['lost'])} of it its own" if report["cut"] else ""
    would = "" if report["done"] else "would have "
    shown = f"clone '{name}': {would}{show_size(size)}, had {show_size(report['before'])}"
    print(f"{shown}{'; ' * bool(cut)}{cut}{_connected(report)}")


@app.command()
def rm(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Clones, bases and snapshots.")],
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Remove clones, bases and snapshots. What others need stays; the error names them.

    A snapshot's data that something still reads becomes a part of what is above it: the server of the pool does that,
    or this command; with Ctrl-C it is left for the next time.
    """
    raise_file_limit()
    report = _run("rm", {"names": list(dict.fromkeys(names)), "dry_run": dry_run})
    if not dry_run:
        merge_layers(open_pool())
    if as_json:
        print_json(report)
    elif dry_run:
        layers = f", with {len(report['layers'])} layer(s)" if report["layers"] else ""
        print(f"would free {show_size(report['freed'])} ({report['freed']} bytes){layers}")
