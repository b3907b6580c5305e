"""The threads: every job is done, its outcome comes back on the loop, and nothing is left at the end."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import pytest
from serving import PATIENCE_S, Gate, until

from nbdclone.server import offload as offload_module
from nbdclone.server.offload import AHEAD, CROWDED_SHARE, MAX_THREADS, Offload


@pytest.fixture
async def offload() -> AsyncIterator[Offload]:
    before = threading.active_count()
    offload = Offload(asyncio.get_running_loop())
    yield offload
    offload.close()
    assert threading.active_count() == before


async def test_work_runs_in_a_thread_and_its_result_comes_back_on_the_loop(offload: Offload) -> None:
    here = threading.get_ident()
    came: list[tuple[Any, BaseException | None, int]] = []
    offload.submit(threading.get_ident, lambda result, error: came.append((result, error, threading.get_ident())))
    await until(lambda: bool(came))
    [(there, error, heard)] = came
    assert there != here
    assert (error, heard) == (None, here)


async def test_an_error_comes_back_as_it_was_raised(offload: Offload) -> None:
    def fail() -> None:
        raise OSError(5, "broken")

    with pytest.raises(OSError, match="broken"):
        await offload.run(fail)


async def test_a_thousand_jobs_all_come_back(offload: Offload) -> None:
    assert await asyncio.gather(*[offload.run(partial(pow, n, 2)) for n in range(1000)]) == [n * n for n in range(1000)]


async def test_threads_are_started_as_they_are_needed_and_no_more_than_the_limit(offload: Offload) -> None:
    before = threading.active_count()
    for _ in range(10):
        await offload.run(lambda: None)
    assert threading.active_count() == before + 1
    gate = Gate()
    gate.close()
    jobs = [asyncio.create_task(offload.run(gate.go_through)) for _ in range(3 * MAX_THREADS)]
    await until(lambda: gate.waiting == MAX_THREADS)
    assert threading.active_count() == before + MAX_THREADS
    gate.open()
    await asyncio.gather(*jobs)


async def test_a_thread_that_has_finished_keeps_nothing_of_its_job_alive(offload: Offload) -> None:
    class Buffer:
        pass

    buffer = Buffer()
    watch = weakref.ref(buffer)
    await offload.run(partial(id, buffer))
    del buffer
    await asyncio.sleep(0.05)
    gc.collect()
    assert watch() is None


async def test_work_whose_waiter_was_cancelled_is_finished_and_its_result_disposed_of(offload: Offload) -> None:
    gate = Gate()
    gate.close()
    disposed: list[str] = []

    def work() -> str:
        gate.go_through()
        return "result"

    waiting = asyncio.create_task(offload.run(work, abandoned=disposed.append))
    await until(lambda: gate.waiting == 1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert disposed == []
    gate.open()
    await until(lambda: disposed == ["result"])


async def test_a_result_that_came_in_the_moment_of_the_cancelling_is_disposed_of(offload: Offload) -> None:
    disposed: list[str] = []
    done = threading.Event()

    def work() -> str:
        done.set()
        return "result"

    waiting = asyncio.create_task(offload.run(work, abandoned=disposed.append))
    await asyncio.sleep(0)
    assert done.wait(PATIENCE_S)
    time.sleep(0.05)  # noqa: ASYNC251 - the outcome is there, and the loop has not heard of it
    offload._deliver()
    waiting.cancel()  # its future has its result already
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await until(lambda: disposed == ["result"])


async def test_what_was_abandoned_is_disposed_of_before_the_threads_end() -> None:
    before = threading.active_count()
    offload = Offload(asyncio.get_running_loop())
    disposed: list[str] = []

    def work() -> str:
        time.sleep(0.1)
        return "result"

    waiting = asyncio.create_task(offload.run(work, abandoned=disposed.append))
    await asyncio.sleep(0.02)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    offload.close()
    assert disposed == ["result"]
    assert threading.active_count() == before
    await asyncio.sleep(0.05)
    assert disposed == ["result"]
    assert threading.active_count() == before


async def test_close_waits_for_the_jobs_that_were_given_before() -> None:
    offload = Offload(asyncio.get_running_loop())
    finished: list[int] = []

    def work(number: int) -> None:
        time.sleep(0.01)
        finished.append(number)

    for number in range(40):
        offload.submit(partial(work, number), lambda _result, _error: None)
    offload.close()
    assert sorted(finished) == list(range(40))


async def test_an_error_of_abandoned_work_is_nobodys(offload: Offload) -> None:
    gate = Gate()
    gate.close()
    disposed: list[str] = []

    def work() -> str:
        gate.go_through()
        raise OSError(5, "broken")

    waiting = asyncio.create_task(offload.run(work, abandoned=disposed.append))
    await until(lambda: gate.waiting == 1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    gate.open()
    await offload.run(lambda: None)
    assert disposed == []


async def test_where_no_thread_can_be_started_the_job_fails_or_waits_and_nothing_hangs(
    offload: Offload, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes: list[tuple[Any, BaseException | None]] = []

    def note(result: Any, error: BaseException | None) -> None:
        outcomes.append((result, error))

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        offload.submit(lambda: 1, note)
        await until(lambda: len(outcomes) == 1)
    assert isinstance(outcomes[0][1], OSError)
    gate = Gate()
    gate.close()
    offload.submit(gate.go_through, note)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        offload.submit(lambda: 2, note)  # the one thread there is will come to it
    gate.open()
    await until(lambda: len(outcomes) == 3)
    assert (2, None) in outcomes


async def test_a_callback_that_raises_takes_no_other_with_it(
    offload: Offload, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[int] = []

    def fail(_result: Any, _error: BaseException | None) -> None:
        raise ValueError("on purpose")

    offload.submit(lambda: 1, fail)
    offload.submit(lambda: 2, lambda result, _error: heard.append(result))
    await until(lambda: heard == [2] and bool(caplog.records))
    assert "a defect of the server" in caplog.text


async def test_an_owner_of_many_jobs_keeps_anothers_waiting_for_few_of_them() -> None:
    offload = Offload(asyncio.get_running_loop(), 1)
    gate = Gate()
    gate.close()
    order: list[str] = []

    def submit(owner: str) -> None:
        offload.submit(gate.go_through, lambda _result, _error: order.append(owner), owner)

    for _ in range(50):
        submit("greedy")
    submit("quiet")
    submit("third")
    submit("quiet")
    gate.open()
    await until(lambda: len(order) == 53)
    quiet, again = (index for index, owner in enumerate(order) if owner == "quiet")
    assert quiet <= AHEAD + 2
    assert order.index("third") <= AHEAD + 3
    assert again <= AHEAD + 5
    offload.close()


async def test_while_others_have_jobs_an_owner_leaves_them_threads(
    offload: Offload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload_module, "CROWDED_FOR_S", PATIENCE_S)
    gate = Gate()
    gate.close()
    heard: list[str] = []
    offload.submit(lambda: None, lambda _result, _error: heard.append("quiet"), "quiet")
    for _ in range(3 * MAX_THREADS):
        offload.submit(gate.go_through, lambda _result, _error: heard.append("greedy"), "greedy")
    offload.submit(lambda: None, lambda _result, _error: heard.append("quiet"), "quiet")
    await until(lambda: heard == ["quiet"] * 2)
    assert gate.waiting == (MAX_THREADS + AHEAD) // CROWDED_SHARE
    gate.open()
    await until(lambda: len(heard) == 2 + 3 * MAX_THREADS)


async def test_an_owner_that_is_alone_again_has_all_threads(offload: Offload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload_module, "CROWDED_FOR_S", 0)
    gate = Gate()
    gate.close()
    heard: list[str] = []
    offload.submit(lambda: None, lambda _result, _error: heard.append("quiet"), "quiet")
    for _ in range(3 * MAX_THREADS):
        offload.submit(gate.go_through, lambda _result, _error: heard.append("greedy"), "greedy")
    await until(lambda: gate.waiting == MAX_THREADS)
    gate.open()
    await until(lambda: len(heard) == 1 + 3 * MAX_THREADS)


async def test_outcomes_are_heard_in_turn_too(offload: Offload) -> None:
    order: list[str] = []
    finished = threading.Semaphore(0)
    for owner in ["greedy"] * 5 + ["quiet"]:
        offload.submit(finished.release, lambda _result, _error, owner=owner: order.append(owner), owner)  # type: ignore[misc]
    for _ in range(6):
        assert finished.acquire(timeout=PATIENCE_S)
    time.sleep(0.05)  # noqa: ASYNC251 - the outcomes are there, and the loop has not heard of them
    await until(lambda: len(order) == 6)
    assert order.index("quiet") <= 1


async def test_the_loop_has_its_turn_between_outcomes(offload: Offload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload_module, "SLICE_S", 0)
    loop = asyncio.get_running_loop()
    order: list[str] = []

    def done(_result: Any, _error: BaseException | None) -> None:
        order.append("outcome")
        loop.call_soon(order.append, "others")

    finished = threading.Semaphore(0)
    for _ in range(3):
        offload.submit(finished.release, done)
        assert finished.acquire(timeout=PATIENCE_S)
    time.sleep(0.05)  # noqa: ASYNC251 - the outcomes are there, and the loop has not heard of them
    await until(lambda: len(order) == 6)
    assert order == ["outcome", "others"] * 3


async def test_close_waits_for_the_jobs_that_were_not_given_to_a_thread_yet() -> None:
    offload = Offload(asyncio.get_running_loop(), 1)
    finished: list[int] = []
    for number in range(20):
        offload.submit(partial(finished.append, number), lambda _result, _error: None, number % 3)
    offload.close()
    assert sorted(finished) == list(range(20))
