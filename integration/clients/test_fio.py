"""fio with its own NBD engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from integration.clients.programs import WAYS, run
from integration.packages import require
from integration.served import make_pool, served

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("way", WAYS)
def test_what_fio_wrote_from_several_jobs_is_there_and_still_is_after_a_restart(
    directory: Path, image: Path, way: str
) -> None:
    require("fio")
    pool = make_pool(directory / f"fio-{way}", image, "disk")
    where = ("--listen", "127.0.0.1:0") if way == "tcp" else ("--socket", directory / f"fio-{way}.sock")

    def fio(there: str, *more: str) -> None:
        jobs = ("--numjobs=4", "--size=8M", "--offset_increment=8M", "--iodepth=16", "--group_reporting")
        verify = (
            "--verify=crc32c",
            "--verify_fatal=1",
            "--randseed=7",
            "--bsrange=512-96k",
            "--blockalign=512",
            "--verify_state_save=0",
        )
        run("fio", "--name=disk", "--ioengine=nbd", f"--uri={there}", "--rw=randwrite", *jobs, *verify, *more)

    with served(pool, *where) as server:
        fio(server.uri("disk"), "--do_verify=1", "--end_fsync=1")
    with served(pool, *where) as server:
        fio(server.uri("disk"), "--verify_only")
