"""libnbd from Python: the errors that the protocol wants, and many requests in flight."""

from __future__ import annotations

import json

import pytest

from integration.clients.programs import WAYS, nbdsh, uri
from integration.served import Served

pytestmark = pytest.mark.timeout(120)

# Each error has to leave the connection as it was: what follows it is read on the same one.
ERRORS = """
h.set_strict_mode(0)  # have the server judge, not the library
h.set_request_structured_replies({structured})
h.add_meta_context("base:allocation")
h.connect_uri(uri)
assert h.get_structured_replies_negotiated() == {structured}
size = h.get_size()
before = bytes(h.pread(512, 0))

def refused(number, call, *args):
    try:
        call(*args)
    except nbd.Error as error:
        assert error.errno == number, (error.errno, number, args)
    else:
        raise AssertionError((number, args))
    assert bytes(h.pread(512, 0)) == before

def ignore(*args):
    return 0

def status(*args):
    return h.block_status(*args[:2], ignore, *args[2:])
"""
BOTH = pytest.mark.parametrize("structured", [True, False])


def in_session(server: Served, export: str, script: str, *, structured: bool = True, way: str = "unix") -> str:
    return nbdsh(uri(server, export, way), ERRORS.format(structured=structured) + script + "\nh.shutdown()")


@BOTH
@pytest.mark.parametrize("way", WAYS)
def test_libnbd_hears_what_is_past_the_end(server: Served, clone: str, structured: bool, way: str) -> None:
    script = """
for count, offset in ((512, size), (1024, size - 512), (1, size), (512, 2**63 - 1), (4096, 2**63 - 4096)):
    refused("EINVAL", h.pread, count, offset)
    refused("EINVAL", h.trim, count, offset)
    refused("EINVAL", h.cache, count, offset)
    refused("ENOSPC", h.zero, count, offset)
    refused("ENOSPC", h.pwrite, bytes(count), offset)
    if h.get_structured_replies_negotiated():
        refused("EINVAL", status, count, offset)
refused("ENOSPC", h.pwrite, bytes(1_000_000), size - 512)
refused("EINVAL", h.pread, 1_000_000, size - 512)
refused("EINVAL", h.trim, 2**32 - 1, 1)
refused("ENOSPC", h.zero, 2**32 - 1, 1)
h.pwrite(b"x" * 512, size - 512, nbd.CMD_FLAG_FUA)
assert h.pread(512, size - 512) == b"x" * 512
"""
    in_session(server, clone, script, structured=structured, way=way)


@BOTH
def test_libnbd_hears_that_a_request_for_nothing_is_no_request(server: Served, clone: str, structured: bool) -> None:
    script = """
for call in (h.trim, h.zero, h.cache):
    refused("EINVAL", call, 0, 0)
refused("EINVAL", h.pread, 0, 0)
refused("EINVAL", h.pwrite, b"", 0)
if h.get_structured_replies_negotiated():
    refused("EINVAL", status, 0, 0)
"""
    in_session(server, clone, script, structured=structured)


@BOTH
def test_libnbd_hears_that_a_flag_is_not_for_this_command(server: Served, clone: str, structured: bool) -> None:
    script = """
unknown = 1 << 10
for flag in (nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FAST_ZERO, nbd.CMD_FLAG_REQ_ONE, unknown):
    refused("EINVAL", h.pread, 512, 0, flag)
    refused("EINVAL", h.pwrite, bytes(512), 0, flag)
    refused("EINVAL", h.trim, 512, 0, flag)
    refused("EINVAL", h.cache, 512, 0, flag)
    refused("EINVAL", h.flush, flag)
for flag in (nbd.CMD_FLAG_DF, nbd.CMD_FLAG_REQ_ONE, unknown):
    refused("EINVAL", h.zero, 512, 0, flag)
if h.get_structured_replies_negotiated():
    for flag in (nbd.CMD_FLAG_DF, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FAST_ZERO, unknown):
        refused("EINVAL", status, 512, 0, flag)
else:
    refused("EINVAL", h.pread, 512, 0, nbd.CMD_FLAG_DF)
"""
    in_session(server, clone, script, structured=structured)


@BOTH
def test_libnbd_hears_that_zeros_with_space_are_not_fast(server: Served, clone: str, structured: bool) -> None:
    script = """
h.pwrite(b"x" * 4096, 4096)
refused("ENOTSUP", h.zero, 4096, 4096, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE)
assert h.pread(4096, 4096) == b"x" * 4096  # it was refused before anything was done
h.zero(4096, 4096, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_FUA)
h.zero(4096, 8192, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
assert h.pread(8192, 4096) == bytes(8192)
"""
    in_session(server, clone, script, structured=structured)


@BOTH
def test_libnbd_is_refused_every_change_of_the_base(server: Served, structured: bool) -> None:
    script = """
assert h.is_read_only()
refused("EPERM", h.pwrite, bytes(512), 0)
refused("EPERM", h.pwrite, bytes(512), size)
refused("EPERM", h.pwrite, bytes(1_000_000), 512, nbd.CMD_FLAG_FUA)
refused("EPERM", h.trim, 512, 0)
refused("EPERM", h.zero, 512, 0)
h.flush()
h.cache(512, 0)
"""
    in_session(server, "base", script, structured=structured)


@BOTH
def test_libnbd_may_use_any_offset_and_any_length(server: Served, clone: str, structured: bool) -> None:
    script = """
h.pwrite(b"y" * 16384, 0)
expected = bytearray(b"y" * 16384)
for number, (offset, count) in enumerate([(1, 1), (511, 2), (4095, 2), (4097, 4095), (8191, 4098), (3, 12000)]):
    data = bytes([number + 1]) * count
    h.pwrite(data, offset)
    expected[offset : offset + count] = data
    assert h.pread(count, offset) == data
h.zero(5001, 4095)
expected[4095:9096] = bytes(5001)
h.trim(1000, 12001)
expected[12001:13001] = bytes(1000)
assert h.pread(16384, 0) == expected
h.cache(12345, 77)
assert h.pread(1, size - 1) == h.pread(3, size - 3)[2:]
"""
    in_session(server, clone, script, structured=structured)


@BOTH
@pytest.mark.parametrize("way", WAYS)
def test_libnbd_may_read_and_write_32_mib_at_once_and_up_to_64(
    server: Served, large: str, structured: bool, way: str
) -> None:
    """More than 64 MiB libnbd does not send; that much the server takes, though it does not promise to."""
    script = """
import os
for count in (32 << 20, 49_865_728, 64 << 20):  # what is promised, the reference suite's largest, the limit
    data = os.urandom(count // 64) * 64
    h.pwrite(data, 4097)
    assert h.pread(count, 4097) == data
"""
    in_session(server, large, script, structured=structured, way=way)


@BOTH
def test_libnbd_may_zero_trim_and_cache_up_to_4_gib_at_once(server: Served, large: str, structured: bool) -> None:
    script = """
most = 2**32 - 1
h.pwrite(b"x" * 8192, most - 4096)
h.zero(most, 0)
assert h.pread(4097, most - 4096) == bytes(4096) + b"x"
h.pwrite(b"x" * 8192, most)
h.trim(most - 1, 1 << 20)
assert h.pread(8192, most) == bytes(8192)
h.cache(most, 5)
before = bytes(512)
refused("EINVAL", h.cache, most, size - most + 1)
"""
    in_session(server, large, script, structured=structured)


def test_libnbd_is_told_of_more_than_4_gib_of_holes_in_as_many_requests_as_it_takes(server: Served, large: str) -> None:
    script = """
h.pwrite(b"x" * 4096, 5 << 30)
extents, offset = [], 1 << 30
while offset < size:
    def note(name, start, entries, error):
        extents.extend(zip(entries[::2], entries[1::2]))
        return 0
    seen = len(extents)
    h.block_status(min(2**32 - 1, size - offset), offset, note)
    assert len(extents) > seen
    offset += sum(length for length, kind in extents[seen:])
import json
print(json.dumps(extents))
"""
    extents = json.loads(in_session(server, large, script))
    assert sum(length for length, _kind in extents) == 9 << 30
    assert [length for length, kind in extents if kind == 0] == [4096]
    assert {kind for _length, kind in extents} == {0, 3}


def test_libnbd_gets_a_read_in_one_piece_when_it_may_not_be_divided(server: Served, clone: str) -> None:
    script = """
h.pwrite(b"x" * 65536, 65536)
h.trim(65536, 131072)
pieces = []
def note(data, offset, status, error):
    pieces.append((len(data), offset, status))
    return 0
h.pread_structured(262144, 0, note, nbd.CMD_FLAG_DF)
assert pieces == [(262144, 0, nbd.READ_DATA)], pieces
del pieces[:]
expected = h.pread(8 << 20, 0)
got = h.pread_structured(8 << 20, 0, note)
assert got == expected
assert sum(length for length, offset, status in pieces) == 8 << 20
refused("EINVAL", h.pread_structured, 1024, size - 512, note)
refused("EINVAL", h.pread_structured, 1024, size - 512, note, nbd.CMD_FLAG_DF)
"""
    in_session(server, clone, script)


def test_libnbd_many_requests_in_flight_on_many_handles(server: Served, clone: str) -> None:
    nbdsh(
        uri(server, clone),
        """
import random
rng = random.Random(1)
handles = [nbd.NBD() for _ in range(4)]
for h in handles:
    h.connect_uri(uri)
assert h.can_multi_conn()
expected = {}
cookies = []
for number in range(400):
    at = number * 64 * 1024 + rng.randrange(4096)
    data = rng.randbytes(rng.choice([1, 512, 4096, 40_000]))
    expected[at] = data
    h = handles[number % 4]
    cookies.append((h, h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), at)))
for h in handles:
    while h.aio_in_flight():
        h.poll(-1)
for h, cookie in cookies:
    assert h.aio_command_completed(cookie)
handles[0].flush()
for number, (at, data) in enumerate(expected.items()):
    assert handles[(number + 1) % 4].pread(len(data), at) == data
for h in handles:
    h.shutdown()
""",
    )
