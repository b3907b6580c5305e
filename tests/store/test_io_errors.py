"""Every operation of random work fails in turn: the caller hears of it, and nothing else is hurt."""

from __future__ import annotations

import errno
import logging
import os
import random
from typing import NamedTuple

import pytest
from mutation import mutate
from powercut import Campaign, LawBroken, _shown, open_clone, read_sectors
from simulated import SimulatedFileSystem

from nbdclone.errors import CloneFailed
from nbdclone.store.clone import Clone
from nbdclone.store.delta import Delta

SEEDS = int(os.environ.get("IO_ERROR_SEEDS", "12"))
KINDS = frozenset({"write", "sync", "punch", "zero", "allocate", "read"})


class Outcome(NamedTuple):
    failed: str | None  # the kind of operation that failed, if it came to that
    heard: bool  # did somebody hear of it?


class OneError(Campaign):
    """A life in which the n-th operation on the disk fails, once. States of a power cut are not looked at."""

    def __init__(self, seed: int, failing: int) -> None:
        super().__init__(seed, states_per_step=0, errors=False)
        self._left = failing
        self.failed: str | None = None
        self.heard = False

    def run(self, openings: int = 2, operations: int = 10) -> None:
        super().run(openings, operations)

    def _live(self, operations: int) -> None:
        fs = self._fs
        fs.on_step, fs.rng = self._step, self._rng
        self._clone = open_clone(fs)
        for _ in range(2):  # the map is read with the first, which may fail as well
            fs.on_read = lambda: self._step("read")
            try:
                found = read_sectors(self._clone)
                break
            except OSError as error:
                self._hear(error)
        self._ledger.observe(found, durable=False)
        for _ in range(operations):
            self._operate()
        fs.on_read = lambda: None
        finished = self._ledger.begin_flush()
        try:
            self._clone.close()
        except OSError as error:
            self._hear(error)
        except CloneFailed:
            if not self.heard:
                raise
        else:
            self._ledger.finish_flush(finished)
        fs.die()
        if not self.heard or self.failed != "sync":  # all was flushed by the close
            for seed in range(3):
                self._look(fs.crash(random.Random(seed)))

    def _step(self, what: str) -> None:
        if what not in KINDS or self.failed:
            return
        self._left -= 1
        if self._left < 0:
            self.failed = what
            raise OSError(errno.EIO, "the disk does not answer")

    def _hear(self, error: OSError) -> None:
        assert error.errno == errno.EIO
        self.heard = True

    def _operate(self) -> None:
        choice = self._rng.random()
        before = self.failed
        try:
            if choice < 0.3:
                self._flush()
            elif choice < 0.5:
                self._read()
            else:
                self._write()
        except OSError as error:
            if before or not self.failed:
                raise LawBroken(f"an error that is none: {error!r}") from error
            self._hear(error)
            self._after()
        except CloneFailed as error:
            if self.failed != "sync":
                raise LawBroken(f"refused without a failed sync: {error}") from error
            self._ledger.observe(read_sectors(self._clone), durable=False)

    def _read(self) -> None:
        for sector, content in read_sectors(self._clone).items():
            if content != self._ledger.latest(sector):
                raise LawBroken(f"sector {sector} is read as {_shown(content)}, not as it was written last")

    def _after(self) -> None:
        """Reads go on; after a failed sync no write and no flush does, and after any other error all of them do."""
        self._ledger.observe(read_sectors(self._clone), durable=False)
        changes = (lambda: self._clone.pwrite(b"", 0), lambda: self._clone.zero(0, 0), self._clone.flush)
        for change in changes:
            try:
                change()
            except CloneFailed as error:
                if self.failed != "sync":
                    raise LawBroken(f"refused after a failed {self.failed}: {error}") from error
            else:
                if self.failed == "sync":
                    raise LawBroken("after a failed sync the clone goes on")


def run_all(seeds: int) -> dict[str, int]:
    """Let every operation of some lives fail. How many did, by their kind."""
    failed: dict[str, int] = {}
    for seed in range(seeds):
        for failing in range(10_000):
            campaign = OneError(seed, failing)
            campaign.run()
            if campaign.failed is None:
                break
            failed[campaign.failed] = failed.get(campaign.failed, 0) + 1
            if not campaign.heard and campaign.failed not in ("write", "read", "sync"):
                raise LawBroken(f"seed {seed}, operation {failing}: nobody heard of a failed {campaign.failed}")
    return failed


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "nbdclone")


def test_whichever_operation_fails_each_sector_is_old_or_new_and_the_clone_goes_on_or_says_why_not() -> None:
    failed = run_all(SEEDS)
    print(f"failed: {failed}, {sum(failed.values())} in all")
    assert set(failed) == KINDS
    assert sum(failed.values()) > 50 * SEEDS


@pytest.mark.parametrize(
    ("owner", "method", "old", "new"),
    [
        (Delta, "require_sound", "if self._failure:", "if False:"),
        (Delta, "_flush", "self._map.dirty |= noted.keys()\n", "pass\n"),
        (Delta, "_sync", "            raise\n", "            pass\n"),
        (Clone, "_zero_blocks", "                raise\n", "                pass\n"),
    ],
)
def test_it_is_noticed_if(monkeypatch: pytest.MonkeyPatch, owner: type, method: str, old: str, new: str) -> None:
    mutate(monkeypatch, owner, method, old, new)
    with pytest.raises(LawBroken):
        run_all(40)


def test_a_failed_sync_is_told_in_the_log_at_once_and_with_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "nbdclone")
    campaign = Campaign(1)
    fs: SimulatedFileSystem = campaign._fs
    clone = open_clone(fs)
    clone.pwrite(b"x", 0)

    def fail(what: str) -> None:
        if what == "sync":
            raise OSError(errno.EIO, "no answer")

    fs.on_step = fail
    with pytest.raises(OSError, match="no answer"):
        clone.flush()
    assert "/delta: a sync failed (Input/output error): no more writes until it is reopened" in caplog.text
