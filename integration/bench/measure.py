"""One measurement: run the load driver against a server, and read what came out and what it cost.

A driver is a function from a URI and a workload to an ``Outcome``; fio is the only one now.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from integration.bench.peers import Running
from integration.bench.workloads import Workload
from integration.packages import program

# What fio may take beyond its runtime, for starting and for what is in flight at the end.
GRACE_S = 30.0
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class DriverFailed(Exception):
    """The load driver failed, or was killed at its deadline."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the driver saw. Latencies in microseconds, of the slower direction; of the flush, where each is synced."""

    requests: int
    iops: float
    mb_per_s: float
    p50_us: float
    p99_us: float


@dataclass(frozen=True, slots=True)
class Measurement:
    """An outcome and what it took: CPU time of the server per request, and the most memory that it had."""

    iops: float
    mb_per_s: float
    p50_us: float
    p99_us: float
    cpu_us: float
    peak_rss_mb: float


def measure(server: Running, workload: Workload, size: int, runtime_s: float) -> Measurement:
    """Raises DriverFailed."""
    before = cpu_seconds(server.pid)
    outcome = run_fio(server.uri, workload, size, runtime_s)
    spent = cpu_seconds(server.pid) - before
    return Measurement(
        outcome.iops,
        outcome.mb_per_s,
        outcome.p50_us,
        outcome.p99_us,
        cpu_us=spent * 1e6 / outcome.requests,
        peak_rss_mb=memory_mb(server.pid, "VmHWM"),
    )


def run_fio(uri: str, workload: Workload, size: int, runtime_s: float) -> Outcome:
    command = [
        program("fio"), "--output-format=json", "--name=load", "--ioengine=nbd", f"--uri={uri}",
        f"--rw={workload.rw}", f"--bs={workload.block_size}", f"--iodepth={workload.depth}", f"--size={size}",
        "--norandommap", "--time_based", f"--runtime={round(runtime_s * 1000)}ms",
    ]  # fmt: skip
    if workload.read_percent is not None:
        command.append(f"--rwmixread={workload.read_percent}")
    if workload.synced:
        command.append("--fsync=1")
    # fio forks its jobs: a session of their own lets the deadline reach all of them, and nobody else.
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd="/tmp", start_new_session=True,
    )  # fmt: skip
    try:
        stdout, stderr = process.communicate(timeout=runtime_s + GRACE_S)
    except subprocess.TimeoutExpired:
        raise DriverFailed(f"fio was killed {GRACE_S:.0f} seconds after its runtime had passed") from None
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode:
        raise DriverFailed(f"fio exited with status {process.returncode}: {(stderr or stdout).strip()[-1000:]}")
    return parse_fio(stdout, synced=workload.synced)


def parse_fio(stdout: str, *, synced: bool) -> Outcome:
    """What fio's JSON says; its engines print lines of their own before it."""
    try:
        (job,) = json.loads(stdout[stdout.index("{") :])["jobs"]
    except ValueError as error:
        raise DriverFailed(f"fio printed no JSON ({error}): {stdout[:200]!r}") from None
    directions = [job[name] for name in ("read", "write") if job[name]["total_ios"]]
    if job["error"] or not directions:
        raise DriverFailed(f"fio did nothing, or failed: error {job['error']}")
    latencies = [job["sync"]["lat_ns"]] if synced else [direction["clat_ns"] for direction in directions]
    return Outcome(
        requests=sum(direction["total_ios"] for direction in directions),
        iops=sum(direction["iops"] for direction in directions),
        mb_per_s=sum(direction["bw_bytes"] for direction in directions) / 1e6,
        p50_us=_percentile_us(latencies, "50.000000"),
        p99_us=_percentile_us(latencies, "99.000000"),
    )


def _percentile_us(latencies: list[dict[str, Any]], which: str) -> float:
    return max(float(latency["percentile"][which]) for latency in latencies) / 1000


# What a server takes, from /proc (man 5 proc)


def cpu_seconds(pid: int) -> float:
    """CPU time, user and system, of a process with all its descendants, those that have ended included."""
    ticks = 0
    for process in process_tree(pid):
        # The second field is the name, in parentheses, with anything in it: fields are counted from its end.
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ticks += sum(map(int, fields[11:15]))  # utime, stime, cutime, cstime
    return ticks / TICKS_PER_SECOND


def memory_mb(pid: int, field: str) -> float:
    """``VmRSS`` or ``VmHWM`` of a process with all its descendants, in MB."""
    kib = 0
    for process in process_tree(pid):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith(field + ":"):
                kib += int(line.split()[1])
    return kib * 1024 / 1e6


def process_tree(pid: int) -> Iterator[int]:
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            children = (task / "children").read_text().split()
        except FileNotFoundError:  # a thread that has just ended; what it started belongs to another by now
            continue
        for child in children:
            yield from process_tree(int(child))
