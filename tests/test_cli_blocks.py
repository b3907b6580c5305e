"""The command line: flatten, compact, and what the removal of a snapshot leaves to be done."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from test_cli import IMAGE, Done, assert_refused
from test_cli import image as image
from test_cli import nbdclone as nbdclone

from nbdclone.store.pool import Pool


@pytest.fixture
def pool(nbdclone: Callable[..., Done], image: Path, tmp_path: Path) -> Pool:
    assert nbdclone("import", image).status == 0
    assert nbdclone("clone", "debian", "web1").status == 0
    return Pool.open(tmp_path / "pool")


def write(pool: Pool, data: bytes, offset: int) -> None:
    with pool.open_clone("web1") as disk:
        disk.pwrite(data, offset)


def test_flatten_says_what_the_clone_needs_no_more(nbdclone: Callable[..., Done], pool: Pool) -> None:
    assert nbdclone("flatten", "web1") == (0, "clone 'web1' needs 'debian' no more: 1 MiB copied\n", "")
    assert nbdclone("flatten", "web1") == (0, "clone 'web1' has nothing beneath it\n", "")
    assert nbdclone("rm", "debian") == (0, "", "")


def test_flatten_names_the_snapshots_that_stay_over_the_base(nbdclone: Callable[..., Done], pool: Pool) -> None:
    nbdclone("snapshot", "web1@a")
    out = nbdclone("flatten", "web1").out
    assert out.splitlines()[1:] == ["1 snapshot(s) stay over what it was over: web1@a"]
    assert_refused(nbdclone("rm", "debian"), "needed by 1 clone")


def test_flatten_and_compact_as_json(nbdclone: Callable[..., Done], pool: Pool) -> None:
    write(pool, IMAGE[: 1 << 19], 0)
    done = json.loads(nbdclone("compact", "web1", "--json").out)
    assert (done["name"], done["dropped"], done["zeros"]) == ("web1", 1 << 19, 0)
    assert done["before"] - done["after"] >= (1 << 19) - 4096
    assert json.loads(nbdclone("flatten", "web1", "--json").out) == {
        "name": "web1",
        "was_over": "debian",
        "copied": 1 << 20,
        "snapshots_over_it": [],
    }


def test_compact_says_what_was_on_disk_before_and_is_now(nbdclone: Callable[..., Done], pool: Pool) -> None:
    write(pool, IMAGE, 0)
    done = nbdclone("compact", "web1")
    assert re.fullmatch(r"clone 'web1': 1\.\d+ MiB on disk before, \d+ KiB now\n", done.out), done


@pytest.mark.parametrize("verb", ["flatten", "compact"])
def test_what_never_changes_or_is_not_there_is_refused(nbdclone: Callable[..., Done], pool: Pool, verb: str) -> None:
    assert_refused(nbdclone(verb, "debian"), "'debian' is a base, and never changes")
    assert_refused(nbdclone(verb, "web1@a"), "'web1@a' is a snapshot, and never changes")
    assert_refused(nbdclone(verb, "web9"), "there is no base or clone 'web9'")
    with pool.open_clone("web1"):
        assert_refused(nbdclone(verb, "web1"), rf"clone 'web1' is in use by this process \({os.getpid()}\)")


def test_removing_a_snapshot_merges_its_layer_or_says_why_not(nbdclone: Callable[..., Done], pool: Pool) -> None:
    write(pool, b"a" * 9000, 0)
    nbdclone("snapshot", "web1@a")
    write(pool, b"b" * 9000, 8192)
    nbdclone("snapshot", "web1@b")
    assert nbdclone("rm", "web1@a") == (0, "", "")
    assert len(pool.places.layer_ids()) == 1
    with pool.open_clone("web1") as disk:
        done = nbdclone("rm", "web1@b")
        assert done.status == 0
        assert re.fullmatch(r"nbdclone: removed; its data stays for now: clone 'web1' is in use by .*\n", done.err)
        assert disk.pread(9000, 0) == b"a" * 8192 + b"b" * 808
    write(pool, b"c", 100_000)
    nbdclone("clone", "debian", "web2")
    assert nbdclone("rm", "web2") == (0, "", "")
    assert pool.places.layer_ids() == []
    with pool.open_clone("web1") as disk:
        assert disk.pread(9000, 0) == b"a" * 8192 + b"b" * 808
