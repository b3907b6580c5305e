"""What clients are told: friends all of it, strangers the kind alone."""

from __future__ import annotations

import errno
import os
from ipaddress import ip_address

import pytest

from nbdclone.errors import BaseChanged, CloneFailed, CorruptDelta, InUse, InvalidName, NotFound
from nbdclone.protocol.wire import NBD_REP_ERR_POLICY, NBD_REP_ERR_UNKNOWN
from nbdclone.server.errnos import refusal, tell
from nbdclone.server.peer import Peer

STRANGERS = [Peer("tcp", ip_address("127.0.0.1"), subject="CN=web1"), Peer("unix", uid=os.geteuid() + 1), Peer("unix")]
FRIENDS = [Peer("unix", uid=0), Peer("unix", uid=os.geteuid())]
SECRET = "clone 'web1' is in use by process 4711 (vim /root/secret) (/pool/clones/web1/delta)"

NOT_THERE = [NotFound("no 'web1' in /pool"), InvalidName("/pool")]
NOT_TO_BE_OPENED = [InUse(SECRET), BaseChanged(SECRET), CorruptDelta("/pool/clones/web1/delta", "rotten")]


@pytest.mark.parametrize("error", NOT_THERE, ids=lambda error: type(error).__name__)
def test_of_an_export_that_is_not_for_it_everybody_is_told_that_there_is_none(error: Exception) -> None:
    for peer in [*STRANGERS, *FRIENDS]:
        assert refusal(error, "web1", peer) == ("there is no base or clone 'web1'", NBD_REP_ERR_UNKNOWN)


@pytest.mark.parametrize(
    "error", [*NOT_TO_BE_OPENED, PermissionError(errno.EACCES, "denied", "/pool/x")], ids=lambda e: type(e).__name__
)
def test_why_an_export_cannot_be_opened_is_told_to_friends_alone(error: Exception) -> None:
    for peer in STRANGERS:
        assert refusal(error, "web1", peer) == (
            "this export cannot be opened: see the server's log",
            NBD_REP_ERR_POLICY,
        )
    whole = os.strerror(errno.EACCES) if isinstance(error, OSError) else str(error)
    for peer in FRIENDS:
        assert refusal(error, "web1", peer) == (whole, NBD_REP_ERR_POLICY)


@pytest.mark.parametrize("error", [*NOT_TO_BE_OPENED, CloneFailed(SECRET), MemoryError(SECRET), RuntimeError(SECRET)])
def test_a_request_that_failed_is_explained_to_friends_alone(error: Exception) -> None:
    for peer in STRANGERS:
        assert tell(error, peer) == "this request failed: see the server's log"
    for peer in FRIENDS:
        assert str(error) in tell(error, peer)


def test_what_the_disk_said_is_told_without_the_path() -> None:
    for peer in [*STRANGERS, *FRIENDS]:
        assert tell(OSError(errno.ENOSPC, "full", "/pool/x"), peer) == "No space left on device"
