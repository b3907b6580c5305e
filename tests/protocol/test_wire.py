"""The layouts and numbers, against the specification's own tables."""

from __future__ import annotations

from enum import IntEnum
from struct import Struct

import pytest

from nbdclone.errors import LocalProtocolError
from nbdclone.protocol import wire

LAYOUTS = {
    # name: bits of each field in order, as the specification lists them
    "GREETING": (64, 64, 16),
    "CLIENT_FLAGS": (32,),
    "OPTION": (64, 32, 32),
    "OPTION_REPLY": (64, 32, 32, 32),
    "EXPORT_NAME_REPLY": (64, 16),
    "STRING_LENGTH": (32,),
    "INFO_COUNT": (16,),
    "INFO_TYPE": (16,),
    "INFO_EXPORT": (16, 64, 16),
    "INFO_BLOCK_SIZE": (16, 32, 32, 32),
    "QUERY_COUNT": (32,),
    "META_CONTEXT": (32,),
    "REQUEST": (32, 16, 16, 64, 64, 32),
    "SIMPLE_REPLY": (32, 32, 64),
    "STRUCTURED_REPLY": (32, 16, 16, 64, 32),
    "OFFSET_DATA": (64,),
    "OFFSET_HOLE": (64, 32),
    "BLOCK_STATUS": (32,),
    "DESCRIPTOR": (32, 32),
    "ERROR": (32, 16),
    "ERROR_OFFSET": (64,),
    "READ_CHUNK": (32, 16, 16, 64, 32, 64),
    "HOLE_CHUNK": (32, 16, 16, 64, 32, 64, 32),
    # Two fields of 64 bits, cookie and offset, are one opaque field of 128.
    "EXTENDED_REQUEST": (32, 16, 16, 128, 64),
    "EXTENDED_REPLY": (32, 16, 16, 128, 64),
    "EXTENDED_COOKIE": (64, 64),
    "BLOCK_STATUS_EXT": (32, 32),
    "DESCRIPTOR_EXT": (64, 64),
    "STATUS_LENGTH": (64,),
    "STATUS_CONTEXT": (32,),
    "EXTENDED_READ_CHUNK": (32, 16, 16, 128, 64, 64),
    "EXTENDED_HOLE_CHUNK": (32, 16, 16, 128, 64, 64, 32),
}
CODES = {16: "H", 32: "I", 64: "Q", 128: "16s"}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_big_endian_and_has_the_specified_fields(name: str) -> None:
    layout = getattr(wire, name)
    assert layout.format == ">" + "".join(CODES[bits] for bits in LAYOUTS[name])
    assert layout.size * 8 == sum(LAYOUTS[name])


def test_every_layout_is_in_the_table() -> None:
    assert {name for name, value in vars(wire).items() if isinstance(value, Struct)} == set(LAYOUTS)


def test_the_magic_numbers_read_as_text_where_they_do() -> None:
    assert wire.INIT_PASSWD.to_bytes(8, "big") == b"NBDMAGIC"
    assert wire.IHAVEOPT.to_bytes(8, "big") == b"IHAVEOPT"


@pytest.mark.parametrize(
    ("prefix", "enumeration"),
    [("CMD_", wire.Command), ("REPLY_TYPE_", wire.ReplyType), ("", wire.Errno)],
)
def test_plain_numbers_agree_with_the_enumerations(prefix: str, enumeration: type[IntEnum]) -> None:
    for member in enumeration:
        assert getattr(wire, prefix + member.name) == member.value
        assert type(getattr(wire, prefix + member.name)) is int


def test_plain_flags_agree_with_the_enumerations() -> None:
    for flag in wire.CommandFlag:
        assert getattr(wire, f"CMD_FLAG_{flag.name}") == flag.value
    assert wire.REPLY_FLAG_DONE == 1


def test_read_only_is_read_from_the_flags() -> None:
    assert wire.ExportInfo("base", 1, wire.transmission_flags(True)).read_only
    assert not wire.ExportInfo("web1", 1, wire.transmission_flags(False)).read_only


def test_strings_are_utf8_without_nul_and_within_their_limit() -> None:
    assert wire.encode_string("größe", 7) == "größe".encode()
    for text, limit in (("größe", 6), ("a\0b", 10), ("\ud800", 10)):
        with pytest.raises(LocalProtocolError):
            wire.encode_string(text, limit)


@pytest.mark.parametrize("limit", range(8))
def test_texts_are_cut_between_characters(limit: int) -> None:
    cut = wire.encode_text("aé€𝄞", limit)
    assert len(cut) <= limit
    assert "aé€𝄞".startswith(cut.decode())
