"""The data of options and of the replies to them: taken apart and put together, without a look at the handshake.

What a client sent that does not add up is an ``OptionError``: the reply to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from nbdclone.errors import LocalProtocolError
from nbdclone.protocol import wire
from nbdclone.protocol.wire import (
    INFO_COUNT,
    INFO_TYPE,
    OPTION_REPLY,
    QUERY_COUNT,
    STRING_LENGTH,
    ExportInfo,
    Option,
    OptionReply,
    encode_string,
    encode_text,
)


class OptionError(Exception):
    """An option that cannot be granted: a reply of this type, and haggling goes on."""

    def __init__(self, reply: int, message: str) -> None:
        super().__init__(message)
        self.reply = reply
        self.message = message


def check_fields(info: ExportInfo) -> None:
    """The numbers in ``info`` must fit their fields."""
    blocks = (info.minimum_block, info.preferred_block, info.maximum_payload)
    if not (0 <= info.size < 1 << 64 and 0 <= info.flags < 1 << 16 and 0 < min(blocks) <= max(blocks) < 1 << 32):
        raise LocalProtocolError(f"{info} does not fit into its fields")


def list_replies(exports: Iterable[tuple[str, str]]) -> Iterator[bytes]:
    for name, description in exports:
        encoded = encode_string(name, wire.MAX_NAME_LENGTH)
        text = encode_text(description, wire.MAX_LISTED_LENGTH)
        yield option_reply(Option.LIST, OptionReply.SERVER, STRING_LENGTH.pack(len(encoded)) + encoded + text)
    yield option_reply(Option.LIST, OptionReply.ACK)


def option_reply(option: int, reply: int, payload: bytes = b"") -> bytes:
    return OPTION_REPLY.pack(wire.REPLY_MAGIC, option, reply, len(payload)) + payload


def refuse_data(data: bytes) -> None:
    if data:
        raise OptionError(OptionReply.ERR_INVALID, "this option takes no data")


def parse_name(data: bytes) -> str:
    """An export name as it comes over the wire: UTF-8 without NUL, at most ``MAX_NAME_LENGTH`` bytes."""
    if len(data) > wire.MAX_NAME_LENGTH:
        message = f"an export name of {len(data)} bytes: the limit is {wire.MAX_NAME_LENGTH}"
        raise OptionError(OptionReply.ERR_TOO_BIG, message)
    if b"\0" in data:
        raise OptionError(OptionReply.ERR_INVALID, "an export name holds a NUL")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise OptionError(OptionReply.ERR_INVALID, "an export name is not UTF-8") from None


def parse_export_request(data: bytes) -> tuple[str, frozenset[int]]:
    """The data of NBD_OPT_INFO and NBD_OPT_GO: name, information requests. The lengths in it must add up."""
    fixed = STRING_LENGTH.size + INFO_COUNT.size
    if len(data) < fixed:
        raise OptionError(OptionReply.ERR_INVALID, f"{len(data)} bytes of data are too short")
    (name_length,) = STRING_LENGTH.unpack_from(data)
    if name_length > len(data) - fixed:
        raise OptionError(OptionReply.ERR_INVALID, f"a name of {name_length} bytes in {len(data)} bytes of data")
    name_end = STRING_LENGTH.size + name_length
    (count,) = INFO_COUNT.unpack_from(data, name_end)
    infos = data[name_end + INFO_COUNT.size :]
    if count * INFO_TYPE.size != len(infos):
        raise OptionError(OptionReply.ERR_INVALID, f"{count} information requests in {len(infos)} bytes")
    name = parse_name(data[STRING_LENGTH.size : name_end])
    return name, frozenset(info for (info,) in INFO_TYPE.iter_unpack(infos))


def parse_context_request(data: bytes) -> tuple[str, list[str]]:
    """The data of NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT: name, queries. The lengths must add up."""
    name, position = _take_string(data, 0)
    if len(data) < position + QUERY_COUNT.size:
        raise OptionError(OptionReply.ERR_INVALID, f"{len(data)} bytes of data hold no number of queries")
    (count,) = QUERY_COUNT.unpack_from(data, position)
    if count > wire.MAX_QUERIES:
        raise OptionError(OptionReply.ERR_TOO_BIG, f"{count} queries: the limit is {wire.MAX_QUERIES}")
    position += QUERY_COUNT.size
    queries = []
    for _ in range(count):
        query, position = _take_string(data, position)
        queries.append(_parse_query(query))
    if position != len(data):
        raise OptionError(OptionReply.ERR_INVALID, f"{len(data) - position} bytes follow the last query")
    return parse_name(name), queries


def _take_string(data: bytes, position: int) -> tuple[bytes, int]:
    """The string at ``position``, and where it ends."""
    start = position + STRING_LENGTH.size
    if len(data) < start:
        raise OptionError(OptionReply.ERR_INVALID, f"{len(data)} bytes of data are too short")
    (length,) = STRING_LENGTH.unpack_from(data, position)
    if length > len(data) - start:
        raise OptionError(OptionReply.ERR_INVALID, f"a string of {length} bytes in {len(data)} bytes of data")
    return data[start : start + length], start + length


def _parse_query(query: bytes) -> str:
    """A query for metadata contexts: a namespace, a colon, and what that namespace makes of the rest."""
    try:
        text = query.decode()
    except UnicodeDecodeError:
        raise OptionError(OptionReply.ERR_INVALID, "a query is not UTF-8") from None
    if len(query) > wire.MAX_STRING_LENGTH or "\0" in text or text.find(":") < 1:
        raise OptionError(OptionReply.ERR_INVALID, "a query is no namespace, colon and name")
    return text
