"""Two pools, and streams between them."""

from __future__ import annotations

import io
import random
from pathlib import Path

from nbdclone.store.layer import SEGMENT_SIZE
from nbdclone.store.pool import Pool
from nbdclone.store.receiving import Received, Receiving
from nbdclone.store.sending import Sending, Token

# Two segments, and an end within a block.
SIZE = SEGMENT_SIZE + 20 * 4096 + 512


def image(path: Path, seed: int = 1) -> Path:
    dice = random.Random(seed)
    with open(path, "wb") as file:
        file.truncate(SIZE)
        for offset in (0, SEGMENT_SIZE - 8192, SIZE - 512):
            file.seek(offset)
            file.write(dice.randbytes(min(40960, SIZE - offset)))
    return path


def change(pool: Pool, clone: str, seed: int) -> None:
    """Write here and there, across the border of the segments and at the end; and trim some."""
    dice = random.Random(seed)
    with pool.open_clone(clone) as disk:
        for _ in range(12):
            offset = dice.choice([0, SEGMENT_SIZE - 65536, SIZE - 65536]) + dice.randrange(60000)
            disk.pwrite(dice.randbytes(dice.randrange(1, 5000)), offset)
        disk.zero(dice.randrange(8) * 4096, 3 * 4096)
        disk.zero(SEGMENT_SIZE - 4096 * dice.randrange(3), 4096 * 4)


def content(pool: Pool, name: str) -> bytes:
    """The size, and what is read in the places that a test writes to, and around them."""
    with pool.open_clone(name) as disk:
        windows = [(0, 1 << 18), (SEGMENT_SIZE - (1 << 18), disk.size)]
        read = b"".join(disk.pread(min(stop - start, 1 << 19), start) for start, stop in windows)
        return disk.size.to_bytes(8, "big") + read + disk.pread(1 << 18, disk.size - (1 << 18))


def sent(pool: Pool, name: str, *, since: str | None = None, with_base: bool = False) -> bytes:
    sink = io.BytesIO()
    with Sending(pool.places, name, since=since, with_base=with_base) as sending:
        for _ in sending.run(sink):
            pass
    return sink.getvalue()


def resumed(pool: Pool, token: Token) -> bytes:
    sink = io.BytesIO()
    with Sending.resume(pool.places, token) as sending:
        for _ in sending.run(sink):
            pass
    return sink.getvalue()


def receive(
    pool: Pool,
    stream: bytes,
    *,
    name: str | None = None,
    base_name: str | None = None,
    force: bool = False,
    resume: bool = False,
) -> Received:
    receiving = Receiving(pool.places, io.BytesIO(stream), name=name, base_name=base_name, force=force, resume=resume)
    for _ in receiving.run():
        pass
    return receiving.result
