"""The map of an open delta: its bits in memory, and the two slots of each of its pages.

Map pages are written alternately to two places, each page with its sequence number and its checksum. A page that was
torn by a power cut, or rots, fails its checksum, and the other slot holds the one before. A page is copied to the other
slot too: at once if that holds nothing valid, otherwise when it was not changed again by the next flush, and at the
close. So at rest both slots say the same, and losing either loses nothing.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from nbdclone.errors import CorruptDelta
from nbdclone.store.delta_file import (
    EMPTY_BITMAP,
    EMPTY_PAGE,
    MAP_SLOTS,
    METADATA_SIZE,
    SEGMENT_SPAN,
    Header,
    decode_map_page,
    encode_map_page,
    file_size,
    read_page,
)
from nbdclone.store.fs import FileSystem, seek_extent
from nbdclone.store.layer import BITMAP_SIZE, BLOCK_SIZE, BLOCKS_PER_SEGMENT, SEGMENT_SIZE, block_count, is_zero

logger = logging.getLogger("nbdclone")


@dataclass(slots=True)
class Segment:
    """The map of one segment in memory. ``slot`` (0 or 1) is where the newest durable page stands.

    ``bitmap`` is changed to a bytearray by the first mark; until then all empty ones are the same object.
    """

    bitmap: bytes | bytearray
    sequence: int
    slot: int
    alone: bool  # the other slot holds nothing valid
    torn: bool  # no, it holds a page that fails its checksum
    reserved: bool  # both slots have their space: writing the map will not meet a full disk


class DeltaMap:
    """The map of a delta, loaded by segments. Loading is for any thread, writing for the one that flushes.

    ``lock`` guards the bitmaps and ``dirty``: the segments that have marks which no flush has noted.
    """

    def __init__(self, path: Path, fd: int, delta_id: bytes, fs: FileSystem) -> None:
        self.lock = threading.Lock()
        self.dirty: set[int] = set()
        self.unmirrored: set[int] = set()  # whose other slot is not the same
        self.torn: set[int] = set()  # whose other slot is to be wiped before it is written
        self.lost_page = False  # a durable page had rotted: the next flush must not put off writing it
        self.damaged_pages: list[str] = []  # slots that failed their checksum; the other slot served
        self.segments: dict[int, Segment] = {}
        self.path = path
        self._fd = fd
        self._id = delta_id
        self._fs = fs

    # Loading

    def load(self, segment: int, nowait: bool) -> Segment:
        """The map of a segment. Raises CorruptDelta; BlockingIOError if ``nowait`` and it is not in memory."""
        state = self.segments.get(segment)
        if state is None:
            state = self.read(segment, nowait)
            # Two threads may have read it at once: one of the results becomes the segment's for both.
            state = self.segments.setdefault(segment, state)
            if state.torn:
                with self.lock:
                    self.torn.add(segment)
        return state

    def read(self, segment: int, nowait: bool) -> Segment:
        """The same from the file, and not kept: for who asks once."""
        start = segment * SEGMENT_SPAN
        pages = [read_page(self._fs, self._fd, start + slot, nowait) for slot in MAP_SLOTS]
        read = [decode_map_page(page, segment, self._id) for page in pages]
        if any(decoded is None and page != EMPTY_PAGE for page, decoded in zip(pages, read, strict=True)):
            # Perhaps it is just being written: a layer gains blocks while others read it.
            pages = [read_page(self._fs, self._fd, start + slot, nowait) for slot in MAP_SLOTS]
            read = [decode_map_page(page, segment, self._id) for page in pages]
        for slot, (page, decoded) in enumerate(zip(pages, read, strict=True)):
            if decoded is None and page != EMPTY_PAGE:
                self._note_damage(segment, slot)
        valid = [(decoded[0], slot, decoded[1]) for slot, decoded in enumerate(read) if decoded is not None]
        if valid:
            sequence, slot, bitmap = max(valid)
            if read[0] != read[1]:
                with self.lock:
                    self.unmirrored.add(segment)
            # A slot of zeros may be a hole: a copy of the file need not have what was reserved.
            alone = len(valid) == 1
            torn = alone and EMPTY_PAGE not in pages
            return Segment(bitmap, sequence, slot, alone, torn, reserved=EMPTY_PAGE not in pages)
        # Both slots empty: never written. One empty and one torn: its first write was cut off before it was durable.
        # Neither empty: something that was durable is gone.
        if EMPTY_PAGE not in pages:
            raise CorruptDelta(str(self.path), f"both copies of the map page of segment {segment} fail their checksum")
        slot = 1 if pages[1] == EMPTY_PAGE else 0
        torn = pages[1 - slot] != EMPTY_PAGE
        return Segment(EMPTY_BITMAP, sequence=0, slot=slot, alone=True, torn=torn, reserved=False)

    def _note_damage(self, segment: int, slot: int) -> None:
        what = f"map page of segment {segment}, slot {'AB'[slot]}"
        if what not in self.damaged_pages:
            self.damaged_pages.append(what)
            logger.warning("%s: the %s fails its checksum; the other slot serves", self.path, what)

    # Writing

    def note(self) -> dict[int, bytes]:
        """The map as it is now, of the segments that have new marks; to be called with the lock."""
        noted = {segment: bytes(self.segments[segment].bitmap) for segment in self.dirty}
        self.dirty.clear()
        self.lost_page = False
        return noted

    def wipe(self) -> set[int]:
        """Put zeros over the pages that fail their checksum, for the next sync to cover. Which segments' it was.

        A page that a crash tore has sectors of a newer map, whose blocks have been read from below since. If another
        page were written over it at once, and torn by the next crash, the newer map could come together after all.
        Zeros cannot do that: a map only gains bits, so what a torn page has not got of the newer one is not zeros. But
        for a page that has nothing new, and lost bits (``Delta.give_up``): one that comes together by the zeros does no
        harm until the sync that makes these durable is done, and then it is gone.
        """
        with self.lock:
            torn = set(self.torn)
        for segment in torn:
            slot = 1 - self.segments[segment].slot
            self._fs.pwrite_all(self._fd, EMPTY_PAGE, segment * SEGMENT_SPAN + MAP_SLOTS[slot])
        return torn

    def changing(self, segment: int) -> bool:
        """Is one of the segment's slots not what it is to be, durably?"""
        with self.lock:
            return segment in self.dirty or segment in self.unmirrored or segment in self.torn

    def wiped(self, segments: Collection[int]) -> None:
        """The zeros are durable."""
        for segment in segments:
            self.segments[segment].torn = False
        with self.lock:
            self.torn.difference_update(segments)

    def write(self, noted: Mapping[int, bytes]) -> None:
        """Write pages with these bitmaps, each to the slot that is not the newest, for the next sync to cover."""
        for segment, bitmap in noted.items():
            state = self.segments[segment]
            page = encode_map_page(segment, state.sequence + 1, self._id, bitmap)
            self._fs.pwrite_all(self._fd, page, segment * SEGMENT_SPAN + MAP_SLOTS[1 - state.slot])

    def written(self, noted: Mapping[int, bytes]) -> set[int]:
        """They are durable, and so the newest. Returns the segments whose other slot holds nothing valid."""
        alone = set()
        for segment in noted:
            state = self.segments[segment]
            state.sequence += 1
            state.slot = 1 - state.slot
            if state.alone:
                alone.add(segment)
        with self.lock:
            self.unmirrored |= noted.keys()
        return alone

    def mirror(self, segments: Collection[int]) -> None:
        """Copy pages to their other slots, for a later sync to cover. Raises OSError.

        A power cut that tears a copy leaves the newest durable page, which is never written over: a new page always
        goes to the other slot.
        """
        for segment in segments:
            state = self.segments.get(segment)
            # Being loaded by another thread; or to be written anyway; or to be wiped first, by the next flush.
            if state is None or segment in self.dirty or state.torn:
                continue
            start = segment * SEGMENT_SPAN
            page = read_page(self._fs, self._fd, start + MAP_SLOTS[state.slot], nowait=False)
            read = decode_map_page(page, segment, self._id)
            if read is None or read[0] != state.sequence:
                # It rotted since it was written. Never over the good one: the next flush writes the map, which is in
                # memory, over this one.
                self._note_damage(segment, state.slot)
                with self.lock:
                    state.slot = 1 - state.slot
                    self.dirty.add(segment)
                    self.lost_page = True
                continue
            self._fs.pwrite_all(self._fd, page, start + MAP_SLOTS[1 - state.slot])
            state.alone = False
            with self.lock:
                self.unmirrored.discard(segment)


def cut_off(path: Path, fd: int, header: Header, fs: FileSystem) -> None:
    """Let the file end where the disk does, and hold nothing of what was behind that end, durably.

    What is left when a disk was made smaller: the blocks behind its end are marked, and there is data in the rest of
    its last block. All that comes to light if the disk grows again. To be called before the delta is used, by who has
    it alone. It can be interrupted anywhere: the file gets its length in the end, so the next to open it begins anew.
    Raises CorruptDelta, OSError.
    """
    segment, end = divmod(header.size, SEGMENT_SIZE)
    if end:
        rest = bytearray(-end % BLOCK_SIZE)
        place = header.size + (segment + 1) * METADATA_SIZE
        if rest and fs.pread_all(fd, [rest], place, len(rest)) and not is_zero(rest):
            fs.pwrite_all(fd, bytes(len(rest)), place)
        pages = DeltaMap(path, fd, header.id, fs)
        state = pages.load(segment, nowait=False)
        behind = BLOCKS_PER_SEGMENT - block_count(end)
        kept = (int.from_bytes(state.bitmap, "big") >> behind << behind).to_bytes(BITMAP_SIZE, "big")
        if kept != state.bitmap:
            if torn := pages.wipe():
                fs.datasync(fd)
                pages.wiped(torn)
            # A power cut in here: one slot or the other holds, and what it marks behind the end is nobody's.
            pages.write({segment: kept})
            fs.datasync(fd)
            pages.written({segment: kept})
            pages.mirror([segment])
        # Before the file has its length, which says that all of this is done.
        fs.datasync(fd)
    fs.ftruncate(fd, file_size(header.size))
    fs.sync(fd)


def segments_with_data(fs: FileSystem, fd: int, size: int) -> Iterator[int]:
    """The segments of a delta of ``size`` bytes for which its file has data: without any there is no map either."""
    segment, data = 0, -1
    while segment * SEGMENT_SIZE < size:
        start = segment * SEGMENT_SPAN
        if data < start:
            data = seek_extent(fs, fd, start, os.SEEK_DATA, otherwise=start)
        if data >= start + SEGMENT_SPAN:
            segment = data // SEGMENT_SPAN
            continue
        yield segment
        segment += 1
