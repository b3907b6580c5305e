"""Who may import whom: the picture of the packages, enforced."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import nbdclone

ROOT = Path(nbdclone.__file__).parent
MODULES = {
    ".".join(("nbdclone", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}
OUTSIDE_THE_WORLD = {"asyncio", "socket", "uvloop", "selectors", "ssl"}
NO_FILES_NO_CLOCK = {"os", "io", "pathlib", "time", "datetime", "threading", "subprocess", "random", "mmap", "tempfile"}

# What each part may import of the package besides itself and nbdclone.errors.
ALLOWED = {
    "nbdclone.protocol": set(),
    "nbdclone.store": set(),
    "nbdclone.errors": set(),
    "nbdclone.address": {"nbdclone.protocol"},
    "nbdclone.credentials": set(),
    "nbdclone.certificates": {"nbdclone.credentials"},
    "nbdclone.client": {"nbdclone.protocol", "nbdclone.address", "nbdclone.client_connection"},
    "nbdclone.client_connection": {"nbdclone.protocol", "nbdclone.address", "nbdclone.credentials"},
    "nbdclone.exchange": {"nbdclone.protocol", "nbdclone.store", "nbdclone.server", "nbdclone.client"},
    "nbdclone.control": {"nbdclone.store"},
    "nbdclone.server": {"nbdclone.protocol", "nbdclone.store", "nbdclone.credentials", "nbdclone.control"},
}


def imports(path: Path, module: str) -> set[str]:
    """Every module that is imported at run time, wherever in the file it stands."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in _at_run_time(ast.parse(path.read_text()).body):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def _at_run_time(body: list[ast.stmt]) -> list[ast.AST]:
    """All nodes but those under ``if TYPE_CHECKING``."""
    nodes: list[ast.AST] = []
    for statement in body:
        if isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING":
            continue
        nodes += ast.walk(statement)
    return nodes


def part_of(module: str) -> str:
    """``nbdclone.store`` for ``nbdclone.store.delta``."""
    return ".".join(module.split(".")[:2])


@pytest.mark.parametrize("module", sorted(m for m in MODULES if part_of(m) in ("nbdclone.protocol", "nbdclone.store")))
def test_protocol_and_store_know_neither_loop_nor_socket(module: str) -> None:
    roots = {name.partition(".")[0] for name in imports(MODULES[module], module)}
    assert not roots & OUTSIDE_THE_WORLD


@pytest.mark.parametrize("module", sorted(m for m in MODULES if part_of(m) == "nbdclone.protocol"))
def test_the_protocol_touches_no_file_and_no_clock(module: str) -> None:
    roots = {name.partition(".")[0] for name in imports(MODULES[module], module)}
    assert not roots & NO_FILES_NO_CLOCK


@pytest.mark.parametrize("module", sorted(m for m in MODULES if part_of(m) in ALLOWED))
def test_imports_point_downwards(module: str) -> None:
    part = part_of(module)
    others = {
        part_of(name)
        for name in imports(MODULES[module], module)
        if name.startswith("nbdclone.") and part_of(name) in {part_of(known) for known in MODULES}
    }
    assert others <= ALLOWED[part] | {part, "nbdclone.errors"}


def test_the_imports_are_really_found(tmp_path: Path) -> None:
    source = tmp_path / "sample.py"
    source.write_text(
        "from typing import TYPE_CHECKING\nimport os.path\nfrom . import delta\nfrom ..errors import X\n"
        "def f():\n    from asyncio import sleep\nif TYPE_CHECKING:\n    import socket\n"
    )
    found = imports(source, "nbdclone.store.sample")
    assert {"os.path", "nbdclone.store.delta", "nbdclone.errors", "asyncio"} <= found
    assert "socket" not in found
