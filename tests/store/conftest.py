"""What the tests of the store share: a pool with a base."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from powercut import stamp

from nbdclone.store.pool import Pool

BASE_SIZE = 1 << 20


@pytest.fixture(scope="session")
def content() -> bytes:
    """1 MiB of which every sector is another."""
    return b"".join(stamp(1, sector) for sector in range(BASE_SIZE // 512))


@pytest.fixture
def source(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "source.img"
    path.write_bytes(content)
    return path


@pytest.fixture
def empty_pool(tmp_path: Path) -> Pool:
    return Pool.open(tmp_path / "pool", create=True)


@pytest.fixture
def pool(empty_pool: Pool, source: Path) -> Pool:
    """A pool with a base called 'base'."""
    empty_pool.import_base(source, "base")
    return empty_pool


@pytest.fixture(scope="session")
def require() -> Callable[[bool, str], None]:
    """``require(present, reason)``: skip where it is missing on a developer's machine, fail in CI."""

    def require(present: bool, reason: str) -> None:
        if not present and os.environ.get("CI"):
            pytest.fail(f"CI has to have it: {reason}")
        if not present:
            pytest.skip(reason)

    return require
