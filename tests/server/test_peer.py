"""Who a client is: from its socket, and from the subject of its certificate."""

from __future__ import annotations

import os
import socket
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdclone.server.peer import Peer, parse_subject


def of_tcp(family: socket.AddressFamily, *address: object) -> Peer:
    with socket.socket(family) as sock:
        return Peer.of(sock, address)


def test_a_tcp_client_is_known_by_its_address() -> None:
    peer = of_tcp(socket.AF_INET, "10.1.2.3", 40000)
    assert peer == Peer("10.1.2.3:40000", IPv4Address("10.1.2.3"))
    assert str(peer) == "10.1.2.3:40000"
    assert of_tcp(socket.AF_INET6, "fd00::7", 40000, 0, 0) == Peer("[fd00::7]:40000", IPv6Address("fd00::7"))


def test_an_ipv4_address_mapped_into_ipv6_is_ipv4() -> None:
    assert of_tcp(socket.AF_INET6, "::ffff:10.1.2.3", 1, 0, 0).address == IPv4Address("10.1.2.3")


def test_the_interface_of_a_link_local_address_is_no_part_of_it() -> None:
    assert of_tcp(socket.AF_INET6, "fe80::1%eth0", 1, 0, 2).address == IPv6Address("fe80::1")


def test_a_client_of_a_unix_socket_is_known_by_its_user() -> None:
    one, other = socket.socketpair(socket.AF_UNIX)
    with one, other:
        peer = Peer.of(one, "")
    assert peer == Peer(f"unix uid {os.geteuid()} pid {os.getpid()}", uid=os.geteuid())


@pytest.mark.parametrize(
    ("peer", "trusted"),
    [
        (Peer("", uid=0), True),
        (Peer("", uid=os.geteuid()), True),
        (Peer("", uid=os.geteuid() + 1), False),
        (Peer(""), False),
        (Peer("", IPv4Address("127.0.0.1"), subject="CN=root"), False),
    ],
)
def test_root_and_the_servers_own_user_are_trusted_and_nobody_else(peer: Peer, trusted: bool) -> None:
    assert peer.trusted is trusted


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("CN=web1,O=Lab", "cn=web1, o = Lab"),
        ("CN=web1,O=Lab", "  CN=web1 ,O=Lab  "),
        ("CN=a+OU=b,O=Lab", "OU=b+CN=a,O=Lab"),
        (r"O=Lab\, Inc.", r"O=Lab\2C Inc."),
        (r"O=L\C3\BCck", "O=Lück"),
        (r"CN=\ web1\ ", r"CN=\20web1\20"),
        (r"CN=\#1", r"CN=\231"),
        ("CN=a=b", r"CN=a\=b"),
        ("1.2.3=#0C01", "1.2.3=#0c01"),
    ],
)
def test_subjects_that_say_the_same_are_equal(one: str, other: str) -> None:
    assert parse_subject(one) == parse_subject(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("CN=web1", "CN=web1,O=Lab"),  # a whole subject, not a part of one
        ("CN=web1,O=Lab", "O=Lab,CN=web1"),  # the order is who issued what
        ("CN=web1,O=Lab", "CN=web1+O=Lab"),
        ("CN=web1,O=Lab", r"CN=web1\,O=Lab"),  # a name that looks like two attributes
        ("CN=web1,O=Lab", r"CN=web1\2CO\3DLab"),
        ("CN=a+OU=b", r"CN=a\+OU=b"),
        ("CN=web1", "CN=WEB1"),
        ("CN=web1", r"CN=web1\ "),
        ("CN=web1", r"CN=web1\00"),
        ("CN=a+CN=a", "CN=a"),
        ("CN=#0c01", r"CN=\#0c01"),
        ("CN=web1", "OU=web1"),
    ],
)
def test_subjects_that_differ_are_not_equal(one: str, other: str) -> None:
    assert parse_subject(one) != parse_subject(other)


@pytest.mark.parametrize(
    "text",
    [
        *[
            "",
            "web1",
            "CN",
            "=web1",
            "CN=web1,",
            ",CN=web1",
            "CN=a,,O=b",
            "CN=a;O=b",
            'CN="a"',
            "CN=a<b",
            "1=a",
            "C N=a",
        ],
        *["CN=a\0b", "CN=a\\", r"CN=a\x", r"CN=\FF", "CN=#", "CN=#0", "CN=#0g", "CN=a+", "/CN=web1/O=Lab", "*"],
    ],
)
def test_what_is_no_subject_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - of decoding too
        parse_subject(text)


def escape(value: str) -> str:
    """As RFC 4514 has it; every character that may be escaped is."""
    return "".join(f"\\{c}" if c in ' "#+,;<=>\\' else "\\00" if c == "\0" else c for c in value)


VALUES = st.text(
    st.one_of(st.sampled_from(' ,+=\\"#;<>\0\n=CNO'), st.characters(exclude_categories=["Cs"])), max_size=8
)
SUBJECTS = st.lists(
    st.lists(st.tuples(st.sampled_from(["CN", "O", "1.2"]), VALUES), min_size=1), min_size=1, max_size=4
)


@given(SUBJECTS, SUBJECTS)
def test_what_is_escaped_comes_back_and_no_two_subjects_are_taken_for_one(
    one: list[list[tuple[str, str]]], other: list[list[tuple[str, str]]]
) -> None:
    def written(subject: list[list[tuple[str, str]]]) -> str:
        return ",".join("+".join(f"{kind}={escape(value)}" for kind, value in name) for name in subject)

    def meant(subject: list[list[tuple[str, str]]]) -> list[list[tuple[str, str]]]:
        return [sorted(name) for name in subject]

    parsed = parse_subject(written(one))
    assert [[(kind, value) for kind, _, value in name] for name in parsed] == meant(one)
    assert (parsed == parse_subject(written(other))) == (meant(one) == meant(other))
