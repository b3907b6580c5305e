"""Other people's programs through TLS: with GnuTLS (libnbd, qemu) on their side and OpenSSL on ours."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.packages import program, require
from integration.served import ENVIRONMENT, REPOSITORY, Served, make_pool, nbdclone, served, sha256_of_file
from nbdclone.server.quiet import INTERVAL_S

pytestmark = pytest.mark.timeout(120)

MIB = 1 << 20
SIZE = 24 * MIB
WAYS = ("tcp", "unix")
# Sixteen bits: mov dx, 0x501; mov al, 0x10; out dx, al; hlt. On port 0x501 there is a device that ends qemu.
BOOT_SECTOR = bytes.fromhex("ba0105 b010 ee f4").ljust(510, b"\0") + b"\x55\xaa"
BOOTED_STATUS = 0x10 << 1 | 1


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool, and certificates: `tls` with a client web1 in it, `other` of another CA, `bare` of no client."""
    directory = tmp_path_factory.mktemp("tls")
    image = directory / "image.raw"
    image.write_bytes(BOOT_SECTOR + random.Random("tls").randbytes(SIZE - len(BOOT_SECTOR)))
    make_pool(directory / "pool", image, "web1", "web2")
    nbdclone("cert", directory / "tls", "--client", "web1")
    nbdclone("cert", directory / "other")
    (directory / "bare").mkdir()
    shutil.copy(directory / "tls" / "ca-cert.pem", directory / "bare")
    return directory


@pytest.fixture(scope="module")
def server(directory: Path) -> Iterator[Served]:
    """A server that requires TLS, on TCP and on a Unix socket."""
    where = ("--listen", "127.0.0.1:0", "--socket", directory / "nbd.sock")
    with served(directory / "pool", *where, "--tls-certificates", directory / "tls", "--verbose") as server:
        yield server


def run(*args: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [program(str(args[0])), *map(str, args[1:])]
    # nbdsh belongs to the system's own Python.
    environment = {**os.environ, "PATH": f"/usr/bin:{os.environ['PATH']}"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, env=environment)
    assert not check or done.returncode == 0, f"{command} exited {done.returncode}:\n{done.stdout}{done.stderr}"
    return done


def uri(server: Served, export: str, way: str, certificates: Path, more: str = "") -> str:
    before = server.uris[0] + f"/{export}?" if way == "tcp" else server.uris[1].replace("?", f"{export}?") + "&"
    return f"{before}tls-certificates={certificates}{more}"


def qemu(server: Served, way: str, certificates: Path, *, verify: str = "yes") -> tuple[str, str]:
    """The object for qemu's programs that stands for the certificates, and what it is like to connect."""
    made = f"tls-creds-x509,id=tls0,endpoint=client,dir={certificates},verify-peer={verify}"
    if way == "tcp":
        host, port = server.uris[0].removeprefix("nbds://").split(":")
        return made, f"driver=nbd,host={host},port={port},tls-creds=tls0"
    return made, f"driver=nbd,path={server.uris[1].partition('=')[2]},tls-creds=tls0,tls-hostname=localhost"


@pytest.mark.parametrize("way", WAYS)
def test_nbdinfo_sees_tls(server: Served, directory: Path, way: str) -> None:
    require("libnbd-bin")
    for certificates in (directory / "tls", directory / "tls" / "web1"):
        told = json.loads(run("nbdinfo", "--json", uri(server, "web1", way, certificates)).stdout)
        assert (told["protocol"], told["TLS"], told["structured"]) == ("newstyle-fixed", True, True)
        assert told["exports"][0]["export-size"] == SIZE
    listed = json.loads(run("nbdinfo", "--list", "--json", uri(server, "", way, directory / "tls")).stdout)
    assert {export["export-name"] for export in listed["exports"]} == {"base", "web1", "web2"}


@pytest.mark.parametrize("way", WAYS)
def test_nbdcopy_brings_an_image_there_and_back_on_four_connections(
    server: Served, directory: Path, tmp_path: Path, way: str
) -> None:
    require("libnbd-bin")
    content = tmp_path / "content"
    content.write_bytes(random.Random(way).randbytes(SIZE))
    there = uri(server, "web1", way, directory / "tls")
    run("nbdcopy", "--connections=4", "--flush", content, there)
    run("nbdcopy", "--connections=4", there, tmp_path / "back")
    assert sha256_of_file(tmp_path / "back") == sha256_of_file(content)


@pytest.mark.parametrize(("priority", "version"), [("-VERS-ALL:+VERS-TLS1.2", "TLSv1.2"), ("", "TLSv1.3")])
def test_both_versions_of_tls_are_spoken(server: Served, directory: Path, priority: str, version: str) -> None:
    require("libnbd-bin", "nbdkit", "qemu-utils")
    made, where = qemu(server, "tcp", directory / "tls")
    level = f",priority=NORMAL:{priority}" if priority else ""
    before = len(server.stderr.read_text())
    done = run("qemu-io", "--object", made + level, "--image-opts", f"{where},export=web2", "-c", "read 0 4k")
    assert "read 4096/4096 bytes" in done.stdout
    assert re.findall(r"TLSv1\.\d", server.stderr.read_text()[before:]) == [version]


def test_nbdsh_reads_writes_and_asks_for_block_status(server: Served, directory: Path) -> None:
    require("python3-libnbd")
    script = f"""
h.set_tls(nbd.TLS_REQUIRE)
h.add_meta_context("base:allocation")
h.set_uri_allow_local_file(True)
h.connect_uri({uri(server, "web2", "tcp", directory / "tls")!r})
assert h.get_tls_negotiated()
data = bytes(range(256)) * 4096
h.pwrite(data, 512, nbd.CMD_FLAG_FUA)
assert h.pread(len(data), 512) == data
h.zero(65536, 1 << 20)
h.trim(65536, 2 << 20)
h.flush()
told = []
h.block_status(1 << 20, 0, lambda name, at, extents, error: told.append((name, extents)))
assert told[0][0] == "base:allocation", told
h.shutdown()
"""
    run("/usr/bin/nbdsh", "-c", script)


@pytest.mark.parametrize("way", WAYS)
def test_qemu_img_and_qemu_io_work_through_tls(server: Served, directory: Path, tmp_path: Path, way: str) -> None:
    require("qemu-utils")
    made, where = qemu(server, way, directory / "tls")
    export = f"{where},export=web2"
    info = run("qemu-img", "info", "--object", made, "--image-opts", export).stdout
    assert f"({SIZE} bytes)" in info
    commands = ("write -P 0x5a 1000k 3M", "read -P 0x5a 1000k 3M", "write -z 8M 1M", "read -P 0 8M 1M", "flush")
    done = run(
        "qemu-io", "--object", made, "--image-opts", export, *(word for each in commands for word in ("-c", each))
    )
    assert "Pattern verification failed" not in done.stdout
    copied = tmp_path / "copied"
    run("qemu-img", "convert", "--object", made, "--image-opts", "-O", "raw", f"{where},export=base", copied)
    assert sha256_of_file(copied) == sha256_of_file(directory / "image.raw")


@pytest.mark.parametrize("certificates", ["bare", "other"])
@pytest.mark.parametrize("way", WAYS)
def test_a_client_with_a_wrong_certificate_or_none_is_refused(
    server: Served, directory: Path, way: str, certificates: str
) -> None:
    require("libnbd-bin", "qemu-utils")
    own = directory / certificates
    made, where = qemu(server, way, own, verify="no")
    why = {"bare": "peer did not return a certificate", "other": "certificate verify failed"}[certificates]
    deadline = time.monotonic() + 10 * INTERVAL_S
    while True:  # until the log, which says one such thing in a while, has said this one
        refused = run("nbdinfo", uri(server, "web1", way, own, "&tls-verify-peer=0"), check=False)
        assert refused.returncode == 1, refused.stdout
        refused = run(
            "qemu-io", "--object", made, "--image-opts", f"{where},export=web1", "-c", "read 0 512", check=False
        )
        assert refused.returncode == 1, refused.stdout
        if f"the TLS handshake failed: {why}" in server.stderr.read_text():
            break
        assert time.monotonic() < deadline, server.stderr.read_text()
        time.sleep(0.5)
    assert run("nbdinfo", uri(server, "web1", way, directory / "tls")).returncode == 0


def test_a_client_does_not_trust_a_server_of_another_ca(server: Served, directory: Path) -> None:
    require("libnbd-bin")
    refused = run("nbdinfo", uri(server, "web1", "tcp", directory / "other"), check=False)
    assert refused.returncode == 1
    assert "certificate" in refused.stderr


@pytest.mark.parametrize("way", WAYS)
def test_plain_clients_are_told_that_tls_is_required(server: Served, directory: Path, way: str) -> None:
    require("libnbd-bin", "qemu-utils")
    plain = uri(server, "web1", way, directory / "tls").replace("nbds", "nbd", 1).partition("&tls")[0]
    plain = plain.partition("?tls")[0]
    assert run("nbdinfo", plain, check=False).returncode == 1
    refused = run("qemu-img", "info", plain, check=False)
    assert refused.returncode == 1
    assert "TLS" in refused.stderr


@pytest.fixture
def pool(directory: Path, tmp_path: Path) -> Path:
    """One that nobody serves yet."""
    return make_pool(tmp_path / "pool", directory / "image.raw", "web1")


def test_where_tls_is_offered_both_kinds_of_client_are_served(pool: Path, directory: Path) -> None:
    require("libnbd-bin", "qemu-utils")
    with served(pool, "--tls", "on", "--tls-certificates", directory / "tls") as server:
        plain = server.uri("web1")
        assert json.loads(run("nbdinfo", "--json", plain).stdout)["TLS"] is False
        secure = f"{plain.replace('nbd', 'nbds', 1)}&tls-certificates={directory / 'tls'}"
        assert json.loads(run("nbdinfo", "--json", secure).stdout)["TLS"] is True
        run("qemu-img", "info", plain)


def test_qemu_boots_from_a_clone_through_tls(server: Served, directory: Path) -> None:
    require("qemu-system-x86", "seabios")
    made, where = qemu(server, "tcp", directory / "tls" / "web1")
    disk = where.replace("driver=nbd", "driver=nbd,node-name=disk") + ",export=base,read-only=on"
    done = run(
        "qemu-system-x86_64", *("-accel", "tcg", "-m", "64", "-display", "none", "-no-reboot", "-nodefaults"),
        *("-device", "isa-debug-exit,iobase=0x501,iosize=2", "-object", made, "-blockdev", _server(disk)),
        *("-device", "virtio-blk-pci,drive=disk,bootindex=1"), check=False,
    )  # fmt: skip
    assert done.returncode == BOOTED_STATUS, done.stderr


def _server(options: str) -> str:
    """-blockdev wants the address of the server by its full name."""
    given = dict(part.split("=") for part in options.split(","))
    given |= {"server.type": "inet", "server.host": given.pop("host"), "server.port": given.pop("port")}
    return ",".join(f"{name}={value}" for name, value in given.items())


def test_a_pre_shared_key_opens_or_is_refused_by_a_python_without(pool: Path, tmp_path: Path) -> None:
    require("libnbd-bin", "qemu-utils")
    keys = tmp_path / "keys.psk"
    keys.write_text(f"web1:{os.urandom(32).hex()}\n")
    args = ("--pool", pool, "serve", "--socket", tmp_path / "s", "--tls-psk", keys)
    if not getattr(ssl, "HAS_PSK", False):
        done = nbdclone(*args, check=False)
        assert done.returncode == 1
        assert re.fullmatch(r"nbdclone: TLS-PSK needs Python 3\.13 or newer; this is 3\.\d+\n", done.stderr)
        return
    with served(pool, "--socket", tmp_path / "s", "--tls-psk", keys):
        there = f"nbds+unix://{{}}@/web1?socket={tmp_path / 's'}&tls-psk-file={keys}"
        assert json.loads(run("nbdinfo", "--json", there.format("web1")).stdout)["TLS"] is True
        made = f"tls-creds-psk,id=tls0,endpoint=client,dir={tmp_path},username=web1"
        where = f"driver=nbd,path={tmp_path / 's'},export=web1,tls-creds=tls0"
        run("qemu-img", "info", "--object", made, "--image-opts", where)
        assert run("nbdinfo", there.format("web2"), check=False).returncode == 1


def test_a_ready_line_of_a_server_that_requires_tls_is_for_its_clients(server: Served) -> None:
    assert [uri.partition(":")[0] for uri in server.uris] == ["nbds", "nbds+unix"]
    with socket.create_connection(("127.0.0.1", int(server.uris[0].rpartition(":")[2])), 10) as plain:
        assert plain.recv(18, socket.MSG_WAITALL)[:8] == b"NBDMAGIC"


PORT = 10809


def test_the_commands_of_the_documentation_work(directory: Path, tmp_path: Path) -> None:
    require("libnbd-bin", "qemu-utils")
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", PORT)) == 0:
            pytest.fail(f"something listens on port {PORT}, which the documentation's server wants")
    blocks = re.findall(r"<!-- run: host -->\n```sh\n(.*?)```", (REPOSITORY / "docs" / "tls.md").read_text(), re.DOTALL)
    [serving] = [number for number, block in enumerate(blocks) if "nbdclone serve" in block]
    blocks[serving] += "until grep -q 'nbdclone ready on nbds://' output; do sleep 0.1; kill -0 $!; done\n"
    tool = tmp_path / "bin" / "nbdclone"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\nexec {sys.executable} -m nbdclone "$@"\n')
    tool.chmod(0o755)
    pool = make_pool(tmp_path / "pool", directory / "image.raw", "web1")
    own = {"HOME": str(tmp_path), "NBDCLONE_POOL": str(pool), "PATH": f"{tool.parent}:{os.environ['PATH']}"}
    script = "set -e\n" + "\n".join(blocks) + "\nkill $!\nwait $!\n"
    with open(tmp_path / "output", "wb") as out:
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=tmp_path,
            env=ENVIRONMENT | own,
            stdout=out,
            stderr=out,
            check=False,
            timeout=100,
        )
    said = (tmp_path / "output").read_text()
    assert done.returncode == 0, said
    assert "newstyle-fixed with TLS" in said
    assert f"({SIZE} bytes)" in said
    assert (tmp_path / "backup.img").read_bytes() == (directory / "image.raw").read_bytes()
