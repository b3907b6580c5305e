"""Certificates for tests, good ones by nbdclone's own hand, and a client made of bytes that speaks TLS."""

from __future__ import annotations

import asyncio
import functools
import ssl
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from serving import PATIENCE_S, Peer, option

from nbdclone.certificates import make
from nbdclone.credentials import client_context
from nbdclone.protocol.wire import Option, OptionReply

# Kept for the time of the tests: making certificates takes a moment.
_DIRECTORY = tempfile.TemporaryDirectory(prefix="nbdclone-tls-")


@functools.cache
def certificates(name: str = "good") -> Path:
    """A directory made by ``nbdclone cert``, with a client "web1" in it; another name gives another CA."""
    directory = Path(_DIRECTORY.name, name)
    make(directory, clients=["web1"])
    return directory


def trusting(directory: Path | None = None, **options: Any) -> ssl.SSLContext:
    """A client's context for the good server, or another, by whatever name it is called."""
    context = client_context(directory or certificates(), **options)
    context.check_hostname = False
    return context


def only(context: ssl.SSLContext, version: ssl.TLSVersion) -> ssl.SSLContext:
    context.minimum_version = context.maximum_version = version
    return context


def sign(
    directory: Path,
    certificate: str = "server-cert.pem",
    key: str = "server-key.pem",
    *,
    begins: timedelta = timedelta(days=-2),
    ends: timedelta = timedelta(days=1),
    subject: x509.Name | None = None,
) -> None:
    """Put a certificate of the directory's CA in the place of the one that is there, for the same key."""
    authority = x509.load_pem_x509_certificate((directory / "ca-cert.pem").read_bytes())
    own = serialization.load_pem_private_key((directory / key).read_bytes(), None)
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(
        authority.subject,
        subject or x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")]),
        own.public_key(),  # type: ignore[arg-type]
        x509.random_serial_number(),
        now + begins,
        now + ends,
    ).add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    signed = builder.sign(ca_key(directory), hashes.SHA256())
    (directory / certificate).write_bytes(signed.public_bytes(serialization.Encoding.PEM))


def revoke(directory: Path, certificate: Path, *, ends: timedelta = timedelta(days=1)) -> None:
    """Write a list of revoked certificates with this one in it."""
    revoked = x509.load_pem_x509_certificate(certificate.read_bytes())
    now = datetime.now(UTC)
    entry = x509.RevokedCertificateBuilder(revoked.serial_number, now).build()
    issuer = x509.load_pem_x509_certificate((directory / "ca-cert.pem").read_bytes()).subject
    builder = x509.CertificateRevocationListBuilder(issuer, now - timedelta(days=9), now + ends)
    builder = builder.add_revoked_certificate(entry)
    signed = builder.sign(ca_key(directory), hashes.SHA256())
    (directory / "ca-crl.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))


def ca_key(directory: Path) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key((directory / "ca-key.pem").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


class SecurePeer(Peer):
    """A client that sends the bytes it is told to, through TLS once that is started."""

    _tls: ssl.SSLObject | None = None

    async def ask_for_tls(self) -> None:
        await self.greet()
        assert await self.ask(Option.STARTTLS) == [(OptionReply.ACK, b"")]

    async def start_tls(self, context: ssl.SSLContext | None = None, *, behind: bytes = b"") -> None:
        """The TLS handshake; ``behind`` goes out together with its last message. Raises ssl.SSLError."""
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = (context or trusting()).wrap_bio(self._incoming, self._outgoing)
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    await self._loop.sock_sendall(self.sock, self._outgoing.read())
                    await self._more()
            if behind:
                tls.write(behind)
            await self._loop.sock_sendall(self.sock, self._outgoing.read())
        self._tls = tls

    async def secure(self, context: ssl.SSLContext | None = None) -> None:
        await self.ask_for_tls()
        await self.start_tls(context)

    @property
    def tls(self) -> ssl.SSLObject:
        assert self._tls is not None
        return self._tls

    def encrypt(self, *messages: bytes) -> bytes:
        """What would be sent."""
        for message in messages:
            for start in range(0, len(message), 16384):
                self.tls.write(message[start : start + 16384])
        return self._outgoing.read()

    async def send(self, *messages: bytes) -> None:
        """Every message in records of its own."""
        if self._tls is None:
            await super().send(*messages)
        else:
            await self.send_raw(self.encrypt(*messages))

    async def send_raw(self, data: bytes) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await self._loop.sock_sendall(self.sock, data)

    async def receive(self, count: int) -> bytes:
        if self._tls is None:
            return await super().receive(count)
        data = bytearray()
        async with asyncio.timeout(PATIENCE_S):
            while len(data) < count:
                if not (piece := await self._read(count - len(data))):
                    raise EOFError(f"closed after {len(data)} of {count} bytes")
                data += piece
        return bytes(data)

    async def says_goodbye(self) -> bool:
        """Does close_notify come next? An end without it raises ssl.SSLEOFError."""
        async with asyncio.timeout(PATIENCE_S):
            return not await self._read(1)

    async def is_closed(self) -> bool:
        if self._tls is None:
            return await super().is_closed()
        try:
            return await self.says_goodbye()
        except (ssl.SSLError, ConnectionResetError):
            return True

    async def _read(self, count: int) -> bytes:
        while True:
            try:
                return self.tls.read(count)
            except ssl.SSLWantReadError:
                await self._more()

    async def _more(self) -> None:
        if data := await self._loop.sock_recv(self.sock, 1 << 16):
            self._incoming.write(data)
        else:
            self._incoming.write_eof()


STARTTLS = option(Option.STARTTLS)
