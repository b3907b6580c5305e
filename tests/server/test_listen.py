"""Where a server can listen, and what is said where it cannot."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdclone.client import Address
from nbdclone.errors import InUse, UsageError
from nbdclone.server.listen import DEFAULT_PORT, Listener, listen_tcp, listen_unix, parse_address


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock.getsockname()[1]


def close(*listeners: Listener) -> None:
    for listener in listeners:
        listener.close()


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1", ("127.0.0.1", DEFAULT_PORT)),
        ("127.0.0.1:0", ("127.0.0.1", 0)),
        ("localhost:10810", ("localhost", 10810)),
        (":10810", ("", 10810)),
        ("[::1]:65535", ("::1", 65535)),
        ("[::]", ("::", DEFAULT_PORT)),
        ("a-host.example", ("a-host.example", DEFAULT_PORT)),
    ],
)
def test_an_address_is_a_host_a_port_or_both(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", ":", "::1", "host:port", "host:65536", "host:-1", "[::1", "a:b:c", "h:1:", "h:"])
def test_what_is_no_address_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match=r"no address to listen on: give HOST:PORT, such as 127\.0\.0\.1:10809"):
        parse_address(text)


def test_port_0_is_a_free_port_which_the_uri_tells() -> None:
    [one], [two] = listen_tcp("127.0.0.1", 0), listen_tcp("127.0.0.1", 0)
    ports = [listener.sock.getsockname()[1] for listener in (one, two)]
    assert [one.uri, two.uri] == [f"nbd://127.0.0.1:{port}" for port in ports]
    assert len(set(ports)) == 2
    close(one, two)


def test_ipv6_has_brackets_in_its_uri() -> None:
    try:
        [listener] = listen_tcp("::1", 0)
    except UsageError as error:
        pytest.skip(str(error))
    assert listener.uri == f"nbd://[::1]:{listener.sock.getsockname()[1]}"
    close(listener)


def test_all_addresses_of_a_host_get_the_same_port() -> None:
    listeners = listen_tcp("", 0)
    assert len({listener.sock.getsockname()[1] for listener in listeners}) == 1
    close(*listeners)


def test_a_port_in_use_is_said_to_be(taken: int) -> None:
    with pytest.raises(InUse, match=f"^cannot listen on 127.0.0.1:{taken}: Address already in use$"):
        listen_tcp("127.0.0.1", taken)


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid", "a" * 300, "..", "x..y", "-\x01"])
def test_a_host_that_is_not_this_one_is_said_in_a_line(host: str) -> None:
    with pytest.raises(UsageError, match=r"^cannot listen on .*:1: .+") as refused:
        listen_tcp(host, 1)
    assert "\n" not in str(refused.value)


def test_a_unix_socket_is_made_where_the_uri_says_and_removed_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a socket & more"
    listener = listen_unix(path)
    assert Address.parse(listener.uri).path == str(path)
    assert path.is_socket()
    close(listener)
    assert not path.exists()


def test_a_relative_path_of_a_socket_is_absolute_in_the_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    listener = listen_unix(Path("nbd.sock"))
    assert listener.uri == f"nbd+unix:///?socket={tmp_path}/nbd.sock"
    close(listener)


def test_the_file_of_a_socket_that_nobody_listens_on_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(os.fspath(path))
        dead.listen()
    close(listen_unix(path))


def test_a_socket_that_somebody_listens_on_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    first = listen_unix(path)
    with pytest.raises(InUse, match=f"^cannot listen on {path}: Address already in use$"):
        listen_unix(path)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(os.fspath(path))
    close(first)


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("precious")
    with pytest.raises(UsageError, match="Address already in use"):
        listen_unix(path)
    assert path.read_text() == "precious"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("x" * 120, "AF_UNIX path too long"),
        ("x" * 300, "File name too long"),
        ("missing/nbd.sock", "No such file or directory"),
        ("file/nbd.sock", "Not a directory"),
    ],
)
def test_a_path_where_no_socket_can_be_is_said_with_the_reason(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=f"^cannot listen on {tmp_path}/{name}: {reason}$"):
        listen_unix(tmp_path / name)
