"""Boots that warm the next one: what the first boot of a base reads is recorded, and read ahead when a clone starts.

A recording begins when a clone is opened whose base has no trace, and ends after a while or when the clone is closed. A
replay begins when a clone is opened whose base has one. ``store/trace.py`` has the file.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

from nbdclone.errors import NBDCloneError, StorageError, UnsupportedFormat
from nbdclone.server.offload import Offload
from nbdclone.store.clone import Clone
from nbdclone.store.image import Image
from nbdclone.store.trace import Recorder, bytes_in, load_trace, save_trace, still_read, warm

logger = logging.getLogger("nbdclone")

# How long a boot is recorded. Servers are up in half a minute, on a slow disk in two; what comes later is no boot.
RECORD_S = 120.0
# So soon after one replay of a base another would find all of it in memory.
REPLAY_AGAIN_S = 600.0
# How much of the memory that is free, or could be, a replay may fill: the guests need the rest.
MEMORY_SHARE = 4
_MEMINFO = Path("/proc/meminfo")


class Boots:
    """The recordings and replays of one server. With ``enabled`` False there are none.

    ``opened`` and ``closing`` are called in threads, by whoever opens and closes the clone.
    """

    def __init__(self, keeper: Offload, loop: asyncio.AbstractEventLoop, *, enabled: bool = True) -> None:
        self._enabled = enabled
        self._keeper = keeper
        self._loop = loop
        # One at a time: two would only make the disk go to and fro.
        self._replays = Offload(loop, max_threads=1)
        self._lock = threading.Lock()
        self._recorders: dict[Clone, Recorder] = {}
        self._recorded: set[bytes] = set()  # the ids of their bases
        self._replayed: dict[bytes, float] = {}  # the id of a base, and when it was last begun
        self._timers: set[asyncio.TimerHandle] = set()
        self._stopping = False

    def opened(self, clone: Clone) -> None:
        """A client has opened the clone: replay the trace of its base, or record one. Never raises."""
        base = clone.layers[0]
        if not self._enabled or clone.read_only or not isinstance(base, Image):
            return
        try:
            self._begin(clone, base)
        except (OSError, NBDCloneError) as error:
            logger.warning("base '%s': no replay: %s", base.name, error)

    def closing(self, clone: Clone) -> None:
        """The clone is about to be closed: its recording ends. Never raises."""
        with self._lock:  # whoever closes it waits while another ends its recording
            recorder = self._recorders.pop(clone, None)
            if recorder is None:
                return
            base = recorder.base
            self._recorded.discard(base.record.id)
            try:
                trace = recorder.stop()
                if trace is not None:
                    save_trace(trace, base)
                    logger.info("base '%s': a boot was recorded: %d KiB", base.name, bytes_in(trace.grains) >> 10)
            except OSError as error:
                logger.warning("base '%s': what a boot reads cannot be kept: %s", base.name, error)

    def stop(self) -> None:
        """End the replays at their next step, and wait for that."""
        self._stopping = True
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        self._replays.close()

    def _begin(self, clone: Clone, base: Image) -> None:
        try:
            trace = load_trace(base.directory, base.record.id, base.fs)
        except UnsupportedFormat as error:
            logger.warning("base '%s': no replay: %s", base.name, error)
            return
        except StorageError as error:
            logger.warning("base '%s': another boot will be recorded: %s", base.name, error)
            trace = None
        base_id = base.record.id
        with self._lock:
            if trace is None:
                if base_id not in self._recorded:
                    self._recorded.add(base_id)
                    self._recorders[clone] = Recorder(clone)
                    self._loop.call_soon_threadsafe(self._end_later, clone)
                return
            if base_id in self._replayed and monotonic() - self._replayed[base_id] < REPLAY_AGAIN_S:
                return
            self._replayed[base_id] = monotonic()
        grains = still_read(trace, clone)
        image, go_on = base.directory / "image", partial(self._may_read, _Memory())
        work = partial(warm, image, base.record.identity, grains, base.fs, go_on)
        self._loop.call_soon_threadsafe(self._replay, base.name, work)

    def _end_later(self, clone: Clone) -> None:
        def end() -> None:
            self._timers.discard(timer)
            self._keeper.submit(partial(self.closing, clone), lambda _result, _error: None)

        if not self._stopping:
            timer = self._loop.call_later(RECORD_S, end)
            self._timers.add(timer)

    def _replay(self, name: str, work: Callable[[], int]) -> None:
        def done(count: Any, error: BaseException | None) -> None:
            if error is not None:
                logger.warning("base '%s': the replay ended: %s", name, error)
            else:
                logger.info("base '%s': %d KiB were read ahead", name, count >> 10)

        if not self._stopping:
            self._replays.submit(work, done)

    def _may_read(self, memory: _Memory, count: int) -> bool:
        return not self._stopping and memory.take(count)


class _Memory:
    """What one replay may fill of the machine's memory."""

    def __init__(self) -> None:
        self._taken = 0

    def take(self, count: int) -> bool:
        """Is there still memory for so many bytes more?"""
        self._taken += count
        return self._taken <= available_memory() // MEMORY_SHARE


def available_memory() -> int:
    """Bytes that could be had without swapping, as the kernel estimates it (man 5 proc); 0 if it does not say."""
    try:
        for line in _MEMINFO.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except (OSError, ValueError, IndexError):
        pass
    return 0
