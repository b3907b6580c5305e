"""One turn of one server at one workload: bring its clone into the state, put the load on, read what it took."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from integration.bench.drivers import DRIVERS, Load, Outcome, write_with_fio
from integration.bench.machine import chill, touch_memory, warm
from integration.bench.peer import Peer, PeerFailed, Running
from integration.bench.processes import PeakMemory, cpu_seconds
from integration.bench.workloads import LAYERS, Workload

BLOCK = 4096
FILL_BLOCK, FILL_DEPTH = 1 << 20, 8
SCATTER_DEPTH = 64


@dataclass(frozen=True, slots=True)
class Measurement:
    """An outcome and what it took: CPU time of the server per request, and the most memory that it had."""

    iops: float
    mb_per_s: float
    p50_us: float | None
    p99_us: float | None
    cpu_us: float | None
    peak_rss_mb: float | None


def take_turn(peer: Peer, workload: Workload, load: Load, directory: Path) -> Measurement:
    """Raises PeerFailed, DriverFailed, OSError. ``load.size`` is for all clones together."""
    load = replace(load, size=load.size // workload.clones)
    if workload.cold:
        chill(peer.image)
    else:
        warm(peer.image)
    with peer.serving(directory, workload) as server:
        bring_into_state(server, workload, load)
        if workload.writes or workload.cold:
            # The page cache is about to grow by so much. Memory that was free for some seconds may be the host's again.
            touch_memory(load.size * workload.clones)
        return put_load_on(server, workload, load)


def bring_into_state(server: Running, workload: Workload, load: Load) -> None:
    """As a client does it: the same way for every server."""
    for uri in server.uris:
        if workload.state == "rewritten":
            write_with_fio(uri, "write", FILL_BLOCK, FILL_DEPTH, load)
        elif workload.state == "checkerboard":
            # fio's "write:4k" leaves out 4 KiB after each write.
            write_with_fio(uri, f"write:{BLOCK}", BLOCK, SCATTER_DEPTH, load, f"--io_size={load.size // 2}")
    if workload.state in ("rewritten", "checkerboard"):
        os.sync()  # nobody's figures are to depend on when the kernel writes this back


def build_chain(peer: Peer, workload: Workload, load: Load, directory: Path) -> None:
    """Layers, each with its part of the range in random blocks of 4 KiB; later ones lie over some of earlier ones."""
    for number in range(LAYERS):
        peer.add_layer(number)
        with peer.serving(directory, workload) as server:
            options = (f"--io_size={load.size // LAYERS}", f"--randseed={number + 1}")
            write_with_fio(server.uris[0], "randwrite", BLOCK, SCATTER_DEPTH, load, *options)
    os.sync()


def put_load_on(server: Running, workload: Workload, load: Load) -> Measurement:
    with PeakMemory(server.pids) as peak:
        before = _cpu_seconds(server)
        outcome: Outcome = DRIVERS[workload.driver](server.uris, workload, load)
        spent = _cpu_seconds(server) - before
    return Measurement(
        outcome.iops,
        outcome.mb_per_s,
        outcome.p50_us,
        outcome.p99_us,
        cpu_us=spent * 1e6 / outcome.requests,
        peak_rss_mb=peak.mb,
    )


def _cpu_seconds(server: Running) -> float:
    try:
        return sum(map(cpu_seconds, server.pids))
    except ProcessLookupError as error:
        raise PeerFailed(f"the server ended during the measurement: {error}") from None
