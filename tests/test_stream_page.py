"""docs/stream.md says what a stream is: its numbers are those of the code, and its reader reads streams."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from nbdclone.store import receiving, stream
from nbdclone.store.layer import MAX_SIZE, MIN_SIZE
from nbdclone.store.places import KEEP_RECEIVED_S
from nbdclone.store.pool import Pool
from nbdclone.store.sending import Sending
from nbdclone.store.stream_head import MAX_SENT_LAYERS, MAX_TEXT, Head, SentBase, SentLayer

PAGE = (Path(__file__).parents[1] / "docs" / "stream.md").read_text()


def section(title: str) -> str:
    return PAGE.split(f"### {title}\n", 1)[1].split("\n### ", 1)[0]


def test_the_numbers_of_the_page_are_those_of_the_code() -> None:
    for title, layout in (("Preamble", stream.PREAMBLE), ("Frame", stream.FRAME)):
        rows = re.findall(r"^\| (\d+) \| (\d+) \|", section(title), re.MULTILINE)
        assert sum(int(length) for _, length in rows) == layout.size == int(rows[-1][0]) + int(rows[-1][1])
    assert f"format version, {stream.VERSION}" in section("Preamble")
    assert str(stream.MAX_PAYLOAD) in section("Frame")
    assert str(stream.MAX_RUN) in section("RUNS")
    assert f"1 to {MAX_SENT_LAYERS} objects" in section("HEAD")
    assert f"at most {MAX_TEXT}" in section("HEAD")
    assert f"from {MIN_SIZE} to {MAX_SIZE}" in section("HEAD")
    assert f"for {KEEP_RECEIVED_S // 86400} days" in PAGE
    assert f"the last {receiving.SYNC_EVERY >> 20} MiB" in PAGE
    for title, size in (
        ("PART", stream.PART_PAYLOAD.size),
        ("DONE", stream.DONE_PAYLOAD.size),
        ("RUNS", stream.RUN.size),
    ):
        assert f"{size} bytes" in section(title)


def test_every_key_of_the_head_is_told() -> None:
    told = set(re.findall(r"`([a-z_]+)`", section("HEAD")))
    assert {field.name for kind in (Head, SentBase, SentLayer) for field in fields(kind)} <= told


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    (tmp_path / "debian.img").write_bytes(random.Random(1).randbytes(3 << 20))
    pool = Pool.open(tmp_path / "pool", create=True)
    pool.import_base(tmp_path / "debian.img")
    pool.create_clones("debian", ["web1"], size=(4 << 20) + 512)
    with pool.open_clone("web1") as disk:
        disk.pwrite(b"first" * 5000, 1000)
        disk.pwrite(b"end", disk.size - 3)
    pool.snapshot("web1@one")
    with pool.open_clone("web1") as disk:
        disk.pwrite(random.Random(2).randbytes(1 << 20), 1 << 20)
        disk.zero(0, 8192)
    pool.snapshot("web1@two")
    return pool


def save(pool: Pool, name: str, path: Path, **how: bool | str) -> Path:
    with Sending(pool.places, name, **how) as sending, open(path, "wb") as file:  # type: ignore[arg-type]
        for _ in sending.run(file):
            pass
    return path


def test_the_reader_of_the_page_makes_images_of_streams(pool: Pool, tmp_path: Path) -> None:
    [program] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    target = tmp_path / "image"
    target.touch()

    def read(stream: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program, str(stream), str(target)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    for path in (
        save(pool, "web1@one", tmp_path / "full", with_base=True),
        save(pool, "web1@two", tmp_path / "increment", since="one"),
    ):
        done = read(path)
        assert done.returncode == 0, done.stderr
    with pool.open_clone("web1@two") as disk:
        assert target.read_bytes() == disk.pread(disk.size, 0)
    damaged = bytearray(path.read_bytes())
    damaged[-100] ^= 1
    path.write_bytes(damaged)
    assert "cut off, or changed" in read(path).stderr


def test_the_head_is_json_as_the_page_says(pool: Pool) -> None:
    with Sending(pool.places, "web1@two", since="one") as sending:
        head = json.loads(sending.head.encode())
    assert (head["clone"], head["parent_name"], head["with_base"]) == ("web1", "web1@one", False)
    assert [layer["snapshot"] for layer in head["layers"]] == ["two"]
    assert head["layers"][0]["overlap"] is None
    assert head["parent"] == pool.info("web1@one").id
