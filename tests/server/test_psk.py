"""TLS with pre-shared keys; collected where Python has them (3.13)."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
from secure import trusting
from serving import BASE, serving, until, where

from nbdclone import credentials
from nbdclone.client import Client
from nbdclone.errors import UsageError
from nbdclone.server.tls import ServerTLS
from nbdclone.store.pool import Pool

KEY = "00112233445566778899aabbccddeeff"


async def test_clients_that_know_a_key_come_in_and_no_others(
    pool: Pool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "keys").write_text(f"web1:{KEY}\nweb2:{KEY[::-1]}\n")
    (tmp_path / "wrong").write_text(f"web1:{KEY[::-1]}\nweb9:{KEY}\n")
    tls = ServerTLS(psk=tmp_path / "keys")
    async with serving(pool, sockets=[tmp_path / "s"], tls=tls) as server:
        uri = where(server, "web1").replace(":///", "://{}@/") + "&tls-psk-file={}"
        for name in ("web1", "web2"):
            async with await Client.connect(uri.format(name, tmp_path / "keys")) as client:
                assert await client.pread(512, 0) == BASE[:512]
        for name in ("web1", "web9"):
            with pytest.raises(OSError, match=r"alert|lost|failed"):
                await Client.connect(uri.format(name, tmp_path / "wrong"))
        with pytest.raises(UsageError, match="there is no key of 'web3'"):
            await Client.connect(uri.format("web3", tmp_path / "keys"))
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            nobody = trusting(verify_peer=False)
            nobody.minimum_version = nobody.maximum_version = version
            with pytest.raises(OSError, match=r"alert|lost|failed"):
                await Client.connect(where(server, "web1"), tls=nobody)
            known = credentials.psk_client_context(tmp_path / "keys", "web1")
            known.minimum_version = known.maximum_version = version
            await (await Client.connect(where(server, "web1"), tls=known)).close()
        await until(lambda: not server._connections)
        assert not any(record.exc_info for record in caplog.records if record.name == "nbdclone")
