"""The stream of send and receive: what is written is read, and nothing else is."""

from __future__ import annotations

import io
import json
import random
import tracemalloc
from collections.abc import Callable
from dataclasses import replace

import pytest
import zstandard
from blake3 import blake3
from streams import BASE, CONTENT, SAMPLE, SIZE, forged, frames_of, head_with, kept, layer, read_back, written

from nbdclone.errors import InvalidStream, UnsupportedFormat
from nbdclone.store.layer import BLOCK_SIZE, MAX_SIZE
from nbdclone.store.stream import (
    DONE,
    FRAME,
    FRAME_DATA,
    FRAME_RUNS,
    HEAD,
    MAGIC,
    MAX_PAYLOAD,
    MAX_RUN,
    PART,
    PART_PAYLOAD,
    PREAMBLE,
    RUN,
    RUN_COUNT,
    RUNS,
    VERSION,
    StreamReader,
    StreamWriter,
    Totals,
)
from nbdclone.store.stream_head import MAX_SENT_LAYERS, NO_PARENT, Head

REFUSED = (InvalidStream, UnsupportedFormat)
STREAM = written()


def with_frame(number: int, change: Callable[[bytes], bytes]) -> bytes:
    """The stream with the payload of one frame changed, and all hashes right."""
    frames = list(frames_of(STREAM))
    frames[number] = (frames[number][0], change(frames[number][1]))
    return forged(STREAM, frames)


def with_head(**changes: object) -> bytes:
    return with_frame(0, lambda payload: json.dumps(json.loads(payload) | changes).encode())


def test_what_was_written_is_read() -> None:
    assert read_back(STREAM) == (SAMPLE, CONTENT)


def test_forging_changes_nothing_by_itself() -> None:
    """Or the tests that forge would refuse for another reason."""
    assert read_back(forged(STREAM, list(frames_of(STREAM)))) == (SAMPLE, CONTENT)


def test_both_sides_count_alike() -> None:
    sink = io.BytesIO()
    writer = StreamWriter(sink, head_with(layers=(layer(1),)))
    writer.begin(0)
    writer.data(0, b"x" * BLOCK_SIZE)
    writer.zeros(BLOCK_SIZE, 3 * BLOCK_SIZE)
    assert writer.finish() == Totals(2, BLOCK_SIZE, 3 * BLOCK_SIZE)
    reader = StreamReader(io.BytesIO(sink.getvalue()))
    list(reader.runs())
    assert (reader.totals, reader.read) == (writer.totals, writer.written)


def test_a_long_range_is_sent_in_frames_of_bounded_size() -> None:
    data = random.Random(1).randbytes(3 * FRAME_DATA + 5 * BLOCK_SIZE)
    head = head_with(layers=(layer(1, 1 << 40),))
    stream = written(head, [(0, 0, data), (0, 1 << 30, 3 * MAX_RUN)])
    assert max(len(payload) for _, payload in frames_of(stream)) < FRAME_DATA + 100
    _, runs = read_back(stream)
    assert b"".join(what for _, _, what in runs if isinstance(what, bytes)) == data
    assert [(at, what) for _, at, what in runs if isinstance(what, int)] == [
        ((1 << 30) + number * MAX_RUN, MAX_RUN) for number in range(3)
    ]


def test_many_short_runs_are_sent_in_frames_of_bounded_size() -> None:
    head = head_with(layers=(layer(1, 1 << 40),))
    content: list[tuple[int, int, bytes | int]] = [
        (0, number * 2 * BLOCK_SIZE, BLOCK_SIZE) for number in range(2 * FRAME_RUNS + 3)
    ]
    stream = written(head, content)
    assert sum(kind == RUNS for kind, _ in frames_of(stream)) == 3
    assert read_back(stream)[1] == content


def test_neighbours_are_one_run_and_packed_together() -> None:
    head = head_with(layers=(layer(1, 1 << 30),))
    content: list[tuple[int, int, bytes | int]] = [(0, n * BLOCK_SIZE, b"a" * BLOCK_SIZE) for n in range(200)]
    stream = written(head, content)
    assert read_back(stream)[1] == [(0, 0, b"a" * 200 * BLOCK_SIZE)]
    assert len(stream) < 2000


def test_the_last_block_of_a_disk_may_be_short() -> None:
    head = head_with(layers=(layer(1, BLOCK_SIZE + 512),))
    content: list[tuple[int, int, bytes | int]] = [(0, BLOCK_SIZE, b"e" * 512)]
    assert read_back(written(head, content))[1] == content


def test_a_stream_that_goes_on_begins_where_it_says() -> None:
    head = head_with(section=1, offset=BLOCK_SIZE)
    assert read_back(written(head))[1] == CONTENT[3:]
    with pytest.raises(InvalidStream, match="out of turn"):
        read_back(forged(STREAM, [(HEAD, head.encode()), *list(frames_of(STREAM))[1:]]))


def test_streams_of_the_same_layers_have_the_same_id_wherever_they_begin() -> None:
    alike = replace(SAMPLE, clone="other", created=1, section=1, offset=4096, expected=5)
    assert alike.stream_id == SAMPLE.stream_id
    others = [
        head_with(layers=(layer(1), layer(3))),
        head_with(layers=(layer(1),)),
        head_with(with_base=True),
        head_with(parent=b"p" * 16),
        head_with(base=replace(BASE, fingerprint=b"g" * 32)),
    ]
    assert len({SAMPLE.stream_id, *(other.stream_id for other in others)}) == 6


def test_what_the_head_says_of_itself() -> None:
    assert not SAMPLE.incremental
    assert head_with(parent=b"p" * 16).incremental
    assert not head_with(base=None, parent=NO_PARENT).incremental
    assert SAMPLE.sections == (SIZE, SIZE)
    assert head_with(with_base=True).sections == (SIZE, SIZE, SIZE)
    assert SAMPLE.title == "web1@snap2"


# Accidents


def test_every_flipped_bit_is_noticed() -> None:
    for at in range(len(STREAM)):
        for bit in range(8):
            damaged = bytearray(STREAM)
            damaged[at] ^= 1 << bit
            with pytest.raises(REFUSED):
                read_back(bytes(damaged))


def test_every_cut_is_noticed_and_what_came_before_is_whole() -> None:
    for length in range(len(STREAM)):
        came: list[tuple[int, int, bytes | int]] = []
        with pytest.raises(InvalidStream, match="cut off: it ends after"):
            came.extend(kept(run) for run in StreamReader(io.BytesIO(STREAM[:length])).runs())
        assert came == CONTENT[: len(came)]


def test_frames_left_out_doubled_or_put_elsewhere_are_noticed() -> None:
    places = []
    at = PREAMBLE.size
    while at < len(STREAM):
        end = at + FRAME.size + FRAME.unpack_from(STREAM, at)[1] + 32
        places.append((at, end))
        at = end
    frames = [STREAM[start:end] for start, end in places]
    rest = range(len(frames))
    orders = [[n for n in rest if n != gone] for gone in rest]
    orders += [[*range(n), n, *range(n, len(frames))] for n in rest[:-1]]
    orders += [[*range(n), n + 1, n, *range(n + 2, len(frames))] for n in rest[:-1]]
    for order in orders:
        with pytest.raises(REFUSED):
            read_back(STREAM[: PREAMBLE.size] + b"".join(frames[n] for n in order))


def test_what_follows_the_end_is_left_to_whoever_reads_on() -> None:
    source = io.BytesIO(STREAM + b"more")
    list(StreamReader(source).runs())
    assert source.read() == b"more"


def test_what_is_no_stream_is_said_to_be_none() -> None:
    with pytest.raises(InvalidStream, match="no stream of"):
        read_back(b"QFI\xfb" + bytes(100))
    with pytest.raises(InvalidStream, match="after 0 bytes"):
        read_back(b"")


@pytest.mark.parametrize(("version", "features"), [(VERSION + 1, 0), (VERSION, 1)])
def test_a_stream_of_a_newer_version_is_left_alone(version: int, features: int) -> None:
    with pytest.raises(UnsupportedFormat, match="newer"):
        read_back(PREAMBLE.pack(MAGIC, version, features) + STREAM[PREAMBLE.size :])


# Malice: the hashes are right


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": []},
        {"layers": [{}]},
        {"layers": "abc"},
        {"layers": None},
        {"base": []},
        {"base": {"id": "00"}},
        {"clone": 5},
        {"clone": "a\nb"},
        {"clone": "x" * 300},
        {"clone": "\ud800"},
        {"created": -1},
        {"created": 1.5},
        {"created": True},
        {"created": 1 << 64},
        {"with_base": 1},
        {"parent": "zz"},
        {"parent": "00" * 15},
        {"parent": NO_PARENT.hex()},
        {"parent": layer(1).id.hex()},
        {"parent": (b"p" * 16).hex(), "with_base": True},
        {"base": None, "with_base": True},
        {"section": 2},
        {"offset": SIZE + 1},
    ],
    ids=str,
)
def test_a_head_that_makes_no_sense_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(InvalidStream, match="the head of the stream makes no sense"):
        read_back(with_head(**changes))


@pytest.mark.parametrize("size", [0, -4096, 4095, 4097, 1 << 50, "4096"])
def test_a_head_with_an_impossible_size_is_refused(size: object) -> None:
    layers = json.loads(SAMPLE.encode())["layers"]
    with pytest.raises(InvalidStream, match="makes no sense"):
        read_back(with_head(layers=[layers[0] | {"size": size}]))
    with pytest.raises(InvalidStream, match="makes no sense"):
        read_back(with_head(base=json.loads(SAMPLE.encode())["base"] | {"size": size}))


@pytest.mark.parametrize("head", [b"", b"[]", b"5", b"[" * 100_000, b"{" * 5, b"\xff" * 50, b"9" * 10_000, b"null"])
def test_a_head_that_is_no_object_is_refused(head: bytes) -> None:
    with pytest.raises(InvalidStream, match="makes no sense"):
        read_back(with_frame(0, lambda _: head))


def test_more_layers_than_a_chain_has_are_refused() -> None:
    layers = [json.loads(SAMPLE.encode())["layers"][0] | {"id": f"{n + 1:032x}"} for n in range(MAX_SENT_LAYERS + 1)]
    Head.decode(json.dumps(json.loads(SAMPLE.encode()) | {"layers": layers[:-1]}).encode())
    with pytest.raises(InvalidStream, match="254 layers"):
        read_back(with_head(layers=layers))


def runs_payload(*runs: tuple[int, int, int], data: bytes = b"", count: int | None = None) -> bytes:
    count = len(runs) if count is None else count
    return RUN_COUNT.pack(count) + b"".join(RUN.pack(*run) for run in runs) + data


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\0\0",
        runs_payload(count=1),
        runs_payload(count=(1 << 32) - 1),
        runs_payload((0, 0, 0)),
        runs_payload((0, BLOCK_SIZE, 2)),
        runs_payload((1, BLOCK_SIZE, 0)),
        runs_payload((0, 512, 0)),
        runs_payload((SIZE, BLOCK_SIZE, 0)),
        runs_payload((SIZE - BLOCK_SIZE, 2 * BLOCK_SIZE, 0)),
        runs_payload(((1 << 64) - BLOCK_SIZE, BLOCK_SIZE, 0)),
        runs_payload((0, BLOCK_SIZE, 1)),
        runs_payload((0, BLOCK_SIZE, 1), data=bytes(BLOCK_SIZE + 1)),
        runs_payload((0, BLOCK_SIZE, 0), data=b"x"),
        runs_payload((BLOCK_SIZE, BLOCK_SIZE, 0), (0, BLOCK_SIZE, 0)),
        runs_payload((0, 2 * BLOCK_SIZE, 0), (BLOCK_SIZE, BLOCK_SIZE, 0)),
    ],
    ids=range(16),
)
def test_runs_that_make_no_sense_are_refused_whole(payload: bytes) -> None:
    """None of the frame's runs is given out, the good ones before the bad one neither."""
    stream = with_frame(2, lambda _: payload)
    reader = StreamReader(io.BytesIO(stream))
    with pytest.raises(InvalidStream, match="makes no sense before byte"):
        next(reader.runs())


def test_a_run_of_zeros_has_a_limit() -> None:
    """So that few bytes do not become many: of map, with whoever receives them."""
    head = head_with(layers=(layer(1, MAX_SIZE),))
    frames = [
        (HEAD, head.encode()),
        (PART, PART_PAYLOAD.pack(0, 0)),
        (RUNS, runs_payload((0, MAX_RUN + BLOCK_SIZE, 0))),
    ]
    with pytest.raises(InvalidStream, match="a run of"):
        read_back(forged(STREAM, frames))


@pytest.mark.parametrize(
    ("number", "frame"),
    [
        (0, (PART, PART_PAYLOAD.pack(0, 0))),
        (1, (PART, PART_PAYLOAD.pack(1, 0))),
        (1, (PART, PART_PAYLOAD.pack(0, BLOCK_SIZE))),
        (1, (PART, b"x")),
        (1, (RUNS, runs_payload((0, BLOCK_SIZE, 0)))),
        (1, (b"ELSE", b"")),
        (1, (HEAD, SAMPLE.encode())),
        (3, (PART, PART_PAYLOAD.pack(0, 0))),
        (3, (PART, PART_PAYLOAD.pack(2, 0))),
        (3, (DONE, b"")),
        (5, (DONE, b"")),
        (5, (DONE, bytes(24))),
        (5, (PART, PART_PAYLOAD.pack(2, 0))),
    ],
    ids=range(13),
)
def test_frames_out_of_turn_are_refused(number: int, frame: tuple[bytes, bytes]) -> None:
    frames = list(frames_of(STREAM))
    assert [kind for kind, _ in frames] == [HEAD, PART, RUNS, PART, RUNS, DONE]
    frames[number] = frame
    with pytest.raises(InvalidStream, match="makes no sense"):
        read_back(forged(STREAM, frames))


def packed(stored: bytes, unpacked: int) -> bytes:
    """A stream whose first runs are a frame that says it is so many bytes when unpacked; its hash is right."""
    before = forged(STREAM, list(frames_of(STREAM))[:2])
    frame = FRAME.pack(RUNS, len(stored), unpacked) + stored
    return before + frame + blake3(before[-32:] + frame).digest()


def test_what_cannot_be_unpacked_to_what_it_says_is_refused() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(64 << 20))
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(MAX_PAYLOAD))
    good = zstandard.ZstdCompressor().compress(bytes(5000))
    skippable = b"\x50\x2a\x4d\x18" + (1000).to_bytes(4, "little") + bytes(1000)
    for stored, unpacked in [
        (bomb, MAX_PAYLOAD),
        (bomb, 64 << 20),
        (unsized, MAX_PAYLOAD),
        (good, 4999),
        (good, 5001),
        (good + good, 5000),
        (good[:-1], 5000),
        (b"\0" * 100, 5000),
        (skippable, 5000),
        (b"", 5000),
        (good, 1),
    ]:
        with pytest.raises(InvalidStream):
            read_back(packed(stored, unpacked))


class Endless:
    """A stream that goes on with whatever is asked for."""

    def __init__(self, begin: bytes) -> None:
        self.begin = begin
        self.asked = 0

    def read(self, size: int, /) -> bytes:
        self.asked = max(self.asked, size)
        piece, self.begin = self.begin[:size], self.begin[size:]
        return piece or bytes(size)


def test_no_frame_takes_more_memory_than_its_limit() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(64 << 20))
    before = forged(STREAM, list(frames_of(STREAM))[:2])
    for stream in [packed(bomb, len(bomb) + 1), before + FRAME.pack(RUNS, 0xFFFFFFFF, 0xFFFFFFFF), before]:
        source = Endless(stream)
        tracemalloc.start()
        try:
            with pytest.raises(InvalidStream):
                list(StreamReader(source).runs())
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert source.asked <= MAX_PAYLOAD
        assert peak < 5 * MAX_PAYLOAD


@pytest.mark.parametrize("seed", range(4))
def test_garbage_and_forgeries_give_an_error_of_ours_or_a_stream(seed: int) -> None:
    """Bytes changed within frames whose hashes are made right again, so that what is behind the hashes is reached."""
    dice = random.Random(seed)
    frames = list(frames_of(written(head_with(with_base=True), CONTENT)))
    whole = 0
    for _ in range(1500):
        mutated = []
        for kind, payload in frames:
            if dice.random() < 0.25:
                changed = bytearray(payload[: 4096 if dice.random() < 0.5 else None])
                for _ in range(dice.randrange(3)):
                    at = dice.randrange(max(1, min(len(changed), 400)))
                    changed[at : at + dice.randrange(3)] = dice.randbytes(dice.randrange(4))
                payload = bytes(changed)
            if dice.random() < 0.97:
                mutated.append((kind, payload))
        if dice.random() < 0.1:
            dice.shuffle(mutated)
        try:
            read_back(forged(STREAM, mutated))
            whole += 1
        except REFUSED:
            pass
    assert 10 < whole < 1000
