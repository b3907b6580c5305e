"""Where the report goes: a directory of its own; and, when asked for, the page in docs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from integration.bench.chart import chart_lines, draw
from integration.bench.goals import best_verdicts, named_verdicts
from integration.bench.report import to_markdown
from integration.bench.results import Results, to_json

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
MARKDOWN, JSON, CHART = "benchmarks.md", "benchmarks.json", "benchmarks.svg"


def write_report(results: Results, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MARKDOWN).write_text(to_markdown(results))
    _write_figures(results, directory)


def write_page(results: Results, docs: Path) -> None:
    """Put the report between the marks of the page, whose other text stays; the raw figures and the chart beside it."""
    page = docs / MARKDOWN
    page.write_text(between_marks(page.read_text(), to_markdown(results)))
    _write_figures(results, docs)


def between_marks(page: str, report: str) -> str:
    """ValueError when the page has no marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no {BEGIN} ... {END} for the report to stand between")
    return f"{before}{begin}\n\n{report.strip()}\n\n{end}{after}"


def _write_figures(results: Results, directory: Path) -> None:
    (directory / JSON).write_text(to_json(results, goals=_goals(results), ratios=_ratios(results)))
    machine = results.machine
    subtitle = f"{results.date}; {machine.cpu}, {machine.cores} cores, {machine.file_system}"
    if picture := draw(chart_lines(results), subtitle):
        (directory / CHART).write_text(picture)


def _goals(results: Results) -> list[dict[str, Any]]:
    verdicts = [*named_verdicts(results), *best_verdicts(results)]
    return [dataclasses.asdict(verdict) | {"met": verdict.is_met} for verdict in verdicts]


def _ratios(results: Results) -> dict[str, dict[str, dict[str, Any]]]:
    """By workload, server, and the server that it is compared with: of requests per second, with their range."""
    names = [server.name for server in results.servers]
    return {
        workload.name: {
            server: {
                other: dataclasses.asdict(ratio)
                for other in names
                if other != server and (ratio := results.ratio(server, workload.name, other)) is not None
            }
            for server in names
        }
        for workload in results.workloads
    }
