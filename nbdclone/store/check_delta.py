"""A delta under examination: what is wrong with its header, its length and its map, and what would put it right.

Everything here only reads. What is found in a clone that is open elsewhere may be a page that is being
written at this moment: who calls looks again before believing it.
"""

from __future__ import annotations

import errno
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from nbdclone.errors import CorruptDelta, StorageError, UnsupportedFormat
from nbdclone.store.delta_file import (
    CHECKSUM,
    EMPTY_PAGE,
    HEADER_SLOTS,
    JOURNAL,
    MAP_SLOTS,
    METADATA_SIZE,
    PAGE_SIZE,
    RECORD_SLOTS,
    SEGMENT_SPAN,
    Header,
    decode_map_page,
    encode_map_page,
    file_size,
)
from nbdclone.store.delta_map import segments_with_data
from nbdclone.store.finding import NOTE, WRONG, Finding, Problem, Range
from nbdclone.store.fs import FileSystem, data_and_holes
from nbdclone.store.journal import recorded_blocks
from nbdclone.store.layer import (
    BLOCK_SIZE,
    BLOCKS_PER_SEGMENT,
    SECTOR_SIZE,
    SEGMENT_SIZE,
    block_count,
    is_zero,
)
from nbdclone.store.marked import is_marked, marked_runs
from nbdclone.store.repair import trailing_data

# What lies behind the end of a delta is kept before it is cut off, if it is no more than this.
MAX_TRAILING = 64 << 20
_SLOTS = "AB"
# In the header: sequence, id of the parent, length of its name, the name (docs/format.md).
_SEQUENCE = struct.Struct(">Q")
_SEQUENCE_AT, _PARENT_AT, _NAME_AT = 32, 56, 120


class Examination:
    """One look at the file of clone ``name``. ``header`` is None where it cannot be read; ``problems`` is the rest.

    ``in_use``: another process has it open. Then what only a crash or a close would settle is not told. ``sealed``: it
    is a layer, of which nobody reads the records.
    """

    def __init__(
        self, fs: FileSystem, fd: int, path: Path, name: str, *, in_use: bool = False, sealed: bool = False
    ) -> None:
        self.problems: list[Problem] = []
        self.header: Header | None = None
        self._fs = fs
        self._fd = fd
        self._path = path
        self._name = name
        self._in_use = in_use
        self._sealed = sealed
        self._length = fs.fstat(fd).st_size
        self._lost: list[Range] = []
        self._header_is_damaged = False
        self._examine_header()
        if self.header:
            self._examine_maps(self.header)
            self._examine_records(self.header)
            self._examine_length(self.header)

    def _add(
        self,
        kind: str,
        what: str,
        todo: str,
        *,
        at: Sequence[Range] = (),
        level: str = WRONG,
        ranges: Sequence[Range] = (),
        patches: Sequence[tuple[int, bytes]] = (),
        length: int | None = None,
    ) -> None:
        places = " and ".join(f"{offset}-{offset + count - 1}" for offset, count in at)
        where = f"{self._path}, bytes {places}" if places else str(self._path)
        finding = Finding(self._name, kind, what, where, todo, level, tuple(ranges))
        self.problems.append(Problem(finding, tuple(patches), length))

    # The header

    def _examine_header(self) -> None:
        pages = [self._page(slot) for slot in HEADER_SLOTS]
        headers: list[Header | None] = []
        reasons: list[str] = []
        for page in pages:
            try:
                headers.append(Header.decode(page or EMPTY_PAGE, ""))
                reasons.append("")
            except UnsupportedFormat as error:
                words = str(error).removeprefix(": ")
                self._add("newer-format", words, "use that nbdclone; nothing of it was looked at here")
                return
            except CorruptDelta as error:
                headers.append(None)
                reasons.append(error.reason if page is not None else "it cannot be read (an error of the disk)")
        bad = [slot for slot, header in enumerate(headers) if header is None]
        self._header_is_damaged = bool(bad)
        valid = [header for header in headers if header is not None]
        if len(bad) == 2:
            self._examine_lost_header(pages, reasons)
            return
        self.header = max(valid, key=lambda header: header.sequence)
        good = headers.index(self.header)
        other = 1 - good
        copy = [(HEADER_SLOTS[other], pages[good] or b"")]
        at = [(HEADER_SLOTS[other], PAGE_SIZE)]
        if bad:
            self._add(
                "header-slot",
                f"slot {_SLOTS[other]} of the header cannot be used: {reasons[other]}",
                f"slot {_SLOTS[good]} serves, and --repair copies it",
                at=at,
                patches=copy,
            )
        elif pages[0] != pages[1] and valid[0].sequence == valid[1].sequence:
            self._add(
                "header-slots-disagree",
                "the two slots of the header are valid, have the same sequence, and differ",
                "which is right cannot be told from them: put the file back from a backup",
                at=[(slot, PAGE_SIZE) for slot in HEADER_SLOTS],
            )
        elif pages[0] != pages[1] and not self._in_use:
            self._add(
                "header-older",
                f"slot {_SLOTS[other]} of the header is older: a change of it was interrupted",
                f"slot {_SLOTS[good]} counts, and --repair copies it",
                at=at,
                level=NOTE,
                patches=copy,
            )

    def _examine_lost_header(self, pages: list[bytes | None], reasons: list[str]) -> None:
        at = [(slot, PAGE_SIZE) for slot in HEADER_SLOTS]
        whole = _from_both(pages, _is_header)
        if whole is not None:
            self.header = Header.decode(whole, str(self._path))
            self._add(
                "header-slots",
                "both slots of the header are damaged, in different sectors: together they are whole",
                "--repair puts them together",
                at=at,
                patches=[(slot, whole) for slot in HEADER_SLOTS],
            )
            return
        self._add(
            "header-lost",
            f"both slots of the header cannot be used: {reasons[0]}; size, id and base of the clone are not known",
            "put the file back from a backup; what the clone wrote is still in the file, at the places that "
            "docs/format.md gives",
            at=at,
        )

    # The maps

    def _examine_maps(self, header: Header) -> None:
        for segment in segments_with_data(self._fs, self._fd, header.size):
            self._examine_map(header, segment)

    def _examine_map(self, header: Header, segment: int) -> None:
        places = [segment * SEGMENT_SPAN + slot for slot in MAP_SLOTS]
        pages = [self._page(place) for place in places]
        read = [decode_map_page(page or EMPTY_PAGE, segment, header.id) for page in pages]
        bad = [slot for slot in (0, 1) if read[slot] is None and pages[slot] != EMPTY_PAGE]
        valid = sorted(((decoded[0], slot) for slot, decoded in enumerate(read) if decoded), reverse=True)
        what = f"the map page of segment {segment}"
        if not valid:
            self._examine_lost_map(header, segment, places, pages, bad)
            return
        sequence, newest = valid[0]
        older = 1 - newest
        at = [(places[older], PAGE_SIZE)]
        copy = self._unless_cut(segment, [(places[older], pages[newest] or b"")])
        decoded = read[newest]
        assert decoded is not None
        if older in bad:
            self._add(
                "map-slot",
                f"{what}, slot {_SLOTS[older]}, fails its checksum",
                f"slot {_SLOTS[newest]} (sequence {sequence}) serves, and --repair copies it; where the page rotted "
                f"after a crash, the blocks of one flush may read from below",
                at=at,
                # Zeros first: a copy that a power cut tears must not complete a newer page that another one tore.
                patches=self._unless_cut(segment, [(places[older], EMPTY_PAGE)]) + copy,
            )
        elif len(valid) == 2 and valid[0][0] == valid[1][0] and read[0] != read[1]:
            self._add(
                "map-slots-disagree",
                f"the two slots of {what} are valid, have the same sequence, and differ",
                "which is right cannot be told from them: put the file back from a backup",
                at=[(place, PAGE_SIZE) for place in places],
            )
            return
        elif read[0] != read[1] and not self._in_use:
            self._add(
                "not-closed",
                f"{what} stands in slot {_SLOTS[newest]} only: the clone was not closed",
                "its next close copies it, and so does --repair",
                at=at,
                level=NOTE,
                patches=copy,
            )
        self._examine_bits(header, segment, places, newest, sequence, decoded[1])

    def _examine_bits(
        self, header: Header, segment: int, places: list[int], newest: int, sequence: int, bitmap: bytes
    ) -> None:
        """The marks themselves: none beyond the disk; and those whose blocks a file that is too short has not."""
        blocks = min(block_count(header.size) - segment * BLOCKS_PER_SEGMENT, BLOCKS_PER_SEGMENT)
        if blocks == BLOCKS_PER_SEGMENT and not self._is_short():
            return
        runs = marked_runs(bitmap)
        if runs and sum(runs[-1]) > blocks:
            cleared = _first_bits(bitmap, blocks)
            page = encode_map_page(segment, sequence + 1, header.id, cleared)
            beyond = sum(count - max(0, blocks - first) for first, count in runs if first + count > blocks)
            resized = self._was_resized(header)
            self._add(
                "marked-beyond",
                f"{beyond} blocks beyond the end of the disk are marked in the map page of segment {segment}"
                + (": it was made smaller, and that was cut off after it counted" if resized else ""),
                "the next to open it clears them, and so does --repair"
                if resized
                else "they mean nothing, and --repair clears them",
                at=[(places[newest], PAGE_SIZE)],
                level=NOTE if resized else WRONG,
                # The older slot first: until it is durable the newest page stays what it was.
                patches=self._unless_cut(segment, [(places[1 - newest], page), (places[newest], page)]),
            )
        if self._is_short():
            kept = max(0, (self._length - segment * SEGMENT_SPAN - METADATA_SIZE) // BLOCK_SIZE)
            for first, count in runs:
                start, end = max(first, kept), min(first + count, blocks)
                if start < end:
                    self._lost.append(_on_disk(header, segment, start * BLOCK_SIZE, end * BLOCK_SIZE))

    def _examine_lost_map(
        self, header: Header, segment: int, places: list[int], pages: list[bytes | None], bad: list[int]
    ) -> None:
        what = f"the map page of segment {segment}"
        at = [(places[slot], PAGE_SIZE) for slot in bad]
        if not bad:
            data = [] if self._in_use else self._data_of(header, segment)
            if data:
                self._add(
                    "unmarked-data",
                    f"segment {segment} has data and an empty map: writes that were never flushed, or a map that "
                    f"was lost as zeros",
                    "after a crash this is how it has to be; if not, put the file back from a backup",
                    level=NOTE,
                    ranges=data,
                )
        elif len(bad) == 1:
            if not self._in_use:
                self._add(
                    "map-first-torn",
                    f"{what}, slot {_SLOTS[bad[0]]}, fails its checksum, and the other was never written: the first "
                    f"flush of the segment was cut off, or the page rotted soon after",
                    "its blocks read from below, as docs/format.md says; --repair clears the page",
                    at=at,
                    ranges=self._data_of(header, segment),
                    patches=self._unless_cut(segment, [(places[bad[0]], EMPTY_PAGE)]),
                )
        elif whole := _from_both(pages, lambda page: decode_map_page(page, segment, header.id) is not None):
            self._add(
                "map-slots",
                f"both slots of {what} are damaged, in different sectors: together they are whole",
                "--repair puts them together",
                at=at,
                patches=self._unless_cut(segment, [(place, whole) for place in places]),
            )
        else:
            self._add(
                "map-lost",
                f"both slots of {what} fail their checksum: which of its blocks are the clone's own is not known, "
                f"and reading them is refused; the file has data of",
                "put the file back from a backup; the data stands at the places that docs/format.md gives, other "
                "segments can be read",
                at=at,
                ranges=self._data_of(header, segment),
            )

    def _unless_cut(self, segment: int, patches: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
        """Nothing is written where the file ends too early: that would hide how much is missing."""
        return [] if self._length < (segment + 1) * SEGMENT_SPAN and self._is_short() else patches

    def _is_short(self) -> bool:
        return self.header is not None and self._length < file_size(self.header.size)

    def _data_of(self, header: Header, segment: int) -> list[Range]:
        """Where in a segment the file has data, in bytes of the disk."""
        begin = segment * SEGMENT_SPAN + METADATA_SIZE
        start, stop = begin, min(begin + SEGMENT_SIZE, self._length)
        found: list[Range] = []
        for hole, end in data_and_holes(self._fs, self._fd, start, stop, BLOCK_SIZE) if start < stop else ():
            if not hole and start - begin < header.size - segment * SEGMENT_SIZE:
                found.append(_on_disk(header, segment, start - begin, end - begin))
            start = end
        return found

    # The records

    def _examine_records(self, header: Header) -> None:
        """A clone that was closed has none. What is in them is taken over by the next to write to the clone."""
        if self._in_use or not header.features & JOURNAL:
            return
        pages = {slot: self._page(slot) for slot in RECORD_SLOTS}
        at = [(slot, PAGE_SIZE) for slot, page in pages.items() if page != EMPTY_PAGE]
        if not at:
            return
        blocks = recorded_blocks(self._fs, self._fd, header, [page for page in pages.values() if page])
        untold = [block for block in sorted(set(blocks)) if not is_marked(self._fs, self._fd, header, block)]
        ranges = [_on_disk(header, 0, block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE) for block in untold]
        if self._sealed:
            self._add(
                "not-sealed",
                f"it is a layer, and has records: {len(untold)} blocks stand in them alone, where nobody reads them",
                "put the file back from a backup" if untold else "they say nothing more, and --repair clears them",
                at=at,
                level=WRONG if untold else NOTE,
                ranges=ranges,
                patches=[] if untold else [(slot, EMPTY_PAGE) for slot, _ in at],
            )
            return
        self._add(
            "records",
            f"it was not closed: there are records of its last flushes, and {len(untold)} blocks stand in them alone",
            "they count, and the next change of the clone puts them into the map",
            at=at,
            level=NOTE,
            ranges=ranges,
        )

    # The length

    def _examine_length(self, header: Header) -> None:
        right = file_size(header.size)
        if self._length > right:
            self._examine_trailing(header, right)
        elif self._length < right:
            # From the first segment on whose map is not all there nobody knows what there was.
            first = max(0, (self._length - MAP_SLOTS[1] - PAGE_SIZE) // SEGMENT_SPAN + 1)
            unknown = first * SEGMENT_SIZE
            what = f"the file is too short: {self._length} bytes of {right}"
            if not self._lost and unknown >= header.size:
                self._add(
                    "too-short",
                    f"{what}; no block of it is missing",
                    "--repair gives it its length",
                    length=right,
                )
                return
            ranges = [lost for lost in self._lost if lost[0] < unknown]
            if unknown < header.size:
                ranges.append((unknown, header.size - unknown))
            self._add(
                "truncated",
                f"{what}; what was in it is lost",
                f"put the file back from a backup; 'truncate -s {right} {self._path}' makes it open again with zeros, "
                f"or the base's bytes, in the lost places",
                ranges=ranges,
            )

    def _was_resized(self, header: Header) -> bool:
        """Is the file longer than it has to be, as a change of the disk's size leaves it that was cut off?

        Then there may be marks and data behind the disk's end, and who opens the clone to write ends that
        (``delta_map.cut_off``). A layer was ended before it was sealed. Where a copy of the header is damaged, it may
        have said another size.
        """
        longer = self._length - file_size(header.size)
        return longer > 0 and longer % BLOCK_SIZE == 0 and not self._sealed and not self._header_is_damaged

    def _examine_trailing(self, header: Header, right: int) -> None:
        resized = self._was_resized(header)
        level = NOTE if resized else WRONG
        what = f"the file is too long: {self._length} bytes, {right} by its header"
        if resized:
            what += ": a change of its size was cut off"
        at = [(right, self._length - right)]
        data = trailing_data(self._fs, self._fd, right, self._length)
        marked = any(
            decode_map_page(page, segment, header.id)
            for segment in {offset // SEGMENT_SPAN for offset, _ in data}
            if segment * SEGMENT_SPAN >= right
            for slot in MAP_SLOTS
            if (page := self._page(segment * SEGMENT_SPAN + slot)) is not None
        )
        amount = sum(length for _, length in data)
        if resized and (marked or amount > MAX_TRAILING):
            self._add("too-long", what, "it means nothing: the next to open it cuts it off", at=at, level=level)
        elif marked:
            todo = "it has map pages of this clone behind its end: not cut off, for the disk may have been larger"
            self._add("too-long", what, todo, at=at)
        elif amount > MAX_TRAILING:
            todo = f"it means nothing, and is too much to be kept: 'truncate -s {right} {self._path}' cuts it off"
            self._add("too-long", what, todo, at=at)
        else:
            todo = (
                "the next to open it cuts it off, and so does --repair"
                if resized
                else ("it means nothing, and --repair cuts it off")
            )
            # First the rest of the last block: once the file has its length, nobody looks there any more.
            self._add(
                "too-long", what, todo, at=at, level=level, patches=self._rest_of_the_last_block(header), length=right
            )

    def _rest_of_the_last_block(self, header: Header) -> list[tuple[int, bytes]]:
        """The patch that clears what is in the last block behind the end of the disk: it would show if that grew."""
        rest = -header.size % BLOCK_SIZE
        place = header.size + ((header.size - 1) // SEGMENT_SIZE + 1) * METADATA_SIZE
        data = bytearray(rest)
        if not rest or is_zero(data[: self._fs.pread_all(self._fd, [data], place, rest)]):
            return []
        return [(place, bytes(rest))]

    def _page(self, offset: int) -> bytes | None:
        """A page of the file, zeros past its end; None if the disk cannot read it."""
        page = bytearray(PAGE_SIZE)
        try:
            self._fs.pread_all(self._fd, [page], offset, PAGE_SIZE)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return None
        return bytes(page)


def linked_to(fs: FileSystem, fd: int, base_id: bytes, base_name: str) -> tuple[tuple[int, bytes], ...]:
    """The patches that make a base of the same content the parent of a delta whose header is sound."""
    page = bytearray(PAGE_SIZE)
    fs.pread_all(fd, [page], HEADER_SLOTS[0], PAGE_SIZE)
    name = base_name.encode()
    _SEQUENCE.pack_into(page, _SEQUENCE_AT, _SEQUENCE.unpack_from(page, _SEQUENCE_AT)[0] + 1)
    page[_PARENT_AT : _PARENT_AT + 16] = base_id
    page[_NAME_AT : _NAME_AT + 257] = (len(name).to_bytes(2, "big") + name).ljust(257, b"\0")
    CHECKSUM.pack_into(page, PAGE_SIZE - CHECKSUM.size, zlib.crc32(page[: -CHECKSUM.size]))
    return tuple((slot, bytes(page)) for slot in HEADER_SLOTS)


def _from_both(pages: Sequence[bytes | None], is_valid: Callable[[bytes], bool]) -> bytes | None:
    """The one page, if there is one, whose checksum is right and of which each sector stands in one of the two."""
    first, second = pages
    if first is None or second is None or EMPTY_PAGE in (first, second):
        return None
    sectors = range(0, PAGE_SIZE, SECTOR_SIZE)
    differing = [at for at in sectors if first[at : at + SECTOR_SIZE] != second[at : at + SECTOR_SIZE]]
    found = set()
    for choice in range(1 << len(differing)):
        page = bytearray(first)
        for number, at in enumerate(differing):
            if choice >> number & 1:
                page[at : at + SECTOR_SIZE] = second[at : at + SECTOR_SIZE]
        if is_valid(bytes(page)):
            found.add(bytes(page))
    return found.pop() if len(found) == 1 else None


def _is_header(page: bytes) -> bool:
    try:
        Header.decode(page, "")
    except StorageError:
        return False
    return True


def _first_bits(bitmap: bytes, count: int) -> bytes:
    """The bitmap with nothing but its first ``count`` bits."""
    bits = len(bitmap) * 8
    mask = ((1 << count) - 1) << (bits - count)
    return (int.from_bytes(bitmap, "big") & mask).to_bytes(len(bitmap), "big")


def _on_disk(header: Header, segment: int, start: int, end: int) -> Range:
    """A part of a segment, given from its begin, as a range of the disk."""
    offset = segment * SEGMENT_SIZE + start
    return offset, min(segment * SEGMENT_SIZE + end, header.size) - offset
