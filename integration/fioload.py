"""fio, writing and reading back what it wrote, with the latency of each request: a load to do something else beside.

    with Load(server.uri("web1"), directory, "web1") as load:
        ...
        began, ended = time.time(), time.time()
        load.end()                                  # AssertionError if a block was not what fio wrote
    load.latency([(began, ended)])                  # {"requests": ..., "p50_ms": ..., ...}

fio's blocks begin with a header that says where they belong, and a checksum: :func:`require_fio_blocks` finds one that
is missing, or not whole, in an image that fio never saw.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from integration.packages import program

MIB = 1 << 20
# What fio writes to: the first bytes of the disk. Small enough that each block is rewritten again and again.
REGION = 32 * MIB
# Reads, and as many writes, a second: well below what the server can do, so that the latency is that of a request and
# not of a queue.
RATE = 1500
# Written, then read back and compared: so many blocks at a time.
BACKLOG = 2000
PATIENCE_S = 60.0

_VERIFY = ("--bs=4k", f"--size={REGION}", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0")


def fill(uri: str) -> None:
    """Write all of the region once: each block of it is one of fio's from then on."""
    _run("--name=fill", "--ioengine=nbd", f"--uri={uri}", "--rw=write", "--iodepth=16", "--do_verify=0", *_VERIFY)


def require_fio_blocks(image: Path) -> None:
    """Each block of the region is one that fio wrote there, whole: of whichever time."""
    _run("--name=look", "--ioengine=psync", f"--filename={image}", "--readonly", "--rw=read", *_VERIFY)


def _run(*args: str) -> None:
    done = subprocess.run(
        [program("fio"), *args], check=False, capture_output=True, text=True, timeout=PATIENCE_S, cwd="/"
    )
    assert done.returncode == 0, done.stdout + done.stderr


class Load:
    """fio at work on an export until it is ended: random reads and writes of 4 KiB, verified."""

    def __init__(self, uri: str, directory: Path, name: str, *, depth: int = 4, rate: int = RATE) -> None:
        self.name = name
        self._log = directory / f"fio-{name}"
        self._output = directory / f"fio-{name}.json"
        # One process: fio's own would outlive it, and say without end that its server has gone.
        command = [
            program("fio"), "--thread", "--name=load", "--ioengine=nbd", f"--uri={uri}", "--rw=randrw",
            f"--iodepth={depth}", "--do_verify=1", f"--verify_backlog={BACKLOG}", f"--rate_iops={rate}",
            "--randrepeat=0", "--time_based", "--runtime=3600", *_VERIFY, "--log_unix_epoch=1",
            f"--write_lat_log={self._log}", "--output-format=json", f"--output={self._output}",
        ]  # fmt: skip
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=directory)

    def __enter__(self) -> Load:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._process.poll() is None:
            self._process.kill()
        said, _ = self._process.communicate()
        if error is not None:
            error.add_note(f"fio of '{self.name}' said:\n{said.decode(errors='replace')[-4000:]}")

    def require_running(self) -> None:
        """It ends by itself only when something is wrong."""
        assert self._process.poll() is None, f"fio of '{self.name}' has ended"

    def wait_for_enough(self) -> None:
        """Go on for as long as it takes to verify something."""
        time.sleep(2 * BACKLOG / RATE)

    def end(self) -> dict[str, Any]:
        """Stop; what fio has to say of it. AssertionError if there was any error."""
        self.require_running()
        self._process.send_signal(signal.SIGINT)
        self._process.wait(PATIENCE_S)
        text = self._output.read_text()
        [job] = json.loads(text[text.index("{") :])["jobs"]
        assert job["error"] == 0, text
        assert min(job[kind]["total_ios"] for kind in ("read", "write")) > BACKLOG, "nothing was verified"
        found: dict[str, Any] = job
        return found

    def latency(self, windows: Sequence[tuple[float, float]]) -> dict[str, float]:
        """Of the requests that were completed in these spans of Unix time, once it has ended."""
        log = Path(f"{self._log}_clat.1.log")
        found: list[float] = []
        for line in log.read_text().splitlines():
            when, nanoseconds = line.split(",")[:2]
            if any(began <= int(when) / 1000 <= ended for began, ended in windows):
                found.append(int(nanoseconds) / 1e6)
        return {"requests": len(found)} | _percentiles(sorted(found))


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    at = {"p50_ms": 0.5, "p99_ms": 0.99, "max_ms": 1.0}
    return {name: round(values[min(int(part * len(values)), len(values) - 1)], 3) for name, part in at.items()}
