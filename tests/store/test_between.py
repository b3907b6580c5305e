"""Another verb between two looks of a verb, at random moments: see between.py, which has no end of them."""

from __future__ import annotations

import itertools
import os
import random
from collections import Counter
from pathlib import Path

from between import Campaign, Other, small_layers_are_worth_it

SEED = int(os.environ.get("BETWEEN_SEED", "1"))
MOMENTS = int(os.environ.get("BETWEEN_MOMENTS", "120"))


def test_a_verb_between_two_looks_of_another_is_done_or_refused_in_words_and_no_disk_is_wrong(tmp_path: Path) -> None:
    outcomes: Counter[tuple[bool, bool]] = Counter()
    with small_layers_are_worth_it(), Other() as other:
        campaign = Campaign(tmp_path)
        for moment in itertools.islice(campaign.moments(random.Random(SEED)), MOMENTS):
            first, second = campaign.look_at(moment, other)
            outcomes[first is None, second is None] += 1
    # Most are both done; of all sorts there are some.
    assert outcomes[True, True] > MOMENTS // 2
    assert outcomes[True, False] > 0
    assert outcomes[False, True] > 0
