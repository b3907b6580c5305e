"""Streams and changed blocks: send, receive, diff."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

import typer

from nbdclone.commands.common import Json, app, open_pool, print_json, progress_bar, show_size
from nbdclone.errors import InUse, UsageError

if TYPE_CHECKING:
    from nbdclone.store.pool import Pool


@app.command()
def send(
    name: Annotated[str | None, typer.Argument(metavar="CLONE@SNAP", help="The snapshot.", show_default=False)] = None,
    since: Annotated[
        str | None,
        typer.Option("--from", metavar="SNAP", help="Only what changed since this snapshot beneath it."),
    ] = None,
    with_base: Annotated[
        bool, typer.Option("--with-base", help="The base's image too, for a pool that has not got it.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="A new file (default: standard output).")
    ] = None,
    resume: Annotated[
        str | None, typer.Option("--resume", metavar="TOKEN", help="Go on: TOKEN is from 'receive --token'.")
    ] = None,
) -> None:
    """Write a snapshot as a stream, for 'receive' in another pool: with all beneath it, but for its base."""
    from nbdclone.store.sending import Sending, Token

    if (name is None) == (resume is None) or (resume is not None and (since is not None or with_base)):
        raise typer.BadParameter("give a snapshot, perhaps with --from or --with-base, or --resume TOKEN")
    if output is None and sys.stdout.isatty():
        raise UsageError("a stream is not written to a terminal: send it to a file (-o FILE) or through a pipe")
    places = open_pool().places
    if resume is not None:
        sending = Sending.resume(places, Token.parse(resume))
    else:
        assert name is not None
        sending = Sending(places, name, since=since, with_base=with_base)
    with sending, _written(output) as sink, progress_bar(f"sending {sending.head.title}") as progress:
        _follow(sending.run(sink), progress)


@app.command()
def receive(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="A stream (default: standard input).", show_default=False)
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="NEW", help="The clone that is made, or added to (default: as sent)."),
    ] = None,
    base_name: Annotated[
        str | None, typer.Option("--base-name", metavar="NAME", help="The base, if it is made (default: as sent).")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Roll a clone back that was changed since what the stream stands on.")
    ] = False,
    disconnect: Annotated[
        bool, typer.Option("--disconnect", help="Send away the clients of a clone that is added to.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="The whole stream again: keep what came of it before.")
    ] = False,
    token: Annotated[
        bool, typer.Option("--token", help="Receive nothing: say from where a stream that was cut off has to go on.")
    ] = False,
    forget: Annotated[
        bool, typer.Option("--forget", help="Receive nothing: remove what came of streams that were cut off.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a clone of a stream of 'send', or bring one up to date. All of it arrives, or nothing."""
    from nbdclone.store.receiving import Receiving

    pool = open_pool(create=not (token or forget))
    places = pool.places
    if token:
        _print_tokens(as_json)
        return
    if forget:
        from nbdclone.store.drafts import forget as forget_drafts

        count = forget_drafts(places)
        print_json({"removed": count}) if as_json else print(f"{count} stream(s) that had been cut off: removed")
        return
    with _read(file) as source:
        receiving = Receiving(
            places, source, name=name, base_name=base_name, force=force, resume=resume,
            aside=lambda clone: _aside(pool, clone, disconnect=disconnect),
        )  # fmt: skip
        with progress_bar(f"receiving {receiving.head.title}") as progress:
            _follow(receiving.run(), progress)
    made = receiving.result
    if as_json:
        print_json({"clone": made.clone, "added": made.added, "snapshots": list(made.snapshots), "base": made.base})
        return
    if made.base:
        print(f"base '{made.base}'")
    shown = ", ".join(f"'{made.clone}@{snapshot}'" for snapshot in made.snapshots)
    print(f"clone '{made.clone}': {'added ' if made.added else 'with '}{shown}")


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A base, snapshot or clone.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another that shares layers with it.")],
    content: Annotated[
        bool, typer.Option("--content", help="Read both, and leave out what is the same; also of different bases.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say where B may differ from A: offset, length, and what B has there (data or zero). From the maps alone."""
    from nbdclone.control.client import run_verb

    with progress_bar(f"comparing {a} and {b}") as progress:
        found = run_verb(open_pool(), "diff", {"a": a, "b": b, "content": content}, progress)
    if as_json:
        print_json(found)
        return
    for extent in found["extents"]:
        print(extent["offset"], extent["length"], extent["kind"])


@contextlib.contextmanager
def _aside(pool: Pool, clone: str, *, disconnect: bool) -> Iterator[None]:
    """Nobody has the clone, which is to be another: its clients would see their disk change under them."""
    from nbdclone.control.client import set_aside

    with contextlib.ExitStack() as held:
        try:
            held.enter_context(set_aside(pool, clone, disconnect=disconnect))
        except InUse as error:
            way_out = "" if disconnect else "; 'receive --disconnect' sends clients away"
            raise InUse(f"{error}: what is received would change the disk under them{way_out}") from None
        yield


def _print_tokens(as_json: bool) -> None:
    from nbdclone.store.drafts import interrupted
    from nbdclone.store.sending import Token

    found = [
        (each, str(Token.of(each.state.head, each.state.section, each.state.offset)))
        for each in interrupted(open_pool().places)
    ]
    if as_json:
        print_json(
            [
                {"token": token, "stream": each.state.head.title, "since": each.since, "done": each.done}
                for each, token in found
            ]
        )
        return
    if not found:
        raise UsageError("no stream was cut off here")
    for each, token in found:
        size = sum(each.state.head.sections)
        done = f"{show_size(each.done)} of {show_size(size)}"
        print(f"'{each.state.head.title}' came to {done}; go on with: nbdclone send --resume", file=sys.stderr)
        print(token, flush=True)


def _follow(work: Iterator[tuple[int, int]], progress: Callable[[int, int], None] | None) -> None:
    """Do all of the work, and say how far it is."""
    with contextlib.closing(work):  # type: ignore[type-var]
        for done, total in work:
            if progress:
                progress(done, total)


@contextlib.contextmanager
def _written(path: Path | None) -> Iterator[IO[bytes]]:
    """Standard output; or a new file, which is durable at the end, or gone."""
    if path is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    if path.exists() and stat.S_ISREG(path.stat().st_mode):
        raise UsageError(f"{path} is there already")
    existed = path.exists()  # a device, a FIFO
    with open(path, "wb" if existed else "xb") as file:
        try:
            yield file
            file.flush()
            if not existed:
                os.fsync(file.fileno())
        except BaseException:
            if not existed:
                path.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def _read(path: Path | None) -> Iterator[IO[bytes]]:
    if path is not None and str(path) != "-":
        with open(path, "rb") as file:
            yield file
        return
    if sys.stdin.isatty():
        raise UsageError("give a file, or let the stream come through a pipe: nbdclone send ... | nbdclone receive")
    yield sys.stdin.buffer
