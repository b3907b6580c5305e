"""Other sizes of a clone.

Larger: the file is made longer, and the header says so; at any time. Smaller: what is behind the new end is given up;
only while nobody has the clone. Both have one commit, the header (:meth:`Delta.resize`), and what a power cut leaves of
the rest is done by the next who opens the delta (:func:`nbdclone.store.delta_map.cut_off`).

A new delta whose disk is larger than what it stands on is made with that size, and grows (:func:`create_over`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nbdclone.errors import UsageError
from nbdclone.store.clone import Clone
from nbdclone.store.delta import Delta
from nbdclone.store.delta_file import Header
from nbdclone.store.layer import BLOCK_SIZE, MAX_SIZE, MIN_SIZE, SECTOR_SIZE, SEGMENT_SIZE
from nbdclone.store.opening import open_beneath, open_disk
from nbdclone.store.places import Places
from nbdclone.store.space import first_bits, marked_bits


def require_size(size: int) -> None:
    """Raises UsageError unless a disk can have that size."""
    if size % SECTOR_SIZE or not MIN_SIZE <= size <= MAX_SIZE:
        raise UsageError(f"a size is a multiple of {SECTOR_SIZE} from {MIN_SIZE} to {MAX_SIZE} bytes, not {size}")


def size_of(places: Places, name: str) -> int:
    """The size of a clone. Raises UsageError if it is none, and its children, StorageError."""
    if "@" in name:
        raise UsageError(f"'{name[:200]}' is a snapshot, and never changes")
    if places.place(name).parent == places.bases:
        raise UsageError(f"'{name}' is a base, and never changes")
    return places.header(places.delta(name)).size


def own_behind(places: Places, name: str, size: int) -> int:
    """How many bytes behind the first ``size`` the clone has of its own, as of its last flush."""
    path = places.delta(name)
    with places.reading(path) as (fd, header):
        marked = marked_bits(places.fs, fd, path, header)
    first = size // SEGMENT_SIZE
    blocks = sum(
        (bits & ~first_bits(size, segment)).bit_count() for segment, bits in marked.items() if segment >= first
    )
    return blocks * BLOCK_SIZE


def grow(clone: Clone, size: int) -> None:
    """Make a clone that is open larger, in the turn of its changes; to be called when changing (``Places.changing``).

    Raises UsageError, FileTooLarge, OSError, CloneFailed.
    """
    require_size(size)
    if size < clone.size:
        raise UsageError(f"'{clone.name}' has {clone.size} bytes: it does not grow to {size}")
    if size > clone.size:
        clone.resize(size)


def resize(places: Places, name: str, size: int) -> None:
    """Change the size of a clone that nobody has open. What is behind the end of a smaller one is gone.

    Raises UsageError and its children (InUse: who has it), FileTooLarge, StorageError, OSError.
    """
    require_size(size)
    size_of(places, name)
    with open_disk(places, name) as clone, places.changing():
        if size != clone.size:
            clone.resize(size)


def create_over(places: Places, path: Path, header: Header, what: str) -> None:
    """Make a delta without blocks, durably. What is behind the end of its parent, as far as the disk goes, is zeros.

    A layer may be smaller than what it stands on: after a rebase that kept the changes, onto a larger base. Who reads
    through the layer would see what that has behind the layer's end. The caller makes the directory entry durable.
    Raises FileTooLarge, StorageError, OSError.
    """
    layer = places.layer(header.parent_id)
    size = places.header(layer).size if layer.exists() else header.size
    Delta.create(path, replace(header, size=min(size, header.size)), places.fs)
    if size < header.size:
        beneath = open_beneath(places, what, header)
        with Clone(what, [*beneath, Delta.open(path, what, places.fs)], places.fs) as disk:
            disk.resize(header.size)
