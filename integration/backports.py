"""The newest qemu that the distribution has for this release, from its backports, beside the one that is installed.

From 8.2 on qemu speaks NBD's extended headers; Debian 12 itself has 7.2, and 10 among its backports. It is fetched by
apt with lists and directories of its own and unpacked in the cache: nothing is installed and nothing of this machine's
apt is changed, so an ordinary user can do it. The mirror is the one that this machine's apt uses.

    subprocess.run([*newer_qemu("qemu-img"), "info", uri])
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path

from integration.guest.cache import cached

PROGRAMS = ("qemu-img", "qemu-io", "qemu-nbd", "qemu-storage-daemon")
TIMEOUT_S = 240
DPKG_STATUS = Path("/var/lib/dpkg/status")


class Unavailable(Exception):
    """There is no newer qemu to be had; the text says why."""


def newer_qemu(program: str) -> list[str]:
    """The command, without arguments, that runs the newer one of qemu's programs.

    Raises:
        Unavailable: this is no Debian, or there is no network.
    """
    return _command(_tree(), program)


def _command(tree: Path, program: str) -> list[str]:
    libraries = tree / "usr/lib" / f"{platform.machine()}-linux-gnu"  # those that this machine lacks
    return ["env", f"LD_LIBRARY_PATH={libraries}", str(tree / "usr/bin" / program)]


@cache
def _tree() -> Path:
    return cached("newer-qemu", [Path(__file__).read_text(), _release()], _fetch, _works)


def _works(tree: Path) -> bool:
    """It does not when a library was removed from this machine since the tree was made."""
    commands = [[*_command(tree, program), "--version"] for program in PROGRAMS]
    return all(subprocess.run(command, check=False, capture_output=True).returncode == 0 for command in commands)


def _fetch(tree: Path) -> None:
    """Unpack the package, and those that it needs and this machine does not have."""
    apt = tree / "apt"
    (apt / "lists/partial").mkdir(parents=True)
    (apt / "archives/partial").mkdir(parents=True)
    (apt / "sources.list").write_text(_sources())
    (apt / "status").write_text(_installed_without_qemu())
    options = {
        "Dir::Etc::SourceList": apt / "sources.list",
        "Dir::Etc::SourceParts": apt / "none",
        "Dir::State::Lists": apt / "lists",
        "Dir::State::Status": apt / "status",
        "Dir::Cache": apt,
        "Dir::Cache::Archives": apt / "archives",
        "Debug::NoLocking": 1,  # nobody else knows these directories, and the locks of the real ones are root's
        "APT::Sandbox::User": "root",  # or apt's own user could not enter the cache; without effect for others
    }
    command = ["apt-get", "--quiet=2", *(f"--option={name}={value}" for name, value in options.items())]
    # Its status is that of the hooks too, which an ordinary user may not be able to run. What counts is what it got.
    updated = _run(*command, "update", check=False)
    backports = f"--target-release={_release()}-backports"
    installed = _run(
        *command, "install", "--yes", "--download-only", "--no-install-recommends", backports, "qemu-utils", check=False
    )
    if installed.returncode:
        raise Unavailable(f"no newer qemu: {updated.stderr}{installed.stderr}")
    for package in (apt / "archives").glob("*.deb"):
        _run("dpkg-deb", "-x", str(package), str(tree))
    shutil.rmtree(apt)
    if not _works(tree):
        raise Unavailable("the newer qemu does not run on this machine")


def _release() -> str:
    """Such as "bookworm"."""
    try:
        release = platform.freedesktop_os_release().get("VERSION_CODENAME")
    except OSError:
        release = None
    if release is None or not DPKG_STATUS.exists():
        raise Unavailable("no newer qemu: this is not Debian, nor made from it")
    return release


def _sources() -> str:
    """The release and its backports, from where this machine's apt gets the release."""
    mirror = _mirror()
    if mirror is None and os.geteuid() == 0:  # a fresh container has no package lists yet
        _run("apt-get", "--quiet=2", "update")
        mirror = _mirror()
    if mirror is None:
        raise Unavailable(f"no newer qemu: apt has no list of {_release()}; has apt-get update been run?")
    keyring = Path(f"/usr/share/keyrings/{platform.freedesktop_os_release()['ID']}-archive-keyring.gpg")
    option = f"[signed-by={keyring}] " if keyring.exists() else ""
    return "".join(f"deb {option}{mirror} {suite} main\n" for suite in (_release(), f"{_release()}-backports"))


def _mirror() -> str | None:
    targets = _run("apt-get", "indextargets", "--format", "$(CODENAME) $(REPO_URI)", "Created-By: Packages").stdout
    return next((line.split()[1] for line in targets.splitlines() if line.split()[0] == _release()), None)


def _installed_without_qemu() -> str:
    """What this machine has, but for qemu: apt would want to upgrade that, and whatever depends on its version."""
    fields = ("Package:", "Status:", "Architecture:", "Multi-Arch:", "Version:", "Provides:")
    packages = [
        "\n".join(line for line in package.splitlines() if line.startswith(fields))
        for package in DPKG_STATUS.read_text(errors="replace").split("\n\n")
        if not package.startswith("Package: qemu-")
    ]
    return "\n\n".join(packages) + "\n"


def _run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        check=check,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=TIMEOUT_S,
    )
