"""What processes take, from /proc (man 5 proc): each counts with all its descendants, which come and go meanwhile."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
SAMPLE_INTERVAL_S = 0.2
# A tree in which something ends while it is read is read again: what had ended counts for its parent by then.
ATTEMPTS = 20
RETRY_S = 0.005

# A process or thread that has ended: its directory is not there (ENOENT), or is and cannot be read (ESRCH).
_ENDED = (FileNotFoundError, ProcessLookupError)


class _Changed(Exception):
    """A descendant ended while the tree was read."""


def cpu_seconds(pid: int) -> float:
    """CPU time, user and system, of a process with all its descendants, those that have ended included."""

    def ticks(process: int) -> int:
        # The second field is the name, in parentheses, with anything in it: fields are counted from its end.
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15]))  # utime, stime, cutime, cstime

    return _sum_of_tree(pid, ticks) / TICKS_PER_SECOND


def memory_mb(pid: int, field: str) -> float:
    """``VmRSS`` or ``VmHWM`` of a process with all its descendants, in MB; what they share counts for each. Or ``Pss``:
    what they share counts once.
    """
    file = "smaps_rollup" if field == "Pss" else "status"

    def kib(process: int) -> int:
        for line in Path(f"/proc/{process}/{file}").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1])
        return 0  # it has ended, and nobody has waited for it yet

    return _sum_of_tree(pid, kib) * 1024 / 1e6


def process_count(pid: int) -> int:
    """A process and its descendants: how many."""
    return _sum_of_tree(pid, lambda _process: 1)


def _sum_of_tree(pid: int, value: Callable[[int], int]) -> int:
    """ProcessLookupError when the process itself is not there."""
    for attempt in range(ATTEMPTS):
        try:
            return sum(map(value, list(process_tree(pid))))
        except _ENDED:
            pass
        except _Changed:
            if attempt == ATTEMPTS - 1:
                break
        if not Path(f"/proc/{pid}").exists():
            raise ProcessLookupError(f"process {pid} has ended")
        time.sleep(RETRY_S)
    raise ProcessLookupError(f"the processes below {pid} do not hold still")


def process_tree(pid: int) -> Iterator[int]:
    """A process and its descendants. Raises _Changed when a thread ends meanwhile: its children have another parent."""
    yield pid
    for task in _threads(pid):
        try:
            children = (task / "children").read_text().split()
        except _ENDED:
            raise _Changed from None
        for child in children:
            yield from process_tree(int(child))


def _threads(pid: int) -> list[Path]:
    try:
        return list(Path(f"/proc/{pid}/task").iterdir())
    except _ENDED:
        raise _Changed from None


def has_not_ended(pid: int) -> bool:
    """Does it run? Also for a process that is nobody's here, which its parent may leave a zombie for a while."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except _ENDED:
        return False


class PeakMemory:
    """The most memory that processes had together while the block ran, in MB: of samples, and of the end.

    A sample is the sum of what each had at its own peak, so that only a process that lived between two samples is
    missed.
    """

    def __init__(self, pids: Sequence[int]) -> None:
        self.mb = 0.0
        self._pids = pids
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        is_over = False
        while not is_over:
            is_over = self._over.wait(SAMPLE_INTERVAL_S)
            try:
                self.mb = max(self.mb, sum(memory_mb(pid, "VmHWM") for pid in self._pids))
            except ProcessLookupError:  # a server died: whoever reads its CPU time says so
                return
