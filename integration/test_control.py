"""The control socket of a running server: curl, the command line, and what a verb costs the clients."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from integration import served as served_module
from integration.packages import program
from integration.served import Served, make_pool, nbdclone, served
from nbdclone.control.client import Control

pytestmark = [pytest.mark.timeout(240), pytest.mark.alone]

MIB = 1 << 20
SIZE = 64 * MIB
# A round with the verb and one without take turns so many times.
ROUNDS = 3
ROUND_S = 3
# What a client's p99 may be beside a verb. Steps of a MiB hold writes back for about a millisecond; the rest is for
# machines that are busy with other things. The figures of a quiet one are in docs/control.md.
P99_LIMIT_MS = 50.0

VERB = '''
from nbdclone.control.verbs import VERBS, Steps, Target, Verb

STEP = 1 << 20

def rewrite(target: Target, name: str, times: int) -> Steps:
    """Rewrite a clone with what it holds, a MiB at a time: what flatten and merge do to it."""
    with target.opened(name) as opened:
        clone = opened.clone
        total = times * clone.size
        for number in range(0, total, STEP):
            offset = number % clone.size
            opened.change(lambda offset=offset: clone.pwrite(clone.pread(STEP, offset), offset))
            yield number + STEP, total
        opened.flush()
    return {"bytes": total}

VERBS["rewrite"] = Verb("rewrite", "worker", "sitecustomize:rewrite")
'''


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    image = tmp_path / "image.raw"
    image.write_bytes(os.urandom(SIZE))
    return make_pool(tmp_path / "pool", image, "web1", "web2")


def curl(pool: Path, path: str, *args: str, status: int = 200) -> Any:
    """Ask with curl: the JSON that comes, or the lines of it."""
    command = [program("curl"), "--silent", "--show-error", "--unix-socket", str(pool / ".control")]
    command += ["--write-out", "\\n%{http_code} %{content_type}", *args, f"http://localhost/v1/{path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    text, _, last = done.stdout.rpartition("\n")
    assert last.split()[0] == str(status), done.stdout
    return [json.loads(line) for line in text.splitlines()] if "jsonl" in last else json.loads(text)


@contextmanager
def client_of(server: Served, name: str, seconds: int) -> Iterator[subprocess.Popen[bytes]]:
    command = [
        program("fio"), "--name=load", "--ioengine=nbd", f"--uri={server.uri(name)}", "--rw=randrw", "--bs=4k",
        "--iodepth=4", "--thread", f"--size={SIZE}", "--time_based", f"--runtime={seconds}", "--output-format=json",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def p99_ms(process: subprocess.Popen[bytes]) -> dict[str, float]:
    """Of reads and of writes, when it has ended by itself."""
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out.decode()
    [job] = json.loads(out[out.index(b"{") :])["jobs"]
    assert job["error"] == 0
    return {kind: job[kind]["clat_ns"]["percentile"]["99.000000"] / 1e6 for kind in ("read", "write")}


def wait_for_client(pool: Path) -> None:
    """fio connects to ask for the size, and then again to stay."""
    control = Control(pool)
    deadline = time.monotonic() + 20
    before: list[Any] = []
    while not (found := control.clients("web1")) or found != before:
        assert time.monotonic() < deadline
        before = found
        time.sleep(0.3)


def test_what_the_documentation_does_with_curl_works(tmp_path: Path) -> None:
    image = tmp_path / "image.raw"
    image.write_bytes(os.urandom(SIZE))
    pool = make_pool(tmp_path / "pool", image, "new", base="debian")
    document = (served_module.REPOSITORY / "docs" / "control.md").read_text()
    [commands] = re.findall(r"```sh\n(.*?)```", document, re.S)
    program("curl")
    separate = commands.replace("\nask ", "\nprintf '\\n%s\\n' ----; ask ")
    with served(pool, "--workers", "2"):
        done = subprocess.run(
            ["sh", "-euc", separate],
            check=False,
            env={**os.environ, "POOL": str(pool)},
            capture_output=True,
            text=True,
            timeout=100,
        )
    assert (done.returncode, done.stderr) == (0, "")
    answers = [part.strip() for part in done.stdout.split("----")[1:]]
    assert len(answers) == commands.count("\nask ") >= 8
    for answer in answers:
        for line in answer.splitlines():
            assert not line.startswith('{"error"'), line
            json.loads(line)
    assert json.loads(answers[4])["quota"] == 10737418240
    assert json.loads(answers[-2].splitlines()[-1])["result"]["quota"] is None
    assert json.loads(answers[-1]) == {"removed": ["web2"]}


def test_curl_sees_who_is_connected(pool: Path) -> None:
    with served(pool, "--workers", "2") as server, client_of(server, "web1", 120):
        wait_for_client(pool)
        [export] = curl(pool, "exports")
        assert (export["name"], export["worker"] in server.workers) == ("web1", True)
        assert export["clients"][0]["peer"].startswith("unix uid")
        refused = curl(pool, "entries/web1", "-X", "DELETE", status=409)["error"]
        assert refused["kind"] == "InUse"
        assert "connected: unix uid" in refused["message"]


def test_the_command_line_does_the_same_with_a_server_and_without(pool: Path) -> None:
    def quota(text: str) -> str:
        return nbdclone("--pool", pool, "quota", "web1", text).stdout

    assert quota("1G").startswith("clone 'web1' may take 1 GiB, and has ")
    with served(pool, "--workers", "2") as server, client_of(server, "web1", 120):
        wait_for_client(pool)
        assert quota("2G").startswith("clone 'web1' may take 2 GiB, and has ")
        nbdclone("--pool", pool, "clone", "base", "new")
        listed = json.loads(nbdclone("--pool", pool, "ls", "--json").stdout)
        assert [entry["name"] for entry in listed] == ["base", "new", "web1", "web2"]
        nbdclone("--pool", pool, "rm", "new")
        refused = nbdclone("--pool", pool, "rm", "web1", check=False)
        assert refused.returncode == 1
        said = r"nbdclone: in use, and nothing was removed; connected to 'web1': unix uid \d+ pid \d+ .*since .*\n"
        assert re.fullmatch(said, refused.stderr)
    assert quota("none").startswith("clone 'web1' has no quota, and has ")


def test_a_client_hardly_notices_a_verb_at_work_on_its_clone(
    pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(VERB)
    paths = f"{tmp_path / 'site'}{os.pathsep}{served_module.REPOSITORY}"
    monkeypatch.setattr(served_module, "ENVIRONMENT", {**os.environ, "PYTHONPATH": paths})
    found: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
    with served(pool, "--workers", "2") as server:
        control = Control(pool)
        with client_of(server, "web1", 2) as client:  # every block is the clone's own by and by
            p99_ms(client)
        for _ in range(ROUNDS):
            with client_of(server, "web1", ROUND_S) as client:
                found["without"].append(p99_ms(client))
            with client_of(server, "web1", ROUND_S) as client:
                wait_for_client(pool)
                steps = control.run("rewrite", {"name": "web1", "times": 1000})
                next(steps)
                found["with"].append(p99_ms(client))
                [job] = control.call("GET", "/jobs")
                done, _total = job["progress"]
                steps.close()
                assert done > 16 * MIB, "it was at work all the time"
            deadline = time.monotonic() + 20
            while control.call("GET", "/jobs"):
                assert time.monotonic() < deadline
                time.sleep(0.02)
    for kind in ("read", "write"):
        p99 = {how: sorted(round_[kind] for round_ in rounds)[ROUNDS // 2] for how, rounds in found.items()}
        print(f"p99 of {kind}s, median of {ROUNDS}: {p99['without']:.2f} ms alone, {p99['with']:.2f} ms beside a verb")
        assert p99["with"] < P99_LIMIT_MS
