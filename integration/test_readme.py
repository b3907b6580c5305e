"""The README's commands do what the README says, word for word.

What stands in its blocks for the host is run by a shell on this machine, in a home of its own; what stands in the block
for root is run in a guest, where the server's port on 127.0.0.1 leads to this machine.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from integration.guest.initramfs import write_initramfs
from integration.guest.kernel import kernel
from integration.guest.qemu import NETWORK, guest
from integration.packages import program, require
from integration.served import ENVIRONMENT, REPOSITORY

pytestmark = pytest.mark.timeout(240)

PORT = 10809
# Sixteen bits: mov dx, 0x501; mov al, 0x10; out dx, al; hlt. On port 0x501 there is a device that ends qemu.
BOOT_SECTOR = bytes.fromhex("ba0105 b010 ee f4").ljust(510, b"\0") + b"\x55\xaa"
BOOTED_STATUS = 0x10 << 1 | 1

QEMU = """#!/bin/sh
exec {program} "$@" -display none -no-reboot -device isa-debug-exit,iobase=0x501,iosize=2
"""

GUEST = """
modprobe() {{ :; }}  # the modules are in
nc -ll -p {port} -e nc 10.0.2.2 {port} &
while ! grep -qi ":{port:04x} " /proc/net/tcp /proc/net/tcp6; do sleep 0.1; done
echo "== block"
{block}
"""


def blocks(kind: str) -> list[str]:
    """The README's blocks of commands that are marked as being for ``kind``."""
    readme = (REPOSITORY / "README.md").read_text()
    return re.findall(rf"<!-- run: {kind} -->\n```sh\n(.*?)```", readme, re.DOTALL)


@dataclass
class Host:
    """A user's home in which the README's first block has been run, and its server is running."""

    home: Path
    environment: dict[str, str]
    said: str


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    require("busybox-static", "nbd-client", "e2fsprogs", "qemu-system-x86", "seabios")
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", PORT)) == 0:
            pytest.fail(f"something listens on port {PORT}, which the README's server wants")
    home = tmp_path_factory.mktemp("home")
    make_image(home / "disk.img")
    tools = home / "bin"
    tools.mkdir()
    make_tool(tools / "nbdclone", f'#!/bin/sh\nexec {sys.executable} -m nbdclone "$@"\n')
    make_tool(tools / "qemu-system-x86_64", QEMU.format(program=program("qemu-system-x86_64")))
    environment = {**ENVIRONMENT, "HOME": str(home), "PATH": f"{tools}:{os.environ['PATH']}"}
    output = home / "output"
    script = f"set -e\n{blocks('host')[0]}\nwait"
    with open(output, "wb") as out:
        shell = subprocess.Popen(
            ["bash", "-c", script], cwd=home, env=environment, stdout=out, stderr=out, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 60
        while "nbdclone ready on" not in output.read_text():
            assert shell.poll() is None, output.read_text()
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.05)
        yield Host(home, environment, output.read_text())
    finally:
        os.killpg(shell.pid, signal.SIGTERM)
        shell.wait(30)


def make_image(path: Path) -> None:
    """A disk that can be mounted, with a file in it, and booted: ext4 leaves room for a boot sector."""
    root = path.parent / "root"
    root.mkdir()
    (root / "welcome").write_text("hello\n")
    subprocess.run([program("mke2fs"), "-q", "-t", "ext4", "-d", str(root), str(path), "32M"], check=True, timeout=60)
    with open(path, "r+b") as image:
        image.write(BOOT_SECTOR)


def make_tool(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def test_the_first_block_makes_clones_and_serves_them(host: Host) -> None:
    for name in ("golden", "web1", "web2", "web3"):
        assert re.search(rf"^{name} ", host.said, re.MULTILINE), host.said
    assert f"nbdclone ready on nbd://127.0.0.1:{PORT} nbd+unix:///?socket={host.home}/nbd.sock" in host.said


def test_the_kernel_attaches_and_mounts_a_clone(host: Host, tmp_path: Path) -> None:
    (block,) = blocks("guest")
    initramfs = write_initramfs(tmp_path / "initramfs", kernel(), GUEST.format(port=PORT, block=block))
    options = ("-kernel", str(kernel().image), "-initrd", str(initramfs), "-append", "console=ttyS0 quiet panic=-1")
    with guest(*options, *NETWORK, console=tmp_path / "console.txt") as machine:
        told = machine.wait_until_off(120)
    assert "welcome" in told.section("block")[-1].split()


def test_a_virtual_machine_boots_from_a_clone(host: Host) -> None:
    _, boot, _ = blocks("host")
    done = subprocess.run(
        ["bash", "-c", boot],
        check=False,
        cwd=host.home,
        env=host.environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == BOOTED_STATUS, done.stderr


def test_a_snapshot_is_taken_and_others_start_from_it(host: Host) -> None:
    environment = {**host.environment, "NBDCLONE_POOL": str(host.home / "pool")}
    script = f"set -e\n{blocks('host')[2]}"
    done = subprocess.run(
        ["bash", "-c", script], env=environment, check=True, capture_output=True, text=True, timeout=60
    )
    assert re.search(r"web1@installed .*\n.*web1 ", done.stdout)
    assert "clone 'web4' is as 'web1@installed'" in done.stdout


def test_a_clone_that_is_not_wanted_any_more_is_removed(host: Host) -> None:
    readme = (REPOSITORY / "README.md").read_text()
    command = re.search(r"`(nbdclone rm \w+)`", readme)
    assert command
    environment = {**host.environment, "NBDCLONE_POOL": str(host.home / "pool")}
    subprocess.run(["bash", "-c", command[1]], env=environment, check=True, timeout=60)
    listed = subprocess.run(["nbdclone", "ls"], env=environment, check=True, capture_output=True, text=True, timeout=60)
    assert "web3" not in listed.stdout
    assert "web2" in listed.stdout
