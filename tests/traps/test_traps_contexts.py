"""What servers get wrong about metadata contexts and block status, each as a test over a real socket."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path

import pytest
from bytewise import CONTEXTS, EINVAL, Bytewise
from serving import make_pool, serving
from wirebytes import (
    ACK,
    BLOCK_STATUS,
    GO,
    INVALID,
    LIST_CONTEXTS,
    NO_HOLE,
    READ,
    REP_CONTEXT,
    REQ_ONE,
    SET_CONTEXTS,
    TOO_BIG,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    context,
    context_request,
    export_request,
    option,
    option_reply,
)

from nbdclone.store.pool import Pool

# Selecting them


CONTEXT_LIES = {
    "nothing at all": b"",
    "no number of queries": struct.pack(">I4s", 4, b"web1"),
    "a name longer than the option": struct.pack(">I4sI", 9, b"web1", 0),
    "a name of 4 GiB": struct.pack(">I4sI", 0xFFFFFFFF, b"web1", 0),
    "a query that is not there": struct.pack(">I4sI", 4, b"web1", 1),
    "a query longer than the option": struct.pack(">I4sII5s", 4, b"web1", 1, 6, b"base:"),
    "a query of 4 GiB": struct.pack(">I4sII5s", 4, b"web1", 1, 0xFFFFFFFF, b"base:"),
    "a query shorter than it is": struct.pack(">I4sII5s", 4, b"web1", 1, 4, b"base:"),
    "fewer queries than there are": context_request(b"web1", b"base:", b"base:").replace(
        struct.pack(">I", 2), struct.pack(">I", 1), 1
    ),
    "a byte behind the last": context_request(b"web1", b"base:") + b"\0",
}


@pytest.mark.parametrize("number", [SET_CONTEXTS, LIST_CONTEXTS], ids=["set", "list"])
@pytest.mark.parametrize("lie", CONTEXT_LIES.values(), ids=CONTEXT_LIES.keys())
async def test_inner_lengths_of_a_question_for_contexts_that_lie_are_invalid_and_negotiation_goes_on(
    pool: Pool, number: int, lie: bytes
) -> None:
    async with serving(pool) as server, await Bytewise.greeted(server) as peer:
        await peer.agrees_on_structured_replies()
        assert await peer.is_refused(number, lie) == INVALID
        await peer.goes()
        await peer.lives_on()


async def test_contexts_before_structured_reply_are_invalid(pool: Pool) -> None:
    async with serving(pool) as server, await Bytewise.greeted(server) as peer:
        for number in (SET_CONTEXTS, LIST_CONTEXTS):
            assert await peer.is_refused(number, context_request(b"web1", b"base:allocation")) == INVALID
        await peer.agrees_on_structured_replies()
        assert await peer.selects(b"base:allocation") == [context(1, b"base:allocation")]
        await peer.goes()
        assert (await peer.does(BLOCK_STATUS, 0, 512)).extents == {1: [(512, 0)]}


async def test_a_second_set_replaces_what_the_first_selected(pool: Pool) -> None:
    async with serving(pool) as server, await Bytewise.greeted(server) as peer:
        await peer.agrees_on_structured_replies()
        assert len(await peer.selects(*CONTEXTS)) == 3
        [depth] = await peer.selects(b"qemu:allocation-depth")
        assert depth[4:] == b"qemu:allocation-depth"
        await peer.goes()
        assert (await peer.does(BLOCK_STATUS, 0, 512)).extents == {struct.unpack_from(">I", depth)[0]: [(512, 2)]}


FAILED_SETS = {
    "nothing": b"",
    "a query that lies": struct.pack(">I4sII5s", 4, b"web1", 1, 6, b"base:"),
    "a query without a colon": context_request(b"web1", b"base:allocation", b"base"),
    "too many queries": context_request(b"web1", *[b"x-%d:y" % number for number in range(1000)]),
}


@pytest.mark.parametrize("failing", FAILED_SETS.values(), ids=FAILED_SETS.keys())
async def test_a_failed_set_clears_what_was_set(pool: Pool, failing: bytes) -> None:
    async with serving(pool) as server, await Bytewise.greeted(server) as peer:
        await peer.agrees_on_structured_replies()
        await peer.selects(*CONTEXTS)
        assert await peer.is_refused(SET_CONTEXTS, failing) in (INVALID, TOO_BIG)
        await peer.goes()
        assert (await peer.does(BLOCK_STATUS, 0, 512)).error == EINVAL
        await peer.lives_on()


async def test_a_set_without_queries_clears_what_was_set(pool: Pool) -> None:
    async with serving(pool) as server, await Bytewise.greeted(server) as peer:
        await peer.agrees_on_structured_replies()
        await peer.selects(*CONTEXTS)
        assert await peer.selects() == []
        await peer.goes()
        assert (await peer.does(BLOCK_STATUS, 0, 512)).error == EINVAL
        await peer.lives_on()


@pytest.mark.parametrize("other", ["web2", "base"])
async def test_what_was_set_for_one_export_is_not_there_in_another(pool: Pool, other: str) -> None:
    async with serving(pool) as server:
        async with await Bytewise.greeted(server) as peer:
            await peer.agrees_on_structured_replies()
            await peer.selects(*CONTEXTS, export=other)
            await peer.goes("web1")
            assert (await peer.does(BLOCK_STATUS, 0, 512)).error == EINVAL
            await peer.lives_on()
        async with await Bytewise.greeted(server) as peer:  # a failed GO in between takes nothing away
            await peer.agrees_on_structured_replies()
            await peer.selects(CONTEXTS[0])
            await peer.is_refused(GO, export_request(b"nobody"))
            await peer.goes("web1")
            assert (await peer.does(BLOCK_STATUS, 0, 512)).extents == {1: [(512, 0)]}


async def test_no_context_is_told_twice(pool: Pool) -> None:
    async with serving(pool) as server, await Bytewise.greeted(server) as peer:
        await peer.agrees_on_structured_replies()
        told_twice = [b"base:allocation", b"qemu:allocation-depth", b"base:allocation", b"base:allocation"]
        chosen = await peer.selects(*told_twice)
        assert sorted(name[4:] for name in chosen) == [b"base:allocation", b"qemu:allocation-depth"]
        assert len({name[:4] for name in chosen}) == 2
        await peer.send(option(LIST_CONTEXTS, context_request(b"web1", b"base:", b"base:allocation", b"base:")))
        assert (await peer.hears_option_reply(LIST_CONTEXTS))[0] == REP_CONTEXT
        await peer.hears(option_reply(LIST_CONTEXTS, ACK))
        await peer.goes()
        assert set((await peer.does(BLOCK_STATUS, 0, 512)).extents or {}) == {1, 2}


FOREIGN = [b"x-strange:thing", b"qemu:dirty-bitmap:b0", b"nbd-server:what", "ü:ü".encode(), b"base:nothing", b"qemu:"]


async def test_namespaces_that_are_not_ours_are_ignored(pool: Pool) -> None:
    async with serving(pool) as server, await Bytewise.greeted(server) as peer:
        await peer.agrees_on_structured_replies()
        assert await peer.selects(*FOREIGN) == []
        assert await peer.selects(*FOREIGN[:3], b"base:allocation", *FOREIGN[3:]) == [context(1, b"base:allocation")]
        await peer.send(option(LIST_CONTEXTS, context_request(b"web1", *FOREIGN[:5])))
        await peer.hears(option_reply(LIST_CONTEXTS, ACK))
        await peer.goes()
        assert (await peer.does(BLOCK_STATUS, 0, 512)).extents == {1: [(512, 0)]}


async def test_base_and_a_colon_is_a_wildcard_in_list_alone(pool: Pool) -> None:
    async with serving(pool) as server, await Bytewise.greeted(server) as peer:
        await peer.agrees_on_structured_replies()
        await peer.send(option(LIST_CONTEXTS, context_request(b"web1", b"base:")))
        kind, data = await peer.hears_option_reply(LIST_CONTEXTS)
        assert (kind, data[4:]) == (REP_CONTEXT, b"base:allocation")
        await peer.hears(option_reply(LIST_CONTEXTS, ACK))
        assert await peer.selects(b"base:") == []
        await peer.goes()
        assert (await peer.does(BLOCK_STATUS, 0, 512)).error == EINVAL


# Block status

KIB = 1 << 10
IMAGE = b"d" * (64 * KIB) + bytes(64 * KIB) + b"d" * (128 * KIB)
SIZE = 512 * KIB  # the clone is twice as long as its base
HOLE_AND_ZERO = 3


@pytest.fixture
def sparse(tmp_path: Path) -> Pool:
    return make_pool(tmp_path, IMAGE, "web1", size=SIZE)


@pytest.mark.parametrize("count", [1, 2, 3])
async def test_block_status_is_a_chunk_for_each_context_that_was_selected(sparse: Pool, count: int) -> None:
    async with serving(sparse) as server, await Bytewise.at(server, structured=True, contexts=count) as peer:
        reply = await peer.does(BLOCK_STATUS, 0, SIZE)
        assert reply.extents is not None
        assert (reply.chunks, sorted(reply.extents)) == (count, list(range(1, count + 1)))
        await peer.lives_on(IMAGE[:512])


@pytest.mark.parametrize("flags", [0, REQ_ONE])
async def test_no_extent_but_the_last_passes_the_end_of_the_request_and_none_is_empty(sparse: Pool, flags: int) -> None:
    async with serving(sparse) as server, await Bytewise.at(server, structured=True, contexts=3) as peer:
        for offset, length in (
            (0, SIZE),
            (0, 1),
            (1, SIZE - 1),
            (64 * KIB - 1, 2),
            (64 * KIB, 64 * KIB),
            (SIZE - 1, 1),
        ):
            reply = await peer.does(BLOCK_STATUS, offset, length, flags=flags)
            for extents in (reply.extents or {}).values():
                lengths = [length for length, _state in extents]
                assert all(lengths)
                assert sum(lengths[:-1]) < length


async def test_block_status_for_one_extent_is_clamped_to_the_request(sparse: Pool) -> None:
    async with serving(sparse) as server, await Bytewise.at(server, structured=True, contexts=3) as peer:
        for length in (1, 512, 4095, 4097, 64 * KIB - 1):
            reply = await peer.does(BLOCK_STATUS, 0, length, flags=REQ_ONE)
            assert reply.extents == {1: [(length, 0)], 2: [(length, 2)], 3: [(length, 1)]}
        reply = await peer.does(BLOCK_STATUS, 1000, SIZE - 1000, flags=REQ_ONE)
        assert reply.extents == {1: [(64 * KIB - 1000, 0)], 2: [(256 * KIB - 1000, 2)], 3: [(256 * KIB - 1000, 1)]}


async def test_extents_of_one_status_that_are_neighbours_are_merged(sparse: Pool) -> None:
    async with serving(sparse) as server, await Bytewise.at(server, structured=True, contexts=3) as peer:
        for block in range(7, -1, -1):  # one by one, backwards, over base and beyond
            await peer.does(WRITE, 252 * KIB + block * 4 * KIB, payload=b"w" * 4096)
        for flags in (0, REQ_ONE):
            reply = await peer.does(BLOCK_STATUS, 252 * KIB, 32 * KIB, flags=flags)
            assert reply.extents == {1: [(32 * KIB, 0)], 2: [(32 * KIB, 1)], 3: [(32 * KIB, 2)]}
        reply = await peer.does(BLOCK_STATUS, 0, SIZE)
        for extents in (reply.extents or {}).values():
            states = [state for _length, state in extents]
            assert all(one != other for one, other in itertools.pairwise(states))


@pytest.mark.parametrize("flags", [0, REQ_ONE])
async def test_block_status_of_length_0_is_einval(sparse: Pool, flags: int) -> None:
    async with serving(sparse) as server, await Bytewise.at(server, structured=True, contexts=1) as peer:
        for offset in (0, 4096, SIZE):
            assert (await peer.does(BLOCK_STATUS, offset, 0, flags=flags)).error == EINVAL
        await peer.lives_on(IMAGE[:512])


async def test_data_that_live_in_a_base_are_data(sparse: Pool) -> None:
    """A client that copies the disk skips whatever is not 0 in base:allocation."""
    async with serving(sparse) as server, await Bytewise.at(server, structured=True, contexts=1) as peer:
        reply = await peer.does(BLOCK_STATUS, 0, SIZE)
        assert reply.extents == {
            1: [(64 * KIB, 0), (64 * KIB, HOLE_AND_ZERO), (128 * KIB, 0), (256 * KIB, HOLE_AND_ZERO)]
        }


async def test_what_is_said_to_be_zero_reads_as_zeros(sparse: Pool) -> None:
    async with serving(sparse) as server, await Bytewise.at(server, structured=True, contexts=1) as peer:
        await peer.does(WRITE, 100 * KIB, payload=b"w" * 5000)
        await peer.does(TRIM, 10 * KIB, 30 * KIB)
        await peer.does(WRITE_ZEROES, 200 * KIB, 20 * KIB)
        await peer.does(WRITE_ZEROES, 300 * KIB, 20 * KIB, flags=NO_HOLE)
        content = (await peer.does(READ, 0, SIZE)).data
        [extents] = ((await peer.does(BLOCK_STATUS, 0, SIZE)).extents or {}).values()
        assert sum(length for length, _state in extents) == SIZE
        holes = 0
        for length, state in extents:
            part, content = content[:length], content[length:]
            assert state in (0, HOLE_AND_ZERO)
            assert state == 0 or not any(part)
            holes += length if state else 0
        assert holes > 256 * KIB


async def test_the_depth_is_1_for_the_own_delta_2_for_the_base_and_0_for_nowhere(sparse: Pool) -> None:
    async with serving(sparse) as server:
        async with await Bytewise.at(server, structured=True, contexts=2) as peer:
            await peer.does(WRITE, 8 * KIB, payload=b"w" * 4096)
            await peer.does(TRIM, 32 * KIB, 4096)  # what was trimmed is the clone's own, too
            reply = await peer.does(BLOCK_STATUS, 0, SIZE)
            assert (reply.extents or {})[2] == [
                *[(8 * KIB, 2), (4 * KIB, 1), (20 * KIB, 2), (4 * KIB, 1), (220 * KIB, 2), (256 * KIB, 0)]
            ]
        async with await Bytewise.at(server, "base", structured=True, contexts=2) as peer:
            assert ((await peer.does(BLOCK_STATUS, 0, 256 * KIB)).extents or {})[2] == [(256 * KIB, 1)]


async def test_block_status_of_4_gib_less_1_is_one_question(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, IMAGE, "web1", size=8 << 30)
    longest = (1 << 32) - 1
    async with serving(pool) as server, await Bytewise.at(server, structured=True, contexts=3) as peer:
        for flags in (0, REQ_ONE):
            reply = await peer.does(BLOCK_STATUS, 256 * KIB, longest, flags=flags)
            assert reply.extents == {1: [(longest, HOLE_AND_ZERO)], 2: [(longest, 0)], 3: [(longest, 0)]}
        reply = await peer.does(BLOCK_STATUS, 0, longest)
        assert (reply.extents or {})[2] == [(256 * KIB, 2), (longest - 256 * KIB, 0)]
