"""The options of ``serve``: what each is, and what its help says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nbdclone.commands.common import parse_size
from nbdclone.protocol.handshake_events import TLSMode

# A moment that is longer keeps a processor from others for more than a disk takes.
MAX_BUSY_POLL_US = 1000


def parse_rate(text: str) -> int:
    """A size, and not nothing."""
    if not (size := parse_size(text)):
        raise typer.BadParameter("nothing a second: give a size, or leave it out for no limit")
    return size


Listen = Annotated[
    list[str] | None,
    typer.Option("--listen", metavar="HOST:PORT", help="Default: 127.0.0.1:10809. Port 0: a free one. Repeatable."),
]
Sockets = Annotated[list[Path] | None, typer.Option("--socket", metavar="PATH", help="A Unix socket. Repeatable.")]
Tls = Annotated[
    TLSMode | None,
    typer.Option("--tls", help="Default: required, where there are certificates or keys.", show_default=False),
]
TlsCertificates = Annotated[
    Path | None,
    typer.Option(
        "--tls-certificates", metavar="DIR", help="With ca-cert.pem, server-cert.pem, server-key.pem (see cert)."
    ),
]
TlsPsk = Annotated[
    Path | None, typer.Option("--tls-psk", metavar="FILE", help="Pre-shared keys: lines username:hexkey.")
]
TlsVerifyPeer = Annotated[
    bool,
    typer.Option("--tls-verify-peer/--no-tls-verify-peer", help="Take clients with a certificate of that CA alone."),
]
Insecure = Annotated[bool, typer.Option("--insecure", help="Let other machines reach --listen without required TLS.")]
MaxConnections = Annotated[
    int | None, typer.Option("--max-connections", min=1, metavar="N", help="In all (default: 8192).")
]
MaxConnectionsPerAddress = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="From one IP address or local user (default: half of all).")
]
MaxMemory = Annotated[
    int | None,
    typer.Option(
        "--max-memory", parser=parse_size, metavar="SIZE", help="For all clients together (default: at most 1G)."
    ),
]
BusyPoll = Annotated[
    int | None,
    typer.Option(
        "--busy-poll",
        min=0,
        max=MAX_BUSY_POLL_US,
        metavar="US",
        help="Microseconds to stay awake for the next of requests that come singly (default: 50; 0: never).",
    ),
]
Iops = Annotated[int | None, typer.Option("--iops", min=1, metavar="N", help="Requests a second, for each export.")]
Bps = Annotated[
    int | None,
    typer.Option("--bps", parser=parse_rate, metavar="SIZE", help="Bytes a second, for each export."),
]
Workers = Annotated[
    int | None,
    typer.Option("--workers", min=1, metavar="N", help="Processes to serve with (default: one for each core)."),
]
Replay = Annotated[
    bool, typer.Option("--replay/--no-replay", help="Record what the first boot of a base reads; read it ahead.")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more on stderr.")]
