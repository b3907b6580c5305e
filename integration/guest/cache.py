"""Things that take a while to make, such as a Debian system, are made once and kept between runs."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from integration.packages import give_up

REPOSITORY = Path(__file__).resolve().parents[2]


def cached(
    name: str, recipe: list[str], build: Callable[[Path], None], works: Callable[[Path], bool] = Path.exists
) -> Path:
    """The directory that `build` filled, now or in an earlier run; anew when what an earlier run left does not work.

    The recipe is all that says how it is made, such as the text of a module: when it changes, the directory is made
    anew. It is renamed into place when it is complete, so whatever has the final name can be used, and several test
    runs that want it at the same time wait for one of them to make it. It is made of Debian's packages: where they
    cannot be had, the running test is given up.
    """
    cache = Path(os.environ.get("NBDCLONE_TEST_CACHE") or REPOSITORY / ".cache" / "integration")
    digest = hashlib.sha256("\0".join(recipe).encode()).hexdigest()[:12]
    finished = cache / f"{name}-{digest}"
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if finished.exists() and not works(finished):
            shutil.rmtree(finished)
        if not finished.exists():
            for left_by_a_killed_run in cache.glob(f"{name}.unfinished-*"):
                shutil.rmtree(left_by_a_killed_run, ignore_errors=True)
            unfinished = Path(tempfile.mkdtemp(prefix=f"{name}.unfinished-", dir=cache))
            try:
                build(unfinished)
            except (OSError, RuntimeError, subprocess.SubprocessError) as error:
                give_up(f"the {name} for guests cannot be made on this machine: {error}")
            unfinished.rename(finished)
    return finished
