"""The memory of all connections together: nobody is kept from going on, and nobody keeps it for ever."""

from __future__ import annotations

import asyncio
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import until

from nbdclone.server import budget as module
from nbdclone.server.budget import Account, Budget

LIMIT = 1000


class Greedy:
    """A connection that wants ``wanted`` bytes at a time, so often, and keeps what it gets until it is told."""

    def __init__(self, budget: Budget, wanted: int = 0, times: int = 1) -> None:
        self.label = f"greedy {wanted}"
        self.account: Account = budget.open(self)
        self.wanted = [wanted] * times if wanted else []
        self.since: float | None = None
        self.ended = False
        self.resume()

    def resume(self) -> None:
        while self.wanted and self.account.allows(self.wanted[0]):
            self.account.take(self.wanted.pop(0))

    def stalled_since(self) -> float | None:
        return self.since

    def abandon(self) -> None:
        self.ended = True
        self.account.close()


@pytest.fixture
async def budget() -> Budget:
    return Budget(LIMIT, asyncio.get_running_loop())


async def test_while_there_is_memory_one_may_have_all_of_it(budget: Budget) -> None:
    others = [Greedy(budget) for _ in range(10)]
    hog = Greedy(budget, 100, 10)
    assert (hog.account.held, budget.used) == (LIMIT, LIMIT)
    assert not any(other.account.held for other in others)


async def test_a_share_is_there_for_each_whatever_the_others_hold(budget: Budget) -> None:
    Greedy(budget, 100, 10)
    late = Greedy(budget, 250, 3)
    assert late.account.held == 500  # half of the budget, of the two
    assert budget.used == 1500


async def test_who_waits_goes_on_when_memory_comes_back(budget: Budget) -> None:
    hog = Greedy(budget, LIMIT)
    late = Greedy(budget, 600)
    assert late.account.held == 0
    hog.account.give(599)
    await asyncio.sleep(0)
    assert late.account.held == 0
    hog.account.give(1)
    await until(lambda: late.account.held == 600)
    assert budget.used == LIMIT


async def test_first_come_is_first_served_and_a_small_wish_does_not_overtake_a_large_one(budget: Budget) -> None:
    hog = Greedy(budget, LIMIT)
    large, small = Greedy(budget, 900), Greedy(budget, 400)
    hog.account.give(500)
    await asyncio.sleep(0.01)
    assert (large.account.held, small.account.held) == (0, 0)
    hog.account.give(400)
    await until(lambda: large.account.held == 900)
    assert small.account.held == 0
    large.account.give(900)
    await until(lambda: small.account.held == 400)


async def test_one_request_each_then_the_next_in_the_row(budget: Budget) -> None:
    _others = [Greedy(budget) for _ in range(9)]  # which make the shares small
    hog = Greedy(budget, LIMIT)
    first, second = Greedy(budget, 400, 2), Greedy(budget, 400)
    hog.account.give(800)
    await until(lambda: (first.account.held, second.account.held) == (400, 400))
    hog.account.give(200)
    second.account.give(200)
    await until(lambda: first.account.held == 800)


async def test_those_who_keep_nothing_wake_each_other(budget: Budget) -> None:
    """What is answered at once holds no memory: none comes back that could wake who asks a second time."""

    class Quick(Greedy):
        def resume(self) -> None:
            while self.wanted and self.account.allows(self.wanted[0]):
                self.wanted.pop(0)

    _others = [Greedy(budget) for _ in range(9)]
    hog = Greedy(budget, LIMIT)
    quick = [Quick(budget, 200, 3) for _ in range(3)]
    hog.account.give(LIMIT)
    await until(lambda: not any(one.wanted for one in quick))
    assert budget.used == 0


async def test_a_connection_that_ends_gives_everything_back(budget: Budget) -> None:
    hog = Greedy(budget, 100, 10)
    late = Greedy(budget, 900)
    hog.abandon()
    await until(lambda: late.account.held == 900)
    assert budget.used == 900


async def test_who_waits_and_ends_is_not_waited_for(budget: Budget) -> None:
    hog = Greedy(budget, LIMIT)
    gone, late = Greedy(budget, 900), Greedy(budget, 900)
    gone.abandon()
    hog.account.give(LIMIT)
    await until(lambda: late.account.held == 900)


async def test_the_shares_of_those_who_stay_grow_when_others_end(budget: Budget) -> None:
    others = [Greedy(budget) for _ in range(9)]
    Greedy(budget, LIMIT)
    late = Greedy(budget, 150)
    for other in others:
        assert late.account.held == 0
        other.abandon()
    await until(lambda: late.account.held == 150)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STALL_S", 0.05)
    monkeypatch.setattr(module, "CHECK_INTERVAL_S", 0.01)


async def test_a_peer_that_moves_nothing_loses_its_connection_while_others_wait(
    budget: Budget, hasty: None, caplog: pytest.LogCaptureFixture
) -> None:
    stalled, moving, small = Greedy(budget, 450), Greedy(budget, 450), Greedy(budget, 100)
    now = asyncio.get_running_loop().time()
    stalled.since = small.since = now - 1
    moving.since = now + 3600
    with caplog.at_level(logging.WARNING):
        late = Greedy(budget, 400)
        await until(lambda: late.account.held == 400)
    assert stalled.ended
    assert not moving.ended
    assert not small.ended
    assert [record.getMessage() for record in caplog.records] == [
        "greedy 450: ended: it left 450 bytes unmoved for 0 s while others waited for memory"
    ]


async def test_many_that_move_nothing_within_their_shares_keep_nobody_waiting_for_ever(
    budget: Budget, hasty: None
) -> None:
    now = asyncio.get_running_loop().time()
    small = [Greedy(budget, size) for size in (90, 80, 85, 70, 90, 90, 90, 90, 90, 90)]
    for one in small[:4]:
        one.since = now - 1
    late = Greedy(budget, 380)
    late_too = Greedy(budget, 300)
    await until(lambda: late.account.held == 380)
    assert [one.ended for one in small] == [True, True, True, False] + [False] * 6  # the largest, and no more
    assert not late_too.account.held


async def test_while_nobody_waits_a_peer_may_take_its_time(budget: Budget, hasty: None) -> None:
    stalled = Greedy(budget, LIMIT)
    stalled.since = asyncio.get_running_loop().time() - 3600
    Greedy(budget, 100)  # within its share
    await asyncio.sleep(0.1)
    assert not stalled.ended


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(1, 400), st.booleans()), max_size=60))
def test_all_together_never_hold_more_than_twice_the_limit(steps: list[tuple[int, int, bool]]) -> None:
    async def run() -> None:
        budget = Budget(LIMIT, asyncio.get_running_loop())
        greedy = [Greedy(budget) for _ in range(8)]
        for who, size, gives in steps:
            chosen = greedy[who]
            if gives:
                chosen.account.give(chosen.account.held)
                await asyncio.sleep(0)
            elif not chosen.wanted:
                chosen.wanted = [size]
                chosen.resume()
            assert budget.used == sum(one.account.held for one in greedy) <= 2 * LIMIT
            waiting = [one for one in greedy if one.wanted]
            if budget.used == 0:
                assert not waiting
        for one in greedy:
            one.account.close()
        await asyncio.sleep(0)
        assert budget.used == 0

    asyncio.run(run())
