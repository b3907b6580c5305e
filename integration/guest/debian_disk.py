"""A whole Debian on a disk that a BIOS boots from: what linked clones are for.

The disk is made without mounting anything and without a loop device, so that an ordinary user can make it:

    sector 0        syslinux's master boot record and the partition table
    1 MiB           FAT: syslinux, the kernel, its initrd
    41 MiB          ext4: the root file system

On each boot the service `witness` tells on the serial console what earlier boots left on the disk, leaves a file named
after the machine's serial number, and powers the machine off.
"""

from __future__ import annotations

import os
import subprocess
import tarfile
from functools import cache
from pathlib import Path

from integration.guest.cache import cached
from integration.guest.qemu import KERNEL_OPTIONS
from integration.packages import program

SUITE = "bookworm"
PACKAGES = ("linux-image-cloud-amd64", "systemd-sysv", "udev")
MIB = 1 << 20
DISK_SIZE, FAT_OFFSET, ROOT_OFFSET = 1024 * MIB, 1 * MIB, 41 * MIB
SECTOR_SIZE = 512

WITNESS = Path(__file__).with_name("witness")
WITNESS_SERVICE = Path(__file__).with_name("witness.service")

PARTITIONS = f"""\
label: dos
start={FAT_OFFSET // SECTOR_SIZE}, size={(ROOT_OFFSET - FAT_OFFSET) // SECTOR_SIZE}, type=c, bootable
start={ROOT_OFFSET // SECTOR_SIZE}, type=83
"""

SYSLINUX_CONFIG = f"""\
SERIAL 0 115200
DEFAULT debian
LABEL debian
  LINUX vmlinuz
  INITRD initrd.img
  APPEND root=/dev/vda2 rw systemd.show_status=0 {KERNEL_OPTIONS}
"""

# Enough to mount the root file system; an initrd that fits any machine takes far longer to load in a guest.
INITRAMFS_CONFIG = r"""
mkdir -p "$1/etc/initramfs-tools/conf.d"
echo MODULES=list > "$1/etc/initramfs-tools/conf.d/virtual-machine"
printf '%s\n' virtio_pci virtio_blk ext4 > "$1/etc/initramfs-tools/modules"
"""

# The serial port is for the witness alone. A machine-id that is there already spares each first boot from setting up
# every service anew.
SYSTEM_CONFIG = """
mkdir -p "$1/var/lib/witness"
chmod 755 "$1/usr/local/sbin/witness"
echo 0123456789abcdef0123456789abcdef > "$1/etc/machine-id"
echo debian > "$1/etc/hostname"
chroot "$1" systemctl --quiet enable witness.service
chroot "$1" systemctl --quiet mask serial-getty@ttyS0.service getty@tty1.service
"""

# The kernel is on the FAT partition, and /dev is filled by the kernel; an ordinary user could not make its nodes.
FILL_ROOT_PARTITION = """
set -e
mkdir tree
tar -C tree --exclude='./boot/*' --exclude='./dev/*' -xf debian.tar
mke2fs -q -t ext4 -d tree -E offset=$2,assume_storage_prezeroed=1 "$1" "$3"
rm -rf tree
"""


@cache
def debian_disk() -> Path:
    """The disk's raw image, made when it is not in the cache. Not to be written to."""
    recipe = [path.read_text() for path in (Path(__file__), WITNESS, WITNESS_SERVICE)]
    return cached("debian-disk", [*recipe, KERNEL_OPTIONS], _build) / "disk.raw"


def _build(directory: Path) -> None:
    tree = _install_debian(directory)
    disk = directory / "disk.raw"
    with open(disk, "wb") as image:
        image.truncate(DISK_SIZE)
    _run(program("sfdisk"), "--quiet", str(disk), stdin=PARTITIONS)
    with open(disk, "r+b") as image:
        image.write(Path(program("/usr/lib/syslinux/mbr/mbr.bin")).read_bytes())
    _fill_boot_partition(disk, tree)
    _fill_root_partition(disk, tree)
    tree.unlink()
    disk.chmod(0o444)


def _install_debian(directory: Path) -> Path:
    """A tar archive of a small Debian, from the mirror that mmdebstrap takes by itself."""
    tree = directory / "debian.tar"
    without = [f"--dpkgopt=path-exclude=/usr/share/{useless}/*" for useless in ("man", "doc", "locale", "info")]
    _run(
        program("mmdebstrap"),
        "--quiet",
        "--variant=minbase",
        f"--include={','.join(PACKAGES)}",
        *without,
        f"--setup-hook={INITRAMFS_CONFIG}",
        f"--customize-hook=upload {WITNESS} /usr/local/sbin/witness",
        f"--customize-hook=upload {WITNESS_SERVICE} /etc/systemd/system/witness.service",
        f"--customize-hook={SYSTEM_CONFIG}",
        SUITE,
        str(tree),
    )
    return tree


def _fill_boot_partition(disk: Path, tree: Path) -> None:
    first_sector, kibibytes = FAT_OFFSET // SECTOR_SIZE, (ROOT_OFFSET - FAT_OFFSET) // 1024
    place = (f"--offset={first_sector}", "-h", str(first_sector))
    _run(program("mkfs.fat"), "-F", "16", *place, str(disk), str(kibibytes))
    _run(program("syslinux"), "--offset", str(FAT_OFFSET), "--install", str(disk))
    for name, content in _boot_files(tree).items():
        _run(program("mcopy"), "-i", f"{disk}@@{FAT_OFFSET}", "-", f"::{name}", stdin=content)


def _boot_files(tree: Path) -> dict[str, bytes | str]:
    files: dict[str, bytes | str] = {"syslinux.cfg": SYSLINUX_CONFIG}
    with tarfile.open(tree) as archive:
        for member in archive:
            if member.name.startswith(("./boot/vmlinuz-", "./boot/initrd.img-")):
                content = archive.extractfile(member)
                assert content is not None
                files[Path(member.name).name.partition("-")[0]] = content.read()
    return files


def _fill_root_partition(disk: Path, tree: Path) -> None:
    # Who is not root becomes root of a user namespace, where files can be given to any owner; so does mmdebstrap.
    namespace = () if os.geteuid() == 0 else (program("unshare"), "--map-root-user", "--map-auto")
    script = ("sh", "-c", FILL_ROOT_PARTITION, "sh", str(disk), str(ROOT_OFFSET))
    _run(*namespace, *script, f"{(DISK_SIZE - ROOT_OFFSET) // 1024}k", cwd=tree.parent)


def _run(*command: str, stdin: str | bytes = b"", cwd: Path | None = None) -> None:
    given = stdin.encode() if isinstance(stdin, str) else stdin
    # mke2fs is a program for root, and so lies where others do not look.
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    done = subprocess.run(
        command, check=False, input=given, cwd=cwd, env={**os.environ, "PATH": path}, capture_output=True, timeout=500
    )
    if done.returncode:
        said = (done.stdout + done.stderr).decode(errors="replace")
        raise RuntimeError(f"{command[0]} exited with status {done.returncode}:\n{said[-4000:]}")
