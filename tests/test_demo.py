"""The demo tells the truth, leaves what it says it leaves, and says how to go on."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from nbdclone import Pool


def run_demo(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nbdclone", "demo", *args],
        check=False,
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_demo_ends_well_within_a_minute_and_leaves_its_pool(tmp_path: Path) -> None:
    began = time.monotonic()
    done = run_demo("--dir", str(tmp_path / "demo"))
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 60
    for clone in ("web1", "web2", "web3"):
        assert f"{clone}     I am {clone}." in done.stdout
    assert "golden   I am nobody yet." in done.stdout
    pool = Pool.open(tmp_path / "demo" / "pool")
    assert "all of web1 zeroed, and back" in done.stdout
    assert pool.names() == ["golden", "web1", "web1@good", "web2", "web3"]
    for clone in ("web1", "web2", "web3"):
        with pool.open_clone(clone) as disk:
            assert f"I am {clone}.".encode() in disk.pread(disk.size, 0)
    for command in ("serve --socket", "nbd-client -unix", "qemu-system-x86_64"):
        assert command in done.stdout


def test_the_demo_refuses_a_directory_that_is_in_use(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    done = run_demo("--dir", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith(f"nbdclone: {tmp_path} is not empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["precious"]
