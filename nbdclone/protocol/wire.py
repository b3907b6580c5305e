"""The numbers and the layouts of the NBD protocol, each beside its name in the specification.

Everything on the wire is big-endian. What the hot path compares is a plain ``int`` as well as a member
of an enumeration: arithmetic on enumeration members costs a microsecond where an ``int`` takes 40 ns.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag
from struct import Struct
from typing import Final, NamedTuple

from nbdclone.errors import LocalProtocolError

DEFAULT_PORT: Final = 10809  # IANA's number for NBD

# Magic numbers

INIT_PASSWD: Final = 0x4E42444D41474943  # "NBDMAGIC"
IHAVEOPT: Final = 0x49484156454F5054  # "IHAVEOPT"
CLISERV_MAGIC: Final = 0x00420281861253  # the second word of an oldstyle server's greeting
REPLY_MAGIC: Final = 0x3E889045565A9  # "magic number for replies" (to options)
REQUEST_MAGIC: Final = 0x25609513  # NBD_REQUEST_MAGIC
SIMPLE_REPLY_MAGIC: Final = 0x67446698  # NBD_SIMPLE_REPLY_MAGIC
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF  # NBD_STRUCTURED_REPLY_MAGIC
EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71  # NBD_EXTENDED_REQUEST_MAGIC
EXTENDED_REPLY_MAGIC: Final = 0x6E8A278C  # NBD_EXTENDED_REPLY_MAGIC

# Layouts of the handshake

GREETING = Struct(">QQH")  # "Newstyle negotiation", S: INIT_PASSWD, IHAVEOPT, handshake flags
CLIENT_FLAGS = Struct(">I")  # "Client flags"
OPTION = Struct(">QII")  # C: IHAVEOPT, option, length of the data that follows
OPTION_REPLY = Struct(">QIII")  # S: REPLY_MAGIC, option, reply type, length of the data that follows
EXPORT_NAME_REPLY = Struct(">QH")  # answer to NBD_OPT_EXPORT_NAME: size, transmission flags
STRING_LENGTH = Struct(">I")  # before a name in NBD_OPT_GO, NBD_OPT_INFO and NBD_REP_SERVER
INFO_COUNT = Struct(">H")  # NBD_OPT_GO: number of information requests
INFO_TYPE = Struct(">H")  # NBD_OPT_GO: one request; NBD_REP_INFO: the type of what follows
INFO_EXPORT = Struct(">HQH")  # NBD_INFO_EXPORT: type, size, transmission flags
INFO_BLOCK_SIZE = Struct(">HIII")  # NBD_INFO_BLOCK_SIZE: type, minimum, preferred, maximum payload
QUERY_COUNT = Struct(">I")  # NBD_OPT_LIST_META_CONTEXT, NBD_OPT_SET_META_CONTEXT: number of queries
META_CONTEXT = Struct(">I")  # NBD_REP_META_CONTEXT: the context's id; its name follows

EXPORT_NAME_PADDING: Final = 124  # zeros after EXPORT_NAME_REPLY, unless NBD_FLAG_C_NO_ZEROES

# Layouts of the transmission

REQUEST = Struct(">IHHQQI")  # "Request message": magic, flags, type, cookie, offset, length
SIMPLE_REPLY = Struct(">IIQ")  # "Simple reply message": magic, error, cookie
STRUCTURED_REPLY = Struct(">IHHQI")  # "Structured reply chunk message": magic, flags, type, cookie, length
OFFSET_DATA = Struct(">Q")  # NBD_REPLY_TYPE_OFFSET_DATA: offset; the data follow
OFFSET_HOLE = Struct(">QI")  # NBD_REPLY_TYPE_OFFSET_HOLE: offset, hole size
BLOCK_STATUS = Struct(">I")  # NBD_REPLY_TYPE_BLOCK_STATUS: the context's id; the descriptors follow
DESCRIPTOR = Struct(">II")  # NBD_REPLY_TYPE_BLOCK_STATUS: length of an extent, its status
ERROR = Struct(">IH")  # NBD_REPLY_TYPE_ERROR: error, message length; the message follows
ERROR_OFFSET = Struct(">Q")  # NBD_REPLY_TYPE_ERROR_OFFSET: the offset, after the message
READ_CHUNK = Struct(">IHHQIQ")  # STRUCTURED_REPLY and OFFSET_DATA in one: what precedes the data of a read
HOLE_CHUNK = Struct(">IHHQIQI")  # STRUCTURED_REPLY and OFFSET_HOLE in one

# Layouts of the transmission with extended headers. Cookie and offset of a request come back in each of its replies, so
# a server takes the two as one opaque value, in the place of the cookie that it is with compact headers.

EXTENDED_REQUEST = Struct(">IHH16sQ")  # "Request message": magic, flags, type, cookie and offset, length
EXTENDED_REPLY = Struct(">IHH16sQ")  # "Extended reply chunk message": magic, flags, type, cookie and offset, length
EXTENDED_COOKIE = Struct(">QQ")  # cookie, offset
BLOCK_STATUS_EXT = Struct(">II")  # NBD_REPLY_TYPE_BLOCK_STATUS_EXT: the context's id, number of descriptors that follow
DESCRIPTOR_EXT = Struct(">QQ")  # NBD_REPLY_TYPE_BLOCK_STATUS_EXT: length of an extent, its status
STATUS_LENGTH = Struct(">Q")  # NBD_CMD_BLOCK_STATUS with a payload: effect length; the contexts' ids follow
STATUS_CONTEXT = Struct(">I")  # NBD_CMD_BLOCK_STATUS with a payload: a context's id
EXTENDED_READ_CHUNK = Struct(">IHH16sQQ")  # EXTENDED_REPLY and OFFSET_DATA in one
EXTENDED_HOLE_CHUNK = Struct(">IHH16sQQI")  # EXTENDED_REPLY and OFFSET_HOLE in one

# Limits: no number that a peer sends is believed before it has been held against one of these

MAX_PAYLOAD: Final = 64 << 20  # test suites of other implementations send 49,865,728 bytes in one request
ADVERTISED_MAX_PAYLOAD: Final = 32 << 20  # "Size constraints": what a client may count on everywhere
MAX_OPTION_LENGTH: Final = 64 << 10  # room for the longest name and all there is to ask about it
MAX_OPTIONS: Final = 256  # per handshake; real clients send fewer than ten
LIST_WEIGHT: Final = 32  # a list of thousands of exports costs so much more than another option: eight are enough
MAX_PIPELINED: Final = 256 << 10  # bytes that a client may send ahead while an option waits for its answer
MAX_NAME_LENGTH: Final = 4096  # bytes of UTF-8 in an export name ("Conventions")
MAX_STRING_LENGTH: Final = 4096  # bytes of UTF-8 in any other string ("Conventions")
MAX_LISTED_LENGTH: Final = 1023  # bytes of a description in a list: nbd-client reads it into 1024 bytes
MAX_ERROR_MESSAGE: Final = 1000  # bytes of text in an error: qemu drops the connection above
MAX_REPLY_LENGTH: Final = 64 << 10  # bytes of an option reply that a client takes
MAX_LIST_LENGTH: Final = 16 << 20  # bytes of a list of exports that a client takes: 100,000 long names
MAX_MINIMUM_BLOCK: Final = 64 << 10  # "Size constraints": the largest minimum that a server may ask for
MAX_ERROR_CHUNK: Final = MAX_STRING_LENGTH + 64  # bytes of an error chunk: its text and its numbers
MAX_QUERIES: Final = 256  # of a client for metadata contexts: as many as a deep chain has to be asked about
MAX_CONTEXTS: Final = (
    8  # selected at once: of each, every answer tells thousands of extents, and two or three are enough
)
MAX_DESCRIPTORS: Final = 1 << 20  # in one chunk of block status ("SHOULD NOT send more than 2^20")
MAX_FRAGMENTS: Final = 16384  # separate ranges of one read that a client keeps track of

MINIMUM_BLOCK: Final = 1  # any range of bytes may be read and written
PREFERRED_BLOCK: Final = 4096  # the unit in which clones keep their changes


class HandshakeFlag(IntFlag):
    """ "Handshake flags"; the client's flags (NBD_FLAG_C_*) have the same numbers."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class TransmissionFlag(IntFlag):
    """ "Transmission flags" (NBD_FLAG_*): what the server offers for an export."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12


class Option(IntEnum):
    """ "Option types" (NBD_OPT_*)."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class OptionReply(IntEnum):
    """ "Option reply types" (NBD_REP_*). Bit 31 marks an error."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = (1 << 31) + 1
    ERR_POLICY = (1 << 31) + 2
    ERR_INVALID = (1 << 31) + 3
    ERR_PLATFORM = (1 << 31) + 4
    ERR_TLS_REQD = (1 << 31) + 5
    ERR_UNKNOWN = (1 << 31) + 6
    ERR_SHUTDOWN = (1 << 31) + 7
    ERR_BLOCK_SIZE_REQD = (1 << 31) + 8
    ERR_TOO_BIG = (1 << 31) + 9
    ERR_EXT_HEADER_REQD = (1 << 31) + 10


OPTION_REPLY_ERROR: Final = 1 << 31  # the bit that marks an error, of a known type or not


class Info(IntEnum):
    """NBD_INFO_*: what NBD_OPT_GO and NBD_OPT_INFO tell about an export."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class Command(IntEnum):
    """ "Request types" (NBD_CMD_*)."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(IntFlag):
    """ "Command flags" (NBD_CMD_FLAG_*)."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


class ReplyFlag(IntFlag):
    """ "Structured reply flags" (NBD_REPLY_FLAG_*)."""

    DONE = 1 << 0


class ReplyType(IntEnum):
    """ "Structured reply types" (NBD_REPLY_TYPE_*). Bit 15 marks an error."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = (1 << 15) + 1
    ERROR_OFFSET = (1 << 15) + 2


class State(IntFlag):
    """The status of an extent in ``base:allocation`` (NBD_STATE_*)."""

    HOLE = 1 << 0
    ZERO = 1 << 1


class Errno(IntEnum):
    """ "Error values" (NBD_E*). They are the protocol's own, whatever ``errno`` says on this system."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


# The same numbers as plain int, for the hot path

CMD_READ: Final = int(Command.READ)
CMD_WRITE: Final = int(Command.WRITE)
CMD_DISC: Final = int(Command.DISC)
CMD_FLUSH: Final = int(Command.FLUSH)
CMD_TRIM: Final = int(Command.TRIM)
CMD_CACHE: Final = int(Command.CACHE)
CMD_WRITE_ZEROES: Final = int(Command.WRITE_ZEROES)
CMD_BLOCK_STATUS: Final = int(Command.BLOCK_STATUS)

CMD_FLAG_FUA: Final = int(CommandFlag.FUA)
CMD_FLAG_NO_HOLE: Final = int(CommandFlag.NO_HOLE)
CMD_FLAG_DF: Final = int(CommandFlag.DF)
CMD_FLAG_REQ_ONE: Final = int(CommandFlag.REQ_ONE)
CMD_FLAG_FAST_ZERO: Final = int(CommandFlag.FAST_ZERO)
CMD_FLAG_PAYLOAD_LEN: Final = int(CommandFlag.PAYLOAD_LEN)

REPLY_FLAG_DONE: Final = int(ReplyFlag.DONE)
REPLY_TYPE_NONE: Final = int(ReplyType.NONE)
REPLY_TYPE_OFFSET_DATA: Final = int(ReplyType.OFFSET_DATA)
REPLY_TYPE_OFFSET_HOLE: Final = int(ReplyType.OFFSET_HOLE)
REPLY_TYPE_BLOCK_STATUS: Final = int(ReplyType.BLOCK_STATUS)
REPLY_TYPE_BLOCK_STATUS_EXT: Final = int(ReplyType.BLOCK_STATUS_EXT)
REPLY_TYPE_ERROR: Final = int(ReplyType.ERROR)
REPLY_TYPE_ERROR_OFFSET: Final = int(ReplyType.ERROR_OFFSET)
REPLY_TYPE_IS_ERROR: Final = 1 << 15  # the bit that marks an error chunk, of a known type or not

EPERM: Final = int(Errno.EPERM)
EIO: Final = int(Errno.EIO)
ENOMEM: Final = int(Errno.ENOMEM)
EINVAL: Final = int(Errno.EINVAL)
ENOSPC: Final = int(Errno.ENOSPC)
EOVERFLOW: Final = int(Errno.EOVERFLOW)
ENOTSUP: Final = int(Errno.ENOTSUP)
ESHUTDOWN: Final = int(Errno.ESHUTDOWN)

FLAG_READ_ONLY: Final = int(TransmissionFlag.READ_ONLY)
FLAG_SEND_FLUSH: Final = int(TransmissionFlag.SEND_FLUSH)
FLAG_SEND_FUA: Final = int(TransmissionFlag.SEND_FUA)
FLAG_SEND_TRIM: Final = int(TransmissionFlag.SEND_TRIM)
FLAG_SEND_WRITE_ZEROES: Final = int(TransmissionFlag.SEND_WRITE_ZEROES)
FLAG_SEND_DF: Final = int(TransmissionFlag.SEND_DF)
FLAG_SEND_CACHE: Final = int(TransmissionFlag.SEND_CACHE)
FLAG_SEND_FAST_ZERO: Final = int(TransmissionFlag.SEND_FAST_ZERO)
FLAG_BLOCK_STATUS_PAYLOAD: Final = int(TransmissionFlag.BLOCK_STATUS_PAYLOAD)

NBD_REP_ERR_POLICY: Final = int(OptionReply.ERR_POLICY)
NBD_REP_ERR_UNKNOWN: Final = int(OptionReply.ERR_UNKNOWN)


class Mode(IntEnum):
    """What the handshake agreed on for the messages of the transmission; each has all that the one before it has."""

    SIMPLE = 0  # compact requests, simple replies
    STRUCTURED = 1  # compact requests, structured replies
    EXTENDED = 2  # extended headers: requests and replies


class ChunkLayout(NamedTuple):
    """The layouts of reply chunks in one mode; all begin with magic, flags, type, cookie, length.

    A ``Cookie`` is an int in one of them, and EXTENDED_COOKIE packed in the other.
    """

    magic: int
    header: Struct
    read: Struct  # header and OFFSET_DATA
    hole: Struct  # header and OFFSET_HOLE
    status_type: int
    status: Struct  # what precedes the descriptors
    descriptor: Struct


Cookie = int | bytes

STRUCTURED: Final = ChunkLayout(
    STRUCTURED_REPLY_MAGIC,
    STRUCTURED_REPLY,
    READ_CHUNK,
    HOLE_CHUNK,
    REPLY_TYPE_BLOCK_STATUS,
    BLOCK_STATUS,
    DESCRIPTOR,
)
EXTENDED: Final = ChunkLayout(
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REPLY,
    EXTENDED_READ_CHUNK,
    EXTENDED_HOLE_CHUNK,
    REPLY_TYPE_BLOCK_STATUS_EXT,
    BLOCK_STATUS_EXT,
    DESCRIPTOR_EXT,
)


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """What a client is told about an export before it uses it.

    ``size`` is in bytes, ``flags`` are transmission flags, the last three are NBD_INFO_BLOCK_SIZE.
    """

    name: str
    size: int
    flags: int
    description: str = ""
    minimum_block: int = MINIMUM_BLOCK
    preferred_block: int = PREFERRED_BLOCK
    maximum_payload: int = ADVERTISED_MAX_PAYLOAD

    @property
    def read_only(self) -> bool:
        return bool(self.flags & FLAG_READ_ONLY)


def transmission_flags(read_only: bool) -> int:
    """The transmission flags of an export of this server.

    SEND_DF and BLOCK_STATUS_PAYLOAD are missing: the handshake adds what follows from it. A read-only export
    offers FLUSH although there is nothing to flush, because clients that find no FLUSH treat the disk as
    write-through; it does not offer FUA, which is about writes.
    """
    flag = TransmissionFlag
    always = flag.HAS_FLAGS | flag.SEND_FLUSH | flag.CAN_MULTI_CONN | flag.SEND_CACHE
    if read_only:
        return int(always | flag.READ_ONLY)
    writing = flag.SEND_FUA | flag.SEND_TRIM | flag.SEND_WRITE_ZEROES | flag.SEND_FAST_ZERO
    return int(always | writing)


def encode_string(text: str, limit: int) -> bytes:
    """``text`` as the specification's string: UTF-8 without NUL, at most ``limit`` bytes.

    Raises:
        LocalProtocolError: it cannot be written that way.
    """
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        raise LocalProtocolError(f"{text!r} cannot be written as UTF-8") from None
    if b"\0" in encoded or len(encoded) > limit:
        raise LocalProtocolError(f"a string of {len(encoded)} bytes holds a NUL or is over {limit} bytes")
    return encoded


def encode_text(text: str, limit: int) -> bytes:
    """``text`` for a person, as UTF-8: cut at a character's boundary to ``limit`` bytes, never refused."""
    encoded = text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace")
    if len(encoded) <= limit:
        return encoded
    return encoded[:limit].decode("utf-8", "ignore").encode()
