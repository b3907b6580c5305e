"""Where a server listens: TCP addresses and Unix sockets, as they are written and as they are bound."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import re
import socket
import stat
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from nbdclone.errors import InUse, UsageError
from nbdclone.protocol.wire import DEFAULT_PORT

BACKLOG = 1024

_ADDRESS = re.compile(r"(?:\[(?P<bracketed>[^\]]+)\]|(?P<host>[^:\[\]]*))(?::(?P<port>\d{1,5}))?")


@dataclass(frozen=True, slots=True)
class Listener:
    """A socket that listens, the URI by which clients reach it, and the file to remove afterwards."""

    sock: socket.socket
    uri: str
    path: Path | None = None

    def close(self) -> None:
        self.sock.close()
        if self.path is not None:
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()


def parse_address(text: str) -> tuple[str, int]:
    """``HOST``, ``HOST:PORT``, ``[IPV6]:PORT`` or ``:PORT`` (all addresses). Raises UsageError."""
    match = _ADDRESS.fullmatch(text)
    port = int(match["port"] or DEFAULT_PORT) if match else -1
    if match is None or not 0 <= port <= 65535 or not text:
        raise UsageError(f"{text!r} is no address to listen on: give HOST:PORT, such as 127.0.0.1:10809 or [::1]:10809")
    return match["bracketed"] or match["host"], port


def listen_tcp(host: str, port: int, *, local_only: bool = False) -> list[Listener]:
    """Listen on every address of the host; port 0 takes a free one. Raises UsageError, InUse.

    ``local_only``: an address that other machines can reach is a UsageError.
    """
    where = f"{host or '*'}:{port}"
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise UsageError(f"cannot listen on {where}: {error.strerror}") from None
    except UnicodeError:
        raise UsageError(f"cannot listen on {where}: no name of a host") from None
    if local_only and not all(_is_loopback(str(address[0])) for *_, address in found):
        raise UsageError(
            f"{where} can be reached from other machines, and without TLS anyone there can read and change these disks:"
            " give --tls-certificates DIR (nbdclone cert makes one), or --insecure on a network that you trust"
        )
    listeners: list[Listener] = []
    try:
        for family, kind, protocol, _name, address in dict.fromkeys(found):
            sock = socket.socket(family, kind, protocol)
            listeners.append(Listener(sock, ""))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((address[0], port, *address[2:]))
            sock.listen(BACKLOG)
            sock.setblocking(False)
            port = sock.getsockname()[1]  # where 0 was asked for, all of the host's addresses get the same
            shown = f"[{address[0]}]" if family == socket.AF_INET6 else address[0]
            listeners[-1] = Listener(sock, f"nbd://{shown}:{port}")
    except OSError as error:
        for listener in listeners:
            listener.close()
        raise _refusal(where, error) from None
    return listeners


def _is_loopback(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def listen_unix(path: Path) -> Listener:
    """Listen on a Unix socket; a socket file that nobody listens on any more is replaced. Raises UsageError, InUse."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        sock.bind(os.fspath(path))
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise _refusal(os.fspath(path), error) from None
    return Listener(sock, f"nbd+unix:///?socket={quote(os.fspath(path.absolute()))}", path)


def _remove_stale(path: Path) -> None:
    """Remove a socket file whose server is gone. One that answers, or another kind of file, bind will meet."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
        except OSError:
            return


def _refusal(where: str, error: OSError) -> UsageError:
    reason = os.strerror(error.errno) if error.errno else str(error)
    kind = InUse if error.errno == errno.EADDRINUSE else UsageError
    return kind(f"cannot listen on {where}: {reason}")
