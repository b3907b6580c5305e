"""Limits of an export: what a meter lets through, and how connections wait for it."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path

import pytest
from serving import BASE, Peer, serving, until

from nbdclone.errors import UsageError
from nbdclone.protocol.wire import CMD_FLUSH, CMD_READ, CMD_WRITE, Mode
from nbdclone.server.host import Options
from nbdclone.server.limits import BURST_S, UNLIMITED, Limit, Limits, Meter, Rule
from nbdclone.server.server import Server
from nbdclone.server.settings import Settings, read_settings
from nbdclone.server.throttle import Throttle
from nbdclone.store.pool import Pool

KIB = 1 << 10

# The meter


def run_for(meter: Meter, seconds: float, size: int, start: float = 0.0) -> int:
    """How many requests of this size are run when there is always one more."""
    now, count = start, 0
    while True:
        now += meter.wait_s(now)
        if now >= start + seconds:
            return count
        meter.take(size)
        count += 1


@pytest.mark.parametrize(
    ("limit", "size", "expected"),
    [
        (Limit(iops=1000), 4096, 1000),
        (Limit(iops=3), 0, 3),
        (Limit(bps=1 << 20), 4096, 256),
        (Limit(bps=1 << 20), 8 << 20, 1 / 8),
        (Limit(iops=100, bps=1 << 30), 4096, 100),
        (Limit(iops=1000, bps=40960), 4096, 10),
    ],
)
def test_over_time_as_much_is_run_as_the_lower_limit_says_and_a_burst(limit: Limit, size: int, expected: float) -> None:
    count = run_for(Meter(limit, 0.0), 100, size)
    assert expected * 100 <= count <= expected * (100 + BURST_S) + 1


def test_after_a_pause_a_burst_of_a_tenth_of_a_second_is_had_at_once_and_no_more() -> None:
    meter = Meter(Limit(iops=1000), 0.0)
    assert run_for(meter, 1e-9, 0, start=60.0) in (100, 101)  # it is to be above 0, and rounding may leave it so
    assert 1000 * BURST_S == 100


def test_one_request_that_is_larger_than_the_bucket_is_run_and_paid_back() -> None:
    meter = Meter(Limit(bps=1000), 0.0)
    meter.take(3100)
    assert meter.wait_s(0.0) == pytest.approx(3.0)
    assert meter.wait_s(2.0) == pytest.approx(1.0)
    assert meter.wait_s(3.1) == 0


def test_a_debt_takes_as_long_to_pay_back_when_the_limit_changes() -> None:
    meter = Meter(Limit(bps=1000), 0.0)
    meter.take(3100)
    meter.change(Limit(bps=10), 1.0)
    assert meter.wait_s(1.0) == pytest.approx(2.0)
    meter.change(Limit(iops=5), 1.0)
    assert meter.wait_s(1.0) == 0


# The settings


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("web1", Limit(7, 1000)),
        ("web2", Limit(50, 20 << 20)),
        ("web22", Limit(50, 10 << 20)),
        ("free", UNLIMITED),
        ("db1", Limit(5000, 1000)),
    ],
)
def test_a_name_comes_before_patterns_of_which_the_lowest_holds_and_then_the_default(
    tmp_path: Path, name: str, limit: Limit
) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(
        '[limit."web*"]\niops = 50\nbps = "20M"\n[limit."web2?"]\nbps = "10M"\niops = 60\n'
        '[limit.web1]\niops = 7\nbps = 1000\n[limit.free]\niops = "none"\nbps = "none"\n'
    )
    assert read_settings(path, Limit(5000, 1000)).limits.of(name) == limit


def test_without_settings_the_default_holds(tmp_path: Path) -> None:
    assert read_settings(tmp_path / "none.toml", Limit(5)).limits.of("web1") == Limit(5)
    assert Settings().limits.of("web1") == UNLIMITED
    assert Limits(Limit(5), {"web1": Rule(math.inf)}).of("web1") == UNLIMITED


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[limit.web1]", r'limit."web1": says nothing: give iops or bps'),
        ("[limit.web1]\niops = 0", r'limit."web1".iops: 0 is to be a number from 1 on or "none"'),
        ('[limit.web1]\niops = "5K"', r"iops: '5K' is to be a number from 1 on or \"none\""),
        ("[limit.web1]\nbps = true", r"bps: True is to be a number from 1 on, a size like \"50M\", or \"none\""),
        ("[limit.web1]\nbps = -1", r"bps: -1 is to be"),
        ("[limit.web1]\nbps = nan", r"bps: nan is to be"),
        ('[limit.web1]\nbps = "5X"', r"bps: '5X' is to be"),
        ("[limit.web1]\nbits = 1", r'limit."web1".bits: is not known; known here: iops, bps'),
        ('[limit."a/b"]\niops = 1', r"'a/b' cannot be a name"),
        ('[limit."a/*"]\niops = 1', r"no export has a name that matches this pattern"),
        ("limit = 5", r"limit: is to be a table"),
    ],
)
def test_what_is_wrong_with_a_limit_is_said(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=said):
        read_settings(path)


# Connections


def serve(pool: Pool, **limit: float) -> dict[str, object]:
    return {"sockets": [pool.path.parent / "nbd.sock"], "options": Options(limit=Limit(**limit))}


async def reads(peer: Peer, count: int, first: int = 0, length: int = 512) -> None:
    await peer.send(*[peer.request(CMD_READ, n * 512, length, cookie=n) for n in range(first, first + count)])


async def test_requests_above_the_rate_wait_and_are_answered_in_their_order(pool: Pool) -> None:
    async with serving(pool, **serve(pool, iops=50)) as server, await Peer.open(server, "web1", mode=Mode.SIMPLE) as p:
        began = time.monotonic()
        await reads(p, 20)
        await p.send(p.request(CMD_WRITE, 0, payload=b"new" * 1000, cookie=20), p.request(CMD_READ, 0, 3, cookie=21))
        replies = [await p.reply() for _ in range(22)]
        assert [reply.cookie for reply in replies] == list(range(22))
        assert all(reply.data == BASE[n * 512 : n * 512 + 512] for n, reply in enumerate(replies[:20]))
        assert replies[21].data == b"new"
        assert time.monotonic() - began >= (22 - 1 - 50 * BURST_S) / 50


async def test_a_large_write_is_taken_whole_and_what_follows_waits_for_it(pool: Pool) -> None:
    async with serving(pool, **serve(pool, bps=1 << 20)) as server, await Peer.open(server, "web1") as peer:
        began = time.monotonic()
        await peer.send(peer.request(CMD_WRITE, 0, payload=b"x" * 400 * KIB, cookie=1))
        assert not (await peer.reply()).error
        assert (await peer.run(CMD_READ, 400 * KIB - 3, 3)).data == b"xxx"
        assert time.monotonic() - began >= (400 - 1024 * BURST_S) / 1024
        await peer.send(*[peer.request(CMD_WRITE, 0, payload=b"y" * 64 * KIB, cookie=n) for n in range(4)])
        assert sorted(await peer.replies(4)) == [0, 1, 2, 3]
        assert time.monotonic() - began >= (400 + 3 * 64 - 1024 * BURST_S) / 1024


async def test_all_connections_of_an_export_share_its_limit_and_each_has_its_turn(pool: Pool) -> None:
    async with (
        serving(pool, **serve(pool, iops=100)) as server,
        await Peer.open(server, "web1") as one,
        await Peer.open(server, "web1") as other,
    ):
        began = time.monotonic()
        order: list[str] = []

        async def hear(peer: Peer, name: str, count: int) -> None:
            for _ in range(count):
                await peer.reply()
                order.append(name)

        await reads(one, 40)
        await reads(other, 4)
        await asyncio.gather(hear(one, "one", 40), hear(other, "other", 4))
        assert time.monotonic() - began >= (44 - 2 - 100 * BURST_S) / 100
        assert order[-10:] == ["one"] * 10


async def test_flushes_count_as_requests_and_not_as_bytes(pool: Pool) -> None:
    async with serving(pool, **serve(pool, bps=1)) as server, await Peer.open(server, "web1") as peer:
        await peer.send(*[peer.request(CMD_FLUSH, cookie=n) for n in range(50)])
        assert len(await peer.replies(50)) == 50
    async with serving(pool, **serve(pool, iops=50)) as server, await Peer.open(server, "web1") as peer:
        began = time.monotonic()
        await peer.send(*[peer.request(CMD_FLUSH, cookie=n) for n in range(15)])
        await peer.replies(15)
        assert time.monotonic() - began >= (13 - 50 * BURST_S) / 50


async def test_a_read_that_is_refused_for_its_length_costs_no_more_than_the_longest(pool: Pool) -> None:
    async with serving(pool, **serve(pool, bps=256 << 20)) as server, await Peer.open(server, "web1") as peer:
        assert (await peer.run(CMD_READ, 0, 0xFFFFFFFF)).error
        assert (await peer.run(CMD_READ, 0, 512)).data == BASE[:512]


class Clock:
    """A loop whose time stands still until it is told."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def time(self) -> float:
        return self.now

    def call_later(self, delay: float, callback: Callable[[], None]) -> None:
        self.timers.append((self.now + delay, callback))

    def run_until(self, moment: float) -> None:
        while self.timers and min(self.timers, key=itemgetter(0))[0] <= moment:
            timer = min(self.timers, key=itemgetter(0))
            self.timers.remove(timer)
            self.now = max(self.now, timer[0])
            timer[1]()
        self.now = moment


class Customer:
    def __init__(self, throttle: Throttle, order: list[Customer]) -> None:
        self._throttle = throttle
        self._order = order

    def unthrottle(self) -> None:
        while self._throttle.may_go_on(self):
            self._throttle.pay(CMD_READ, 512)
            self._order.append(self)


def test_who_comes_when_others_wait_does_not_get_in_before_them() -> None:
    clock = Clock()
    throttle = Throttle(Limit(iops=100), clock)  # type: ignore[arg-type]
    order: list[Customer] = []
    first, late = Customer(throttle, order), Customer(throttle, order)
    first.unthrottle()
    assert order == [first] * 10
    clock.now = 0.05  # and the timer is late
    late.unthrottle()
    assert len(order) == 10
    clock.run_until(0.2)
    assert order[10:] == [first] * 5 + [late, first] * ((len(order) - 15) // 2) + [late] * ((len(order) - 15) % 2)
    assert len(order) > 20


async def test_who_waits_for_the_limits_takes_nothing_when_it_has_room(pool: Pool) -> None:
    async with serving(pool, **serve(pool, iops=1)) as server, await Peer.open(server, "web1") as peer:
        await reads(peer, 3)
        await until(lambda: waiting(server) == 1)
        [connection] = server._connections
        assert connection._session is not None
        connection._session._on_room()
        assert not connection._session._input.active


def write_settings(pool: Pool, text: str) -> None:
    (pool.path / "settings.toml").write_text(text)


async def test_other_exports_are_not_delayed(pool: Pool) -> None:
    write_settings(pool, "[limit.web1]\niops = 1\n")
    async with (
        serving(pool) as server,
        await Peer.open(server, "web1") as limited,
        await Peer.open(server, "web2") as free,
    ):
        await reads(limited, 50)
        for _ in range(50):
            assert (await free.run(CMD_READ, 0, 512)).data == BASE[:512]
        assert waiting(server) == 1


def waiting(server: Server) -> int:
    """How many connections wait for their export's limits."""
    return sum(c._session is not None and c._session._throttled for c in server._connections)


async def test_new_settings_hold_for_exports_that_are_open(pool: Pool) -> None:
    write_settings(pool, "[limit.web1]\niops = 1\n")
    async with serving(pool) as server, await Peer.open(server, "web1") as peer:
        began = time.monotonic()
        await reads(peer, 30)
        await until(lambda: waiting(server) == 1)
        write_settings(pool, "[limit.web1]\niops = 1000\n")
        server.reload()
        await peer.replies(20)
        write_settings(pool, "")
        server.reload()
        await peer.replies(10)
        await reads(peer, 100)
        await peer.replies(100)
        assert time.monotonic() - began < 10
        write_settings(pool, "[limit.web1]\niops = 1\n")
        server.reload()
        await reads(peer, 3)
        await until(lambda: waiting(server) == 1)


async def test_bad_limits_change_nothing(pool: Pool) -> None:
    write_settings(pool, "[limit.web1]\niops = 1\n")
    async with serving(pool) as server, await Peer.open(server, "web1") as peer:
        write_settings(pool, "[limit.web1]\niops = []\n")
        server.reload()
        await reads(peer, 3)
        await until(lambda: waiting(server) == 1)


@pytest.mark.parametrize("payload", [512, 100 * KIB])
async def test_a_server_that_stops_does_not_wait_for_the_limits(pool: Pool, payload: int) -> None:
    async with serving(pool, **serve(pool, iops=1)) as server, await Peer.open(server, "web1") as peer:
        await peer.send(*[peer.request(CMD_WRITE, 0, payload=b"z" * payload, cookie=n) for n in range(2)])
        assert (await peer.reply()).cookie == 0
        await until(lambda: waiting(server) == 1)
        began = time.monotonic()
    assert time.monotonic() - began < 1


async def test_a_connection_that_goes_while_it_waits_leaves_the_row(pool: Pool) -> None:
    async with serving(pool, **serve(pool, iops=5)) as server, await Peer.open(server, "web1") as other:
        peer = await Peer.open(server, "web1")
        await reads(peer, 5)
        await until(lambda: waiting(server) == 1)
        peer.close()
        await reads(other, 1)
        assert (await other.reply()).data == BASE[:512]
        await until(lambda: len(server._connections) == 1)
        await asyncio.sleep(0)
        assert (await other.run(CMD_READ, 0, 512)).data == BASE[:512]
