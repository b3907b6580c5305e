"""The command line: every verb, what it prints, and one line for everything that a user can get wrong."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import stat
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

from nbdclone import __version__, cli
from nbdclone.store import check as store_check
from nbdclone.store.delta_file import CHECKSUM, HEADER_SLOTS, PAGE_SIZE
from nbdclone.store.finding import Finding
from nbdclone.store.pool import Pool
from nbdclone.store.trace import Trace

IMAGE = random.Random("cli").randbytes(1 << 20)
DEADLINE_S = 30
COMMAND = (sys.executable, "-m", "nbdclone")


class Done(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "debian.raw"
    path.write_bytes(IMAGE)
    return path


@pytest.fixture
def nbdclone(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """The program in this process, on a pool in tmp_path unless told where."""
    kept = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("COLUMNS", "200")  # what click wraps its errors to

    def run(*args: str | Path, pool: Path | None = tmp_path / "pool") -> Done:
        before = () if pool is None else ("--pool", str(pool))
        monkeypatch.setattr(sys, "argv", ["nbdclone", *before, *map(str, args)])
        capfd.readouterr()
        try:
            cli.main()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            signal.signal(signal.SIGTERM, kept)
        return Done(status, *capfd.readouterr())

    return run


@pytest.fixture
def pool(nbdclone: Callable[..., Done], image: Path, tmp_path: Path) -> Pool:
    assert nbdclone("import", image).status == 0
    assert nbdclone("clone", "debian", "web1", "web2").status == 0
    return Pool.open(tmp_path / "pool")


def assert_refused(done: Done, pattern: str) -> None:
    """One line on stderr, of this program, that says this; nothing on stdout; exit status 1."""
    assert done.status == 1, done
    assert done.out == ""
    assert re.fullmatch(rf"nbdclone: .*{pattern}.*\n", done.err), done.err


# The verbs


def test_import_makes_a_base_of_the_files_name(nbdclone: Callable[..., Done], image: Path) -> None:
    assert nbdclone("import", image) == (0, "base 'debian': 1 MiB, 1 MiB on disk\n", "")
    assert nbdclone("import", image, "--name", "other").out.startswith("base 'other': ")


def test_import_does_not_touch_the_file(nbdclone: Callable[..., Done], image: Path) -> None:
    before = image.stat()
    nbdclone("import", image)
    assert image.read_bytes() == IMAGE
    assert (image.stat().st_mtime_ns, image.stat().st_mode) == (before.st_mtime_ns, before.st_mode)


def test_clone_makes_one_or_many(nbdclone: Callable[..., Done], image: Path) -> None:
    nbdclone("import", image)
    assert nbdclone("clone", "debian", "one") == (0, "clone 'one' of 'debian': 1 MiB\n", "")
    assert nbdclone("clone", "debian", "two", "three") == (0, "2 clones of 'debian': 1 MiB each\n", "")
    assert nbdclone("clone", "debian", "four", "--size", "20G") == (0, "clone 'four' of 'debian': 20 GiB\n", "")


def test_trace_says_what_a_boot_reads_and_drops_it(nbdclone: Callable[..., Done], pool: Pool) -> None:
    assert nbdclone("trace", "debian") == (0, "base 'debian': no boot was recorded yet\n", "")
    assert json.loads(nbdclone("trace", "debian", "--json").out) is None
    trace = Trace(bytes(16), 1_700_000_000 * 10**9, (7, 5, 6, 1))
    path = pool.path / "bases" / "debian" / "boot.trace"
    path.write_bytes(trace.dump())
    assert nbdclone("trace", "debian").out.startswith(
        "base 'debian': a boot reads 256 KiB in 2 piece(s) (recorded 2023-11-1"
    )
    assert json.loads(nbdclone("trace", "debian", "--json").out) == {"bytes": 262144, "runs": 2, "created": 1.7e9}
    path.write_bytes(b"x")
    assert_refused(nbdclone("trace", "debian"), r"boot\.trace: damaged")
    assert nbdclone("trace", "debian", "--drop") == (0, "base 'debian': the trace was removed\n", "")
    assert nbdclone("trace", "debian", "--drop") == (0, "base 'debian': there is no trace\n", "")
    assert_refused(nbdclone("trace", "web1"), "'web1' is a clone")
    assert_refused(nbdclone("trace", "nosuch", "--drop"), "there is no base 'nosuch'")


def test_ls_shows_bases_and_clones_in_columns(nbdclone: Callable[..., Done], pool: Pool) -> None:
    done = nbdclone("ls")
    assert (done.status, done.err) == (0, "")
    header, base, web1, web2 = [line.split() for line in done.out.splitlines()]
    assert header == ["NAME", "KIND", "PARENT", "SIZE", "ON", "DISK", "QUOTA", "CREATED", "STATE"]
    assert base[:5] == ["debian", "base", "-", "1", "MiB"]
    assert base[-2:] == ["2", "clones"]
    assert [line[:5] for line in (web1, web2)] == [[name, "clone", "debian", "1", "MiB"] for name in ("web1", "web2")]


def test_ls_of_an_empty_pool_is_empty(nbdclone: Callable[..., Done], tmp_path: Path) -> None:
    Pool.open(tmp_path / "pool", create=True)
    assert nbdclone("ls").status == 0
    assert json.loads(nbdclone("ls", "--json").out) == []


def test_ls_in_a_pipe_cuts_nothing_off(nbdclone: Callable[..., Done], pool: Pool) -> None:
    name = "a" * 100
    nbdclone("clone", "debian", name)
    assert name in nbdclone("ls").out


CLONE_KEYS = {
    "kind", "name", "id", "size", "allocated", "created", "parent", "quota", "in_use_by", "error", "base", "snapshots",
    "ephemeral",
}  # fmt: skip
BASE_KEYS = {"kind", "name", "id", "size", "allocated", "created", "fingerprint", "source", "clones", "error"}


def test_ls_as_json(nbdclone: Callable[..., Done], pool: Pool, image: Path) -> None:
    base, web1, web2 = json.loads(nbdclone("ls", "--json").out)
    assert set(base) == BASE_KEYS
    assert set(web1) == set(web2) == CLONE_KEYS
    assert (base["kind"], base["name"], base["size"], base["error"]) == ("base", "debian", 1 << 20, None)
    assert (base["source"], base["clones"]) == (str(image), ["web1", "web2"])
    assert (web1["kind"], web1["name"], web1["parent"], web1["size"]) == ("clone", "web1", "debian", 1 << 20)
    assert (web1["in_use_by"], web1["error"]) == (None, None)
    assert time.time() - 60 < base["created"] <= web1["created"] <= time.time()
    assert len({base["id"], web1["id"], web2["id"]}) == 3


def test_on_a_terminal_the_head_is_bold_and_no_line_is_wider(pool: Pool) -> None:
    command = f"stty cols 40; {sys.executable} -m nbdclone --pool {pool.path} ls"
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    done = subprocess.run(
        ["script", "-qec", command, "/dev/null"],
        env=environment, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    head, *lines = done.stdout.splitlines()
    assert head.startswith("\x1b[1mNAME")
    assert head.endswith("…\x1b[0m")
    assert len(lines) == 3
    assert all(len(line) == 40 and line.endswith("…") for line in lines)


def test_info_as_json_is_the_entry_of_ls(nbdclone: Callable[..., Done], pool: Pool) -> None:
    for entry in json.loads(nbdclone("ls", "--json").out):
        assert json.loads(nbdclone("info", entry["name"], "--json").out) == entry


def test_info_tells_a_person_the_same(nbdclone: Callable[..., Done], pool: Pool) -> None:
    told = dict(line.split(":", 1) for line in nbdclone("info", "web1").out.splitlines())
    assert told["kind"].strip() == "clone"
    assert told["size"].strip() == "1 MiB (1048576 bytes)"
    assert told["parent"].strip() == "debian"
    assert "error" not in told
    assert "clones:      web1, web2" in nbdclone("info", "debian").out


def test_tree_draws_clones_under_their_base(nbdclone: Callable[..., Done], pool: Pool) -> None:
    lines = nbdclone("tree").out.splitlines()
    assert [re.split(r"  +", line)[0] for line in lines] == ["debian", "├── web1", "└── web2"]


def test_tree_as_json_nests_clones_in_their_base(nbdclone: Callable[..., Done], pool: Pool) -> None:
    [base] = json.loads(nbdclone("tree", "--json").out)
    assert set(base) == BASE_KEYS | {"children"}
    assert [clone["name"] for clone in base["children"]] == ["web1", "web2"]
    assert set(base["children"][0]) == CLONE_KEYS | {"children"}


def test_rm_removes_clones_and_then_their_base(nbdclone: Callable[..., Done], pool: Pool) -> None:
    assert nbdclone("rm", "web1") == (0, "", "")
    assert pool.names() == ["debian", "web2"]
    assert nbdclone("rm", "debian", "web2") == (0, "", "")
    assert pool.names() == []


def test_check_of_a_sound_pool_says_so(nbdclone: Callable[..., Done], pool: Pool) -> None:
    assert nbdclone("check") == (0, "all is well\n", "")
    assert nbdclone("check", "web1", "--deep", "--repair") == (0, "all is well\n", "")
    assert nbdclone("check", "--json") == (0, "[]\n", "")


def rot(pool: Pool, name: str, slot: int) -> Path:
    delta = pool.path / "clones" / name / "delta"
    with open(delta, "r+b") as file:
        file.seek(slot + 40)
        file.write(b"rot")
    return delta


def test_check_tells_what_is_wrong_in_a_line_each_and_exits_1_until_it_is_repaired(
    nbdclone: Callable[..., Done], pool: Pool
) -> None:
    delta = rot(pool, "web1", HEADER_SLOTS[0])
    rot(pool, "web2", HEADER_SLOTS[1])
    done = nbdclone("check")
    assert (done.status, done.err) == (1, "")
    first, second, count = done.out.splitlines()
    assert first == (
        f"web1: wrong: slot A of the header cannot be used: its header fails its checksum ({delta}, bytes 0-4095): "
        f"slot B serves, and --repair copies it"
    )
    assert second.startswith("web2: wrong: slot B of the header cannot be used")
    assert count == "2 wrong, 0 of them repaired"
    assert nbdclone("check", "web2").out.splitlines() == [second, "1 wrong, 0 of them repaired"]

    done = nbdclone("check", "--repair", "web1")
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith("web1: repaired: ")
    assert f"(as it was: {delta}.before-repair-1)\n1 wrong, 1 of them repaired\n" in done.out
    assert nbdclone("check").out.splitlines() == [second, "1 wrong, 0 of them repaired"]


RECORD_KEYS = {"name", "level", "kind", "what", "where", "todo", "ranges", "repaired", "kept"}


def test_check_as_json_gives_records(nbdclone: Callable[..., Done], pool: Pool) -> None:
    edit_base(pool)
    done = nbdclone("check", "--deep", "--json")
    assert done.status == 1
    base, web1, web2 = json.loads(done.out)
    assert set(base) == set(web1) == set(web2) == RECORD_KEYS
    assert (base["name"], base["kind"], base["level"], base["repaired"]) == (
        "debian",
        "content-changed",
        "wrong",
        False,
    )
    assert base["ranges"] == [{"offset": 0, "length": 1 << 20}]
    assert (web1["name"], web1["kind"]) == ("web1", "hurt")
    (pool.path / "notes").touch()
    [note, *_] = json.loads(nbdclone("check", "--json").out)
    assert (note["name"], note["kind"], note["level"]) == (None, "foreign", "note")


def test_check_of_a_pool_that_is_in_use_is_all_right(nbdclone: Callable[..., Done], pool: Pool) -> None:
    with pool.open_clone("web1"):
        done = nbdclone("check")
    assert done.status == 0
    assert done.out.splitlines()[0].startswith(f"web1: note: it is open in this process ({os.getpid()})")
    assert done.out.splitlines()[1:] == ["all is well"]


def test_what_was_found_is_told_although_the_check_cannot_go_on(
    nbdclone: Callable[..., Done], pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rot(pool, "web1", HEADER_SLOTS[0])
    check_pool = store_check.check_pool

    def stop(*args: Any, **wishes: Any) -> Iterator[Finding]:
        yield from check_pool(*args, **wishes)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(store_check, "check_pool", stop)
    done = nbdclone("check", "--repair")
    assert done.status == 1
    assert done.out.startswith("web1: repaired: ")
    assert done.err == "nbdclone: Input/output error\n"


def test_check_of_a_name_that_is_not_there_is_refused(nbdclone: Callable[..., Done], pool: Pool) -> None:
    assert_refused(nbdclone("check", "web1", "nothing"), "there is no base, clone or snapshot 'nothing'")
    assert_refused(nbdclone("check", "../web1"), "there is no base, clone or snapshot '../web1'")


def test_a_quota_is_shown_changed_and_taken_away(nbdclone: Callable[..., Done], pool: Pool) -> None:
    assert nbdclone("clone", "debian", "small", "--quota", "2M").status == 0
    assert json.loads(nbdclone("info", "small", "--json").out)["quota"] == 2 << 20
    assert "quota:     2 MiB (2097152 bytes)" in nbdclone("info", "small").out
    assert [line.split()[7:9] for line in nbdclone("ls").out.splitlines() if "small" in line] == [["2", "MiB"]]
    assert nbdclone("quota", "small", "3G") == (0, "clone 'small' may take 3 GiB, and has 16 KiB on disk\n", "")
    with pool.open_clone("small"):  # also while it is open
        assert nbdclone("quota", "small", "none").out == "clone 'small' has no quota, and has 16 KiB on disk\n"
    assert json.loads(nbdclone("info", "small", "--json").out)["quota"] is None
    assert "quota" not in nbdclone("info", "small").out


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (("quota", "debian", "1G"), 1, "'debian' is a base: only clones have a quota"),
        (("quota", "nowhere", "1G"), 1, "there is no base or clone 'nowhere'"),
        (("quota", "web1", "100"), 1, "a quota is from 4096 to 9223372036854775807 bytes, not 100"),
        (("quota", "web1", "99999999T"), 1, "a quota is from 4096 to"),
        (("quota", "web1", "0"), 2, "a quota of nothing"),
        (("quota", "web1", "much"), 2, "is no size"),
        (("clone", "debian", "x", "--quota", "4095"), 1, "a quota is from 4096 to"),
    ],
)
def test_what_is_no_quota_is_refused(
    nbdclone: Callable[..., Done], pool: Pool, args: tuple[str, ...], status: int, message: str
) -> None:
    done = nbdclone(*args)
    assert done.status == status
    assert message in " ".join(done.err.split())
    assert pool.info("web1").quota is None  # type: ignore[union-attr]


def test_a_clone_that_is_open_is_shown_with_its_process(nbdclone: Callable[..., Done], pool: Pool) -> None:
    with pool.open_clone("web1"):
        assert f"open in this process ({os.getpid()})" in nbdclone("ls").out
        assert json.loads(nbdclone("info", "web1", "--json").out)["in_use_by"] == f"this process ({os.getpid()})"


def test_version_is_the_packages(nbdclone: Callable[..., Done]) -> None:
    assert nbdclone("--version", pool=None) == (0, f"nbdclone {__version__}\n", "")


def test_help_names_every_verb(nbdclone: Callable[..., Done]) -> None:
    shown = nbdclone("--help", pool=None)
    assert shown.status == 0
    for verb in ("import", "clone", "ls", "tree", "info", "rm", "check", "serve", "demo"):
        assert re.search(rf"^ +{verb} +\S", shown.out, re.M), verb
        assert nbdclone(verb, "--help", pool=None).status == 0


# Where the pool is


@pytest.mark.parametrize(
    ("environment", "user", "expected"),
    [
        ({"NBDCLONE_POOL": "/srv/pool", "XDG_DATA_HOME": "/data", "HOME": "/home/me"}, 0, "/srv/pool"),
        ({"NBDCLONE_POOL": "/srv/pool", "HOME": "/home/me"}, 1000, "/srv/pool"),
        ({"NBDCLONE_POOL": "", "XDG_DATA_HOME": "/data"}, 0, "/var/lib/nbdclone"),
        ({"XDG_DATA_HOME": "/data", "HOME": "/home/me"}, 1000, "/data/nbdclone"),
        ({"HOME": "/home/me"}, 1000, "/home/me/.local/share/nbdclone"),
        ({"XDG_DATA_HOME": "", "HOME": "/home/me"}, 1000, "/home/me/.local/share/nbdclone"),
    ],
)
def test_the_default_pool(environment: dict[str, str], user: int, expected: str) -> None:
    assert cli.default_pool(environment, user) == Path(expected)


def test_pool_option_goes_before_the_environment(
    nbdclone: Callable[..., Done], pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NBDCLONE_POOL", str(pool.path))
    assert len(json.loads(nbdclone("ls", "--json", pool=None).out)) == 3
    Pool.open(tmp_path / "other", create=True)
    assert json.loads(nbdclone("ls", "--json", pool=tmp_path / "other").out) == []


# Sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("512B", 512),
        ("1k", 1 << 10),
        ("3K", 3 << 10),
        ("512M", 512 << 20),
        ("20G", 20 << 30),
        ("20GiB", 20 << 30),
        ("20gb", 20 << 30),
        ("2T", 2 << 40),
    ],
)
def test_sizes_are_read_in_powers_of_1024(text: str, size: int) -> None:
    assert cli.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "1.5G", "1 G", "1P", "0x10", "1Gi B", "ten", "1_000"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is no size: give bytes, or a number with K, M, G or T"):
        cli.parse_size(text)


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (10_000, "9.77 KiB"),
        (1 << 20, "1 MiB"),
        ((1 << 20) - 1, "1024 KiB"),
        (1000 << 10, "1000 KiB"),
        (20 << 30, "20 GiB"),
        (1 << 40, "1 TiB"),
        (16 << 40, "16 TiB"),
        (5000 << 40, "5000 TiB"),
    ],
)
def test_sizes_are_shown_with_about_three_digits(size: int, shown: str) -> None:
    assert cli.show_size(size) == shown


# What can be got wrong: the command


@pytest.mark.parametrize(
    "args",
    [
        ("frobnicate",),
        ("ls", "--frobnicate"),
        ("import",),
        ("clone", "debian"),
        ("clone", "debian", "x", "--size", "big"),
        ("info",),
        ("rm",),
        ("serve", "extra"),
        ("serve", "--listen", "host:port"),
        ("serve", "--listen", ""),
        ("--pool",),
    ],
)
def test_a_command_that_cannot_be_understood_exits_2(nbdclone: Callable[..., Done], args: tuple[str, ...]) -> None:
    done = nbdclone(*args, pool=None)
    assert (done.status, done.out) == (2, "")
    assert "Error: " in done.err
    assert "Traceback" not in done.err


def test_without_a_command_the_help_is_shown(nbdclone: Callable[..., Done]) -> None:
    done = nbdclone(pool=None)
    assert done.status == 2
    assert "Linked clones of disk images" in done.out + done.err


# What can be got wrong: images


def sized(path: Path, size: int) -> Path:
    path.touch()
    os.truncate(path, size)
    return path


def truncated_ext4(path: Path) -> Path:
    """A file system that says it has more blocks than there are."""
    superblock = bytearray(1024)
    struct.pack_into("<I", superblock, 4, 4096)
    struct.pack_into("<I", superblock, 24, 2)
    struct.pack_into("<H", superblock, 56, 0xEF53)
    path.write_bytes(bytes(1024) + superblock + bytes((1 << 20) - 2048))
    return path


def directory(path: Path) -> Path:
    path.mkdir()
    return path


def device(path: Path) -> Path:
    path.symlink_to("/dev/null")
    return path


IMAGES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda path: path, "disk.raw: no such file"),
    "empty": (lambda path: sized(path, 0), "disk.raw is empty"),
    "odd": (lambda path: sized(path, 1_000_001), "disk.raw has 1000001 bytes, .*truncated, or not a disk image"),
    "tiny": (lambda path: sized(path, 512), "disk.raw has 512 bytes; a base has 4096"),
    "truncated": (truncated_ext4, "disk.raw is truncated: it has 1048576 bytes, .* reaches to 16777216"),
    "directory": (directory, "disk.raw is neither a file nor a block device"),
    "device": (device, "disk.raw is neither a file nor a block device"),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_what_is_no_image_is_refused_and_leaves_nothing(
    nbdclone: Callable[..., Done], tmp_path: Path, kind: str
) -> None:
    make, pattern = IMAGES[kind]
    assert_refused(nbdclone("import", make(tmp_path / "disk.raw")), pattern)
    assert Pool.open(tmp_path / "pool").names() == []
    assert os.listdir(tmp_path / "pool" / ".tmp") == []


def test_a_truncated_image_is_imported_by_force(nbdclone: Callable[..., Done], tmp_path: Path) -> None:
    assert nbdclone("import", truncated_ext4(tmp_path / "disk.raw"), "--force").status == 0


def test_a_qcow2_that_is_none_is_refused(nbdclone: Callable[..., Done], tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(b"QFI\xfb" + bytes(65532))
    assert_refused(nbdclone("import", path), r"disk\.qcow2 ")


# What can be got wrong: names

BAD_NAMES = ["a/b", "..", ".", ".hidden", "-x", "a b", "", "x" * 101, "x" * 300, "web@snap", "größe", "a\nb"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_what_cannot_be_a_name_is_refused_with_what_can(
    nbdclone: Callable[..., Done], pool: Pool, image: Path, name: str
) -> None:
    wanted = r"cannot be a name: 1 to 100 letters, digits, '\.', '-' and '_', the first a letter or digit"
    assert_refused(nbdclone("import", image, f"--name={name}"), wanted)
    assert_refused(nbdclone("clone", "debian", "good", "--", name), wanted)
    assert pool.names() == ["debian", "web1", "web2"]


def test_a_file_whose_name_is_none_asks_for_one(nbdclone: Callable[..., Done], tmp_path: Path) -> None:
    path = tmp_path / "my disk.raw"
    path.write_bytes(IMAGE)
    assert_refused(nbdclone("import", path), "'my disk' cannot be a name")


def test_a_name_that_is_taken_is_refused(nbdclone: Callable[..., Done], pool: Pool, image: Path) -> None:
    assert_refused(nbdclone("import", image), "there is a base 'debian' in .* already")
    assert_refused(nbdclone("import", image, "--name", "web1"), "there is a clone 'web1' in .* already")
    assert_refused(nbdclone("clone", "debian", "new", "web1"), "there is a clone 'web1' in .* already")
    assert_refused(nbdclone("clone", "debian", "new", "new"), "the name 'new' is given twice")
    assert pool.names() == ["debian", "web1", "web2"]


@pytest.mark.parametrize(
    ("args", "pattern"),
    [
        (("clone", "ubuntu", "x"), "there is no base or clone 'ubuntu'"),
        (("clone", "../bases/debian", "x"), r"there is no base or clone '\.\./bases/debian'"),
        (("clone", "web1", "x"), "'web1' is a clone: clones are made from bases"),
        (("info", "web9"), "there is no base or clone 'web9'"),
        (("info", ".."), r"there is no base or clone '\.\.'"),
        (("info", ""), "there is no base or clone ''"),
        (("rm", "web1", "web9"), "there is no base or clone 'web9'"),
        (("rm", "../../debian.raw"), "there is no base or clone"),
        (("rm", "."), "there is no base or clone"),
    ],
)
def test_unknown_names_are_refused(
    nbdclone: Callable[..., Done], pool: Pool, args: tuple[str, ...], pattern: str
) -> None:
    assert_refused(nbdclone(*args), pattern)
    assert pool.names() == ["debian", "web1", "web2"]


def test_a_base_in_use_stays_and_the_error_names_its_clones(nbdclone: Callable[..., Done], pool: Pool) -> None:
    assert_refused(nbdclone("rm", "debian"), r"base 'debian' is needed by 2 clone\(s\): web1, web2")
    assert_refused(nbdclone("rm", "debian", "web1"), r"base 'debian' is needed by 1 clone\(s\): web2")
    assert pool.names() == ["debian", "web1", "web2"]


def test_a_clone_that_is_open_stays_and_the_error_names_the_process(nbdclone: Callable[..., Done], pool: Pool) -> None:
    with pool.open_clone("web1"):
        assert_refused(nbdclone("rm", "web2", "web1"), rf"clone 'web1' is in use by this process \({os.getpid()}\)")
    assert pool.names() == ["debian", "web1", "web2"]


@pytest.mark.parametrize(
    ("size", "pattern"),
    [
        ("512K", "a clone of 'debian' has at least its 1048576 bytes, not 524288"),
        ("1048577", "a size is a multiple of 512"),
        ("17T", "a size is a multiple of 512 from 4096 to"),
    ],
)
def test_a_size_that_a_clone_cannot_have_is_refused(
    nbdclone: Callable[..., Done], pool: Pool, size: str, pattern: str
) -> None:
    assert_refused(nbdclone("clone", "debian", "x", "--size", size), pattern)


# What can be got wrong: the pool


@pytest.mark.parametrize("args", [("ls",), ("tree",), ("info", "x"), ("rm", "x"), ("clone", "x", "y"), ("check",)])
def test_a_directory_that_is_no_pool_is_refused_with_how_to_make_one(
    nbdclone: Callable[..., Done], tmp_path: Path, args: tuple[str, ...]
) -> None:
    for place in (tmp_path, tmp_path / "missing"):
        assert_refused(nbdclone(*args, pool=place), f"{place} is not a pool: .*import FILE' makes one")
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize("verb", ["import", "serve"])
def test_a_pool_is_not_made_in_a_directory_with_other_things(
    nbdclone: Callable[..., Done], tmp_path: Path, image: Path, verb: str
) -> None:
    args = ("import", image) if verb == "import" else ("serve",)
    assert_refused(nbdclone(*args, pool=tmp_path), "is not a pool, and not empty: give a directory of its own")
    assert os.listdir(tmp_path) == ["debian.raw"]


@pytest.mark.parametrize("verb", ["import", "serve", "ls"])
def test_a_pool_path_that_is_a_file_is_refused(
    nbdclone: Callable[..., Done], tmp_path: Path, image: Path, verb: str
) -> None:
    args = {"import": ("import", image), "serve": ("serve",), "ls": ("ls",)}[verb]
    assert_refused(nbdclone(*args, pool=image), f"{image} is not a")
    assert_refused(nbdclone(*args, pool=image / "pool"), f"{image}/pool")


def test_a_pool_that_cannot_be_written_is_refused(nbdclone: Callable[..., Done], image: Path) -> None:
    assert_refused(nbdclone("import", image, pool=Path("/proc/nbdclone")), "/proc/nbdclone")


# Damage


def damage_headers(pool: Pool, name: str) -> None:
    with open(pool.path / "clones" / name / "delta", "r+b") as file:
        for slot in HEADER_SLOTS:
            file.seek(slot + 100)
            file.write(b"\xff" * 8)


def make_newer(pool: Pool, name: str) -> None:
    """Write the headers of a later format, with a checksum that is right."""
    with open(pool.path / "clones" / name / "delta", "r+b") as file:
        for slot in HEADER_SLOTS:
            file.seek(slot)
            page = bytearray(file.read(PAGE_SIZE))
            struct.pack_into(">I", page, 8, 2)
            page[-CHECKSUM.size :] = CHECKSUM.pack(zlib.crc32(page[: -CHECKSUM.size]))
            file.seek(slot)
            file.write(page)


@pytest.mark.parametrize(
    ("damage", "said"),
    [(damage_headers, "its header fails its checksum"), (make_newer, r"made by a newer nbdclone \(format 2")],
)
def test_a_clone_whose_header_cannot_be_read_is_listed_with_its_error_and_the_others_are_fine(
    nbdclone: Callable[..., Done], pool: Pool, damage: Callable[[Pool, str], None], said: str
) -> None:
    damage(pool, "web1")
    entries: dict[str, dict[str, Any]] = {e["name"]: e for e in json.loads(nbdclone("ls", "--json").out)}
    assert re.search(said, entries["web1"]["error"])
    assert (entries["web2"]["error"], entries["debian"]["error"]) == (None, None)
    assert re.search(rf"^web1 .*{said}", nbdclone("ls").out, re.M)
    assert re.search(rf"^error: .*{said}", nbdclone("info", "web1").out, re.M)
    assert re.search(rf"^web1 .*{said}", nbdclone("tree").out, re.M)
    assert nbdclone("clone", "debian", "web3").status == 0
    assert nbdclone("rm", "web1") == (0, "", "")


def test_a_base_whose_record_cannot_be_read_is_listed_with_its_error(nbdclone: Callable[..., Done], pool: Pool) -> None:
    (pool.path / "bases" / "debian" / "base.json").write_text("{")
    entries = {e["name"]: e["error"] for e in json.loads(nbdclone("ls", "--json").out)}
    assert "base.json: damaged" in entries["debian"]
    assert "its base 'debian'" in entries["web1"]
    assert_refused(nbdclone("clone", "debian", "web3"), "base.json: damaged")


def edit_base(pool: Pool) -> None:
    image = pool.path / "bases" / "debian" / "image"
    image.chmod(stat.S_IRUSR | stat.S_IWUSR)
    with open(image, "r+b") as file:
        file.write(b"edited")


def test_a_base_that_was_edited_makes_no_clones(nbdclone: Callable[..., Done], pool: Pool) -> None:
    edit_base(pool)
    assert_refused(
        nbdclone("clone", "debian", "web3"), "base 'debian' was changed after its import .*differs in bytes 0-1048575"
    )
    assert pool.names() == ["debian", "web1", "web2"]


# Pipes and signals


@pytest.mark.parametrize("args", [("ls",), ("ls", "--json"), ("tree",), ("info", "web1"), ("--help",), ("--version",)])
def test_a_pipe_that_nobody_reads_is_left_quietly(pool: Pool, args: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [*COMMAND, "--pool", str(pool.path), *args]
    done = subprocess.run(command, check=False, stdout=writing, stderr=subprocess.PIPE, timeout=DEADLINE_S)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


def test_the_first_line_of_a_long_list_may_be_all_that_is_read(nbdclone: Callable[..., Done], pool: Pool) -> None:
    nbdclone("clone", "debian", *[f"clone{number}" for number in range(300)])
    script = f"{sys.executable} -m nbdclone --pool {pool.path} ls --json | head -1"
    done = subprocess.run(script, shell=True, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert (done.stdout, done.stderr) == ("[\n", "")


@pytest.fixture
def long_import(tmp_path: Path) -> subprocess.Popen[str]:
    """An import that has come half way and waits there."""
    program = f"""
import os, sys, time
from nbdclone import cli
from nbdclone.store import importing
copied = importing._copy
def copy(source_fd, size, target, *rest):
    result = copied(source_fd, size, target, *rest)
    print("half way", flush=True)
    time.sleep({DEADLINE_S})
    return result
importing._copy = copy
sys.argv = ["nbdclone", "--pool", {str(tmp_path / "pool")!r}, "import", {str(tmp_path / "debian.raw")!r}]
cli.main()
"""
    (tmp_path / "debian.raw").write_bytes(IMAGE)
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "half way\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_import_that_is_told_to_stop_leaves_nothing_behind(
    tmp_path: Path, long_import: subprocess.Popen[str], number: signal.Signals
) -> None:
    assert len(os.listdir(tmp_path / "pool" / ".tmp")) == 1
    long_import.send_signal(number)
    _, err = long_import.communicate(timeout=DEADLINE_S)
    assert long_import.returncode == 128 + number
    assert "Traceback" not in err
    assert os.listdir(tmp_path / "pool" / ".tmp") == []
    assert Pool.open(tmp_path / "pool").names() == []


def test_what_a_killed_import_left_is_cleared_by_the_next_command_and_not_before_it_died(
    tmp_path: Path, nbdclone: Callable[..., Done], long_import: subprocess.Popen[str]
) -> None:
    [staging] = os.listdir(tmp_path / "pool" / ".tmp")
    assert nbdclone("import", tmp_path / "debian.raw", "--name", "other").status == 0
    assert os.listdir(tmp_path / "pool" / ".tmp") == [staging]  # it is at work still
    long_import.kill()
    long_import.communicate(timeout=DEADLINE_S)
    assert os.listdir(tmp_path / "pool" / ".tmp") == [staging]
    assert nbdclone("ls").status == 0
    assert nbdclone("import", tmp_path / "debian.raw").status == 0
    assert os.listdir(tmp_path / "pool" / ".tmp") == []


def test_the_program_starts_without_what_only_the_server_needs() -> None:
    program = "import nbdclone.cli, sys; print({'uvloop', 'rich.table', 'blake3', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
