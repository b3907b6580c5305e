"""What TLS needs from the disk: certificates laid out as qemu and libnbd expect them, or pre-shared keys.

Both roles load them here, and everything is looked at when it is loaded: what is wrong is a UsageError that names the
file, not a surprise for the first client.
"""

from __future__ import annotations

import os
import re
import ssl
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nbdclone.errors import UsageError

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

CA_CERTIFICATE: Final = "ca-cert.pem"
CA_REVOKED: Final = "ca-crl.pem"  # optional: the certificates that count no more
SERVER_CERTIFICATE: Final = "server-cert.pem"
SERVER_KEY: Final = "server-key.pem"
CLIENT_CERTIFICATE: Final = "client-cert.pem"
CLIENT_KEY: Final = "client-key.pem"

MIN_PSK_SIZE: Final = 16  # bytes: a shorter key can be guessed; psktool makes 32
MAX_PSK_SIZE: Final = 256  # bytes of a key, and of a name: what every Python takes
# Of TLS 1.2, the ciphers that prove who is there by the key alone. TLS 1.3 has its own.
PSK_CIPHERS: Final = "kECDHEPSK+CHACHA20:kDHEPSK+AESGCM:kDHEPSK+CHACHA20:kPSK+AESGCM:kPSK+CHACHA20:kECDHEPSK+AES:!eNULL"


def server_context(certificates: Path, *, verify_peer: bool = True) -> ssl.SSLContext:
    """For a server that has ``server-cert.pem`` and ``server-key.pem`` in this directory.

    Clients show a certificate of ``ca-cert.pem`` that is not in ``ca-crl.pem``; without ``verify_peer``, none is asked
    for. Raises UsageError.
    """
    context = _context(ssl.PROTOCOL_TLS_SERVER)
    _load_own(context, certificates / SERVER_CERTIFICATE, certificates / SERVER_KEY)
    if verify_peer:
        _load_authority(context, certificates)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(certificates: Path | None = None, *, verify_peer: bool = True) -> ssl.SSLContext:
    """For a client: ``ca-cert.pem`` in this directory tells the servers to trust, ``client-cert.pem`` who it is.

    Without a directory, the system's authorities are trusted. Raises UsageError.
    """
    context = _context(ssl.PROTOCOL_TLS_CLIENT)
    if not verify_peer:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif certificates is None:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    else:
        _load_authority(context, certificates)
    if certificates is not None and any((certificates / name).exists() for name in (CLIENT_CERTIFICATE, CLIENT_KEY)):
        _load_own(context, certificates / CLIENT_CERTIFICATE, certificates / CLIENT_KEY)
    return context


def psk_server_context(path: Path) -> ssl.SSLContext:
    """For a server whose clients are those that know a key in this file. Raises UsageError."""
    keys = read_psk(path)
    context = _psk_context(ssl.PROTOCOL_TLS_SERVER)
    set_callback: Any = getattr(context, "set_psk_server_callback")  # noqa: B009 (Python 3.13 and later)
    set_callback(lambda name: keys.get(name or "", b""))
    return context


def psk_client_context(path: Path, username: str) -> ssl.SSLContext:
    """For a client that is ``username`` in this file. Raises UsageError."""
    key = read_psk(path).get(username)
    if key is None:
        raise UsageError(f"{path}: there is no key of {username!r}")
    context = _psk_context(ssl.PROTOCOL_TLS_CLIENT)
    set_callback: Any = getattr(context, "set_psk_client_callback")  # noqa: B009 (Python 3.13 and later)
    set_callback(lambda _hint: (username, key))
    return context


def read_psk(path: Path) -> dict[str, bytes]:
    """Pre-shared keys by their user's name, from lines ``username:hexkey``, as psktool writes them."""
    keys: dict[str, bytes] = {}
    for number, line in enumerate(_read(path).decode("utf-8", "replace").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _colon, digits = line.strip().rpartition(":")
        try:
            key = bytes.fromhex(digits)
        except ValueError:
            key = b""
        if not 0 < len(name.encode()) <= MAX_PSK_SIZE or not MIN_PSK_SIZE <= len(key) <= MAX_PSK_SIZE:
            what = f"a name, a colon, and a key of {MIN_PSK_SIZE} to {MAX_PSK_SIZE} bytes in hexadecimal"
            raise UsageError(f"{path}: line {number} is not {what}")
        keys[name] = key
    if not keys:
        raise UsageError(f"{path}: there is no key in it")
    return keys


def reason(error: BaseException) -> str:
    """What went wrong in TLS, for a person: ssl's errors without their numbers and places in C."""
    if isinstance(error, ssl.SSLError):
        text = re.sub(r"^\[[^\]]*\] | \(_ssl\.c:\d+\)$", "", str(error.args[-1]))
        return re.sub(r"\s+", " ", text)
    return str(error) or type(error).__name__


def _context(protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Nor tickets, with which a session goes on in another connection: these here are few and long.
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0
    return context


def _psk_context(protocol: int) -> ssl.SSLContext:
    if not getattr(ssl, "HAS_PSK", False):
        ours = ".".join(map(str, sys.version_info[:2]))
        raise UsageError(f"TLS-PSK needs Python 3.13 or newer; this is {ours}")
    context = _context(protocol)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the key proves who is there: both sides know it, or there is no connection
    context.set_ciphers(PSK_CIPHERS)
    return context


def _load_own(context: ssl.SSLContext, certificate_path: Path, key_path: Path) -> None:
    """The certificate and the key that this side shows."""
    from cryptography.hazmat.primitives import serialization

    certificate = _read_certificates(certificate_path)[0]
    _check_time(certificate_path, certificate)
    try:
        key = serialization.load_pem_private_key(_read(key_path), None)
    except TypeError:
        raise UsageError(f"{key_path}: the key is encrypted, and nobody is there to give its password") from None
    except ValueError:
        raise UsageError(f"{key_path}: no private key in PEM") from None
    form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    if key.public_key().public_bytes(*form) != certificate.public_key().public_bytes(*form):
        raise UsageError(f"{key_path}: not the key of {certificate_path.name}")
    try:
        context.load_cert_chain(certificate_path, key_path, password="")
    except (OSError, ValueError) as error:
        raise UsageError(f"{certificate_path}: {reason(error)}") from None


def _load_authority(context: ssl.SSLContext, directory: Path) -> None:
    """Whose certificates are believed, and which of them are not."""
    path, revoked = directory / CA_CERTIFICATE, directory / CA_REVOKED
    _check_time(path, *_read_certificates(path))
    paths = [path]
    if revoked.exists():
        _check_revoked(revoked)
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        paths.append(revoked)
    for path in paths:
        try:
            context.load_verify_locations(path)
        except OSError as error:
            raise UsageError(f"{path}: {reason(error)}") from None


def _check_time(path: Path, *certificates: Certificate) -> None:
    """One of the certificates at least has to be valid now."""
    now = datetime.now(UTC)
    if not any(one.not_valid_before_utc <= now <= one.not_valid_after_utc for one in certificates):
        first = certificates[0]
        if now > first.not_valid_after_utc:
            raise UsageError(f"{path}: the certificate expired at {first.not_valid_after_utc:%Y-%m-%d %H:%M} UTC")
        begins = f"{first.not_valid_before_utc:%Y-%m-%d %H:%M}"
        raise UsageError(
            f"{path}: the certificate is not valid before {begins} UTC; this machine's clock says {now:%F}"
        )


def _check_revoked(path: Path) -> None:
    from cryptography.x509 import load_pem_x509_crl

    try:
        until = load_pem_x509_crl(_read(path)).next_update_utc
    except ValueError:
        raise UsageError(f"{path}: no list of revoked certificates in PEM") from None
    if until is not None and until < datetime.now(UTC):
        raise UsageError(f"{path}: expired at {until:%Y-%m-%d %H:%M} UTC, and no client can be checked without it")


def _read_certificates(path: Path) -> list[Certificate]:
    from cryptography.x509 import load_pem_x509_certificates

    try:
        return load_pem_x509_certificates(_read(path))
    except ValueError:
        raise UsageError(f"{path}: no certificate in PEM") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {os.strerror(error.errno) if error.errno else error}") from None
