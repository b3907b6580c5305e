"""A pool, and verbs that the tests register."""

from __future__ import annotations

from pathlib import Path

import pytest
from serving import BASE, CLONES, make_pool

from nbdclone.store.pool import Pool


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    """One base of random bytes, and clones of it."""
    return make_pool(tmp_path, BASE, *CLONES)
