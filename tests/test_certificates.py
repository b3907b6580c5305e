"""``nbdclone cert``: what it makes, what it leaves alone, and one line for everything that a user can get wrong."""

from __future__ import annotations

import re
import socket
import ssl
import stat
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from nbdclone import certificates, cli
from nbdclone.certificates import make
from nbdclone.credentials import client_context, server_context
from nbdclone.errors import UsageError

FILES = {"ca-cert.pem", "ca-key.pem", "server-cert.pem", "server-key.pem", "client-cert.pem", "client-key.pem"}

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cert(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """The program: exit status, stdout, stderr."""

    def run(*args: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["nbdclone", "cert", *map(str, args)])
        capfd.readouterr()
        try:
            cli.main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        return status, *capfd.readouterr()

    return run


def load(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def names(certificate: x509.Certificate) -> tuple[list[str], list[str]]:
    """DNS names and addresses."""
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return found.get_values_for_type(x509.DNSName), [str(ip) for ip in found.get_values_for_type(x509.IPAddress)]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> ssl.SSLObject:
    """A TLS handshake in memory; the server's end."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = client.wrap_bio(to_client, to_server, server_hostname=name), server.wrap_bio(to_server, to_client, True)
    done = [False, False]
    while not all(done):
        for number, end in enumerate(ends):
            try:
                end.do_handshake()
                done[number] = True
            except ssl.SSLWantReadError:
                pass
    return ends[1]


def test_it_makes_a_ca_a_server_and_a_client_and_says_how_to_use_them(cert: Run, tmp_path: Path) -> None:
    directory = tmp_path / "new" / "tls"
    status, out, err = cert(directory)
    assert (status, err) == (0, "")
    assert set(contents(directory)) == FILES
    assert set(out.splitlines()[:6]) == {str(directory / name) for name in FILES}
    for wanted in (f"--tls-certificates {directory}", f"?tls-certificates={directory}", f"dir={directory}"):
        assert wanted in out


def test_private_keys_are_their_owners_alone(tmp_path: Path) -> None:
    make(tmp_path, clients=["web1"])
    for path in tmp_path.rglob("*.pem"):
        expected = 0o600 if path.name.endswith("-key.pem") else 0o644
        assert stat.S_IMODE(path.stat().st_mode) & ~0o022 == expected & ~0o022, path


def test_the_default_names_are_this_machines(tmp_path: Path) -> None:
    make(tmp_path)
    assert names(load(tmp_path / "server-cert.pem")) == ([socket.gethostname(), "localhost"], ["127.0.0.1", "::1"])


def test_the_names_are_those_that_were_given(cert: Run, tmp_path: Path) -> None:
    args = ("--host", "disks.example.org", "--host", "192.0.2.7", "--host", "[2001:db8::1]")
    assert cert(tmp_path, *args)[0] == 0
    assert names(load(tmp_path / "server-cert.pem")) == (["disks.example.org"], ["192.0.2.7", "2001:db8::1"])
    server = server_context(tmp_path)
    for name in ("disks.example.org", "192.0.2.7", "2001:db8::1"):
        shake_hands(server, client_context(tmp_path), name)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(server, client_context(tmp_path), "localhost")


def test_each_certificate_is_for_its_own_purpose_and_time(tmp_path: Path) -> None:
    make(tmp_path, clients=["web1"], days=30)
    now = datetime.now(UTC)
    ca = load(tmp_path / "ca-cert.pem")
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints).value == x509.BasicConstraints(True, 0)
    assert ca.not_valid_after_utc > now + timedelta(days=3600)
    for path, purpose in (
        ("server-cert.pem", ExtendedKeyUsageOID.SERVER_AUTH),
        ("client-cert.pem", ExtendedKeyUsageOID.CLIENT_AUTH),
        ("web1/client-cert.pem", ExtendedKeyUsageOID.CLIENT_AUTH),
    ):
        one = load(tmp_path / path)
        one.verify_directly_issued_by(ca)
        assert list(one.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [purpose]
        assert not one.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        assert one.not_valid_before_utc <= now
        assert timedelta(days=29) < one.not_valid_after_utc - now <= timedelta(days=30)


def test_a_clients_certificate_does_not_make_a_server(tmp_path: Path) -> None:
    make(tmp_path)
    for name in ("cert", "key"):
        (tmp_path / f"server-{name}.pem").write_bytes((tmp_path / f"client-{name}.pem").read_bytes())
    with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
        shake_hands(server_context(tmp_path), client_context(tmp_path), "localhost")


def test_run_again_it_adds_clients_of_the_same_ca_and_changes_nothing_else(cert: Run, tmp_path: Path) -> None:
    make(tmp_path)
    before = contents(tmp_path)
    status, out, _err = cert(tmp_path, "--client", "web1", "--client", "web2")
    assert status == 0
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before
    added = {
        f"{client}/{file}"
        for client in ("web1", "web2")
        for file in ("ca-cert.pem", "client-cert.pem", "client-key.pem")
    }
    assert set(after) - set(before) == added
    assert out.splitlines()[:6] == [
        str(tmp_path / name) for name in sorted(added, key=lambda name: (name[:4], "ca" not in name, "key" not in name))
    ]
    for client in ("web1", "web2"):
        subject = load(tmp_path / client / "client-cert.pem").subject
        assert subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == client
        shake_hands(server_context(tmp_path), client_context(tmp_path / client), "localhost")


def test_run_again_with_nothing_to_do_it_does_nothing(tmp_path: Path) -> None:
    make(tmp_path, clients=["web1"])
    before = contents(tmp_path)
    assert make(tmp_path) == []
    assert contents(tmp_path) == before


def test_a_certificate_that_was_removed_is_made_again_for_the_same_key(tmp_path: Path) -> None:
    make(tmp_path, clients=["web1"])
    before = contents(tmp_path)
    for name in ("server-cert.pem", "web1/client-cert.pem"):
        (tmp_path / name).unlink()
    assert make(tmp_path, hosts=["new.example.org"], clients=["web1"]) == [
        tmp_path / "server-cert.pem",
        tmp_path / "web1" / "client-cert.pem",
    ]
    after = contents(tmp_path)
    assert {name for name in before if before[name] != after[name]} == {"server-cert.pem", "web1/client-cert.pem"}
    shake_hands(server_context(tmp_path), client_context(tmp_path / "web1"), "new.example.org")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--host", "other"], r"server-cert\.pem: there is one; remove it"),
        (["--client", "web1"], r"web1/client-cert\.pem: there is one; remove it"),
        (["--client", "../web2"], "cannot be a client's name"),
        (["--client", ""], "cannot be a client's name"),
        (["--client", "."], "cannot be a client's name"),
        (["--client", "n" * 65], "cannot be a client's name"),
        (["--client", "ca-key.pem"], r"ca-key\.pem"),
        (["--host", "größe"], "is no name or address"),
        (["--host", ""], "is no name or address"),
        (["--host", "a b"], "is no name or address"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line_and_changes_nothing(
    cert: Run, tmp_path: Path, args: list[str], said: str
) -> None:
    make(tmp_path, clients=["web1"])
    before = contents(tmp_path)
    status, out, err = cert(tmp_path, *args)
    assert (status, out) == (1, "")
    assert re.fullmatch(rf"nbdclone: .*{said}.*\n", err), err
    assert contents(tmp_path) == before


@pytest.mark.parametrize("days", ["0", "-1", "many"])
def test_days_have_to_be_some(cert: Run, tmp_path: Path, days: str) -> None:
    assert cert(tmp_path / "new", "--days", days)[0] == 2
    assert not (tmp_path / "new").exists()


def test_without_the_key_of_the_ca_there_is_no_signing(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "ca-key.pem").unlink()
    with pytest.raises(UsageError, match=r"ca-key\.pem: not there"):
        make(tmp_path, clients=["web1"])


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("ca-cert.pem", b"x", "no certificate in PEM"),
        ("ca-key.pem", b"x", "no private key in PEM"),
        ("ca-key.pem", None, "not the key of ca-cert.pem"),
    ],
)
def test_a_ca_that_is_none_is_told(tmp_path: Path, file: str, content: bytes | None, said: str) -> None:
    make(tmp_path)
    (tmp_path / file).write_bytes((tmp_path / "client-key.pem").read_bytes() if content is None else content)
    with pytest.raises(UsageError, match=rf"{file}: {said}"):
        make(tmp_path, clients=["web1"])


def test_a_certificate_does_not_outlive_its_ca(tmp_path: Path) -> None:
    make(tmp_path, days=5000)
    assert make(tmp_path, clients=["web1"], days=9000)
    ends = load(tmp_path / "web1" / "client-cert.pem").not_valid_after_utc
    assert ends == load(tmp_path / "ca-cert.pem").not_valid_after_utc


@pytest.mark.parametrize("kind", ["rsa", "ed25519"])
def test_a_ca_of_another_kind_signs_as_well(tmp_path: Path, kind: str) -> None:
    own = rsa.generate_private_key(65537, 2048) if kind == "rsa" else ed25519.Ed25519PrivateKey.generate()
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (tmp_path / "ca-key.pem").write_bytes(own.private_bytes(serialization.Encoding.PEM, *form))
    make(tmp_path)
    shake_hands(server_context(tmp_path), client_context(tmp_path), "localhost")


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(certificates.os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        make(tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert {path.name for path in make(tmp_path)} == FILES


def test_an_address_is_an_address_and_no_name(tmp_path: Path) -> None:
    make(tmp_path, hosts=["::ffff:192.0.2.1"])
    assert names(load(tmp_path / "server-cert.pem")) == ([], [str(ip_address("::ffff:192.0.2.1"))])
