"""The server under TLS, over real sockets: who is let in, what may go wrong, and that every byte arrives."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import random
import shutil
import socket
import ssl
from pathlib import Path

import pytest
import serving as serving_module
from cryptography import x509
from cryptography.x509.oid import NameOID
from moving import Moving
from secure import STARTTLS, SecurePeer, certificates, only, revoke, sign, trusting
from serving import BASE, MIB, PATIENCE_S, Peer, connect, go_data, make_pool, option, serving, until, where
from test_session_oracle import IMAGE, SIZE, WINDOW, initial, work

from nbdclone.client import Client
from nbdclone.errors import ConnectionFailed, ServerRefused
from nbdclone.protocol.wire import CMD_DISC, CMD_FLUSH, CMD_READ, CMD_WRITE, Option, OptionReply
from nbdclone.server import connection, quiet, session, tls
from nbdclone.server import host as host_module
from nbdclone.server.server import Server
from nbdclone.server.tls import ServerTLS, TLSSocket
from nbdclone.store.pool import Pool

V12, V13 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3


@pytest.fixture(autouse=True, params=[False, True], ids=["here", "relayed"])
def relayed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whatever is said here of TLS also holds where another worker has the export, and this one stays in between."""
    if request.param:
        monkeypatch.setattr(serving_module, "Server", Moving)
        monkeypatch.setitem(globals(), "Server", Moving)
    return bool(request.param)


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "nbdclone")


def secured(tmp_path: Path, **options: object) -> dict[str, object]:
    """What makes a server secure, on TCP and a Unix socket."""
    return {
        "listen": [("127.0.0.1", 0)],
        "sockets": [tmp_path / "nbd.sock"],
        "tls": ServerTLS(certificates(), **options),  # type: ignore[arg-type]
    }


async def opened(server: Server, export: str = "web1", listener: int = 1, context: object = None) -> SecurePeer:
    """A peer through TLS, with the export open and structured replies."""
    peer = await SecurePeer.connect(server, listener)
    await peer.secure(context)  # type: ignore[arg-type]
    assert (await peer.ask(Option.STRUCTURED_REPLY))[-1][0] == OptionReply.ACK
    assert (await peer.ask(Option.GO, go_data(export)))[-1][0] == OptionReply.ACK
    return peer


async def works(server: Server) -> None:
    """Others are served as if nothing had been."""
    async with await Client.connect(where(server, "web2"), tls=trusting()) as client:
        assert await client.pread(4096, 0) == BASE[:4096]


def lines(caplog: pytest.LogCaptureFixture, level: int = logging.DEBUG) -> list[str]:
    """What the server logged, never a traceback, without what it says of those who were let in."""
    records = [record for record in caplog.records if record.name == "nbdclone" and record.levelno >= level]
    assert not any(record.exc_info for record in records)
    return [line for record in records if "TLSv1" not in (line := record.getMessage())]


# Who may come in


async def test_where_tls_is_required_the_uris_say_so_and_plain_clients_are_told(pool: Pool, tmp_path: Path) -> None:
    async with serving(pool, **secured(tmp_path)) as server:
        assert [uri.partition(":")[0] for uri in server.uris] == ["nbds", "nbds+unix"]
        for listener in range(2):
            plain = where(server, "web1", listener).replace("nbds", "nbd", 1)
            with pytest.raises(ServerRefused, match="ERR_TLS_REQD: this server requires TLS"):
                await Client.connect(plain)
            with pytest.raises(ServerRefused, match="ERR_TLS_REQD"):
                await Client.list(plain)
        await works(server)


async def test_export_name_without_a_required_tls_closes_the_connection(pool: Pool, tmp_path: Path) -> None:
    async with serving(pool, **secured(tmp_path)) as server, await Peer.connect(server) as peer:
        await peer.greet()
        await peer.send(option(Option.EXPORT_NAME, b"web1"))
        assert await peer.is_closed()
        await works(server)


async def test_where_tls_is_offered_both_kinds_of_client_are_served(pool: Pool, tmp_path: Path) -> None:
    async with serving(pool, **secured(tmp_path, required=False)) as server:
        assert [uri.partition(":")[0] for uri in server.uris] == ["nbd", "nbd+unix"]
        async with await connect(server, "web1") as client:
            assert await client.pread(512, 0) == BASE[:512]
        await works(server)


async def test_a_server_without_tls_says_so(pool: Pool) -> None:
    async with serving(pool) as server:
        with pytest.raises(ServerRefused, match="ERR_UNSUP: this server does without TLS"):
            await Client.connect(where(server, "web1"), tls=trusting())


@pytest.mark.parametrize("version", [V12, V13])
async def test_a_client_without_a_certificate_of_the_ca_is_refused(
    pool: Pool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    version: ssl.TLSVersion,
) -> None:
    monkeypatch.setattr(quiet, "INTERVAL_S", 0.0)
    nobody = only(trusting(tmp_path, verify_peer=False), version)
    stranger = only(trusting(certificates("other"), verify_peer=False), version)
    async with serving(pool, **secured(tmp_path)) as server:
        for context, why in ((nobody, "did not return a certificate"), (stranger, "certificate verify failed")):
            for listener in range(2):
                with pytest.raises(ConnectionFailed, match=r"lost|alert"):
                    await Client.connect(where(server, "web1", listener), tls=context)
                await until(lambda why=why: any(why in line for line in lines(caplog, logging.WARNING)))  # type: ignore[misc]
        await works(server)
        assert len(lines(caplog, logging.WARNING)) == 4, "one line for each"


async def test_a_certificate_that_was_revoked_counts_no_more(pool: Pool, tmp_path: Path) -> None:
    directory = shutil.copytree(certificates(), tmp_path / "certificates")
    revoke(directory, directory / "web1" / "client-cert.pem")
    async with serving(pool, **secured(tmp_path) | {"tls": ServerTLS(directory)}) as server:
        with pytest.raises(ConnectionFailed):
            await Client.connect(where(server, "web1"), tls=trusting(directory / "web1"))
        await works(server)


async def test_without_verification_any_client_comes_in_encrypted(pool: Pool, tmp_path: Path) -> None:
    nobody = trusting(tmp_path, verify_peer=False)
    async with serving(pool, **secured(tmp_path, verify_peer=False)) as server:
        client = await Client.connect(where(server, "web1"), tls=nobody)
        assert await client.pread(512, 0) == BASE[:512]
        await client.close()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
async def test_older_versions_of_tls_are_refused(pool: Pool, tmp_path: Path, version: ssl.TLSVersion) -> None:
    context = only(trusting(), version)
    context.set_ciphers("ALL:@SECLEVEL=0")
    async with serving(pool, **secured(tmp_path)) as server:
        with pytest.raises(ConnectionFailed):
            await Client.connect(where(server, "web1"), tls=context)
        await works(server)


async def test_the_subject_of_the_clients_certificate_is_known(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = shutil.copytree(certificates(), tmp_path / "certificates")
    names = [(NameOID.ORGANIZATION_NAME, "Lab, Ltd"), (NameOID.COMMON_NAME, "web7")]
    subject = x509.Name([x509.NameAttribute(kind, value) for kind, value in names])
    sign(directory, "client-cert.pem", "client-key.pem", subject=subject)
    seen: list[TLSSocket] = []
    shake = TLSSocket.handshake

    async def handshake(self: TLSSocket) -> None:
        await shake(self)
        seen.append(self)

    monkeypatch.setattr(TLSSocket, "handshake", handshake)
    async with serving(pool, **secured(tmp_path)) as server:
        for context in (trusting(directory), trusting(certificates() / "web1")):
            await (await Client.connect(where(server, "web1"), tls=context)).close()
    assert [one.subject for one in seen] == ["CN=web7,O=Lab\\, Ltd", "CN=web1"]


# Every byte arrives


@pytest.mark.parametrize("version", [V12, V13])
@pytest.mark.parametrize("listener", [0, 1], ids=["tcp", "unix"])
async def test_large_and_small_requests_go_through(
    pool: Pool, tmp_path: Path, version: ssl.TLSVersion, listener: int
) -> None:
    async with serving(pool, **secured(tmp_path)) as server:
        client = await Client.connect(where(server, "web1", listener), tls=only(trusting(), version))
        for length in (1, 512, 16384, 65536, 70_001, 3 * MIB):
            data = os.urandom(length)
            await client.pwrite(data, 777)
            assert await client.pread(length, 777) == data
        await client.flush()
        await client.close()


async def test_a_burst_of_requests_in_many_records_is_answered_without_another_byte(pool: Pool, tmp_path: Path) -> None:
    async with serving(pool, **secured(tmp_path)) as server, await opened(server) as peer:
        # Much more than one receive, with large writes that end amid what was received.
        payload = os.urandom(100_000)
        requests = []
        for cookie in range(0, 400, 2):
            requests.append(peer.request(CMD_WRITE, 0, cookie=cookie, payload=payload))
            requests.append(peer.request(CMD_READ, MIB, 4096, cookie=cookie + 1))
        sending = asyncio.create_task(peer.send(*requests))
        replies = await peer.replies(400)
        await sending
        assert all(reply.error == 0 for reply in replies.values())
        assert all(replies[cookie].data == BASE[MIB : MIB + 4096] for cookie in range(1, 400, 2))


async def test_requests_held_back_are_taken_up_again(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With room for few at once, receiving stops and starts again while undecrypted requests are in memory.
    monkeypatch.setattr(session, "MAX_WAITING", 4)
    monkeypatch.setattr(session, "MAX_UNSENT", 4096)
    async with serving(pool, **secured(tmp_path)) as server, await opened(server) as peer:
        await peer.send(*[peer.request(CMD_READ, 4096 * i, 70_000, cookie=i) for i in range(200)])
        replies = await peer.replies(200)
        assert all(replies[i].data == BASE[4096 * i : 4096 * i + 70_000] for i in range(200))


async def test_a_request_behind_a_write_that_stopped_receiving_is_taken_when_it_starts_again(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The end of a payload brings the next request into memory; no descriptor tells of it any more.
    monkeypatch.setattr(session, "MAX_IN_FLIGHT", 1)
    async with serving(pool, **secured(tmp_path)) as server, await opened(server) as peer:
        for length in range(MIB + 1, MIB + 8):  # each too long to be written on the loop
            await peer.send(peer.request(CMD_WRITE, payload=bytes(length)), peer.request(CMD_READ, 512, 10, cookie=2))
            assert (await peer.reply()).error == 0
            assert (await peer.reply()).data == bytes(10)


async def test_receiving_gives_others_a_turn_and_goes_on(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbdclone.server.input.MAX_RECEIVES", 1)
    async with serving(pool, **secured(tmp_path)) as server, await opened(server) as peer:
        payload = os.urandom(200_000)
        await peer.send(peer.request(CMD_WRITE, 512, payload=payload), peer.request(CMD_READ, 512, 200_000, cookie=2))
        assert (await peer.reply()).error == 0
        assert (await peer.reply()).data == payload


async def test_options_and_requests_behind_the_last_message_of_tls_are_taken(pool: Pool, tmp_path: Path) -> None:
    async with serving(pool, **secured(tmp_path)) as server, await SecurePeer.connect(server) as peer:
        await peer.ask_for_tls()
        peer.reads[1] = 4096
        read = peer.request(CMD_READ, 512, 4096)
        await peer.start_tls(behind=option(Option.GO, go_data("web1")) + read)
        assert (await peer.answer())[-1][0] == OptionReply.ACK
        assert (await peer.reply()).data == BASE[512:4608]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("size", [777, 5000, 64 << 10])
async def test_the_oracle_through_tls_with_little_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, seed: int
) -> None:
    # Half the connections through a Unix socket with the smallest of buffers; little is received at once.
    monkeypatch.setattr(host_module, "SEND_BUFFER", 1)
    monkeypatch.setattr(tls, "CIPHERTEXT", size)
    pool = make_pool(tmp_path, IMAGE, "web1", size=SIZE)
    expected = initial(0)
    rng = random.Random(f"{size} {seed}")
    seams = [0, *sorted(rng.sample(range(1, WINDOW), 3)), WINDOW]
    async with serving(pool, **secured(tmp_path)) as server:
        clients = [
            await Client.connect(where(server, "web1", number % 2), tls=only(trusting(), (V12, V13)[number // 2]))
            for number in range(4)
        ]
        parts = zip(clients, itertools.pairwise(seams), strict=True)
        await asyncio.gather(*[work(c, random.Random(rng.random()), expected, 0, a, b) for c, (a, b) in parts])
        assert await clients[1].pread(WINDOW, 0) == expected
        for client in clients:
            await client.close()
    with pool.open_clone("web1") as clone:
        assert clone.pread(WINDOW, 0) == expected


async def test_a_slow_reader_gets_all_and_holds_back_itself_alone(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_module, "SEND_BUFFER", 4096)
    async with serving(pool, **secured(tmp_path)) as server, await opened(server) as peer:
        await peer.send(*[peer.request(CMD_READ, 0, MIB, cookie=i) for i in range(20)])
        await works(server)
        for cookie, reply in (await peer.replies(20)).items():
            assert reply.data == BASE[:MIB], cookie


# How it ends


async def test_disconnecting_is_answered_by_close_notify(pool: Pool, tmp_path: Path) -> None:
    async with serving(pool, **secured(tmp_path)) as server:
        for listener in range(2):
            async with await opened(server, listener=listener) as peer:
                await peer.send(peer.request(CMD_READ, 0, 512), peer.request(CMD_DISC, cookie=2))
                assert (await peer.reply()).data == BASE[:512]
                assert await peer.says_goodbye()


async def test_a_shutdown_answers_what_was_asked_and_says_goodbye(pool: Pool, tmp_path: Path) -> None:
    async with Server(pool, **secured(tmp_path)) as server:  # type: ignore[arg-type]
        peers = [await opened(server, listener=listener) for listener in range(2)]
        for peer in peers:
            await peer.send(*[peer.request(CMD_READ, 0, MIB, cookie=i) for i in range(8)])
            assert (await peer.reply()).data == BASE[:MIB]
        reading = [asyncio.create_task(peer.replies(7)) for peer in peers]
        await asyncio.sleep(0)
    for peer, task in zip(peers, reading, strict=True):
        assert all(reply.data == BASE[:MIB] for reply in (await task).values())
        assert await peer.says_goodbye()
        peer.close()


async def test_a_client_that_says_goodbye_is_answered_and_let_go(pool: Pool, tmp_path: Path) -> None:
    async with serving(pool, **secured(tmp_path)) as server, await opened(server) as peer:
        request = peer.encrypt(peer.request(CMD_READ, 0, 512))
        with pytest.raises(ssl.SSLWantReadError):
            peer.tls.unwrap()  # and waits for the server's, with the connection open
        await peer.send_raw(request + peer._outgoing.read())
        head = await asyncio.wait_for(peer._loop.sock_recv(peer.sock, 1 << 16), PATIENCE_S)
        assert len(head) > 512
        await until(lambda: not server._connections)


async def test_a_client_that_closes_its_half_without_a_goodbye_is_answered(pool: Pool, tmp_path: Path) -> None:
    async with serving(pool, **secured(tmp_path)) as server, await opened(server) as peer:
        await peer.send(peer.request(CMD_WRITE, payload=bytes(MIB + 1)))  # too long to be written on the loop
        peer.sock.shutdown(socket.SHUT_WR)
        assert (await peer.reply()).error == 0


@pytest.mark.parametrize("kept", [0, 1, 20, 100])
async def test_a_client_that_vanishes_within_a_record_leaves_the_clone_free(
    pool: Pool, tmp_path: Path, kept: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(pool, **secured(tmp_path)) as server:
        async with await opened(server, listener=0) as peer:
            await peer.send_raw(peer.encrypt(peer.request(CMD_WRITE, 0, payload=bytes(4096)))[:kept])
        await until(lambda: not server._connections)
        with pool.open_clone("web1") as clone:
            assert clone.pread(4096, 0) == BASE[:4096]
        assert lines(caplog, logging.WARNING) == []


# What a stranger sends


@pytest.mark.parametrize("listener", [0, 1], ids=["tcp", "unix"])
async def test_plaintext_in_the_same_segment_as_starttls_closes_the_connection(
    pool: Pool, tmp_path: Path, caplog: pytest.LogCaptureFixture, listener: int
) -> None:
    async with serving(pool, **secured(tmp_path, required=False)) as server:
        async with await SecurePeer.connect(server, listener) as peer:
            await peer.greet()
            await peer.send(STARTTLS + option(Option.GO, go_data("web1")))
            assert await peer.is_closed(), "without a word, not even the acknowledgement"
        assert len(lines(caplog)) == 1
        assert "ahead of the TLS handshake" in lines(caplog)[0]
        await works(server)


@pytest.mark.parametrize("listener", [0, 1], ids=["tcp", "unix"])
async def test_plaintext_a_moment_after_starttls_never_becomes_part_of_the_session(
    pool: Pool, tmp_path: Path, caplog: pytest.LogCaptureFixture, listener: int
) -> None:
    async with serving(pool, **secured(tmp_path, required=False)) as server:
        async with await SecurePeer.connect(server, listener) as peer:
            await peer.ask_for_tls()
            await peer.send(option(Option.GO, go_data("web1")))
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await peer.start_tls()
        await until(lambda: not server._connections)
        assert len(lines(caplog)) == 1
        assert "TLS handshake failed" in lines(caplog)[0]
        await works(server)


NOISE = random.Random("noise").randbytes(16 << 10)


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        NOISE,
        b"\x16\x03\x01\x40\x00" + NOISE,  # a record of the greatest length that begins a handshake
        b"\x16\x03\x01\x40\x00\x01\x00\x3f\xfc\x03\x03" + NOISE,  # and says that it is a ClientHello
        b"\x16\x03\x01\xff\xff" + NOISE,
        b"\x17\x03\x03\x00\x20" + NOISE[:32],  # data before the handshake
        b"\x15\x03\x01\x00\x02\x02\x28",  # an alert
    ],
    ids=["http", "noise", "record", "hello", "length", "data", "alert"],
)
async def test_garbage_for_a_tls_handshake_ends_that_connection_alone(
    pool: Pool, tmp_path: Path, caplog: pytest.LogCaptureFixture, sent: bytes
) -> None:
    async with serving(pool, **secured(tmp_path)) as server:
        async with await SecurePeer.connect(server) as peer:
            await peer.ask_for_tls()
            await peer.send(sent)
            peer.sock.shutdown(socket.SHUT_WR)
            with pytest.raises(EOFError):
                await peer.receive(1000)
        await until(lambda: not server._connections)
        assert len(lines(caplog)) == 1
        await works(server)


@pytest.mark.parametrize("sent", [b"", b"\x16", b"\x16\x03\x01\x40\x00" + NOISE[:100]])
async def test_a_client_that_stalls_in_the_tls_handshake_is_dropped_at_the_deadline(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, sent: bytes
) -> None:
    monkeypatch.setattr(connection, "HANDSHAKE_DEADLINE_S", 0.3)
    async with serving(pool, **secured(tmp_path)) as server:
        async with await SecurePeer.connect(server) as peer:
            await peer.ask_for_tls()
            await peer.send(sent)
            assert await peer.is_closed()
        assert lines(caplog) == [line for line in lines(caplog) if "handshake ended: deadline" in line] != []
        await works(server)


async def test_a_byte_now_and_then_does_not_move_the_deadline(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HANDSHAKE_DEADLINE_S", 0.3)
    async with serving(pool, **secured(tmp_path)) as server, await SecurePeer.connect(server) as peer:
        await peer.ask_for_tls()
        began = peer._loop.time()
        with contextlib.suppress(OSError):  # when it is closed
            for byte in b"\x16\x03\x01\x40\x00" + bytes(1000):
                await peer.send(bytes([byte]))
                await asyncio.sleep(0.02)
        assert peer._loop.time() - began < 2
        await works(server)


async def test_a_client_that_stalls_after_the_tls_handshake_is_dropped_too(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HANDSHAKE_DEADLINE_S", 0.3)
    async with serving(pool, **secured(tmp_path)) as server, await SecurePeer.connect(server) as peer:
        await peer.secure()
        assert await peer.is_closed()


async def test_a_peer_that_has_keys_changed_and_takes_no_answer_is_not_listened_to_for_ever() -> None:
    """OpenSSL answers each change; Python has no way to ask for one, so a stand-in gives the answers."""

    class Changing:
        def __init__(self, asked: ssl.MemoryBIO, answers: ssl.MemoryBIO) -> None:
            self._asked, self._answers = asked, answers

        def pending(self) -> int:
            return 0

        def read(self, count: int, view: memoryview) -> int:
            self._asked.read()
            self._answers.write(bytes(27))
            raise ssl.SSLWantReadError

    theirs, ours = socket.socketpair()
    with theirs, ours:
        theirs.setblocking(False)
        ours.setblocking(False)
        secured = TLSSocket(ours, ServerTLS(certificates()), asyncio.get_running_loop())
        secured._tls = Changing(secured._incoming, secured._outgoing)  # type: ignore[assignment]

        def change_keys(times: int) -> None:
            for _ in range(times):
                theirs.send(b"a change of keys")
                with contextlib.suppress(BlockingIOError):
                    secured.recv_into(memoryview(bytearray(64)))

        change_keys(100)
        with pytest.raises(ConnectionResetError):
            change_keys(20_000)
        assert secured._outgoing.pending <= tls.MAX_OWN_WORDS + 27


@pytest.mark.parametrize("version", [V12, V13])
async def test_a_record_that_was_tampered_with_ends_that_connection_alone(
    pool: Pool, tmp_path: Path, caplog: pytest.LogCaptureFixture, version: ssl.TLSVersion
) -> None:
    async with serving(pool, **secured(tmp_path)) as server:
        async with await opened(server, listener=0, context=only(trusting(), version)) as peer:
            record = bytearray(peer.encrypt(peer.request(CMD_WRITE, 0, payload=bytes(4096))))
            record[-100] ^= 1
            await peer.send_raw(bytes(record))
            assert await peer.is_closed()
        await until(lambda: not server._connections)
        assert len(lines(caplog)) == 1
        with pool.open_clone("web1") as clone:
            assert clone.pread(4096, 0) == BASE[:4096]
        await works(server)


async def test_plaintext_in_the_transmission_ends_that_connection_alone(
    pool: Pool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(pool, **secured(tmp_path)) as server:
        async with await opened(server) as peer:
            await peer.send_raw(peer.request(CMD_FLUSH))
            assert await peer.is_closed()
        assert len(lines(caplog)) == 1
        await works(server)


async def test_a_second_starttls_within_tls_is_invalid(pool: Pool, tmp_path: Path) -> None:
    async with serving(pool, **secured(tmp_path)) as server, await SecurePeer.connect(server) as peer:
        await peer.secure()
        [(kind, _text)] = await peer.ask(Option.STARTTLS)
        assert kind == OptionReply.ERR_INVALID
        assert (await peer.ask(Option.GO, go_data("web1")))[-1][0] == OptionReply.ACK


# Certificates that change


async def test_new_certificates_are_for_new_connections(pool: Pool, tmp_path: Path) -> None:
    directory = shutil.copytree(certificates(), tmp_path / "certificates")
    async with serving(pool, **secured(tmp_path) | {"tls": ServerTLS(directory)}) as server:
        old = await opened(server)
        before = old.tls.getpeercert(binary_form=True)
        sign(directory)
        async with await SecurePeer.connect(server) as peer:
            await peer.secure()
            assert peer.tls.getpeercert(binary_form=True) == before, "not before it is told"
        server.reload()
        async with await SecurePeer.connect(server) as peer:
            await peer.secure()
            assert peer.tls.getpeercert(binary_form=True) != before
        assert (await old.run(CMD_READ, 0, 512)).data == BASE[:512]
        old.close()


async def test_a_reload_that_fails_keeps_the_old_ones_and_says_why(
    pool: Pool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = shutil.copytree(certificates(), tmp_path / "certificates")
    async with serving(pool, **secured(tmp_path) | {"tls": ServerTLS(directory)}) as server:
        (directory / "server-key.pem").write_text("nothing of use")
        server.reload()
        [line] = lines(caplog, logging.WARNING)
        assert line.startswith(f"TLS goes on as it was: {directory / 'server-key.pem'}: ")
        await works(server)


# The socket by itself


class Kernel:
    """A socket whose other end takes only so much at once, and nothing every other time."""

    def __init__(self, rng: random.Random) -> None:
        self.taken = bytearray()
        self._rng = rng

    def send(self, data: memoryview) -> int:
        if self._rng.random() < 0.4:
            raise BlockingIOError
        count = min(len(data), self._rng.choice([1, 100, 16_406, 50_000, 1 << 20]))
        self.taken += data[:count]
        return count


@pytest.mark.parametrize("seed", range(5))
def test_what_send_has_counted_is_with_the_kernel(seed: int) -> None:
    rng = random.Random(seed)
    kernel = Kernel(rng)
    own = TLSSocket(kernel, ServerTLS(certificates()), None)  # type: ignore[arg-type]
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    peer = trusting().wrap_bio(incoming, outgoing)
    for _ in range(3):
        for side, source, target in ((peer, outgoing, own._incoming), (own._tls, own._outgoing, incoming)):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
            target.write(source.read())
    got = bytearray()

    def decrypt() -> None:
        incoming.write(kernel.taken)
        kernel.taken.clear()
        try:
            while piece := peer.read(1 << 16):
                got.extend(piece)
        except ssl.SSLWantReadError:
            pass

    sent = bytearray()
    for length in [1, 1, 2, 28, 4124, 16_384, 65_536, 65_537, 300_000, 1]:
        message = memoryview(rng.randbytes(length))
        sent += message
        while message:
            try:
                count = own.send(message)
            except BlockingIOError:
                count = 0
            counted = len(sent) - len(message) + count
            decrypt()
            assert len(got) >= counted, "it counted what the kernel does not have"
            assert got == sent[: len(got)]
            assert len(own._unsent) <= tls.PLAINTEXT + 1000
            message = message[count:]
    assert got == sent
