"""A worker as the supervisor sees it: a process, and the channel to it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from nbdclone.server.channel import Channel, Message

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Process:
    """Started here; ``channel`` is there at once, and what is sent through it waits until the worker reads it.

    Raises OSError if there can be no further process.
    """

    def __init__(
        self,
        number: int,
        pool: Path,
        on_message: Callable[[Process, Message, int | None], None],
        on_lost: Callable[[Process], None],
    ) -> None:
        self.number = number
        self.ending = False  # it is to end, or is dying: there is nothing more to be had from it
        self.expected = False  # it was told to
        self.settled = asyncio.Event()  # it can serve, or
        self.refusal: str | None = None  # why it cannot
        self.lost = asyncio.Event()  # its channel is closed
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._popen = start("nbdclone.server.worker", pool, theirs.fileno())
        except BaseException:
            ours.close()
            raise
        self.channel = Channel(ours, lambda message, fd: on_message(self, message, fd), lambda: on_lost(self))

    @property
    def pid(self) -> int:
        return self._popen.pid

    def kill(self) -> None:
        self._popen.kill()

    def wait(self) -> int:
        """Wait until it is dead, and what it had locked is free: its exit status, negative for a signal."""
        return self._popen.wait()


def describe_status(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"


def start(module: str, pool: Path, fd: int) -> subprocess.Popen[bytes]:
    """Run a module that takes --pool and --channel.

    The same Python with the same code: -P and PYTHONPATH say where that is, wherever this was started.
    """
    command = [sys.executable, "-P", "-m", module, "--pool", str(pool), "--channel", str(fd)]
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    # Blocked at once, or Ctrl-C would reach it before it can say that it does not want it; see ``worker``.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        return subprocess.Popen(
            command,
            env=os.environ | {"PYTHONPATH": paths},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[fd],
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
