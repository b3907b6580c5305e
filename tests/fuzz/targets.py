"""The targets, by the names of their corpora."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from client_side import client_handshake, client_transmission
from conversation import conversation
from server_side import server_handshake, server_transmission

CORPUS = Path(__file__).with_name("corpus")

TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (server_handshake, server_transmission, client_handshake, client_transmission, conversation)
}
