"""Measure every server at every workload, in turn, round after round.

The speed of a machine that is shared drifts several-fold within minutes. So within a round all servers take their turn
at a workload directly one after the other, and what is compared is compared within rounds. Which server begins changes
from round to round.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeVar

from integration.bench import cost, report
from integration.bench.machine import (
    IN_MEMORY,
    Machine,
    chill,
    file_system_of,
    make_random_image,
    touch_memory,
    warm,
)
from integration.bench.measure import DriverFailed, measure
from integration.bench.peers import REPOSITORY, Nbdclone, Peer, PeerFailed, all_peers
from integration.bench.workloads import WORKLOADS, Workload
from integration.packages import program

MIB = 1 << 20
# In the order of the arguments: MiB of base, rounds, seconds.
FULL = (1024, 5, 3.0)
QUICK = (256, 1, 1.0)
# A fresh clone may come to hold all of the base, with maps and what the servers keep beside it.
CLONE_OVERHEAD = 1.25
# The page cache of the bases, of a clone that was just removed and of its successor, and what the programs take.
MEMORY_TOUCHED = 8
Named = TypeVar("Named", Peer, Workload)
CACHE = REPOSITORY / ".cache" / "bench"


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m integration.bench", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="a smaller base, one round, one second: to see that all works")
    add("--rounds", type=int, metavar="N", help=f"default {FULL[1]}, quick {QUICK[1]}")
    add(
        "--runtime", type=float, metavar="SECONDS", help=f"of each measurement; default {FULL[2]:g}, quick {QUICK[2]:g}"
    )
    add("--size", type=int, metavar="MIB", help=f"of the base; default {FULL[0]}, quick {QUICK[0]}")
    add("--only", nargs="+", metavar="WORKLOAD", help="names, or patterns such as 'read-*'")
    add("--servers", nargs="+", metavar="NAME", help="some of the servers")
    add("--tree", type=Path, action="append", default=[], metavar="DIR", help="measure this checkout as well")
    add("--cost", action="store_true", help="measure what clones cost, too")
    add("--no-speed", action="store_true", help="leave out the workloads: with --cost, nothing else is measured")
    add("--output", type=Path, default=CACHE, metavar="DIR", help="for benchmarks.md and benchmarks.json")
    add("--directory", type=Path, default=CACHE, metavar="DIR", help="where to measure: on a disk, not in memory")
    add("--list", action="store_true", help="list workloads and servers, measure nothing")
    arguments = parser.parse_args(argv)
    size, rounds, runtime = QUICK if arguments.quick else FULL
    arguments.size = (arguments.size or size) * MIB
    arguments.rounds = arguments.rounds or rounds
    arguments.runtime = arguments.runtime or runtime
    arguments.peers = _choose(
        [*all_peers(), *(Nbdclone(tree.resolve(), f"nbdclone in {tree.name}") for tree in arguments.tree)],
        arguments.servers,
        parser,
    )
    arguments.workloads = [] if arguments.no_speed else _choose(list(WORKLOADS), arguments.only, parser)
    return arguments


def _choose(offered: list[Named], patterns: Sequence[str] | None, parser: argparse.ArgumentParser) -> list[Named]:
    if patterns is None:
        return offered
    for pattern in patterns:
        if not any(fnmatch(it.name, pattern) for it in offered):
            parser.error(f"{pattern!r} is none of: {', '.join(it.name for it in offered)}")
    return [it for it in offered if any(fnmatch(it.name, pattern) for pattern in patterns)]


def run_rounds(arguments: argparse.Namespace, directory: Path) -> list[report.Record]:
    """Every server at every workload, as often as there are rounds."""
    peers: list[Peer] = arguments.peers
    base = directory / "base.raw"
    make_random_image(base, arguments.size)
    for number, peer in enumerate(peers):
        own = directory / f"server-{number}"
        own.mkdir()
        peer.prepare(base, own)
    for image in {peer.image for peer in peers}:
        chill(image)
    touch_memory(MEMORY_TOUCHED * arguments.size)
    records = []
    for round_number in range(arguments.rounds):
        for workload in arguments.workloads:
            first = round_number % len(peers)
            for peer in peers[first:] + peers[:first]:
                record = take_turn(peer, workload, arguments, directory / "clone", round_number)
                _say(record)
                records.append(record)
    return records


def take_turn(
    peer: Peer, workload: Workload, arguments: argparse.Namespace, directory: Path, round_number: int
) -> report.Record:
    """One server at one workload, on a fresh clone. A failure is a result too: the others go on."""
    directory.mkdir()
    try:
        warm(peer.image)
        with peer.serving(directory) as server:
            measurement = measure(server, workload, arguments.size, arguments.runtime)
    except (PeerFailed, DriverFailed, OSError) as error:
        return report.Record(round_number, peer.name, workload.name, None, str(error))
    finally:
        shutil.rmtree(directory)
    return report.Record(round_number, peer.name, workload.name, measurement)


def _say(record: report.Record) -> None:
    measured = record.measurement
    said = f"{measured.iops:10,.0f}/s {measured.cpu_us:8.1f} us CPU" if measured else f"failed: {record.error}"
    print(f"round {record.round + 1}  {record.workload:16} {record.server:24} {said}", file=sys.stderr, flush=True)


def require_disk(arguments: argparse.Namespace) -> None:
    """Refuse a directory that is in memory, or has too little room."""
    directory: Path = arguments.directory
    directory.mkdir(parents=True, exist_ok=True)
    if (kind := file_system_of(directory)) in IN_MEMORY:
        sys.exit(f"{directory} is on {kind}: give --directory on a disk")
    copies = 1 + sum(isinstance(peer, Nbdclone) for peer in arguments.peers) + CLONE_OVERHEAD
    needed = int(arguments.size * copies) + 256 * MIB
    if (free := shutil.disk_usage(directory).free) < needed:
        sys.exit(f"{directory} has {free // MIB} MiB free, and this takes {needed // MIB}: give --directory or --size")


def require_programs(peers: Sequence[Peer]) -> None:
    try:
        for name in ("fio", *(name for peer in peers for name in peer.programs)):
            program(name)
    except FileNotFoundError as error:
        sys.exit(f"{error}: python -m integration.packages says what to install, --servers leaves a server out")


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 if something could not be measured. Goals that are not met are a result, not a failure."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    if arguments.list:
        print("workloads:", *(f"  {workload.name:16} {workload.title}" for workload in WORKLOADS), sep="\n")
        print("servers:", *(f"  {peer.name}" for peer in arguments.peers), sep="\n")
        return 0
    require_programs(arguments.peers)
    require_disk(arguments)
    with tempfile.TemporaryDirectory(prefix="run-", dir=arguments.directory) as directory:
        records = run_rounds(arguments, Path(directory)) if arguments.workloads else []
        (costs_directory := Path(directory, "cost")).mkdir()
        costs = cost.measure_costs(costs_directory) if arguments.cost else []
    results = report.Results(
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        command=shlex.join(["python", "-m", "integration.bench", *argv]),
        machine=Machine.here(arguments.directory),
        driver=subprocess.run([program("fio"), "--version"], capture_output=True, text=True, check=True).stdout.strip(),
        rounds=arguments.rounds,
        runtime_s=arguments.runtime,
        size=arguments.size,
        servers=[report.Server(peer.name, peer.version(), peer.durable_flush) for peer in arguments.peers],
        workloads=arguments.workloads,
        records=records,
        costs=costs,
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "benchmarks.md").write_text(report.to_markdown(results))
    (arguments.output / "benchmarks.json").write_text(report.to_json(results))
    print(report.to_markdown(results))
    return 1 if results.failures() else 0


if __name__ == "__main__":
    sys.exit(main())
