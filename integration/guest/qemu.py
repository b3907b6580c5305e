"""Run guests in qemu. A guest does its work by itself, tells of it on its serial console, and powers itself off."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from integration.packages import program

# KVM is not used even where it is offered: nested in another machine it may hang, and a guest takes seconds without it.
# What is not asked for is left out, so that the firmware has little to look for. Without a graphics card it speaks
# on the serial port, where what it says is kept. With an instruction for random numbers, whoever needs one soon after
# the boot does not wait for seconds until the kernel has found some by itself.
MACHINE = (
    *("-machine", "pc,accel=tcg,graphics=off", "-cpu", "qemu64,+rdrand"),
    *("-m", "512", "-nodefaults", "-no-user-config", "-no-reboot"),
    *("-display", "none", "-monitor", "none"),
)
# In the guest, this machine's 127.0.0.1 is 10.0.2.2. The card needs no firmware: nobody boots from the network.
NETWORK = ("-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile=")
# For every kernel. On a busy host the emulated timer may seem dead to the kernel that checks it, which then panics.
KERNEL_OPTIONS = "console=ttyS0 quiet panic=-1 no_timer_check"


class GuestError(Exception):
    """The guest did not do its work: it took too long, died on the way, or its script failed."""


@dataclass(frozen=True)
class Told:
    """What a guest that did its work has told on its console.

    A guest's script heads each part of it with a line `== NAME`. Its last words are `guest ended with status 0`.
    """

    console: str = field(repr=False)

    def section(self, name: str) -> list[str]:
        """The lines that the guest wrote under the heading `== NAME`."""
        found = re.search(rf"^== {re.escape(name)}\n(.*?)(?=^== |^guest ended)", self.console, re.S | re.M)
        if found is None:
            raise GuestError(f"the guest wrote no section {name!r}:\n{self.console[-4000:]}")
        return found[1].splitlines()


class Guest:
    """A machine that is running."""

    def __init__(self, process: subprocess.Popen[bytes], console: Path, complaints: Path) -> None:
        self._process = process
        self._console = console
        self._complaints = complaints

    def wait_until_done(self, deadline_s: float) -> Told:
        """Wait for the guest's last words. It may be running still: it has yet to power itself off."""
        return self._wait(self._is_done, deadline_s)

    def wait_until_off(self, deadline_s: float) -> Told:
        """Wait until the guest has done its work and has powered itself off."""
        return self._wait(lambda: self._process.poll() == 0 and self._is_done(), deadline_s)

    def wait_until_said(self, is_enough: Callable[[str], bool], deadline_s: float) -> None:
        """Wait until what the guest has said so far is enough."""
        self._wait(lambda: is_enough(self.said()), deadline_s)

    def said(self) -> str:
        """What it has written on its console so far."""
        return self._console.read_text(errors="replace").replace("\r", "")

    def _wait(self, happened: Callable[[], bool], deadline_s: float) -> Told:
        deadline = time.monotonic() + deadline_s
        while True:
            is_off = self._process.poll() is not None
            if happened():
                return Told(self.said())
            if is_off:
                raise self._error(f"qemu exited with status {self._process.returncode} and the work is not done")
            if time.monotonic() > deadline:
                raise self._error(f"the guest was not finished after {deadline_s} seconds")
            time.sleep(0.05)

    def _is_done(self) -> bool:
        return re.search(r"^guest ended with status 0$", self.said(), re.M) is not None

    def _error(self, what: str) -> GuestError:
        complaints = self._complaints.read_text(errors="replace")
        return GuestError(f"{what}\n{complaints}\nThe end of its console:\n{self.said()[-4000:]}")


@contextmanager
def guest(*options: str, console: Path) -> Iterator[Guest]:
    """Boot a machine with these options of qemu. When the block is left it is no more, whatever it was doing.

    What it writes to its serial port is kept in the file `console`, and what qemu has to say in another one beside it.
    """
    command = [program("qemu-system-x86_64"), *MACHINE, "-serial", f"file:{console}", *options]
    complaints = console.with_suffix(".qemu")
    console.touch()
    with open(complaints, "wb") as stderr:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr)
    try:
        yield Guest(process, console, complaints)
    finally:
        process.kill()
        process.wait()
