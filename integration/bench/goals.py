"""What is to come out: the goals, and whether they are met.

A goal compares requests per second, in the median of the rounds. ``best`` is the one of the others that SUBJECT
is least ahead of. Who keeps nothing through a power cut does another work when it writes, so a line that writes has
two goals: beside those whose flush is durable, and beside all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from integration.bench.results import Ratio, Results
from integration.bench.workloads import REFERENCE, SUBJECT, Workload

RAW = "raw"
BEST = 1.0  # of the best peer, on every line


@dataclass(frozen=True, slots=True)
class Goal:
    """On these workloads SUBJECT makes at least ``ratio`` times the requests per second of the server ``to``."""

    workloads: Sequence[str]
    ratio: float
    to: str = REFERENCE


GOALS = (
    Goal(("randread-4k-1", "randwrite-4k-1"), 1.3),
    Goal(("randread-4k-16", "randread-4k-64", "randwrite-4k-16", "randwrite-4k-64"), 3.0),
    Goal(("read-256k-4", "read-1m-8"), 1.3),
    Goal(("write-256k-4", "write-1m-8"), 1.0),
    Goal(("syncwrite-4k-1", "syncwrite16-4k-16"), 1.5),
    Goal(("randread-4k-16",), 0.8, RAW),
    Goal(("randwrite-4k-16",), 0.6, RAW),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A goal on one line. ``to`` is the server that it was held against; ``ratio`` None: not measured."""

    workload: str
    kind: str
    to: str
    goal: float
    ratio: Ratio | None

    @property
    def is_met(self) -> bool:
        return self.ratio is not None and self.ratio.median >= self.goal


ONLY, DURABLE, ALL = "the best peer", "the best durable peer", "the best of all"


def named_verdicts(results: Results) -> Iterator[Verdict]:
    """The goals beside a server of a given name, where both are in the run."""
    names = {server.name for server in results.servers}
    for goal in GOALS:
        for workload in goal.workloads:
            if results.workload(workload) and {SUBJECT, goal.to} <= names:
                ratio = results.ratio(SUBJECT, workload, goal.to)
                yield Verdict(workload, goal.to, goal.to, goal.ratio, ratio)


def best_verdicts(results: Results) -> Iterator[Verdict]:
    """On every line, beside the best of its peers. Where no peer was measured there is nothing to say."""
    for workload in results.workloads:
        for kind in (DURABLE, ALL) if workload.writes else (ONLY,):
            if (verdict := _against_best(results, workload, kind)) is not None:
                yield verdict


def _against_best(results: Results, workload: Workload, kind: str) -> Verdict | None:
    others = [peer.name for peer in results.peers() if not peer.name.startswith(SUBJECT)]
    if kind == DURABLE:
        others = [peer.name for peer in results.peers() if peer.name in others and peer.durable_flush]
    measured = [name for name in others if results.median(name, workload.name, "iops")]
    if not measured:
        return None
    ratios = {name: results.ratio(SUBJECT, workload.name, name) for name in measured}
    if not any(ratios.values()):
        # It was not measured itself: the goal stands, and is missed.
        return Verdict(workload.name, kind, measured[0], BEST, None)
    best = min((name for name in measured if ratios[name]), key=lambda name: ratios[name].median)  # type: ignore[union-attr]
    return Verdict(workload.name, kind, best, BEST, ratios[best])
