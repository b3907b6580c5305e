"""A server of several processes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from secure import certificates, trusting
from serving import BASE, CLONES, MIB, Hasty, Peer, make_pool, until, where
from supervising import alive, children, holder, supervised
from test_process import end, program, ready

from nbdclone.client import Client
from nbdclone.errors import ConnectionFailed, ServerRefused, UsageError
from nbdclone.protocol.wire import CMD_READ
from nbdclone.server import process as process_module
from nbdclone.server import supervisor as module
from nbdclone.server.budget import MIN_MEMORY
from nbdclone.server.host import Options
from nbdclone.server.limits import BURST_S, Limit
from nbdclone.server.supervisor import Supervisor, divide_memory
from nbdclone.server.tls import ServerTLS
from nbdclone.store import locks
from nbdclone.store.pool import Pool

EIGHT = [f"web{number}" for number in range(1, 9)]


@pytest.fixture
def eight(tmp_path: Path) -> Pool:
    return make_pool(tmp_path, BASE, *EIGHT, fs=Hasty())


# Who has what


@pytest.mark.parametrize("together", [True, False])
async def test_eight_clones_are_served_by_two_workers_four_by_each(eight: Pool, together: bool) -> None:
    async with supervised(eight) as server:
        if together:
            clients = await asyncio.gather(*[Client.connect(where(server, name)) for name in EIGHT])
        else:
            clients = [await Client.connect(where(server, name)) for name in EIGHT]
        holders = Counter(holder(eight, name) for name in EIGHT)
        assert sorted(holders) == sorted(children())
        assert list(holders.values()) == [4, 4]
        for number, client in enumerate(clients):
            await client.pwrite(b"%d" % number * 512, 512)
            await client.flush()
        for number, client in enumerate(clients):
            assert await client.pread(512, 512) == b"%d" % number * 512
            assert await client.pread(512, 0) == BASE[:512]
            await client.close()
    for number, name in enumerate(EIGHT):
        with eight.open_clone(name) as clone:
            assert clone.pread(512, 512) == b"%d" % number * 512


@pytest.mark.parametrize("tls", [False, True])
async def test_all_connections_to_an_export_are_one_disk(eight: Pool, tmp_path: Path, tls: bool) -> None:
    secured = ServerTLS(certificates()) if tls else None
    context = trusting() if tls else None
    async with supervised(eight, sockets=[tmp_path / "s"], tls=secured) as server:
        others = [await Client.connect(where(server, name), tls=context) for name in EIGHT[4:7]]
        clients = [await Client.connect(where(server, "web1"), tls=context) for _ in range(4)]
        data = random.Random(1).randbytes(2 * MIB)
        await asyncio.gather(*[c.pwrite(data[n << 19 : (n + 1) << 19], n << 19) for n, c in enumerate(clients)])
        await clients[0].flush()
        assert await asyncio.gather(*[client.pread(len(data), 0) for client in clients]) == [data] * 4
        for client in [*clients, *others]:
            await client.close()


async def test_the_list_of_exports_needs_no_owner_and_a_name_that_nobody_has_none_either(eight: Pool) -> None:
    async with supervised(eight) as server:
        assert await Client.list(server.uris[0]) == ["base", *EIGHT]
        with pytest.raises(ServerRefused, match="no base or clone"):
            await Client.connect(where(server, "none"))
        assert len(children()) == 1, "a second worker is for a second export"


async def test_there_is_a_worker_in_reserve_until_there_are_as_many_as_there_may_be(eight: Pool) -> None:
    async with supervised(eight, 3) as server:
        assert len(children()) == 1
        clients = []
        for number in range(4):
            clients.append(await Client.connect(where(server, EIGHT[number])))
            assert len(children()) == min(number + 2, 3)
        for client in clients:
            await client.close()


async def test_workers_that_have_nothing_to_do_are_ended_but_for_one(
    eight: Pool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "IDLE_S", 0.2)
    async with supervised(eight, 3) as server:
        clients = [await Client.connect(where(server, name)) for name in EIGHT[:3]]
        await asyncio.sleep(0.5)
        assert len(children()) == 3
        for client in clients:
            await client.close()
        await until(lambda: len(children()) == 1)
        async with await Client.connect(where(server, "web1")) as client:
            assert await client.pread(512, 0) == BASE[:512]
    assert not caplog.records


async def test_whoever_comes_and_goes_meets_no_clone_that_is_in_use(pool: Pool) -> None:
    """The last connection closes the clone in one worker while the next is on its way, perhaps to another."""
    rng = random.Random(2)
    done: Counter[str] = Counter()

    async def visit(server: Supervisor, number: int) -> None:
        place = number * 512
        last = BASE[place : place + 512]
        for turn in range(25):
            name = "web1" if rng.random() < 0.7 else "web2"
            if rng.random() < 0.2:
                await Client.describe(where(server, name))
                done["described"] += 1
            async with await Client.connect(where(server, name)) as client:
                if name == "web1":
                    assert await client.pread(512, place) == last
                    last = bytes([number, turn]) * 256
                    await client.pwrite(last, place)
            done[name] += 1
            if rng.random() < 0.3:
                await asyncio.sleep(rng.random() * 0.02)

    async with supervised(pool, 3) as server:
        busy = await Client.connect(where(server, "base"))  # so that the workers are not alike
        await asyncio.gather(*[visit(server, number) for number in range(6)])
        await busy.close()
    assert done["web1"] + done["web2"] == 150


# Death


async def test_a_worker_that_dies_takes_its_exports_and_no_others(
    eight: Pool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait = process_module.Process.wait

    def wait_longer(process: process_module.Process) -> int:
        """As if it took the kernel a while to end it. Who comes again meanwhile is to wait for that."""
        status = wait(process)
        time.sleep(0.3)
        return status

    monkeypatch.setattr(process_module.Process, "wait", wait_longer)
    async with supervised(eight) as server:
        clients = {name: await Client.connect(where(server, name)) for name in EIGHT}
        for client in clients.values():
            await client.pwrite(b"acknowledged".ljust(512), 0)
        dead = holder(eight, "web1")
        assert dead is not None
        lost = [name for name in EIGHT if holder(eight, name) == dead]
        os.kill(dead, signal.SIGKILL)
        for name, client in clients.items():
            if name in lost:
                with pytest.raises((ConnectionFailed, OSError)):
                    await client.pread(512, 0)
            else:
                assert await client.pread(12, 0) == b"acknowledged"
        for name in lost:
            async with await Client.connect(where(server, name)) as client:
                assert await client.pread(12, 0) == b"acknowledged"
                await client.flush()
        [said] = [record.getMessage() for record in caplog.records if record.name == "nbdclone"]
        names = ", ".join(f"'{name}'" for name in lost)
        assert said == f"worker {dead} was ended by SIGKILL; it had {names}"
        assert dead not in children()
        for client in clients.values():
            await client.close()


async def test_while_workers_die_clients_lose_connections_and_nothing_else(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No client meets a clone that a dying worker still has, and what was acknowledged is there."""
    monkeypatch.setattr(module, "LONGEST_PAUSE_S", 0.05)
    stop = asyncio.Event()
    done: Counter[str] = Counter()

    async def visit(server: Supervisor, name: str, place: int) -> None:
        possible = {BASE[place : place + 512]}
        number = 0
        while not stop.is_set():
            try:
                async with await Client.connect(where(server, name)) as client:
                    for _ in range(20):
                        data = await client.pread(512, place)
                        assert data in possible
                        number += 1
                        new = b"%8d" % number * 64
                        possible = {data, new}
                        await client.pwrite(new, place)
                        possible = {new}
                        done["writes"] += 1
                        if number % 7 == 0:
                            await client.flush()
            except ServerRefused:
                raise
            except OSError:
                done["lost"] += 1
                await asyncio.sleep(0.005)

    async with supervised(pool, 2) as server:
        visits = [asyncio.create_task(visit(server, name, place * 4096)) for name in CLONES for place in range(3)]
        rng = random.Random(3)
        for _ in range(8):
            await asyncio.sleep(0.3 + rng.random() * 0.2)
            with contextlib.suppress(ProcessLookupError):
                os.kill(rng.choice(children()), signal.SIGKILL)
        stop.set()
        await asyncio.gather(*visits)
    assert done["writes"] > 100
    assert done["lost"] > 4


async def test_without_a_worker_who_comes_waits_and_the_pauses_grow(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start = process_module.start
    starts: list[float] = []
    loop = asyncio.get_running_loop()

    def start_badly(module: str, pool: Path, fd: int) -> object:
        starts.append(loop.time())
        return start(module, pool / "missing" if 1 < len(starts) < 6 else pool, fd)

    monkeypatch.setattr(process_module, "start", start_badly)
    async with supervised(pool) as server:
        os.kill(children()[0], signal.SIGKILL)
        await until(lambda: "SIGKILL" in caplog.text)
        async with await Client.connect(where(server, "web1")) as client:
            assert await client.pread(512, 0) == BASE[:512]
        pauses = [later - sooner for sooner, later in itertools.pairwise(starts[2:6])]
        assert pauses[2] - pauses[0] > 0.3, "they are 0.2 s and 0.8 s, and what it takes to start and die"
    assert "a worker cannot serve" in caplog.text


async def test_a_first_worker_that_cannot_serve_is_an_error(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    start = process_module.start
    monkeypatch.setattr(process_module, "start", lambda module, pool, fd: start(module, pool / "missing", fd))
    with pytest.raises(UsageError, match="is not a pool"):
        async with supervised(pool):
            pass
    assert not children()


async def test_when_the_supervisor_is_killed_the_workers_flush_close_and_end(pool: Pool, tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    with program(pool.path, "--socket", path, "--workers", "2") as process:
        ready(process)
        clients = [await Client.connect(str(path), name) for name in CLONES]
        for client in clients:
            await client.pwrite(b"x" * 4096, 0)
        workers = {holder(pool, name) for name in CLONES}
        assert process.pid not in workers
        assert len(workers) == 2
        process.kill()
        process.wait()
        await until(lambda: not any(alive(worker) for worker in workers if worker))
        for client in clients:
            await client.close()
    for name in CLONES:
        assert not (pool.path / "clones" / name / "live").exists(), "closed, not killed"
        with pool.open_clone(name) as clone:
            assert clone.pread(4096, 0) == b"x" * 4096


async def test_the_pool_has_its_server_until_the_last_worker_has_ended(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "DYING_S", 0.1)
    path = tmp_path / "nbd.sock"
    with program(pool.path, "--socket", path, "--workers", "2") as process:
        ready(process)
        client = await Client.connect(str(path), "web1")
        worker = holder(pool, "web1")
        assert worker is not None
        os.kill(worker, signal.SIGSTOP)
        process.kill()
        process.wait()
        try:
            with pytest.raises(UsageError, match="is in use by process"), pool.served():
                pass
        finally:
            os.kill(worker, signal.SIGCONT)
        await until(lambda: not alive(worker))
        with pool.served():
            pass
        await client.close()


# The end, and what is between


@pytest.mark.parametrize("tls", [False, True])
async def test_told_to_stop_every_worker_answers_what_was_asked(pool: Pool, tmp_path: Path, tls: bool) -> None:
    args = ("--tls-certificates", certificates()) if tls else ()
    context = trusting() if tls else None
    with program(pool.path, "--socket", tmp_path / "s", "--workers", "2", *args) as process:
        uri = ready(process)[0]
        clients = [await Client.connect(uri.replace("///", f"///{name}"), tls=context) for name in (*CLONES, *CLONES)]
        for client in clients:
            await client.pwrite(b"x" * 4096, 0)
        reads = [asyncio.create_task(client.pread(MIB, MIB)) for client in clients for _ in range(8)]
        await asyncio.sleep(0)
        assert await asyncio.to_thread(end, process) == (0, "")
        # What was taken was answered; what was not, was left by a closed connection.
        answers = await asyncio.gather(*reads, return_exceptions=True)
        assert all(isinstance(answer, OSError) or answer == BASE[MIB : 2 * MIB] for answer in answers)
        for client in clients:
            await client.close()
    for name in CLONES:
        with pool.open_clone(name) as clone:
            assert clone.pread(4096, 0) == b"x" * 4096


async def test_signals_to_the_whole_group_end_it_as_if_to_the_supervisor_alone(pool: Pool, tmp_path: Path) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        with program(pool.path, "--socket", tmp_path / "s", "--workers", "2", process_group=0) as process:
            ready(process)
            client = await Client.connect(str(tmp_path / "s"), "web1")
            await client.pwrite(b"y" * 512, 0)
            os.killpg(process.pid, number)
            assert process.wait(10) == 0
            assert process.stderr is not None
            assert process.stderr.read() == ""
            await client.close()


async def test_a_reload_reaches_every_worker(pool: Pool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "nbdclone")
    async with supervised(pool) as server:
        clients = [await Client.connect(where(server, name)) for name in CLONES]
        assert len({holder(pool, name) for name in CLONES}) == 2
        pool.settings_path.write_text('[access."*"]\nuids = []\n')
        server.reload()
        await until(lambda: "the settings were read again" in caplog.text)
        for name in (*CLONES, *CLONES):
            with pytest.raises(ServerRefused, match="no base or clone"):
                await Client.connect(where(server, name))
        assert await Client.list(server.uris[0]) == []
        pool.settings_path.write_text("nonsense")
        server.reload()
        assert "the settings stay as they were" in caplog.text
        for pid in children():  # and the next ones have the rules that hold, not what is in the file
            os.kill(pid, signal.SIGKILL)
        await until(lambda: caplog.text.count("SIGKILL") == 2)
        with pytest.raises(ServerRefused, match="no base or clone"):
            await Client.connect(where(server, "web1"))
        for client in clients:
            await client.close()


async def test_limits_and_new_ones_hold_in_every_worker(eight: Pool) -> None:
    async with supervised(
        eight, sockets=[eight.path.parent / "nbd.sock"], options=Options(limit=Limit(iops=20))
    ) as server:
        clients = [await Client.connect(where(server, name)) for name in EIGHT]
        try:
            began = time.monotonic()
            await asyncio.gather(*(client.pread(512, 0) for client in clients for _ in range(10)))
            assert time.monotonic() - began >= (10 - 2 - 20 * BURST_S) / 20
            eight.settings_path.write_text('[limit."*"]\niops = "none"\n')
            server.reload()
            await asyncio.sleep(0.5)
            began = time.monotonic()
            await asyncio.gather(*(client.pread(512, 0) for client in clients for _ in range(100)))
            assert time.monotonic() - began < (100 - 20 * BURST_S) / 20
        finally:
            for client in clients:
                await client.close()


async def test_the_subject_of_a_certificate_goes_with_a_connection_that_is_moved(pool: Pool, tmp_path: Path) -> None:
    pool.settings_path.write_text('[access.web1]\nsubjects = ["CN=web1"]\n[access.web2]\nsubjects = ["CN=web2"]\n')
    path = tmp_path / "s"
    async with supervised(pool, sockets=[path], tls=ServerTLS(certificates())) as server:
        context = trusting(certificates() / "web1")
        clients = [await Client.connect(where(server, "web1"), tls=context)]
        await until(lambda: len(server._owners.available) == 2)
        clients += [await Client.connect(where(server, "web1"), tls=context) for _ in range(3)]
        assert any(connection.relay for connection in server._owners._connections.values())
        for client in clients:
            assert await client.pread(512, 0) == BASE[:512]
            with pytest.raises(ServerRefused, match="no base or clone"):
                await Client.connect(where(server, "web2"), tls=context)
            await client.close()


async def test_a_limit_on_connections_is_for_all_workers_together(pool: Pool, tmp_path: Path) -> None:
    async with supervised(pool, sockets=[tmp_path / "s"], max_connections=4, max_connections_per_address=4) as server:
        clients = [await Client.connect(where(server, name)) for name in (*CLONES, *CLONES)]
        async with await Peer.connect(server) as peer:
            assert await peer.is_closed()
        await clients.pop().close()
        await until(lambda: len(server._peers) == 3)
        clients.append(await Client.connect(where(server, "web1")))
        for client in clients:
            await client.close()


async def test_requests_that_follow_a_go_at_once_move_with_it(pool: Pool) -> None:
    async with supervised(pool) as server:
        other = await Client.connect(where(server, "web2"))
        for _ in range(4):
            async with await Peer.open(server, "web1") as first, await Peer.open(server, "web1") as second:
                for peer in (first, second):
                    assert (await peer.run(CMD_READ, 0, 512)).data == BASE[:512]
        await other.close()


def test_memory_is_divided_evenly_and_there_are_no_more_workers_than_it_is_enough_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "cores", lambda: 8)
    assert divide_memory(1 << 30, None) == (4, 1 << 28)
    assert divide_memory(1 << 30, 2) == (2, 1 << 29)
    assert divide_memory(MIN_MEMORY, None) == (1, MIN_MEMORY)
    count, share = divide_memory(None, None)
    assert share >= MIN_MEMORY
    assert 1 <= count <= 8
    with pytest.raises(UsageError, match="too few for 8 workers"):
        divide_memory(1 << 30, 8)
    with pytest.raises(UsageError, match="too few: the least is"):
        divide_memory(MIN_MEMORY - 1, None)
