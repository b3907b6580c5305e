"""The process of a verb, at its edges."""

from __future__ import annotations

import json
import signal
import socket
import threading

import pytest

from nbdclone.control import job
from nbdclone.store.pool import Pool


def test_a_verb_that_nobody_wants_any_more_when_it_begins_is_interrupted_without_a_traceback(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_thread: threading.Thread) -> None:
        raise KeyboardInterrupt  # as the signal does, when the server has gone by then

    monkeypatch.setattr(threading.Thread, "start", start)
    before = signal.getsignal(job._SIGNAL)
    ours, theirs = socket.socketpair()
    try:
        with ours, theirs:
            ours.sendall(json.dumps({"verb": "du", "arguments": {"names": []}}).encode() + b"\n")
            job.work(pool.path, theirs)
            assert json.loads(ours.recv(4096))["error"]["kind"] == "Interrupted"
    finally:
        signal.signal(job._SIGNAL, before)
