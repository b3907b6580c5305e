"""TLS on a server's connection: what looks like a socket to the session, and decrypts and encrypts in between.

The descriptor stays the server's own, and OpenSSL works on memory: one ``recv`` brings many records, and one ``send``
takes several away, where a socket of the ``ssl`` module makes system calls for each record.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import tempfile
from base64 import b64decode, b64encode
from mmap import mmap
from pathlib import Path
from typing import Any, TypeAlias

from nbdclone.credentials import (
    CA_CERTIFICATE,
    CA_REVOKED,
    SERVER_CERTIFICATE,
    SERVER_KEY,
    psk_server_context,
    reason,
    server_context,
)
from nbdclone.errors import RemoteProtocolError, UsageError
from nbdclone.server.input import Input

# How much ciphertext is received at once, and kept undecrypted at most. OpenSSL's memory for it stays with the
# connection, a third more than this: what is gained above is lost in memory.
CIPHERTEXT = 32 << 10
# How much is encrypted before it is sent: what the peer does not take of it is all that is kept, and the memory of it
# stays with the connection too. Two records of TLS.
PLAINTEXT = 32 << 10
RECORD = 16 << 10  # OpenSSL takes no more than this at once
# What OpenSSL has to say of its own accord and the peer does not take, in bytes. It answers each change of keys that a
# peer asks for with 27; in peace there is one in hundreds of gigabytes.
MAX_OWN_WORDS = 16 << 10


SERVER_FILES = (CA_CERTIFICATE, CA_REVOKED, SERVER_CERTIFICATE, SERVER_KEY)
_PSK = "psk"


class ServerTLS:
    """How a server does TLS: with certificates, or with pre-shared keys.

    ``certificates`` is a directory with ca-cert.pem, server-cert.pem, server-key.pem and perhaps ca-crl.pem; clients
    have to show a certificate of that CA, unless ``verify_peer`` is false. ``psk`` is a file of lines username:hexkey.
    ``required``: no client may do without. Raises UsageError where anything in the files is wrong.
    """

    def __init__(
        self,
        certificates: str | Path | None = None,
        *,
        psk: str | Path | None = None,
        required: bool = True,
        verify_peer: bool = True,
    ) -> None:
        if (certificates is None) == (psk is None):
            raise UsageError("TLS takes a directory of certificates, or a file of pre-shared keys")
        self.required = required
        self._certificates = certificates
        self._psk = psk
        self._verify_peer = verify_peer
        self.context = self._load()
        self.ciphertext = memoryview(mmap(-1, CIPHERTEXT))  # between the kernel and OpenSSL; shared by all connections

    def record(self) -> dict[str, Any]:
        """The same for another process, as JSON can hold it, keys included: ``from_record``.

        What the files hold by now does not matter: all processes have what was read last.
        """
        files = {name: b64encode(data).decode() for name, data in self._files.items()}
        return {"files": files, "required": self.required, "verify_peer": self._verify_peer}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> ServerTLS:
        options = {"required": record["required"], "verify_peer": record["verify_peer"]}
        # OpenSSL wants names of files; these lie in memory, and no key comes to a disk.
        with contextlib.ExitStack() as held:
            directory = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="nbdclone-")))
            for name, data in record["files"].items():
                file = held.enter_context(open(os.memfd_create(name), "wb"))
                file.write(b64decode(data))
                file.flush()
                (directory / name).symlink_to(f"/proc/self/fd/{file.fileno()}")
            if _PSK in record["files"]:
                return cls(psk=directory / _PSK, **options)
            return cls(directory, **options)

    def reload(self) -> None:
        """Read the files again, for the connections to come. Raises UsageError, and then all is as it was."""
        self.context = self._load()

    def _load(self) -> ssl.SSLContext:
        files = self._read()
        if self._certificates is not None:
            context = server_context(Path(self._certificates), verify_peer=self._verify_peer)
        else:
            assert self._psk is not None
            context = psk_server_context(Path(self._psk))
        if self._read() != files:
            raise UsageError(f"{self._certificates or self._psk}: changed while it was read")
        self._files = files
        return context

    def _read(self) -> dict[str, bytes]:
        """The files as they are now, by their names in a directory of certificates; those that are there."""
        if self._certificates is not None:
            paths = {name: Path(self._certificates, name) for name in SERVER_FILES}
        else:
            paths = {_PSK: Path(self._psk or "")}
        files = {}
        for name, path in paths.items():
            with contextlib.suppress(OSError):
                files[name] = path.read_bytes()
        return files


class TLSSocket:
    """A connected socket under TLS, on the server's side; it has the methods of a socket that a session uses.

    ``subject`` is that of the client's certificate, where one was asked for and verified, as RFC 4514 writes it:
    "CN=web1,O=Lab".

    What the peer may do wrong here raises OSError (ssl.SSLError is one), but in ``handshake``.
    """

    def __init__(self, sock: socket.socket, tls: ServerTLS, loop: asyncio.AbstractEventLoop) -> None:
        self.subject = ""
        self._sock = sock
        self._loop = loop
        self._ciphertext = tls.ciphertext
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = tls.context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._unsent = memoryview(b"")  # ciphertext that the kernel did not take yet
        self._ahead = 0  # how much of the next send() is in it, or was
        self._ended = False  # the peer has said that nothing more comes, or is gone

    # The handshakes, TLS's and NBD's: a coroutine waits

    async def handshake(self) -> None:
        """TLS's handshake. Raises RemoteProtocolError where it fails, OSError."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as error:
                self._push_quietly()  # the alert that tells the client why
                raise RemoteProtocolError(f"the TLS handshake failed: {reason(error)}") from None
            else:
                break
            await self._send_outgoing()
            if not await self._receive_more():
                raise ConnectionResetError("the client went away in the TLS handshake")
        await self._send_outgoing()
        if self._tls.context.verify_mode == ssl.CERT_REQUIRED:
            self._read_subject()

    async def sendall(self, data: bytes) -> None:
        for start in range(0, len(data), RECORD):
            self._tls.write(data[start : start + RECORD])
            await self._send_outgoing()

    async def recv(self, size: int) -> bytes:
        """Some bytes, as soon as there are any; none at the end."""
        buffer = memoryview(bytearray(size))
        count = 0
        while not self._ended and not (count := self._decrypt(buffer)):
            await self._receive_more()
        return bytes(buffer[:count])

    async def _send_outgoing(self) -> None:
        if data := self._outgoing.read():
            await self._loop.sock_sendall(self._sock, data)

    async def _receive_more(self) -> bool:
        data = await self._loop.sock_recv(self._sock, CIPHERTEXT)
        self._take(data)
        return bool(data)

    def _read_subject(self) -> None:
        from cryptography.x509 import load_der_x509_certificate

        shown = self._tls.getpeercert(binary_form=True)
        try:
            subject = load_der_x509_certificate(shown or b"").subject
            self.subject = subject.rfc4514_string()
        except ValueError as error:
            raise RemoteProtocolError(f"the client's certificate cannot be read: {error}") from None

    # The transmission: nobody waits

    @property
    def version(self) -> str | None:
        """What was agreed on: "TLSv1.3"."""
        return self._tls.version()

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def pending(self) -> bool:
        """May ``recv_into`` have something to give, whatever the descriptor says?"""
        return self._ended or self._incoming.pending > 0 or self._tls.pending() > 0

    def recv_into(self, view: memoryview) -> int:
        """Like a socket's: what is there, 0 at the end, BlockingIOError when there is nothing yet."""
        if not self.pending:
            self._take(self._ciphertext[: self._sock.recv_into(self._ciphertext)])
        count = 0 if self._ended else self._decrypt(view)
        if not count and not self._ended:
            raise BlockingIOError
        return count

    def send(self, view: memoryview) -> int:
        """Like a socket's: how much of ``view`` is with the kernel now, encrypted, or BlockingIOError.

        The rest has to be the beginning of the next call's ``view``: some of it may be encrypted already.
        """
        self._push()
        # What was encrypted ahead counts only now, when the last of its ciphertext has gone.
        done, self._ahead = self._ahead, 0
        total = len(view)
        write = self._tls.write
        while done < total:
            begin = done
            end = min(total, done + PLAINTEXT)
            while done < end:
                done += write(view[done:end])
            self._unsent = memoryview(self._outgoing.read())
            try:
                self._push()
            except BlockingIOError:
                self._ahead = done - begin
                return begin
        return total

    def shutdown(self, how: int) -> None:
        self._say_goodbye()
        self._sock.shutdown(how)

    def close(self) -> None:
        self._say_goodbye()
        self._sock.close()

    def _take(self, data: bytes | memoryview) -> None:
        if data:
            self._incoming.write(data)
        else:
            # OpenSSL is not told: without a farewell before, it would not send the replies that are still to come.
            self._ended = True

    def _decrypt(self, view: memoryview) -> int:
        """Decrypt into ``view`` as much of what was received as fits; 0 if there is no whole record."""
        tls, incoming = self._tls, self._incoming
        size = len(view)
        got = 0
        try:
            while got < size:
                count: int = tls.read(size - got, view[got:])  # type: ignore[assignment]
                if not count:
                    self._ended = True
                    break
                got += count
                if not incoming.pending and not tls.pending():
                    break
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self._ended = True
        except ssl.SSLError:
            self._push_quietly()
            raise
        if self._outgoing.pending:
            self._push_quietly()
            if self._outgoing.pending > MAX_OWN_WORDS:
                raise ConnectionResetError("the peer takes none of the answers that TLS itself gives")
        return got

    def _push(self) -> None:
        """Give the kernel the ciphertext. BlockingIOError while it does not take all."""
        while self._unsent:
            self._unsent = self._unsent[self._sock.send(self._unsent) :]

    def _push_quietly(self) -> None:
        """The same with what OpenSSL has to say of its own accord, as far as it goes without waiting."""
        with contextlib.suppress(OSError):
            self._push()
            self._unsent = memoryview(self._outgoing.read())
            self._push()

    def _say_goodbye(self) -> None:
        """close_notify: the peer learns that nothing was cut off."""
        if not self._unsent:
            with contextlib.suppress(OSError):
                self._tls.unwrap()
        self._push_quietly()


AnySocket: TypeAlias = socket.socket | TLSSocket


class TLSInput(Input):
    """Input from a TLS socket, which may hold what its descriptor does not tell of any more."""

    def _pending(self) -> bool:
        assert isinstance(self._sock, TLSSocket)
        return self._unparsed or self._sock.pending
