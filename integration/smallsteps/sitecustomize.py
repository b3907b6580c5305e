"""In each Python that has this directory in its PYTHONPATH a merge makes small steps: see lifecycle.py.

$SMALL_STEPS has, in JSON, the values of constants by module. How often holes were made is told by the size of the file
$SMALL_STEPS_COUNTED.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import sys
from types import ModuleType
from typing import Any

SMALL: dict[str, dict[str, float]] = json.loads(os.environ.get("SMALL_STEPS", "{}"))


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname not in SMALL:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def load_and_change(module: ModuleType) -> None:
            load(module)
            for name, value in SMALL[fullname].items():
                assert hasattr(module, name)
                setattr(module, name, value)
            if fullname.endswith("giving_back"):
                _count(module)

        spec.loader.exec_module = load_and_change  # type: ignore[method-assign]
        return spec


def _count(module: ModuleType) -> None:
    punch = module.GivingBack._punch

    def counted(*arguments: Any) -> bool:
        done: bool = punch(*arguments)
        if done and (path := os.environ.get("SMALL_STEPS_COUNTED")):
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(fd, b".")
            os.close(fd)
        return done

    module.GivingBack._punch = counted  # type: ignore[attr-defined]


sys.meta_path.insert(0, _Finder())
