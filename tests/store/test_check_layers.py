"""What a check says of layers and snapshots, and what a repair does with them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from checked import (
    PAGES,
    check,
    content,
    delta_of,
    make_pool,
    page,
    patch,
    repair_and_require,
    told,
    wrong,
)

from nbdclone.errors import CorruptDelta, NBDCloneError, StorageError
from nbdclone.store.delta import Delta
from nbdclone.store.delta_file import HEADER_SLOTS, METADATA_SIZE, RECORD_SLOTS, change_header
from nbdclone.store.finding import NOTE
from nbdclone.store.fs import FILE_SYSTEM
from nbdclone.store.journal import encode_record, hash_of
from nbdclone.store.layer_manifest import LayerRecord, forget_manifest
from nbdclone.store.locks import take
from nbdclone.store.pool import Pool
from nbdclone.store.sealed import Sealed


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    """web1 with the snapshots first and second, web2 of web1@first, web3 of the base."""
    pool = make_pool(tmp_path, "web1", "web3")
    pool.snapshot("web1@first")
    with pool.open_clone("web1") as clone:
        clone.pwrite(b"second" * 1000, 20_000)
    pool.snapshot("web1@second")
    pool.create_clones("web1@first", ["web2"])
    return pool


def layer_of(pool: Pool, name: str) -> Path:
    return pool.places.layer(pool.places.snapshot(name).layer)


def all_contents(pool: Pool) -> dict[str, list[bytes]]:
    return {name: content(pool, name) for name in pool.names()}


def record_of(pool: Pool, name: str) -> Path:
    clone, _, snapshot = name.partition("@")
    return pool.path / "clones" / clone / "snapshots" / snapshot


def test_a_sound_pool_with_snapshots_has_no_findings(pool: Pool) -> None:
    assert check(pool) == []
    assert check(pool, deep=True) == []
    assert check(pool, deep=True, repair=True) == []
    assert check(pool, "web1@first") == check(pool, "web2") == []


@pytest.mark.parametrize("slot", PAGES)
def test_a_damaged_slot_of_a_layer_is_named_and_repaired_to_the_byte(pool: Pool, slot: str) -> None:
    before, path = all_contents(pool), layer_of(pool, "web1@first")
    whole = page(path, PAGES[slot])
    patch(path, PAGES[slot] + 45, b"rot")
    kind = "header-slot" if "header" in slot else "map-slot"
    assert told(check(pool)) == told(check(pool, "web2")) == [("web1@first", kind)]
    assert all_contents(pool) == before
    repair_and_require(pool, [("web1@first", kind)])
    assert page(path, PAGES[slot]) == whole
    assert all_contents(pool) == before


def test_a_layer_in_use_is_not_repaired(pool: Pool) -> None:
    patch(layer_of(pool, "web1@first"), PAGES["map 0 A"] + 45, b"rot")
    with pool.open_clone("web1@first"):
        found = check(pool, repair=True)
    assert told(found) == [("web1@first", "in-use"), ("web1@first", "map-slot")]
    assert not any(finding.repaired for finding in found)


def test_who_is_hurt_by_a_layer_that_is_missing_is_told_by_name(pool: Pool) -> None:
    shutil.rmtree(layer_of(pool, "web1@first").parent)
    assert told(check(pool)) == [
        ("web1@second", "layer-missing"),
        ("web1", "layer-missing"),
        ("web1@first", "snapshot-lost"),
        ("web2", "layer-missing"),
    ]
    assert told(check(pool, "web3")) == []
    with pytest.raises(NBDCloneError):
        pool.open_clone("web2")
    assert not any(finding.repaired for finding in check(pool, repair=True))


def test_a_layer_that_is_lost_to_its_header_hurts_those_above(pool: Pool) -> None:
    for slot in HEADER_SLOTS:
        patch(layer_of(pool, "web1@first"), slot + 8, b"rot")
    assert sorted(wrong(check(pool))) == [
        ("web1", "layer-missing"),
        ("web1@first", "header-lost"),
        ("web1@second", "layer-missing"),
        ("web2", "layer-missing"),
    ]


def test_another_delta_in_the_place_of_a_layer_is_refused_and_named(pool: Pool) -> None:
    path = layer_of(pool, "web1@first")
    path.unlink()
    shutil.copy(delta_of(pool, "web3"), path)
    for name in ("web1", "web2", "web1@first"):
        with pytest.raises(CorruptDelta, match="another delta"):
            pool.open_clone(name)
    found = wrong(check(pool))
    assert ("web1@first", "layer-other") in found
    assert {("web1", "layer-missing"), ("web2", "layer-missing"), ("web1@second", "layer-missing")} <= set(found)


def test_layers_in_a_circle_are_named(pool: Pool) -> None:
    first, second = layer_of(pool, "web1@first"), layer_of(pool, "web1@second")
    change_header(first, parent_id=pool.places.header(second).id)
    with pytest.raises(CorruptDelta, match="beneath itself"):
        pool.open_clone("web2")
    assert wrong(check(pool)) == [(name, "cycle") for name in _in_order(pool, "web1@first", "web1@second")] + [
        ("web1", "cycle"),
        ("web2", "cycle"),
    ]


def _in_order(pool: Pool, *names: str) -> list[str]:
    return sorted(names, key=lambda name: pool.places.snapshot(name).layer)


def test_a_layer_whose_base_went_is_linked_to_one_of_the_same_content_and_all_above_it_are_right(pool: Pool) -> None:
    before = all_contents(pool)
    shutil.rmtree(pool.path / "bases" / "debian")
    found = wrong(check(pool))
    assert {name for name, kind in found if kind == "orphan"} == {"web1@first", "web1@second", "web1", "web2", "web3"}
    pool.import_base(pool.path.parent / "debian.img", "again")
    found = check(pool, repair=True)
    assert {(one.name, one.kind) for one in found if one.repaired} == {("web1@first", "orphan"), ("web3", "orphan")}
    assert wrong(check(pool)) == []
    for name in ("web1", "web2", "web1@first", "web1@second"):
        assert content(pool, name) == before[name]


# Sealed


@pytest.mark.parametrize("told_by_the_map", [True, False])
def test_records_in_a_layer_are_told_and_wiped_if_they_say_nothing_more(pool: Pool, told_by_the_map: bool) -> None:
    path = layer_of(pool, "web1@first")
    header = pool.places.header(path)
    block = 0 if told_by_the_map else 9
    with open(path, "r+b") as file:
        record = encode_record(header.id, [(block, hash_of(FILE_SYSTEM, file.fileno(), block))])
    patch(path, RECORD_SLOTS[0], record)
    [finding] = check(pool)
    assert (finding.name, finding.kind, finding.level == NOTE) == ("web1@first", "not-sealed", told_by_the_map)
    if told_by_the_map:
        [finding] = check(pool, repair=True)
        assert finding.repaired
        assert check(pool) == []
    else:
        assert finding.ranges == ((9 * 4096, 4096),)


def test_a_live_map_beside_a_layer_is_told_and_removed(pool: Pool) -> None:
    live = layer_of(pool, "web1@first").with_name("live")
    live.write_bytes(b"NBDLIVE2")
    assert told(check(pool)) == [("web1@first", "not-sealed")]
    repair_and_require(pool, [("web1@first", "not-sealed")])
    assert not live.exists()


# Snapshots


@pytest.mark.parametrize("garbage", [b"", b"{}", b"\xff\xfe", b'{"layer": "12", "created": 1}', b"[" * 5000])
def test_a_record_that_cannot_be_read_is_named_and_no_layer_is_removed_meanwhile(pool: Pool, garbage: bytes) -> None:
    kept = layer_of(pool, "web1@second")
    pool.rollback("web1@first")  # now the name alone holds it
    whole = record_of(pool, "web1@second").read_bytes()
    record_of(pool, "web1@second").write_bytes(garbage)
    assert told(check(pool)) == [("web1@second", "snapshot-damaged")]
    assert told(check(pool, repair=True)) == [("web1@second", "snapshot-damaged")]
    pool.remove(["web3"])
    assert kept.exists()
    record_of(pool, "web1@second").write_bytes(whole)
    assert check(pool) == []
    pool.remove(["web1@second"])
    assert not kept.exists()


def test_a_record_of_a_layer_that_is_not_there_is_named(pool: Pool) -> None:
    record_of(pool, "web2@lost").parent.mkdir()
    record_of(pool, "web2@lost").write_text(f'{{"layer": "{"ab" * 16}", "created": 1}}')
    assert told(check(pool)) == [("web2@lost", "snapshot-lost")]
    pool.remove(["web2@lost"])
    assert check(pool) == []


def cut_off(pool: Pool, clone: str, *, copied: bool = False) -> Path:
    """What a snapshot leaves that was cut off before its commit."""
    own = pool.places.header(delta_of(pool, clone)).id
    layer = pool.places.layer(own)
    layer.parent.mkdir(parents=True)
    (shutil.copy if copied else os.link)(delta_of(pool, clone), layer)
    record_of(pool, f"{clone}@cut").parent.mkdir(exist_ok=True)
    record_of(pool, f"{clone}@cut").write_text(f'{{"layer": "{own.hex()}", "created": 1}}')
    return layer


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("clone", ["web1", "web3"])
def test_a_snapshot_that_was_cut_off_is_a_leftover_and_is_cleared(pool: Pool, clone: str, copied: bool) -> None:
    """In a copied pool the two names are two files, of one id: never a snapshot."""
    before = all_contents(pool)
    layer = cut_off(pool, clone, copied=copied)
    assert f"{clone}@cut" not in pool.names()
    found = check(pool)
    assert told(found) == [(clone, "leftover")] * 2
    assert all(finding.level == NOTE for finding in found)
    repair_and_require(pool, [(clone, "leftover")] * 2)
    assert not layer.exists()
    assert not record_of(pool, f"{clone}@cut").exists()
    assert all_contents(pool) == before


def test_the_record_alone_of_a_snapshot_that_was_cut_off_is_a_leftover_too(pool: Pool) -> None:
    shutil.rmtree(cut_off(pool, "web3").parent)
    assert told(check(pool)) == [("web3", "leftover")]
    repair_and_require(pool, [("web3", "leftover")])


def test_a_layer_that_nobody_needs_is_a_leftover_and_is_removed_when_nobody_reads_it(pool: Pool) -> None:
    layer = layer_of(pool, "web1@second")
    pool.rollback("web1@first")
    record_of(pool, "web1@second").unlink()
    with pytest.raises(NBDCloneError):
        pool.open_clone("web1@second")
    assert told(check(pool)) == [("", "leftover")]
    with open(layer, "rb") as reader:
        take(reader.fileno(), shared=True)
        [finding] = check(pool, repair=True)
        assert not finding.repaired
        assert layer.exists()
    assert [finding.repaired for finding in check(pool, repair=True)] == [True]
    assert check(pool) == []
    assert not layer.exists()


def test_a_clone_that_was_copied_by_hand_does_not_take_the_layer_of_the_other_with_it(pool: Pool) -> None:
    shutil.copytree(pool.path / "clones" / "web3", pool.path / "clones" / "copy")
    pool.snapshot("web3@one")
    before = content(pool, "web3")
    with pytest.raises(StorageError, match="it is a copy"):
        pool.snapshot("copy@one")
    assert told(check(pool, repair=True)) == [("copy", "id-twice")]
    assert content(pool, "web3") == before
    assert content(pool, "web3@one") == before


# Content


def layer_files(pool: Pool, name: str) -> set[str]:
    return set(os.listdir(layer_of(pool, name).parent)) - {"writer"}


def test_the_first_deep_check_writes_down_what_a_layer_holds_and_others_compare(pool: Pool) -> None:
    assert check(pool) == []
    assert layer_files(pool, "web1@first") == {"delta"}
    assert check(pool, deep=True) == []
    assert layer_files(pool, "web1@first") == {"delta", "manifest", "layer.json"}
    patch(layer_of(pool, "web1@first"), METADATA_SIZE + 2000, b"rot")  # web1 and web2 read it
    assert check(pool) == []
    found = check(pool, deep=True)
    assert told(found) == [("web1@first", "content-changed"), ("web1", "hurt"), ("web2", "hurt")]
    assert found[0].ranges == ((0, 4 << 20),)


def test_a_clone_that_has_what_changed_as_its_own_is_not_hurt(pool: Pool) -> None:
    check(pool, deep=True)
    with pool.open_clone("web2") as clone:
        clone.pwrite(bytes(range(256)) * 400 * 41, 0)
    with pool.open_clone("web2") as clone:
        clone.pwrite(b"own" * 2000, 127 * (1 << 20) - 4096)
    patch(layer_of(pool, "web1@first"), METADATA_SIZE + 2000, b"rot")
    found = {finding.name: finding for finding in check(pool, deep=True)}
    assert found["web2"].kind == "not-hurt"
    assert found["web1"].kind == "hurt"


def test_a_base_that_changed_hurts_those_that_read_it_through_layers(pool: Pool) -> None:
    image = pool.path / "bases" / "debian" / "image"
    image.chmod(0o644)
    patch(image, 30_000, b"rot")
    found = [one for one in check(pool, deep=True) if one.kind in ("hurt", "not-hurt")]
    assert [(one.name, one.kind) for one in found] == [("web1", "hurt"), ("web2", "hurt"), ("web3", "hurt")]


@pytest.mark.parametrize("name", ["manifest", "layer.json"])
@pytest.mark.parametrize("how", ["garbage", "missing", "a bit", "another size"])
def test_a_manifest_or_its_record_that_is_damaged_is_made_anew(pool: Pool, name: str, how: str) -> None:
    check(pool, deep=True)
    path = layer_of(pool, "web1@first").with_name(name)
    whole = path.read_bytes()
    path.unlink()
    if how == "garbage":
        path.write_bytes(os.urandom(len(whole)))
    elif how == "a bit":
        path.write_bytes(whole[:70] + bytes([whole[70] ^ 1]) + whole[71:])
    elif how == "another size":
        path.write_bytes(whole[:-5])
    if (name, how) != ("layer.json", "missing"):
        [finding] = check(pool, deep=True)
        assert finding.name == "web1@first"
        assert [one.repaired for one in check(pool, deep=True, repair=True)] == [True]
    assert check(pool, deep=True) == []
    assert layer_files(pool, "web1@first") == {"delta", "manifest", "layer.json"}
    if name == "manifest":
        assert path.read_bytes() == whole


def test_a_layer_that_gains_blocks_has_no_manifest_until_the_next_deep_check(pool: Pool) -> None:
    check(pool, deep=True)
    layer_id = pool.places.snapshot("web1@first").layer
    forget_manifest(pool.places, layer_id)
    forget_manifest(pool.places, layer_id)
    assert layer_files(pool, "web1@first") == {"delta"}
    delta = Delta.open(layer_of(pool, "web1@first"), "layer")
    os.pwrite(delta.fd, b"gained", METADATA_SIZE + 5 * 4096)
    delta.mark(0, 5, 5)
    delta.finish()
    delta.close()
    assert check(pool, deep=True) == []
    record = LayerRecord.load(layer_of(pool, "web1@first").with_name("layer.json"), pool.places.fs)
    assert record.id == layer_id
    patch(layer_of(pool, "web1@first"), METADATA_SIZE + 5 * 4096, b"other!")
    assert ("web1@first", "content-changed") in told(check(pool, deep=True))


def test_a_layer_that_gains_blocks_at_this_moment_is_not_hashed(pool: Pool) -> None:
    writer = layer_of(pool, "web1@first").with_name("writer")
    with open(writer, "w") as file:
        take(file.fileno())
        assert told(check(pool, deep=True)) == [("web1@first", "in-use")]
    assert layer_files(pool, "web1@first") == {"delta"}


def test_a_layer_that_stays_because_somebody_has_it_open_is_left_over_whatever_is_gone_beneath_it(pool: Pool) -> None:
    second = layer_of(pool, "web1@second")
    reader = Sealed.open(second, "the layer")  # who opens the snapshot, and has not come to what is beneath
    pool.remove(["web1", "web2"])
    assert pool.places.layer_ids() == [reader.id]
    [finding] = check(pool)
    assert (finding.kind, finding.level) == ("leftover", NOTE)
    reader.close()
    pool.remove(["web3"])
    assert check(pool) == []
