"""``python tests/fuzz/campaign.py [--seconds N] [--keep] [TARGET ...]``: each target for N seconds, in turn.

A target starts from its corpus here, and from what earlier campaigns found in ``.fuzz``. It ends at the first finding;
the input is kept in ``.fuzz/findings``. With ``--keep`` the smallest inputs that cover all that was covered become the
corpus here.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "protocol"), str(HERE.parent.parent)]

from targets import CORPUS, TARGETS  # noqa: E402

WORK = HERE.parent.parent / ".fuzz"
FINDINGS = WORK / "findings"

MAX_LENGTH = 1024  # bytes of an input: each is fed byte by byte, too
INPUT_SECONDS = 10  # one input takes milliseconds; what takes longer is a finding
MEMORY_MB = 512  # the process has 45
# In libFuzzer's words: executions, seconds, edges, features.
FIGURES = (r"number_of_executed_units: (\d+)", r"runs in (\d+) second", r"cov: (\d+)", r"ft: (\d+)")
# What is kept as the corpus; longer inputs that cover more are left to the next campaign to find.
MAX_KEPT_LENGTH = 768
KEPT = re.compile("[0-9a-f]{16}")  # how libFuzzer names inputs, cut; what has another name was a finding, and stays


def fuzz(target: str, *arguments: str | Path) -> tuple[int, str]:
    """Run libFuzzer on a target: its exit status, and what it wrote."""
    command = [sys.executable, HERE / "instrumented.py", target, *arguments]
    done = subprocess.run(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    return done.returncode, done.stdout.decode(errors="replace")


def campaign(target: str, seconds: int) -> bool:
    """Fuzz one target, and print a line of a table. False if there was a finding."""
    grown = WORK / target
    grown.mkdir(parents=True, exist_ok=True)
    FINDINGS.mkdir(exist_ok=True)
    status, log = fuzz(
        target,
        f"-max_total_time={seconds}",
        f"-max_len={MAX_LENGTH}",
        f"-timeout={INPUT_SECONDS}",
        f"-rss_limit_mb={MEMORY_MB}",
        f"-dict={HERE / 'dictionary'}",
        f"-artifact_prefix={FINDINGS}/{target}-",
        "-print_final_stats=1",
        grown,
        CORPUS / target,
    )
    (WORK / f"{target}.log").write_text(log)
    figures = [_last(pattern, log) for pattern in FIGURES]
    print("|", " | ".join([target, *figures, "one" if status else "none"]), "|", flush=True)
    return not status


def keep(target: str) -> None:
    """Make the smallest inputs that cover what is covered the corpus."""
    with tempfile.TemporaryDirectory() as directory:
        status, log = fuzz(target, "-merge=1", f"-max_len={MAX_KEPT_LENGTH}", directory, CORPUS / target, WORK / target)
        kept = list(Path(directory).iterdir())
        if status or not kept:
            raise SystemExit(log)
        for path in (CORPUS / target).iterdir():
            if KEPT.fullmatch(path.name):
                path.unlink()
        for path in kept:
            shutil.copy(path, CORPUS / target / path.name[:16])


def _last(pattern: str, log: str) -> str:
    return (re.findall(pattern, log) or ["?"])[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=180, help="for each target")
    parser.add_argument("--keep", action="store_true", help="then make what was found the corpus")
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    arguments = parser.parse_args()
    targets = arguments.targets or list(TARGETS)
    if unknown := set(targets) - set(TARGETS):
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    print("| target | executions | seconds | edges | features | findings |", flush=True)
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    clean = [campaign(target, arguments.seconds) for target in targets]
    if not all(clean):
        raise SystemExit(f"what was found is in {FINDINGS}, and the logs beside it")
    if arguments.keep:
        for target in targets:
            keep(target)


if __name__ == "__main__":
    main()
