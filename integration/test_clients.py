"""The programs that people use with NBD, each over a real socket, against `nbdclone serve`."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from integration.packages import program, require
from integration.served import Served, make_pool, nbdclone, save_export, served, sha256_of_file

pytestmark = pytest.mark.timeout(120)

MIB = 1 << 20
SIZE = 32 * MIB
DEADLINE_S = 60
WAYS = ("unix", "tcp")


def write_image(path: Path, seed: int = 0) -> Path:
    """Random bytes, with holes and with blocks of zeros that are no holes."""
    rng = random.Random(seed)
    with open(path, "wb") as file:
        file.truncate(SIZE)
        for start in range(0, SIZE, 2 * MIB):
            file.seek(start)
            file.write(rng.randbytes(MIB) if rng.random() < 0.7 else bytes(64 << 10))
    return path


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clients")


@pytest.fixture(scope="module")
def image(directory: Path) -> Path:
    return write_image(directory / "image.raw")


@pytest.fixture(scope="module")
def server(directory: Path, image: Path) -> Iterator[Served]:
    """A server on TCP and on a Unix socket."""
    pool = make_pool(directory / "pool", image, "spare")
    with served(pool, "--socket", directory / "nbd.sock", "--listen", "127.0.0.1:0") as server:
        yield server


@pytest.fixture
def clone(server: Served, directory: Path) -> Iterator[str]:
    """A fresh clone, made while the server runs."""
    name = f"clone{next(NUMBERS)}"
    nbdclone("--pool", directory / "pool", "clone", "base", name)
    yield name
    # What a program left open, it would be refused for: the server has to notice that its clients are gone.
    nbdclone("--pool", directory / "pool", "rm", name)


NUMBERS = itertools.count()


def run(*args: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [program(str(args[0])), *map(str, args[1:])]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=DEADLINE_S)
    assert not check or done.returncode == 0, f"{command} exited {done.returncode}:\n{done.stdout}{done.stderr}"
    return done


def uri(server: Served, export: str, way: str = "unix") -> str:
    if way == "tcp":
        return f"nbd://127.0.0.1:{server.port}/{export}"
    return f"nbd+unix:///{export}?socket={server.socket}"


# libnbd's programs


@pytest.mark.parametrize("way", WAYS)
def test_nbdinfo_tells_what_a_clone_is_and_can(server: Served, clone: str, way: str) -> None:
    require("libnbd-bin")
    told = json.loads(run("nbdinfo", "--json", uri(server, clone, way)).stdout)
    assert (told["protocol"], told["structured"]) == ("newstyle-fixed", True)
    [export] = told["exports"]
    expected: dict[str, Any] = {
        "export-name": clone,
        "export-size": SIZE,
        "is_read_only": False,
        "can_flush": True,
        "can_fua": True,
        "can_trim": True,
        "can_zero": True,
        "can_fast_zero": True,
        "can_cache": True,
        "can_df": True,
        "can_multi_conn": True,
        "block_size_minimum": 1,
        "block_size_preferred": 4096,
        "block_size_maximum": 32 * MIB,
    }
    assert {key: export[key] for key in expected} == expected


def test_nbdinfo_tells_that_the_base_is_read_only(server: Served) -> None:
    require("libnbd-bin")
    [export] = json.loads(run("nbdinfo", "--json", uri(server, "base")).stdout)["exports"]
    assert (export["is_read_only"], export["can_trim"], export["can_multi_conn"]) == (True, False, True)
    assert run("nbdinfo", "--is", "read-only", uri(server, "base")).returncode == 0
    assert run("nbdinfo", "--can", "write", uri(server, "base"), check=False).returncode == 2


@pytest.mark.parametrize("way", WAYS)
def test_nbdinfo_lists_every_export(server: Served, clone: str, way: str) -> None:
    require("libnbd-bin")
    told = json.loads(run("nbdinfo", "--list", "--json", uri(server, "", way)).stdout)
    assert {"base", "spare", clone} <= {export["export-name"] for export in told["exports"]}


@pytest.mark.parametrize(
    "can", ["connect", "write", "flush", "fua", "trim", "zero", "fast-zero", "cache", "multi-conn"]
)
def test_nbdinfo_can(server: Served, can: str) -> None:
    require("libnbd-bin")
    assert run("nbdinfo", "--can", can, uri(server, "spare")).returncode == 0


def test_nbdinfo_shows_the_size(server: Served) -> None:
    require("libnbd-bin")
    assert run("nbdinfo", "--size", uri(server, "spare")).stdout == f"{SIZE}\n"


def test_nbdinfo_shows_the_reason_why_there_is_no_such_export(server: Served) -> None:
    require("libnbd-bin")
    refused = run("nbdinfo", uri(server, "nothing"), check=False)
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("way", WAYS)
def test_nbdcopy_brings_an_image_there_and_back(server: Served, clone: str, directory: Path, way: str) -> None:
    require("libnbd-bin")
    content = write_image(directory / "content.raw", seed=1)
    there = uri(server, clone, way)
    run("nbdcopy", "--connections=4", "--flush", content, there)
    run("nbdcopy", "--connections=4", there, directory / "back.raw")
    assert sha256_of_file(directory / "back.raw") == sha256_of_file(content)
    assert sha256_of_file(save_export(uri(server, "spare"), directory / "spare.raw")) == sha256_of_file(
        directory / "image.raw"
    )


def test_nbdcopy_copies_from_clone_to_clone(server: Served, clone: str, directory: Path) -> None:
    require("libnbd-bin")
    other = f"{clone}-copy"
    nbdclone("--pool", directory / "pool", "clone", "base", other)
    run("qemu-io", "-f", "raw", "-c", "write -P 7 5M 3M", uri(server, clone))
    run("nbdcopy", "--connections=4", "--flush", uri(server, clone), uri(server, other, "tcp"))
    one = save_export(uri(server, clone), directory / "one.raw")
    two = save_export(uri(server, other), directory / "two.raw")
    assert sha256_of_file(one) == sha256_of_file(two)
    nbdclone("--pool", directory / "pool", "rm", other)


# qemu's programs


@pytest.mark.parametrize("way", WAYS)
def test_qemu_img_reads_a_clone_and_writes_one(server: Served, clone: str, directory: Path, way: str) -> None:
    require("qemu-utils")
    content = write_image(directory / "content.raw", seed=2)
    there = uri(server, clone, way)
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", content, there)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", content, there)
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", there, directory / "back.raw")
    assert sha256_of_file(directory / "back.raw") == sha256_of_file(content)


def test_qemu_img_makes_a_clone_from_qcow2_and_qcow2_from_a_clone(server: Served, clone: str, directory: Path) -> None:
    require("qemu-utils")
    content = write_image(directory / "content.raw", seed=3)
    qcow2 = directory / "content.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", content, qcow2)
    run("qemu-img", "convert", "-n", "-f", "qcow2", "-O", "raw", qcow2, uri(server, clone))
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", uri(server, clone), qcow2)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri(server, clone), directory / "back.qcow2")
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", directory / "back.qcow2", content)


def test_qemu_img_sees_a_raw_disk_of_the_right_size(server: Served) -> None:
    require("qemu-utils")
    told = json.loads(run("qemu-img", "info", "--output=json", uri(server, "spare")).stdout)
    assert (told["format"], told["virtual-size"]) == ("raw", SIZE)


@pytest.mark.parametrize("image_format", ["qcow2", "vmdk", "vdi", "vhdx"])
def test_an_image_of_another_format_is_imported_as_what_it_holds(
    server: Served, directory: Path, image: Path, image_format: str
) -> None:
    require("qemu-utils")
    source = directory / f"source.{image_format}"
    run("qemu-img", "convert", "-f", "raw", "-O", image_format, image, source)
    name = f"from-{image_format}"
    nbdclone("--pool", directory / "pool", "import", source, "--name", name)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", uri(server, name), image)


def test_a_qcow2_that_was_truncated_is_refused(directory: Path, server: Served, image: Path) -> None:
    require("qemu-utils")
    source = directory / "short.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", image, source)
    os.truncate(source, source.stat().st_size // 2)
    refused = nbdclone("--pool", directory / "pool", "import", source, check=False)
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"nbdclone: {source} is damaged or truncated: ")
    assert refused.stderr.count("\n") == 1


def qemu_io(there: str, *commands: str) -> str:
    args = [part for command in commands for part in ("-c", command)]
    done = run("qemu-io", "-f", "raw", *args, there)
    assert "failed" not in done.stdout, done.stdout  # a pattern that is not there does not make its status 1
    return done.stdout


@pytest.mark.parametrize("way", WAYS)
def test_qemu_io_finds_every_pattern_that_it_wrote(server: Served, clone: str, way: str) -> None:
    require("qemu-utils")
    there = uri(server, clone, way)
    qemu_io(
        there,
        "write -P 1 0 1M",
        "write -P 2 4096 4096",
        "write -P 3 512 512",  # within a block that was written
        "write -P 4 20481k 512",  # within one that was not
        "write -f -P 5 2M 64k",
        "write -z 3M 1M",
        "write -z -u 4M 1M",
        "write -P 6 5M 1M",
        "discard 5M 512k",
        "write -z -f 6291968 1024",
        "flush",
        "read -P 1 1536 2560",
    )
    qemu_io(
        there,
        "read -P 1 0 512",
        "read -P 3 512 512",
        "read -P 1 1024 3072",
        "read -P 2 4096 4096",
        "read -P 1 8192 1016k",
        "read -P 4 20481k 512",
        "read -P 5 2M 64k",
        "read -P 0 3M 2M",
        "read -P 0 5M 512k",
        "read -P 6 5632k 512k",
        "read -P 0 6291968 1024",
    )


def test_qemu_io_many_requests_in_flight(server: Served, clone: str) -> None:
    require("qemu-utils")
    writes = [f"aio_write -P {1 + number % 250} {number * 68}k 68k" for number in range(300)]
    reads = [f"aio_read -P {1 + number % 250} {number * 68}k 68k" for number in range(300)]
    qemu_io(uri(server, clone), *writes, "aio_flush", *reads, "aio_flush")


def test_qemu_io_cannot_write_to_the_base(server: Served) -> None:
    require("qemu-utils")
    refused = run("qemu-io", "-f", "raw", "-c", "write 0 512", uri(server, "base"), check=False)
    assert refused.returncode == 1
    assert "Permission denied" in refused.stderr


# fio


@pytest.mark.parametrize("way", WAYS)
def test_what_fio_wrote_from_several_jobs_is_there_and_still_is_after_a_restart(
    directory: Path, image: Path, way: str
) -> None:
    require("fio")
    pool = make_pool(directory / f"fio-{way}", image, "disk")
    where = ("--listen", "127.0.0.1:0") if way == "tcp" else ("--socket", directory / f"fio-{way}.sock")

    def fio(there: str, *more: str) -> None:
        jobs = ("--numjobs=4", "--size=8M", "--offset_increment=8M", "--iodepth=16", "--group_reporting")
        verify = (
            "--verify=crc32c",
            "--verify_fatal=1",
            "--randseed=7",
            "--bsrange=512-96k",
            "--blockalign=512",
            "--verify_state_save=0",
        )
        run("fio", "--name=disk", "--ioengine=nbd", f"--uri={there}", "--rw=randwrite", *jobs, *verify, *more)

    with served(pool, *where) as server:
        fio(server.uri("disk"), "--do_verify=1", "--end_fsync=1")
    with served(pool, *where) as server:
        fio(server.uri("disk"), "--verify_only")


# libnbd from Python


def nbdsh(there: str, script: str) -> str:
    """Run a script with ``h``, a handle that is not connected yet, and ``uri``; what it printed."""
    require("python3-libnbd")
    command = ["/usr/bin/python3", "-c", f"import nbd\nh = nbd.NBD()\nuri = {there!r}\n{script}"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


ERRORS = """
h.set_strict_mode(0)  # have the server judge, not the library
h.set_request_structured_replies({structured})
h.connect_uri(uri)
assert h.get_structured_replies_negotiated() == {structured}
size = h.get_size()
before = bytes(h.pread(512, 0))

def refused(number, call, *args):
    try:
        call(*args)
    except nbd.Error as error:
        assert error.errno == number, (error.errno, number, args)
    else:
        raise AssertionError((number, args))
    assert bytes(h.pread(512, 0)) == before
"""


@pytest.mark.parametrize("structured", [True, False])
def test_libnbd_hears_the_errors_that_the_protocol_wants(server: Served, clone: str, structured: bool) -> None:
    nbdsh(
        uri(server, clone),
        ERRORS.format(structured=structured)
        + """
refused("EINVAL", h.pread, 512, size)
refused("EINVAL", h.pread, 1024, size - 512)
refused("ENOSPC", h.pwrite, bytes(512), size)
refused("ENOSPC", h.pwrite, bytes(100_000), size - 512)
refused("ENOSPC", h.zero, 1024, size - 512)
refused("EINVAL", h.trim, 1024, size - 512)
refused("EINVAL", h.cache, 1024, size - 512)
refused("ENOTSUP", h.zero, 4096, 0, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE)
refused("EINVAL", h.pwrite, bytes(512), 0, nbd.CMD_FLAG_NO_HOLE)
refused("EINVAL", h.pread, bytes(512).__len__(), 0, nbd.CMD_FLAG_REQ_ONE)
h.pwrite(b"x" * 512, size - 512, nbd.CMD_FLAG_FUA)
assert h.pread(512, size - 512) == b"x" * 512
h.shutdown()
""",
    )


@pytest.mark.parametrize("structured", [True, False])
def test_libnbd_is_refused_every_change_of_the_base(server: Served, structured: bool) -> None:
    nbdsh(
        uri(server, "base"),
        ERRORS.format(structured=structured)
        + """
assert h.is_read_only()
refused("EPERM", h.pwrite, bytes(512), 0)
refused("EPERM", h.trim, 512, 0)
refused("EPERM", h.zero, 512, 0)
h.flush()
h.shutdown()
""",
    )


def test_libnbd_is_told_why_an_export_is_refused_and_tries_another(server: Served) -> None:
    told = nbdsh(
        uri(server, ""),
        """
h.set_opt_mode(True)
h.connect_unix(uri.partition("socket=")[2])
h.set_export_name("nothing")
try:
    h.opt_go()
except nbd.Error as error:
    print(error.string)
h.set_export_name("spare")
h.opt_go()
assert len(h.pread(4096, 0)) == 4096
h.shutdown()
""",
    )
    assert told.endswith(": No such file or directory\n")  # libnbd's word for an export that is unknown


def test_libnbd_many_requests_in_flight_on_many_handles(server: Served, clone: str) -> None:
    nbdsh(
        uri(server, clone),
        """
import random
rng = random.Random(1)
handles = [nbd.NBD() for _ in range(4)]
for h in handles:
    h.connect_uri(uri)
assert h.can_multi_conn()
expected = {}
cookies = []
for number in range(400):
    at = number * 64 * 1024 + rng.randrange(4096)
    data = rng.randbytes(rng.choice([1, 512, 4096, 40_000]))
    expected[at] = data
    h = handles[number % 4]
    cookies.append((h, h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), at)))
for h in handles:
    while h.aio_in_flight():
        h.poll(-1)
for h, cookie in cookies:
    assert h.aio_command_completed(cookie)
handles[0].flush()
for number, (at, data) in enumerate(expected.items()):
    assert handles[(number + 1) % 4].pread(len(data), at) == data
for h in handles:
    h.shutdown()
""",
    )


def test_the_largest_write_of_the_reference_suite_is_taken(server: Served, directory: Path) -> None:
    nbdclone("--pool", directory / "pool", "clone", "base", "large", "--size", "64M")
    nbdsh(
        uri(server, "large"),
        """
import os
h.set_strict_mode(0)
h.connect_uri(uri)
data = os.urandom(49_865_728 // 64) * 64
h.pwrite(data, 4097)
assert h.pread(len(data), 4097) == data
h.shutdown()
""",
    )
    nbdclone("--pool", directory / "pool", "rm", "large")


def test_nothing_that_was_done_to_clones_has_changed_the_base(server: Served, directory: Path, image: Path) -> None:
    require("libnbd-bin")
    saved = save_export(uri(server, "base"), directory / "base.raw")
    assert sha256_of_file(saved) == sha256_of_file(image)
