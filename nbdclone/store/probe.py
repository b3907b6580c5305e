"""How large an image says it is: partition tables and file systems know, so a truncated image is noticed."""

from __future__ import annotations

import os
import struct
import zlib
from typing import NamedTuple

_SECTOR = 512
_EXT_SUPERBLOCK = 1024
_EXT_MAGIC = 0xEF53
_EXT_INCOMPAT_64BIT = 0x80
_MBR_SIGNATURE = b"\x55\xaa"
_MBR_ENTRY = struct.Struct("<B3xB3xII")  # status, type, first sector, sectors
_MBR_PROTECTIVE = 0xEE
_GPT_HEADER = struct.Struct("<8sIII4xQQ")  # signature, revision, header size, its CRC-32, my LBA, alternate LBA


class Claim(NamedTuple):
    """``what`` of the image reaches to byte ``size``."""

    what: str
    size: int


def claimed_size(fd: int) -> Claim | None:
    """The largest extent that the image's own structures claim; None if they claim nothing that is known here."""
    head = os.pread(fd, 8192, 0).ljust(8192, b"\0")
    claims = [claim for claim in (_gpt(head, 512), _gpt(head, 4096), _mbr(head), _ext(head)) if claim]
    return max(claims, key=lambda claim: claim.size, default=None)


def _gpt(head: bytes, sector: int) -> Claim | None:
    signature, _revision, size, checksum, _own, alternate = _GPT_HEADER.unpack_from(head, sector)
    if signature != b"EFI PART" or not 92 <= size <= 512:
        return None
    header = bytearray(head[sector : sector + size])
    header[16:20] = bytes(4)
    if zlib.crc32(header) != checksum:
        return None
    return Claim("GUID partition table", (alternate + 1) * sector)


def _mbr(head: bytes) -> Claim | None:
    """The last partition's end. What has other status bytes than 0x00 and 0x80 is a boot sector without a table."""
    if head[510:512] != _MBR_SIGNATURE:
        return None
    entries = [_MBR_ENTRY.unpack_from(head, 446 + 16 * index) for index in range(4)]
    if any(status not in (0x00, 0x80) for status, *_ in entries):
        return None
    ends = [first + count for _, kind, first, count in entries if kind not in (0, _MBR_PROTECTIVE)]
    return Claim("partition table", max(ends) * _SECTOR) if ends else None


def _ext(head: bytes) -> Claim | None:
    superblock = head[_EXT_SUPERBLOCK : _EXT_SUPERBLOCK + 1024]
    magic, shift = struct.unpack_from("<H", superblock, 56)[0], struct.unpack_from("<I", superblock, 24)[0]
    if magic != _EXT_MAGIC or shift > 6:
        return None
    blocks: int = struct.unpack_from("<I", superblock, 4)[0]
    if struct.unpack_from("<I", superblock, 96)[0] & _EXT_INCOMPAT_64BIT:
        blocks |= struct.unpack_from("<I", superblock, 0x150)[0] << 32
    return Claim("ext file system", blocks << (10 + shift))
