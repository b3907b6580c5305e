"""Two verbs that are begun at the same time on the same clone, under clients that write and verify; pairs.py."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from integration.pairs import PAIRS, VERBS, Pairs

pytestmark = pytest.mark.timeout(240)

# Both are begun at once: which of them is named first matters little, and takes turns here. `make pairs` has all.
ORDER = list(VERBS)
ONCE = [
    (one, other)
    for one, other in PAIRS
    if one == other or (ORDER.index(one) < ORDER.index(other)) == bool((ORDER.index(one) + ORDER.index(other)) % 2)
]


def test_every_two_verbs_at_once_are_both_done_or_one_is_refused_and_no_disk_is_wrong(tmp_path: Path) -> None:
    pairs = Pairs(tmp_path, 1, apart=False)
    asyncio.run(pairs.run(ONCE))
    print(f"{len(ONCE)} pairs; done: {dict(pairs.done)}; refused: {dict(pairs.refused)}")
    assert pairs.done.total() + pairs.refused.total() == 2 * len(ONCE)
    assert set(VERBS) <= set(pairs.done), "a verb was refused each time"
