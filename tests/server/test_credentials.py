"""What is wrong with the files of TLS is said when the server begins, in a line that names the file."""

from __future__ import annotations

import asyncio
import re
import shutil
import signal
import ssl
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from secure import certificates, revoke, sign, trusting
from serving import BASE, serving
from test_process import end, program, ready, refused

from nbdclone import credentials
from nbdclone.client import Client
from nbdclone.credentials import client_context, read_psk
from nbdclone.errors import UsageError
from nbdclone.server.server import Server
from nbdclone.server.tls import ServerTLS
from nbdclone.store.pool import Pool

DAY = timedelta(days=1)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Good certificates, to be spoilt."""
    return shutil.copytree(certificates(), tmp_path / "certificates")


def encrypt_key(directory: Path) -> None:
    path = directory / "server-key.pem"
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    sealed = serialization.BestAvailableEncryption(b"secret")
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, sealed))


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


SPOILT: dict[str, tuple[str, str, Callable[[Path], object]]] = {
    "no certificate": ("server-cert.pem", "No such file", lambda d: (d / "server-cert.pem").unlink()),
    "no key": ("server-key.pem", "No such file", lambda d: (d / "server-key.pem").unlink()),
    "no CA": ("ca-cert.pem", "No such file", lambda d: (d / "ca-cert.pem").unlink()),
    "unreadable": ("server-cert.pem", "Is a directory", lambda d: replace_by_directory(d / "server-cert.pem")),
    "certificate no PEM": (
        "server-cert.pem",
        "no certificate in PEM",
        lambda d: (d / "server-cert.pem").write_bytes(b"\x30\x82"),
    ),
    "key no PEM": ("server-key.pem", "no private key in PEM", lambda d: (d / "server-key.pem").write_text("x")),
    "CA no PEM": ("ca-cert.pem", "no certificate in PEM", lambda d: (d / "ca-cert.pem").write_text("x")),
    "CA empty": ("ca-cert.pem", "no certificate in PEM", lambda d: (d / "ca-cert.pem").write_text("")),
    "key of another": (
        "server-key.pem",
        "not the key of server-cert.pem",
        lambda d: shutil.copy(d / "client-key.pem", d / "server-key.pem"),
    ),
    "key encrypted": ("server-key.pem", "encrypted", encrypt_key),
    "expired": ("server-cert.pem", "expired at 20", lambda d: sign(d, ends=-DAY)),
    "too early": ("server-cert.pem", "not valid before 20", lambda d: sign(d, begins=DAY, ends=2 * DAY)),
    "CA expired": ("ca-cert.pem", "expired at 20", lambda d: sign(d, "ca-cert.pem", "ca-key.pem", ends=-DAY)),
    "CRL expired": (
        "ca-crl.pem",
        "expired at 20",
        lambda d: revoke(d, d / "client-cert.pem", ends=-DAY),
    ),
    "CRL no PEM": ("ca-crl.pem", "no list of revoked", lambda d: (d / "ca-crl.pem").write_text("x")),
}


@pytest.mark.parametrize("name", SPOILT)
def test_what_is_wrong_is_said_with_the_name_of_the_file(directory: Path, name: str) -> None:
    file, what, spoil = SPOILT[name]
    ServerTLS(directory)
    spoil(directory)
    with pytest.raises(UsageError) as caught:
        ServerTLS(directory)
    assert re.fullmatch(rf"{directory / file}: .*{what}.*", str(caught.value))


def test_without_verification_the_ca_is_not_looked_at(directory: Path) -> None:
    (directory / "ca-cert.pem").unlink()
    assert ServerTLS(directory, verify_peer=False).context.verify_mode == ssl.CERT_NONE


def test_a_client_that_has_a_key_has_to_have_its_certificate(directory: Path) -> None:
    (directory / "client-cert.pem").unlink()
    with pytest.raises(UsageError, match=r"client-cert\.pem: No such file"):
        client_context(directory)


def test_either_certificates_or_keys() -> None:
    for arguments in ({}, {"certificates": "a", "psk": "b"}):
        with pytest.raises(UsageError, match="or a file of pre-shared keys"):
            ServerTLS(**arguments)  # type: ignore[arg-type]


def test_contexts_do_tls_1_2_and_1_3_without_compression_renegotiation_and_tickets() -> None:
    for context in (ServerTLS(certificates()).context, trusting()):
        assert context.minimum_version == ssl.TLSVersion.TLSv1_2
        for option in (ssl.OP_NO_COMPRESSION, ssl.OP_NO_RENEGOTIATION, ssl.OP_NO_TICKET):
            assert context.options & option
        names = {cipher["name"] for cipher in context.get_ciphers()}
        assert {"TLS_AES_256_GCM_SHA384", "ECDHE-ECDSA-AES128-GCM-SHA256"} <= names
        assert not any(re.search("NULL|RC4|DES|MD5|EXP|ADH|AECDH", name) for name in names)
    assert ServerTLS(certificates()).context.num_tickets == 0


# As a program


@pytest.mark.parametrize("name", ["no certificate", "expired", "key of another", "key encrypted", "CA no PEM"])
def test_the_program_says_it_in_one_line_before_it_listens(pool: Pool, directory: Path, name: str) -> None:
    file, what, spoil = SPOILT[name]
    spoil(directory)
    socket = directory / "nbd.sock"
    said = refused(pool.path, "--socket", socket, "--tls-certificates", directory)
    assert said.startswith(f"nbdclone: {directory / file}: ")
    assert what in said
    assert not socket.exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--tls", "required"], "needs --tls-certificates DIR"),
        (["--tls", "on"], "needs --tls-certificates DIR"),
        (["--tls-certificates", "a", "--tls-psk", "b"], "not both"),
        (["--tls", "perhaps"], "perhaps"),
    ],
)
def test_options_that_do_not_go_together_are_wrong_usage(pool: Pool, args: list[str], said: str) -> None:
    with program(pool.path, *args) as process:
        out, err = process.communicate(timeout=10)
    assert (process.returncode, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("mode", "scheme"),
    [((), "nbds"), (("--tls", "required"), "nbds"), (("--tls", "on"), "nbd"), (("--tls", "off"), "nbd")],
)
async def test_the_modes_of_the_program(pool: Pool, tmp_path: Path, mode: tuple[str, ...], scheme: str) -> None:
    with program(pool.path, "--socket", tmp_path / "s", "--tls-certificates", certificates(), *mode) as process:
        [uri] = ready(process)
        assert uri == f"{scheme}+unix:///?socket={tmp_path / 's'}"
        context = None if "off" in mode else trusting()
        assert "web1" in await Client.list(uri, tls=context)
        assert end(process)[0] == 0


async def test_sighup_reads_the_certificates_again_and_keeps_the_old_ones_if_they_are_wrong(
    pool: Pool, tmp_path: Path, directory: Path
) -> None:
    with program(pool.path, "--socket", tmp_path / "s", "--tls-certificates", directory, "--verbose") as process:
        uri = f"{ready(process)[0].replace('?', 'web1?')}&tls-certificates={directory}"
        assert process.stderr is not None
        client = await Client.connect(uri)
        shutil.copytree(certificates("other"), directory, dirs_exist_ok=True)
        with pytest.raises(OSError, match="verify failed"):
            await Client.connect(uri)
        process.send_signal(signal.SIGHUP)
        while "read again" not in await asyncio.to_thread(process.stderr.readline):
            pass
        await (await Client.connect(uri)).close()
        (directory / "server-cert.pem").unlink()
        process.send_signal(signal.SIGHUP)
        while "as it was" not in (line := await asyncio.to_thread(process.stderr.readline)):
            pass
        assert line == f"nbdclone: TLS goes on as it was: {directory / 'server-cert.pem'}: No such file or directory\n"
        await (await Client.connect(uri)).close()
        assert await client.pread(512, 0) == BASE[:512], "who was there before stays"
        await client.close()
        assert (await asyncio.to_thread(end, process))[0] == 0


# Where a server may listen without TLS


OPEN = ["0.0.0.0", "::", "", "192.0.2.1"]


@pytest.mark.parametrize("host", OPEN)
@pytest.mark.parametrize("tls", [None, "offered"])
async def test_an_address_that_others_reach_is_refused_without_required_tls(
    pool: Pool, host: str, tls: str | None
) -> None:
    settings = None if tls is None else ServerTLS(certificates(), required=False)
    with pytest.raises(UsageError, match=r"can be reached from other machines.*--tls-certificates DIR.*--insecure"):
        async with Server(pool, listen=[(host, 0)], tls=settings):
            pass


async def test_with_required_tls_or_on_ones_own_word_every_address_will_do(pool: Pool) -> None:
    async with serving(pool, listen=[("0.0.0.0", 0)], tls=ServerTLS(certificates())) as server:
        port = server.uris[0].rpartition(":")[2]
        assert "web1" in await Client.list(f"nbds://127.0.0.1:{port}", tls=trusting())
    async with serving(pool, listen=[("0.0.0.0", 0)], insecure=True) as server:
        assert "web1" in await Client.list(f"nbd://127.0.0.1:{server.uris[0].rpartition(':')[2]}")


def test_the_program_refuses_to_be_open_to_all(pool: Pool) -> None:
    said = refused(pool.path, "--listen", "0.0.0.0:0")
    assert said == (
        "nbdclone: 0.0.0.0:0 can be reached from other machines, and without TLS anyone there can read and change these"
        " disks: give --tls-certificates DIR (nbdclone cert makes one), or --insecure on a network that you trust\n"
    )


def test_the_program_is_open_to_all_when_it_is_told_to(pool: Pool) -> None:
    with program(pool.path, "--listen", "0.0.0.0:0", "--insecure") as process:
        ready(process)
        assert end(process) == (0, "")


# Pre-shared keys

KEY = "0123456789abcdef" * 4


def test_keys_are_read_as_psktool_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# who may come\nweb1:{KEY}\n\nweb:2:{KEY[:32]}\n")
    assert read_psk(path) == {"web1": bytes.fromhex(KEY), "web:2": bytes.fromhex(KEY[:32])}


@pytest.mark.parametrize("line", [f":{KEY}", "web1", "web1:", "web1:xyz", f"web1:{KEY[:30]}", f"{'n' * 257}:{KEY}"])
def test_a_line_that_is_no_key_is_told(tmp_path: Path, line: str) -> None:
    path = tmp_path / "keys"
    path.write_text(f"web0:{KEY}\n{line}\n")
    with pytest.raises(UsageError, match=rf"{path}: line 2 is not a name"):
        read_psk(path)


def test_a_file_without_keys_is_told(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("\n")
    with pytest.raises(UsageError, match="there is no key"):
        read_psk(tmp_path / "keys")
    with pytest.raises(UsageError, match="nothing: No such file"):
        read_psk(tmp_path / "nothing")


def test_where_python_has_no_psk_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys").write_text(f"web1:{KEY}\n")
    monkeypatch.delattr(ssl, "HAS_PSK", raising=False)
    monkeypatch.setattr(credentials.sys, "version_info", (3, 11, 7))
    for make in (
        lambda: ServerTLS(psk=tmp_path / "keys"),
        lambda: credentials.psk_client_context(tmp_path / "keys", "web1"),
    ):
        with pytest.raises(UsageError, match=r"TLS-PSK needs Python 3\.13 or newer; this is 3\.11"):
            make()
