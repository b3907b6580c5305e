"""The documents say what the code does: the tables of the format, the examples of the API."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from nbdclone.protocol.wire import MAX_CONTEXTS, MAX_QUERIES
from nbdclone.server.admission import MAX_CONNECTIONS
from nbdclone.server.limits import BURST_S, Limit
from nbdclone.server.peer import Peer
from nbdclone.server.quiet import INTERVAL_S
from nbdclone.server.settings import read_settings
from nbdclone.store import delta_file as delta
from nbdclone.store import journal, trace
from nbdclone.store.check import check_pool
from nbdclone.store.disk import MAX_EXTENTS
from nbdclone.store.finding import KINDS
from nbdclone.store.layer import BITMAP_SIZE, BLOCKS_PER_SEGMENT, SEGMENT_SIZE
from nbdclone.store.pool import Pool

COUNTS = {7: "seven", 8: "eight", 9: "nine"}
DOCS = Path(__file__).parents[1] / "docs"


def table_after(heading: str) -> list[tuple[int, int, str]]:
    """The rows (offset, length, text) of the first table after a heading of format.md."""
    text = (DOCS / "format.md").read_text().split(f"{heading}\n", 1)[1]
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (.+?) \|$", text.split("\n#", 1)[0], re.MULTILINE)
    return [(int(offset), int(length), what) for offset, length, what in rows]


def field_places(layout: struct.Struct) -> list[tuple[int, int]]:
    """(offset, length) of each field of a struct without padding."""
    places = []
    offset = 0
    for field in re.findall(r"\d*[sIQH]", layout.format.lstrip(">")):
        length = struct.calcsize(">" + field)
        places.append((offset, length))
        offset += length
    return places


def test_the_segment_is_laid_out_as_documented() -> None:
    rows = table_after("## The delta")
    slots = {offset for offset, length, _ in rows if length == delta.PAGE_SIZE}
    assert slots == {*delta.HEADER_SLOTS, *delta.MAP_SLOTS, *delta.RECORD_SLOTS}
    assert rows[-1][:2] == (delta.METADATA_SIZE, SEGMENT_SIZE)


def test_the_header_is_laid_out_as_documented() -> None:
    *fields, checksum = table_after("### Header")
    assert [place[:2] for place in fields] == field_places(delta.HEADER)
    assert checksum[:2] == (delta.PAGE_SIZE - delta.CHECKSUM.size, delta.CHECKSUM.size)


def test_the_map_page_is_laid_out_as_documented() -> None:
    *fields, bitmap = table_after("### Map page")
    assert [place[:2] for place in fields] == field_places(delta.MAP_PAGE)
    assert bitmap[:2] == (delta.MAP_PAGE.size, BITMAP_SIZE)
    assert f"{BLOCKS_PER_SEGMENT:,} blocks" in (DOCS / "format.md").read_text()


def test_the_boot_trace_is_laid_out_as_documented() -> None:
    *fields, checksum, _grains = table_after("## The boot trace")
    assert [place[:2] for place in fields] == field_places(trace.HEADER)
    assert checksum[:2] == (trace.HEADER.size, trace.CHECKSUM.size)
    whole = trace.Trace(bytes(16), 5, (7, 9)).dump()
    assert whole[44:48] == zlib.crc32(whole[:44] + whole[48:]).to_bytes(4, "big")
    assert whole[48:] == bytes([0, 0, 0, 7, 0, 0, 0, 9])
    said = (DOCS / "format.md").read_text()
    assert f"grain size, {trace.GRAIN_SIZE} " in said
    assert f"at most {trace.MAX_GRAINS} " in said


def test_a_record_is_laid_out_as_documented() -> None:
    *fields, entries = table_after("### Record")
    assert [place[:2] for place in fields] == field_places(journal.RECORD)
    assert entries[:2] == (journal.RECORD.size, delta.PAGE_SIZE - journal.RECORD.size)
    assert f"at most {entries[1] // journal.ENTRY.size}" in fields[-1][2]
    assert f"each block {journal.ENTRY.size} bytes" in entries[2]


@pytest.mark.parametrize("size", [4096, SEGMENT_SIZE, SEGMENT_SIZE + 1, 5 * SEGMENT_SIZE + 512])
def test_the_documented_arithmetic_is_that_of_the_code(size: int) -> None:
    last = size - 1
    documented = last + (last // 133169152 + 1) * 1048576
    assert documented < delta.file_size(size) <= documented + 4096


def test_the_examples_of_the_api_run(tmp_path: Path) -> None:
    with open(tmp_path / "disk.img", "wb") as image:
        image.truncate(8 << 20)
    examples = re.findall(r"```python\n(.*?)```", (DOCS / "api.md").read_text(), re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", example],
            check=False,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr


SECTIONS = {
    "": "# How the code is divided",
    "protocol": "## The protocol",
    "store": "## The store",
    "server": "## The server",
    "control": "## Control",
    "exchange": "## Exchange",
    "commands": "## The command line",
}


def test_the_page_on_architecture_names_every_module_under_its_package_and_no_other() -> None:
    root = Path(delta.__file__).parents[1]
    page = (DOCS / "architecture.md").read_text()
    packages = {path.parent.name for path in root.glob("*/__init__.py")}
    assert packages | {""} == SECTIONS.keys()
    for package, heading in SECTIONS.items():
        rows = page.split(f"{heading}\n", 1)[1].split("\n## ", 1)[0]
        named = re.findall(r"`(\w+\.py)`", "".join(re.findall(r"^\| (`.+?) \|", rows, re.MULTILINE)))
        there = [path.name for path in (root / package).glob("*.py") if path.name != "__init__.py"]
        assert sorted(named) == sorted(there), package or "nbdclone"


def test_every_public_name_is_documented_and_there() -> None:
    import nbdclone

    documented = (DOCS / "api.md").read_text()
    for name in nbdclone.__all__:
        assert getattr(nbdclone, name).__name__ == name
        assert name in documented
    with pytest.raises(AttributeError):
        _ = nbdclone.nonsense  # type: ignore[attr-defined]


def test_what_is_documented_of_block_status_is_what_is_done() -> None:
    """The rest of the page has its tests in test_protocol_page.py."""
    text = " ".join((DOCS / "protocol.md").read_text().split())
    assert f"up to {MAX_QUERIES} queries" in text
    assert f"in up to {COUNTS[MAX_CONTEXTS]} contexts" in text
    assert f"more than {COUNTS[MAX_CONTEXTS]} contexts is TOO_BIG" in text
    assert f"at most {MAX_EXTENTS} extents" in text


def test_the_example_of_access_is_understood_and_the_defaults_are_those_of_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pwd.getpwnam", lambda name: SimpleNamespace(pw_uid={"alice": 1001}[name]))
    text = (DOCS / "access.md").read_text()
    [example] = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "settings.toml").write_text(example)
    access = read_settings(tmp_path / "settings.toml").access
    assert access.refusing_rule("lab-1", Peer("unix", uid=1001)) is None
    assert access.refusing_rule("lab-1", Peer("unix", uid=1002)) == "lab-*"
    assert access.refusing_rule("web1", Peer("unix", uid=0, subject="CN=admin,O=Lab")) is None
    assert access.refusing_rule("web1", Peer("unix", uid=0)) == "web1"
    assert f"| `--max-connections N` | {MAX_CONNECTIONS} |" in text
    assert f"at most one line of a kind in {INTERVAL_S:.0f} seconds" in text
    usage = subprocess.run(
        [sys.executable, "-m", "nbdclone", "serve", "--help"], check=True, capture_output=True, text=True, timeout=60
    )
    assert f"(default: {MAX_CONNECTIONS})" in usage.stdout


def test_the_example_of_limits_means_what_the_page_says(tmp_path: Path) -> None:
    text = (DOCS / "limits.md").read_text()
    [example] = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "settings.toml").write_text(example)
    limits = read_settings(tmp_path / "settings.toml", Limit(2000, 50 << 20)).limits
    assert limits.of("lab-1") == Limit(500, 20 << 20)
    assert limits.of("lab-teacher") == Limit(None, 20 << 20)
    assert limits.of("build1") == Limit(2000, 100 << 20)
    assert limits.of("web1") == Limit(2000, 50 << 20)
    assert BURST_S == 0.1
    assert "a tenth of a second's worth at once" in text


def test_every_kind_of_finding_is_documented() -> None:
    rows = (DOCS / "check.md").read_text().split("## Findings", 1)[1].split("\n## ", 1)[0]
    assert set(re.findall(r"^\| ([a-z][a-z-]+) \|", rows, re.MULTILINE)) - {"kind"} == KINDS
    sources = "".join(path.read_text() for path in Path(delta.__file__).parent.glob("check*.py"))
    assert all(f'"{kind}"' in sources for kind in KINDS)


def run(program: str, *args: str | Path) -> None:
    command = [sys.executable, "-W", "error", "-c", program, *map(str, args)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_programs_of_the_page_on_check_do_what_it_says(tmp_path: Path) -> None:
    put_back, rescue = re.findall(r"```python\n(.*?)```", (DOCS / "check.md").read_text(), re.DOTALL)
    (tmp_path / "disk.img").write_bytes(b"base" * 16384)
    pool = Pool.open(tmp_path / "pool", create=True)
    pool.import_base(tmp_path / "disk.img", "base")
    pool.create_clones("base", ["web1"])
    with pool.open_clone("web1") as clone:
        clone.pwrite(b"own" * 5000, 8192)
    path = pool.path / "clones" / "web1" / "delta"
    with open(path, "r+b") as file:
        file.seek(delta.MAP_SLOTS[0] + 40)
        file.write(b"rot")
    damaged = path.read_bytes()
    [finding] = check_pool(pool.path, repair=True)
    assert path.read_bytes() != damaged
    assert finding.kept is not None
    run(put_back, finding.kept)
    assert path.read_bytes() == damaged

    shutil.rmtree(pool.path / "bases" / "base")
    run(rescue, path, tmp_path / "rescued")
    rescued = (tmp_path / "rescued").read_bytes()
    assert rescued[8192 : 8192 + 15000] == b"own" * 5000
    assert rescued[:8192] == bytes(8192)
    assert len(rescued) == 65536
