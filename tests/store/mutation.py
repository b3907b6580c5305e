"""Break a line of the store on purpose, to see that a test notices."""

from __future__ import annotations

import inspect
import sys
import textwrap
from typing import Any

import pytest


def mutate(patch: pytest.MonkeyPatch, owner: type[Any], method: str, old: str, new: str) -> None:
    """Replace ``old``, which must occur once in the method's source (indented as in the file), by ``new``."""
    function = getattr(owner, method)
    source = inspect.getsource(function)
    assert source.count(old) == 1, f"{owner.__name__}.{method} has no longer what this mutation changes: {old!r}"
    module = sys.modules[function.__module__]  # also where the owner has the method from another class
    found: dict[str, Any] = {}
    code = compile(textwrap.dedent(source.replace(old, new)), f"<nbdclone/store/{method}, mutated>", "exec")
    exec(code, vars(module), found)
    patch.setattr(owner, method, found[method])
