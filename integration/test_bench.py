"""The benchmark measures and reports. How fast anything is, is not a test's business."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from integration.bench import drivers, measure, processes
from integration.bench.cost import measure_costs
from integration.bench.drivers import DriverFailed, Load, parse_fio, parse_qemu_img
from integration.bench.floors import RawServer
from integration.bench.peer import PeerFailed
from integration.bench.peers import all_peers
from integration.bench.processes import PeakMemory, cpu_seconds, has_not_ended, memory_mb, process_count, process_tree
from integration.bench.workloads import QUICK, WORKLOADS
from integration.packages import program, require
from integration.served import REPOSITORY

pytestmark = [pytest.mark.timeout(300), pytest.mark.alone]


def bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "integration.bench", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=240)


def test_quick_run_gives_tables_a_chart_and_the_raw_figures(tmp_path: Path) -> None:
    require("fio", "qemu-utils", "gcc", "libc6-dev")
    done = bench(
        *("--quick", "--runtime", "0.3", "--size", "32", "--only", "randread-4k-16", "syncwrite-4k-1"),
        *("--servers", "nbdclone", "qemu-nbd", "raw"),
        *("--output", tmp_path / "output", "--directory", tmp_path / "work"),
    )

    assert done.returncode == 0, done.stderr
    fragment = (tmp_path / "output" / "benchmarks.md").read_text()
    assert done.stdout.strip() == fragment.strip()
    assert "| 4k random read, depth 16 " in fragment
    assert "| 4k random write, each synced, depth 1 " in fragment
    assert "failed" not in fragment
    raw = json.loads((tmp_path / "output" / "benchmarks.json").read_text())
    turns = {(record["server"], record["workload"]) for record in raw["records"]}
    assert len(turns) == 6
    assert all(record["measurement"]["iops"] > 0 for record in raw["records"])
    assert all(record["measurement"]["peak_rss_mb"] > 0 for record in raw["records"])
    assert (tmp_path / "output" / "benchmarks.svg").read_text().count("<rect") > 4
    assert list((tmp_path / "work").iterdir()) == [], "the run left something behind"

    again = bench("--from", tmp_path / "output" / "benchmarks.json", "--output", tmp_path / "again")
    assert again.stdout == done.stdout
    assert (tmp_path / "again" / "benchmarks.json").read_text() == (tmp_path / "output" / "benchmarks.json").read_text()


def test_a_directory_in_memory_is_refused(tmp_path: Path) -> None:
    require("fio", "qemu-utils", "nbdkit")
    done = bench(
        *("--quick", "--servers", "nbdclone", "--only", "read-*"),
        *("--directory", "/dev/shm/nbdclone-bench", "--output", tmp_path),
    )
    Path("/dev/shm/nbdclone-bench").rmdir()
    assert done.returncode == 1
    assert "is on tmpfs" in done.stderr


def test_an_unknown_workload_is_wrong_usage_and_the_error_lists_the_known() -> None:
    done = bench("--only", "nonsense")
    assert done.returncode == 2
    assert all(workload.name in done.stderr for workload in WORKLOADS)


def test_the_quick_run_has_a_line_of_each_family() -> None:
    families = {workload.family for workload in WORKLOADS if not workload.is_real}
    assert {workload.family for workload in WORKLOADS if workload.name in QUICK} == families


def test_names_and_titles_of_workloads_are_of_one_each() -> None:
    assert len({workload.name for workload in WORKLOADS}) == len(WORKLOADS)
    assert len({workload.title for workload in WORKLOADS}) == len(WORKLOADS)


def test_costs_are_measured_on_a_small_pool(tmp_path: Path) -> None:
    costs = measure_costs(tmp_path, size=64 << 20, clones=30)
    assert all(cost.value > 0 for cost in costs)
    assert any("listing 30 clones" in cost.what for cost in costs)


# The servers


def test_every_server_can_do_the_plain_lines_and_says_why_it_cannot_do_others() -> None:
    (first,) = [workload for workload in WORKLOADS if workload.name == "randread-4k-1"]
    for peer in all_peers():
        assert peer.lacks(first) == ""
        assert all(peer.lacks(it) == "" for it in WORKLOADS) == (peer.name in ("nbdclone", "qemu-nbd"))


def test_raw_server_in_c_keeps_what_is_written_and_answers_errors(tmp_path: Path) -> None:
    require("gcc", "libc6-dev", "fio", "libnbd-bin")
    base = tmp_path / "base.raw"
    base.write_bytes(os.urandom(8 << 20))
    new = tmp_path / "new.raw"
    new.write_bytes(os.urandom(8 << 20))
    (own := tmp_path / "own").mkdir()
    raw = RawServer()
    raw.prepare(base, own, tmp_path)
    (writing,) = [it for it in WORKLOADS if it.name == "randwrite-4k-1"]
    for workload in (writing, replace(writing, transport="tcp")):
        (turn := tmp_path / workload.transport).mkdir()
        with raw.serving(turn, workload) as server:
            verify = ["--rw=randwrite", "--bsrange=512-1m", "--iodepth=16", "--size=8m", "--verify=crc32c"]
            load = ["--name=v", "--ioengine=nbd", f"--uri={server.uris[0]}"]
            subprocess.run([program("fio"), *load, *verify], check=True, capture_output=True, cwd=tmp_path, timeout=60)
            nbdcopy(new, server.uris[0], "--flush")
            nbdcopy(server.uris[0], tmp_path / "back.raw")
            assert (tmp_path / "back.raw").read_bytes() == new.read_bytes()
    assert base.read_bytes() != new.read_bytes()


def test_a_chain_has_all_its_layers_and_is_served_as_it_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("fio", "qemu-utils")
    monkeypatch.setattr(measure, "LAYERS", 3)
    (peer,) = [it for it in all_peers() if it.name == "qemu-nbd"]
    (workload,) = [it for it in WORKLOADS if it.name == "chain-read-256k-4"]
    base = tmp_path / "base.raw"
    base.write_bytes(bytes(4 << 20))
    (own := tmp_path / "own").mkdir()
    peer.prepare(base, own, tmp_path)
    (turn := tmp_path / "turn").mkdir()
    measure.build_chain(peer, workload, Load(4 << 20, 0.2, base), turn)
    info = [program("qemu-img"), "info", "--backing-chain", "--output=json", str(own / "layer2.qcow2")]
    images = json.loads(subprocess.run(info, check=True, capture_output=True, timeout=60).stdout)
    assert [Path(image["filename"]).name for image in images] == [
        *(f"layer{number}.qcow2" for number in (2, 1, 0)),
        "base.raw",
    ]
    # All hold something: one that holds nothing has 192 KiB of tables.
    assert all(image["actual-size"] > 1 << 20 for image in images[:-1])
    with peer.serving(turn, workload) as server:
        assert len(server.uris) == 1
        nbdcopy(server.uris[0], tmp_path / "seen.raw")
    assert (tmp_path / "seen.raw").read_bytes() != base.read_bytes()


def nbdcopy(source: str | Path, target: str | Path, *options: str) -> None:
    command = [program("nbdcopy"), *options, str(source), str(target)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def test_a_server_that_does_not_start_is_a_failure_with_what_it_said(tmp_path: Path) -> None:
    require("nbdkit")
    (peer,) = [it for it in all_peers() if it.name == "nbdkit cow"]
    peer.prepare(tmp_path / "absent", tmp_path, tmp_path)
    with pytest.raises(PeerFailed, match=r"before it was ready\n.*absent"), peer.serving(tmp_path, WORKLOADS[0]):
        pytest.fail("there is no such file")
    assert list(tmp_path.iterdir()) == []


# What servers take


@pytest.fixture
def forking() -> Iterator[subprocess.Popen[bytes]]:
    """A process with a child, of 50 MiB each; the parent uses the processor for a while."""
    burn = "import os; b = bytearray(50 << 20); os.fork() or sum(range(10_000_000)); open('/dev/stdin').read()"
    with subprocess.Popen([sys.executable, "-c", burn], stdin=subprocess.PIPE) as process:
        yield process  # both come to an end by themselves when stdin is closed, as it is on leaving this block


def test_cpu_time_and_memory_count_the_children_too(forking: subprocess.Popen[bytes]) -> None:
    while cpu_seconds(forking.pid) < 0.1 or memory_mb(forking.pid, "VmRSS") < 2 * 50:
        assert forking.poll() is None
    assert process_count(forking.pid) == 2
    assert 50 < memory_mb(forking.pid, "Pss") < 100  # which they share


def test_peak_memory_remembers_a_child_that_has_ended() -> None:
    script = """
import os, sys
if not (child := os.fork()):
    block = bytearray(80 << 20)
    print("here", flush=True)
    sys.stdin.read(1)
    os._exit(0)
os.wait()
print("gone", flush=True)
sys.stdin.read(1)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        with PeakMemory([process.pid]) as peak:
            assert process.stdout.readline() == b"here\n"
            while peak.mb < 80:
                assert process.poll() is None
            process.stdin.write(b".")
            assert process.stdout.readline() == b"gone\n"
        assert memory_mb(process.pid, "VmRSS") < 80 < peak.mb
        process.stdin.write(b".")


def test_a_thread_that_ends_while_it_is_read_is_not_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory of a thread can be there when it is listed, and the thread gone when it is read."""
    gone = Path(f"/proc/{os.getpid()}/task/0")  # which no thread is
    calls = []

    def threads(pid: int) -> list[Path]:
        calls.append(pid)
        return [gone, *real(pid)] if len(calls) < 3 else real(pid)

    real = processes._threads
    monkeypatch.setattr(processes, "_threads", threads)
    assert cpu_seconds(os.getpid()) > 0
    assert len(calls) >= 3, "it was not read again"


def test_the_error_of_a_thread_that_is_there_and_cannot_be_read_means_that_it_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def ended(path: Path) -> str:
        raise ProcessLookupError(f"{path}: no such process")

    monkeypatch.setattr(Path, "read_text", ended)
    with pytest.raises(processes._Changed):
        list(process_tree(os.getpid()))


def test_a_process_that_is_not_there_has_no_cpu_time() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    with pytest.raises(ProcessLookupError):
        cpu_seconds(process.pid)


def test_a_zombie_has_ended() -> None:
    assert has_not_ended(os.getpid())
    with subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not has_not_ended(process.pid)
    assert not has_not_ended(process.pid)


def test_threads_that_come_and_go_do_not_disturb_the_reading() -> None:
    churn = (
        "import threading, sys\nover = []\n"
        "threading.Thread(target=lambda: over.append(sys.stdin.read(1)), daemon=True).start()\n"
        "while not over:\n    t = threading.Thread(target=int); t.start(); t.join()\n"
    )
    with subprocess.Popen([sys.executable, "-c", churn], stdin=subprocess.PIPE) as process:
        readings = [cpu_seconds(process.pid) for _ in range(300)]
        assert readings == sorted(readings)
        process.communicate(b".")


# The drivers


def test_fio_is_told_what_the_workload_says(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Sequence[str]] = []

    def execute(command: Sequence[str], load: Load) -> str:
        told.append(command)
        return json.dumps(fio_report(write_us=1, sync_us=1))

    monkeypatch.setattr(drivers, "execute", execute)
    of = {workload.name: workload for workload in WORKLOADS}
    load = Load(1 << 30, 1.5, Path("image"))
    for name in ("randread-4k-16", "first-randwrite-4k-16", "syncwrite16-4k-16", "connections4-randread-4k-16"):
        drivers.run_fio(["nbd://one"], of[name], load)
    drivers.run_fio(["nbd://one", "nbd://two"], of["clones8-randread-4k-16"], load)
    plain, first, synced, connections, clones = told
    assert {"--rw=randread", "--bs=4096", "--iodepth=16", "--time_based", "--runtime=1500ms"} <= set(plain)
    assert {"--norandommap", "--numjobs=1", "--uri=nbd://one", "--size=1073741824"} <= set(plain)
    assert not {"--time_based", "--norandommap"} & set(first), "a block may be written twice"
    assert "--fsync=16" in synced
    assert "--numjobs=4" in connections
    assert [word for word in clones if word.startswith("--uri=")] == ["--uri=nbd://one", "--uri=nbd://two"]
    # What stands before the first job is for all of them.
    assert clones.index("--group_reporting") < clones.index("--name=load0") < clones.index("--name=load1")


def test_a_driver_that_fails_or_does_not_end_says_which_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    load = Load(1 << 20, 0.1, Path("image"))
    with pytest.raises(DriverFailed, match="sh exited with status 3: oh"):
        drivers.execute(["sh", "-c", "echo oh >&2; exit 3"], load)
    monkeypatch.setattr(drivers, "GRACE_S", 0.2)
    with pytest.raises(DriverFailed, match="sleep was killed"):
        drivers.execute(["sleep", "60"], load)


def test_lines_before_the_json_of_fio_are_skipped_and_a_synced_latency_is_that_of_the_flush() -> None:
    said = "fio: connected\n" + json.dumps(fio_report(write_us=10, sync_us=500))
    assert parse_fio(said, synced=False).p50_us == 10
    assert parse_fio(said, synced=True).p50_us == 500
    assert parse_fio(said, synced=True).iops == 1000


@pytest.mark.parametrize("said", ["", "fio: no such engine", "{ broken", json.dumps({"jobs": []})])
def test_what_is_not_a_report_of_fio_is_a_failure_of_the_driver(said: str) -> None:
    with pytest.raises(DriverFailed):
        parse_fio(said, synced=False)


def test_seconds_of_qemu_img_bench_are_those_that_it_prints() -> None:
    assert parse_qemu_img("Sending 10 read requests\nRun completed in 0.481 seconds.\n") == 0.481
    for said in ("", "Sending 10 read requests\n", "Run completed in 0.000 seconds.\n"):
        with pytest.raises(DriverFailed):
            parse_qemu_img(said)


def fio_report(write_us: float, sync_us: float) -> dict[str, object]:
    def latency(us: float) -> dict[str, object]:
        return {"percentile": {"50.000000": us * 1000, "99.000000": us * 1000}}

    write = {"total_ios": 500, "iops": 1000.0, "bw_bytes": 4096000, "clat_ns": latency(write_us)}
    job = {"error": 0, "read": {"total_ios": 0}, "write": write, "sync": {"lat_ns": latency(sync_us)}}
    return {"jobs": [job]}
