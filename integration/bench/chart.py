"""A chart of the results as SVG: for each line a bar for each server, as long as its ratio to the reference.

It is drawn without a background and in colours that are legible on white and on black.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from integration.bench.results import Results
from integration.bench.workloads import REFERENCE, SUBJECT

LINES = (
    "randread-4k-1", "randread-4k-16", "randwrite-4k-1", "randwrite-4k-16", "mixed-4k-16", "syncwrite-4k-1",
    "read-1m-8", "write-1m-8", "cold-read-1m-8", "checkerboard-randread-4k-16", "clones8-randread-4k-16",
    "connections4-randread-4k-16", "tls-randread-4k-16",
)  # fmt: skip
COLOURS = {SUBJECT: "#2f81f7", REFERENCE: "#8b949e"}
OTHERS = ("#bf8700", "#a371f7", "#2da44e", "#d1588e")
TEXT, RULE = "#768390", "#76839055"
WIDTH, LEFT, RIGHT = 880, 340, 60
BAR, GAP, PAD = 10, 2, 10  # the height of a bar, between bars, between lines
HEADER, FOOTER = 52, 30
LEAST_AXIS = 2.0
FONT = "font-family='system-ui, sans-serif' font-size='12'"


@dataclass(frozen=True, slots=True)
class Bar:
    """``not_durable``: it writes, and a flush of it saves nothing."""

    server: str
    ratio: float
    not_durable: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    title: str
    bars: Sequence[Bar]


def chart_lines(results: Results, names: Sequence[str] = LINES) -> list[Line]:
    """Of those of the named lines that were measured, and of the servers that have clones."""
    lines = []
    for name in names:
        workload = results.workload(name)
        if workload is None or results.median(REFERENCE, name, "iops") is None:
            continue
        bars = [
            Bar(peer.name, ratio.median, workload.writes and not peer.durable_flush)
            for peer in results.peers()
            if (ratio := results.ratio(peer.name, name, REFERENCE)) is not None
        ]
        lines.append(Line(workload.title, bars))
    return lines


def draw(lines: Sequence[Line], subtitle: str = "") -> str:
    """The text of an SVG file; empty when there is nothing to draw."""
    if not lines:
        return ""
    servers = list(dict.fromkeys(bar.server for line in lines for bar in line.bars))
    others = iter(OTHERS * len(servers))
    colour = {server: COLOURS.get(server) or next(others) for server in servers}
    # As long as the longest of those that do the same work; a hollow bar that is longer is cut off.
    greatest = max([LEAST_AXIS, *(bar.ratio for line in lines for bar in line.bars if not bar.not_durable)])
    scale = (WIDTH - LEFT - RIGHT) / greatest
    heights = [len(line.bars) * (BAR + GAP) + PAD for line in lines]
    bottom = HEADER + sum(heights)
    title = f"Requests per second, as a ratio to {REFERENCE}"
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {bottom + FOOTER}' role='img' {FONT}>",
        f"<title>{title}</title>",
        f"<text x='0' y='14' fill='{TEXT}' font-weight='600'>{title}</text>",
        *_legend(servers, colour),
        *_axis(scale, greatest, bottom),
    ]
    top = HEADER
    for line, height in zip(lines, heights, strict=True):
        middle = top + (height - PAD) / 2
        parts.append(f"<text x='{LEFT - 8}' y='{middle + 4:.0f}' text-anchor='end' fill='{TEXT}'>"
                     f"{escape(line.title)}</text>")  # fmt: skip
        for number, bar in enumerate(line.bars):
            parts += _bar(bar, top + number * (BAR + GAP), scale, greatest, colour[bar.server])
        top += height
    if subtitle:
        parts.append(f"<text x='0' y='{bottom + FOOTER - 6}' fill='{TEXT}' font-size='10'>{escape(subtitle)}</text>")
    return "\n".join([*parts, "</svg>"]) + "\n"


def _bar(bar: Bar, y: float, scale: float, greatest: float, colour: str) -> Iterator[str]:
    width = min(bar.ratio, greatest) * scale
    figure = f"{bar.ratio:.2f}" if bar.ratio <= greatest else f"→ {bar.ratio:.1f}"
    # Hollow: not the same work.
    paint = f"fill='none' stroke='{colour}'" if bar.not_durable else f"fill='{colour}'"
    yield f"<rect x='{LEFT}' y='{y}' width='{width:.1f}' height='{BAR}' {paint}/>"
    yield f"<text x='{LEFT + width + 4:.1f}' y='{y + BAR - 1}' fill='{TEXT}' font-size='10'>{figure}</text>"


def _legend(servers: Sequence[str], colour: dict[str, str]) -> Iterator[str]:
    x = 0.0
    for server in servers:
        yield f"<rect x='{x:.0f}' y='26' width='{BAR}' height='{BAR}' fill='{colour[server]}'/>"
        yield f"<text x='{x + 15:.0f}' y='35' fill='{TEXT}'>{escape(server)}</text>"
        x += 35 + 7.5 * len(server)
    yield f"<text x='{x:.0f}' y='35' fill='{TEXT}'>hollow: its writes are not durable</text>"


def _axis(scale: float, greatest: float, bottom: float) -> Iterator[str]:
    """A rule at every whole ratio; the one at 1 is the reference."""
    for ratio in range(int(greatest) + 1):
        x = LEFT + ratio * scale
        colour, dash = (TEXT, "") if ratio == 1 else (RULE, " stroke-dasharray='2 3'")
        yield f"<line x1='{x:.1f}' x2='{x:.1f}' y1='{HEADER - 6}' y2='{bottom - PAD / 2}' stroke='{colour}'{dash}/>"
        yield f"<text x='{x:.1f}' y='{bottom + 8}' text-anchor='middle' fill='{TEXT}' font-size='10'>{ratio}</text>"
