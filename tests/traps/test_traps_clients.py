"""What the two clients that matter most do with a server, byte by byte: the kernel's nbd with nbd-client, and qemu."""

from __future__ import annotations

import asyncio
import random
import struct
from pathlib import Path

from bytewise import CLONE_FLAGS, CONTEXTS, SEND_DF, Bytewise
from serving import BASE, BASE_SIZE, MIB, make_pool, serving
from wirebytes import (
    ABORT,
    ACK,
    BLOCK_STATUS,
    DISC,
    FLUSH,
    FUA,
    GO,
    INFO,
    LIST,
    READ,
    REP_CONTEXT,
    REP_INFO,
    REQ_ONE,
    SERVER,
    SET_CONTEXTS,
    STRUCTURED_REPLY,
    TRIM,
    WRITE,
    client_flags,
    context,
    context_request,
    export_request,
    greeting,
    info_block_size,
    info_export,
    listed,
    option,
    option_reply,
    request,
)

from nbdclone.store.pool import Pool

# Linux sends requests of at most 128 KiB unless it is told otherwise, and has as many of them in flight.
KERNEL_REQUEST = 128 << 10
KERNEL_DEPTH = 128
KERNEL_TRIM = (1 << 32) - 512
# qemu has 16 requests in flight, of 32 MiB at the most.
QEMU_DEPTH = 16
QEMU_REQUEST = 32 * MIB


# Linux


async def test_nbd_client_lists_exports(pool: Pool) -> None:
    async with serving(pool) as server, await Bytewise.greeted(server) as peer:
        await peer.send(option(LIST))
        for name in (b"base", b"web1", b"web2"):
            await peer.hears(option_reply(LIST, SERVER, listed(name)))
        await peer.hears(option_reply(LIST, ACK))
        await peer.send(option(ABORT))
        await peer.hears(option_reply(ABORT, ACK))
        assert await peer.is_closed()


async def test_the_kernel_finds_the_flags_that_it_makes_use_of(pool: Pool) -> None:
    """FLUSH, or it is write-through; FUA with it, or each FUA is a flush; TRIM for discard; MULTI_CONN for -C."""
    async with serving(pool) as server, await Bytewise.at(server) as peer:
        assert peer.flags & 1  # HAS_FLAGS
        for flag in (4, 8, 0x20, 0x100):
            assert peer.flags & flag
        assert not peer.flags & 2  # READ_ONLY
        assert peer.size % 4096 == 0
        async with await Bytewise.at(server, "base") as base:
            assert base.flags & 4
            assert base.flags & 0x100
            assert base.flags & 2


async def test_the_kernel_has_128_requests_of_128_kib_in_flight_on_each_of_four_connections(tmp_path: Path) -> None:
    """Simple replies in whatever order, and a flush on one connection. What was written is read on the others."""
    size = 4 * KERNEL_DEPTH * KERNEL_REQUEST
    pool = make_pool(tmp_path, BASE, "web1", size=size)
    content = random.Random("kernel").randbytes(KERNEL_REQUEST + 4 * KERNEL_DEPTH)
    async with serving(pool, listen=[("127.0.0.1", 0)]) as server:
        peers = [await Bytewise.at(server) for _ in range(4)]

        def data(number: int) -> bytes:
            return content[number : number + KERNEL_REQUEST]

        async def writes(peer: Bytewise, first: int) -> None:
            async def sends() -> None:
                for n in range(first, first + KERNEL_DEPTH):
                    flags = FUA if n % 32 == 7 else 0
                    await peer.send(peer.asks(WRITE, n * KERNEL_REQUEST, cookie=n << 32, flags=flags, payload=data(n)))

            _, replies = await asyncio.gather(sends(), peer.hears_replies(KERNEL_DEPTH))
            assert not any(reply.error for reply in replies.values())

        async def reads(peer: Bytewise, first: int) -> None:
            numbers = range(first, first + KERNEL_DEPTH)
            await peer.send(*[peer.asks(READ, n * KERNEL_REQUEST, KERNEL_REQUEST, cookie=n << 32) for n in numbers])
            replies = await peer.hears_replies(KERNEL_DEPTH)
            wrong = [n for n in numbers if replies[n << 32].data != data(n)]
            assert not wrong

        await asyncio.gather(*[writes(peer, n * KERNEL_DEPTH) for n, peer in enumerate(peers)])
        assert (await peers[0].does(FLUSH)).error == 0
        await asyncio.gather(*[reads(peer, (n + 1) % 4 * KERNEL_DEPTH) for n, peer in enumerate(peers)])
        for peer in peers:
            await peer.send(request(DISC))
            assert await peer.is_closed()
            peer.close()


async def test_the_kernel_discards_as_much_at_once_as_the_field_holds(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, BASE, "web1", size=8 << 30)
    async with serving(pool) as server, await Bytewise.at(server) as peer:
        for offset in (0, KERNEL_TRIM):
            assert (await peer.does(TRIM, offset, KERNEL_TRIM)).error == 0
        assert (await peer.does(READ, 0, BASE_SIZE)).data == bytes(BASE_SIZE)


async def test_a_device_that_is_given_a_fresh_socket_goes_on_where_it_was(tmp_path: Path) -> None:
    """NBD_CMD_RECONFIGURE, as qemu's reconnect-delay: a new handshake, and what was not answered is asked again."""
    pool = make_pool(tmp_path, BASE, "web1")
    for life in range(3):
        async with serving(pool) as server:
            peer = await Bytewise.at(server)
            if life:
                assert (await peer.does(READ, 0, 4096)).data == b"%d" % (life - 1) * 4096
                await peer.send(peer.asks(WRITE, 8192, payload=b"asked again", cookie=2))
                assert (await peer.hears_reply()).error == 0
            assert (await peer.does(WRITE, 0, payload=b"%d" % life * 4096)).error == 0
            await peer.send(request(WRITE, 8192, 11, cookie=2)[:-3])  # cut off in the middle
            await server.__aexit__(None, None, None)
            assert await peer.is_closed()
            peer.close()


# qemu


async def test_qemu_opens_an_export_and_is_told_all_that_it_checks(pool: Pool) -> None:
    flags = CLONE_FLAGS | SEND_DF
    async with serving(pool) as server, await Bytewise.connect(server) as peer:
        await peer.hears(greeting())
        await peer.send(client_flags(), option(STRUCTURED_REPLY))
        await peer.hears(option_reply(STRUCTURED_REPLY, ACK))
        await peer.send(option(SET_CONTEXTS, context_request(b"web1", b"base:allocation", b"qemu:allocation-depth")))
        for number, name in enumerate(CONTEXTS[:2], start=1):
            await peer.hears(option_reply(SET_CONTEXTS, REP_CONTEXT, context(number, name)))
        await peer.hears(option_reply(SET_CONTEXTS, ACK))
        for number in (INFO, GO):
            await peer.send(option(number, export_request(b"web1", 3)))
            await peer.hears(option_reply(number, REP_INFO, info_block_size(1, 4096, QEMU_REQUEST)))
            await peer.hears(option_reply(number, REP_INFO, info_export(BASE_SIZE, flags)))
            await peer.hears(option_reply(number, ACK))
        await peer.send(request(BLOCK_STATUS, 0, BASE_SIZE, flags=REQ_ONE, cookie=5))
        for number, (done, state) in enumerate(((0, 0), (1, 2)), start=1):
            await peer.hears(struct.pack(">IHHQIIII", 0x668E33EF, done, 5, 5, 12, number, BASE_SIZE, state))


async def test_qemu_has_16_requests_of_up_to_32_mib_in_flight(tmp_path: Path) -> None:
    """Over half a gibibyte of holes behind a small base, but for what is written here."""
    pool = make_pool(tmp_path, BASE, "web1", size=QEMU_DEPTH * QEMU_REQUEST)
    payload = random.Random("qemu").randbytes(QEMU_REQUEST)
    async with serving(pool) as server, await Bytewise.at(server, structured=True) as peer:
        assert (await peer.does(WRITE, 4 * QEMU_REQUEST, payload=payload)).error == 0
        lengths = [QEMU_REQUEST if n % 4 == 0 else 2 * MIB for n in range(QEMU_DEPTH)]
        await peer.send(*[peer.asks(READ, n * QEMU_REQUEST, length, cookie=n) for n, length in enumerate(lengths)])
        expected = {0: BASE.ljust(QEMU_REQUEST, b"\0"), 4: payload}
        for _ in lengths:
            reply = await peer.hears_reply()
            assert not reply.error
            right = reply.data == expected.get(reply.cookie, bytes(lengths[reply.cookie]))
            assert right


async def test_qemu_walks_a_disk_by_block_status_of_one_extent_at_a_time(tmp_path: Path) -> None:
    image = b"d" * 65536 + bytes(65536) + b"d" * 65536
    size = MIB
    pool = make_pool(tmp_path, image, "web1", size=size)
    async with serving(pool) as server, await Bytewise.at(server, structured=True, contexts=2) as peer:
        await peer.does(WRITE, 500_000, payload=b"w" * 100)
        await peer.does(TRIM, 0, 4096)
        position, copied, steps = 0, bytearray(size), 0
        while position < size:
            reply = await peer.does(BLOCK_STATUS, position, size - position, flags=REQ_ONE)
            assert reply.extents is not None
            [(length, state)], [(depth_length, depth)] = reply.extents[1], reply.extents[2]
            assert 0 < length <= size - position
            assert 0 < depth_length <= size - position
            assert depth in (0, 1, 2)
            if not state:
                copied[position : position + length] = (await peer.does(READ, position, length)).data
            position += length
            steps += 1
        assert steps < 10
        assert (await peer.does(READ, 0, size)).data == copied
