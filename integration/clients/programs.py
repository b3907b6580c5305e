"""How the tests run libnbd's and qemu's programs, and what they run them on."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Sequence
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


def qemu_io(there: str, *commands: str, qemu_io: Sequence[str] = ()) -> str:
    """Run qemu-io's commands one after the other, by the installed qemu-io or another; what it printed."""
    command = [*(qemu_io or [program("qemu-io")]), "-f", "raw"]
    for each in commands:
        command += ["-c", each]
    done = run_command([*command, there])
    assert "failed" not in done.stdout, done.stdout  # a pattern that is not there does not make its status 1
    return done.stdout


def nbdsh(there: str, script: str) -> str:
    """Run a script with ``h``, a handle that is not connected yet, and ``uri``; what it printed."""
    require("python3-libnbd")
    return run_command(["/usr/bin/python3", "-c", f"import nbd\nh = nbd.NBD()\nuri = {there!r}\n{script}"]).stdout
