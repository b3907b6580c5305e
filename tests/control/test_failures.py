"""Errors that go from one process to another."""

from __future__ import annotations

import errno
import json

import pytest

from nbdclone import errors
from nbdclone.control.failures import from_record, to_record
from nbdclone.errors import ConnectionFailed, CorruptDelta, NBDCloneError, ServerRefused

CLASSES = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, NBDCloneError)]
ODD = {CorruptDelta: ("/a/path", "bad magic"), ServerRefused: ("no", 7)}


def passed_on(error: BaseException) -> BaseException:
    return from_record(json.loads(json.dumps(to_record(error))))


@pytest.mark.parametrize("kind", CLASSES)
def test_each_error_arrives_as_what_it_was(kind: type[NBDCloneError]) -> None:
    error = kind(*ODD.get(kind, ("clone 'web1' is in use",)))
    arrived = passed_on(error)
    assert type(arrived) is kind
    assert str(arrived) == str(error)
    assert vars(arrived) == vars(error)


def test_an_error_of_the_system_keeps_its_number_and_its_file() -> None:
    arrived = passed_on(OSError(errno.ENOSPC, "No space left on device", "/pool/x"))
    assert isinstance(arrived, OSError)
    assert (arrived.errno, arrived.strerror, arrived.filename) == (errno.ENOSPC, "No space left on device", "/pool/x")
    assert str(passed_on(OSError("just text"))) == "just text"
    assert type(passed_on(FileNotFoundError(errno.ENOENT, "none"))) is FileNotFoundError


@pytest.mark.parametrize("kind", ["Unheard", "annotations", "__doc__"])
def test_an_error_of_a_class_that_is_not_known_here_is_an_error_all_the_same(kind: str) -> None:
    arrived = from_record({"kind": kind, "message": "from the future"})
    assert (type(arrived), str(arrived)) == (NBDCloneError, "from the future")


def test_a_defect_is_told_as_one() -> None:
    assert str(passed_on(KeyError("x"))) == "a defect of nbdclone: KeyError: 'x'"


def test_a_failed_connection_is_a_connection_error_at_the_other_end_too() -> None:
    assert isinstance(passed_on(ConnectionFailed("gone")), ConnectionError)
