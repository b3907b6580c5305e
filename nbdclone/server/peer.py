"""Who is at the other end of a connection, as far as that can be known."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
import time
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

# struct ucred of SO_PEERCRED (man 7 unix): pid, uid, gid.
_CREDENTIALS = struct.Struct("iII")

# A subject as it is compared: for each relative distinguished name its attributes, sorted: (TYPE, "=" or "#", value).
Attribute = tuple[str, str, str]
Subject = tuple[tuple[Attribute, ...], ...]

# RFC 4514, section 3. Spaces around the separators, which it does not have, mean nothing: a value that begins or ends
# with one has it escaped.
_PAIR = r'\\(?:[0-9A-Fa-f]{2}|[ "#+,;<=>\\])'
_PLAIN = r'[^\\"+,;<>\0]'
_ATTRIBUTE = re.compile(
    r" *(?P<type>[A-Za-z][A-Za-z0-9-]*|\d+(?:\.\d+)+) *= *"
    r"(?:#(?P<hex>(?:[0-9A-Fa-f]{2})+)"
    rf"|(?!#)(?P<value>(?:(?:{_PAIR}|{_PLAIN})*(?:{_PAIR}|(?! ){_PLAIN}))?))"
    r" *(?P<end>[,+]|\Z)"
)
_TOKEN = re.compile(rf"{_PAIR}|{_PLAIN}", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Peer:
    """A client. ``label`` is for the log; ``uid`` is the kernel's word on who opened a Unix socket.

    ``address`` is None on a Unix socket; an IPv4 address that was mapped into IPv6 is IPv4. ``subject`` is that of a
    client certificate that was verified, in the form of RFC 4514: ``CN=web1,O=Lab``. ``tls`` is its version, once
    there is any; ``since`` is when it came, in Unix seconds.
    """

    label: str
    address: IPv4Address | IPv6Address | None = None
    uid: int | None = None
    subject: str | None = None
    tls: str | None = None
    since: float = field(default=0.0, compare=False)

    @classmethod
    def of(cls, sock: socket.socket, address: object) -> Peer:
        """Who has just been accepted; ``address`` as accept() gave it."""
        if sock.family != socket.AF_UNIX:
            assert isinstance(address, tuple)
            host, port = address[:2]
            ip = ip_address(host.partition("%")[0])
            if isinstance(ip, IPv6Address):
                ip = ip.ipv4_mapped or ip
            return cls(f"[{host}]:{port}" if ":" in host else f"{host}:{port}", ip, since=time.time())
        with contextlib.suppress(OSError):
            pid, uid, _gid = _CREDENTIALS.unpack(
                sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            )
            return cls(f"unix uid {uid} pid {pid}", uid=uid, since=time.time())
        return cls("unix", since=time.time())

    def record(self) -> dict[str, Any]:
        """The same for another process, as JSON can hold it: ``from_record``."""
        return asdict(self) | {"address": self.address and str(self.address)}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Peer:
        return cls(**record | {"address": ip_address(record["address"]) if record["address"] else None})

    def __str__(self) -> str:
        return self.label

    @property
    def trusted(self) -> bool:
        """May it know what the server's log says? It is root or the server's own user, on this machine."""
        return self.uid is not None and self.uid in (0, os.geteuid())


@lru_cache(maxsize=1024)
def parse_subject(text: str) -> Subject:
    """A subject, in the form of RFC 4514, taken apart. Raises ValueError.

    Two are equal if they have the same attributes in the same order; types are compared without regard to case, values
    exactly. The order within a name of several attributes (``CN=a+OU=b``) means nothing.
    """
    names: list[tuple[Attribute, ...]] = []
    attributes: list[Attribute] = []
    position, end = 0, ","
    while end:
        match = _ATTRIBUTE.match(text, position)
        if match is None:
            raise ValueError(f"{text!r} is no subject in the form of RFC 4514, such as 'CN=web1,O=Lab'")
        form, value = ("=", _unescape(match["value"])) if match["hex"] is None else ("#", match["hex"].lower())
        attributes.append((match["type"].upper(), form, value))
        position, end = match.end(), match["end"]
        if end != "+":
            names.append(tuple(sorted(attributes)))
            attributes = []
    return tuple(names)


def _unescape(value: str) -> str:
    """What an escaped value says; pairs of hexadecimal digits are bytes of UTF-8. Raises ValueError."""
    said = bytearray()
    for token in _TOKEN.findall(value):
        if len(token) == 3:
            said += bytes.fromhex(token[1:])
        else:
            said += token[-1].encode()
    return said.decode()
