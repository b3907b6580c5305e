"""What servers get wrong about metadata contexts and block status, each as a test over a real socket."""

from __future__ import annotations

import struct

import pytest
from bytewise import CONTEXTS, EINVAL, Bytewise
from serving import serving
from wirebytes import (
    ACK,
    BLOCK_STATUS,
    GO,
    INVALID,
    LIST_CONTEXTS,
    REP_CONTEXT,
    SET_CONTEXTS,
    TOO_BIG,
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
