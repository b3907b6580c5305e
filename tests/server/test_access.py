"""Who may have which export, and that nobody else learns that there is one."""

from __future__ import annotations

import itertools
import json
import logging
import os
import struct
import threading
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import BASE, PATIENCE_S, Peer, connect, connect_from, go_data, option, serving, until, where

from nbdclone.client import Client
from nbdclone.errors import ServerRefused, UsageError
from nbdclone.protocol.wire import CMD_READ, EIO, NBD_REP_ERR_POLICY, NBD_REP_ERR_UNKNOWN, Option
from nbdclone.server import peer as peer_module
from nbdclone.server.access import Access
from nbdclone.server.server import Server
from nbdclone.server.settings import read_settings
from nbdclone.store.clone import Clone
from nbdclone.store.delta_file import MAP_SLOTS
from nbdclone.store.pool import Pool

TCP = ("127.0.0.1", 0)
ME = os.geteuid()


def tcp(address: str, subject: str | None = None) -> peer_module.Peer:
    return peer_module.Peer(address, ip_address(address), subject=subject)


def unix(uid: int | None, subject: str | None = None) -> peer_module.Peer:
    return peer_module.Peer(f"uid {uid}", uid=uid, subject=subject)


def access(tmp_path: Path, text: str) -> Access:
    path = tmp_path / "settings.toml"
    path.write_text(text)
    return read_settings(path).access


# The rules

SUBJECTS = '[access.x]\nsubjects = ["CN=web1,O=Lab", "CN=admin"]'
NETWORKS = '[access.x]\nnetworks = ["10.1.0.0/16", "fd00::/8", "192.0.2.1"]'
USERS = '[access.x]\nuids = [1000, "root"]'
PLACES = '[access.x]\nnetworks = ["10.1.0.0/16"]\nuids = [1000]'
LOCAL = "[access.x]\nnetworks = []\nuids = [1000]"
ALL = '[access.x]\nsubjects = ["CN=web1"]\nnetworks = ["10.1.0.0/16"]\nuids = [1000]'
SUBJECT_AT_HOME = '[access.x]\nsubjects = ["CN=web1"]\nnetworks = ["10.1.0.0/16"]'


@pytest.mark.parametrize(
    ("settings", "peer", "admitted"),
    [
        ("", tcp("192.0.2.7"), True),
        ("", unix(None), True),
        (SUBJECTS, tcp("192.0.2.7", "CN=web1,O=Lab"), True),
        (SUBJECTS, tcp("192.0.2.7", "cn=web1, o=Lab"), True),
        (SUBJECTS, tcp("192.0.2.7", "CN=admin"), True),
        (SUBJECTS, unix(1000, "CN=admin"), True),
        (SUBJECTS, tcp("192.0.2.7", "CN=web1"), False),
        (SUBJECTS, tcp("192.0.2.7", "CN=admin,O=Lab"), False),
        (SUBJECTS, tcp("192.0.2.7", "O=Lab,CN=web1"), False),
        (SUBJECTS, tcp("192.0.2.7", r"CN=web1\,O=Lab"), False),
        (SUBJECTS, tcp("192.0.2.7", r"CN=admin\00"), False),
        (SUBJECTS, tcp("192.0.2.7", "no subject"), False),
        (SUBJECTS, tcp("192.0.2.7", ""), False),
        (SUBJECTS, tcp("192.0.2.7"), False),
        (SUBJECTS, unix(0), False),
        (
            '[access.x]\nsubjects = ["1.2.840.113549.1.9.1=a@b,CN=web1"]',
            unix(0, "1.2.840.113549.1.9.1=a@b,CN=web1"),
            True,
        ),
        (NETWORKS, tcp("10.1.255.255"), True),
        (NETWORKS, tcp("fd12::1"), True),
        (NETWORKS, tcp("192.0.2.1"), True),
        (NETWORKS, tcp("10.2.0.0"), False),
        (NETWORKS, tcp("192.0.2.2"), False),
        (NETWORKS, tcp("fe80::1"), False),
        (NETWORKS, unix(0), False),
        (NETWORKS, unix(None), False),
        (USERS, unix(1000), True),
        (USERS, unix(0), True),
        (USERS, unix(1001), False),
        (USERS, unix(None), False),
        (USERS, tcp("127.0.0.1"), False),
        (PLACES, unix(1000), True),
        (PLACES, tcp("10.1.0.1"), True),
        (PLACES, unix(0), False),
        (PLACES, tcp("10.2.0.1"), False),
        (LOCAL, unix(1000), True),
        (LOCAL, tcp("10.1.0.1"), False),
        (ALL, tcp("10.1.0.1", "CN=web1"), True),
        (ALL, unix(1000, "CN=web1"), True),
        (ALL, tcp("10.1.0.1"), False),
        (ALL, tcp("10.2.0.1", "CN=web1"), False),
        (ALL, unix(1000), False),
        (ALL, unix(1001, "CN=web1"), False),
        (SUBJECT_AT_HOME, tcp("10.1.0.1", "CN=web1"), True),
        (SUBJECT_AT_HOME, unix(0, "CN=web1"), False),
        ("[access.x]\nsubjects = []", tcp("10.1.0.1", "CN=web1"), False),
        ("[access.x]\nnetworks = []", tcp("10.1.0.1"), False),
        ("[access.x]\nuids = []", unix(0), False),
        ('[access.x]\nnetworks = ["0.0.0.0/0"]', tcp("198.51.100.1"), True),
        ('[access.x]\nnetworks = ["0.0.0.0/0"]', tcp("fd00::1"), False),
        ('[access.x]\nnetworks = ["::/0"]', tcp("198.51.100.1"), False),
    ],
)
def test_a_rule_admits(tmp_path: Path, settings: str, peer: peer_module.Peer, admitted: bool) -> None:
    rules = access(tmp_path, settings)
    assert (rules.refusing_rule("x", peer) is None) is admitted
    assert rules.refusing_rule("y", peer) is None  # what no rule names is open


@pytest.mark.parametrize(
    ("rule", "name", "matches"),
    [
        ("web1", "web1", True),
        ("web1", "web11", False),
        ("web1", "WEB1", False),
        ("web.1", "web-1", False),
        ("lab-*", "lab-1", True),
        ("lab-*", "lab-", True),
        ("lab-*", "Lab-1", False),
        ("lab-*", "my-lab-1", False),
        ("lab-*", "lab", False),
        ("web?", "web1", True),
        ("web?", "web12", False),
        ("web[12]", "web1", True),
        ("web[12]", "web3", False),
        ("web[!12]", "web3", True),
        ("web[!12]", "web1", False),
        ("*", "anything", True),
        ("web1", "web1@x", True),
        ("web1", "web11@x", False),
        ("web1", "web2@web1", False),
        ("web?", "web1@x", True),
        ("x", "web1@x", False),
        ("web1@x", "web1@x", True),
        ("web1@x", "web1", False),
        ("web1@x", "web1@y", False),
        ("web*@*", "web1@x", True),
        ("web*@*", "web1", False),
        ("*@golden", "web1@golden", True),
        ("*@golden", "web1@goldens", False),
        ("*", "a\nb", True),
    ],
)
def test_a_rule_is_for(tmp_path: Path, rule: str, name: str, matches: bool) -> None:
    rules = access(tmp_path, f'[access."{rule}"]\nuids = []')
    assert rules.refusing_rule(name, unix(0)) == (rule if matches else None)


RULES = {
    "web1": [1, 2, 3],
    "web*": [2, 3],
    "*1": [1, 3],
}


@given(st.permutations(list(RULES.items())), st.integers(0, 4), st.sampled_from(["web1", "web2", "db1", "db2"]))
def test_every_rule_that_matches_must_admit_whatever_their_order(
    tmp_path_factory: pytest.TempPathFactory, rules: list[tuple[str, list[int]]], uid: int, name: str
) -> None:
    text = "\n".join(f'[access."{pattern}"]\nuids = {uids}' for pattern, uids in rules)
    matching = {"web1": ["web1", "web*", "*1"], "web2": ["web*"], "db1": ["*1"], "db2": []}[name]
    admitted = all(uid in RULES[pattern] for pattern in matching)
    given = access(tmp_path_factory.getbasetemp(), text)
    assert (given.refusing_rule(name, unix(uid)) is None) is admitted


# The file

BAD = [
    ("access = 1", "access: is to be a table"),
    ("[acess.web1]\nuids = [1]", "acess: is not known; known here: access"),
    ("[access]\nweb1 = []", 'access."web1": is to be a table'),
    ("[access.web1]", 'access."web1": says nothing: give subjects, networks or uids'),
    ("[access.web1]\nuid = [1]", 'access."web1".uid: is not known; known here: subjects, networks, uids'),
    ('[access."web 1"]\nuids = [1]', "access.\"web 1\": 'web 1' cannot be a name"),
    ('[access."web1@"]\nuids = [1]', "access.\"web1@\": '' cannot be a name"),
    ('[access."web1@a@b"]\nuids = [1]', "access.\"web1@a@b\": 'a@b' cannot be a name"),
    ('[access.""]\nuids = [1]', "access.\"\": '' cannot be a name"),
    ('[access."lab *"]\nuids = [1]', 'access."lab *": no export has a name that matches this pattern'),
    ('[access."web+*"]\nuids = [1]', 'access."web+*": no export has a name that matches this pattern'),
    ('[access."lab-[12"]\nuids = [1]', 'access."lab-[12": no export has a name that matches this pattern'),
    ('[access.web1]\nnetworks = "10.0.0.0/8"', 'access."web1".networks: is to be a list'),
    ("[access.web1]\nnetworks = [10]", 'access."web1".networks: 10 is to be a string'),
    ('[access.web1]\nnetworks = ["10.1.0.1/16"]', 'access."web1".networks: 10.1.0.1/16 has host bits set'),
    ('[access.web1]\nnetworks = ["10.1"]', "access.\"web1\".networks: '10.1' does not appear to be an IPv4 or IPv6"),
    ('[access.web1]\nnetworks = ["10.0.0.0/33"]', "access.\"web1\".networks: '10.0.0.0/33' does not appear to be"),
    ('[access.web1]\nnetworks = ["example.org"]', "access.\"web1\".networks: 'example.org' does not appear to be"),
    (
        '[access.web1]\nnetworks = ["::ffff:10.0.0.0/104"]',
        "access.\"web1\".networks: '::ffff:10.0.0.0/104': give IPv4 networks as IPv4",
    ),
    ('[access.web1]\nnetworks = ["fe80::1%eth0"]', "give IPv4 networks as IPv4, and no interface"),
    ('[access.web1]\nuids = ["no-such-user"]', "access.\"web1\".uids: there is no user 'no-such-user'"),
    ('[access.web1]\nuids = ["a\\u0000b"]', 'access."web1".uids: '),
    ("[access.web1]\nuids = [true]", 'access."web1".uids: True is to be a string'),
    ("[access.web1]\nuids = [-1]", 'access."web1".uids: -1 is no user\'s number'),
    ("[access.web1]\nuids = [4294967295]", 'access."web1".uids: 4294967295 is no user\'s number'),
    ("[access.web1]\nuids = [1.5]", 'access."web1".uids: 1.5 is to be a string'),
    ("[access.web1]\nuids = 1000", 'access."web1".uids: is to be a list'),
    ('[access.web1]\nsubjects = ["web1"]', "access.\"web1\".subjects: 'web1' is no subject in the form of RFC 4514"),
    ('[access.web1]\nsubjects = ["CN=*"]\nx = 1', 'access."web1".x: is not known'),
    ('[access.web1]\nsubjects = ["CN=a+emailAddress=b"]', "give EMAILADDRESS by its number"),
    ("[access.web1\nuids = [1]", "(at line 1, column "),
    ("[access.web1]\nuids = [1]\n[access.web1]\nuids = [2]", "(at line 3, column "),
    ("x = " + "[" * 100_000, ""),
]


@pytest.mark.parametrize(("text", "said"), BAD, ids=[text[:40] for text, _ in BAD])
def test_bad_settings_are_refused_in_a_line_with_file_and_key(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        access(tmp_path, text)
    assert str(refused.value).startswith(f"{tmp_path}/settings.toml: ")
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_settings_that_are_no_text_or_no_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_bytes(b"\xff")
    with pytest.raises(UsageError, match=r"settings\.toml: 'utf-8' codec"):
        read_settings(tmp_path / "settings.toml")
    with pytest.raises(UsageError, match=rf"{tmp_path}: cannot be opened \(not a regular file\)"):
        read_settings(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UsageError, match=r"fifo: cannot be opened \(not a regular file\)"):
        read_settings(tmp_path / "fifo")


# What is nearly right: the words that are known, in any place, and values of any kind.
KEYS = st.sampled_from(
    ["access", "limit", "iops", "bps", "subjects", "networks", "uids", "x", "web*", "[", "*", "a.b", ""]
)
VALUES = st.recursive(
    st.one_of(
        st.integers(-(1 << 70), 1 << 70),
        st.booleans(),
        st.sampled_from(
            ['"CN=x"', '"10.0.0.0/8"', '"10.0.0.1/8"', '"::1%lo"', '"root"', '"CN=\\\\zz"', '""', "nan", "1e999"]
        ),
        st.text(max_size=20).map(json.dumps),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda values: f"[{', '.join(map(_toml, values))}]"),
        st.lists(st.tuples(KEYS, inner), max_size=3).map(
            lambda pairs: "{" + ", ".join(f"{json.dumps(key)} = {_toml(value)}" for key, value in pairs) + "}"
        ),
    ),
    max_leaves=12,
)


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@given(
    st.one_of(
        st.binary(max_size=300),
        st.text(alphabet='[]{}=".#\n,\\access.xuidnetworksubj10:/*', max_size=200).map(str.encode),
        st.lists(st.tuples(KEYS, VALUES), max_size=4).map(
            lambda lines: "\n".join(f"{json.dumps(key)} = {_toml(value)}" for key, value in lines).encode()
        ),
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_settings_are_understood_or_refused_in_a_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "settings.toml"
    path.write_bytes(content)
    said = f"{path}: "
    try:
        read_settings(path).access.refusing_rule("x", tcp("192.0.2.1", "CN=x"))
    except UsageError as error:
        said = str(error)
    assert said.startswith(f"{path}: ")
    assert "\n" not in said


def test_settings_nested_without_end_are_refused_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"settings\.toml: "):
        access(tmp_path, "x = " + "[" * 100_000)


def test_without_the_file_everything_is_open(tmp_path: Path) -> None:
    assert read_settings(tmp_path / "settings.toml").access.refusing_rule("x", tcp("192.0.2.1")) is None


async def test_a_server_of_bad_settings_does_not_begin(pool: Pool, tmp_path: Path) -> None:
    pool.settings_path.write_text("[access.web1]")
    with pytest.raises(UsageError, match="says nothing"):
        async with Server(pool, sockets=[tmp_path / "sock"]):
            pass
    assert not (tmp_path / "sock").exists()
    pool.settings_path.unlink()
    async with serving(pool):  # the lock on the pool has gone as well
        pass


# What clients see

ELSEWHERE = '[access.web1]\nnetworks = ["127.0.0.2"]\n'


async def test_an_export_is_for_those_whom_its_rule_admits(pool: Pool) -> None:
    pool.settings_path.write_text(ELSEWHERE)
    async with serving(pool, listen=[TCP]) as server:
        assert await Client.list(where(server, "")) == ["base", "web2"]
        with pytest.raises(ServerRefused):
            await connect(server, "web1")
        async with await connect(server, "web2") as disk:
            assert await disk.pread(512, 0) == BASE[:512]
        async with await connect_from(server, "127.0.0.2") as peer:
            await peer.greet()
            names = [reply[1][4:] for reply in await peer.ask(Option.LIST)]
            assert names == [b"base", b"web1", b"web2", b""]
            await peer.ask(Option.GO, go_data("web1"))
            assert (await peer.run(CMD_READ, 0, 512)).data == BASE[:512]


@pytest.mark.parametrize(("uid", "admitted"), [(ME, True), (ME + 1, False)])
async def test_on_a_unix_socket_the_user_counts(pool: Pool, uid: int, admitted: bool) -> None:
    pool.settings_path.write_text(f'[access."web*"]\nuids = [{uid}]\n')
    async with serving(pool) as server:
        assert await Client.list(where(server, "")) == (["base", "web1", "web2"] if admitted else ["base"])
        if admitted:
            async with await connect(server, "web1"):
                pass
        else:
            with pytest.raises(ServerRefused, match=r"there is no base or clone 'web1'$"):
                await connect(server, "web1")


@pytest.mark.parametrize("subject", ["CN=web1,O=Lab", "CN=web1", None])
async def test_the_subject_of_the_certificate_counts(
    pool: Pool, subject: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client = tcp("127.0.0.1", subject)
    monkeypatch.setattr(peer_module.Peer, "of", lambda _sock, _address: client)
    pool.settings_path.write_text('[access.web1]\nsubjects = ["cn=web1, o=Lab"]\n')
    async with serving(pool, listen=[TCP]) as server:
        if subject == "CN=web1,O=Lab":
            async with await connect(server, "web1") as disk:
                assert await disk.pread(512, 0) == BASE[:512]
        else:
            with pytest.raises(ServerRefused):
                await connect(server, "web1")
            certificate = f" (certificate: '{subject}')" if subject else ""
            assert caplog.messages == [f"127.0.0.1: export 'web1': refused by access.\"web1\"{certificate}"]


async def answers(server: Server, name: str) -> list[object]:
    """All that a client hears that asks for an export in every way; what it calls it is left out."""
    heard: list[object] = []

    async def ask(number: int, data: bytes = b"") -> None:
        quoted = f"'{name}'".encode()
        heard.append([(kind, text.replace(quoted, b"NAME")) for kind, text in await peer.ask(number, data)])

    for number in (Option.INFO, Option.GO):
        async with await Peer.connect(server) as peer:
            await peer.greet()
            await ask(number, go_data(name))
            await ask(Option.STRUCTURED_REPLY)
            for contexts in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
                query = b"base:allocation"
                await ask(contexts, struct.pack(f">I{len(name)}sII", len(name), name.encode(), 1, len(query)) + query)
            await ask(number, go_data(name))
    async with await Peer.connect(server) as peer:
        await peer.greet()
        await peer.send(option(Option.EXPORT_NAME, name.encode()))
        heard.append(await peer.is_closed())
    return heard


@pytest.mark.parametrize("listener", ["tcp", "unix"])
async def test_an_export_that_is_not_for_a_client_looks_like_none(pool: Pool, listener: str) -> None:
    pool.settings_path.write_text('[access.web1]\nnetworks = []\n[access.base]\nsubjects = ["CN=x"]')
    options = {"listen": [TCP]} if listener == "tcp" else {}
    async with serving(pool, **options) as server:
        missing = await answers(server, "web9")
        assert missing[0] == [(NBD_REP_ERR_UNKNOWN, b"there is no base or clone NAME")]
        assert missing[-1] is True
        assert await answers(server, "web1") == missing
        assert await answers(server, "base") == missing
        async with await connect(server, "web2"):  # open or not
            assert await answers(server, "web1") == missing


async def test_a_refused_client_is_answered_as_late_as_for_a_missing_export_and_no_file_is_opened(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_for: list[tuple[str, int]] = []
    opened = pool.open_clone

    def open_clone(name: str) -> Clone:
        looked_for.append((name, threading.get_ident()))
        return opened(name)

    monkeypatch.setattr(pool, "open_clone", open_clone)
    pool.settings_path.write_text(ELSEWHERE)
    async with serving(pool, listen=[TCP]) as server, await Peer.connect(server) as peer:
        await peer.greet()
        for name in ("web9", "web1"):
            await peer.ask(Option.GO, go_data(name))
            await peer.ask(Option.GO, go_data(name))
        (missing, thread), _, (decoy, same_thread), (again, _) = looked_for
        assert missing == "web9"
        assert decoy == again  # what the kernel knows of missing files, it knows of both kinds alike
        assert decoy not in pool.names()
        assert thread == same_thread != threading.get_ident()


async def test_a_refused_client_does_not_wait_for_another_who_opens_the_export(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, go_on = threading.Event(), threading.Event()
    opened = pool.open_clone

    def open_slowly(name: str) -> Clone:
        if name == "web1":
            began.set()
            assert go_on.wait(PATIENCE_S)
        return opened(name)

    monkeypatch.setattr(pool, "open_clone", open_slowly)
    pool.settings_path.write_text(ELSEWHERE)
    async with (
        serving(pool, listen=[TCP]) as server,
        await connect_from(server, "127.0.0.2") as admitted,
        await Peer.connect(server) as refused,
    ):
        await admitted.greet()
        await admitted.send(option(Option.GO, go_data("web1")))
        await until(began.is_set)
        await refused.greet()
        assert (await refused.ask(Option.GO, go_data("web1")))[-1][0] == NBD_REP_ERR_UNKNOWN
        go_on.set()
        await admitted.answer()


async def test_refusals_are_logged_with_client_and_rule_once_in_a_while(
    pool: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    pool.settings_path.write_text('[access."web*"]\nnetworks = []\n')
    async with serving(pool, listen=[TCP]) as server:
        for name in ("web1", "nothing\nhere"):
            async with await Peer.connect(server) as peer:
                await peer.greet()
                for _ in range(5):
                    await peer.ask(Option.GO, go_data(name))
                port = peer.sock.getsockname()[1]
                client = f"127.0.0.1:{port}"
                [line] = [record.getMessage() for record in caplog.records]
                expected = {
                    "web1": f"{client}: export 'web1': refused by access.\"web*\"",
                    "nothing\nhere": f"{client}: export 'nothing\\nhere': "
                    f"there is no base or clone 'nothing\\nhere' in {pool.path} "
                    "(and 4 more of the kind since the last line)",
                }
                assert line == expected[name]
                caplog.clear()
                server.scratch.quiet._quiet_until.clear()  # some time later


# Changing the rules


async def test_reloaded_rules_are_for_new_clients_and_the_others_go_on(pool: Pool) -> None:
    async with serving(pool, listen=[TCP]) as server, await connect(server, "web1") as disk:
        pool.settings_path.write_text(ELSEWHERE)
        async with await connect(server, "web1"):  # not yet
            pass
        server.reload()
        with pytest.raises(ServerRefused):
            await connect(server, "web1")
        assert await disk.pread(512, 0) == BASE[:512]
        pool.settings_path.unlink()
        server.reload()
        async with await connect(server, "web1"):
            pass


async def test_a_failed_reload_keeps_the_old_rules_and_says_so(pool: Pool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    pool.settings_path.write_text(ELSEWHERE)
    async with serving(pool, listen=[TCP]) as server:
        for text in ("[access", "[access.web1]"):
            caplog.clear()
            pool.settings_path.write_text(text)
            server.reload()
            [line] = [record.getMessage() for record in caplog.records]
            assert line.startswith(f"the settings stay as they were: {pool.settings_path}: ")
            with pytest.raises(ServerRefused):
                await connect(server, "web1")


# What strangers are told


async def test_why_an_export_cannot_be_opened_is_told_on_the_unix_socket_and_not_over_tcp(
    pool: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    sockets = [pool.path.parent / "nbd.sock"]
    os.truncate(pool.path / "clones" / "web1" / "delta", 8192)
    async with serving(pool, listen=[TCP], sockets=sockets) as server:
        with pytest.raises(ServerRefused) as refused:
            await connect(server, "web1", 0)
        assert (str(refused.value).partition(": ")[2] or str(refused.value)).endswith("see the server's log")
        assert str(pool.path) not in str(refused.value)
        assert refused.value.code == NBD_REP_ERR_POLICY
        [line] = caplog.messages
        assert f"{pool.path}/clones/web1/delta: truncated" in line
        with pytest.raises(ServerRefused, match=f"{pool.path}/clones/web1/delta: truncated"):
            await connect(server, "web1", 1)


async def test_where_a_damaged_map_is_is_told_on_the_unix_socket_and_not_over_tcp(
    pool: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    delta = pool.path / "clones" / "web1" / "delta"
    with open(delta, "r+b") as file:  # noqa: ASYNC230
        for slot in MAP_SLOTS:
            file.seek(slot)
            file.write(b"rotten" * 100)
    sockets = [pool.path.parent / "nbd.sock"]
    async with serving(pool, listen=[TCP], sockets=sockets) as server:
        async with await Peer.open(server, "web1") as stranger:
            reply = await stranger.run(CMD_READ, 0, 512)
            assert (reply.error, reply.message) == (EIO, "this request failed: see the server's log")
            assert f"{delta}: both copies" in caplog.text
        async with await Peer.open(server, "web1", listener=1) as friend:
            assert f"{delta}: both copies" in (await friend.run(CMD_READ, 0, 512)).message


# The pool


def test_the_settings_may_be_there_before_the_pool_and_outlive_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    settings = tmp_path / "pool" / "settings.toml"
    settings.write_text(ELSEWHERE)
    pool = Pool.open(tmp_path / "pool", create=True)
    (tmp_path / "image.raw").write_bytes(bytes(4096))
    pool.import_base(tmp_path / "image.raw", "base")
    names = [f"web{number}" for number in itertools.islice(itertools.count(), 3)]
    pool.create_clones("base", names)
    assert pool.names() == ["base", *names]
    pool.remove([*names, "base"])
    assert pool.entries() == []
    assert settings.read_text() == ELSEWHERE
