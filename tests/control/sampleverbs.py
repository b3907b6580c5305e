"""Verbs for the tests of what runs them."""

from __future__ import annotations

import os
import time
from pathlib import Path

from nbdclone.control.verbs import VERBS, Steps, Target, Verb
from nbdclone.errors import InUse

BLOCK = 4096


def fill(target: Target, name: str, byte: int, blocks: int, mark: str | None = None, step_ms: float = 0) -> Steps:
    """Fill the first blocks of a clone, one with each step; ``mark``: a file that says how it ended."""
    ended = "interrupted"
    try:
        with target.opened(name) as opened:

            def step(number: int) -> int:
                time.sleep(step_ms / 1000)
                opened.clone.pwrite(bytes([byte]) * BLOCK, number * BLOCK)
                return number

            for number in range(blocks):
                assert opened.change(lambda number=number: step(number)) == number
                yield number + 1, blocks
            opened.flush()
        ended = "done"
    finally:
        if mark is not None:
            Path(mark).write_text(ended)
    return {"filled": blocks, "by": os.getpid()}


def refuse(target: Target, name: str, late: bool = False) -> Steps:
    """Refuse, at once or after a step."""
    if late:
        yield 1, 2
    raise InUse(f"'{name}' is wanted by somebody else")
    yield


def break_down(target: Target, name: str) -> Steps:
    """A verb with a defect."""
    yield 0, 1
    raise KeyError(name)


def die(target: Target, name: str) -> Steps:
    """The process that runs it is killed."""
    with target.opened(name):
        yield 0, 1
        os.kill(os.getpid(), 9)


def twice(target: Target, name: str) -> Steps:
    """Two verbs of others, one after the other."""
    first = yield from target.run("fill", {"name": name, "byte": 1, "blocks": 2})
    second = yield from target.run("fill", {"name": name, "byte": 2, "blocks": 1})
    return {"all": [first["filled"], second["filled"]], "by": os.getpid(), "done_by": first["by"]}


def look(target: Target, name: str) -> Steps:
    """Who has it?"""
    yield 0, 1
    with target.if_open(name) as opened:
        return {"open": opened is not None, "clients": target.clients(name), "by": os.getpid()}


def send_away(target: Target, name: str) -> Steps:
    """Send the clients away, and see whether they have gone."""
    with target.opened(name):
        before = len(target.clients(name))
        target.disconnect(name)
        yield 1, 1
        return {"before": before, "after": len(target.clients(name))}


def wrong_clone(target: Target, name: str, other: str) -> Steps:
    """Open another clone than the one it is for."""
    yield 0, 1
    with target.opened(other):
        pass


SAMPLES = [
    Verb("fill", "worker", "sampleverbs:fill"),
    Verb("refuse", "worker", "sampleverbs:refuse"),
    Verb("break_down", "worker", "sampleverbs:break_down"),
    Verb("die", "worker", "sampleverbs:die"),
    Verb("look", "worker", "sampleverbs:look"),
    Verb("send_away", "worker", "sampleverbs:send_away"),
    Verb("wrong_clone", "worker", "sampleverbs:wrong_clone"),
    Verb("twice", "process", "sampleverbs:twice"),
    Verb("fill_apart", "process", "sampleverbs:fill"),
    Verb("refuse_apart", "process", "sampleverbs:refuse"),
    Verb("break_down_apart", "process", "sampleverbs:break_down"),
    Verb("die_apart", "process", "sampleverbs:die"),
]


def register() -> None:
    """Make them known in this process."""
    VERBS.update({verb.name: verb for verb in SAMPLES})
