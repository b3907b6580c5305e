"""Verbs without a server, in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from nbdclone.control.verbs import Arguments, Opened, Steps, find_verb
from nbdclone.store.clone import Clone
from nbdclone.store.pool import Pool

T = TypeVar("T")


class LocalOpened:
    """A clone that was opened for a verb, and that nobody else has."""

    def __init__(self, clone: Clone) -> None:
        self._clone = clone

    @property
    def clone(self) -> Clone:
        return self._clone

    def change(self, step: Callable[[], T]) -> T:
        return step()

    def change_here(self, step: Callable[[], T]) -> T:
        return step()

    def flush(self) -> None:
        self._clone.flush()


class LocalTarget:
    """A pool that no server has; or, in a process that a server has started for a verb, one whose server has not open
    what the verb opens, and is refused to open it meanwhile.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    @property
    def pool(self) -> Pool:
        return self._pool

    @contextmanager
    def opened(self, name: str) -> Iterator[Opened]:
        with self._pool.open_clone(name) as clone:
            yield LocalOpened(clone)

    @contextmanager
    def if_open(self, name: str) -> Iterator[Opened | None]:
        yield None

    def clients(self, name: str) -> list[dict[str, Any]]:
        return []

    def disconnect(self, name: str) -> None:
        pass

    @contextmanager
    def alone(self, names: Sequence[str], *, disconnect: bool = False) -> Iterator[None]:
        yield

    def run(self, verb: str, arguments: Arguments) -> Steps:
        return find_verb(verb).begin(self, arguments)
