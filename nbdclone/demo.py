"""The whole story in a minute: one image, three clones, each with its own changes, all over NBD; and a way back.

It uses the public API only, as an example of it.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import uvloop
from rich.console import Console
from rich.table import Table

from nbdclone import Client, Pool, Server
from nbdclone.errors import NBDCloneError, UsageError
from nbdclone.store.catalog import BaseInfo, CloneInfo

IMAGE_SIZE = 64 << 20
CONTENT_SIZE = 12 << 20
CLONES = ("web1", "web2", "web3")
# A whole block, so that the file has a place of its own on the disk, where it can be found and written over.
MARK = b"I am nobody yet.\n".ljust(4096, b"\n")
PIECE = 4 << 20


def run(directory: Path | None) -> None:
    """Run the demo, and leave its pool in ``directory`` (default: a new one under the temporary directory)."""
    if directory is None:
        directory = Path(tempfile.mkdtemp(prefix="nbdclone-demo-"))
    elif directory.exists() and any(directory.iterdir()):
        raise UsageError(f"{directory} is not empty: the demo wants a directory of its own")
    directory.mkdir(parents=True, exist_ok=True)
    directory = directory.absolute()
    console = Console(highlight=False, soft_wrap=True)
    image = directory / "golden.img"
    kind = make_image(image)
    console.print(f"1. An image: {kind}, {IMAGE_SIZE >> 20} MiB, with a file /who-am-i that says '{_line(MARK)}'.")
    pool = Pool.open(directory / "pool", create=True)
    base = pool.import_base(image, "golden")
    pool.create_clones("golden", CLONES)
    console.print(f"2. Imported as base 'golden'; clones of it: {', '.join(CLONES)}.")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_write_and_compare(pool, directory / "nbd.sock", console))
    _go_back(pool, console)
    _show_space(pool, base, console)
    _show_commands(directory, console)


def make_image(path: Path) -> str:
    """Make a disk image with a file system in it, if mke2fs is there; say what it is."""
    path.write_bytes(b"")
    os.truncate(path, IMAGE_SIZE)
    mke2fs = shutil.which("mke2fs", path=os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin")))
    with tempfile.TemporaryDirectory() as root:
        Path(root, "who-am-i").write_bytes(MARK)
        Path(root, "content").write_bytes(os.urandom(CONTENT_SIZE))
        if mke2fs is None:
            path.write_bytes(MARK + Path(root, "content").read_bytes())
            os.truncate(path, IMAGE_SIZE)
            return "raw bytes (mke2fs is not installed)"
        subprocess.run([mke2fs, "-q", "-F", "-t", "ext4", "-d", root, str(path)], check=True)
    return "an ext4 file system"


async def _write_and_compare(pool: Pool, socket: Path, console: Console) -> None:
    """Serve the pool; give each clone its own /who-am-i over NBD; see that nobody else's changed."""
    async with Server(pool, sockets=[socket]) as server:
        uri = server.uris[0]
        async with await Client.connect(uri, "golden") as base:
            before = await _sha256(base)
            place = await _find(base, MARK)
        for name in CLONES:
            async with await Client.connect(uri, name) as clone:
                await clone.pwrite(f"I am {name}.".encode().ljust(len(_line(MARK))), place)
                await clone.flush()
        console.print(f"3. Served at {uri}; written over NBD, at byte {place} of each clone, and flushed.")
        console.print("4. What each export says now:")
        for name in (*CLONES, "golden"):
            async with await Client.connect(uri, name) as export:
                said = _line(await export.pread(len(MARK), place)).strip()
                expected = f"I am {name}." if name in CLONES else _line(MARK)
                if said != expected:
                    raise NBDCloneError(f"{name} says {said!r}, and should say {expected!r}")
                console.print(f"     {name:8} {said}")
                after = await _sha256(export) if name == "golden" else before
        if before != after:
            raise NBDCloneError("the base has changed")
        console.print(f"5. The base is what it was: SHA-256 {before[:16]}... before and after.")


def _go_back(pool: Pool, console: Console) -> None:
    """Seal a clone, ruin it, and go back."""
    pool.snapshot("web1@good")
    with pool.open_clone("web1") as clone:
        before = hashlib.sha256(clone.pread(clone.size, 0)).digest()
        clone.zero(0, clone.size)
    began = time.perf_counter()
    pool.rollback("web1@good")
    took_ms = (time.perf_counter() - began) * 1000
    with pool.open_clone("web1") as clone:
        if hashlib.sha256(clone.pread(clone.size, 0)).digest() != before:
            raise NBDCloneError("web1 is not what it was")
    console.print(f"6. Snapshot web1@good, all of web1 zeroed, and back: {took_ms:.0f} ms; web1 is what it was.")


async def _sha256(export: Client) -> str:
    digest = hashlib.sha256()
    for offset in range(0, export.size, PIECE):
        digest.update(await export.pread(min(PIECE, export.size - offset), offset))
    return digest.hexdigest()


async def _find(export: Client, wanted: bytes) -> int:
    """Where ``wanted``, which begins on a block, stands in the export."""
    for offset in range(0, export.size, PIECE):
        data = await export.pread(min(PIECE, export.size - offset), offset)
        if (at := data.find(wanted)) >= 0:
            return offset + at
    raise NBDCloneError("the mark is not in the image")


def _show_space(pool: Pool, base: BaseInfo, console: Console) -> None:
    from nbdclone.commands.common import show_size

    entries = {entry.name: entry for entry in pool.entries()}
    clones = [entry for entry in entries.values() if isinstance(entry, CloneInfo)]
    copies = base.allocated * len(clones)
    linked = sum(clone.allocated for clone in clones)
    table = Table(title="What it takes on the disk", title_justify="left", box=None, pad_edge=False)
    for heading in ("", "as copies", "as linked clones"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row("golden", show_size(base.allocated), show_size(base.allocated))
    for clone in clones:
        table.add_row(clone.name, show_size(base.allocated), show_size(clone.allocated))
    table.add_row("together", show_size(base.allocated + copies), show_size(base.allocated + linked), style="bold")
    console.print()
    console.print(table)


def _show_commands(directory: Path, console: Console) -> None:
    program = sys.argv[0] if os.path.basename(sys.argv[0]) == "nbdclone" else f"{sys.executable} -m nbdclone"
    pool, socket = shlex.quote(str(directory / "pool")), directory / "nbd.sock"
    drive = shlex.quote(f"file=nbd+unix:///web1?socket={socket},format=raw,if=virtio")
    console.print(f"\nThe pool is left in {pool}. Serve it:")
    console.print(f"  {program} --pool {pool} serve --socket {shlex.quote(str(socket))}")
    console.print("and attach a clone as a Linux block device (as root):")
    console.print(f"  modprobe nbd && nbd-client -unix {shlex.quote(str(socket))} /dev/nbd0 -name web1")
    console.print("or give it to a virtual machine:")
    console.print(f"  qemu-system-x86_64 -m 512 -drive {drive}")


def _line(mark: bytes) -> str:
    return mark.decode().split("\n", 1)[0]
