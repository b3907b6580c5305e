"""Small records in JSON: whatever stands in the file, it is a record or one error that names the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbdclone.errors import NotFound, StorageError, UnsupportedFormat
from nbdclone.store.ephemeral import Mark
from nbdclone.store.fs import FILE_SYSTEM, FileSystem
from nbdclone.store.layer_manifest import LayerRecord
from nbdclone.store.places import Snapshot
from nbdclone.store.records import MAX_RECORD

Load = Callable[[Path, FileSystem], Any]
LAYER = LayerRecord(b"i" * 16, 1 << 20, b"f" * 32, 5)
KINDS = [
    (Snapshot(b"l" * 16, 7), Snapshot.load, "not a snapshot's record"),
    (LAYER, LayerRecord.load, "not a layer's record"),
    (Mark("ci", None, 3.5), Mark.load, "does not say how long the clone is to live"),
]
kinds = pytest.mark.parametrize(("record", "load", "wrong"), KINDS, ids=["snapshot", "layer", "mark"])


@kinds
def test_what_was_written_is_read(tmp_path: Path, record: Any, load: Load, wrong: str) -> None:
    path = tmp_path / "record"
    path.write_bytes(record.dump())
    assert load(path, FILE_SYSTEM) == record


@kinds
def test_a_record_that_is_not_there_is_not_found(tmp_path: Path, record: Any, load: Load, wrong: str) -> None:
    with pytest.raises(NotFound, match="is missing"):
        load(tmp_path / "record", FILE_SYSTEM)


@kinds
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b"{}",
        b"\xff\xfe",
        b"[" * MAX_RECORD,
        b" " * MAX_RECORD + b"{}",
        b"null",
    ],
)
def test_what_is_no_record_is_told_with_the_name_of_the_file(
    tmp_path: Path, record: Any, load: Load, wrong: str, content: bytes
) -> None:
    path = tmp_path / "record"
    path.write_bytes(content)
    with pytest.raises(StorageError, match=f"{path}: {wrong}"):
        load(path, FILE_SYSTEM)


@kinds
def test_each_field_of_the_wrong_kind_is_told(tmp_path: Path, record: Any, load: Load, wrong: str) -> None:
    path = tmp_path / "record"
    fields = json.loads(record.dump())
    for name in fields.keys() - {"template"}:  # a text, which anything can be
        for value in ([], {}, "zz"):
            path.write_text(json.dumps(fields | {name: value}))
            with pytest.raises(StorageError, match=wrong):
                load(path, FILE_SYSTEM)


@pytest.mark.parametrize(
    ("record", "load", "name", "value"),
    [
        (KINDS[0][0], Snapshot.load, "layer", "00" * 15),
        (KINDS[0][0], Snapshot.load, "created", float("inf")),
        (LAYER, LayerRecord.load, "id", "00" * 17),
        (LAYER, LayerRecord.load, "fingerprint", "00" * 16),
        (LAYER, LayerRecord.load, "size", float("inf")),
    ],
)
def test_a_number_or_an_id_that_cannot_be_is_told(
    tmp_path: Path, record: Any, load: Load, name: str, value: object
) -> None:
    path = tmp_path / "record"
    path.write_text(json.dumps(json.loads(record.dump()) | {name: value}))
    with pytest.raises(StorageError, match="record"):
        load(path, FILE_SYSTEM)


def test_the_record_of_a_newer_format_is_not_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "layer.json"
    path.write_text(json.dumps(json.loads(LAYER.dump()) | {"format": 2}))
    with pytest.raises(UnsupportedFormat):
        LayerRecord.load(path, FILE_SYSTEM)
