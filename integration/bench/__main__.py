"""Measure every server at every workload, in turn, round after round; write the report."""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeVar

from integration.bench import cost, guests, report
from integration.bench.floors import RawServer, has_compiler
from integration.bench.machine import IN_MEMORY, Machine, file_system_of
from integration.bench.page import write_page, write_report
from integration.bench.peer import Peer
from integration.bench.peers import REPOSITORY, Nbdclone, all_peers
from integration.bench.results import Results, Server, from_json
from integration.bench.rounds import Plan, run_rounds
from integration.bench.workloads import QUICK, WORKLOADS, Workload
from integration.packages import program

MIB = 1 << 20
# In the order of the arguments: MiB of base, rounds, seconds.
FULL_SETTINGS = (1024, 3, 1.5)
QUICK_SETTINGS = (128, 1, 0.3)
# A fresh clone may come to hold all of the base, with maps and what the servers keep beside it; so may a chain.
CLONE_OVERHEAD = 2.5
CACHE = REPOSITORY / ".cache" / "bench"
DRIVERS = {"fio": "fio", "nbdcopy": "nbdcopy", "qemu-img": "qemu-img", "boot": "qemu-system-x86_64"}
DRIVERS["files"] = DRIVERS["boot"]
Named = TypeVar("Named", Peer, Workload)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m integration.bench", description=__doc__)
    add = parser.add_argument
    size, rounds, runtime = FULL_SETTINGS
    quick_size, quick_rounds, quick_runtime = QUICK_SETTINGS
    add("--quick", action="store_true", help="a line of each family on a small base, to see that all works")
    add("--rounds", type=int, metavar="N", help=f"default {rounds}, quick {quick_rounds}")
    add(
        "--runtime",
        type=float,
        metavar="SECONDS",
        help=f"of each measurement; default {runtime}, quick {quick_runtime}",
    )
    add("--size", type=int, metavar="MIB", help=f"of the base; default {size}, quick {quick_size}")
    add("--only", nargs="+", metavar="WORKLOAD", help="names, or patterns such as 'read-*'")
    add("--servers", nargs="+", metavar="NAME", help="names, or patterns; those that the default leaves out too")
    add("--tree", type=Path, action="append", default=[], metavar="DIR", help="measure this checkout as well")
    add("--serve-options", default="", metavar="OPTIONS", help="measure nbdclone with these options of serve as well")
    add("--real", action="store_true", help="guests on clones, too; some seconds to a minute for each turn")
    add("--cost", action="store_true", help="measure what clones cost, too")
    add("--no-speed", action="store_true", help="leave out the workloads: with --cost, nothing else is measured")
    add("--output", type=Path, default=CACHE, metavar="DIR", help="for benchmarks.md, benchmarks.json, benchmarks.svg")
    add("--docs", action="store_true", help="put the report into docs/benchmarks.md as well, between its marks")
    add("--from", dest="source", type=Path, metavar="JSON", help="measure nothing: the report of an earlier run")
    add("--directory", type=Path, default=CACHE, metavar="DIR", help="where to measure: on a disk, not in memory")
    add("--list", action="store_true", help="list workloads and servers, measure nothing")
    return parser


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser()
    arguments = parser.parse_args(argv)
    size, rounds, runtime = QUICK_SETTINGS if arguments.quick else FULL_SETTINGS
    arguments.size = (arguments.size or size) * MIB
    arguments.rounds = arguments.rounds or rounds
    arguments.runtime = arguments.runtime or runtime
    arguments.peers = _choose(_offered(arguments), arguments.servers, parser)
    arguments.workloads = _choose(list(WORKLOADS), arguments.only, parser)
    if arguments.only is None:
        arguments.workloads = [it for it in WORKLOADS if _by_default(it, arguments)]
    return arguments


def _offered(arguments: argparse.Namespace) -> list[Peer]:
    offered = all_peers()
    offered += [Nbdclone(tree.resolve(), f"nbdclone in {tree.name}") for tree in arguments.tree]
    if options := arguments.serve_options:
        offered.append(Nbdclone(name=f"nbdclone {options}", options=shlex.split(options)))
    if arguments.servers is None:
        offered = [peer for peer in offered if peer.by_default]
        if not has_compiler():
            print("there is no C compiler (cc): the server 'raw' is left out", file=sys.stderr)
            offered = [peer for peer in offered if not isinstance(peer, RawServer)]
    return offered


def _by_default(workload: Workload, arguments: argparse.Namespace) -> bool:
    if workload.is_real:
        return bool(arguments.real)
    return not arguments.no_speed and (not arguments.quick or workload.name in QUICK)


def _choose(offered: list[Named], patterns: Sequence[str] | None, parser: argparse.ArgumentParser) -> list[Named]:
    if patterns is None:
        return offered
    for pattern in patterns:
        if not any(fnmatch(it.name, pattern) for it in offered):
            parser.error(f"{pattern!r} is none of: {', '.join(it.name for it in offered)}")
    return [it for it in offered if any(fnmatch(it.name, pattern) for pattern in patterns)]


def require_disk(arguments: argparse.Namespace) -> None:
    """Refuse a directory that is in memory, or has too little room."""
    directory: Path = arguments.directory
    directory.mkdir(parents=True, exist_ok=True)
    if (kind := file_system_of(directory)) in IN_MEMORY:
        sys.exit(f"{directory} is on {kind}: give --directory on a disk")
    copies = 1 + sum(isinstance(peer, Nbdclone | RawServer) for peer in arguments.peers) + CLONE_OVERHEAD
    needed = int(arguments.size * copies) + 256 * MIB
    if (free := shutil.disk_usage(directory).free) < needed:
        sys.exit(f"{directory} has {free // MIB} MiB free, and this takes {needed // MIB}: give --directory or --size")


def require_programs(peers: Sequence[Peer], workloads: Sequence[Workload]) -> None:
    try:
        for name in (*(DRIVERS[it.driver] for it in workloads), *(name for peer in peers for name in peer.programs)):
            program(name)
    except FileNotFoundError as error:
        sys.exit(f"{error}: python -m integration.packages says what to install, --servers leaves a server out")
    if any(workload.is_real for workload in workloads) and (packages := guests.missing_packages()):
        sys.exit(f"missing packages: {' '.join(packages)}")


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> Results:
    began = time.monotonic()
    plan = Plan(arguments.peers, arguments.workloads, arguments.size, arguments.rounds, arguments.runtime)
    with tempfile.TemporaryDirectory(prefix="run-", dir=arguments.directory) as directory:
        records = run_rounds(plan, Path(directory)) if plan.workloads else []
        (costs_directory := Path(directory, "cost")).mkdir()
        costs = cost.measure_costs(costs_directory) if arguments.cost else []
    return Results(
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        command=shlex.join(["python", "-m", "integration.bench", *argv]),
        duration_s=time.monotonic() - began,
        machine=Machine.here(arguments.directory),
        drivers=[_version(name) for name in dict.fromkeys(DRIVERS[it.driver] for it in plan.workloads)],
        rounds=plan.rounds,
        runtime_s=plan.runtime_s,
        size=plan.size,
        servers=[_server(peer, plan.workloads) for peer in plan.peers],
        workloads=plan.workloads,
        records=records,
        costs=costs,
    )


def _server(peer: Peer, workloads: Sequence[Workload]) -> Server:
    lacks = {workload.name: reason for workload in workloads if (reason := peer.lacks(workload))}
    return Server(peer.name, peer.version(), peer.durable_flush, peer.is_floor, peer.note, lacks)


def _version(name: str) -> str:
    said = subprocess.run([program(name), "--version"], capture_output=True, text=True, check=True).stdout
    return said.splitlines()[0].partition(" (")[0].strip()


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 if something could not be measured. Goals that are not met are a result, not a failure."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    if arguments.list:
        print("workloads:", *(f"  {workload.name:28} {workload.title}" for workload in WORKLOADS), sep="\n")
        print("servers:", *(f"  {peer.name}" for peer in all_peers()), sep="\n")
        return 0
    if arguments.source:
        results = from_json(arguments.source.read_text())
    else:
        require_programs(arguments.peers, arguments.workloads)
        require_disk(arguments)
        results = run(arguments, argv)
    write_report(results, arguments.output)
    if arguments.docs:
        write_page(results, REPOSITORY / "docs")
    print(report.to_markdown(results))
    return 1 if results.failures() else 0


if __name__ == "__main__":
    sys.exit(main())
