"""Which names make a clone on the spot: ``[template]`` in the pool's settings, and a base's name with a plus. Pure."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass

from nbdclone.store.names import is_name

# ``debian+`` is a new clone of ``debian``.
PLUS = "+"
# Of each base whose name is asked for with a plus, together; and of a template that says nothing else.
DEFAULT_LIMIT = 64


@dataclass(frozen=True, slots=True)
class Template:
    """``pattern``: of the names that clients ask for. ``lifetime_s``: None for as long as somebody is connected.
    ``quota`` in bytes. ``limit``: so many clones of it may there be.
    """

    name: str
    pattern: str
    source: str
    lifetime_s: float | None = None
    quota: int | None = None
    limit: int = DEFAULT_LIMIT


class Templates:
    """The templates of a pool."""

    def __init__(self, templates: Mapping[str, Template] | None = None) -> None:
        self._templates = [
            (re.compile(fnmatch.translate(template.pattern)).match, template) for template in (templates or {}).values()
        ]

    def find(self, name: str) -> Template | None:
        """What a clone of that name would be made by; the first that fits."""
        if name[-1:] == PLUS and is_name(name[:-1]):
            return Template(name, name, name[:-1])
        if not is_name(name):
            return None
        return next((template for match, template in self._templates if match(name)), None)
