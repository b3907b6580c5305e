"""Two verbs that are begun at the same time on the same clone, under clients that write and verify; pairs.py."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from integration.pairs import PAIRS, VERBS, Pairs

pytestmark = pytest.mark.timeout(600)  # of the 30 seconds that it takes where nothing else is at work

ORDER = list(VERBS)
# Beside what only looks, so many of the others are passed over each time.
PASSED_OVER = 3


def is_chosen(one: str, other: str) -> bool:
    """Both are begun at once: which is named first matters little, and takes turns here. `make pairs` has all."""
    first, second = ORDER.index(one), ORDER.index(other)
    if not (VERBS[one].changes and VERBS[other].changes) and (first + second) // 2 % PASSED_OVER:
        return False
    return one == other or (first < second) == bool((first + second) % 2)


def test_every_two_verbs_at_once_are_both_done_or_one_is_refused_and_no_disk_is_wrong(tmp_path: Path) -> None:
    chosen = [names for names in PAIRS if is_chosen(*names)]
    pairs = Pairs(tmp_path, 1, apart=False)
    asyncio.run(pairs.run(chosen))
    print(f"{len(chosen)} pairs; done: {dict(pairs.done)}; refused: {dict(pairs.refused)}")
    assert pairs.done.total() + pairs.refused.total() == 2 * len(chosen)
    assert set(VERBS) <= set(pairs.done), "a verb was refused each time"
