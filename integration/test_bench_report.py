"""What the benchmark makes of its figures: ratios, goals, tables, the chart, the page."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from integration.bench import page
from integration.bench.chart import LEFT, LINES, Bar, Line, chart_lines, draw
from integration.bench.cost import Cost
from integration.bench.goals import ALL, DURABLE, GOALS, ONLY, best_verdicts, named_verdicts
from integration.bench.machine import Machine
from integration.bench.measure import Measurement
from integration.bench.report import to_markdown
from integration.bench.results import Record, Results, Server, from_json, to_json
from integration.bench.workloads import WORKLOADS

DURABLE_SERVERS = ("nbdclone", "qemu-nbd", "raw")
FLOORS = ("raw",)


def results_of(iops: dict[str, list[float]], workload: str = "randread-4k-1") -> Results:
    """Results of one workload; a server without figures failed."""
    records = []
    for server, figures in iops.items():
        if not figures:
            records.append(Record(0, server, workload, None, "it broke\nat length"))
        for number, figure in enumerate(figures):
            records.append(Record(number, server, workload, Measurement(figure, 1, None, 1, 1, 1)))
    return Results(
        date="today",
        command="bench",
        duration_s=60,
        machine=Machine("cpu", 2, 1.0, "Linux", "ext4"),
        drivers=["fio"],
        rounds=1,
        runtime_s=1,
        size=1 << 20,
        servers=[Server(name, "1", name in DURABLE_SERVERS, name in FLOORS) for name in iops],
        workloads=[it for it in WORKLOADS if it.name == workload],
        records=records,
        costs=[Cost("listing", 0.5, "s", limit=1)],
    )


def text_of(results: Results) -> str:
    """The report without the spaces that align its tables."""
    return re.sub(" +", " ", to_markdown(results))


# Ratios


def test_a_ratio_is_the_median_of_the_ratios_within_rounds_and_knows_their_range() -> None:
    # The machine became ten times slower in the last round; the ratio of the medians would be 2.
    results = results_of({"nbdclone": [200.0, 400.0, 30.0], "qemu-nbd": [100.0, 100.0, 10.0]})
    ratio = results.ratio("nbdclone", "randread-4k-1", "qemu-nbd")
    assert ratio is not None
    assert (ratio.median, ratio.least, ratio.greatest) == (3.0, 2.0, 4.0)
    assert results.median("nbdclone", "randread-4k-1", "iops") == 200.0


def test_a_round_in_which_one_of_the_two_failed_has_no_ratio() -> None:
    results = results_of({"nbdclone": [200.0, 900.0], "qemu-nbd": [100.0]})
    ratio = results.ratio("nbdclone", "randread-4k-1", "qemu-nbd")
    assert ratio is not None
    assert (ratio.median, ratio.greatest) == (2.0, 2.0)
    assert results.ratio("nbdclone", "randread-4k-1", "nbd-server") is None


def test_results_come_back_from_their_json() -> None:
    results = results_of({"nbdclone": [200.0, 400.0], "qemu-nbd": []})
    assert from_json(to_json(results, goals=[1])) == results


# Goals


def test_goals_say_whether_they_are_met() -> None:
    missed = results_of({"nbdclone": [599.0], "qemu-nbd": [200.0]}, "randread-4k-16")
    assert "depth 16: at least 3 times qemu-nbd | 3.00 | 3.00 to 3.00 | **not met** |" in text_of(missed)
    reached = results_of({"nbdclone": [600.0], "qemu-nbd": [200.0]}, "randread-4k-16")
    assert "depth 16: at least 3 times qemu-nbd | 3.00 | 3.00 to 3.00 | met |" in text_of(reached)
    assert "| listing: less than 1 s | 0.50 s | - | met |" in text_of(reached)


def test_a_goal_whose_subject_was_not_measured_is_not_met_and_stays_in_the_table() -> None:
    results = results_of({"nbdclone": [], "qemu-nbd": [200.0]}, "randread-4k-16")
    assert "at least 3 times qemu-nbd | - | - | **not met** |" in text_of(results)
    assert [(it.kind, it.is_met) for it in best_verdicts(results)] == [(ONLY, False)]


def test_a_server_that_was_not_in_the_run_is_no_goal() -> None:
    results = results_of({"nbdclone": [100.0], "qemu-nbd": [10.0]}, "randread-4k-16")
    assert {it.to for it in named_verdicts(results)} == {"qemu-nbd"}


def test_reads_have_one_goal_beside_the_best_of_all_peers_and_floors_are_no_peers() -> None:
    rounds = {"nbdclone": [100.0], "qemu-nbd": [50.0], "nbdkit cow": [80.0], "raw": [900.0]}
    (verdict,) = best_verdicts(results_of(rounds))
    assert (verdict.kind, verdict.to, verdict.is_met) == (ONLY, "nbdkit cow", True)


def test_writes_have_a_goal_beside_the_durable_and_one_beside_all() -> None:
    rounds = {"nbdclone": [100.0], "qemu-nbd": [50.0], "nbdkit cow": [200.0]}
    durable, of_all = best_verdicts(results_of(rounds, "randwrite-4k-16"))
    assert (durable.kind, durable.to, durable.is_met) == (DURABLE, "qemu-nbd", True)
    assert (of_all.kind, of_all.to, of_all.is_met) == (ALL, "nbdkit cow", False)
    said = text_of(results_of(rounds, "randwrite-4k-16"))
    assert "1 of 2 met" in said
    assert "| 4k random write, depth 16 (all) | nbdkit cow | 0.50 | 0.50 to 0.50 | **not met** |" in said


def test_another_checkout_of_nbdclone_is_not_its_own_peer() -> None:
    rounds = {"nbdclone": [100.0], "qemu-nbd": [50.0], "nbdclone in other": [200.0]}
    assert [it.to for it in best_verdicts(results_of(rounds))] == ["qemu-nbd"]


def test_every_goal_is_about_workloads_that_there_are() -> None:
    assert {name for goal in GOALS for name in goal.workloads} <= {workload.name for workload in WORKLOADS}
    assert set(LINES) <= {workload.name for workload in WORKLOADS}


# Tables


def test_a_turn_that_failed_is_reported_and_the_others_stand() -> None:
    said = text_of(results_of({"nbdclone": [300.0], "qemu-nbd": []}))
    assert "| 4k random read, depth 1 | 300 | failed |" in said
    assert "- round 1, qemu-nbd, randread-4k-1: it broke\n" in said


def test_what_was_not_measured_is_a_dash_and_no_failure() -> None:
    results = results_of({"nbdclone": [300.0], "qemu-nbd": [100.0]}, "chain-randread-4k-16")
    results = from_json(to_json(results).replace('"server": "nbdclone"', '"server": "somebody"'))
    assert "| 4k random read, depth 16, 32 layers | - | 100 |" in text_of(results)


def test_writes_of_a_server_without_durable_flush_are_marked_and_its_reads_are_not() -> None:
    rounds = {"qemu-nbd": [100.0], "nbdkit cow": [300.0]}
    assert "| 100 | 300¹ (3.00) |" in text_of(results_of(rounds, "randwrite-4k-16"))
    assert "| 100 | 300 (3.00) |" in text_of(results_of(rounds))


def test_the_report_says_why_a_server_has_no_figure() -> None:
    results = results_of({"qemu-nbd": [100.0]}, "chain-randread-4k-16")
    lacking = Server("nbdclone", "1", True, lacks={"chain-randread-4k-16": "it has no snapshots"})
    said = text_of(replace(results, servers=[*results.servers, lacking]))
    assert "nbdclone, no figure because it has no snapshots: 4k random read, depth 16, 32 layers." in said


def test_real_work_is_told_in_seconds() -> None:
    said = text_of(results_of({"nbdclone": [0.1], "qemu-nbd": [0.05]}, "boot"))
    assert "| Debian boots from a clone | 10.0 (2.00) | 20.0 |" in said
    assert "Requests per second" not in said


# The chart


def test_a_bar_is_as_long_as_its_ratio_and_hollow_where_the_writes_are_not_durable() -> None:
    drawn = draw([Line("<a line>", [Bar("nbdclone", 4.0), Bar("qemu-nbd", 1.0), Bar("nbdkit cow", 2.0, True)])])
    svg = ElementTree.fromstring(drawn)
    rects = [it for it in svg.iter("{http://www.w3.org/2000/svg}rect") if it.get("x") == str(LEFT)]
    widths = [float(rect.get("width", "0")) for rect in rects]
    assert widths[0] == pytest.approx(4 * widths[1])
    assert widths[2] == pytest.approx(2 * widths[1])
    assert [rect.get("fill") == "none" for rect in rects] == [False, False, True]
    assert any(text.text == "<a line>" for text in svg.iter("{http://www.w3.org/2000/svg}text"))


def test_a_hollow_bar_is_cut_off_where_the_longest_other_ends_and_says_so() -> None:
    drawn = draw([Line("synced", [Bar("nbdclone", 4.0), Bar("qemu-nbd", 1.0), Bar("nbdkit cow", 18.3, True)])])
    svg = ElementTree.fromstring(drawn)
    widths = [it.get("width") for it in svg.iter("{http://www.w3.org/2000/svg}rect") if it.get("x") == str(LEFT)]
    assert widths[0] == widths[2]
    assert any(text.text == "→ 18.3" for text in svg.iter("{http://www.w3.org/2000/svg}text"))


def test_everything_in_the_chart_is_within_its_frame() -> None:
    lines = [Line("x" * 40, [Bar(f"server {number}", ratio) for number, ratio in enumerate((0.01, 1.0, 7.9))])] * 13
    svg = ElementTree.fromstring(draw(lines, "where"))
    _, _, width, height = map(float, svg.attrib["viewBox"].split())
    for rect in svg.iter("{http://www.w3.org/2000/svg}rect"):
        assert float(rect.attrib["x"]) + float(rect.attrib["width"]) <= width
        assert float(rect.attrib["y"]) + float(rect.attrib["height"]) <= height


def test_the_chart_has_the_lines_that_were_measured_and_the_servers_of_clones() -> None:
    rounds = {"nbdclone": [300.0], "qemu-nbd": [100.0], "raw": [500.0]}
    (line,) = chart_lines(results_of(rounds, "randread-4k-16"))
    assert [(bar.server, bar.ratio) for bar in line.bars] == [("nbdclone", 3.0), ("qemu-nbd", 1.0)]
    assert chart_lines(results_of({"nbdclone": [300.0], "qemu-nbd": []}, "randread-4k-16")) == []
    assert draw([]) == ""


@pytest.mark.parametrize(("workload", "hollow"), [("randread-4k-16", False), ("randwrite-4k-16", True)])
def test_writes_without_a_durable_flush_are_another_work_and_reads_are_not(workload: str, hollow: bool) -> None:
    rounds = {"qemu-nbd": [100.0], "nbdkit cow": [300.0]}
    (line,) = chart_lines(results_of(rounds, workload))
    assert [bar.not_durable for bar in line.bars] == [False, hollow]


# The page


def test_the_report_goes_between_the_marks_and_the_rest_of_the_page_stays(tmp_path: Path) -> None:
    (tmp_path / "benchmarks.md").write_text(f"# By hand\n\n{page.BEGIN}\nold\n{page.END}\n\nthe end\n")
    results = results_of({"nbdclone": [300.0], "qemu-nbd": [100.0]}, "randread-4k-16")
    page.write_page(results, tmp_path)
    page.write_page(results, tmp_path)
    said = (tmp_path / "benchmarks.md").read_text()
    assert said == f"# By hand\n\n{page.BEGIN}\n\n{to_markdown(results)}\n{page.END}\n\nthe end\n"
    raw = json.loads((tmp_path / "benchmarks.json").read_text())
    assert raw["ratios"]["randread-4k-16"]["nbdclone"]["qemu-nbd"] == {"median": 3.0, "least": 3.0, "greatest": 3.0}
    assert [goal["met"] for goal in raw["goals"]] == [True, True]
    assert (tmp_path / "benchmarks.svg").exists()


def test_a_page_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="measured: begin"):
        page.between_marks("# By hand\n", "report")


def test_the_page_in_docs_has_the_marks() -> None:
    text = (Path(__file__).parents[1] / "docs" / "benchmarks.md").read_text()
    assert page.between_marks(text, "report") != text
