"""Verbs that a running server is asked for: in a worker, in a process of their own, interrupted, and cut off."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from serving import BASE, PATIENCE_S, until, where
from supervising import children, holder, supervised

from nbdclone.client import Client
from nbdclone.control.client import Control, run_verb
from nbdclone.control.verbs import VERBS, Steps, Verb
from nbdclone.errors import ConnectionFailed, Interrupted, InUse, NBDCloneError, NotFound, ServerRefused, UsageError
from nbdclone.server import jobs as jobs_module
from nbdclone.server import work as work_module
from nbdclone.server.budget import MIN_MEMORY
from nbdclone.server.process import Process
from nbdclone.server.supervisor import Supervisor
from nbdclone.server.work import Work
from nbdclone.store.pool import Pool

BLOCK = 4096
PLACES = ["fill", "fill_apart"]


async def run(pool: Pool, verb: str, progress: Any = None, /, **arguments: Any) -> Any:
    return await asyncio.to_thread(run_verb, pool, verb, arguments, progress)


class Enough(Exception):
    """What somebody raises who wants no more."""


class Canceller:
    """Progress until somebody says stop; what was told so far."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int]] = []
        self.stop = False

    def __call__(self, done: int, total: int) -> None:
        self.told.append((done, total))
        if self.stop:
            raise Enough


@pytest.mark.parametrize("verb", PLACES)
async def test_a_verb_is_done_by_the_server_which_tells_how_far_it_is(pool: Pool, verb: str) -> None:
    async with supervised(pool, 1):
        told: list[tuple[int, int]] = []
        result = await run(
            pool, verb, lambda *progress: told.append(progress), name="web1", byte=7, blocks=5, step_ms=60
        )
        assert result["filled"] == 5
        assert result["by"] != os.getpid()
        assert told[-1] == (5, 5)
        assert 2 <= len(told) <= 5
        assert told == sorted(told)
        assert holder(pool, "web1") is None
        with pool.open_clone("web1") as clone:
            assert clone.pread(5 * BLOCK, 0) == b"\7" * 5 * BLOCK


async def test_a_verb_works_on_the_clone_that_a_client_has_open(pool: Pool) -> None:
    async with supervised(pool, 1) as server:
        async with await Client.connect(where(server, "web1")) as client:
            await client.pwrite(b"mine" * 1024, 5 * BLOCK)
            result = await run(pool, "fill", name="web1", byte=7, blocks=2)
            assert result["by"] == holder(pool, "web1")
            assert await client.pread(6 * BLOCK, 0) == b"\7" * 2 * BLOCK + BASE[2 * BLOCK : 5 * BLOCK] + b"mine" * 1024
            await client.pwrite(b"y" * BLOCK, 0)
        with pool.open_clone("web1") as clone:
            assert clone.pread(2 * BLOCK, 0) == b"y" * BLOCK + b"\7" * BLOCK


async def test_no_change_of_a_client_runs_beside_a_step_and_reads_do(pool: Pool) -> None:
    async with supervised(pool, 1) as server, await Client.connect(where(server, "web1")) as client:
        await client.pwrite(b"a" * BLOCK, 9 * BLOCK)
        told: list[float] = []
        running = asyncio.create_task(
            run(
                pool,
                "fill",
                lambda done, total: told.append(time.monotonic()),
                name="web1",
                byte=7,
                blocks=2,
                step_ms=400,
            )
        )
        await asyncio.sleep(0.2)  # within the first step
        began = time.monotonic()
        assert await client.pread(BLOCK, 9 * BLOCK) == b"a" * BLOCK
        assert time.monotonic() - began < 0.1
        await client.pwrite(b"b" * 512, 9 * BLOCK)
        assert time.monotonic() - began > 0.1, "it waited for the step"
        await running


async def test_clients_have_the_clone_to_themselves_as_long_as_a_step_takes(pool: Pool) -> None:
    async with supervised(pool, 1) as server, await Client.connect(where(server, "web1")):
        began = time.monotonic()
        await run(pool, "fill", name="web1", byte=7, blocks=10, step_ms=30)
        assert time.monotonic() - began >= 0.6


@pytest.mark.parametrize("has_clients", [True, False])
def test_a_pause_is_as_long_as_the_work_was_and_waiting_is_no_work_and_alone_there_is_none(
    monkeypatch: pytest.MonkeyPatch, has_clients: bool
) -> None:
    now = 0.0
    pauses: list[float] = []

    def steps(target: Work, name: str) -> Steps:
        nonlocal now
        for took, waited in [(3.0, 0.0), (5.0, 4.0), (7.0, 0.0)]:
            now += took
            target.waited_s += waited
            yield 1, 3

    class Interrupted(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            nonlocal now
            assert timeout is not None
            pauses.append(timeout)
            now += timeout
            return False

    monkeypatch.setattr(work_module, "perf_counter", lambda: now)
    monkeypatch.setitem(VERBS, "steps", Verb("steps", "worker", "here:steps"))
    monkeypatch.setattr(Verb, "load", lambda _verb: steps)
    host, loop = SimpleNamespace(has_clients=has_clients), SimpleNamespace(call_soon_threadsafe=lambda *_: None)
    message = {"connection": 1, "verb": "steps", "arguments": {"name": "web1"}}
    work = Work(message, host, SimpleNamespace(send=None), loop)  # type: ignore[arg-type]
    work._interrupted = Interrupted()
    work.do()
    assert pauses == ([3.0, 1.0, 7.0] if has_clients else [0, 0, 0])


@pytest.mark.parametrize("name", ["refuse", "refuse_apart"])
@pytest.mark.parametrize("late", [False, True])
async def test_a_refusal_arrives_as_what_was_raised(pool: Pool, name: str, late: bool) -> None:
    async with supervised(pool, 1):
        with pytest.raises(InUse, match=r"^'web1' is wanted by somebody else$"):
            await run(pool, name, name="web1", late=late)


async def test_what_the_store_refuses_arrives_too(pool: Pool) -> None:
    async with supervised(pool, 1):
        with pytest.raises(NotFound, match="there is no base or clone 'web9'"):
            await run(pool, "fill", name="web9", byte=1, blocks=1)
        with pytest.raises(UsageError, match="'base' is read-only"):
            await run(pool, "fill", name="base", byte=1, blocks=1)


@pytest.mark.parametrize("name", ["break_down", "break_down_apart"])
async def test_a_defect_is_told_and_the_server_goes_on(pool: Pool, name: str) -> None:
    async with supervised(pool, 1):
        with pytest.raises(NBDCloneError, match=r"^a defect of nbdclone: KeyError: 'web1'$"):
            await run(pool, name, name="web1")
        assert (await run(pool, "fill", name="web1", byte=1, blocks=1))["filled"] == 1


async def test_a_verb_that_is_unknown_to_the_server_and_wrong_arguments_are_refused(pool: Pool) -> None:
    async with supervised(pool, 1):
        control = Control.of(pool.path)
        assert control is not None
        with pytest.raises(NotFound, match="there is no verb 'fly'"):
            await asyncio.to_thread(list, control.run("fly", {}))
        with pytest.raises(UsageError, match="'byte' is to be a whole number"):
            await asyncio.to_thread(list, control.run("fill", {"name": "web1", "byte": "x", "blocks": 1}))


@pytest.mark.parametrize("verb", PLACES)
async def test_when_whoever_asked_goes_away_the_verb_ends_and_lets_go(pool: Pool, verb: str, tmp_path: Path) -> None:
    async with supervised(pool, 1) as server:
        mark, progress = tmp_path / "mark", Canceller()
        running = asyncio.create_task(
            run(pool, verb, progress, name="web1", byte=7, blocks=1000, step_ms=20, mark=str(mark))
        )
        await until(lambda: len(progress.told) > 1)
        progress.stop = True
        with pytest.raises(Enough):
            await running
        await until(mark.exists)
        await until(lambda: mark.read_text() == "interrupted")
        await until(lambda: not server.jobs() and holder(pool, "web1") is None)
        assert not server._owners._connections


async def test_a_verb_that_waits_for_a_worker_can_be_given_up(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with supervised(pool, 1) as server:
        gate = asyncio.Event()
        place = server.place

        async def place_late(number: int, name: str) -> Any:
            await gate.wait()
            return await place(number, name)

        monkeypatch.setattr(server, "place", place_late)
        async with server.begin(
            "fill", {"name": "web1", "byte": 1, "blocks": 1, "mark": str(tmp_path / "mark")}
        ) as job:
            assert len(server.jobs()) == 1
        gate.set()
        await until(lambda: not server.jobs())
        with pytest.raises(Interrupted):
            job.result()
        assert not (tmp_path / "mark").exists(), "it never began"


async def test_a_worker_that_dies_in_the_middle_is_an_error_for_whoever_asked(
    pool: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    async with supervised(pool, 1):
        with pytest.raises(Interrupted, match=r"the worker that did 'die' has ended, process \d+"):
            await run(pool, "die", name="web1")
        result = await run(pool, "fill", name="web1", byte=1, blocks=1)  # waits for the next worker
        assert result["filled"] == 1
        assert "was ended by SIGKILL; it had 'web1'" in caplog.text


async def test_a_process_that_dies_in_the_middle_is_an_error_too(pool: Pool) -> None:
    async with supervised(pool, 1):
        with pytest.raises(Interrupted, match=r"the process that did 'die_apart' was ended by SIGKILL"):
            await run(pool, "die_apart", name="web1")


async def test_a_clone_of_a_dying_worker_is_waited_for_by_verbs_as_by_clients(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait, gate = Process.wait, threading.Event()
    monkeypatch.setattr(Process, "wait", lambda process: gate.wait(PATIENCE_S) and wait(process))
    async with supervised(pool, 2) as server, await Client.connect(where(server, "web1")):
        dead = holder(pool, "web1")
        assert dead is not None
        os.kill(dead, signal.SIGKILL)
        await until(lambda: any(process.ending for process in server._processes.values()))
        running = asyncio.create_task(run(pool, "fill", name="web1", byte=1, blocks=1))
        await until(lambda: bool(server.jobs()))
        await asyncio.sleep(0.1)
        assert not running.done(), "the kernel has not said that it is dead"
        gate.set()
        result = await running
        assert result["filled"] == 1
        assert result["by"] != dead


@pytest.mark.parametrize("verb", PLACES)
async def test_at_the_end_of_the_server_verbs_are_interrupted_and_say_so(pool: Pool, verb: str, tmp_path: Path) -> None:
    mark, progress = tmp_path / "mark", Canceller()
    arguments = {"name": "web1", "byte": 7, "blocks": 1000, "step_ms": 20, "mark": str(mark)}
    async with Supervisor(pool, workers=1, worker_memory=MIN_MEMORY, sockets=[tmp_path / "s"]):
        running = asyncio.create_task(run(pool, verb, progress, **arguments))
        await until(lambda: len(progress.told) > 1)
    with pytest.raises(Interrupted, match="interrupted"):
        await running
    assert mark.read_text() == "interrupted"
    assert not children()


async def test_a_verb_in_a_process_runs_others_by_way_of_the_server(pool: Pool) -> None:
    async with supervised(pool, 1) as server, await Client.connect(where(server, "web1")) as client:
        result = await run(pool, "twice", name="web1")
        assert result["all"] == [2, 1]
        assert result["done_by"] == holder(pool, "web1") != result["by"]
        assert await client.pread(3 * BLOCK, 0) == b"\2" * BLOCK + b"\1" * BLOCK + BASE[2 * BLOCK : 3 * BLOCK]


async def test_a_verb_sees_whether_a_clone_is_open_and_for_whom_and_opens_nothing(pool: Pool) -> None:
    async with supervised(pool, 1) as server:
        assert not (await run(pool, "look", name="web1"))["open"]
        async with await Client.connect(where(server, "web1")):
            result = await run(pool, "look", name="web1")
            assert result["open"]
            [client] = result["clients"]
            assert client["peer"] == f"unix uid {os.geteuid()} pid {os.getpid()}"
            assert abs(client["since"] - time.time()) < PATIENCE_S
        await until(lambda: holder(pool, "web1") is None)


async def test_clients_can_be_sent_away(pool: Pool) -> None:
    async with supervised(pool, 1) as server:
        clients = [await Client.connect(where(server, name)) for name in ("web1", "web1", "web2")]
        assert len((await run(pool, "disconnect", name="web1"))["disconnected"]) == 2
        assert [export["name"] for export in await server.exports()] == ["web2"], "they are gone, not only told to go"
        for client in clients[:2]:
            with pytest.raises((ConnectionFailed, OSError)):
                await client.pread(512, 0)
        assert await clients[2].pread(512, 0) == BASE[:512]
        assert await run(pool, "send_away", name="web2") == {"before": 1, "after": 0}
        for client in clients:
            await client.close()


async def test_a_verb_in_a_worker_opens_its_own_clone_alone(pool: Pool) -> None:
    async with supervised(pool, 1):
        with pytest.raises(UsageError, match="'wrong_clone' works on 'web1', and cannot open 'web2' as well"):
            await run(pool, "wrong_clone", name="web1", other="web2")


async def test_only_so_many_verbs_are_at_work(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    async with supervised(pool, 1) as server:
        monkeypatch.setattr(jobs_module, "MAX_JOBS", 1)
        async with server.begin("fill", {"name": "web1", "byte": 1, "blocks": 1000, "step_ms": 10}):
            with pytest.raises(InUse, match="1 verbs are at work"):
                await run(pool, "look", name="web2")
        await until(lambda: not server.jobs())
        await run(pool, "look", name="web2")


async def test_a_quota_takes_effect_at_once_in_the_worker(pool: Pool) -> None:
    async with supervised(pool, 1) as server, await Client.connect(where(server, "web1")) as client:
        for number in range(64):
            await client.pwrite(b"%8d" % number * 512, number * BLOCK)
        await run(pool, "quota", name="web1", quota=BLOCK)
        with pytest.raises(ServerRefused, match="quota exceeded"):
            await client.pwrite(b"x" * BLOCK, 70 * BLOCK)
        await run(pool, "quota", name="web1", quota=None)
        await client.pwrite(b"x" * BLOCK, 70 * BLOCK)
