"""The corpus of each target goes through it, and the targets notice what is wrong with the core."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import server_side
from feeding import HEADER_SIZE, Disagreement, agree
from targets import CORPUS, TARGETS

from nbdclone.errors import LocalProtocolError
from nbdclone.protocol import handshake, requests, transmission, wire
from nbdclone.protocol.client_handshake import ClientHandshake
from nbdclone.protocol.handshake import ServerHandshake
from nbdclone.protocol.pending import Pending
from nbdclone.protocol.transmission import ClientTransmission

DOCUMENT = Path(__file__).parents[2] / "docs" / "protocol.md"
MAX_CORPUS_SIZE = 300 << 10

Plant = Callable[[pytest.MonkeyPatch], None]


def corpus(target: str) -> list[Path]:
    return sorted((CORPUS / target).iterdir())


def run(target: str) -> None:
    """The corpus, then a thousand mutations of it."""
    function = TARGETS[target]
    inputs = [path.read_bytes() for path in corpus(target)]
    for data in inputs:
        function(data)
    rng = random.Random(target)
    for _ in range(1000):
        data = bytearray(rng.choice(inputs))
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.choice([0, 1, 0x80, 0xFF, rng.randrange(256)])
        function(bytes(data))


@pytest.mark.parametrize("target", TARGETS)
def test_every_input_of_the_corpus_goes_through_its_target(target: str) -> None:
    assert len(corpus(target)) >= 10
    for path in corpus(target):
        try:
            TARGETS[target](path.read_bytes())
        except Exception as error:
            error.add_note(f"with {path}")
            raise


def test_there_is_a_corpus_for_each_target_and_it_is_small() -> None:
    assert sorted(path.name for path in CORPUS.iterdir()) == sorted(TARGETS)
    assert sum(path.stat().st_size for target in TARGETS for path in corpus(target)) < MAX_CORPUS_SIZE


def test_the_documented_targets_are_those_that_there_are() -> None:
    section = DOCUMENT.read_text().split("\n## Fuzzing\n")[1].split("\n## ")[0]
    assert re.findall(r"^\| (\w+) \|", section.split("\n\n")[1], re.MULTILINE) == ["target", *TARGETS]


@pytest.mark.parametrize("target", TARGETS)
def test_an_input_without_a_whole_header_is_none(target: str) -> None:
    for size in range(HEADER_SIZE + 1):
        TARGETS[target](bytes(size))


def test_what_depends_on_the_pieces_is_noticed() -> None:
    for data in (b"\0\0\0\0ab", b"\0\0\2\5" + b"x" * 100):
        with pytest.raises(Disagreement, match="whole: 1"):
            agree(data, lambda _choices, stream, cut: [len(list(cut(stream)))])
        agree(data, lambda _choices, stream, cut: [b"".join(cut(stream)) == stream])


# Defects, planted


def a_key_error_for_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_arguments: object) -> None:
        raise KeyError("web1")

    monkeypatch.setitem(handshake._SERVER_OPTIONS, wire.Option.SET_META_CONTEXT, broken)


def no_limit_on_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_OPTION_LENGTH", 1 << 32)


def no_limit_on_option_replies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_REPLY_LENGTH", 1 << 32)


def no_limit_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_ERROR_CHUNK", 1 << 32)


def no_limit_on_payloads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "MAX_PAYLOAD", 1 << 64)


def no_request_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_side, "request_error", lambda *_arguments: 0)


def replies_overtake_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ServerHandshake, "_send", lambda self, message: self._outgoing.appendleft(iter((message,))))


def options_without_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    original = ServerHandshake._handle

    def lax(self: ServerHandshake, option: int, data: bytes) -> Any:
        self._in_tls = True
        return original(self, option, data)

    monkeypatch.setattr(ServerHandshake, "_handle", lax)


def going_on_without_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClientHandshake, "_refuse_tls", lambda self, *_reply: self._agree_on_mode(self._wanted))


def a_read_is_stored_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def lax(self: Pending, offset: int, size: int) -> int:
        self._merge(offset - self.offset, offset - self.offset + size)
        return offset - self.offset

    monkeypatch.setattr(Pending, "cover", lax)


def an_error_text_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def lax(kind: int, payload: bytes, _pending: Pending) -> tuple[int, str]:
        return wire.ERROR.unpack_from(payload)[0], payload.decode()

    monkeypatch.setattr(transmission, "_parse_error", lax)


def a_head_in_pieces_loses_a_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    original = ClientTransmission._extend_head

    def lossy(self: ClientTransmission, view: memoryview, position: int, end: int, completed: Any) -> int:
        if len(self._head) == 17:
            del self._head[-1]
        return original(self, view, position, end, completed)

    monkeypatch.setattr(ClientTransmission, "_extend_head", lossy)


def zeros_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def store(self: Pending, _start: int, _data: memoryview) -> None:
        self.data = bytes(self.length)

    monkeypatch.setattr(Pending, "store", store)


def a_misuse_of_the_core(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise LocalProtocolError("the client did not ask for an export")

    monkeypatch.setattr(ServerHandshake, "refuse_export", refuse)


PLANTS: list[tuple[str, Plant]] = [
    ("server_handshake", a_key_error_for_an_option),
    ("server_handshake", no_limit_on_options),
    ("server_handshake", replies_overtake_a_list),
    ("server_handshake", options_without_tls),
    ("server_handshake", a_misuse_of_the_core),
    ("server_transmission", no_limit_on_payloads),
    ("server_transmission", no_request_is_refused),
    ("client_handshake", no_limit_on_option_replies),
    ("client_handshake", going_on_without_tls),
    ("client_transmission", no_limit_on_chunks),
    ("client_transmission", a_read_is_stored_anywhere),
    ("client_transmission", an_error_text_is_not_measured),
    ("client_transmission", a_head_in_pieces_loses_a_byte),
    ("conversation", a_key_error_for_an_option),
    ("conversation", a_head_in_pieces_loses_a_byte),
    ("conversation", zeros_are_read),
]


@pytest.mark.parametrize(("target", "plant"), PLANTS, ids=lambda value: getattr(value, "__name__", value))
def test_a_planted_defect_is_found(target: str, plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises((AssertionError, KeyError, LocalProtocolError, UnicodeDecodeError, ValueError, IndexError)):
        run(target)
