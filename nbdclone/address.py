"""NBD URIs: where a server listens, which export is meant, and how TLS is done, after the NBD URI specification."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import parse_qs, unquote, urlsplit

from nbdclone.errors import UsageError
from nbdclone.protocol.wire import DEFAULT_PORT

_PARAMETERS = {"socket", "tls-type", "tls-hostname", "tls-verify-peer", "tls-certificates", "tls-psk-file"}


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens, and which export is meant: ``path`` of a Unix socket, or ``host`` and ``port``.

    The rest is about TLS: whether it is to be used; a directory with certificates, or a file of pre-shared keys and the
    name of one; whether the server has to prove who it is, and as whom, if not as ``host``.
    """

    host: str
    port: int
    path: str
    export: str
    tls: bool = False
    username: str = ""
    certificates: str = ""
    psk_file: str = ""
    verify_peer: bool = True
    hostname: str = ""

    @classmethod
    def parse(cls, uri: str) -> Address:
        """``nbd://host[:port]/export``, ``nbd+unix:///export?socket=PATH``, or a Unix socket's path alone.

        With ``nbds`` instead of ``nbd`` through TLS; further parameters then are ``tls-certificates=DIR``,
        ``tls-verify-peer=0``, ``tls-hostname=NAME``, ``tls-psk-file=FILE`` (with ``user@`` before the host). Those of
        other clients (``x-...``) are ignored.

        Raises:
            UsageError: it is none of these.
        """
        if "://" not in uri:
            return cls("", 0, uri, "")
        try:
            parts = urlsplit(uri)
            port = parts.port or DEFAULT_PORT
        except ValueError as error:
            raise UsageError(f"{uri}: {error}") from None
        given = {name: values[0] for name, values in parse_qs(parts.query).items()}
        scheme, _plus, transport = parts.scheme.partition("+")
        unix = transport == "unix"
        path = given.get("socket", "") if unix else ""
        host = "" if unix else parts.hostname or ""
        if scheme not in ("nbd", "nbds") or transport not in ("", "unix") or not (path or host):
            raise UsageError(f"{uri}: not nbd://HOST:PORT/EXPORT and not nbd+unix:///EXPORT?socket=PATH")
        verify = given.get("tls-verify-peer", "1").lower()
        if verify not in ("0", "1", "false", "true"):
            raise UsageError(f"{uri}: tls-verify-peer is 0 or 1")
        unknown = [name for name in given if name not in _PARAMETERS and not name.startswith("x-")]
        if unknown:
            raise UsageError(f"{uri}: unknown parameter {unknown[0]!r}")
        kind = "psk" if "tls-psk-file" in given else "x509"
        if given.get("tls-type", kind) != kind:
            raise UsageError(f"{uri}: tls-type is psk with a tls-psk-file, and x509 without one")
        return cls(
            host=host,
            port=0 if unix else port,
            path=path,
            export=unquote(parts.path.removeprefix("/")),
            tls=scheme == "nbds",
            username=unquote(parts.username or ""),
            certificates=given.get("tls-certificates", ""),
            psk_file=given.get("tls-psk-file", ""),
            verify_peer=verify in ("1", "true"),
            hostname=given.get("tls-hostname", ""),
        )
