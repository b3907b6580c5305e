"""Makes certificates for TLS, laid out as qemu and libnbd expect them: one CA, a server, and any number of clients.

A private key is never replaced. Each file appears whole or not at all, and a key before its certificate: where only the
key is there, the next call makes the certificate for it. That is also how one is renewed.
"""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
import shlex
import socket
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from nbdclone.credentials import (
    CA_CERTIFICATE,
    CLIENT_CERTIFICATE,
    CLIENT_KEY,
    SERVER_CERTIFICATE,
    SERVER_KEY,
)
from nbdclone.errors import UsageError

CA_KEY: Final = "ca-key.pem"
CA_DAYS: Final = 3650
BACKDATED: Final = timedelta(hours=1)  # for machines whose clocks are late
MAX_COMMON_NAME: Final = 64  # characters, says X.520
_CLIENT_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_COMMON_NAME - 1}}}")

Extension = tuple[x509.ExtensionType, bool]  # and whether it is critical


def make(directory: Path, *, hosts: Sequence[str] = (), clients: Sequence[str] = (), days: int = 825) -> list[Path]:
    """Make what is not there: the CA, the server's certificate for these hosts, a client's, and those of ``clients``.

    The last go to directories of their own, named after them. Returns what was made. Raises UsageError, OSError.
    """
    alternatives = [_alternative(host) for host in hosts or default_hosts()]
    for name in clients:
        if not _CLIENT_NAME.fullmatch(name):
            raise UsageError(f"{name!r} cannot be a client's name: letters, digits, '.', '_' and '-', up to 64")
        _refuse_existing(directory / name / CLIENT_CERTIFICATE)
    if hosts:
        _refuse_existing(directory / SERVER_CERTIFICATE)
    directory.mkdir(parents=True, exist_ok=True)
    authority = _Authority(directory, days)
    if not (directory / SERVER_CERTIFICATE).exists():
        name = str(alternatives[0].value)[:MAX_COMMON_NAME]
        usage = (x509.SubjectAlternativeName(alternatives), False)
        authority.issue(directory, SERVER_CERTIFICATE, SERVER_KEY, name, ExtendedKeyUsageOID.SERVER_AUTH, usage)
    if not (directory / CLIENT_CERTIFICATE).exists():
        authority.issue(directory, CLIENT_CERTIFICATE, CLIENT_KEY, "client", ExtendedKeyUsageOID.CLIENT_AUTH)
    for name in clients:
        own = directory / name
        own.mkdir(exist_ok=True)
        if not (own / CA_CERTIFICATE).exists():
            authority.write(own / CA_CERTIFICATE, (directory / CA_CERTIFICATE).read_bytes())
        authority.issue(own, CLIENT_CERTIFICATE, CLIENT_KEY, name, ExtendedKeyUsageOID.CLIENT_AUTH)
    return authority.made


def default_hosts() -> list[str]:
    """This machine, as it calls itself and as it is called from within."""
    return list(dict.fromkeys([socket.gethostname(), "localhost", "127.0.0.1", "::1"]))


def advice(directory: Path, clients: Sequence[str]) -> str:
    """What to do with the certificates: lines for a person."""
    where = shlex.quote(str(directory.absolute()))
    own = shlex.quote(str(directory.absolute() / clients[0])) if clients else where
    keep = f"Keep {CA_KEY} to yourself: who has it can make clients."
    copy = "".join(f"Copy {directory / name} to the client {name}.\n" for name in clients)
    return f"""
{keep}
{copy}
Serve:  nbdclone serve --listen HOST:10809 --tls-certificates {where}
libnbd: nbdinfo 'nbds://HOST/EXPORT?tls-certificates={own}'
qemu:   --object tls-creds-x509,id=tls0,endpoint=client,dir={own}
        --image-opts driver=nbd,host=HOST,port=10809,export=EXPORT,tls-creds=tls0"""


class _Authority:
    """The CA of a directory, found there or made; it signs, and keeps account of what was written."""

    def __init__(self, directory: Path, days: int) -> None:
        self.made: list[Path] = []
        self._now = datetime.now(UTC).replace(microsecond=0)
        self._end = self._now + timedelta(days=days)
        path, key_path = directory / CA_CERTIFICATE, directory / CA_KEY
        if path.exists() and not key_path.exists():
            raise UsageError(f"{key_path}: not there, and without it {path.name} can sign nothing")
        self._key = self._load_or_make_key(key_path)
        if not path.exists():
            self._make(path, max(days, CA_DAYS))
        try:
            self._certificate = x509.load_pem_x509_certificate(path.read_bytes())
        except ValueError:
            raise UsageError(f"{path}: no certificate in PEM") from None
        if self._certificate.public_key() != self._key.public_key():
            raise UsageError(f"{key_path}: not the key of {path.name}")
        if self._certificate.not_valid_after_utc <= self._now:
            raise UsageError(f"{path}: it expired at {self._certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC")

    def issue(
        self, directory: Path, certificate: str, key: str, name: str, purpose: x509.ObjectIdentifier, *more: Extension
    ) -> None:
        """Make a certificate, and a key for it where there is none."""
        public = self._load_or_make_key(directory / key).public_key()
        usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
        extensions: list[Extension] = [
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (usage, True),
            (x509.ExtendedKeyUsage([purpose]), False),
            (x509.SubjectKeyIdentifier.from_public_key(public), False),
            (x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), False),
            *more,
        ]
        end = min(self._end, self._certificate.not_valid_after_utc)
        signed = self._sign(_name(name), self._certificate.subject, public, end, extensions)
        self.write(directory / certificate, signed)

    def write(self, path: Path, data: bytes, mode: int = 0o644) -> None:
        """Write a file that is not there yet: whole and durable, or not at all."""
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            with open(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, path)  # which, unlike a rename, replaces nothing
        finally:
            os.unlink(temporary)
        parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)
        self.made.append(path)

    def _make(self, path: Path, days: int) -> None:
        public = self._key.public_key()
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        extensions: list[Extension] = [
            (x509.BasicConstraints(ca=True, path_length=0), True),
            (usage, True),
            (x509.SubjectKeyIdentifier.from_public_key(public), False),
        ]
        # A number of its own: clients that know two CAs of one name would take the one for the other.
        name = _name(f"nbdclone CA {secrets.token_hex(4)}")
        self.write(path, self._sign(name, name, public, self._now + timedelta(days=days), extensions))

    def _load_or_make_key(self, path: Path) -> CertificateIssuerPrivateKeyTypes:
        if not path.exists():
            made = ec.generate_private_key(ec.SECP256R1())
            form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            self.write(path, made.private_bytes(serialization.Encoding.PEM, *form), 0o600)
            return made
        try:
            key = serialization.load_pem_private_key(path.read_bytes(), None)
        except (TypeError, ValueError):
            raise UsageError(f"{path}: no private key in PEM, or one with a password") from None
        return key  # type: ignore[return-value]  # a key that cannot sign fails when it is to

    def _sign(
        self,
        subject: x509.Name,
        issuer: x509.Name,
        public: object,
        end: datetime,
        extensions: Sequence[Extension],
    ) -> bytes:
        builder = x509.CertificateBuilder(issuer, subject, public, x509.random_serial_number())  # type: ignore[arg-type]
        builder = builder.not_valid_before(self._now - BACKDATED).not_valid_after(end)
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        bare = isinstance(self._key, (ed25519.Ed25519PrivateKey, ed448.Ed448PrivateKey))
        signed = builder.sign(self._key, None if bare else hashes.SHA256())
        return signed.public_bytes(serialization.Encoding.PEM)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _alternative(host: str) -> x509.DNSName | x509.IPAddress:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        pass
    if not re.fullmatch(r"[A-Za-z0-9_*]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?", host):
        raise UsageError(f"{host!r} is no name or address of a host (names beyond ASCII: as xn--...)")
    return x509.DNSName(host)


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise UsageError(f"{path}: there is one; remove it to have a new one made for the same key")
