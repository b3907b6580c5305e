"""Staying awake for the next request: when it is done, and when not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nbdclone.server import busy
from nbdclone.server.busy import DEFAULT_LIMIT_US, MAX_MISSES, PAUSE, Busy

MICROSECOND = 1e-6


class Loop:
    """A loop that is run by hand, and a clock."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.calls: list[Callable[[], None]] = []

    def call_soon(self, call: Callable[[], None]) -> None:
        self.calls.append(call)

    def go_round(self, microseconds: float) -> bool:
        """Run what is to be run, some time later. Was there something?"""
        self.now += microseconds * MICROSECOND
        calls, self.calls = self.calls, []
        for call in calls:
            call()
        return bool(calls)


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Loop:
    loop = Loop()
    monkeypatch.setattr(busy, "monotonic", lambda: loop.now)
    return loop


def make(loop: Any, limit_us: int = DEFAULT_LIMIT_US) -> Busy:
    return Busy(loop, limit_us)


def request(it: Busy, loop: Loop, *, after_us: float) -> None:
    """One comes so long after the last reply, and is answered."""
    loop.now += after_us * MICROSECOND
    it.received()
    it.sent()


def test_requests_that_come_soon_after_replies_keep_it_awake(loop: Loop) -> None:
    it = make(loop)
    request(it, loop, after_us=0)
    assert not loop.calls, "one alone says nothing"
    for _ in range(10):
        request(it, loop, after_us=20)
        assert len(loop.calls) == 1
        assert loop.go_round(10)


def test_it_is_awake_for_so_long_and_then_sleeps(loop: Loop) -> None:
    it = make(loop)
    request(it, loop, after_us=0)
    request(it, loop, after_us=90)
    assert [loop.go_round(20) for _ in range(5)] == [True, True, True, False, False]


def test_requests_that_come_late_let_it_sleep(loop: Loop) -> None:
    it = make(loop)
    for _ in range(10):
        request(it, loop, after_us=150)
        assert not loop.go_round(0)


def test_what_is_in_vain_is_not_done_for_a_while(loop: Loop) -> None:
    it = make(loop)
    request(it, loop, after_us=0)
    moments = 0
    for _ in range(PAUSE // 2):
        request(it, loop, after_us=80)  # soon, but never within the moment
        moments += bool(loop.calls)
        while loop.go_round(5):
            pass
    assert moments == MAX_MISSES
    for _ in range(PAUSE):
        request(it, loop, after_us=10)
    assert loop.calls, "another attempt"


def test_a_miss_among_many_that_were_right_changes_nothing(loop: Loop) -> None:
    it = make(loop)
    for _ in range(20 * MAX_MISSES):
        for _ in range(3):
            request(it, loop, after_us=20)
            loop.go_round(0)
        while loop.go_round(5):
            pass
    request(it, loop, after_us=20)
    assert loop.calls


def test_a_limit_of_0_never_does_it(loop: Loop) -> None:
    it = make(loop, 0)
    for _ in range(10):
        request(it, loop, after_us=10)
        assert not loop.calls


def test_several_replies_to_one_request_are_one_moment(loop: Loop) -> None:
    it = make(loop)
    request(it, loop, after_us=0)
    request(it, loop, after_us=10)
    loop.now += 40 * MICROSECOND
    it.sent()
    assert len(loop.calls) == 1
    assert loop.go_round(20), "the moment is that after the last of them"
