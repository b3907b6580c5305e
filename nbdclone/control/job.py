"""A verb in a process of its own. The server starts it, as

    python -m nbdclone.control.job --pool POOL --channel FD

and writes one line to the socket FD: {"verb": ..., "arguments": {...}}. What comes back are lines as POST /v1/jobs
streams them: {"progress": [done, total]} now and then, and in the end {"result": ...} or {"error": ...}. When the
server ends its half of the socket, or dies, the verb is interrupted as Ctrl-C would do it.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import socket
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from nbdclone.control.client import Control
from nbdclone.control.failures import to_record
from nbdclone.control.local import LocalTarget
from nbdclone.control.verbs import Arguments, Steps, drive, find_verb
from nbdclone.errors import Interrupted, NBDCloneError
from nbdclone.store.pool import Pool

logger = logging.getLogger("nbdclone")

# How often progress is told.
PROGRESS_S = 0.1
# How the main thread learns that nobody wants the result any more: the signals that end a server are blocked here.
_SIGNAL = signal.SIGUSR1


class ServedTarget(LocalTarget):
    """The pool of the server that started this process."""

    def clients(self, name: str) -> list[dict[str, Any]]:
        return self._control().clients(name)

    def disconnect(self, name: str) -> None:
        drive(self.run("disconnect", {"name": name}))

    def run(self, verb: str, arguments: Arguments) -> Steps:
        return self._control().run(verb, arguments)

    def _control(self) -> Control:
        control = Control.of(self.pool.path)
        if control is None:
            raise Interrupted(f"the server of pool {self.pool.path} is gone")
        return control


class Report:
    """The server's end of the socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._next_s = 0.0

    def progress(self, done: int, total: int) -> None:
        if done == total or time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + PROGRESS_S
            self.tell(progress=[done, total])

    def tell(self, **event: Any) -> None:
        self._sock.sendall(json.dumps(event).encode() + b"\n")


def work(pool: Path, sock: socket.socket) -> None:
    """Do what the first line says."""
    with sock.makefile("rb") as lines:
        wanted = json.loads(lines.readline())
    report = Report(sock)
    me = threading.get_ident()

    def wait_for_end() -> None:
        if not sock.recv(1):
            signal.pthread_kill(me, _SIGNAL)

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(_SIGNAL, interrupt)
    try:
        threading.Thread(target=wait_for_end, daemon=True).start()  # it may say so at once
        steps = find_verb(wanted["verb"]).begin(ServedTarget(Pool.open(pool)), wanted["arguments"])
        result = drive(steps, report.progress)
        signal.signal(_SIGNAL, signal.SIG_IGN)  # it is done, whoever wants to know
    except KeyboardInterrupt:
        report.tell(error=to_record(Interrupted(f"'{wanted['verb']}' was interrupted")))
    except (NBDCloneError, OSError) as error:
        signal.signal(_SIGNAL, signal.SIG_IGN)
        report.tell(error=to_record(error))
    except Exception as error:
        signal.signal(_SIGNAL, signal.SIG_IGN)
        logger.exception("a defect of the verb '%s'", wanted["verb"])
        report.tell(error=to_record(error))
    else:
        report.tell(result=result)


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pool", type=Path, required=True)
    parser.add_argument("--channel", type=int, required=True)
    given = parser.parse_args()
    logging.basicConfig(format="nbdclone: %(message)s", level=logging.WARNING)
    work(given.pool, socket.socket(fileno=given.channel))


if __name__ == "__main__":
    main()
