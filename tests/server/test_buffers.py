"""Buffers come from the pool, go back to it, and do not pile up there."""

from __future__ import annotations

import ctypes

import pytest

from nbdclone.server.buffers import MAX_IDLE, MIN_BUFFER, PAGE, BufferPool


@pytest.mark.parametrize(
    ("size", "given"),
    [(1, MIN_BUFFER), (MIN_BUFFER, MIN_BUFFER), (MIN_BUFFER + 1, 2 * MIN_BUFFER), (5 << 20, 8 << 20)],
)
def test_a_buffer_has_room_for_what_was_asked(size: int, given: int) -> None:
    assert len(BufferPool().take(size)) == given


def test_buffers_begin_on_a_page() -> None:
    buffer = BufferPool().take(1)
    assert ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % PAGE == 0


def test_a_buffer_that_was_given_back_is_taken_again() -> None:
    pool = BufferPool()
    buffer = pool.take(100_000)
    pool.give(buffer)
    assert pool.take(1) is not buffer
    assert pool.take(70_000) is buffer
    assert pool.take(70_000) is not buffer


def test_what_waits_for_its_next_use_is_bounded() -> None:
    pool = BufferPool()
    for buffer in [pool.take(1 << 20) for _ in range(2 * MAX_IDLE >> 20)]:
        pool.give(buffer)
    assert sum(len(buffer) for waiting in pool._idle.values() for buffer in waiting) == MAX_IDLE
    pool.give(pool.take(64 << 20))
    assert sum(len(buffer) for waiting in pool._idle.values() for buffer in waiting) == MAX_IDLE
