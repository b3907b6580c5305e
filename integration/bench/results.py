"""What a run gave, and what follows from it: medians over the rounds, and ratios within them.

A ratio is the median of the ratios within each round: a machine that is slower for a while is slower for both.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from integration.bench.cost import Cost
from integration.bench.machine import Machine
from integration.bench.measure import Measurement
from integration.bench.workloads import Workload


@dataclass(frozen=True, slots=True)
class Record:
    """One turn of one server at one workload: what was measured, or why nothing was."""

    round: int
    server: str
    workload: str
    measurement: Measurement | None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Server:
    name: str
    version: str
    durable_flush: bool
    is_floor: bool = False
    note: str = ""
    lacks: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """By the names of the workloads that it cannot do: why."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """Over the rounds: the median, the least and the greatest."""

    median: float
    least: float
    greatest: float


@dataclass(frozen=True, slots=True)
class Results:
    """All of a run."""

    date: str
    command: str
    duration_s: float
    machine: Machine
    drivers: Sequence[str]
    rounds: int
    runtime_s: float
    size: int
    servers: Sequence[Server]
    workloads: Sequence[Workload]
    records: Sequence[Record]
    costs: Sequence[Cost]

    def median(self, server: str, workload: str, field: str) -> float | None:
        values = self._values(server, workload, field).values()
        return statistics.median(values) if values else None

    def ratio(self, server: str, workload: str, to: str, field: str = "iops") -> Ratio | None:
        """Of this server's figure to the other's in the same round."""
        mine, theirs = self._values(server, workload, field), self._values(to, workload, field)
        ratios = [mine[number] / theirs[number] for number in mine if theirs.get(number)]
        return Ratio(statistics.median(ratios), min(ratios), max(ratios)) if ratios else None

    def failures(self) -> list[Record]:
        return [record for record in self.records if record.measurement is None]

    def peers(self) -> list[Server]:
        """Those that have clones."""
        return [server for server in self.servers if not server.is_floor]

    def workload(self, name: str) -> Workload | None:
        return next((workload for workload in self.workloads if workload.name == name), None)

    def _values(self, server: str, workload: str, field: str) -> dict[int, float]:
        """By round."""
        return {
            record.round: value
            for record in self.records
            if record.measurement is not None
            and (record.server, record.workload) == (server, workload)
            and (value := getattr(record.measurement, field)) is not None
        }


def to_json(results: Results, **more: Any) -> str:
    return json.dumps(dataclasses.asdict(results) | more, indent=1) + "\n"


def from_json(text: str) -> Results:
    """What was written as JSON; of keys that it does not know, nothing is kept."""
    raw = json.loads(text)
    raw["machine"] = Machine(**raw["machine"])
    raw["servers"] = [Server(**it) for it in raw["servers"]]
    raw["workloads"] = [Workload(**it) for it in raw["workloads"]]
    raw["costs"] = [Cost(**it) for it in raw["costs"]]
    raw["records"] = [
        Record(**it | {"measurement": it["measurement"] and Measurement(**it["measurement"])}) for it in raw["records"]
    ]
    return Results(**{field.name: raw[field.name] for field in dataclasses.fields(Results)})
