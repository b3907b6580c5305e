"""The handshake over a socket: which exports there are, who gets them, and what those who do not are told."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from serving import BASE, BASE_SIZE, PATIENCE_S, Peer, connect, go_data, make_pool, option, serving, until, where

from nbdclone.client import Client
from nbdclone.errors import ServerRefused
from nbdclone.protocol import wire
from nbdclone.protocol.wire import CMD_DISC, CMD_READ, Info, Option, OptionReply, TransmissionFlag
from nbdclone.server import connection
from nbdclone.server.server import Server
from nbdclone.store.clone import Clone
from nbdclone.store.pool import Pool

CLONE_FLAGS = wire.transmission_flags(False)


def sent_by(answer: list[tuple[int, bytes]]) -> dict[int, bytes]:
    """The infos in the answer to GO or INFO, by their types."""
    assert [kind for kind, _data in answer] == [OptionReply.INFO] * (len(answer) - 1) + [OptionReply.ACK]
    return {int.from_bytes(data[:2]): data for _kind, data in answer[:-1]}


async def test_go_without_structured_replies_leads_to_simple_ones(pool: Pool) -> None:
    async with serving(pool) as server, await Peer.open(server, "web1", structured=False) as peer:
        assert await peer.run(CMD_READ, 512, 1000) == (1, 0, BASE[512:1512], False, "")


async def test_go_after_structured_reply_leads_to_structured_reads(pool: Pool) -> None:
    async with serving(pool) as server, await Peer.open(server, "web1") as peer:
        assert await peer.run(CMD_READ, 512, 1000) == (1, 0, BASE[512:1512], True, "")


async def test_go_tells_size_flags_and_block_sizes(pool: Pool) -> None:
    async with serving(pool) as server, await Peer.connect(server) as peer:
        await peer.greet()
        infos = sent_by(await peer.ask(Option.GO, go_data("web1", Info.NAME)))
        assert infos == {
            Info.BLOCK_SIZE: wire.INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, 1, 4096, 32 << 20),
            Info.EXPORT: wire.INFO_EXPORT.pack(Info.EXPORT, BASE_SIZE, CLONE_FLAGS),
            Info.NAME: b"\0\1web1",
        }


@pytest.mark.parametrize(("flags", "padding"), [(3, 0), (1, 124), (0, 124)])
async def test_export_name_opens_an_export(pool: Pool, flags: int, padding: int) -> None:
    async with serving(pool) as server, await Peer.connect(server) as peer:
        await peer.greet(flags)
        await peer.send(option(Option.EXPORT_NAME, b"web1"))
        expected = wire.EXPORT_NAME_REPLY.pack(BASE_SIZE, CLONE_FLAGS) + bytes(padding)
        assert await peer.receive(len(expected)) == expected
        assert (await peer.run(CMD_READ, 0, 4096)).data == BASE[:4096]


async def test_export_name_of_an_unknown_export_closes_the_connection(pool: Pool) -> None:
    async with serving(pool) as server, await Peer.connect(server) as peer:
        await peer.greet()
        await peer.send(option(Option.EXPORT_NAME, b"web9"))
        assert await peer.is_closed()


async def test_requests_that_come_with_the_handshake_are_answered(pool: Pool) -> None:
    async with serving(pool) as server, await Peer.connect(server) as peer:
        await peer.greet()
        reads = [peer.request(CMD_READ, 4096 * i, 4096, cookie=i) for i in range(100)]
        await peer.send(option(Option.GO, go_data("web1")), *reads)
        await peer.answer()
        replies = await peer.replies(100)
        assert all(replies[i].data == BASE[4096 * i : 4096 * (i + 1)] for i in range(100))


async def test_a_large_write_that_begins_with_the_handshake_is_done(pool: Pool) -> None:
    async with serving(pool) as server, await Peer.connect(server) as peer:
        await peer.greet()
        payload = os.urandom(1 << 20)
        await peer.send(option(Option.GO, go_data("web1")), peer.request(wire.CMD_WRITE, 4096, payload=payload))
        await peer.answer()
        assert (await peer.reply()).error == 0
        assert (await peer.run(CMD_READ, 4096, len(payload))).data == payload


async def test_every_base_and_clone_is_listed(pool: Pool) -> None:
    async with serving(pool) as server:
        assert await Client.list(where(server, "")) == ["base", "web1", "web2"]


async def test_ten_thousand_exports_are_listed(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"clone-with-a-name-of-some-length-{number:05}" for number in range(10_000)]
    monkeypatch.setattr(pool, "names", lambda: names)
    async with serving(pool) as server:
        assert await Client.list(where(server, "")) == names


async def test_info_tells_of_an_export_and_does_not_hold_it(pool: Pool) -> None:
    async with serving(pool) as server:
        described = await Client.describe(where(server, "web1"))
        assert (described.size, described.flags) == (BASE_SIZE, CLONE_FLAGS | TransmissionFlag.SEND_DF)
        pool.remove(["web1"])


async def test_info_then_go_on_one_connection(pool: Pool) -> None:
    async with serving(pool) as server, await Peer.connect(server) as peer:
        await peer.greet()
        assert sent_by(await peer.ask(Option.INFO, go_data("web1"))) == sent_by(
            await peer.ask(Option.INFO, go_data("web1"))
        )
        sent_by(await peer.ask(Option.GO, go_data("web1")))
        assert (await peer.run(CMD_READ, 0, 512)).data == BASE[:512]


@pytest.mark.parametrize("name", ["web9", "WEB1", "web1/delta", "../web1", "..", ".tmp", "web1 ", "é" * 2000])
async def test_a_go_that_fails_leaves_the_negotiation_usable(pool: Pool, name: str) -> None:
    async with serving(pool) as server, await Peer.connect(server) as peer:
        await peer.greet()
        [(kind, text)] = await peer.ask(Option.GO, go_data(name))
        assert kind == OptionReply.ERR_UNKNOWN
        assert "there is no base or clone" in text.decode()
        sent_by(await peer.ask(Option.GO, go_data("web1")))
        assert (await peer.run(CMD_READ, 0, 512)).data == BASE[:512]


async def test_the_default_export_is_refused_with_a_hint(pool: Pool) -> None:
    async with serving(pool) as server:
        with pytest.raises(ServerRefused, match="give an export's name"):
            await connect(server, "")


async def test_abort_is_acknowledged_and_ends_the_connection(pool: Pool) -> None:
    async with serving(pool) as server, await Peer.connect(server) as peer:
        await peer.greet()
        assert await peer.ask(Option.ABORT) == [(OptionReply.ACK, b"")]
        assert await peer.is_closed()


async def test_garbage_for_an_option_closes_the_connection_and_is_logged(
    pool: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(pool) as server, await Peer.connect(server) as peer:
        await peer.greet()
        await peer.send(b"GET / HTTP/1.1\r\n\r\n")
        assert await peer.is_closed()
        await until(lambda: "not with its magic number" in caplog.text)


async def test_clones_that_are_made_or_removed_while_it_runs_are_there_or_gone_at_once(pool: Pool) -> None:
    async with serving(pool) as server:
        pool.create_clones("base", ["web3"])
        assert "web3" in await Client.list(where(server, ""))
        async with await connect(server, "web3") as disk:
            assert await disk.pread(512, 0) == BASE[:512]
        pool.remove(["web3"])
        assert "web3" not in await Client.list(where(server, ""))
        with pytest.raises(ServerRefused, match="there is no base or clone 'web3'"):
            await connect(server, "web3")


async def test_a_removed_clone_and_a_new_one_of_its_name_share_nothing(pool: Pool) -> None:
    async with serving(pool) as server:
        for _ in range(3):
            async with await connect(server, "web1") as disk:
                assert await disk.pread(4096, 0) == BASE[:4096]
                await disk.pwrite(bytes(4096), 0)
            pool.remove(["web1"])
            pool.create_clones("base", ["web1"])


async def test_a_clone_that_is_connected_is_not_removed_and_the_error_names_the_process(pool: Pool) -> None:
    async with serving(pool) as server, await connect(server, "web1") as disk:
        # The command's own process sees this one by its number and its command line.
        command = (sys.executable, "-m", "nbdclone", "--pool", str(pool.path), "rm", "web1")
        removing = await asyncio.create_subprocess_exec(*command, stderr=subprocess.PIPE)
        _, stderr = await asyncio.wait_for(removing.communicate(), PATIENCE_S)
        assert removing.returncode == 1
        assert f"clone 'web1' is in use by process {os.getpid()} (" in stderr.decode()
        assert await disk.pread(512, 0) == BASE[:512]


async def test_a_clone_that_another_process_has_open_is_refused_with_its_name(pool: Pool) -> None:
    program = f"""
from nbdclone.store.pool import Pool
with Pool.open({str(pool.path)!r}).open_clone("web1"):
    print("open", flush=True)
    input()
"""
    with subprocess.Popen(  # noqa: ASYNC220 - started before the server
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        async with serving(pool) as server:
            with pytest.raises(ServerRefused, match=rf"clone 'web1' is in use by process {other.pid} \(") as refused:
                await connect(server, "web1")
            assert refused.value.code == OptionReply.ERR_POLICY
            async with await connect(server, "web2"):
                pass
            other.communicate(b"\n")
            async with await connect(server, "web1"):
                pass


async def test_a_clone_of_an_edited_base_is_refused_with_the_difference(pool: Pool, tmp_path: Path) -> None:
    image = pool.path / "bases" / "base" / "image"
    image.chmod(0o644)
    content = bytearray(image.read_bytes())
    content[12345:12351] = b"edited"
    image.write_bytes(content)
    async with serving(pool) as server:
        with pytest.raises(ServerRefused, match=r"clone 'web1' is refused: base 'base' .*differs in bytes 0-4194303"):
            await connect(server, "web1")


async def test_a_truncated_delta_is_refused_and_its_sibling_is_served(pool: Pool) -> None:
    os.truncate(pool.path / "clones" / "web1" / "delta", 8192)
    async with serving(pool) as server:
        with pytest.raises(ServerRefused, match="truncated: 8192 bytes"):
            await connect(server, "web1")
        async with await connect(server, "web2") as disk:
            assert await disk.pread(512, 0) == BASE[:512]


async def test_the_deadline_ends_a_handshake_that_goes_byte_by_byte(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HANDSHAKE_DEADLINE_S", 0.3)
    async with serving(pool) as server, await Peer.connect(server) as peer, await Peer.connect(server) as silent:
        began = time.monotonic()
        handshake = wire.CLIENT_FLAGS.pack(3) + option(Option.GO, go_data("web1"))
        await peer.receive(wire.GREETING.size)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for byte in handshake:
                await peer.send(bytes([byte]))
                await asyncio.sleep(0.05)
        assert await peer.is_closed()
        assert 0.25 < time.monotonic() - began < 10
        await silent.receive(wire.GREETING.size)
        assert await silent.is_closed()
        await until(lambda: not server._connections)


async def test_the_deadline_ends_a_handshake_whose_answers_are_not_read(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HANDSHAKE_DEADLINE_S", 0.3)
    monkeypatch.setattr(pool, "names", lambda: [f"clone{number}" for number in range(30_000)])
    async with serving(pool) as server, await Peer.connect(server) as peer:
        await peer.greet()
        await peer.send(option(Option.LIST))
        await until(lambda: not server._connections)


async def test_the_deadline_is_not_about_the_time_that_opening_takes(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HANDSHAKE_DEADLINE_S", 0.2)
    opened = pool.open_clone

    def open_slowly(name: str) -> Clone:
        time.sleep(0.4)
        return opened(name)

    monkeypatch.setattr(pool, "open_clone", open_slowly)
    async with serving(pool) as server, await Peer.connect(server) as peer:
        await peer.greet()
        sent_by(await peer.ask(Option.INFO, go_data("web1")))
        sent_by(await peer.ask(Option.GO, go_data("web1")))
        await asyncio.sleep(0.3)  # nor is it about what follows
        assert (await peer.run(CMD_READ, 0, 512)).data == BASE[:512]


async def test_while_an_export_is_being_opened_others_are_served(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    opened = pool.open_clone

    def open_slowly(name: str) -> Clone:
        if name == "web1":
            assert go_on.wait(PATIENCE_S)
        return opened(name)

    monkeypatch.setattr(pool, "open_clone", open_slowly)
    async with serving(pool) as server:
        slow = [asyncio.create_task(connect(server, "web1")) for _ in range(3)]
        async with await connect(server, "web2") as disk:
            assert await disk.pread(512, 0) == BASE[:512]
        assert not any(task.done() for task in slow)
        go_on.set()
        for task in slow:
            async with await task as disk:
                assert await disk.pread(512, 0) == BASE[:512]


async def test_a_client_that_leaves_while_its_export_is_opened_leaves_it_free(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, go_on = threading.Event(), threading.Event()
    opened = pool.open_clone

    def open_slowly(name: str) -> Clone:
        began.set()
        assert go_on.wait(PATIENCE_S)
        return opened(name)

    monkeypatch.setattr(pool, "open_clone", open_slowly)
    async with serving(pool) as server:
        async with await Peer.connect(server) as peer:
            await peer.greet()
            await peer.send(option(Option.GO, go_data("web1")))
            await until(began.is_set)
        go_on.set()
        await until(lambda: not server._connections)
        pool.remove(["web1"])


async def test_the_base_is_served_read_only(pool: Pool) -> None:
    async with serving(pool) as server, await connect(server, "base") as disk:
        assert disk.read_only
        assert await disk.pread(BASE_SIZE, 0) == BASE
        await disk.flush()
        for command in (wire.CMD_WRITE, wire.CMD_TRIM, wire.CMD_WRITE_ZEROES):
            with pytest.raises(ServerRefused) as refused:
                await disk.request(command, 0, 0, 512, bytes(512) if command == wire.CMD_WRITE else b"")
            assert refused.value.code == wire.EPERM


async def test_an_export_is_closed_after_its_last_connection_and_no_sooner(pool: Pool) -> None:
    async with serving(pool) as server:
        peers = [await Peer.open(server, "web1") for _ in range(3)]
        for peer in peers:
            assert "web1" in server._exports._open
            await peer.send(peer.request(CMD_DISC))
            assert await peer.is_closed()
            peer.close()
        await until(lambda: "web1" not in server._exports._open)
        await until(lambda: not server._exports._turns)


async def test_names_that_are_not_ascii_are_refused_with_a_text_that_fits(pool: Pool) -> None:
    async with serving(pool) as server:
        with pytest.raises(ServerRefused) as refused:
            await connect(server, "🖴" * 1000)
        assert len(str(refused.value).encode()) < 4096 + 1100


async def test_two_pools_have_two_servers(tmp_path: Path) -> None:
    pools = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        pools.append(make_pool(tmp_path / name, bytes(4096) + name.encode().ljust(4096, b"."), "web1"))
    async with (
        serving(pools[0]) as one,
        Server(pools[1], listen=[("127.0.0.1", 0)]) as two,
        await connect(one, "web1") as first,
        await connect(two, "web1") as second,
    ):
        assert (await first.pread(3, 4096), await second.pread(3, 4096)) == (b"one", b"two")
