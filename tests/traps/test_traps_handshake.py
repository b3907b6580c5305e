"""What servers get wrong in the handshake, each as a test over a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
import time
from pathlib import Path

import pytest
from bytewise import BASE_FLAGS, CLONE_FLAGS, CONTEXTS, SEND_DF, SILENCE_S, Bytewise
from serving import BASE, BASE_SIZE, MIB, serving, until
from wirebytes import (
    ABORT,
    ACK,
    BLOCK_STATUS,
    EXPORT_NAME,
    FIXED,
    GO,
    INFO,
    INVALID,
    LIST,
    LIST_CONTEXTS,
    NO_ZEROES,
    PEEK_EXPORT,
    READ,
    REP_INFO,
    SERVER,
    SET_CONTEXTS,
    STRUCTURED_REPLY,
    TOO_BIG,
    UNKNOWN,
    UNSUP,
    WRITE,
    client_flags,
    context_request,
    export_request,
    greeting,
    info_block_size,
    info_export,
    listed,
    option,
    option_reply,
    request,
    simple,
)

from nbdclone.server import accept, connection
from nbdclone.server.listen import Listener
from nbdclone.store.pool import Pool

both_infos = pytest.mark.parametrize("number", [GO, INFO], ids=["go", "info"])
GO_WEB1 = export_request(b"web1")
BLOCK_SIZES = info_block_size(1, 4096, 32 * MIB)


def told(number: int, flags: int = CLONE_FLAGS, size: int = BASE_SIZE) -> bytes:
    """The whole answer to GO or INFO that asked for nothing."""
    return (
        option_reply(number, REP_INFO, BLOCK_SIZES)
        + option_reply(number, REP_INFO, info_export(size, flags))
        + option_reply(number, ACK)
    )


# Flags and options that are not known


@pytest.mark.parametrize("flags", [4, 1 << 31, FIXED | NO_ZEROES | 1 << 16])
async def test_unknown_client_flags_close_the_connection(pool: Pool, flags: int) -> None:
    async with serving(pool) as server, await Bytewise.greeted(server, flags) as peer:
        await peer.send(option(LIST))
        assert await peer.is_closed()


@pytest.mark.parametrize("length", [0, 1, 5000, 64 << 10])
@pytest.mark.parametrize("number", [0, PEEK_EXPORT, 12, 0x7654321, 0xFFFFFFFF])
async def test_of_an_unknown_option_the_payload_is_drained_and_the_answer_is_unsup(
    pool: Pool, number: int, length: int
) -> None:
    async with serving(pool) as server, await Bytewise.greeted(server) as peer:
        await peer.send(option(number, b"IHAVEOPT"[: length % 8] + b"x" * (length - length % 8)), option(GO, GO_WEB1))
        kind, _text = await peer.hears_option_reply(number)
        assert kind == UNSUP
        await peer.hears(told(GO))
        await peer.lives_on()


# Options with a payload that they do not take


async def test_list_with_a_payload_is_invalid_and_negotiation_goes_on(pool: Pool) -> None:
    async with serving(pool) as server, await Bytewise.greeted(server) as peer:
        for payload in (b"\0", b"x" * 5000):
            assert await peer.is_refused(LIST, payload) == INVALID
        await peer.send(option(LIST))
        for name in (b"base", b"web1", b"web2"):
            await peer.hears(option_reply(LIST, SERVER, listed(name)))
        await peer.hears(option_reply(LIST, ACK))


async def test_structured_reply_with_a_payload_is_invalid_and_agrees_on_nothing(pool: Pool) -> None:
    async with serving(pool) as server, await Bytewise.greeted(server) as peer:
        for payload in (b"\0", b"x" * 5000):
            assert await peer.is_refused(STRUCTURED_REPLY, payload) == INVALID
        await peer.send(option(GO, GO_WEB1))
        await peer.hears(told(GO))
        await peer.lives_on()


@pytest.mark.parametrize("payload", [b"", b"\0", b"x" * 5000])
async def test_abort_is_acknowledged_with_a_payload_too(pool: Pool, payload: bytes) -> None:
    async with serving(pool) as server, await Bytewise.greeted(server) as peer:
        await peer.send(option(ABORT, payload))
        await peer.hears(option_reply(ABORT, ACK))
        assert await peer.is_closed()


@pytest.mark.parametrize("listener", [0, 1], ids=["tcp", "unix"])
async def test_a_client_that_aborts_may_be_gone_already(
    pool: Pool, tmp_path: Path, caplog: pytest.LogCaptureFixture, listener: int
) -> None:
    caplog.set_level(logging.INFO)
    async with serving(pool, listen=[("127.0.0.1", 0)], sockets=[tmp_path / "nbd.sock"]) as server:
        for _ in range(20):
            peer = await Bytewise.connect(server, listener)
            await peer.send(client_flags(), option(ABORT))
            peer.close()
        await until(lambda: not server._connections)
        assert not caplog.records
        async with await Bytewise.at(server) as peer:
            await peer.lives_on()


# The whole option first, and parsed within itself


async def test_no_option_is_answered_before_all_of_it_has_come(pool: Pool) -> None:
    async with serving(pool) as server, await Bytewise.greeted(server) as peer:
        for number, data in ((LIST, b"x" * 1000), (99, b"x" * 1000), (GO, GO_WEB1)):
            message = option(number, data)
            for part in (message[:15], message[15:16], message[16:-1]):
                await peer.send(part)
                await peer.hears_nothing()
            await peer.send(message[-1:])
            if number == GO:
                await peer.hears(told(GO))
            else:
                await peer.hears_option_reply(number)
        await peer.lives_on()


async def test_an_option_above_64_kib_closes_the_connection_before_it_is_taken(pool: Pool) -> None:
    async with serving(pool) as server, await Bytewise.greeted(server) as peer:
        await peer.send(b"IHAVEOPT" + struct.pack(">II", 99, (64 << 10) + 1))
        assert await peer.is_closed()


@both_infos
async def test_a_name_of_4096_bytes_is_taken_and_a_longer_one_refused(pool: Pool, number: int) -> None:
    async with serving(pool) as server, await Bytewise.greeted(server) as peer:
        assert await peer.is_refused(number, export_request(b"n" * 4096)) == UNKNOWN
        assert await peer.is_refused(number, export_request("ü".encode() * 2048)) == UNKNOWN
        assert await peer.is_refused(number, export_request(b"n" * 4097)) in (INVALID, TOO_BIG)
        assert await peer.is_refused(number, export_request(b"n" * 60_000)) in (INVALID, TOO_BIG)
        await peer.goes()
        await peer.lives_on()


@both_infos
@pytest.mark.parametrize("name", [b"web1\0", b"\0", b"web1\xff", "ü".encode()[:1]])
async def test_a_name_that_is_no_utf8_or_holds_a_nul_is_invalid(pool: Pool, number: int, name: bytes) -> None:
    async with serving(pool) as server, await Bytewise.greeted(server) as peer:
        assert await peer.is_refused(number, export_request(name)) == INVALID
        await peer.goes()
        await peer.lives_on()


LIES = {
    "nothing at all": b"",
    "half a length": b"\0\0",
    "no number of requests": struct.pack(">I4s", 4, b"web1"),
    "half a number of requests": struct.pack(">I4sB", 4, b"web1", 0),
    "a name longer than the option": struct.pack(">I4sH", 6, b"web1", 0),
    "a name that takes the number of requests": struct.pack(">I4sH", 5, b"web1", 0),
    "a name of 4 GiB": struct.pack(">I4sH", 0xFFFFFFFF, b"web1", 0),
    "a name of 2 GiB": struct.pack(">I4sH", 0x80000000, b"web1", 0),
    "a name shorter than it is": struct.pack(">I4sH", 3, b"web1", 0),
    "more requests than there are": struct.pack(">I4sHH", 4, b"web1", 2, 3),
    "65535 requests": struct.pack(">I4sHH", 4, b"web1", 0xFFFF, 3),
    "fewer requests than there are": struct.pack(">I4sHHH", 4, b"web1", 1, 3, 3),
    "half a request": struct.pack(">I4sHB", 4, b"web1", 1, 0),
}


@both_infos
@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
async def test_inner_lengths_that_lie_are_invalid_and_negotiation_goes_on(pool: Pool, number: int, lie: bytes) -> None:
    async with serving(pool) as server, await Bytewise.greeted(server) as peer:
        assert await peer.is_refused(number, lie) == INVALID
        await peer.goes()
        await peer.lives_on()


# EXPORT_NAME


@pytest.mark.parametrize("flags", [FIXED | NO_ZEROES, FIXED, NO_ZEROES, 0])
async def test_export_name_is_answered_with_10_bytes_and_124_zeros_unless_no_zeroes_was_agreed(
    pool: Pool, flags: int
) -> None:
    """Without FIXED too: a client that does not speak fixed newstyle may send EXPORT_NAME alone."""
    async with serving(pool) as server, await Bytewise.greeted(server, flags) as peer:
        await peer.send(option(EXPORT_NAME, b"web1"), request(READ, 0, 512, cookie=7))
        await peer.hears(struct.pack(">QH", BASE_SIZE, CLONE_FLAGS), b"" if flags & NO_ZEROES else bytes(124))
        await peer.hears(simple(7, 0, BASE[:512]))


@pytest.mark.parametrize("name", [b"nobody", b"", b"web1\xff", b"n" * 4097])
async def test_export_name_of_an_unknown_name_closes_without_a_byte(pool: Pool, name: bytes) -> None:
    async with serving(pool) as server, await Bytewise.greeted(server) as peer:
        await peer.send(option(EXPORT_NAME, name))
        assert await peer.is_closed()


@pytest.mark.parametrize("flags", [NO_ZEROES, 0])
@pytest.mark.parametrize("number", [LIST, GO, STRUCTURED_REPLY, 99])
async def test_a_client_without_fixed_newstyle_may_send_nothing_else(pool: Pool, flags: int, number: int) -> None:
    async with serving(pool) as server, await Bytewise.greeted(server, flags) as peer:
        await peer.send(option(number, GO_WEB1 if number == GO else b""))
        assert await peer.is_closed()


async def test_export_name_after_structured_reply_leads_to_structured_replies(pool: Pool) -> None:
    async with serving(pool) as server, await Bytewise.greeted(server) as peer:
        await peer.agrees_on_structured_replies()
        await peer.send(option(EXPORT_NAME, b"web1"))
        await peer.hears(struct.pack(">QH", BASE_SIZE, CLONE_FLAGS | SEND_DF))
        await peer.lives_on()


# GO and INFO


async def test_a_failed_go_leaves_negotiation_usable_for_go(pool: Pool) -> None:
    async with serving(pool) as server, await Bytewise.greeted(server) as peer:
        for name in (b"nobody", b"", b"../web1", b"web1/delta", b"n" * 4096):
            assert await peer.is_refused(GO, export_request(name)) == UNKNOWN
        await peer.send(option(GO, GO_WEB1))
        await peer.hears(told(GO))
        await peer.lives_on()


async def test_a_failed_go_leaves_negotiation_usable_for_every_other_option(pool: Pool) -> None:
    async with serving(pool) as server, await Bytewise.greeted(server) as peer:
        assert await peer.is_refused(GO, export_request(b"nobody")) == UNKNOWN
        await peer.agrees_on_structured_replies()
        assert await peer.is_refused(INFO, export_request(b"nobody")) == UNKNOWN
        await peer.send(option(INFO, GO_WEB1))
        await peer.hears(told(INFO, CLONE_FLAGS | SEND_DF))
        assert await peer.is_refused(GO, export_request(b"nobody")) == UNKNOWN
        await peer.send(option(EXPORT_NAME, b"web1"))
        await peer.hears(struct.pack(">QH", BASE_SIZE, CLONE_FLAGS | SEND_DF))
        await peer.lives_on()


@both_infos
@pytest.mark.parametrize("infos", [(), (0,), (3,), (0, 3), (3, 0), (77, 0xFFFF), (3, 3, 0, 0)], ids=str)
async def test_info_export_is_always_told_once_and_block_sizes_before_it(
    pool: Pool, number: int, infos: tuple[int, ...]
) -> None:
    """In that order: qemu holds the export's size against the block sizes as it comes. 77 and 65535 are unknown."""
    async with serving(pool) as server, await Bytewise.greeted(server) as peer:
        await peer.send(option(number, export_request(b"web1", *infos)))
        await peer.hears(told(number))
        if number == INFO:  # and nothing is open
            await peer.send(option(GO, export_request(b"base", *infos)))
            await peer.hears(told(GO, BASE_FLAGS))
        await peer.lives_on()


async def test_nobody_has_to_ask_for_block_sizes_in_order_to_do_io_of_1_and_of_512_bytes(pool: Pool) -> None:
    """No BLOCK_SIZE_REQD: neither nbd-client nor anybody who says EXPORT_NAME asks for them."""
    async with serving(pool) as server:
        for opening in (option(GO, GO_WEB1), option(EXPORT_NAME, b"web1")):
            async with await Bytewise.greeted(server) as peer:
                await peer.send(opening)
                go = opening[11] == GO
                await peer.hears(told(GO) if go else struct.pack(">QH", BASE_SIZE, CLONE_FLAGS))
                expected = bytearray(BASE[:16384])
                for offset, length in ((512, 512), (3584, 1024), (4095, 1), (4096, 1), (7777, 3), (8191, 4098)):
                    fresh = bytes([offset % 251, 1 + go]) * length
                    expected[offset : offset + length] = fresh[:length]
                    await peer.send(request(WRITE, offset, length, cookie=offset, payload=fresh[:length]))
                    await peer.hears(simple(offset))
                    await peer.send(request(READ, offset - 1, length + 2, cookie=5))
                    await peer.hears(simple(5, 0, bytes(expected[offset - 1 : offset + length + 1])))
                await peer.send(request(READ, BASE_SIZE - 1, 1, cookie=6))
                await peer.hears(simple(6, 0, BASE[-1:]))


# How the answers come


def listen_for_records(path: Path) -> Listener:
    """A Unix socket on which every write of the server is a record of its own, and is received as one."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.bind(str(path))
    sock.listen()
    sock.setblocking(False)
    return Listener(sock, f"nbd+unix:///?socket={path}", path)


async def test_every_option_reply_is_one_write_and_below_4096_bytes(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nbd-client takes what one read() gives for the reply, and its buffers for descriptions hold 1024 bytes."""
    pool.create_clones("base", ["n" * 100, *[f"clone{number}" for number in range(50)]])
    monkeypatch.setattr(accept, "listen_unix", listen_for_records)
    path = tmp_path / "records.sock"
    asked = [
        (LIST, b""),
        (LIST, b"x"),
        (99, b"x" * 5000),
        (GO, export_request("ü".encode() * 2048)),
        (INFO, export_request(b"n" * 100, 0, 1, 2, 3)),
        (STRUCTURED_REPLY, b""),
        (LIST_CONTEXTS, context_request(b"web1")),
        (SET_CONTEXTS, context_request(b"web1", *CONTEXTS)),
        (GO, export_request(b"web1", 0, 1, 2, 3)),
    ]
    async with serving(pool, sockets=[path]):
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.setblocking(False)
            sock.connect(str(path))
            assert await loop.sock_recv(sock, 1 << 16) == greeting()
            sock.send(client_flags())
            for number, data in asked:
                sock.send(option(number, data))
                kind = 0
                while kind != ACK and not kind >> 31:
                    async with asyncio.timeout(10):
                        record = await loop.sock_recv(sock, 1 << 16)
                    about, kind, length = struct.unpack_from(">III", record, 8)
                    assert (about, length) == (number, len(record) - 20)
                    assert len(record) < 4096
                    if kind == SERVER:
                        (name,) = struct.unpack_from(">I", record, 20)
                        assert name < 1024
                        assert len(record) - 24 - name < 1024
                await asyncio.sleep(0)


async def test_a_client_may_send_a_byte_at_a_time_or_everything_at_once(pool: Pool) -> None:
    said = [
        client_flags(),
        option(99, b"what"),
        option(LIST),
        option(GO, export_request(b"nobody")),
        option(INFO, GO_WEB1),
        option(STRUCTURED_REPLY),
        option(SET_CONTEXTS, context_request(b"web1", *CONTEXTS)),
        option(GO, GO_WEB1),
        request(READ, 0, 512, cookie=1),
        request(WRITE, 0, 5, cookie=2, payload=b"bytes"),
        request(BLOCK_STATUS, 0, 4096, cookie=3),
        request(2),
    ]
    heard = []
    async with serving(pool) as server:
        for size in (1 << 20, 1):
            stream = b"".join(said)
            async with await Bytewise.connect(server) as peer:
                for place in range(0, len(stream), size):
                    await peer.send(stream[place : place + size])
                    await asyncio.sleep(0)
                answers = bytearray()
                async with asyncio.timeout(10):
                    while piece := await peer._loop.sock_recv(peer.sock, 1 << 16):
                        answers += piece
                heard.append(bytes(answers))
            pool.remove(["web1"])
            pool.create_clones("base", ["web1"])
    assert heard[0] == heard[1]
    assert BASE[:512] in heard[0]


# Limits


async def test_there_is_a_deadline_of_10_seconds_for_the_whole_handshake(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert connection.HANDSHAKE_DEADLINE_S == 10
    monkeypatch.setattr(connection, "HANDSHAKE_DEADLINE_S", 0.4)

    async def chat(peer: Bytewise) -> None:  # no answer is a new lease of life
        for _ in range(100):
            await peer.send(option(99))
            await peer.hears_option_reply(99)
            await asyncio.sleep(0.02)

    async def dribble(peer: Bytewise) -> None:  # nor is a byte
        for byte in option(99, bytes(84)):
            await peer.send(bytes([byte]))
            await asyncio.sleep(0.02)

    async with (
        serving(pool) as server,
        await Bytewise.connect(server) as silent,
        await Bytewise.greeted(server) as chatting,
        await Bytewise.greeted(server) as dribbling,
    ):
        began = time.monotonic()
        outcomes = await asyncio.gather(chat(chatting), dribble(dribbling), return_exceptions=True)
        assert [isinstance(outcome, (ConnectionError, EOFError)) for outcome in outcomes] == [True, True]
        assert time.monotonic() - began > 0.3
        await silent.hears(greeting())
        assert await silent.is_closed()
        await until(lambda: not server._connections)


async def test_there_is_a_limit_on_the_options_of_a_connection(pool: Pool) -> None:
    async with serving(pool) as server, await Bytewise.greeted(server) as peer:
        answered = 0
        with contextlib.suppress(BrokenPipeError, ConnectionResetError, EOFError):
            while answered < 10_000:
                await peer.send(option(99))
                await peer.hears_option_reply(99)
                answered += 1
        assert 100 < answered < 1000


async def test_there_is_a_limit_on_connections_and_a_place_that_is_left_is_free(pool: Pool) -> None:
    async with serving(
        pool, sockets=[pool.path.parent / "s"], max_connections=3, max_connections_per_address=3
    ) as server:
        peers = [await Bytewise.at(server) for _ in range(3)]
        async with await Bytewise.connect(server) as fourth:
            assert await fourth.is_closed()
        for peer in peers:
            await peer.lives_on()
        peers.pop().close()
        await until(lambda: len(server._connections) == 2)
        peers.append(await Bytewise.at(server))
        await peers[-1].lives_on()
        for peer in peers:
            peer.close()


async def test_there_is_a_limit_on_the_bytes_held_for_a_client_that_asks_and_does_not_listen(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HANDSHAKE_DEADLINE_S", 1.0)
    monkeypatch.setattr(pool, "names", lambda: [f"clone{number}" for number in range(20_000)])
    async with serving(pool) as server, await Bytewise.greeted(server) as peer, await Bytewise.at(server) as other:
        taken, idle = 0, 0
        while idle < 10:
            try:
                taken += peer.sock.send(option(LIST) * 1000)
                idle = 0
            except BlockingIOError:
                idle += 1
                await other.lives_on()
                await asyncio.sleep(SILENCE_S / 5)
        assert taken < 2 * MIB
        await until(lambda: len(server._connections) == 1)
