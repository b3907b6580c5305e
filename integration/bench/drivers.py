"""The programs that put a load on a server. A driver goes from URIs and a workload to an ``Outcome``."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from integration.bench.workloads import Workload
from integration.packages import program

# What a driver may take beyond its runtime, for starting and for what is in flight at the end.
GRACE_S = 60.0
# qemu-img bench is told a number of requests: so many to learn how long they take, and then what fills the runtime.
TRIAL_REQUESTS = 2000
# It goes from request to request by this step, around the end of the disk: far apart, and each block once in a while.
QEMU_IMG_STEP = (1 << 20) + 4096
NBDCOPY_REQUEST = 256 << 10


class DriverFailed(Exception):
    """The load driver failed, or was killed at its deadline."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the driver saw. Latencies in microseconds, of the slower direction; of the flush, where writes are synced.

    None where the driver does not say.
    """

    requests: int
    iops: float
    mb_per_s: float
    p50_us: float | None = None
    p99_us: float | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """What a driver is told besides the workload: bytes of each clone, seconds, and a raw image to copy from."""

    size: int
    runtime_s: float
    image: Path


def run_fio(uris: Sequence[str], workload: Workload, load: Load) -> Outcome:
    """One client for each URI, all at once."""
    command = [
        *_fio(workload.rw, workload.block_size, workload.depth, load.size),
        f"--numjobs={workload.connections}", f"--runtime={round(load.runtime_s * 1000)}ms",
    ]  # fmt: skip
    if not workload.once:
        command += ["--time_based", "--norandommap"]
    if workload.read_percent is not None:
        command.append(f"--rwmixread={workload.read_percent}")
    if workload.sync_every:
        command.append(f"--fsync={workload.sync_every}")
    return parse_fio(execute(command + _jobs(uris), load), synced=workload.sync_every > 0)


def write_with_fio(uri: str, rw: str, block_size: int, depth: int, load: Load, *more: str) -> None:
    """Write before a measurement, to the end, and flush."""
    execute([*_fio(rw, block_size, depth, load.size), "--end_fsync=1", *more, *_jobs([uri])], load)


def _fio(rw: str, block_size: int, depth: int, size: int) -> list[str]:
    return [
        program("fio"), "--output-format=json", "--group_reporting", "--ioengine=nbd", f"--rw={rw}",
        f"--bs={block_size}", f"--iodepth={depth}", f"--size={size}",
    ]  # fmt: skip


def _jobs(uris: Sequence[str]) -> list[str]:
    return [word for number, uri in enumerate(uris) for word in (f"--name=load{number}", f"--uri={uri}")]


def run_nbdcopy(uris: Sequence[str], workload: Workload, load: Load) -> Outcome:
    """Whole copies, one after the other until the time has passed; into a clone it is one."""
    (uri,) = uris
    command = [program("nbdcopy"), uri, "null:"]
    if workload.writes:
        command = [program("nbdcopy"), "--flush", str(load.image), uri]
    began = time.monotonic()
    copied, passed = 0, 0.0
    while copied == 0 or (not workload.once and passed < load.runtime_s):
        execute(command, load)
        copied += load.size
        passed = time.monotonic() - began
    return Outcome(copied // NBDCOPY_REQUEST, copied / NBDCOPY_REQUEST / passed, copied / passed / 1e6)


def run_qemu_img(uris: Sequence[str], workload: Workload, load: Load) -> Outcome:
    (uri,) = uris
    command = [
        program("qemu-img"), "bench", "-f", "raw", "-s", str(workload.block_size), "-d", str(workload.depth),
        "-S", str(QEMU_IMG_STEP),
    ]  # fmt: skip
    if workload.writes:
        command.append("-w")
    trial_s = parse_qemu_img(execute([*command, "-c", str(TRIAL_REQUESTS), uri], load))
    requests = max(TRIAL_REQUESTS, round(TRIAL_REQUESTS * load.runtime_s / max(trial_s, 1e-3)))
    took_s = parse_qemu_img(execute([*command, "-c", str(requests), uri], load))
    iops = requests / took_s
    return Outcome(TRIAL_REQUESTS + requests, iops, iops * workload.block_size / 1e6)


DRIVERS: dict[str, Callable[[Sequence[str], Workload, Load], Outcome]] = {
    "fio": run_fio,
    "nbdcopy": run_nbdcopy,
    "qemu-img": run_qemu_img,
}


def execute(command: Sequence[str], load: Load) -> str:
    """What the program printed. Raises DriverFailed."""
    # fio forks its jobs: a session of their own lets the deadline reach all of them, and nobody else.
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd="/tmp", start_new_session=True,
    )  # fmt: skip
    name = Path(command[0]).name
    try:
        stdout, stderr = process.communicate(timeout=load.runtime_s + GRACE_S)
    except subprocess.TimeoutExpired:
        raise DriverFailed(f"{name} was killed {GRACE_S:.0f} seconds after its runtime had passed") from None
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode:
        raise DriverFailed(f"{name} exited with status {process.returncode}: {(stderr or stdout).strip()[-1000:]}")
    return stdout


def parse_qemu_img(stdout: str) -> float:
    """The seconds that `qemu-img bench` says it took."""
    found = re.search(r"^Run completed in ([0-9.]+) seconds", stdout, re.M)
    if found is None or not float(found[1]):
        raise DriverFailed(f"qemu-img bench did not say how long it took: {stdout[-200:]!r}")
    return float(found[1])


def parse_fio(stdout: str, *, synced: bool) -> Outcome:
    """What fio's JSON says of the group of all jobs; its engines print lines of their own before it."""
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
