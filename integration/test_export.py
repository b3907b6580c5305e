"""Disks on their way out and back: images of every format that qemu-img writes, and overlays both ways.

The oracle is qemu-img: what it reads of an overlay is what the clone has to hold, and the other way round.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from integration.packages import program, require
from integration.served import COMMAND, ENVIRONMENT, REPOSITORY, children, is_running, nbdclone, served, sha256_of_file
from nbdclone import cli
from nbdclone.store.layer import BLOCK_SIZE
from nbdclone.store.pool import Pool

pytestmark = pytest.mark.timeout(120)

KIB, MIB = 1 << 10, 1 << 20
BASE_SIZE = 12 * MIB
DEADLINE_S = 30
FORMATS = ("raw", "qcow2", "vmdk", "vhdx", "vdi", "vpc")


def run(name: str, *args: str | Path) -> str:
    done = subprocess.run([program(name), *map(str, args)], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{name} {args}: {done.stdout}{done.stderr}"
    return done.stdout


def qemu_io(image: Path, *commands: str) -> None:
    run("qemu-io", "-f", "qcow2", *[word for command in commands for word in ("-c", command)], image)


def compare(first: Path, second: Path, *, of: tuple[str, str]) -> None:
    """qemu-img takes for identical what goes on with zeros: see that the sizes are the same too."""
    run("qemu-img", "compare", "-f", of[0], "-F", of[1], first, second)
    assert size_of(first, of[0]) == size_of(second, of[1])


def size_of(image: Path, image_format: str) -> int:
    told: int = json.loads(run("qemu-img", "info", "-f", image_format, "--output=json", image))["virtual-size"]
    return told


@pytest.fixture(scope="module", name="story")
def make_story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with base.img, imported as 'base', and 'web', a clone of it that was written; web.raw has it."""
    require("qemu-utils")
    directory = tmp_path_factory.mktemp("story")
    rng = random.Random(6)
    with open(directory / "base.img", "wb") as file:
        file.write(rng.randbytes(5 * MIB))
        file.seek(8 * MIB)
        file.write(rng.randbytes(2 * MIB))
        file.truncate(BASE_SIZE)
    pool = Pool.open(directory / "pool", create=True)
    pool.import_base(directory / "base.img")
    pool.create_clones("base", ["web"], size=BASE_SIZE + 3 * MIB + 512)
    with pool.open_clone("web") as clone:
        clone.pwrite(rng.randbytes(10_000), 5000)
        clone.zero(2 * MIB, 300 * KIB)
        clone.zero(3 * MIB + 4096, 8192)  # within a cluster
        clone.pwrite(rng.randbytes(2 * MIB), 6 * MIB)
        clone.zero(8 * MIB - 64 * KIB, 128 * KIB)
        clone.pwrite(rng.randbytes(70_000), BASE_SIZE - 30_000)
        clone.pwrite(b"the end", clone.size - 7)
        (directory / "web.raw").write_bytes(clone.pread(clone.size, 0))
    return directory


def on(story: Path, *args: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """The command, on the story's pool; in this process, which saves starting another a hundred times."""
    command = ["nbdclone", "--pool", str(story / "pool"), *map(str, args)]
    out, err = io.StringIO(), io.StringIO()
    kept = signal.getsignal(signal.SIGTERM)
    with redirect_stdout(out), redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command)
        try:
            cli.main()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        finally:
            signal.signal(signal.SIGTERM, kept)
    assert not check or status == 0, err.getvalue()
    return subprocess.CompletedProcess(command, status, out.getvalue(), err.getvalue())


def assert_refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 1, done
    assert done.stdout == ""
    assert done.stderr.startswith("nbdclone: ")
    assert done.stderr.count("\n") == 1, done.stderr
    for part in parts:
        assert part in done.stderr


@pytest.mark.parametrize("image_format", FORMATS)
def test_an_export_in_every_format_comes_back_as_it_was(story: Path, tmp_path: Path, image_format: str) -> None:
    image = tmp_path / f"web.{image_format}"
    told = json.loads(on(story, "export", "web", image, "--json").stdout)
    assert (told["format"], told["size"]) == (image_format, os.path.getsize(story / "web.raw"))
    assert told["allocated"] <= 13 * MIB
    compare(story / "web.raw", image, of=("raw", image_format))
    on(story, "import", image, "--name", f"back-{image_format}")
    back = story / "pool" / "bases" / f"back-{image_format}" / "image"
    assert sha256_of_file(back) == sha256_of_file(story / "web.raw")
    on(story, "rm", f"back-{image_format}")


def test_an_export_to_a_pipe_is_the_raw_disk(story: Path, tmp_path: Path) -> None:
    with open(tmp_path / "out", "wb") as out:
        command = [*COMMAND, "--pool", str(story / "pool"), "export", "web", "-"]
        subprocess.run(command, env=ENVIRONMENT, stdout=out, check=True, timeout=60)
    assert sha256_of_file(tmp_path / "out") == sha256_of_file(story / "web.raw")


def layers_of(image: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(run("qemu-img", "map", "--output=json", "-f", "qcow2", image))
    return found


@pytest.mark.parametrize("relative", [False, True])
def test_an_overlay_has_what_the_clone_has_of_its_own_and_leaves_the_rest_to_the_base(
    story: Path, tmp_path: Path, relative: bool
) -> None:
    overlay = tmp_path / "web.qcow2"
    told = json.loads(on(story, "export", "web", overlay, "--link", "--json", *["--relative"] * relative).stdout)
    image = story / "pool" / "bases" / "base" / "image"
    assert told["backing"] == (os.path.relpath(image, tmp_path) if relative else str(image))
    info = json.loads(run("qemu-img", "info", "--output=json", overlay))
    assert info["backing-filename-format"] == "raw"
    compare(story / "web.raw", overlay, of=("raw", "qcow2"))
    run("qemu-img", "check", overlay)
    with Pool.open(story / "pool").open_clone("web") as clone:
        own, offset = set(), 0
        for extent in clone.extents(0, clone.size):
            if extent.origin > 1:
                own |= set(range(offset // (64 * KIB), -(-(offset + extent.length) // (64 * KIB))))
            offset += extent.length
    for extent in layers_of(overlay):
        clusters = range(extent["start"] // (64 * KIB), -(-(extent["start"] + extent["length"]) // (64 * KIB)))
        if extent["depth"] == 0 and extent["present"]:
            assert set(clusters) <= own
        elif extent["depth"] == 1:
            assert not own & set(clusters)
    assert told["allocated"] < 3 * MIB


def test_a_clone_goes_to_qemu_and_comes_back_with_what_was_written_there(story: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "web.qcow2"
    on(story, "export", "web", overlay, "--link")
    qemu_io(overlay, "write -P 7 100k 50k", "write -z 6M 64k", "write -P 8 8M 4k")
    on(story, "import", overlay, "--as-clone", "returned")
    on(story, "export", "returned", tmp_path / "returned.raw")
    compare(tmp_path / "returned.raw", overlay, of=("raw", "qcow2"))
    on(story, "rm", "returned")


# Overlays that become clones

Make = Callable[[Path, Path], Path]


def create(image: Path, below: Path, *options: str, below_format: str = "raw", size: str = "") -> Path:
    run(
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-F",
        below_format,
        "-b",
        below,
        *options,
        image,
        *[size] * bool(size),
    )
    return image


WRITES = (
    "write -P 1 0 512",
    "write -P 2 70000 100000",
    "write -z 1M 200k",
    "write -P 3 5100k 8k",
    "write -P 4 12287k 1k",
)


def written(*options: str, size: str = "", more: tuple[str, ...] = ()) -> Make:
    def make(directory: Path, base: Path) -> Path:
        overlay = create(directory / "overlay.qcow2", base, *options, size=size)
        qemu_io(overlay, *WRITES, *more)
        return overlay

    return make


def chain_of_two(directory: Path, base: Path) -> Path:
    lower = create(directory / "lower.qcow2", base)
    qemu_io(lower, *WRITES, "write -P 9 3M 1M", "write -P 10 9M 64k")
    upper = create(directory / "upper.qcow2", Path("lower.qcow2"), "-o", "cluster_size=4k", below_format="qcow2")
    qemu_io(upper, "write -z 3200k 100k", "write -P 11 0 4k", "discard 9M 64k")
    return upper


def shorter_in_the_middle(directory: Path, base: Path) -> Path:
    """What is beyond the end of the lower overlay reads as zeros, not as the base."""
    lower = create(directory / "lower.qcow2", base, size="4M")
    qemu_io(lower, "write -P 9 3M 1M")
    upper = create(directory / "upper.qcow2", lower, below_format="qcow2", size="14M")
    qemu_io(upper, "write -P 11 9M 4k")
    return upper


def with_a_snapshot_inside(directory: Path, base: Path) -> Path:
    overlay = written()(directory, base)
    run("qemu-img", "snapshot", "-c", "before", overlay)
    qemu_io(overlay, "write -P 12 0 1M")
    return overlay


def with_compressed_clusters(directory: Path, base: Path) -> Path:
    plain = written()(directory, base)
    compressed = directory / "compressed.qcow2"
    run("qemu-img", "convert", "-c", "-O", "qcow2", "-B", base, "-F", "raw", plain, compressed)
    return compressed


def on_an_overlay_of_a_base_of_another_format(directory: Path, base: Path) -> Path:
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", base, directory / "bottom.qcow2")
    overlay = create(directory / "overlay.qcow2", directory / "bottom.qcow2", below_format="qcow2")
    qemu_io(overlay, *WRITES)
    return overlay


def never_closed(directory: Path, base: Path) -> Path:
    """Lazy reference counts, as a qemu that was killed leaves them; qemu-img has to repair them first."""
    overlay = create(directory / "overlay.qcow2", base, "-o", "lazy_refcounts=on")
    qemu_io(overlay, *WRITES)
    return overlay


OVERLAYS: dict[str, Make] = {
    "clusters of 512 bytes": written("-o", "cluster_size=512"),
    "clusters of 4 KiB": written("-o", "cluster_size=4k"),
    "clusters of 64 KiB": written(),
    "clusters of 2 MiB": written("-o", "cluster_size=2M"),
    "subclusters": written("-o", "extended_l2=on"),
    "version 2": written("-o", "compat=0.10"),
    "discarded": written(more=("discard 0 2M", "write -P 5 300k 10k")),
    "nothing written": lambda directory, base: create(directory / "overlay.qcow2", base),
    "larger": written(size="40M", more=("write -P 6 39M 100k",)),
    "larger, with zeros": written(size="40M", more=("write -z 20M 10M",)),
    "a chain of two": chain_of_two,
    "shorter in the middle": shorter_in_the_middle,
    "a snapshot inside": with_a_snapshot_inside,
    "compressed": with_compressed_clusters,
    "another format below": on_an_overlay_of_a_base_of_another_format,
    "lazy reference counts": never_closed,
}


@pytest.mark.parametrize("kind", OVERLAYS)
def test_an_overlay_becomes_a_clone_that_reads_the_same_and_has_no_more_than_differs(
    story: Path, tmp_path: Path, kind: str
) -> None:
    shutil.copy(story / "base.img", tmp_path / "elsewhere.img")
    overlay = OVERLAYS[kind](tmp_path, tmp_path / "elsewhere.img")
    before = {path: sha256_of_file(path) for path in tmp_path.iterdir()}
    done = on(story, "import", overlay, "--as-clone", "adopted")
    assert done.stderr == ("nbdclone: 1 snapshot(s) inside the images stayed there\n" if "snapshot" in kind else "")
    assert {path: sha256_of_file(path) for path in tmp_path.iterdir()} == before
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", overlay, tmp_path / "oracle")
    oracle = (tmp_path / "oracle").read_bytes()
    base = (story / "base.img").read_bytes().ljust(len(oracle), b"\0")
    pool = Pool.open(story / "pool")
    with pool.open_clone("adopted") as clone:
        assert clone.pread(clone.size, 0) == oracle
        offset, own = 0, 0
        for extent in clone.extents(0, clone.size):
            own += extent.length if extent.origin > 1 else 0
            offset += extent.length
    blocks = range(0, len(oracle), BLOCK_SIZE)
    assert own == BLOCK_SIZE * sum(oracle[at : at + BLOCK_SIZE] != base[at : at + BLOCK_SIZE] for at in blocks)
    assert os.listdir(pool.path / ".tmp") == []
    on(story, "rm", "adopted")


def test_without_its_base_it_says_what_to_import_or_does_so(story: Path, tmp_path: Path) -> None:
    base = tmp_path / "other.img"
    base.write_bytes(random.Random(7).randbytes(MIB))
    overlay = create(tmp_path / "overlay.qcow2", base)
    assert_refused(
        on(story, "import", overlay, "--as-clone", "x", check=False), f"nbdclone import {base}", "--with-base"
    )
    out = on(story, "import", overlay, "--as-clone", "x", "--with-base").stdout
    assert out.startswith("base 'other': imported too\nclone 'x' of 'other': 1 MiB, ")
    on(story, "rm", "x", "other")


def test_a_name_that_is_taken_is_refused_before_anything_is_read(story: Path, tmp_path: Path) -> None:
    assert_refused(on(story, "import", tmp_path / "no", "--as-clone", "web", check=False), "clone 'web'", "already")


def smaller(directory: Path, base: Path) -> Path:
    return create(directory / "overlay.qcow2", base, size="4M")


def truncated(directory: Path, base: Path) -> Path:
    overlay = written()(directory, base)
    os.truncate(overlay, overlay.stat().st_size - 40_000)
    return overlay


def rotten(directory: Path, base: Path) -> Path:
    overlay = written()(directory, base)
    with open(overlay, "r+b") as file:
        os.pwrite(file.fileno(), b"\x7f" * 6, 3 * 64 * KIB)  # the first table
    return overlay


def encrypted(directory: Path, base: Path) -> Path:
    (directory / "secret").write_text("abc")
    secret = ("--object", f"secret,id=s,file={directory / 'secret'}")
    image = directory / "overlay.qcow2"
    options = "encrypt.format=aes,encrypt.key-secret=s"  # luks needs a quiet machine to count its rounds
    run("qemu-img", "create", "-q", *secret, "-f", "qcow2", "-F", "raw", "-b", base, "-o", options, image)
    return image


def with_a_data_file(directory: Path, base: Path) -> Path:
    return create(directory / "overlay.qcow2", base, "-o", f"data_file={directory / 'data'}")


REFUSED = {
    "smaller": (smaller, "a clone is not smaller than its base"),
    "truncated": (truncated, "truncated"),
    "rotten": (rotten, "is damaged or truncated"),
    "encrypted": (encrypted, "is encrypted"),
    "data file": (with_a_data_file, "keeps its data in another file"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_an_overlay_that_cannot_be_read_right_is_refused_and_nothing_is_made(
    story: Path, tmp_path: Path, kind: str
) -> None:
    make, message = REFUSED[kind]
    overlay = make(tmp_path, story / "base.img")
    assert_refused(on(story, "import", overlay, "--as-clone", "x", check=False), message)
    assert "x" not in Pool.open(story / "pool").names()
    assert os.listdir(story / "pool" / ".tmp") == []


def test_an_overlay_that_a_guest_has_open_is_refused(story: Path, tmp_path: Path) -> None:
    overlay = create(tmp_path / "overlay.qcow2", story / "base.img")
    socket = tempfile.mktemp(prefix="nbdclone-")
    with subprocess.Popen([program("qemu-nbd"), "-t", "-f", "qcow2", "-k", socket, str(overlay)]) as guest:
        try:
            deadline = time.monotonic() + DEADLINE_S
            while not os.path.exists(socket):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            refused = on(story, "import", overlay, "--as-clone", "x", check=False)
        finally:
            guest.terminate()
    assert_refused(refused, "is open in another program (a running guest?)")
    assert "x" not in Pool.open(story / "pool").names()


# With a server, on a full disk, interrupted


def test_beside_a_server_all_can_be_exported_what_a_client_has_open_too(story: Path, tmp_path: Path) -> None:
    with served(story / "pool") as server:
        on(story, "export", "base", tmp_path / "base.qcow2")
        on(story, "export", "web", tmp_path / "web.qcow2")
        with subprocess.Popen(
            [program("qemu-io"), "-f", "raw", server.uri("web")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as client:
            assert client.stdin is not None
            assert client.stdout is not None
            client.stdin.write(b"read 0 512\n")
            client.stdin.flush()
            client.stdout.readline()
            for name in ("raw", "qcow2"):
                on(story, "export", "web", tmp_path / f"open.{name}")
            client.communicate(b"quit\n", timeout=DEADLINE_S)
    for name in ("raw", "qcow2"):
        compare = [program("qemu-img"), "compare", str(tmp_path / f"open.{name}"), str(tmp_path / "web.qcow2")]
        subprocess.run(compare, check=True, stdout=subprocess.DEVNULL, timeout=DEADLINE_S)
    listed = json.loads(on(story, "ls", "--json").stdout)
    assert not [entry["name"] for entry in listed if "@" in entry["name"]], "the snapshot for it is gone"


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for 1 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    mounted = tmp_path / "small"
    mounted.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=1m", "nbdclone-test", mounted)
    yield mounted
    run("umount", mounted)


@pytest.mark.parametrize("options", [("--format", "raw"), ("--format", "qcow2"), ("--format", "vdi"), ("--link",)])
def test_a_full_disk_is_told_and_nothing_is_left(story: Path, small: Path, options: tuple[str, ...]) -> None:
    refused = on(story, "export", "web", small / "image", *options, check=False)
    assert_refused(refused, f"export of 'web': no space left in {small} (")
    assert os.listdir(small) == []


SLOW = """#!/bin/sh
"{real}" "$@" || exit
case "$*" in *{word}*) echo > "{flag}"; exec sleep 600;; esac
"""


@contextlib.contextmanager
def at_work(story: Path, directory: Path, *args: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A command that hangs when qemu has done what there is to do for it."""
    slow = directory / "slow"
    slow.mkdir()
    for name, word in {"qemu-img": "convert", "qemu-nbd": "--socket"}.items():
        (slow / name).write_text(SLOW.format(real=program(name), word=word, flag=slow / "done"))
        (slow / name).chmod(0o755)
    environment = {**ENVIRONMENT, "PATH": f"{slow}:{os.environ['PATH']}", "TMPDIR": str(slow)}
    command = [*COMMAND, "--pool", str(story / "pool"), *map(str, args)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + DEADLINE_S
            while not (slow / "done").exists():
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.01)
            helpers = children(process.pid)
            yield process
            while any(is_running(pid) for pid in helpers) and process.returncode != -signal.SIGKILL:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            for pid in helpers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("options", [("--format", "qcow2"), ("--link",)])
def test_an_export_that_is_interrupted_leaves_nothing_that_looks_whole(
    story: Path, tmp_path: Path, options: tuple[str, ...], number: signal.Signals
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with at_work(story, tmp_path, "export", "web", out / "image", *options) as process:
        process.send_signal(number)
        _, said = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
        assert "Traceback" not in said
    left = os.listdir(out)
    assert "image" not in left
    if number != signal.SIGKILL:
        assert left == []
    on(story, "export", "web", out / "image", *options)
    compare(story / "web.raw", out / "image", of=("raw", "qcow2"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_overlay_whose_import_is_interrupted_is_no_clone(
    story: Path, tmp_path: Path, number: signal.Signals
) -> None:
    overlay = written()(tmp_path, story / "base.img")
    with at_work(story, tmp_path, "import", overlay, "--as-clone", "adopted") as process:
        process.send_signal(number)
        _, said = process.communicate(timeout=DEADLINE_S)
        assert "Traceback" not in said
    assert "adopted" not in Pool.open(story / "pool").names()
    on(story, "import", overlay, "--as-clone", "adopted")  # clears what a killed one left
    assert os.listdir(story / "pool" / ".tmp") == []
    on(story, "rm", "adopted")


@pytest.mark.parametrize("mkfs", ["mkfs.xfs", "mkfs.btrfs"])
def test_where_extents_can_be_shared_a_raw_export_takes_no_space(tmp_path: Path, mkfs: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    with open(tmp_path / "file-system", "xb") as file:
        file.truncate(320 * MIB)
    run(mkfs, "-q", "-f", tmp_path / "file-system")
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        run("mount", "-o", "loop", tmp_path / "file-system", disk)
    except AssertionError as error:
        pytest.skip(f"{mkfs[5:]} cannot be mounted here: {error}")
    try:
        (disk / "base.img").write_bytes(random.Random(8).randbytes(16 * MIB))
        pool = Pool.open(disk / "pool", create=True)
        pool.import_base(disk / "base.img")
        pool.create_clones("base", ["web"], size=20 * MIB + 512)
        with pool.open_clone("web") as clone:
            clone.pwrite(random.Random(9).randbytes(8 * MIB), 10 * MIB)
            clone.pwrite(b"the end", clone.size - 7)
            content = clone.pread(clone.size, 0)
        os.sync()
        before = os.statvfs(disk).f_bfree * os.statvfs(disk).f_frsize
        nbdclone("--pool", pool.path, "export", "web", disk / "web.raw")
        os.sync()
        assert before - os.statvfs(disk).f_bfree * os.statvfs(disk).f_frsize < 2 * MIB
        assert (disk / "web.raw").read_bytes() == content
    finally:
        run("umount", disk)


def test_the_commands_of_the_page_do_what_it_says(tmp_path: Path) -> None:
    require("qemu-utils")
    [commands] = re.findall(r"```sh\n(.*?)```", (REPOSITORY / "docs" / "images.md").read_text(), re.DOTALL)
    (tmp_path / "debian.raw").write_bytes(random.Random(1).randbytes(MIB))
    (tmp_path / "libvirt.img").write_bytes(random.Random(2).randbytes(MIB))
    qemu_io(create(tmp_path / "overlay.qcow2", tmp_path / "libvirt.img"), "write -P 1 0 64k")
    shim = tmp_path / "bin" / "nbdclone"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec {" ".join(COMMAND)} "$@"\n')
    shim.chmod(0o755)
    environment = {
        **ENVIRONMENT,
        "PATH": f"{shim.parent}:{os.environ['PATH']}",
        "NBDCLONE_POOL": str(tmp_path / "pool"),
    }
    subprocess.run(["sh", "-e", "-c", commands], env=environment, cwd=tmp_path, check=True, timeout=60)
    assert Pool.open(tmp_path / "pool").names() == ["debian", "libvirt", "vm7", "web1", "web2"]
    compare(tmp_path / "web1.raw", tmp_path / "web1.qcow2", of=("raw", "qcow2"))
