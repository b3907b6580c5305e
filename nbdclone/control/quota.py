"""The verb ``quota``."""

from __future__ import annotations

from dataclasses import asdict

from nbdclone.control.verbs import Steps, Target


def change_quota(target: Target, name: str, quota: int | None) -> Steps:
    """Change how many bytes a clone may take on the disk (None: no end of it); where it is open, from now on."""
    info = target.pool.set_quota(name, quota)
    yield 0, 1
    with target.if_open(name) as opened:
        if opened is not None:
            opened.change(opened.clone.look_at_quota)
    return {"kind": "clone"} | asdict(info)
