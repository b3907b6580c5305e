"""Law 7: one writer, and whoever else comes is told who it is."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from nbdclone.errors import (
    BaseChanged,
    InUse,
)
from nbdclone.store.pool import CloneInfo, Pool


@contextlib.contextmanager
def held_by_another_process(pool: Pool, name: str) -> Iterator[int]:
    """Another process has the clone open; its number."""
    context = multiprocessing.get_context("forkserver")
    opened, done = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(pool.path, name, opened, done))
    process.start()
    assert opened.wait(30)
    assert process.pid
    try:
        yield process.pid
    finally:
        done.set()
        process.join(30)
        assert process.exitcode == 0


def _hold(path: Path, name: str, opened: Event, done: Event) -> None:
    with Pool.open(path).open_clone(name):
        opened.set()
        done.wait(60)


def test_a_clone_that_is_open_is_not_opened_again_and_the_message_says_by_whom(pool: Pool) -> None:
    pool.create_clones("base", ["web1"])
    with pool.open_clone("web1"):
        with pytest.raises(InUse, match=rf"clone 'web1' is in use by this process \({os.getpid()}\)"):
            pool.open_clone("web1")
        assert pool.info("web1").in_use_by == f"this process ({os.getpid()})"  # type: ignore[union-attr]
    assert pool.info("web1").in_use_by is None  # type: ignore[union-attr]
    pool.open_clone("web1").close()


def test_a_clone_that_another_process_has_open_is_refused_and_the_process_named(pool: Pool) -> None:
    pool.create_clones("base", ["web1"])
    with held_by_another_process(pool, "web1") as pid:
        for attempt in (lambda: pool.open_clone("web1"), lambda: pool.remove(["web1"])):
            with pytest.raises(InUse, match=rf"clone 'web1' is in use by process {pid} \(.*python"):
                attempt()
        info = pool.info("web1")
        assert isinstance(info, CloneInfo)
        assert info.in_use_by
        assert info.in_use_by.startswith(f"process {pid} ")
        with pytest.raises(InUse, match=rf"base 'base' is (in use by process {pid}|needed by)"):
            pool.remove(["base"])
    pool.open_clone("web1").close()


def test_a_base_is_open_in_many_places_at_once_and_then_not_removed(pool: Pool) -> None:
    with held_by_another_process(pool, "base"), pool.open_clone("base"), pytest.raises(InUse, match="base 'base'"):
        pool.remove(["base"])
    pool.remove(["base"])


def test_the_lock_of_a_killed_process_is_gone(pool: Pool) -> None:
    pool.create_clones("base", ["web1"])
    context = multiprocessing.get_context("forkserver")
    opened, done = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(pool.path, "web1", opened, done))
    process.start()
    assert opened.wait(30)
    process.kill()
    process.join(30)
    pool.open_clone("web1").close()


def test_a_pool_is_served_by_one_server(pool: Pool) -> None:
    with pool.served(), pytest.raises(InUse, match=f"in use by this process \\({os.getpid()}\\)"), pool.served():
        pass
    with pool.served():
        pass


def test_a_clone_that_could_not_be_opened_is_not_left_locked(pool: Pool) -> None:
    pool.create_clones("base", ["web1"])
    image = pool.path / "bases" / "base" / "image"
    image.rename(image.with_name("away"))
    with pytest.raises(BaseChanged):
        pool.open_clone("web1")
    image.with_name("away").rename(image)
    pool.open_clone("web1").close()
