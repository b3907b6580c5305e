"""What a random write of 4 KiB costs in a file that was written in larger pieces, and what these cost.

`python -m integration.bench.folios [DIRECTORY]` prints a table: processor time of `os.pwrite`, in microseconds. Where
the page cache keeps what came in one write as one folio, and the file system walks through all of its blocks with each
later write, the last column grows with the pieces (ext4 of Linux 6.18).
"""

from __future__ import annotations

import os
import random
import sys
import tempfile

SIZE = 256 << 20
WRITES = 20_000
BLOCK = 4096
PIECES = (4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20)


def processor_s() -> float:
    times = os.times()
    return times.user + times.system


def measure(directory: str, piece: int) -> tuple[float, float]:
    """Seconds for a MiB in such pieces, and for a later write of 4 KiB."""
    data = os.urandom(piece)
    places = [BLOCK * number for number in range(SIZE // BLOCK)]
    random.Random(1).shuffle(places)
    with tempfile.TemporaryFile(dir=directory) as file:
        fd = file.fileno()
        os.posix_fallocate(fd, 0, SIZE)
        began = processor_s()
        for offset in range(0, SIZE, piece):
            os.pwrite(fd, data, offset)
        filled = processor_s()
        os.fsync(fd)
        block = data[:BLOCK]
        synced = processor_s()
        for offset in places[:WRITES]:
            os.pwrite(fd, block, offset)
        return (filled - began) / (SIZE >> 20), (processor_s() - synced) / WRITES


def main(directory: str = "/var/tmp") -> None:
    print("| in pieces of, KiB | one MiB, us | a later write of 4 KiB, us |\n| ---: | ---: | ---: |")
    for piece in PIECES:
        whole, later = measure(directory, piece)
        print(f"| {piece >> 10} | {whole * 1e6:.0f} | {later * 1e6:.1f} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
