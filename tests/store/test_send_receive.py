"""Sending and receiving: what arrives reads as what was sent, or nothing arrives."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from streams import forged, frames_of
from transfer import SIZE, change, content, image, receive, resumed, sent

from nbdclone.errors import InUse, InvalidStream, NameTaken, NBDCloneError, NotFound, UsageError
from nbdclone.store import drafts, receiving, sending
from nbdclone.store.check import check_pool
from nbdclone.store.delta_file import (
    EMPTY_PAGE,
    MAP_SLOTS,
    SEGMENT_SPAN,
    Header,
    change_header,
    decode_map_page,
    read_page,
)
from nbdclone.store.fs import FILE_SYSTEM
from nbdclone.store.image import BaseRecord
from nbdclone.store.layer import SEGMENT_SIZE
from nbdclone.store.layer_writer import LayerWriter
from nbdclone.store.places import Snapshot
from nbdclone.store.pool import Pool
from nbdclone.store.receiving import Receiving
from nbdclone.store.sealed import Sealed
from nbdclone.store.sending import Sending, Token


@pytest.fixture
def here(tmp_path: Path) -> Pool:
    """A pool with a base, and a clone with two snapshots and changes since."""
    pool = Pool.open(tmp_path / "here", create=True)
    pool.import_base(image(tmp_path / "debian.img"))
    pool.create_clones("debian", ["web1"])
    for seed, name in enumerate(["one", "two"]):
        change(pool, "web1", seed)
        pool.snapshot(f"web1@{name}")
    change(pool, "web1", 9)
    return pool


@pytest.fixture
def there(tmp_path: Path) -> Pool:
    """Another pool, with the same image as a base of another name and id."""
    pool = Pool.open(tmp_path / "there", create=True)
    pool.import_base(image(tmp_path / "same.img"))
    return pool


# Both slots of both segments.
MAP_PLACES = [segment * SEGMENT_SPAN + slot for slot in MAP_SLOTS for segment in range(2)]


def require_sound(pool: Pool) -> None:
    assert [str(finding) for finding in check_pool(pool.path, deep=True)] == []
    for layer_id in pool.places.layer_ids():
        layer = Sealed.open(pool.places.layer(layer_id), "a layer")
        with contextlib.closing(layer):
            assert layer.header.id == layer_id
            pages = [read_page(FILE_SYSTEM, layer.fd, at, nowait=False) for at in MAP_PLACES]
            assert pages[:2] == pages[2:]
            for number, page in enumerate(pages[:2]):
                assert page == EMPTY_PAGE or decode_map_page(page, number, layer_id)


def state_of(pool: Pool) -> set[str]:
    """Every file of the pool but what a stream left to be gone on with."""
    found = set()
    for directory, _, files in os.walk(pool.path):
        found |= {os.path.relpath(os.path.join(directory, file), pool.path) for file in files}
    return {path for path in found if not path.startswith(".tmp/receive-") and path != ".lock"}


def test_a_snapshot_arrives_with_its_chain_on_a_base_of_the_same_content(here: Pool, there: Pool) -> None:
    made = receive(there, sent(here, "web1@two"))
    assert (made.clone, made.added, made.snapshots, made.base) == ("web1", False, ("one", "two"), None)
    for name in ("web1@one", "web1@two"):
        assert content(there, name) == content(here, name)
        assert there.info(name).id == here.info(name).id
    assert content(there, "web1") == content(here, "web1@two")
    assert there.info("web1").base == "same"  # type: ignore[union-attr]
    assert there.info("web1@two").allocated <= here.info("web1@two").allocated
    require_sound(there)


def test_what_arrives_is_a_clone_like_others(here: Pool, there: Pool) -> None:
    receive(there, sent(here, "web1@two"), name="web7")
    change(there, "web7", 5)
    there.snapshot("web7@three")
    there.rollback("web7@one")
    assert content(there, "web7") == content(here, "web1@one")
    there.reset("web7")
    assert content(there, "web7") == content(there, "same")
    there.remove(["web7"])
    assert there.places.layer_ids() == []


def test_the_base_comes_along_where_it_is_missing(here: Pool, tmp_path: Path) -> None:
    empty = Pool.open(tmp_path / "empty", create=True)
    made = receive(empty, sent(here, "web1@two", with_base=True))
    assert made.base == "debian"
    assert content(empty, "debian") == content(here, "debian")
    assert content(empty, "web1") == content(here, "web1@two")
    assert empty.info("debian").id == here.info("debian").id
    assert os.stat(empty.path / "bases" / "debian" / "image").st_mode & 0o777 == 0o444
    assert os.stat(empty.path / "bases/debian/image").st_blocks <= os.stat(here.path / "bases/debian/image").st_blocks
    require_sound(empty)


def test_the_base_that_comes_along_is_left_where_there_is_one(here: Pool, there: Pool) -> None:
    assert receive(there, sent(here, "web1@two", with_base=True)).base is None
    assert content(there, "web1") == content(here, "web1@two")
    assert there.names() == ["same", "web1", "web1@one", "web1@two"]
    require_sound(there)


def test_a_base_of_another_content_with_the_name_is_not_taken(here: Pool, tmp_path: Path) -> None:
    other = Pool.open(tmp_path / "other", create=True)
    other.import_base(image(tmp_path / "x.img", seed=5), "debian")
    before = state_of(other)
    with pytest.raises(NameTaken, match="--base-name"):
        receive(other, sent(here, "web1@two", with_base=True))
    fingerprint = BaseRecord.load(here.path / "bases/debian/base.json").fingerprint.hex()[:16]
    with pytest.raises(NotFound, match=f"fingerprint {fingerprint}.*--with-base"):
        receive(other, sent(here, "web1@two"))
    assert state_of(other) == before
    assert receive(other, sent(here, "web1@two", with_base=True), base_name="debian2").base == "debian2"
    assert content(other, "web1") == content(here, "web1@two")
    require_sound(other)


def test_increments_arrive_on_what_came_before(here: Pool, there: Pool) -> None:
    receive(there, sent(here, "web1@one"))
    made = receive(there, sent(here, "web1@two", since="one"))
    assert (made.clone, made.added, made.snapshots) == ("web1", True, ("two",))
    assert content(there, "web1") == content(there, "web1@two") == content(here, "web1@two")
    here.snapshot("web1@three")
    change(here, "web1", 20)
    here.snapshot("web1@four")
    receive(there, sent(here, "web1@four", since="web1@two"))
    for name in ("one", "two", "three", "four"):
        assert content(there, f"web1@{name}") == content(here, f"web1@{name}")
    require_sound(there)


def test_an_increment_holds_no_more_than_what_changed(here: Pool) -> None:
    assert len(sent(here, "web1@two", since="one")) < len(sent(here, "web1@two"))
    here.snapshot("web1@same")
    with here.open_clone("web1") as disk:
        disk.pwrite(os.urandom(4096), 0)
    here.snapshot("web1@last")
    assert 4096 < len(sent(here, "web1@last", since="same")) < 6000


def test_a_clone_of_a_snapshot_is_sent_over_it(here: Pool, there: Pool) -> None:
    here.create_clones("web1@one", ["web2"])
    change(here, "web2", 30)
    here.snapshot("web2@x")
    receive(there, sent(here, "web1@two"))
    made = receive(there, sent(here, "web2@x", since="web1@one"))
    assert (made.clone, made.added) == ("web2", False)
    assert content(there, "web2@x") == content(here, "web2@x")
    assert content(there, "web1") == content(here, "web1@two")
    require_sound(there)


def test_layers_that_two_clones_share_are_made_once(here: Pool, there: Pool) -> None:
    here.create_clones("web1@one", ["web2"])
    change(here, "web2", 30)
    here.snapshot("web2@x")
    receive(there, sent(here, "web1@two"))
    receive(there, sent(here, "web2@x"))
    assert len(there.places.layer_ids()) == 3
    assert content(there, "web2") == content(here, "web2@x")
    require_sound(there)


def test_a_larger_disk_arrives_as_large(here: Pool, there: Pool) -> None:
    here.create_clones("web1@one", ["web2"], size=3 * SEGMENT_SIZE)
    with here.open_clone("web2") as disk:
        disk.pwrite(b"end", disk.size - 3)
    here.snapshot("web2@x")
    receive(there, sent(here, "web2@x"))
    assert content(there, "web2") == content(here, "web2@x")
    require_sound(there)


# What does not fit


def test_an_increment_without_what_it_stands_on_is_refused_and_named(here: Pool, there: Pool) -> None:
    before = state_of(there)
    with pytest.raises(NotFound, match=r"stands on snapshot 'web1@one' .layer [0-9a-f]{32}.*receive that first"):
        receive(there, sent(here, "web1@two", since="one"))
    assert state_of(there) == before


def test_a_clone_that_was_changed_since_is_refused_unless_forced(here: Pool, there: Pool) -> None:
    receive(there, sent(here, "web1@one"))
    change(there, "web1", 40)
    changed, before = content(there, "web1"), state_of(there)
    with pytest.raises(UsageError, match=r"was changed since 'web1@one'.*--force"):
        receive(there, sent(here, "web1@two", since="one"))
    assert content(there, "web1") == changed
    assert state_of(there) == before
    receive(there, sent(here, "web1@two", since="one"), force=True)
    assert content(there, "web1") == content(here, "web1@two")
    require_sound(there)


def test_a_clone_that_has_other_snapshots_since_is_refused_unless_forced(here: Pool, there: Pool) -> None:
    receive(there, sent(here, "web1@one"))
    change(there, "web1", 40)
    there.snapshot("web1@mine")
    mine = content(there, "web1@mine")
    with pytest.raises(UsageError, match=r"has gone on since 'web1@one'.*web1@mine.*--force"):
        receive(there, sent(here, "web1@two", since="one"))
    receive(there, sent(here, "web1@two", since="one"), force=True)
    assert content(there, "web1") == content(here, "web1@two")
    assert content(there, "web1@mine") == mine
    require_sound(there)


def test_a_clone_that_changes_while_it_is_sent_to_is_left_and_the_stream_kept(here: Pool, there: Pool) -> None:
    receive(there, sent(here, "web1@one"))
    late = Receiving(there.places, io.BytesIO(sent(here, "web1@two", since="one")))
    run = late.run()
    next(run)
    change(there, "web1", 40)
    changed = content(there, "web1")
    with pytest.raises(UsageError, match=r"was changed since 'web1@one'.*what came is kept"):
        list(run)
    assert content(there, "web1") == changed
    assert "web1@two" not in there.names()
    [found] = drafts.interrupted(there.places)
    rest = resumed(here, Token.of(found.state.head, found.state.section, found.state.offset))
    assert len(rest) < 2000
    receive(there, rest, force=True)
    assert content(there, "web1") == content(here, "web1@two")
    require_sound(there)


def test_a_clone_without_the_snapshots_name_is_found_by_what_it_stands_on(here: Pool, there: Pool) -> None:
    receive(there, sent(here, "web1@one"), name="web7")
    there.remove(["web7@one"])
    made = receive(there, sent(here, "web1@two", since="one"))
    assert (made.clone, made.added) == ("web7", True)
    assert content(there, "web7") == content(here, "web1@two")


def test_of_several_clones_with_the_snapshot_one_has_to_be_named(here: Pool, there: Pool) -> None:
    for name in ("web7", "web8"):
        receive(there, sent(here, "web1@one"), name=name)
    with pytest.raises(UsageError, match=r"web7, web8 have the snapshot.*--name"):
        receive(there, sent(here, "web1@two", since="one"))
    receive(there, sent(here, "web1@two", since="one"), name="web8")
    assert content(there, "web8") == content(here, "web1@two")
    assert content(there, "web7") == content(here, "web1@one")


def test_a_clone_that_is_open_is_not_received_into(here: Pool, there: Pool) -> None:
    receive(there, sent(here, "web1@one"))
    stream = sent(here, "web1@two", since="one")
    with there.open_clone("web1"), pytest.raises(InUse, match="clone 'web1' is in use"):
        receive(there, stream)
    receive(there, stream)


def test_names_that_are_taken_are_refused(here: Pool, there: Pool) -> None:
    there.create_clones("same", ["web1"])
    with pytest.raises(NameTaken, match="--name"):
        receive(there, sent(here, "web1@two"))
    with pytest.raises(NameTaken):
        receive(there, sent(here, "web1@two"), name="same")
    receive(there, sent(here, "web1@two"), name="web2")
    with pytest.raises(UsageError, match="has what the stream is of already"):
        receive(there, sent(here, "web1@two", since="one"), name="web2")
    with pytest.raises(NotFound, match="never stood on"):
        receive(there, sent(here, "web1@two", since="one"), name="web1")


def test_another_snapshot_of_the_same_name_is_refused(here: Pool, there: Pool) -> None:
    receive(there, sent(here, "web1@one"))
    there.snapshot("web1@two")
    with pytest.raises(NameTaken, match="'web1@two' is another snapshot here"):
        receive(there, sent(here, "web1@two", since="one"), force=True)


def test_what_cannot_be_sent_is_said(here: Pool) -> None:
    here.create_clones("debian", ["web2"])
    here.snapshot("web2@x")
    for name, since, error in [
        ("web1", None, "is no snapshot"),
        ("debian", None, "is no snapshot"),
        ("web1@none", None, "there is no snapshot 'web1@none'"),
        ("web1@two", "none", "there is no snapshot 'web1@none'"),
        ("web1@one", "two", "'web1@two' is not beneath 'web1@one'"),
        ("web1@two", "web2@x", "'web2@x' is not beneath 'web1@two'"),
        ("web1@two", "two", "are the same"),
    ]:
        with pytest.raises(UsageError, match=error):
            Sending(here.places, name, since=since)
    with pytest.raises(UsageError, match="exclude one another"):
        Sending(here.places, "web1@two", since="one", with_base=True)


def test_a_snapshot_is_sent_while_its_clone_is_written_to(here: Pool, there: Pool) -> None:
    with here.open_clone("web1") as disk:
        disk.pwrite(b"later" * 1000, 0)
        receive(there, sent(here, "web1@two"))
    assert content(there, "web1") == content(here, "web1@two")


# Accidents and malice


@pytest.mark.parametrize(
    "garbage", [b"", b"{", b"[" * 20000, b"[]", b'{"bitmap": "", "head": 1}', b'{"offset": 1e999, "bitmap": "00"}']
)
def test_a_state_that_cannot_be_read_is_begun_anew(here: Pool, there: Pool, garbage: bytes) -> None:
    stream = sent(here, "web1@two")
    with pytest.raises(InvalidStream):
        receive(there, stream[:-40])
    (found,) = drafts.interrupted(there.places)
    (found.path / drafts.RECEIVED_STATE).write_bytes(garbage)
    assert drafts.interrupted(there.places) == []
    receive(there, stream)
    assert content(there, "web1") == content(here, "web1@two")
    assert os.listdir(there.places.tmp) == []


def test_a_stream_cut_anywhere_leaves_the_pool_as_it_was(here: Pool, there: Pool) -> None:
    stream, before = sent(here, "web1@two"), state_of(there)
    dice = random.Random(3)
    for length in [0, 1, 16, len(stream) - 1, len(stream) - 32, *(dice.randrange(len(stream)) for _ in range(8))]:
        with pytest.raises(InvalidStream, match="cut off"):
            receive(there, stream[:length])
        assert state_of(there) == before
    drafts.forget(there.places)
    assert os.listdir(there.places.tmp) == []


def test_a_stream_with_a_flipped_bit_leaves_the_pool_as_it_was(here: Pool, there: Pool) -> None:
    stream, before = sent(here, "web1@two"), state_of(there)
    dice = random.Random(4)
    for _ in range(12):
        damaged = bytearray(stream)
        damaged[dice.randrange(len(stream))] ^= 1 << dice.randrange(8)
        with pytest.raises(NBDCloneError):
            receive(there, bytes(damaged))
        assert state_of(there) == before


def test_an_image_that_is_not_what_its_fingerprint_says_makes_nothing(here: Pool, tmp_path: Path) -> None:
    """The hashes of such a stream are right: somebody made it so."""
    empty = Pool.open(tmp_path / "empty", create=True)
    frames = list(frames_of(sent(here, "web1@two", with_base=True)))
    number = next(index for index, (kind, _) in enumerate(frames) if kind == b"RUNS")
    kind, payload = frames[number]
    frames[number] = (kind, payload[:-1] + bytes([payload[-1] ^ 1]))
    before = state_of(empty)
    with pytest.raises(InvalidStream, match="not what its fingerprint says"):
        receive(empty, forged(sent(here, "web1@two"), frames))
    assert state_of(empty) == before
    receive(empty, sent(here, "web1@two", with_base=True))
    assert content(empty, "web1") == content(here, "web1@two")


@pytest.mark.parametrize("seed", range(2))
def test_forged_streams_give_an_error_of_ours_and_change_nothing_or_arrive(here: Pool, there: Pool, seed: int) -> None:
    frames = list(frames_of(sent(here, "web1@two")))
    dice = random.Random(seed)
    before, arrived = state_of(there), 0
    for _ in range(25):
        mutated = list(frames)
        number = dice.choice([0, 0, *range(len(frames))])
        kind, payload = mutated[number]
        changed = bytearray(payload)
        for _ in range(dice.randrange(1, 3)):
            changed[dice.randrange(min(len(changed), 900))] = dice.choice(b'0129abf":,{}\0\xff')
        mutated[number] = (kind, bytes(changed))
        try:
            receive(there, forged(sent_once(here), mutated), name=f"forged{arrived}")
            arrived += 1
            there.remove([f"forged{arrived - 1}"])
        except NBDCloneError:
            pass
        assert state_of(there) == before


def sent_once(pool: Pool, known: dict[Path, bytes] = {}) -> bytes:  # noqa: B006 - it is to be kept
    if pool.path not in known:
        known[pool.path] = sent(pool, "web1@two")
    return known[pool.path]


# Going on


def cut(there: Pool, stream: bytes, length: int, **how: bool) -> Token | None:
    """Receive the first bytes of a stream. The token that it can go on with."""
    with pytest.raises(InvalidStream):
        receive(there, stream[:length], **how)
    found = drafts.interrupted(there.places)
    assert len(found) <= 1
    return Token.of(found[0].state.head, found[0].state.section, found[0].state.offset) if found else None


@pytest.fixture
def small_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that there are many places to be cut off at."""
    monkeypatch.setattr("nbdclone.store.stream.FRAME_DATA", 8192)
    monkeypatch.setattr("nbdclone.store.sending.FRAME_DATA", 8192)


@pytest.mark.usefixtures("small_frames")
@pytest.mark.parametrize("with_base", [False, True])
def test_a_stream_that_was_cut_off_anywhere_goes_on(here: Pool, there: Pool, tmp_path: Path, with_base: bool) -> None:
    target = Pool.open(tmp_path / "empty", create=True) if with_base else there
    stream = sent(here, "web1@two", with_base=with_base)
    expected = content(here, "web1@two")
    dice = random.Random(8)
    gone_on = 0
    for length in sorted(dice.randrange(len(stream)) for _ in range(12)):
        token = cut(target, stream, length)
        if token is None:
            continue
        gone_on += 1
        rest = resumed(here, Token.parse(str(token)))
        assert len(rest) < len(stream)
        receive(target, rest)
        assert content(target, "web1") == expected
        require_sound(target)
        target.remove(["web1", *(["debian"] if with_base else [])])
        assert os.listdir(target.places.tmp) == []
    assert gone_on > 6


@pytest.mark.usefixtures("small_frames")
def test_a_stream_goes_on_after_each_of_several_cuts(here: Pool, there: Pool) -> None:
    stream, cuts = sent(here, "web1@two"), 0
    while True:
        length = min(len(stream), 20_000)
        try:
            receive(there, stream[:length])
            break
        except InvalidStream:
            cuts += 1
            [found] = drafts.interrupted(there.places)
            stream = resumed(here, Token.of(found.state.head, found.state.section, found.state.offset))
    assert cuts >= 3
    assert content(there, "web1") == content(here, "web1@two")
    require_sound(there)


@pytest.mark.usefixtures("small_frames")
def test_the_whole_stream_again_goes_on_too(here: Pool, there: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = sent(here, "web1@two")
    token = cut(there, stream, len(stream) * 2 // 3)
    assert token is not None
    written: list[int] = []
    monkeypatch.setattr(receiving, "LayerWriter", _counting(receiving.LayerWriter, written))
    receive(there, stream, resume=True)
    assert written[0] >= token.offset
    assert content(there, "web1") == content(here, "web1@two")


def _counting(kind: type, written: list[int]) -> type:
    class Counting(kind):  # type: ignore[misc]
        def write(self, offset: int, data: memoryview) -> None:
            written.append(offset)
            super().write(offset, data)

    return Counting


@pytest.mark.usefixtures("small_frames")
def test_without_resume_a_whole_stream_begins_anew(here: Pool, there: Pool) -> None:
    stream = sent(here, "web1@two")
    cut(there, stream, len(stream) * 2 // 3)
    receive(there, stream)
    assert content(there, "web1") == content(here, "web1@two")
    assert drafts.interrupted(there.places) == []


@pytest.mark.usefixtures("small_frames")
def test_a_process_that_is_killed_leaves_what_was_synced(
    here: Pool, there: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As killed as can be in one process: nothing is kept at the end; what is written behind the last sync is there."""
    monkeypatch.setattr(receiving, "SYNC_EVERY", 15_000)
    stream = sent(here, "web1@two")
    with monkeypatch.context() as killed:
        killed.setattr(Receiving, "_keep", lambda _: True)
        token = cut(there, stream, len(stream) * 2 // 3)
    assert token is not None
    receive(there, resumed(here, token))
    assert content(there, "web1") == content(here, "web1@two")
    require_sound(there)


@pytest.mark.usefixtures("small_frames")
def test_what_is_left_of_a_stream_outlives_other_work_and_is_not_damage(here: Pool, there: Pool) -> None:
    token = cut(there, sent(here, "web1@two"), 40_000)
    assert token is not None
    there.create_clones("same", ["other"])
    there.remove(["other"])
    require_sound(there)
    receive(there, resumed(here, token))
    assert content(there, "web1") == content(here, "web1@two")


@pytest.mark.usefixtures("small_frames")
def test_what_is_left_of_a_stream_for_long_is_cleared(here: Pool, there: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(there, sent(here, "web1@two"), 40_000)
    monkeypatch.setattr("nbdclone.store.places.KEEP_RECEIVED_S", -1)
    there.create_clones("same", ["other"])
    assert os.listdir(there.places.tmp) == []


@pytest.mark.usefixtures("small_frames")
def test_a_rest_that_does_not_fit_is_refused(here: Pool, there: Pool) -> None:
    stream = sent(here, "web1@two")
    early, late = cut(there, stream, 20_000), cut(there, stream, 60_000)
    assert early is not None
    assert late is not None
    cut(there, stream, 20_000)
    with pytest.raises(UsageError, match="what is here ends at"):
        receive(there, resumed(here, late))
    receive(there, resumed(here, early))
    with pytest.raises((UsageError, NameTaken)):
        receive(there, resumed(here, late))


@pytest.mark.usefixtures("small_frames")
def test_a_rest_finds_the_base_again_that_has_another_id_now(here: Pool, there: Pool, tmp_path: Path) -> None:
    stream = sent(here, "web1@two")
    token = cut(there, stream, len(stream) * 2 // 3)
    assert token is not None
    there.remove(["same"])
    with pytest.raises(NotFound, match="stands on base 'debian'"):
        receive(there, resumed(here, token))
    there.import_base(tmp_path / "same.img", "again")
    receive(there, resumed(here, token))
    assert content(there, "web1") == content(here, "web1@two")
    require_sound(there)


@pytest.mark.usefixtures("small_frames")
def test_a_rest_whose_begin_is_gone_is_refused(here: Pool, there: Pool) -> None:
    receive(there, sent(here, "web1@one"))
    stream = sent(here, "web1@two")
    with pytest.raises(InvalidStream):
        receive(there, stream[:-3000], name="web2")  # layer 'one' was there, and not kept
    [found] = drafts.interrupted(there.places)
    assert found.state.section == 1
    there.remove(["web1"])
    token = Token.of(found.state.head, found.state.section, found.state.offset)
    with pytest.raises(UsageError, match="has changed: 'nbdclone receive --forget'"):
        receive(there, resumed(here, token), name="web2")
    receive(there, stream, name="web2")
    assert content(there, "web2") == content(here, "web1@two")


def test_a_rest_of_other_layers_is_not_sent(here: Pool) -> None:
    with Sending(here.places, "web1@two") as sending:
        token = Token.of(sending.head, 1, 4096)
    Sending.resume(here.places, token).close()
    for changes in ({"stream_id": bytes(16)}, {"section": 2}, {"with_base": True}):
        with pytest.raises(UsageError, match="send it from the start"):
            Sending.resume(here.places, replace(token, **changes))  # type: ignore[arg-type]


def test_what_was_written_behind_the_last_sync_is_gone_when_it_goes_on(tmp_path: Path) -> None:
    header = Header(b"i" * 16, b"p" * 16, b"f" * 32, SIZE, 5, "debian")
    data = memoryview(b"x" * 8192)
    for kind, place in ((LayerWriter, 1 << 20), (receiving._ImageWriter, 0)):
        path = tmp_path / kind.__name__
        how = header if kind is LayerWriter else SIZE
        for offset in (0, SEGMENT_SIZE - 40960):
            path.unlink(missing_ok=True)
            first = kind(path, how, FILE_SYSTEM, None)  # type: ignore[arg-type]
            if offset:
                first.write(offset - 8192, data)
            first.write(offset, data)
            known = first.sync()
            first.write(offset + 16384, data)
            first.close()
            second = kind(path, how, FILE_SYSTEM, known)  # type: ignore[arg-type]
            second.zeros(offset + 8192, 16384)
            second.finish()
            second.close()
            with open(path, "rb") as file:
                file.seek(place + offset)
                assert file.read(32768) == data.tobytes() + bytes(24576)


# Layers that are here already, and do not fit


def forged_head(stream: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """The stream with another head; its hashes are right."""
    frames = list(frames_of(stream))
    head = json.loads(frames[0][1])
    change(head)
    return forged(stream, [(frames[0][0], json.dumps(head).encode()), *frames[1:]])


def test_a_layer_that_is_here_with_another_size_is_refused(here: Pool, there: Pool) -> None:
    stream = sent(here, "web1@two")
    receive(there, stream)
    before = state_of(there)
    larger = forged_head(stream, lambda head: head["layers"][1].update(size=SIZE + 512))
    with pytest.raises(UsageError, match="is here with another size"):
        receive(there, larger, name="web2")
    assert state_of(there) == before


def test_an_increment_of_another_base_is_refused(here: Pool, there: Pool) -> None:
    receive(there, sent(here, "web1@one"))
    stream = sent(here, "web1@two", since="one")
    other = forged_head(stream, lambda head: head["base"].update(fingerprint="ab" * 32))
    with pytest.raises(UsageError, match="stands on another base here"):
        receive(there, other)


def test_more_layers_than_there_may_be_are_refused(here: Pool, there: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbdclone.store.fitting.MAX_LAYERS", 3)
    with pytest.raises(UsageError, match="more than 3 layers"):
        receive(there, sent(here, "web1@two"))
    monkeypatch.setattr("nbdclone.store.fitting.MAX_LAYERS", 4)
    receive(there, sent(here, "web1@two"))


def test_a_clone_that_was_cut_shorter_counts_as_changed(here: Pool, there: Pool) -> None:
    receive(there, sent(here, "web1@one"))
    change_header(there.places.delta("web1"), overlap=4096)
    with pytest.raises(UsageError, match="was changed since"):
        receive(there, sent(here, "web1@two", since="one"))


def test_a_snapshot_that_was_cut_off_before_does_not_count_afterwards(here: Pool, there: Pool) -> None:
    receive(there, sent(here, "web1@one"))
    own = there.places.header(there.places.delta("web1")).id
    (there.places.layer(own).parent).mkdir()
    os.link(there.places.delta("web1"), there.places.layer(own))
    (there.path / "clones/web1/snapshots/late").write_bytes(Snapshot(own, 5).dump())
    assert "web1@late" not in there.names()
    receive(there, sent(here, "web1@two", since="one"))
    assert "web1@late" not in there.names()
    assert not there.places.layer(own).exists()


def test_a_token_that_is_not_right_is_refused(here: Pool, there: Pool) -> None:
    token = Token.of(Sending(here.places, "web1@two").head, 1, 4096)
    text = str(token)
    assert Token.parse(text) == token
    for wrong in ["", "x", text[:-4], text[:10] + "AAAA" + text[14:], text + "AAAA", "é" * 20]:
        with pytest.raises(UsageError, match="no token"):
            Token.parse(wrong)
    here.remove(["web1@two"])
    with pytest.raises(NotFound, match="the snapshot that the token is of"):
        Sending.resume(here.places, token)


def test_one_stream_is_received_by_one_process(here: Pool, there: Pool) -> None:
    stream = sent(here, "web1@two")
    first = Receiving(there.places, io.BytesIO(stream))
    run = first.run()
    next(run)
    with pytest.raises(InUse, match="being received already"):
        Receiving(there.places, io.BytesIO(stream))
    with contextlib.closing(run):
        for _ in run:
            pass
    assert content(there, "web1") == content(here, "web1@two")


def test_what_the_stream_stands_on_cannot_be_removed_meanwhile(here: Pool, there: Pool) -> None:
    first = Receiving(there.places, io.BytesIO(sent(here, "web1@two")))
    run = first.run()
    next(run)
    with pytest.raises(InUse, match="base 'same'"):
        there.remove(["same"])
    for _ in run:
        pass
    assert content(there, "web1") == content(here, "web1@two")


def test_the_size_is_that_of_this_test() -> None:
    assert SIZE % 4096 == 512
    assert sending.SEGMENT_SIZE < SIZE
