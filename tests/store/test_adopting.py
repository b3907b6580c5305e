"""Adopting an overlay: what it stands on is found without guessing; what cannot become a clone is refused in words."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from words import refusal

from nbdclone.errors import InvalidImage, NBDCloneError, NotFound
from nbdclone.store import adopting
from nbdclone.store.adopting import (
    RawImage,
    find_base,
    read_chain,
    require_fits,
    write_what_differs,
    write_zeros_that_differ,
)
from nbdclone.store.clone import Clone
from nbdclone.store.layer import BLOCK_SIZE
from nbdclone.store.pool import BaseInfo, Pool

MIB = 1 << 20


def qcow2(
    path: Path,
    backing: str | None,
    backing_format: str | None = "raw",
    *,
    version: int = 3,
    size: int = MIB,
    crypt: int = 0,
    features: int = 0,
    snapshots: int = 0,
) -> Path:
    """The header of an image, by the words of the format's description; qemu has no part in these tests."""
    extensions = b""
    if backing_format is not None:
        name = backing_format.encode()
        extensions += struct.pack(">II", 0x6803F857, 8) + bytes(8)  # names of features: to be skipped
        extensions += struct.pack(">II", 0xE2792ACA, len(name)) + name + bytes(-len(name) % 8)
    extensions += bytes(8)
    length = 72 if version == 2 else 104
    at = length + len(extensions) if backing is not None else 0
    written = (backing or "").encode()
    head = struct.pack(
        ">4sIQIIQIIQQIIQ", b"QFI\xfb", version, at, len(written), 16, size, crypt, 1, 3 << 16, 1 << 16, 1, snapshots, 0
    )
    if version > 2:
        head += struct.pack(">QQQII", features, 0, 0, 4, 104)
    path.write_bytes((head + extensions + written).ljust(MIB // 4, b"\0"))
    return path


def refused(path: Path, pattern: str, kind: type[NBDCloneError] = InvalidImage) -> None:
    with pytest.raises(kind, match=pattern) as caught:
        read_chain(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("version", [2, 3])
def test_a_chain_is_followed_down_to_what_is_no_overlay(tmp_path: Path, source: Path, version: int) -> None:
    (tmp_path / "deep").mkdir()
    lower = qcow2(tmp_path / "deep" / "lower.qcow2", "../source.img", version=version, size=2 * MIB, snapshots=3)
    upper = qcow2(tmp_path / "upper.qcow2", "deep/lower.qcow2", "qcow2", version=version)
    chain = read_chain(upper)
    assert [(overlay.path, overlay.size, overlay.snapshots) for overlay in chain.overlays] == [
        (upper, MIB, 0),
        (lower, 2 * MIB, 3),
    ]
    assert (chain.bottom.resolve(), chain.bottom_format) == (source, "raw")
    opened = chain.opened()
    assert opened["file"]["filename"] == str(upper)
    assert opened["backing"]["file"]["filename"] == str(lower)
    assert opened["backing"]["backing"] is None


def test_a_chain_may_end_in_a_qcow2(tmp_path: Path) -> None:
    bottom = qcow2(tmp_path / "bottom.qcow2", None)
    chain = read_chain(qcow2(tmp_path / "upper.qcow2", str(bottom), "qcow2"))
    assert (chain.bottom, chain.bottom_format, len(chain.overlays)) == (bottom, "qcow2", 1)


def test_a_backing_file_whose_format_is_not_told_is_not_guessed(tmp_path: Path, source: Path) -> None:
    overlay = qcow2(tmp_path / "o.qcow2", str(source), None)
    refused(overlay, rf"does not say the format of {source}.*qemu-img rebase -u -F raw -b {source} {overlay}")


def test_a_raw_image_that_looks_like_another_format_is_refused(tmp_path: Path, source: Path) -> None:
    """A guest may write such a header to its raw disk, with the name of any file in it."""
    trap = qcow2(tmp_path / "trap.img", "/etc/shadow")
    refused(qcow2(tmp_path / "o.qcow2", str(trap)), "trap.img is a qcow2 image, and .*o.qcow2.* says that it is raw")
    refused(qcow2(tmp_path / "p.qcow2", str(source), "qcow2"), "source.img is a raw image, and .* that it is qcow2")


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"crypt": 2}, "is encrypted: decrypt it first"),
        ({"features": 1 << 2}, "keeps its data in another file"),
        ({"features": 1 << 1}, "is marked as corrupt"),
        ({"version": 4}, "is no qcow2 image, or a damaged one"),
    ],
)
def test_what_cannot_be_read_right_is_refused_wherever_in_the_chain(
    tmp_path: Path, source: Path, options: dict[str, int], pattern: str
) -> None:
    lower = qcow2(tmp_path / "lower.qcow2", str(source), **options)  # type: ignore[arg-type]
    refused(lower, f"lower.qcow2 {pattern}")
    refused(qcow2(tmp_path / "upper.qcow2", str(lower), "qcow2"), f"lower.qcow2 {pattern}")


@pytest.mark.parametrize("name", ["nbd://host/disk", "json:{}", "ssh://host/x", "https://host/x.img", "fat:dir"])
def test_only_files_are_followed(tmp_path: Path, name: str) -> None:
    refused(qcow2(tmp_path / "o.qcow2", name), "which is no file of this machine")


def test_what_is_missing_is_named_with_who_needs_it(tmp_path: Path) -> None:
    refused(tmp_path / "none.qcow2", "none.qcow2: no such file", NotFound)
    overlay = qcow2(tmp_path / "o.qcow2", "gone.img")
    refused(overlay, rf"gone.img: no such file, which {overlay} stands on", NotFound)
    refused(qcow2(tmp_path / "p.qcow2", str(tmp_path)), "neither a file nor a block device")


def test_what_is_no_overlay_is_said_to_be_a_base(tmp_path: Path, source: Path) -> None:
    refused(source, "source.img is a raw image: only a qcow2 overlay can become a clone")
    refused(qcow2(tmp_path / "plain.qcow2", None), "has no backing file: import it as a base")


def test_a_chain_that_stands_on_itself_is_refused(tmp_path: Path) -> None:
    qcow2(tmp_path / "a.qcow2", "b.qcow2", "qcow2")
    refused(qcow2(tmp_path / "b.qcow2", "a.qcow2", "qcow2"), "stands on itself")


@given(at=st.integers(0, 200), data=st.binary(min_size=1, max_size=40), length=st.integers(0, 400))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
def test_any_header_is_followed_or_refused_in_words(
    tmp_path: Path, source: Path, at: int, data: bytes, length: int
) -> None:
    path = qcow2(tmp_path / "any.qcow2", str(source))
    head = bytearray(path.read_bytes())
    head[at : at + len(data)] = data
    path.write_bytes(head[: len(head) if length > 300 else length])
    refusal(lambda: read_chain(path))


# The base


class Counting(RawImage):
    """How often all of it was hashed."""

    hashed = 0

    def fingerprint(self, progress: object) -> bytes:
        self.hashed += 1
        return super().fingerprint(None)


def test_a_base_is_known_by_its_content_whatever_the_file_is_called(pool: Pool, source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.img"
    copy.write_bytes(source.read_bytes())
    image = Counting(copy)
    pool.import_base(copy, "a-damaged-one")
    (pool.path / "bases" / "a-damaged-one" / "image").unlink()
    (pool.path / "bases" / "a-damaged-one" / "base.json").write_text("{}")
    assert find_base(pool, copy, image) == "base"
    assert image.hashed == 1


def test_the_image_of_a_base_itself_is_not_read(pool: Pool) -> None:
    path = pool.path / "bases" / "base" / "image"
    image = Counting(path)
    assert find_base(pool, path, image) == "base"
    assert image.hashed == 0


def test_another_content_is_no_base_also_where_nothing_was_sampled(pool: Pool, source: Path) -> None:
    content = bytearray(source.read_bytes())
    content[10 * BLOCK_SIZE] ^= 1
    source.write_bytes(content)
    image = Counting(source)
    assert find_base(pool, source, image) is None
    assert image.hashed == 1
    content[0] ^= 1
    source.write_bytes(content)
    assert find_base(pool, source, image) is None
    source.write_bytes(content[:-512])
    assert find_base(pool, source, image) is None
    assert image.hashed == 1, "hashed although size or samples tell already"


def test_a_clone_has_at_least_the_size_of_its_base(pool: Pool, source: Path, tmp_path: Path) -> None:
    info = pool.info("base")
    assert isinstance(info, BaseInfo)
    assert require_fits(read_chain(qcow2(tmp_path / "o.qcow2", str(source), size=2 * MIB)), info) == 2 * MIB
    chain = read_chain(qcow2(tmp_path / "o.qcow2", str(source), size=MIB - 512))
    with pytest.raises(InvalidImage, match=rf"not smaller than its base.*qemu-img resize .*o.qcow2 {MIB}"):
        require_fits(chain, info)


# What is written


def own_blocks(clone: Clone) -> set[int]:
    offset, found = 0, set()
    for extent in clone.extents(0, clone.size):
        if extent.depth == 1 and extent.origin > 1:
            found |= set(range(offset // BLOCK_SIZE, (offset + extent.length) // BLOCK_SIZE))
        offset += extent.length
    return found


def test_only_blocks_that_differ_become_the_clones_own(pool: Pool, content: bytes) -> None:
    pool.create_clones("base", ["web"], size=2 * MIB)
    wanted = bytearray(content + bytes(MIB))
    rng = random.Random(5)
    for block in (0, 7, 8, 9, 255, 300):
        wanted[block * BLOCK_SIZE + 100 : block * BLOCK_SIZE + 110] = rng.randbytes(10)
    wanted[20 * BLOCK_SIZE : 22 * BLOCK_SIZE] = bytes(2 * BLOCK_SIZE)
    with pool.open_clone("web") as clone:
        for start, end in ((0, 700), (700, 40_000), (40_000, MIB + 512), (MIB + 512, 2 * MIB)):
            write_what_differs(clone, bytes(wanted[start:end]), start)
        assert clone.pread(2 * MIB, 0) == wanted
        assert own_blocks(clone) == {0, 7, 8, 9, 20, 21, 255, 300}


def test_zeros_become_holes_where_the_base_has_data_and_nothing_is_read_elsewhere(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[int] = []

    def compare(clone: Clone, data: bytes, offset: int) -> None:
        compared.append(len(data))
        write_what_differs(clone, data, offset)

    monkeypatch.setattr(adopting, "write_what_differs", compare)
    with open(tmp_path / "sparse.img", "wb") as file:
        file.truncate(300 * MIB)
        os.pwrite(file.fileno(), b"x" * 3 * BLOCK_SIZE, 150 * MIB)
    pool.import_base(tmp_path / "sparse.img", "sparse")
    pool.create_clones("sparse", ["web"], size=400 * MIB)
    with pool.open_clone("web") as clone:
        write_zeros_that_differ(clone, 512, 400 * MIB - 512)
        block = 150 * MIB // BLOCK_SIZE
        assert clone.pread(3 * BLOCK_SIZE, 150 * MIB) == bytes(3 * BLOCK_SIZE)
        assert own_blocks(clone) == {block, block + 1, block + 2}
    assert sum(compared) <= 16 * BLOCK_SIZE
