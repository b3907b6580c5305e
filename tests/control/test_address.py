"""Where the control socket is."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from nbdclone.control.address import connect, listen, remove
from nbdclone.store.check import check_pool
from nbdclone.store.pool import Pool


def test_it_is_for_its_owner_alone_from_the_moment_that_it_can_be_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []
    real = socket.socket.listen

    class Watched(socket.socket):
        def listen(self, backlog: int = 5) -> None:  # type: ignore[override]
            modes.append(stat.S_IMODE((tmp_path / ".control.new").stat().st_mode))
            assert not (tmp_path / ".control").exists()
            real(self, backlog)

    monkeypatch.setattr(socket, "socket", Watched)
    before = os.umask(0)
    try:
        sock = listen(tmp_path)
    finally:
        os.umask(before)
    with sock:
        assert modes == [0o600], "nobody can connect before it listens"
        assert stat.S_IMODE((tmp_path / ".control").stat().st_mode) == 0o600
        assert os.listdir(tmp_path) == [".control"]


def test_what_dead_servers_left_is_replaced(tmp_path: Path) -> None:
    listen(tmp_path).close()
    assert connect(tmp_path) is None, "nobody is there"
    with socket.socket(socket.AF_UNIX) as half:  # one that died before it was in its place
        half.bind(str(tmp_path / ".control.new"))
    with listen(tmp_path) as sock:
        found = connect(tmp_path)
        assert found is not None
        with found:
            sock.setblocking(True)
            sock.accept()[0].close()
    remove(tmp_path)
    assert os.listdir(tmp_path) == []
    remove(tmp_path)


def test_a_pool_may_have_a_path_longer_than_an_address_of_a_socket(tmp_path: Path) -> None:
    place = tmp_path / ("long" * 50)
    place.mkdir()
    before = len(os.listdir("/proc/self/fd"))
    with listen(place):
        found = connect(place)
        assert found is not None
        found.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_without_a_server_there_is_no_connection(tmp_path: Path) -> None:
    assert connect(tmp_path) is None
    assert connect(tmp_path / "missing") is None
    (tmp_path / "file").touch()
    assert connect(tmp_path / "file") is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_who_may_not_ask_does_without_the_server(tmp_path: Path) -> None:
    with listen(tmp_path):
        for directory in (tmp_path, *tmp_path.parents[:3]):
            directory.chmod(0o755)
        child = os.fork()
        if not child:
            os.setuid(65534)
            os._exit(0 if connect(tmp_path) is None else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_a_pool_with_a_control_socket_is_well(pool: Pool) -> None:
    with listen(pool.path):
        assert list(check_pool(pool.path)) == []
        Pool.open(pool.path, create=True)
