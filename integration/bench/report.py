"""The results as a markdown fragment for people and as JSON for programs.

A figure that is to be shown is a line in ``COLUMNS``. All figures are medians over the rounds. A ratio is the median
of the ratios within each round: a machine that is slower for a while is slower for both.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from integration.bench.cost import Cost
from integration.bench.machine import Machine
from integration.bench.measure import Measurement
from integration.bench.workloads import GOALS, REFERENCE, SUBJECT, Workload

BLANK = "-"
FAILED = "failed"
INCOMPARABLE = "¹"


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


@dataclass(frozen=True, slots=True)
class Results:
    """All of a run."""

    date: str
    command: str
    machine: Machine
    driver: str
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

    def ratio(self, server: str, workload: str, field: str = "iops", to: str = REFERENCE) -> float | None:
        """The median over the rounds of this server's figure to that of the reference in the same round."""
        mine, theirs = self._values(server, workload, field), self._values(to, workload, field)
        ratios = [mine[number] / theirs[number] for number in mine if theirs.get(number)]
        return statistics.median(ratios) if ratios else None

    def failures(self) -> list[Record]:
        return [record for record in self.records if record.measurement is None]

    def _values(self, server: str, workload: str, field: str) -> dict[int, float]:
        """By round."""
        return {
            record.round: getattr(record.measurement, field)
            for record in self.records
            if record.measurement is not None and (record.server, record.workload) == (server, workload)
        }


@dataclass(frozen=True, slots=True)
class Column:
    """A figure of a measurement, with a table of its own: workloads down, servers across."""

    title: str
    field: str
    show: Callable[[float], str]
    with_ratio: bool = False


def _rounded(value: float) -> str:
    """Three digits or so, which is more than the noise allows."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


COLUMNS = (
    Column(f"Requests per second (and their ratio to {REFERENCE})", "iops", _rounded, with_ratio=True),
    Column("Server CPU time per request, µs", "cpu_us", _rounded),
    Column("Latency, median, µs", "p50_us", _rounded),
    Column("Latency, 99th percentile, µs", "p99_us", _rounded),
    Column("Throughput, MB/s", "mb_per_s", _rounded),
    Column("Peak memory of the server, MB", "peak_rss_mb", _rounded),
)


def to_json(results: Results) -> str:
    return json.dumps(dataclasses.asdict(results), indent=1) + "\n"


def to_markdown(results: Results) -> str:
    parts = [_head(results)]
    if goals := list(_goal_rows(results)):
        parts += ["### Goals", _table(["goal", "measured", "met"], goals)]
    if results.workloads:
        for column in COLUMNS:
            parts += [f"### {column.title}", _column_table(results, column)]
        if _incomparable(results):
            parts.append(f"{INCOMPARABLE} Its flush is not durable: not comparable.")
    if results.costs:
        rows = [[cost.what, _cost(cost.value, cost), _cost(cost.limit, cost)] for cost in results.costs]
        parts += ["### What clones cost", _table(["what", "measured", "goal: less than"], rows)]
    if failures := results.failures():
        lines = (f"- round {it.round}, {it.server}, {it.workload}: {it.error.strip()}" for it in failures)
        parts += ["### Failures", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _head(results: Results) -> str:
    machine = results.machine
    plural = "s" if results.rounds > 1 else ""
    lines = [
        f"Measured {results.date} with `{results.command}`.",
        "",
        f"- machine: {machine.cpu}, {machine.cores} cores, {machine.memory_gb:.0f} GB; {machine.kernel}, "
        f"{machine.file_system}",
        f"- servers: {'; '.join(f'{server.name} ({server.version})' for server in results.servers)}",
    ]
    if results.workloads:
        lines.append(
            f"- {results.driver} over a Unix socket, {results.rounds} round{plural} of {results.runtime_s:g} s for "
            f"each server and workload, each on a fresh clone of {results.size >> 20} MiB of random data in the page "
            "cache; figures are medians over the rounds"
        )
    return "\n".join(lines)


def _goal_rows(results: Results) -> Iterable[list[str]]:
    titles = {workload.name: workload.title for workload in results.workloads}
    for goal in GOALS:
        if goal.workload in titles:
            ratio = results.ratio(SUBJECT, goal.workload)
            said = f"{titles[goal.workload]}: at least {goal.ratio:g} times {REFERENCE}"
            yield [said, BLANK if ratio is None else f"{ratio:.2f}", _met(ratio is not None and ratio >= goal.ratio)]
    for cost in results.costs:
        if cost.limit is not None:
            said = f"{cost.what}: less than {_cost(cost.limit, cost)}"
            yield [said, _cost(cost.value, cost), _met(cost.value < cost.limit)]


def _column_table(results: Results, column: Column) -> str:
    rows = []
    for workload in results.workloads:
        cells = [_cell(results, server, workload, column) for server in results.servers]
        rows.append([workload.title, *cells])
    return _table(["", *(server.name for server in results.servers)], rows)


def _cell(results: Results, server: Server, workload: Workload, column: Column) -> str:
    value = results.median(server.name, workload.name, column.field)
    if value is None:
        return FAILED
    text = column.show(value)
    if workload.synced and not server.durable_flush:
        return text + INCOMPARABLE
    if column.with_ratio and server.name != REFERENCE:
        ratio = results.ratio(server.name, workload.name, column.field)
        text += "" if ratio is None else f" ({ratio:.2f})"
    return text


def _incomparable(results: Results) -> bool:
    return any(it.synced for it in results.workloads) and not all(it.durable_flush for it in results.servers)


def _cost(value: float | None, cost: Cost) -> str:
    return BLANK if value is None else f"{_rounded(value)} {cost.unit}" if value % 1 else f"{value:g} {cost.unit}"


def _met(met: bool) -> str:
    return "met" if met else "**not met**"


def _table(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A markdown table that is legible as text too; the first column to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
    return "\n".join([line(titles), line(rule), *map(line, rows)])
