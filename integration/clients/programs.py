"""How the tests run libnbd's and qemu's programs, and what they run them on."""

from __future__ import annotations

import random
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from integration.packages import program, require
from integration.served import Served

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
SIZE = 32 * MIB  # of the image, and so of the clones
DEADLINE_S = 60
WAYS = ("unix", "tcp")


def write_image(path: Path, seed: int = 0) -> Path:
    """Random bytes, with holes and with blocks of zeros that are no holes."""
    rng = random.Random(seed)
    with open(path, "wb") as file:
        file.truncate(SIZE)
        for start in range(0, SIZE, 2 * MIB):
            file.seek(start)
            file.write(rng.randbytes(MIB) if rng.random() < 0.7 else bytes(64 << 10))
    return path


def run(*args: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run an installed program to its end; with ``check``, an exit status other than 0 fails the test."""
    return run_command([program(str(args[0])), *map(str, args[1:])], check=check)


def run_command(command: Sequence[str], *, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=DEADLINE_S)
    assert not check or done.returncode == 0, f"{command} exited {done.returncode}:\n{done.stdout}{done.stderr}"
    return done


def uri(server: Served, export: str, way: str = "unix") -> str:
    if way == "tcp":
        return f"nbd://127.0.0.1:{server.port}/{export}"
    return f"nbd+unix:///{export}?socket={server.socket}"


class Qemu:
    """One version of qemu's programs."""

    def __init__(self, command: Callable[[str], list[str]]) -> None:
        self.command = command
        """From a program's name to the words that run it."""

    def img(self, *args: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        return run_command([*self.command("qemu-img"), *map(str, args)], check=check)

    def io(self, there: str, *commands: str, trace: str = "") -> subprocess.CompletedProcess[str]:
        """Run qemu-io's commands one after the other; every pattern has to be found, and every request answered."""
        words = [word for command in commands for word in ("-c", command)]
        traced = ["--trace", trace] if trace else []
        done = run_command([*self.command("qemu-io"), *traced, "-f", "raw", *words, there])
        for complaint in ("failed", "cannot", "error", "invalid"):  # none of which make its status 1
            assert complaint not in done.stdout, done.stdout
        return done


INSTALLED_QEMU = Qemu(lambda name: [program(name)])


def nbdsh(there: str, script: str) -> str:
    """Run a script with ``h``, a handle that is not connected yet, and ``uri``; what it printed."""
    require("python3-libnbd")
    return run_command(["/usr/bin/python3", "-c", f"import nbd\nh = nbd.NBD()\nuri = {there!r}\n{script}"]).stdout


@contextmanager
def listening(path: Path, *command: str) -> Iterator[None]:
    """A server that somebody else wrote, on the Unix socket ``path`` for as long as the body runs."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + DEADLINE_S
        while not accepts(path):
            assert process.poll() is None, f"{command} ended with status {process.returncode}"
            assert time.monotonic() < deadline, f"{command} did not start in {DEADLINE_S} s"
            time.sleep(0.02)
        yield
    finally:
        process.terminate()
        try:
            process.wait(DEADLINE_S)
        finally:
            process.kill()


def accepts(path: Path) -> bool:
    """Whether somebody listens there; the file alone appears before that."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0
