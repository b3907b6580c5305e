"""Python in a guest: this machine's interpreter, and the part of its library that a program needed when it ran here."""

from __future__ import annotations

import importlib.util
import os
import py_compile
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from integration.guest.initramfs import libraries

# Runs a program to its end, then prints where its modules came from.
REHEARSAL = """
import runpy, sys
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
files = {getattr(module, "__file__", None) for module in sys.modules.values()} - {None}
print(*sorted(files), sep="\\n")
"""
REHEARSAL_DEADLINE_S = 60


@dataclass(frozen=True)
class Python:
    """A program and all that it needs, at the paths that they have here."""

    files: dict[str, bytes]
    """For the initramfs."""
    command: str
    """For the guest's script: the program's arguments follow."""


def python(program: Path, *rehearsal: str | Path, path: Path) -> Python:
    """What it takes to run a program in a guest. `path` is where its own modules are found.

    It is run here with the arguments of the rehearsal. What it imports in the guest, it has to import here too.
    """
    search = [str(path), *(entry for entry in sys.path if entry)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(search)}
    with tempfile.TemporaryDirectory(prefix="nbdclone-") as directory:
        done = subprocess.run(
            [sys.executable, "-c", REHEARSAL, program, *rehearsal],
            cwd=directory,
            env=environment,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            timeout=REHEARSAL_DEADLINE_S,
        )
    interpreter = Path(sys.executable).resolve()
    binaries = [interpreter]
    files: dict[str, bytes] = {}
    for file in {program, *map(Path, done.stdout.splitlines())}:
        if file.name.endswith(tuple(EXTENSION_SUFFIXES)):
            binaries.append(file)
        else:
            files[_name(file)] = file.read_bytes()
            files[_name(Path(importlib.util.cache_from_source(str(file))))] = _compiled(file)
    needed = {library for binary in binaries for library in libraries(binary)}
    files |= {_name(file): file.read_bytes() for file in {*binaries, *needed}}
    directories = sorted({str(library.parent) for library in needed})
    variables = f"PYTHONPATH={os.pathsep.join(search)} LD_LIBRARY_PATH={os.pathsep.join(directories)}"
    return Python(files, f"{variables} {interpreter} -S -B {program}")


def _compiled(source: Path) -> bytes:
    """Its bytecode, which the guest takes as it is: compiling the library takes a guest longer than all the rest."""
    with tempfile.TemporaryDirectory(prefix="nbdclone-") as directory:
        compiled = Path(directory, "compiled")
        mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
        py_compile.compile(str(source), str(compiled), doraise=True, invalidation_mode=mode)
        return compiled.read_bytes()


def _name(file: Path) -> str:
    return str(file).lstrip("/")
