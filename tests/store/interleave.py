"""Let something else happen between any two instructions of an operation of the store."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

# How long the operation stands still for the other one: if that waits for a lock which the operation holds, it goes
# on when the operation does.
PATIENCE_S = 0.001


def interleaved(operation: Callable[[], None], at: int, other: Callable[[], None]) -> bool:
    """Run ``operation``, and ``other`` in a thread before its instruction number ``at`` within the store.

    Returns when both are done; False if the operation has not so many instructions (``other`` ran after it then).
    """
    count = 0
    failures: list[BaseException] = []

    def run_other() -> None:
        try:
            other()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run_other)

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        if "nbdclone/store/" not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            if count == at:
                sys.settrace(None)
                thread.start()
                thread.join(PATIENCE_S)
            count += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        operation()
    finally:
        sys.settrace(before)
    reached = count > at
    if not reached:
        thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return reached
