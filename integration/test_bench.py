"""The benchmark measures and reports. How fast anything is, is not a test's business."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from integration.bench import report
from integration.bench.cost import Cost, measure_costs
from integration.bench.machine import Machine
from integration.bench.measure import DriverFailed, Measurement, cpu_seconds, memory_mb, parse_fio
from integration.bench.workloads import WORKLOADS
from integration.packages import require
from integration.served import REPOSITORY

pytestmark = pytest.mark.timeout(300)


def bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "integration.bench", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=240)


def test_quick_run_gives_a_table_and_the_raw_figures(tmp_path: Path) -> None:
    require("fio", "qemu-utils")
    done = bench(
        *("--quick", "--runtime", "0.3", "--size", "64", "--rounds", "1", "--only", "randread-4k-16", "syncwrite-4k-1"),
        *("--servers", "nbdclone", "qemu-nbd", "--output", tmp_path / "output", "--directory", tmp_path / "work"),
    )

    assert done.returncode == 0, done.stderr
    fragment = (tmp_path / "output" / "benchmarks.md").read_text()
    assert done.stdout.strip() == fragment.strip()
    assert "| 4k random read, depth 16 " in fragment
    assert "| 4k random write, each synced, depth 1 " in fragment
    assert "failed" not in fragment
    raw = json.loads((tmp_path / "output" / "benchmarks.json").read_text())
    turns = {(record["server"], record["workload"]) for record in raw["records"]}
    assert len(turns) == 4
    assert all(record["measurement"]["iops"] > 0 for record in raw["records"])
    assert list((tmp_path / "work").iterdir()) == [], "the run left something behind"


def test_a_directory_in_memory_is_refused(tmp_path: Path) -> None:
    require("fio", "qemu-utils", "nbdkit")
    done = bench("--quick", "--directory", "/dev/shm/nbdclone-bench", "--output", tmp_path)
    Path("/dev/shm/nbdclone-bench").rmdir()
    assert done.returncode == 1
    assert "is on tmpfs" in done.stderr


def test_an_unknown_workload_is_wrong_usage_and_the_error_lists_the_known() -> None:
    done = bench("--only", "nonsense")
    assert done.returncode == 2
    assert all(workload.name in done.stderr for workload in WORKLOADS)


def test_costs_are_measured_on_a_small_pool(tmp_path: Path) -> None:
    costs = measure_costs(tmp_path, size=64 << 20, clones=30)
    assert all(cost.value > 0 for cost in costs)
    assert any("listing 30 clones" in cost.what for cost in costs)


def test_cpu_time_and_memory_count_the_children_too() -> None:
    burn = "import os; b = bytearray(50 << 20); os.fork() or sum(range(10_000_000)); open('/dev/stdin').read()"
    with subprocess.Popen([sys.executable, "-c", burn], stdin=subprocess.PIPE) as process:
        # Both come to an end by themselves when stdin is closed, as it is on leaving this block.
        while cpu_seconds(process.pid) < 0.1 or memory_mb(process.pid, "VmRSS") < 2 * 50:
            assert process.poll() is None


def test_lines_before_the_json_of_fio_are_skipped_and_a_synced_latency_is_that_of_the_flush() -> None:
    said = "fio: connected\n" + json.dumps(fio_report(write_us=10, sync_us=500))
    assert parse_fio(said, synced=False).p50_us == 10
    assert parse_fio(said, synced=True).p50_us == 500
    assert parse_fio(said, synced=True).iops == 1000


@pytest.mark.parametrize("said", ["", "fio: no such engine", "{ broken", json.dumps({"jobs": []})])
def test_what_is_not_a_report_of_fio_is_a_failure_of_the_driver(said: str) -> None:
    with pytest.raises(DriverFailed):
        parse_fio(said, synced=False)


def test_a_ratio_is_the_median_of_the_ratios_within_rounds() -> None:
    # The machine became ten times slower in the last round; the ratio of the medians would be 1.
    results = results_of({"nbdclone": [200.0, 400.0, 30.0], "qemu-nbd": [100.0, 200.0, 10.0]})
    assert results.ratio("nbdclone", WORKLOADS[0].name) == 2.0
    assert results.median("nbdclone", WORKLOADS[0].name, "iops") == 200.0


def test_goals_say_whether_they_are_met() -> None:
    missed = results_of({"nbdclone": [300.0], "qemu-nbd": [200.0]}, "randread-4k-16")
    assert "depth 16: at least 2 times qemu-nbd | 1.50 | **not met** |" in text_of(missed)
    reached = results_of({"nbdclone": [500.0], "qemu-nbd": [200.0]}, "randread-4k-16")
    assert "depth 16: at least 2 times qemu-nbd | 2.50 | met |" in text_of(reached)
    assert "| listing: less than 1 s | 0.50 s | met |" in text_of(reached)


def test_a_turn_that_failed_is_reported_and_the_others_stand() -> None:
    results = results_of({"nbdclone": [300.0], "qemu-nbd": []})
    assert "| 4k random read, depth 1 | 300 | failed |" in text_of(results)
    assert "qemu-nbd, randread-4k-1: it broke" in text_of(results)


def text_of(results: report.Results) -> str:
    """The report without the spaces that align its tables."""
    return re.sub(" +", " ", report.to_markdown(results))


def fio_report(write_us: float, sync_us: float) -> dict[str, object]:
    def latency(us: float) -> dict[str, object]:
        return {"percentile": {"50.000000": us * 1000, "99.000000": us * 1000}}

    write = {"total_ios": 500, "iops": 1000.0, "bw_bytes": 4096000, "clat_ns": latency(write_us)}
    job = {"error": 0, "read": {"total_ios": 0}, "write": write, "sync": {"lat_ns": latency(sync_us)}}
    return {"jobs": [job]}


def results_of(iops: dict[str, list[float]], workload: str = WORKLOADS[0].name) -> report.Results:
    """Results of one workload; a server without figures failed."""
    records = []
    for server, figures in iops.items():
        if not figures:
            records.append(report.Record(0, server, workload, None, "it broke"))
        for number, figure in enumerate(figures):
            records.append(report.Record(number, server, workload, Measurement(figure, 1, 1, 1, 1, 1)))
    return report.Results(
        date="today",
        command="bench",
        machine=Machine("cpu", os.cpu_count() or 1, 1.0, "Linux", "ext4"),
        driver="fio",
        rounds=1,
        runtime_s=1,
        size=1 << 20,
        servers=[report.Server(name, "1", durable_flush=True) for name in iops],
        workloads=[it for it in WORKLOADS if it.name == workload],
        records=records,
        costs=[Cost("listing", 0.5, "s", limit=1)],
    )
