"""The log that strangers cannot fill."""

from __future__ import annotations

import logging

import pytest

from nbdclone.server.quiet import INTERVAL_S, QuietLog


class Time:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_of_a_thousand_alike_one_is_said_and_later_how_many_were_not(caplog: pytest.LogCaptureFixture) -> None:
    clock = Time()
    log = QuietLog(logging.getLogger("nbdclone"), clock)
    for number in range(1000):
        log.say("handshake", "%s: garbage", number)
    clock.now += INTERVAL_S - 0.1
    log.say("handshake", "%s: garbage", 1000)
    clock.now += 0.1
    log.say("handshake", "%s: garbage", 1001)
    clock.now += INTERVAL_S
    log.say("handshake", "%s: garbage", 1002)
    assert [record.getMessage() for record in caplog.records] == [
        "0: garbage",
        "1001: garbage (and 1000 more of the kind since the last line)",
        "1002: garbage",
    ]


def test_one_kind_does_not_silence_another(caplog: pytest.LogCaptureFixture) -> None:
    log = QuietLog(logging.getLogger("nbdclone"), Time())
    log.say("handshake", "garbage")
    log.say("access", "refused")
    assert [record.getMessage() for record in caplog.records] == ["garbage", "refused"]
