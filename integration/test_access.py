"""Exports that are not for everyone, as other people's programs meet them."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.packages import program, require
from integration.served import Served, make_pool, served

pytestmark = pytest.mark.timeout(120)

NOBODY = 65534
DEADLINE_S = 60
SETTINGS = f"""
[access.nobodys]
uids = [{NOBODY}]

[access.mine]
uids = [{os.geteuid()}]
networks = ["127.0.0.1"]

[access."elsewhere-*"]
networks = ["127.0.0.2", "::1"]
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("access")
    (directory / "image.raw").write_bytes(bytes(1 << 20))
    pool = make_pool(directory / "pool", directory / "image.raw", "open", "nobodys", "mine", "elsewhere-1")
    (pool / "settings.toml").write_text(SETTINGS)
    with tempfile.TemporaryDirectory(prefix="nbdclone-") as public:
        os.chmod(public, 0o755)
        with served(pool, "--socket", Path(public, "sock"), "--listen", "127.0.0.1:0") as server:
            os.chmod(Path(public, "sock"), 0o777)
            yield server


def uri(server: Served, export: str, way: str) -> str:
    if way == "tcp":
        return f"nbd://127.0.0.1:{server.port}/{export}"
    return f"nbd+unix:///{export}?socket={server.socket}"


def run(*command: str, uid: int | None = None) -> subprocess.CompletedProcess[str]:
    become = [] if uid is None else [program("setpriv"), f"--reuid={uid}", "--clear-groups"]
    command = (*become, program(command[0]), *command[1:])
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=DEADLINE_S)


def nbdinfo(*args: str, uid: int | None = None) -> subprocess.CompletedProcess[str]:
    return run("nbdinfo", *args, uid=uid)


def listed(where: str, uid: int | None = None) -> set[str]:
    done = nbdinfo("--list", "--json", where, uid=uid)
    assert done.returncode == 0, done.stderr
    return {export["export-name"] for export in json.loads(done.stdout)["exports"]}


@pytest.mark.parametrize("way", ["unix", "tcp"])
def test_nbdinfo_lists_what_is_for_it(server: Served, way: str) -> None:
    require("libnbd-bin")
    assert listed(uri(server, "", way)) == {"base", "open", "mine"}
    for name in ("open", "mine"):
        assert nbdinfo("--size", uri(server, name, way)).stdout == f"{1 << 20}\n"


@pytest.mark.parametrize("way", ["unix", "tcp"])
def test_what_is_not_for_it_is_to_nbdinfo_what_is_not_there(server: Served, way: str) -> None:
    require("libnbd-bin")
    missing = nbdinfo(uri(server, "missing", way))
    assert missing.returncode == 1
    for name in ("nobodys", "elsewhere-1"):
        refused = nbdinfo(uri(server, name, way))
        assert refused.returncode == 1
        assert refused.stderr.replace(name, "missing") == missing.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_another_user_has_other_exports(server: Served) -> None:
    require("libnbd-bin")
    assert listed(uri(server, "", "unix"), NOBODY) == {"base", "open", "nobodys"}
    assert nbdinfo("--size", uri(server, "nobodys", "unix"), uid=NOBODY).stdout == f"{1 << 20}\n"
    assert nbdinfo(uri(server, "mine", "unix"), uid=NOBODY).returncode == 1


def test_qemu_img_hears_where_a_damaged_file_is_as_the_servers_user_and_as_nobody_else(tmp_path: Path) -> None:
    require("qemu-utils")
    (tmp_path / "image.raw").write_bytes(bytes(1 << 20))
    pool = make_pool(tmp_path / "pool", tmp_path / "image.raw", "web1")
    os.truncate(pool / "clones" / "web1" / "delta", 8192)
    with tempfile.TemporaryDirectory(prefix="nbdclone-") as public:
        os.chmod(public, 0o755)
        with served(pool, "--socket", Path(public, "sock"), "--listen", "127.0.0.1:0") as server:
            os.chmod(Path(public, "sock"), 0o777)
            ways: list[tuple[str, int | None]] = [("unix", None), ("tcp", None)]
            if os.geteuid() == 0:
                ways.append(("unix", NOBODY))
            for way, uid in ways:
                done = run("qemu-img", "info", uri(server, "web1", way), uid=uid)
                assert done.returncode == 1
                friend = (way, uid) == ("unix", None)
                assert (str(pool) in done.stderr) == friend, done.stderr
                assert ("see the server's log" in done.stderr) != friend, done.stderr
            assert f"{pool}/clones/web1/delta: truncated" in server.stderr.read_text()
