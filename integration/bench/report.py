"""The results as markdown for people. A figure that is to be shown is a line in ``COLUMNS``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from integration.bench.cost import Cost
from integration.bench.goals import ALL, ONLY, Verdict, best_verdicts, named_verdicts
from integration.bench.results import Ratio, Results, Server
from integration.bench.workloads import REFERENCE, Workload

BLANK = "-"
FAILED = "failed"
NOT_DURABLE = "¹"
FLOOR = "²"


@dataclass(frozen=True, slots=True)
class Column:
    """A figure of a measurement, with a table of its own: workloads down, servers across."""

    title: str
    field: str
    with_ratio: bool = False


COLUMNS = (
    Column(f"Requests per second (and their ratio to {REFERENCE})", "iops", with_ratio=True),
    Column("Server CPU time per request, µs", "cpu_us"),
    Column("Latency, median, µs", "p50_us"),
    Column("Latency, 99th percentile, µs", "p99_us"),
    Column("Throughput, MB/s", "mb_per_s"),
    Column("Peak memory of the server, MB", "peak_rss_mb"),
)


def to_markdown(results: Results) -> str:
    parts = [_head(results), *_goals(results)]
    loads = [workload for workload in results.workloads if not workload.is_real]
    if loads:
        for column in COLUMNS:
            parts += [f"### {column.title}", _column_table(results, loads, column)]
    if real := [workload for workload in results.workloads if workload.is_real]:
        parts += [f"### Real work, seconds (and the ratio of its speed to {REFERENCE})", _real_table(results, real)]
    if results.workloads:
        parts.append("\n".join(_notes(results)))
    if results.costs:
        rows = [[cost.what, _cost(cost.value, cost), _cost(cost.limit, cost)] for cost in results.costs]
        parts += ["### What clones cost", _table(["what", "measured", "goal: less than"], rows)]
    if failures := results.failures():
        lines = (f"- round {it.round + 1}, {it.server}, {it.workload}: {_first_line(it.error)}" for it in failures)
        parts += ["### Failures", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _head(results: Results) -> str:
    machine = results.machine
    plural = "s" if results.rounds > 1 else ""
    lines = [
        f"Measured {results.date} with `{results.command}`, in {results.duration_s / 60:.0f} minutes.",
        "",
        f"- machine: {machine.cpu}, {machine.cores} cores, {machine.memory_gb:.0f} GB; {machine.kernel}, "
        f"{machine.file_system}",
        f"- servers: {'; '.join(f'{server.name} ({server.version})' for server in results.servers)}",
    ]
    if results.workloads:
        lines.append(
            f"- {', '.join(results.drivers)}; a Unix socket where no other way is named; {results.rounds} "
            f"round{plural} of {results.runtime_s:g} s for each server and workload, each on a fresh clone of "
            f"{results.size >> 20} MiB of random data in the page cache; figures are medians over the rounds"
        )
    return "\n".join(lines)


def _goals(results: Results) -> Iterable[str]:
    title = {workload.name: workload.title for workload in results.workloads}
    named = [
        [f"{title[it.workload]}: at least {it.goal:g} times {it.to}", *_measured(it)] for it in named_verdicts(results)
    ]
    for cost in results.costs:
        if cost.limit is not None:
            said = f"{cost.what}: less than {_cost(cost.limit, cost)}"
            named.append([said, _cost(cost.value, cost), BLANK, _met(cost.value < cost.limit)])
    if named:
        yield "### Goals"
        yield _table(["goal", "measured", "rounds", "met"], named)
    best = list(best_verdicts(results))
    if best:
        met = sum(it.is_met for it in best)
        yield "### At least as fast as the best peer, line by line"
        yield (
            f"{met} of {len(best)} met. The peers are the other servers of clones. A line that writes has two goals: "
            "beside the best of those whose flush is durable, and beside the best of all."
        )
        rows = [
            [title[it.workload] + ("" if it.kind == ONLY else f" ({_short(it.kind)})"), it.to, *_measured(it)]
            for it in best
        ]
        yield _table(["line", "the best", "ratio to it", "rounds", "met"], rows)


def _short(kind: str) -> str:
    return "all" if kind == ALL else "durable"


def _measured(verdict: Verdict) -> list[str]:
    ratio = verdict.ratio
    if ratio is None:
        return [BLANK, BLANK, _met(False)]
    return [f"{ratio.median:.2f}", _range(ratio), _met(verdict.is_met)]


def _range(ratio: Ratio) -> str:
    return f"{ratio.least:.2f} to {ratio.greatest:.2f}"


def _column_table(results: Results, workloads: Sequence[Workload], column: Column) -> str:
    def cell(server: Server, workload: Workload) -> str:
        value = results.median(server.name, workload.name, column.field)
        if value is None:
            return _missing(results, server, workload)
        mark = NOT_DURABLE if workload.writes and not server.durable_flush else ""
        return _rounded(value) + mark + (_shown_ratio(results, server, workload) if column.with_ratio else "")

    return _servers_table(results, workloads, cell)


def _real_table(results: Results, workloads: Sequence[Workload]) -> str:
    def cell(server: Server, workload: Workload) -> str:
        value = results.median(server.name, workload.name, "iops")
        if value is None:
            return _missing(results, server, workload)
        return f"{1 / value:.1f}" + _shown_ratio(results, server, workload)

    return _servers_table(results, workloads, cell)


def _servers_table(results: Results, workloads: Sequence[Workload], cell: Callable[[Server, Workload], str]) -> str:
    titles = [server.name + (FLOOR if server.is_floor else "") for server in results.servers]
    rows = [[workload.title, *(cell(server, workload) for server in results.servers)] for workload in workloads]
    return _table(["", *titles], rows)


def _missing(results: Results, server: Server, workload: Workload) -> str:
    """Why there is no figure: it cannot do it, the driver does not say, or it failed in every round."""
    failed = any((it.server, it.workload) == (server.name, workload.name) for it in results.failures())
    return FAILED if failed else BLANK


def _shown_ratio(results: Results, server: Server, workload: Workload) -> str:
    ratio = results.ratio(server.name, workload.name, REFERENCE)
    return "" if ratio is None or server.name == REFERENCE else f" ({ratio.median:.2f})"


def _notes(results: Results) -> Iterable[str]:
    if any(not server.durable_flush for server in results.servers):
        yield f"{NOT_DURABLE} Not durable: an acknowledged flush does not survive a power cut."
    if any(server.is_floor for server in results.servers):
        yield f"{FLOOR} No clones: what the machine leaves room for, not a peer."
    for server in results.servers:
        if server.note:
            yield f"\n{server.name}: {server.note}."
    title = {workload.name: workload.title for workload in results.workloads}
    for server in results.servers:
        reasons: dict[str, list[str]] = {}
        for name, reason in server.lacks.items():
            reasons.setdefault(reason, []).append(title[name])
        for reason, titles in reasons.items():
            if not server.is_floor:
                yield f"\n{server.name}, no figure because {reason}: {'; '.join(titles)}."


def _first_line(error: str) -> str:
    return (error.strip().splitlines() or [""])[0]


def _rounded(value: float) -> str:
    """Three digits or so, which is more than the noise allows."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


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
