"""docs/protocol.md: the table has all that the code speaks, the limits are the code's, every named test exists."""

from __future__ import annotations

import ast
import importlib
import re
from enum import IntEnum
from functools import cache
from pathlib import Path

import pytest

from nbdclone.protocol import wire
from nbdclone.protocol.block_status import CONTEXTS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "protocol.md").read_text()
UNITS = {"": 1, "s": 1, "bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
# The heading of each enumeration's part of the table, and what stands before its members' names there.
PARTS: dict[str, tuple[type[IntEnum] | type, str]] = {
    "Handshake flags": (wire.HandshakeFlag, ""),
    "Client flags": (wire.HandshakeFlag, "C_"),
    "Options": (wire.Option, ""),
    "Option replies": (wire.OptionReply, ""),
    "Information": (wire.Info, ""),
    "Transmission flags": (wire.TransmissionFlag, ""),
    "Commands": (wire.Command, ""),
    "Command flags": (wire.CommandFlag, ""),
    "Reply flags": (wire.ReplyFlag, ""),
    "Reply types": (wire.ReplyType, ""),
    "Errors": (wire.Errno, ""),
    "States": (wire.State, ""),
}
HEADINGS = [*PARTS, "Messages", "Metadata contexts", "URIs"]
# Where the constants of a kind are all limits; of other modules, those in the table are.
MODULES = {
    "wire": "protocol",
    "requests": "protocol",
    "input": "server",
    "offload": "server",
    "output": "server",
    "connection": "server",
    "session": "server",
    "reading": "server",
    "admission": "server",
    "budget": "server",
    "host": "server",
    "relay": "server",
    "quiet": "server",
    "disk": "store",
    "client": "",
    "client_connection": "",
}
# Constants that are named like limits and bound no peer: sizes at which the way of doing something changes, and what
# the event loop does in one go.
NO_LIMITS = {
    "session.MAX_INLINE",
    "reading.MAX_INLINE",
    "reading.MAX_TOGETHER",
    "input.MAX_RECEIVES",
    "offload.MAX_THREADS",
    "client.MAX_PIECE",
    "client.MAX_EXTENDED_RANGE",
    "disk.MAX_LAYERS",
    "relay.MAX_PASSES",
}


def rows(heading: str) -> list[list[str]]:
    """The cells of each row of the table's part with this heading."""
    part = PAGE.split(f"\n### {heading}\n", 1)[1].split("\n#", 1)[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def number(text: str) -> int:
    """A number as the table has it: ``5``, ``bit 3``, ``2^31 + 5``, ``0x25609513``."""
    if bit := re.fullmatch(r"bit (\d+)", text):
        return 1 << int(bit[1])
    if error := re.fullmatch(r"2\^(\d+) \+ (\d+)", text):
        return (1 << int(error[1])) + int(error[2])
    return int(text, 0)


@cache
def names_in(path: str) -> set[str]:
    """The names of the tests in a file."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, functions)}


@cache
def integration_tests() -> set[str]:
    return {name for path in (ROOT / "integration").rglob("test_*.py") for name in names_in(str(path))}


@pytest.mark.parametrize("heading", PARTS)
def test_the_table_has_every_member_with_its_number_and_no_other(heading: str) -> None:
    enumeration, prefix = PARTS[heading]
    numbered = {name: number(text) for text, name, *_ in rows(heading) if name}
    spoken = {name for _, name, says, *_ in rows(heading) if name and not says.startswith("no: ")}
    members = {prefix + name: int(value) for name, value in enumeration.__members__.items()}
    assert {name: value for name, value in numbered.items() if name in spoken} == members
    assert len(set(numbered.values())) == len(rows(heading)) - sum(not name for _, name, *_ in rows(heading))


def test_the_table_has_every_message_and_context() -> None:
    magics = {name: number(text) for text, name, *_ in rows("Messages")}
    assert magics == {name: getattr(wire, f"{name}_MAGIC") for name in magics}
    assert len(magics) == 5
    contexts = {name.strip("`") for _, name, says, *_ in rows("Metadata contexts") if says == "yes"}
    assert contexts == {name for _id, name in CONTEXTS}
    assert all(f"\n| `{name}` | " in PAGE for name in contexts), "what its statuses mean"


@pytest.mark.parametrize("heading", HEADINGS)
def test_every_row_says_by_what_test_it_is_shown_and_who_was_seen_to_use_it(heading: str) -> None:
    for row in rows(heading):
        assert len(row) == 5, row
        *_, says, shown, used = row
        assert says
        assert re.fullmatch(r"`\S+::test_\w+`(<br>`\S+::test_\w+`)*", shown), row
        assert re.fullmatch(r"- \(.+\)", used) or re.search(r"\(`test_\w+`\)", used), row


def test_every_test_that_is_named_exists() -> None:
    named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", PAGE)
    assert len(named) > 100
    assert [f"{path}::{name}" for path, name in named if name not in names_in(path)] == []
    seen = set(re.findall(r"\(`(test_\w+)`\)", PAGE))
    assert len(seen) > 20
    assert seen - integration_tests() == set()


def limits() -> dict[str, float]:
    found = {}
    for name, value in re.findall(r"^\| `(\w+\.[A-Z_]+)` \| ([^|]+) \| [^|]+ \| `[^|]+` \|$", PAGE, re.MULTILINE):
        amount, _, unit = value.partition(" ")
        found[name] = float(amount) * UNITS[unit]
    return found


def constants(module: str) -> dict[str, float]:
    package = MODULES[module]
    found = importlib.import_module(".".join(filter(None, ("nbdclone", package, module))))
    return {f"{module}.{name}": value for name, value in vars(found).items() if name.isupper()}


def test_the_limits_are_those_of_the_code() -> None:
    documented = limits()
    assert len(documented) > 30
    for name, value in documented.items():
        assert constants(name.partition(".")[0])[name] == value, name


@pytest.mark.parametrize("module", MODULES)
def test_no_limit_is_missing(module: str) -> None:
    there = {name.partition(".")[2] for name in limits()}
    for name in constants(module):
        if name.partition(".")[2].startswith("MAX_") and name not in NO_LIMITS:
            assert name.partition(".")[2] in there, name
