"""The worst shapes that are within the limits take time in proportion to their size, and memory within the limits."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from time import process_time

import pytest
import wirebytes as w

from nbdclone.errors import RemoteProtocolError
from nbdclone.protocol import wire
from nbdclone.protocol.client_handshake import ClientHandshake, ExportList
from nbdclone.protocol.handshake import ServerHandshake
from nbdclone.protocol.handshake_events import ListExports
from nbdclone.protocol.pending import Completed
from nbdclone.protocol.requests import Request, request_layout
from nbdclone.protocol.transmission import ClientTransmission
from nbdclone.protocol.wire import Mode

# Eight times as much takes eight times as long, or 64 times where the time grows with the square; in between there is
# room for what the machine does besides.
GROWTH = 8
MAX_RATIO = 24


def option_byte_by_byte(size: int) -> None:
    """Of ``size`` KiB."""
    server = ServerHandshake()
    for byte in w.client_flags() + w.option(99, bytes(size << 10)):
        server.receive_data(bytes([byte]))
        assert server.next_event() is None
    assert len(server.data_to_send()) == 2  # the greeting, a refusal


def options_at_once(count: int) -> None:
    server = ServerHandshake()
    server.receive_data(w.client_flags() + w.option(99, bytes(900)) * count)
    assert server.next_event() is None
    assert sum(map(len, iter(server.data_to_send, []))) == 1 + count


LISTS = 7  # eight are too many options


def lists_that_nobody_takes(count: int) -> None:
    server = ServerHandshake()
    server.receive_data(w.client_flags() + (w.option(w.LIST) + w.option(99)) * LISTS)
    while server.next_event() == ListExports():
        server.send_list([("web1", "")] * count)
    assert sum(map(len, iter(server.data_to_send, []))) == 1 + LISTS * (count + 1 + 1)


def queries(count: int) -> None:
    server = ServerHandshake()
    request = w.option(w.LIST_CONTEXTS, w.context_request(b"web1", *[b"base:%d" % number for number in range(count)]))
    server.receive_data(w.client_flags() + w.option(w.STRUCTURED_REPLY) + request * 20)
    assert server.next_event() is None


def requests_at_once(count: int) -> None:
    """Of ``count`` thousand requests."""
    stream = w.request(w.WRITE, 0, 4, payload=b"data") * (count * 1000)
    layout = request_layout(Mode.STRUCTURED)
    position = 0
    while position < len(stream):
        taken: list[Request] = []
        position = layout.parse(stream, position, len(stream), taken)
        assert taken


def list_at_once(count: int) -> None:
    """Of ``count`` thousand exports."""
    client = ClientHandshake(Mode.SIMPLE)
    client.receive_data(w.greeting())
    client.next_event()
    client.list_exports()
    client.receive_data(
        w.option_reply(w.LIST, w.SERVER, w.listed(b"web1")) * (count * 1000) + w.option_reply(w.LIST, w.ACK)
    )
    event = client.next_event()
    assert isinstance(event, ExportList)
    assert len(event.exports) == count * 1000


def option_reply_byte_by_byte(size: int) -> None:
    client = ClientHandshake(Mode.SIMPLE)
    client.receive_data(w.greeting())
    client.next_event()
    client.info("web1")
    for byte in w.option_reply(w.INFO, w.UNSUP, bytes(size << 10)):
        client.receive_data(bytes([byte]))
        event = client.next_event()
    assert event is not None


def read_in_fragments(count: int) -> None:
    """Of ``count`` thousand fragments, from the last to the first, every second one at first."""
    client = ClientTransmission(Mode.STRUCTURED)
    size = count * 1000
    client.send_request(w.READ, 0, 0, size)
    completed: list[Completed] = []
    for start in (size - 1, size - 2):
        for offset in range(start, -1, -2):
            client.receive_data(w.data_chunk(1, offset, b"x", flags=offset == 0), completed)
    assert completed[0].data == b"x" * size


def read_byte_by_byte(size: int) -> None:
    """Of ``size`` times 128 KiB: a million feeds in the end."""
    client = ClientTransmission(Mode.SIMPLE)
    client.send_request(w.READ, 0, 0, size << 17)
    completed: list[Completed] = []
    client.receive_data(w.simple(1), completed)
    for _ in range(size << 17):
        client.receive_data(b"x", completed)
    assert completed[0].data == b"x" * (size << 17)


def block_status_byte_by_byte(size: int) -> None:
    """Of ``size`` times 1024 extents."""
    client = ClientTransmission(Mode.EXTENDED, [1])
    client.send_request(w.BLOCK_STATUS, 0, 0, 1 << 40)
    completed: list[Completed] = []
    for byte in w.extended_status_chunk(1, 0, 1, *[(1, 0)] * (size << 10)):
        client.receive_data(bytes([byte]), completed)
    assert completed[0].extents is not None


def error_chunks(count: int) -> None:
    """Of ``count`` thousand chunks that do not end the reply."""
    client = ClientTransmission(Mode.STRUCTURED)
    client.send_request(w.READ, 0, 0, 4096)
    client.receive_data(w.error_chunk(1, 5, b"x" * 100, flags=0) * (count * 1000), [])


SHAPES: list[tuple[Callable[[int], None], int]] = [
    (option_byte_by_byte, 8),
    (options_at_once, 31),
    (lists_that_nobody_takes, 60),
    (queries, 31),
    (requests_at_once, 2),
    (list_at_once, 1),
    (option_reply_byte_by_byte, 7),
    (read_in_fragments, 2),
    (read_byte_by_byte, 1),
    (block_status_byte_by_byte, 4),
    (error_chunks, 1),
]


def seconds(shape: Callable[[int], None], size: int, runs: int) -> float:
    """Of this process's own time: the least of several runs."""
    times = []
    for _ in range(runs):
        gc.collect()
        began = process_time()
        shape(size)
        times.append(process_time() - began)
    return min(times)


@pytest.mark.parametrize(("shape", "size"), SHAPES, ids=lambda value: getattr(value, "__name__", value))
def test_eight_times_as_much_takes_eight_times_as_long(shape: Callable[[int], None], size: int) -> None:
    small = seconds(shape, size, 3)
    large = seconds(shape, size * GROWTH, 1)
    if large > MAX_RATIO * small:  # once more: something else may have had the machine
        small, large = seconds(shape, size, 5), seconds(shape, size * GROWTH, 3)
    assert large < MAX_RATIO * small


def test_a_copy_of_all_that_is_there_for_each_message_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = ClientTransmission._head_size

    def copying(self: ClientTransmission, buffer: memoryview, position: int, end: int) -> int:
        return original(self, bytes(buffer), position, end)

    monkeypatch.setattr(ClientTransmission, "_head_size", copying)
    assert seconds(error_chunks, GROWTH, 1) > MAX_RATIO * seconds(error_chunks, 1, 3)


# Memory, measured from outside


def peak(feed: Callable[[], None], fault: str) -> int:
    """Bytes that were held at once while the peer was fed, until it found this fault."""
    gc.collect()
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError, match=fault):
            feed()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_client_that_never_waits_is_held_at_the_limit_of_what_may_be_sent_ahead() -> None:
    server = ServerHandshake()
    server.receive_data(w.client_flags() + w.option(w.LIST))
    assert server.next_event() == ListExports()

    def feed() -> None:
        while True:
            server.receive_data(bytes(4096))

    assert peak(feed, "ahead") < 2 * wire.MAX_PIPELINED


def test_a_server_that_lists_on_and_on_is_held_at_the_limit_of_a_list() -> None:
    client = ClientHandshake(Mode.SIMPLE)
    client.receive_data(w.greeting())
    client.next_event()
    client.list_exports()
    piece = w.option_reply(w.LIST, w.SERVER, w.listed(b"x" * 4000)) * 16

    def feed() -> None:
        while True:
            client.receive_data(piece)
            client.next_event()

    assert peak(feed, "list") < 2 * wire.MAX_LIST_LENGTH


@pytest.mark.parametrize("mode", [Mode.STRUCTURED, Mode.EXTENDED])
def test_replies_that_never_end_take_no_more_memory_than_the_read_they_answer(mode: Mode) -> None:
    client = ClientTransmission(mode)
    client.send_request(w.READ, 0, 0, 1 << 20)
    error = w.error_chunk(1, 5, b"x" * 4000, flags=0)
    data = w.data_chunk(1, 0, b"x" * 4096, flags=0)
    if mode is Mode.EXTENDED:
        error, data = w.extended(error, 0), w.extended(data, 0)

    def feed() -> None:
        client.receive_data(data, [])
        for _ in range(2000):
            client.receive_data(error[:20], [])
            client.receive_data(error[20:], [])
        client.receive_data(b"x" * 40, [])

    assert peak(feed, "magic") < (1 << 20) + (64 << 10)


def test_a_read_in_more_pieces_than_are_kept_track_of_ends_the_connection() -> None:
    client = ClientTransmission(Mode.STRUCTURED)
    size = 4 * wire.MAX_FRAGMENTS
    client.send_request(w.READ, 0, 0, size)

    def feed() -> None:
        for offset in range(0, size, 2):
            client.receive_data(w.hole_chunk(1, offset, 1, flags=0), [])

    assert peak(feed, "pieces") < 200 * wire.MAX_FRAGMENTS
