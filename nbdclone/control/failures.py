"""Errors as they go from one process to another: of the same class at the other end, with the same facts."""

from __future__ import annotations

from typing import Any

from nbdclone import errors
from nbdclone.errors import NBDCloneError

# What is wrong is with nbdclone itself: its log has the traceback.
DEFECT = "Defect"
_OS_ERROR = "OSError"
_FACTS = (str, int, float, bool, type(None))


def to_record(error: BaseException) -> dict[str, Any]:
    """``{"kind": "InUse", "message": ...}``, as JSON can hold it: what :func:`from_record` takes."""
    if isinstance(error, NBDCloneError):
        facts = {name: value for name, value in vars(error).items() if isinstance(value, _FACTS)}
        return {"kind": type(error).__name__, "message": str(error)} | ({"facts": facts} if facts else {})
    if isinstance(error, OSError):
        facts = {"errno": error.errno, "filename": error.filename and str(error.filename)}
        return {"kind": _OS_ERROR, "message": error.strerror or str(error), "facts": facts}
    return {"kind": DEFECT, "message": f"a defect of nbdclone: {type(error).__name__}: {error}"}


def from_record(record: dict[str, Any]) -> NBDCloneError | OSError:
    """The error again. One of a class that is not known here is an NBDCloneError."""
    kind, message, facts = record["kind"], str(record["message"]), record.get("facts", {})
    if kind == _OS_ERROR:
        if facts.get("errno") is None:
            return OSError(message)
        return OSError(facts["errno"], message, facts.get("filename"))
    found = getattr(errors, kind, None)
    if not (isinstance(found, type) and issubclass(found, NBDCloneError)):
        found = NBDCloneError
    error = found.__new__(found, message)  # their constructors want other things, of which the message was made
    Exception.__init__(error, message)
    vars(error).update(facts)
    return error
