"""One target under atheris: ``python tests/fuzz/instrumented.py TARGET [libFuzzer's options] [corpora]``.

atheris is in the extra ``fuzz``; nothing else needs it. Only the core is instrumented.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import atheris

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "protocol"), str(HERE.parent.parent)]

with atheris.instrument_imports(include=["nbdclone.protocol"]):
    from targets import TARGETS

if __name__ == "__main__":
    _script, name, *options = sys.argv
    # libFuzzer merges in a process of its own, and asks a shell to run its first argument.
    command = shlex.join([sys.executable, __file__, name])
    atheris.Setup([command, *options], TARGETS[name])
    atheris.Fuzz()
