"""Run nbdclone as its users do: as a program, over real sockets.

For example:

    pool = make_pool(tmp_path / "pool", image, "web1", "web2")
    with served(pool) as server:
        subprocess.run(["qemu-img", "info", server.uri("web1")], check=True)
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from integration.packages import program

REPOSITORY = Path(__file__).resolve().parents[1]
COMMAND = (sys.executable, "-m", "nbdclone")
# The code beside these tests, whatever else is installed.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY)}

READY_DEADLINE_S = 30.0
STOP_DEADLINE_S = 30.0


def nbdclone(*args: str | Path, check: bool = True, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """Run the command to its end; with `check`, an exit status other than 0 is an error that shows its stderr."""
    done = subprocess.run(
        [*COMMAND, *map(str, args)], check=False, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout_s
    )
    if check and done.returncode:
        raise AssertionError(f"nbdclone {' '.join(map(str, args))} exited {done.returncode}:\n{done.stderr}")
    return done


def make_pool(pool: Path, image: Path, *clones: str, base: str = "base") -> Path:
    """A pool with one base, imported from `image`, and clones of it."""
    nbdclone("--pool", pool, "import", image, "--name", base)
    nbdclone("--pool", pool, "clone", base, *clones)
    return pool


class Served:
    """A running server: `nbdclone serve`."""

    def __init__(self, process: subprocess.Popen[bytes], uris: list[str], stderr: Path) -> None:
        self._process = process
        self.uris = uris
        """As the server printed them, in the order of its --listen and --socket."""
        self.stderr = stderr

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def port(self) -> int:
        """The port of the first --listen."""
        return int(self._first("nbd://", "nbds://").rpartition(":")[2].strip("/"))

    @property
    def socket(self) -> str:
        """The path of the first --socket."""
        return self._first("nbd+unix://").partition("?socket=")[2]

    def uri(self, export: str) -> str:
        """Where clients find an export: on the first of the URIs."""
        before, question_mark, after = self.uris[0].partition("?")
        return before.rstrip("/") + ("///" if question_mark else "/") + export + question_mark + after

    @property
    def workers(self) -> list[int]:
        """The processes that serve, if that is not the first one itself."""
        return children(self.pid)

    def kill(self) -> None:
        """SIGKILL to all of it: the end without a warning."""
        if self._process.poll() is None:
            os.kill(self.pid, signal.SIGSTOP)  # or it would notice, and start others
        workers = self.workers
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        while any(is_running(pid) for pid in workers):  # nobody has a clone any more
            time.sleep(0.001)

    @property
    def was_killed(self) -> bool:
        """Has it ended by SIGKILL? Not so when it had ended before."""
        return self._process.returncode == -signal.SIGKILL

    def stop(self) -> None:
        """SIGTERM, after which the server has to leave in time, with status 0 and without a traceback."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        status = self._process.wait(STOP_DEADLINE_S)
        complaints = self.stderr.read_text(errors="replace")
        assert status == 0, f"the server exited with status {status}:\n{complaints}"
        assert "Traceback" not in complaints, complaints

    def _first(self, *schemes: str) -> str:
        return next(uri for uri in self.uris if uri.startswith(schemes))


@contextmanager
def served(pool: Path, *args: str | Path) -> Iterator[Served]:
    """Serve the pool with these arguments of `serve`; on a Unix socket of its own when they name no place.

    At the end the server is stopped, unless the body has killed it. When something fails, what the server wrote to
    stderr is added to the error.
    """
    # Not in pytest's directory: the path of a Unix socket has to be shorter than 108 bytes.
    with tempfile.TemporaryDirectory(prefix="nbdclone-") as directory:
        stdout, stderr = Path(directory, "stdout"), Path(directory, "stderr")
        if not any(str(arg).startswith(("--listen", "--socket")) for arg in args):
            args = (*args, "--socket", Path(directory, "socket"))
        command = [*COMMAND, "--pool", str(pool), "serve", *map(str, args)]
        with open(stdout, "wb") as out, open(stderr, "wb") as err:
            process = subprocess.Popen(command, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        try:
            server = Served(process, _await_ready_line(process, stdout), stderr)
            yield server
            if not server.was_killed:
                server.stop()
        except BaseException as error:
            error.add_note(f"The server wrote to stderr:\n{stderr.read_text(errors='replace')[-8000:]}")
            raise
        finally:
            process.kill()
            process.wait()


def _await_ready_line(process: subprocess.Popen[bytes], stdout: Path) -> list[str]:
    """The URIs in `nbdclone ready on URI...`, the first line that a server prints."""
    deadline = time.monotonic() + READY_DEADLINE_S
    while "\n" not in (said := stdout.read_text()):
        assert process.poll() is None, f"the server exited with status {process.returncode} before it was ready"
        assert time.monotonic() < deadline, f"the server was not ready in {READY_DEADLINE_S} seconds"
        time.sleep(0.02)
    line = said.splitlines()[0]
    assert line.startswith("nbdclone ready on "), f"the server's first line was {line!r}"
    return line.removeprefix("nbdclone ready on ").split()


def children(pid: int) -> list[int]:
    """The processes that one has started; none if it is gone."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, path.read_text().split())
    return found


def is_running(pid: int) -> bool:
    """Is it there, and not a dead one that nobody has asked for yet?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def sha256_of_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_export(uri: str, path: Path) -> Path:
    """Read an export from its first byte to its last, with libnbd, into a file."""
    subprocess.run([program("nbdcopy"), uri, str(path)], check=True, timeout=300)
    return path
