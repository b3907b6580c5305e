"""Clones that are made when a client asks for them, and go when their time is over."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest
from serving import BASE, PATIENCE_S, make_pool, until, where
from supervising import supervised

from nbdclone.client import Client
from nbdclone.control.local import LocalTarget
from nbdclone.control.verbs import drive, find_verb
from nbdclone.errors import ServerRefused, UsageError
from nbdclone.server import ephemeral
from nbdclone.server.peer import Peer
from nbdclone.server.settings import parse_settings
from nbdclone.store.pool import Pool

SETTINGS = """
[template.ci]
pattern = "ci-*"
source = "base"
quota = "1M"
limit = 2
[template.day]
pattern = "day-*"
source = "web1@golden"
lifetime = "1d"
"""


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pool:
    monkeypatch.setattr(ephemeral, "GRACE_S", 0.3)
    pool = make_pool(tmp_path, BASE, "web1")
    with pool.open_clone("web1") as clone:
        clone.pwrite(b"golden", 0)
    pool.snapshot("web1@golden")
    pool.settings_path.write_text(SETTINGS)
    return pool


def there_are(pool: Pool, *names: str) -> bool:
    return set(pool.names()) == {"base", "web1", "web1@golden", *names}


async def test_a_name_that_fits_a_template_is_a_clone_of_its_source_until_nobody_is_connected(pool: Pool) -> None:
    async with supervised(pool) as server:
        first = await Client.connect(where(server, "ci-1"))
        await first.pwrite(b"mine", 0)
        second = await Client.connect(where(server, "ci-1"))
        assert await second.pread(4, 0) == b"mine"
        assert pool.info("ci-1").quota == 1 << 20  # type: ignore[union-attr]
        assert pool.info("ci-1").ephemeral  # type: ignore[union-attr]
        await first.close()
        await asyncio.sleep(0.5)
        assert there_are(pool, "ci-1")
        await second.close()
        await until(lambda: there_are(pool))


async def test_who_comes_again_in_time_finds_what_he_wrote(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ephemeral, "GRACE_S", 1.0)
    async with supervised(pool) as server:
        for number in range(4):
            async with await Client.connect(where(server, "ci-1")) as client:
                assert await client.pread(8, 512 * number) == BASE[512 * number :][:8]
                await client.pwrite(b"%d" % number, 512 * number)
                assert await client.pread(1, 0) == b"0"
            await asyncio.sleep(0.4)


async def test_a_base_with_a_plus_is_another_clone_for_each_connection(pool: Pool) -> None:
    async with supervised(pool) as server:
        clients = [await Client.connect(where(server, "base+")) for _ in range(3)]
        for number, client in enumerate(clients):
            await client.pwrite(b"%d" % number, 0)
        assert [await client.pread(1, 0) for client in clients] == [b"0", b"1", b"2"]
        made = set(pool.names()) - {"base", "web1", "web1@golden"}
        assert len(made) == 3
        assert all(name.startswith("base-") for name in made)
        for client in clients:
            await client.close()
        await until(lambda: there_are(pool))


async def test_no_more_are_made_than_there_may_be(pool: Pool) -> None:
    async with supervised(pool) as server:
        clients = [await Client.connect(where(server, f"ci-{number}")) for number in range(2)]
        with pytest.raises(ServerRefused):
            await Client.connect(where(server, "ci-2"))
        for client in clients:
            await client.close()
        await until(lambda: there_are(pool))
        async with asyncio.timeout(PATIENCE_S):
            while True:  # the names go a moment before the server has counted
                with contextlib.suppress(ServerRefused):
                    await (await Client.connect(where(server, "ci-2"))).close()
                    break
                await asyncio.sleep(0.01)


async def test_one_with_a_lifetime_stays_through_a_restart_until_it_is_over(pool: Pool) -> None:
    async with supervised(pool) as server:
        async with await Client.connect(where(server, "day-1")) as client:
            assert await client.pread(6, 0) == b"golden"
        await asyncio.sleep(0.5)
        assert there_are(pool, "day-1")
    mark = pool.path / "clones/day-1/ephemeral"
    mark.write_text(mark.read_text().replace("86400.0", "0.5"))
    async with supervised(pool):
        await until(lambda: there_are(pool))


async def test_what_a_server_that_was_killed_has_left_goes(pool: Pool) -> None:
    pool.create_clones("base", ["ci-7"], mark=ephemeral.new_mark("ci", None))
    async with supervised(pool):
        await until(lambda: there_are(pool))


async def test_one_that_is_kept_stays(pool: Pool) -> None:
    async with supervised(pool) as server:
        async with await Client.connect(where(server, "ci-1")) as client:
            await client.pwrite(b"mine", 0)
            await asyncio.to_thread(drive, find_verb("keep").begin(LocalTarget(pool), {"name": "ci-1"}))
        await asyncio.sleep(0.6)
        assert there_are(pool, "ci-1")
    with pytest.raises(UsageError, match="'ci-1' is not ephemeral"):
        drive(find_verb("keep").begin(LocalTarget(pool), {"name": "ci-1"}))


async def test_two_who_ask_for_a_name_at_once_get_the_same_disk(pool: Pool) -> None:
    async with supervised(pool) as server:
        clients = await asyncio.gather(*[Client.connect(where(server, "ci-1")) for _ in range(6)])
        await clients[0].pwrite(b"one", 0)
        assert [await client.pread(3, 0) for client in clients] == [b"one"] * 6
        for client in clients:
            await client.close()


async def test_who_may_not_have_it_makes_nothing(pool: Pool) -> None:
    pool.settings_path.write_text(SETTINGS + '[access."ci-*"]\nuids = []\n[access.base]\nuids = []\n')
    async with supervised(pool) as server:
        for name in ("ci-1", "base+", "base", "nothing+", "+", "web1+"):
            with pytest.raises(ServerRefused):
                await Client.connect(where(server, name))
        assert there_are(pool)


async def test_a_template_that_fits_every_name_makes_nothing_for_a_refused_one(pool: Pool) -> None:
    pool.settings_path.write_text('[template.all]\npattern = "*"\nsource = "base"\n[access.secret]\nuids = []\n')
    async with supervised(pool) as server:
        with pytest.raises(ServerRefused):
            await Client.connect(where(server, "secret"))
        assert there_are(pool)


def test_a_rule_for_a_base_holds_for_its_new_clones_too() -> None:
    access = parse_settings('[access."b*"]\nuids = []\n[access.exact]\nuids = []\n', Path("settings.toml")).access
    peer = Peer("somebody", uid=1)
    assert access.refusing_rule("base+", peer) == "b*"
    assert access.refusing_rule("exact+", peer) == "exact"
    assert access.refusing_rule("other+", peer) is None


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[template.ci]\nsource = 'base'", "template.ci.pattern: is missing"),
        ("[template.ci]\npattern = 'a*'", "template.ci.source: is missing"),
        ("[template.ci]\npattern = 'a b'\nsource = 'base'", "cannot be a name"),
        ("[template.ci]\npattern = 'a*'\nsource = 'a b'", "is to be a base, or a snapshot"),
        ("[template.ci]\npattern = 'a*'\nsource = 'base'\nlifetime = '8'", "a time like"),
        ("[template.ci]\npattern = 'a*'\nsource = 'base'\nlifetime = '0s'", "a time like"),
        ("[template.ci]\npattern = 'a*'\nsource = 'base'\nquota = 'much'", "a size like"),
        ("[template.ci]\npattern = 'a*'\nsource = 'base'\nlimit = 0", "from 1 to"),
        ("[template.ci]\npattern = 'a*'\nsource = 'base'\nmax = 3", "is not known"),
    ],
)
def test_what_is_wrong_with_a_template_is_said(text: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        parse_settings(text, Path("settings.toml"))
