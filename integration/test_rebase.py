"""Rebase beside qemu-img's: after both, the same clones read as before."""

from __future__ import annotations

from pathlib import Path

from integration.packages import require
from integration.rebase import MIB, one_round


def test_clones_read_the_same_after_nbdclones_rebase_and_after_qemus(tmp_path: Path) -> None:
    require("qemu-utils")
    one_round(tmp_path, 16 * MIB, 3, changed=0.05, seed=1)
