"""nbdinfo: what a clone and a base are and can, which exports there are, and what of them is whose."""

from __future__ import annotations

import json
from typing import Any

import pytest

from integration.clients.programs import INSTALLED_QEMU, MIB, SIZE, WAYS, run, uri
from integration.packages import require
from integration.served import Served

pytestmark = pytest.mark.timeout(120)

CONTEXTS = ["base:allocation", "qemu:allocation-depth", "nbdclone:origin"]
BLOCK_SIZES = {"block_size_minimum": 1, "block_size_preferred": 4096, "block_size_maximum": 32 * MIB}

# Each question that nbdinfo knows, under each name it has for it: the answer for a clone, and for a base.
ANSWERS = {
    ("--can", "connect"): (True, True),
    ("--can", "read"): (True, True),
    ("--can", "write"): (True, False),
    ("--is", "read-only"): (False, True),
    ("--can", "trim"): (True, False),
    ("--can", "zero"): (True, False),
    ("--can", "fast-zero"): (True, False),
    ("--can", "flush"): (True, True),
    ("--can", "fua"): (True, False),
    ("--can", "df"): (True, True),
    ("--can", "cache"): (True, True),
    ("--can", "multi-conn"): (True, True),
    ("--can", "structured-reply"): (True, True),
    ("--is", "tls"): (False, False),
    ("--is", "rotational"): (False, False),
}
YES, NO = 0, 2  # nbdinfo's exit status


@pytest.mark.parametrize(("option", "question"), ANSWERS)
def test_nbdinfo_is_told_what_a_clone_and_a_base_can(server: Served, option: str, question: str) -> None:
    for export, answer in zip(("spare", "base"), ANSWERS[option, question], strict=True):
        told = run("nbdinfo", option, question, uri(server, export), check=False)
        assert told.returncode == (YES if answer else NO), f"{export}: {told.stderr}"


@pytest.mark.parametrize("way", WAYS)
def test_nbdinfo_describes_a_clone(server: Served, clone: str, way: str) -> None:
    told = json.loads(run("nbdinfo", "--json", uri(server, clone, way)).stdout)
    assert (told["protocol"], told["structured"], told["TLS"]) == ("newstyle-fixed", True, False)
    [export] = told["exports"]
    expected: dict[str, Any] = {
        "export-name": clone,
        "export-size": SIZE,
        "contexts": CONTEXTS,
        "is_read_only": False,
        "is_rotational": False,
        "can_cache": True,
        "can_df": True,
        "can_fast_zero": True,
        "can_flush": True,
        "can_fua": True,
        "can_multi_conn": True,
        "can_trim": True,
        "can_zero": True,
        **BLOCK_SIZES,
    }
    assert {key: export.get(key) for key in expected} == expected


@pytest.mark.parametrize("way", WAYS)
def test_nbdinfo_describes_a_base(server: Served, way: str) -> None:
    [export] = json.loads(run("nbdinfo", "--json", uri(server, "base", way)).stdout)["exports"]
    expected: dict[str, Any] = {
        "export-name": "base",
        "export-size": SIZE,
        "contexts": CONTEXTS,
        "is_read_only": True,
        "is_rotational": False,
        "can_cache": True,
        "can_df": True,
        "can_fast_zero": False,
        "can_flush": True,
        "can_fua": False,
        "can_multi_conn": True,
        "can_trim": False,
        "can_zero": False,
        **BLOCK_SIZES,
    }
    assert {key: export.get(key) for key in expected} == expected


@pytest.mark.parametrize("way", WAYS)
def test_nbdinfo_lists_every_export(server: Served, clone: str, way: str) -> None:
    told = json.loads(run("nbdinfo", "--list", "--json", uri(server, "", way)).stdout)
    exports = {export["export-name"]: export for export in told["exports"]}
    assert len(exports) == len(told["exports"])
    assert {"base", "spare", clone} <= exports.keys()
    assert {name for name, export in exports.items() if export["is_read_only"]} == {"base"}
    assert {export["export-size"] for name, export in exports.items() if "large" not in name} == {SIZE}


def test_nbdinfo_lists_in_words_for_people(server: Served, clone: str) -> None:
    lines = run("nbdinfo", "--list", uri(server, "")).stdout.splitlines()
    assert {f'export="{name}":' for name in ("base", "spare", clone)} <= set(lines)


@pytest.mark.parametrize("way", WAYS)
def test_nbdinfo_shows_the_size(server: Served, large: str, way: str) -> None:
    assert run("nbdinfo", "--size", uri(server, "spare", way)).stdout == f"{SIZE}\n"
    assert run("nbdinfo", "--size", uri(server, large, way)).stdout == f"{10 << 30}\n"


def test_nbdinfo_shows_the_reason_why_there_is_no_such_export(server: Served) -> None:
    for question in ((), ("--size",), ("--map",)):
        refused = run("nbdinfo", *question, uri(server, "nothing"), check=False)
        assert refused.returncode == 1
        assert "No such file or directory" in refused.stderr


# What of an export is whose; integration/test_block_status.py has every extent of an export with holes


@pytest.mark.parametrize(
    ("context", "totals"),
    [("qemu:allocation-depth", {1: 3 * MIB, 2: SIZE - 3 * MIB}), ("nbdclone:origin", {2: 3 * MIB, 1: SIZE - 3 * MIB})],
)
@pytest.mark.parametrize("way", WAYS)
def test_nbdinfo_adds_up_how_much_is_the_clones_own(
    server: Served, clone: str, way: str, context: str, totals: dict[int, int]
) -> None:
    require("qemu-utils")
    there = uri(server, clone, way)
    INSTALLED_QEMU.io(there, "write -P 7 1M 2M", "discard 8M 1M")
    told = json.loads(run("nbdinfo", f"--map={context}", "--totals", "--json", there).stdout)
    assert {each["type"]: each["size"] for each in told} == totals


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("context", ["qemu:allocation-depth", "nbdclone:origin"])
def test_nbdinfo_maps_a_base_as_one_layer(server: Served, way: str, context: str) -> None:
    told = json.loads(run("nbdinfo", f"--map={context}", "--json", uri(server, "base", way)).stdout)
    assert [(extent["offset"], extent["length"], extent["type"]) for extent in told] == [(0, SIZE, 1)]


@pytest.mark.parametrize("way", WAYS)
def test_nbdinfo_maps_all_of_a_clone_of_many_gib_by_default_as_data_and_holes(
    server: Served, large: str, way: str
) -> None:
    told = json.loads(run("nbdinfo", "--map", "--json", uri(server, large, way)).stdout)
    assert {extent["type"] for extent in told} == {0, 3}
    assert [extent["offset"] for extent in told[1:]] == [extent["offset"] + extent["length"] for extent in told[:-1]]
    last = told[-1]
    assert (last["offset"] + last["length"], last["type"]) == (10 << 30, 3)
    assert last["offset"] <= SIZE  # beyond the base there is one hole
