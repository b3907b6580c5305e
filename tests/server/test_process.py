"""The server as a process: how it begins, how it ends, and what it costs."""

from __future__ import annotations

import asyncio
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from serving import BASE, CLONES, MIB, PATIENCE_S, Hasty, Peer, make_pool

from nbdclone.client import Client
from nbdclone.errors import ConnectionFailed, InUse, ServerRefused
from nbdclone.protocol.wire import CMD_READ, CMD_WRITE
from nbdclone.store.delta import HEADER_SLOTS
from nbdclone.store.pool import Pool


@contextmanager
def program(
    pool: Path, *args: str | Path, command: list[str] | None = None, **options: object
) -> Iterator[subprocess.Popen[str]]:
    """`nbdclone serve`, or another command that does the like; not waited for."""
    command = command or [sys.executable, "-m", "nbdclone", "--pool", str(pool), "serve", *map(str, args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **(pipes | options)) as process:  # type: ignore[call-overload]
        try:
            yield process
        finally:
            process.kill()


def ready(process: subprocess.Popen[str]) -> list[str]:
    """The URIs in its first line."""
    assert process.stdout is not None
    assert process.stderr is not None
    line = process.stdout.readline()
    assert line.startswith("nbdclone ready on "), line + process.stderr.read()
    return line.split()[3:]


def end(process: subprocess.Popen[str], number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
    """Tell it to stop: exit status, and what it said on stderr."""
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE_S)
    return process.returncode, err


def refused(pool: Path, *args: str | Path) -> str:
    """What it says when it does not begin: one line."""
    with program(pool, *args) as process:
        out, err = process.communicate(timeout=PATIENCE_S)
        assert (process.returncode, out) == (1, "")
        assert re.fullmatch(r"nbdclone: .*\n", err), err
        return str(err)


async def test_its_first_line_says_where_it_listens(pool: Pool, tmp_path: Path) -> None:
    args = (
        "--listen",
        "127.0.0.1:0",
        "--socket",
        tmp_path / "one",
        "--listen",
        "127.0.0.1:0",
        "--socket",
        tmp_path / "two",
    )
    with program(pool.path, *args) as process:
        uris = ready(process)
        assert re.fullmatch(r"nbd://127\.0\.0\.1:\d+ nbd://127\.0\.0\.1:\d+", " ".join(uris[:2]))
        assert uris[2:] == [f"nbd+unix:///?socket={tmp_path / name}" for name in ("one", "two")]
        for uri in uris:
            assert await Client.list(uri) == ["base", *CLONES]
        assert end(process) == (0, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_told_to_stop_it_answers_flushes_removes_its_sockets_and_exits_0(
    pool: Pool, tmp_path: Path, number: signal.Signals
) -> None:
    path = tmp_path / "nbd.sock"
    with program(pool.path, "--socket", path) as process:
        ready(process)
        client = await Client.connect(str(path), "web1")
        await client.pwrite(b"x" * 4096, 0)
        assert await asyncio.to_thread(end, process, number) == (0, "")
        assert not path.exists()
        await client.close()
    with pool.open_clone("web1") as clone:
        assert clone.pread(4096, 0) == b"x" * 4096


def test_a_missing_pool_is_made(tmp_path: Path) -> None:
    with program(tmp_path / "new", "--listen", "127.0.0.1:0") as process:
        ready(process)
        assert end(process) == (0, "")
    assert Pool.open(tmp_path / "new").names() == []


def test_it_listens_on_the_port_of_nbd_when_it_is_told_nothing(pool: Pool) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", 10809))
        except OSError as error:
            pytest.skip(f"the port is taken: {error}")
    with program(pool.path) as process:
        assert ready(process) == ["nbd://127.0.0.1:10809"]
        assert end(process) == (0, "")


def test_it_tells_systemd_that_it_is_ready_and_that_it_stops(pool: Pool, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(PATIENCE_S)
        environment = os.environ | {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        with program(pool.path, "--listen", "127.0.0.1:0", env=environment) as process:
            assert manager.recv(100) == b"READY=1"
            ready(process)
            assert end(process) == (0, "")
        assert manager.recv(100) == b"STOPPING=1"


def test_a_second_server_of_the_pool_names_the_first(pool: Pool, tmp_path: Path) -> None:
    with program(pool.path, "--socket", tmp_path / "one") as process:
        ready(process)
        said = refused(pool.path, "--socket", tmp_path / "two")
        assert f"pool {pool.path} is in use by process {process.pid} (" in said
        assert not (tmp_path / "two").exists()
        assert end(process) == (0, "")


def test_a_second_server_says_so_in_one_exact_line_and_exits_1(pool: Pool, tmp_path: Path) -> None:
    with program(pool.path, "--socket", tmp_path / "one") as process:
        ready(process)
        shown = f"{sys.executable} -m nbdclone --pool {pool.path} serve --socket {tmp_path / 'one'}"[:100]
        assert refused(pool.path, "--socket", tmp_path / "two") == (
            f"nbdclone: pool {pool.path} is in use by process {process.pid} ({shown}) ({pool.path}/.server)\n"
        )


def test_a_server_that_was_killed_leaves_nothing_in_the_way_of_the_next(pool: Pool, tmp_path: Path) -> None:
    for _ in range(3):
        with program(pool.path, "--socket", tmp_path / "sock") as process:
            ready(process)
            process.kill()
    pool.open_clone("web1").close()


def spoil(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        os.pwrite(file.fileno(), b"rotten", offset)


async def test_beside_a_server_that_has_a_clone_open_each_command_is_done_or_refused(
    pool: Pool, tmp_path: Path
) -> None:
    path = tmp_path / "nbd.sock"
    (tmp_path / "new.raw").write_bytes(BASE)

    async def command(*args: str | Path) -> tuple[int | None, str]:
        line = (sys.executable, "-m", "nbdclone", "--pool", str(pool.path), *map(str, args))
        running = await asyncio.create_subprocess_exec(*line, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, err = await asyncio.wait_for(running.communicate(), PATIENCE_S)
        return running.returncode, (err or out).decode()

    with program(pool.path, "--socket", path) as process:
        ready(process)
        who = r"in use by process \d+ \(.* -m nbdclone"  # the server's, or one of its workers
        async with await Client.connect(str(path), "web1") as client:
            await client.pwrite(b"x" * 4096, 0)
            with pytest.raises(InUse, match=f"^clone 'web1' is {who}"):
                pool.open_clone("web1")
            path = pool.path / "bases" / "base" / "image"
            image = pool.places.fs.open(path, os.O_RDONLY)
            with pytest.raises(InUse, match=f"^base 'base' is {who}"):
                pool.places.fs.lock(image, path, "base 'base'")
            os.close(image)
            status, said = await command("rm", "web1")
            assert status == 1
            assert re.match(r"nbdclone: in use, and nothing was removed; connected to 'web1': unix uid \d+", said)
            spoil(pool.path / "clones" / "web1" / "delta", HEADER_SLOTS[1] + 100)
            status, said = await command("check", "--repair", "web1")
            assert status == 1
            assert re.search(f"web1: .*{who}.*it is not repaired while it is open", said)
            assert (await command("quota", "web1", "1G"))[0] == 0
            assert (await command("import", tmp_path / "new.raw"))[0] == 0
            assert (await command("clone", "base", "web9"))[0] == 0
            assert (await command("rm", "web9", "new"))[0] == 0
            assert await client.pread(4096, 0) == b"x" * 4096
        assert end(process)[0] == 0
    with pool.open_clone("web1") as clone:
        assert clone.pread(4096, 0) == b"x" * 4096


def test_where_it_cannot_listen_it_says_so_in_a_line(pool: Pool, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in refused(
            pool.path, "--listen", f"127.0.0.1:{port}"
        )
    assert "cannot listen on 192.0.2.1:0: Cannot assign requested address" in refused(
        pool.path, "--insecure", "--listen", "192.0.2.1:0"
    )
    assert "AF_UNIX path too long" in refused(pool.path, "--socket", tmp_path / ("x" * 120))
    assert "No such file or directory" in refused(pool.path, "--socket", tmp_path / "missing" / "sock")
    assert "is not a pool, and not empty" in refused(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_where_it_may_not_listen_it_says_so_in_a_line(pool: Pool, tmp_path: Path) -> None:
    forbidden = tmp_path / "forbidden"
    forbidden.mkdir(mode=0o700)
    command = [
        sys.executable,
        "-c",
        f"""
import os, sys
from nbdclone.server.listen import listen_unix
from nbdclone.errors import UsageError
from pathlib import Path
from types import SimpleNamespace
os.setuid(65534)
try:
    listen_unix(Path({str(forbidden / "sock")!r}))
except UsageError as error:
    print(error)
""",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE_S)
    assert done.stdout == f"cannot listen on {forbidden}/sock: Permission denied\n"


async def test_the_socket_that_a_killed_server_left_is_replaced(pool: Pool, tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    with program(pool.path, "--socket", path) as process:
        ready(process)
        process.kill()
        process.wait()
    assert path.exists()
    with program(pool.path, "--socket", path) as process:
        ready(process)
        assert await Client.list(str(path)) == ["base", *CLONES]
        assert end(process) == (0, "")


async def test_the_clones_of_a_base_that_was_edited_are_refused_by_a_server_that_serves_the_others(
    pool: Pool, tmp_path: Path
) -> None:
    (tmp_path / "other.raw").write_bytes(b"other" * 4096)
    pool.import_base(tmp_path / "other.raw")
    pool.create_clones("other", ["db1"])
    image = pool.path / "bases" / "base" / "image"
    image.chmod(0o644)
    image.write_bytes(b"edited" + BASE[6:])
    path = tmp_path / "nbd.sock"
    with program(pool.path, "--socket", path) as process:
        ready(process)
        for name in ("base", "web1"):
            with pytest.raises(ServerRefused, match=r"base 'base' was changed after its import .*differs in bytes 0-"):
                await Client.connect(str(path), name)
        async with await Client.connect(str(path), "db1") as client:
            assert await client.pread(5, 0) == b"other"
        status, err = end(process)
        assert status == 0
        assert len(err.splitlines()) == 2
        assert "export 'web1': clone 'web1' is refused: base 'base' was changed" in err


EMBEDDED = """
import asyncio, logging, sys
from nbdclone import Pool, serve

async def main():
    def ready(server):
        asyncio.get_running_loop().add_signal_handler(15, task.cancel)
        print("nbdclone ready on", *server.uris, flush=True)
    task = asyncio.current_task()
    try:
        await serve(Pool.open(sys.argv[1]), listen=(), sockets=[sys.argv[2]], ready=ready)
    except asyncio.CancelledError:
        pass

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("embedded", "complaint"),
    [(True, "cannot accept: [Errno 24] Too many open files"), (False, "a connection was lost: too many open files")],
)
async def test_without_descriptors_it_goes_on_when_there_are_some_again(
    pool: Pool, tmp_path: Path, embedded: bool, complaint: str
) -> None:
    path = tmp_path / "nbd.sock"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (30, 30))

    command = [sys.executable, "-c", EMBEDDED, str(pool.path), str(path)] if embedded else None
    with program(pool.path, "--socket", path, command=command, preexec_fn=limit) as process:
        ready(process)
        loop = asyncio.get_running_loop()
        socks = []
        for _ in range(40):
            sock = socket.socket(socket.AF_UNIX)
            sock.setblocking(False)
            await loop.sock_connect(sock, str(path))
            socks.append(sock)
        await asyncio.sleep(0.2)
        for sock in socks:
            sock.close()
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                client = await Client.connect(str(path), "web1")
                break
            except ConnectionFailed:  # a worker needs a moment to see that those are gone
                assert not embedded
                assert time.monotonic() < deadline
        assert await client.pread(512, 0) == BASE[:512]
        await client.close()
        status, err = end(process)
        assert status == 0
        assert complaint in err


def memory_of(pid: int) -> int:
    """What a server's processes take together, in bytes; what they share is counted once."""
    total = 0
    for process in [pid, *children_of(pid)]:
        found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{process}/smaps_rollup").read_text(), re.M)
        assert found is not None
        total += int(found[1]) << 10
    return total


def children_of(pid: int) -> list[int]:
    """The processes that one has started."""
    return [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]


async def test_a_thousand_clones_that_were_read_and_written_cost_less_than_150_mb(tmp_path: Path) -> None:
    count = 1000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
    names = [f"clone{number}" for number in range(count)]
    pool = make_pool(tmp_path, BASE, *names, fs=Hasty())
    path = tmp_path / "nbd.sock"
    with program(pool.path, "--socket", path) as process:
        server = SimpleNamespace(uris=ready(process))
        peers = []

        for name in names:
            peer = await Peer.open(server, name)
            await peer.send(
                peer.request(CMD_READ, 0, 4096, cookie=1),
                peer.request(CMD_WRITE, 2 * MIB, payload=b"x" * 512, cookie=2),
            )
            assert (await peer.replies(2))[1].data == BASE[:4096]
            peers.append(peer)
        idle = memory_of(process.pid)
        for peer in peers:
            peer.close()
        assert idle < 150 << 20
        assert len(await Client.list(server.uris[0])) == count + 1
        process.kill()
        process.wait()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
