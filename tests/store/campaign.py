"""Simulated power cuts by the million, on all processors: what `make powercut` runs.

    python tests/store/campaign.py [--part 0.1] [--seed 0] [--jobs N]

Runs the tests that cut the power, each job with seeds of its own, and counts the states that they looked at. A job that
fails is shown, with the seed that repeats it.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
TIMEOUT_S = 3600  # for a job


class Kind(NamedTuple):
    """A kind of work: a test, and by which variables it is told how much to do and where to begin."""

    test: str
    variable: str
    whole: int
    """How much of it is the whole."""
    piece: int | None
    """How much is one job; None: it has no seed, and is one job."""


KINDS = {
    "a clone": Kind("test_powercut.py::test_a_power_cut_at_any_step_leaves_each_sector_old_or_new",
                    "POWERCUT_CAMPAIGNS", 2000, 25),
    "snapshots": Kind("test_snapshot_powercut.py", "POWERCUT_CAMPAIGNS", 200, 25),
    "a full disk": Kind("test_full_disk.py", "POWERCUT_CAMPAIGNS", 200, 25),
    "a quota": Kind("test_quota.py", "POWERCUT_CAMPAIGNS", 200, 25),
    "the pool's operations": Kind("test_atomic.py", "POOL_STATES_PER_STEP", 300, 50),
    "repairs": Kind("test_check_powercut.py", "CHECK_CAMPAIGNS", 30, None),
}  # fmt: skip


class Job(NamedTuple):
    kind: str
    count: int
    seed: int


def jobs(part: float, first_seed: int) -> list[Job]:
    """All there is to do, the longest first."""
    found = []
    for name, kind in KINDS.items():
        left = max(round(kind.whole * part), 1)
        seed = first_seed
        while left:
            count = min(kind.piece or left, left)
            found.append(Job(name, count, seed))
            seed += count
            left -= count
    return sorted(found, key=lambda job: KINDS[job.kind].piece is not None)


def run(job: Job) -> tuple[Job, int, str]:
    """The states that were looked at, and what is to be shown if it failed."""
    kind = KINDS[job.kind]
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-k", "power_cut or random_work", f"--timeout={TIMEOUT_S}"]
    environment = os.environ | {kind.variable: str(job.count), "POWERCUT_SEED": str(job.seed)}
    done = subprocess.run(
        [*command, str(HERE / kind.test)],
        env=environment, cwd=HERE.parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    states = sum(map(int, re.findall(r"^\.*states: (\d+)", done.stdout, re.M)))
    failed = done.returncode != 0 or not states
    return job, states, done.stdout[-8000:] + done.stderr if failed else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", type=float, default=1.0, help="of the whole (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="where to begin")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="default: all processors")
    wishes = parser.parse_args()
    begun = time.monotonic()
    states: Counter[str] = Counter()
    failures = 0
    with ThreadPoolExecutor(wishes.jobs) as workers:
        for finished in as_completed([workers.submit(run, job) for job in jobs(wishes.part, wishes.seed)]):
            job, count, complaint = finished.result()
            states[job.kind] += count
            if complaint:
                failures += 1
                print(f"{job.kind}, from seed {job.seed}:\n{complaint}", flush=True)
    parts = ", ".join(f"{name} {states[name]:,}" for name in KINDS)
    print(
        f"{states.total():,} states after power cuts in {time.monotonic() - begun:.0f} s on {wishes.jobs} processors "
        f"({parts}): {failures} jobs failed"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
