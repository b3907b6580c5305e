"""The command line: parse, call, print, exit status.

What a user did wrong, or what is wrong with the files, is one line on stderr and exit status 1; a command that cannot
be understood exits 2. What takes time to import is imported where it is used, so that ``ls`` does not wait for it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nbdclone import __version__
from nbdclone.commands import bases, blocks, chains, images, life, listing, stream  # noqa: F401 - they have verbs
from nbdclone.commands import serve_options as opt
from nbdclone.commands.common import Json, State, app, parse_size, raise_file_limit, show_size, show_time
from nbdclone.commands.common import open_pool as _pool
from nbdclone.commands.common import print_json as _print_json
from nbdclone.commands.common import progress_bar as _progress
from nbdclone.errors import NBDCloneError, UsageError
from nbdclone.protocol.handshake_events import TLSMode

if TYPE_CHECKING:
    from nbdclone.server.tls import ServerTLS
    from nbdclone.store.pool import Pool


def default_pool(environment: dict[str, str], user: int) -> Path:
    """Where the pool is when nobody says: $NBDCLONE_POOL, root's in /var/lib, anyone else's own."""
    if given := environment.get("NBDCLONE_POOL"):
        return Path(given)
    if user == 0:
        return Path("/var/lib/nbdclone")
    data = environment.get("XDG_DATA_HOME") or Path(environment.get("HOME", "~")).expanduser() / ".local/share"
    return Path(data) / "nbdclone"


def parse_quota(text: str) -> int:
    """A size, or ``none``: 0."""
    if text.lower() == "none":
        return 0
    if not (size := parse_size(text)):
        raise typer.BadParameter("a quota of nothing: give a size, or 'none' for no quota")
    return size


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"nbdclone {__version__}")
        raise typer.Exit


@app.callback()
def options(
    pool: Annotated[
        Path | None,
        typer.Option("--pool", metavar="DIR", help="The pool (default: $NBDCLONE_POOL, or the user's own)."),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Linked clones of disk images, served over NBD."""
    State.pool_path = pool or default_pool(dict(os.environ), os.geteuid())


@app.command()
def clone(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A base, or a snapshot: CLONE@NAME.")],
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="The clones to make.")],
    size: Annotated[
        int | None, typer.Option("--size", parser=parse_size, metavar="SIZE", help="Larger than the source.")
    ] = None,
    quota: Annotated[
        int | None,
        typer.Option("--quota", parser=parse_size, metavar="SIZE", help="The most that each may take on the disk."),
    ] = None,
) -> None:
    """Make one or more clones of a base."""
    made = _pool().create_clones(source, names, size=size, quota=quota)
    if len(made) == 1:
        print(f"clone '{made[0].name}' of '{source}': {show_size(made[0].size)}")
    else:
        print(f"{len(made)} clones of '{source}': {show_size(made[0].size)} each")


@app.command()
def quota(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A clone.")],
    quota: Annotated[
        int, typer.Argument(parser=parse_quota, metavar="SIZE|none", help="The most that it may take on the disk.")
    ],
) -> None:
    """Change how much a clone may take on the disk, also while it is served."""
    from nbdclone.control.client import run_verb

    changed = run_verb(_pool(), "quota", {"name": name, "quota": quota or None})
    limit = f"may take {show_size(changed['quota'])}" if changed["quota"] else "has no quota"
    print(f"clone '{name}' {limit}, and has {show_size(changed['allocated'])} on disk")


@app.command()
def trace(
    base: Annotated[str, typer.Argument(metavar="BASE", help="A base.")],
    drop: Annotated[bool, typer.Option("--drop", help="Remove it: the next clone that starts is recorded.")] = False,
    as_json: Json = False,
) -> None:
    """Say what a boot of a base reads, which a server reads ahead when a clone of it starts."""
    from nbdclone.store.trace import bytes_in, directory_of_base, drop_trace, load_trace, runs_in

    directory = directory_of_base(_pool().path, base)
    if drop:
        dropped = drop_trace(directory)
        print(f"base '{base}': {'the trace was removed' if dropped else 'there is no trace'}")
        return
    found = load_trace(directory)
    if as_json:
        facts = (
            {"bytes": bytes_in(found.grains), "runs": runs_in(found), "created": found.created / 1e9} if found else None
        )
        _print_json(facts)
    elif found is None:
        print(f"base '{base}': no boot was recorded yet")
    else:
        size, when = show_size(bytes_in(found.grains)), show_time(found.created / 1e9)
        print(f"base '{base}': a boot reads {size} in {runs_in(found)} piece(s) (recorded {when})")


@app.command()
def check(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Clones and bases (default: the pool).")
    ] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Read the whole content of the bases.")] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Put right what has one right answer; keep the bytes as they were.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Find what is wrong with the files; exit status 1 if anything is, and was not repaired."""
    from nbdclone.store.check import as_record, check_pool, is_clean

    pool = _pool()
    findings = []
    try:
        with _progress("reading bases") as progress:
            for finding in check_pool(pool.path, names or (), deep=deep, repair=repair, progress=progress):
                findings.append(finding)
    finally:  # what was found, and repaired, until something came in between
        if as_json:
            _print_json([as_record(finding) for finding in findings])
        else:
            for finding in findings:
                print(finding)
    if not as_json:
        wrong = [finding for finding in findings if finding.level == "wrong"]
        repaired = sum(finding.repaired for finding in wrong)
        print("all is well" if not wrong else f"{len(wrong)} wrong, {repaired} of them repaired")
    if not is_clean(findings):
        raise typer.Exit(1)


@app.command()
def serve(
    listen: opt.Listen = None,
    socket: opt.Sockets = None,
    tls: opt.Tls = None,
    tls_certificates: opt.TlsCertificates = None,
    tls_psk: opt.TlsPsk = None,
    tls_verify_peer: opt.TlsVerifyPeer = True,
    insecure: opt.Insecure = False,
    max_connections: opt.MaxConnections = None,
    max_connections_per_address: opt.MaxConnectionsPerAddress = None,
    max_memory: opt.MaxMemory = None,
    busy_poll: opt.BusyPoll = None,
    iops: opt.Iops = None,
    bps: opt.Bps = None,
    workers: opt.Workers = None,
    replay: opt.Replay = True,
    verbose: opt.Verbose = False,
) -> None:
    """Serve every clone, and every base read-only, until told to stop (SIGTERM). SIGHUP: read the settings again."""
    import uvloop

    from nbdclone.server.admission import MAX_CONNECTIONS
    from nbdclone.server.busy import DEFAULT_LIMIT_US
    from nbdclone.server.host import SWITCH_INTERVAL_S, Options
    from nbdclone.server.limits import Limit
    from nbdclone.server.listen import parse_address
    from nbdclone.server.supervisor import divide_memory

    logging.basicConfig(format="nbdclone: %(message)s", level=logging.DEBUG if verbose else logging.WARNING)
    try:
        addresses = [parse_address(text) for text in listen or ([] if socket else ["127.0.0.1"])]
    except UsageError as error:
        raise typer.BadParameter(str(error), param_hint="--listen") from None
    secured = _server_tls(tls, tls_certificates, tls_psk, tls_verify_peer)
    count, memory = divide_memory(max_memory, workers)
    raise_file_limit()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        pool = _pool(create=True)
        options: dict[str, Any] = {
            "listen": addresses,
            "sockets": socket or [],
            "tls": secured,
            "insecure": insecure,
            "max_connections": max_connections or MAX_CONNECTIONS,
            "max_connections_per_address": max_connections_per_address,
            "options": Options(DEFAULT_LIMIT_US if busy_poll is None else busy_poll, Limit(iops, bps), replay),
        }
        runner.run(_serve(pool, workers=count, worker_memory=memory, **options))


def _server_tls(mode: TLSMode | None, certificates: Path | None, psk: Path | None, verify: bool) -> ServerTLS | None:
    from nbdclone.server.tls import ServerTLS

    if certificates is not None and psk is not None:
        raise typer.BadParameter("give --tls-certificates or --tls-psk, not both", param_hint="--tls-psk")
    if certificates is None and psk is None:
        if mode in (None, TLSMode.OFF):
            return None
        message = "it needs --tls-certificates DIR (nbdclone cert makes one) or --tls-psk FILE"
        raise typer.BadParameter(message, param_hint="--tls")
    if mode is TLSMode.OFF:
        return None
    return ServerTLS(certificates, psk=psk, required=mode is not TLSMode.ON, verify_peer=verify)


@app.command()
def cert(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where they are, or will be.")],
    host: Annotated[
        list[str] | None,
        typer.Option(
            "--host", metavar="NAME", help="A name or address of the server. Default: this machine's. Repeatable."
        ),
    ] = None,
    client: Annotated[
        list[str] | None,
        typer.Option("--client", metavar="NAME", help="A client, whose files go to DIR/NAME. Repeatable."),
    ] = None,
    days: Annotated[int, typer.Option("--days", min=1, metavar="N", help="How long they are valid.")] = 825,
) -> None:
    """Make certificates for TLS: a CA, a server's, clients'. What is there already stays."""
    from nbdclone.certificates import advice, make

    made = make(directory, hosts=host or (), clients=client or (), days=days)
    for path in made:
        print(path)
    print(advice(directory, client or ()))


async def _serve(pool: Pool, **options: Any) -> None:
    from nbdclone.server.notify import sd_notify
    from nbdclone.server.supervisor import Supervisor

    server = Supervisor(pool, **options)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, server.reload)
    async with server:
        print("nbdclone ready on", *server.uris, flush=True)
        sd_notify("READY=1")
        await stop.wait()
        sd_notify("STOPPING=1")


@app.command()
def demo(
    directory: Annotated[
        Path | None, typer.Option("--dir", metavar="DIR", help="Where to leave the pool (default: a new directory).")
    ] = None,
) -> None:
    """Show the whole story in a minute, on a pool of its own."""
    from nbdclone.demo import run

    run(directory)


def main() -> None:
    """The program. Exits 0, 1 with a line on stderr, or 2 for wrong usage."""
    # An import that is told to stop cleans up on its way out, as it does at Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        app()
    except NBDCloneError as error:
        _fail(str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{os.strerror(error.errno) if error.errno else error}")


def _fail(message: str) -> None:
    print(f"nbdclone: {message}", file=sys.stderr)
    sys.exit(1)
