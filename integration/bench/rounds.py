"""Every server at every workload, in turn, round after round.

The speed of a machine that is shared drifts several-fold within minutes. So within a round all servers take their turn
at a workload directly one after the other, and what is compared is compared within rounds. Which server begins changes
from round to round.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from integration.bench import guests, measure
from integration.bench.drivers import DriverFailed, Load
from integration.bench.machine import chill, make_random_image, touch_memory
from integration.bench.peer import LOOPBACK, Peer, PeerFailed
from integration.bench.results import Record
from integration.bench.workloads import Workload
from integration.served import nbdclone

# The page cache of the bases, of a clone that was just removed and of its successor, and what the programs take.
MEMORY_TOUCHED = 8
FAILURES = (PeerFailed, DriverFailed, guests.GuestError, OSError)

Turn = Callable[[Peer, Workload, Path], measure.Measurement]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be measured: bytes of base, seconds of each measurement."""

    peers: Sequence[Peer]
    workloads: Sequence[Workload]
    size: int
    rounds: int
    runtime_s: float


def run_rounds(plan: Plan, directory: Path) -> list[Record]:
    """Loads on clones of a random image; then real work on clones of a Debian."""
    certificates = directory / "certificates"
    nbdclone("cert", certificates, "--host", LOOPBACK)
    loads = [workload for workload in plan.workloads if not workload.is_real]
    real = [workload for workload in plan.workloads if workload.is_real]
    records: list[Record] = []
    if loads:
        base = directory / "base.raw"
        make_random_image(base, plan.size)
        _prepare(plan.peers, base, directory / "loads", certificates)
        touch_memory(MEMORY_TOUCHED * plan.size)
        records += _run(plan, loads, _Loads(Load(plan.size, plan.runtime_s, base)), directory / "clone")
        shutil.rmtree(directory / "loads")
    if real:
        _prepare(plan.peers, guests.disk(), directory / "real", certificates)
        records += _run(plan, real, guests.take_turn, directory / "clone")
    return records


class _Loads:
    """Turns with a load. The chain of a peer is made at its first turn that wants one, and is not written to later."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._chained: set[str] = set()

    def __call__(self, peer: Peer, workload: Workload, directory: Path) -> measure.Measurement:
        if workload.state == "chain" and peer.name not in self._chained:
            measure.build_chain(peer, workload, self._load, directory)
            self._chained.add(peer.name)
        return measure.take_turn(peer, workload, self._load, directory)


def _prepare(peers: Sequence[Peer], base: Path, directory: Path, certificates: Path) -> None:
    for number, peer in enumerate(peers):
        own = directory / f"server-{number}"
        own.mkdir(parents=True)
        peer.prepare(base, own, certificates)
    for image in {peer.image for peer in peers}:
        chill(image)


def _run(plan: Plan, workloads: Sequence[Workload], turn: Turn, directory: Path) -> list[Record]:
    records = []
    for number in range(plan.rounds):
        for workload in workloads:
            able = [peer for peer in plan.peers if not peer.lacks(workload)]
            first = number % max(len(able), 1)
            for peer in able[first:] + able[:first]:
                records.append(record := _settle(turn, peer, workload, directory, number))
                _say(record)
    return records


def _settle(turn: Turn, peer: Peer, workload: Workload, directory: Path, number: int) -> Record:
    """One server at one workload. A failure is a result too: the others go on."""
    directory.mkdir()
    try:
        return Record(number, peer.name, workload.name, turn(peer, workload, directory))
    except FAILURES as error:
        return Record(number, peer.name, workload.name, None, str(error))
    finally:
        shutil.rmtree(directory)


def _say(record: Record) -> None:
    measured = record.measurement
    said = f"{measured.iops:10,.4g}/s {measured.cpu_us:8.1f} us CPU" if measured else f"failed: {record.error}"
    print(f"round {record.round + 1}  {record.workload:28} {record.server:24} {said}", file=sys.stderr, flush=True)
