"""The client under TLS: its URIs, whom it trusts, and servers that are not what they should be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nbdclone.address import Address
from nbdclone.certificates import make
from nbdclone.client import Client
from nbdclone.credentials import client_context, server_context
from nbdclone.errors import ConnectionFailed, NBDCloneError, RemoteProtocolError, ServerRefused, UsageError
from nbdclone.protocol import wire
from nbdclone.protocol.handshake import ServerHandshake
from nbdclone.protocol.handshake_events import OpenExport, StartTLS, TLSMode
from nbdclone.protocol.wire import ExportInfo, Mode, transmission_flags

ACK = wire.OPTION_REPLY.pack(wire.REPLY_MAGIC, wire.Option.STARTTLS, wire.OptionReply.ACK, 0)
Behaviour = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("certificates")
    make(made, hosts=["127.0.0.1"], clients=["web1"])
    return made


# URIs


@pytest.mark.parametrize(
    ("uri", "address"),
    [
        ("nbds://host/web1", Address("host", 10809, "", "web1", True)),
        ("nbds://host:1/web1?tls-certificates=/a%20b", Address("host", 1, "", "web1", True, certificates="/a b")),
        ("nbds+unix:///web1?socket=/s", Address("", 0, "/s", "web1", True)),
        (
            "nbds+unix://me@/web1?socket=/s&tls-psk-file=/k&tls-verify-peer=0",
            Address("", 0, "/s", "web1", True, "me", psk_file="/k", verify_peer=False),
        ),
        ("nbds://[::1]/?tls-verify-peer=true", Address("::1", 10809, "", "", True)),
        ("nbd://host/web1?tls-certificates=/c", Address("host", 10809, "", "web1", certificates="/c")),
        ("nbds+unix:///?socket=/s&tls-hostname=web", Address("", 0, "/s", "", True, hostname="web")),
        ("nbds+unix:///?socket=/s&tls-type=x509&x-speed=5", Address("", 0, "/s", "", True)),
    ],
)
def test_uris_say_how_tls_is_done(uri: str, address: Address) -> None:
    assert Address.parse(uri) == address


@pytest.mark.parametrize("uri", ["nbds:///web1", "nbds+unix:///web1", "nbds+vsock://1/", "https://host/"])
def test_what_is_no_uri_of_nbd_is_refused(uri: str) -> None:
    with pytest.raises(UsageError, match="not nbd://"):
        Address.parse(uri)


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ("tls-certificate=/c", "unknown parameter 'tls-certificate'"),
        ("tls-type=anon", "tls-type is psk with a tls-psk-file, and x509 without one"),
        ("tls-type=psk", "tls-type is psk"),
        ("tls-type=x509&tls-psk-file=/k", "tls-type is psk"),
    ],
)
def test_what_a_uri_asks_for_in_vain_is_said(parameters: str, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        Address.parse(f"nbds://host/web1?{parameters}")


def test_verification_is_on_or_off() -> None:
    with pytest.raises(UsageError, match="tls-verify-peer is 0 or 1"):
        Address.parse("nbds://host/?tls-verify-peer=perhaps")


# Servers


@asynccontextmanager
async def server(behave: Behaviour, socket: Path | None = None) -> AsyncIterator[str]:
    """A server that greets and reads NBD_OPT_STARTTLS, and then behaves like this; its URI, to be completed."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(wire.GREETING.pack(wire.INIT_PASSWD, wire.IHAVEOPT, 3))
        try:
            await reader.readexactly(wire.CLIENT_FLAGS.size)
            assert await reader.readexactly(wire.OPTION.size) == wire.OPTION.pack(
                wire.IHAVEOPT, wire.Option.STARTTLS, 0
            )
            await behave(reader, writer)
        except (OSError, EOFError):
            pass
        finally:
            writer.close()

    if socket is None:
        listening = await asyncio.start_server(serve, "127.0.0.1", 0)
        uri = f"nbds://127.0.0.1:{listening.sockets[0].getsockname()[1]}/web1?"
    else:
        listening = await asyncio.start_unix_server(serve, socket)
        uri = f"nbds+unix:///web1?socket={socket}&"
    async with listening:
        yield uri


def honest(directory: Path, *, refuse: bool = False) -> Behaviour:
    """A server with these certificates, and an empty export."""

    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        core = ServerHandshake(TLSMode.REQUIRED)
        core.receive_data(wire.CLIENT_FLAGS.pack(3) + wire.OPTION.pack(wire.IHAVEOPT, wire.Option.STARTTLS, 0))
        assert core.next_event() == StartTLS()
        core.data_to_send()
        writer.write(ACK)
        await writer.start_tls(server_context(directory, verify_peer=not refuse))
        core.tls_started()
        while core.finished is None and (data := await reader.read(1 << 16)):
            core.receive_data(data)
            while (event := core.next_event()) is not None:
                assert isinstance(event, OpenExport)
                core.accept_export(ExportInfo(event.name, 1 << 20, transmission_flags(True)))
            writer.writelines(core.data_to_send())
        await reader.read(1)  # until NBD_CMD_DISC

    return behave


@pytest.mark.parametrize("unix", [False, True])
async def test_a_client_goes_through_tls_as_its_uri_says(directory: Path, tmp_path: Path, unix: bool) -> None:
    async with server(honest(directory), tmp_path / "s" if unix else None) as uri:
        for own in (directory, directory / "web1"):
            client = await Client.connect(f"{uri}tls-certificates={own}")
            assert client.size == 1 << 20
            assert client.mode is Mode.EXTENDED
            await client.close()


async def test_a_client_goes_through_tls_as_its_context_says(directory: Path) -> None:
    async with server(honest(directory)) as uri:
        plain = uri.replace("nbds", "nbd")
        await (await Client.connect(plain, tls=client_context(directory))).close()


async def failure(uri: str, kind: type[NBDCloneError] = ConnectionFailed, **options: object) -> str:
    """How connecting fails: in one line, and with nothing left open (which would be a warning, and an error here)."""
    with pytest.raises(kind) as caught:
        await Client.connect(uri, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert "_ssl.c" not in str(caught.value)
    return str(caught.value)


async def test_a_server_with_another_name_is_not_trusted(directory: Path, tmp_path: Path) -> None:
    make(tmp_path, hosts=["elsewhere.example.org"])
    async with server(honest(tmp_path)) as uri:
        said = await failure(f"{uri}tls-certificates={tmp_path}")
        assert "IP address mismatch, certificate is not valid for '127.0.0.1'" in said


async def test_a_name_in_the_uri_is_held_against_the_certificate(directory: Path, tmp_path: Path) -> None:
    make(tmp_path, hosts=["elsewhere.example.org"])
    for socket in (None, tmp_path / "s"):
        async with server(honest(tmp_path), socket) as uri:
            uri = f"{uri}tls-certificates={tmp_path}&tls-hostname="
            await (await Client.connect(f"{uri}elsewhere.example.org")).close()
            assert "certificate is not valid for 'localhost'" in await failure(f"{uri}localhost")


async def test_a_server_of_another_ca_is_not_trusted_unless_it_need_not_be(directory: Path, tmp_path: Path) -> None:
    make(tmp_path)
    for socket in (None, tmp_path / "s"):
        async with server(honest(tmp_path, refuse=True), socket) as uri:
            assert "certificate verify failed" in await failure(f"{uri}tls-certificates={directory}")
            assert "certificate verify failed" in await failure(uri)
            await (await Client.connect(f"{uri}tls-certificates={directory}&tls-verify-peer=0")).close()


async def test_a_client_that_the_server_does_not_trust_is_told(directory: Path, tmp_path: Path) -> None:
    make(tmp_path)
    async with server(honest(directory)) as uri:
        await failure(f"{uri}tls-certificates={tmp_path}&tls-verify-peer=0")


async def test_certificates_that_are_not_there_are_told_before_anything_is_sent(tmp_path: Path) -> None:
    said = await failure(f"nbds://192.0.2.1/web1?tls-certificates={tmp_path}", UsageError)
    assert said == f"{tmp_path / 'ca-cert.pem'}: No such file or directory"


@pytest.mark.parametrize("code", ["ERR_UNSUP", "ERR_POLICY"])
async def test_a_server_that_refuses_tls_is_left(code: str) -> None:
    left = asyncio.get_running_loop().create_future()

    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = wire.OptionReply[code]
        writer.write(wire.OPTION_REPLY.pack(wire.REPLY_MAGIC, wire.Option.STARTTLS, number, 2) + b"no")
        left.set_result(await reader.read())

    async with server(behave) as uri:
        assert f"{code}: no" in await failure(uri, ServerRefused)
        assert await left == b"", "it says nothing more, least of all in the clear"


async def test_plaintext_with_the_acknowledgement_is_refused(directory: Path) -> None:
    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(
            ACK + wire.OPTION_REPLY.pack(wire.REPLY_MAGIC, wire.Option.STRUCTURED_REPLY, wire.OptionReply.ACK, 0)
        )
        assert await reader.read() == b""

    async with server(behave) as uri:
        said = await failure(f"{uri}tls-certificates={directory}", RemoteProtocolError)
        assert "ahead of the TLS handshake" in said


async def test_plaintext_a_moment_after_the_acknowledgement_is_refused(directory: Path) -> None:
    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(ACK)
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.write(wire.OPTION_REPLY.pack(wire.REPLY_MAGIC, wire.Option.STRUCTURED_REPLY, wire.OptionReply.ACK, 0))
        await reader.read()

    async with server(behave) as uri:
        assert "lost" not in await failure(f"{uri}tls-certificates={directory}"), "it is OpenSSL that refuses it"


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x03\x40\x00" + bytes(20_000), b"HTTP/1.1 400 Bad Request\r\n"])
async def test_a_server_that_does_no_tls_handshake_is_left(directory: Path, sent: bytes) -> None:
    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(ACK)
        await writer.drain()
        await reader.read(10)
        writer.write(sent)

    async with server(behave) as uri:
        await failure(f"{uri}tls-certificates={directory}")


async def test_a_tls_handshake_that_never_ends_is_given_up_in_time(directory: Path) -> None:
    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(ACK)
        await reader.read()

    async with server(behave) as uri:
        assert "no answer within 0.2 s" in await failure(f"{uri}tls-certificates={directory}", timeout=0.2)
