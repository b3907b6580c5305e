"""What a handshake comes to: what the client wants, as the server is told, and what was agreed on in the end."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from nbdclone.protocol.wire import ExportInfo, Mode, Option


class Purpose(Enum):
    """Why a client names an export."""

    EXPORT_NAME = Option.EXPORT_NAME  # to use it; a refusal can only be to close
    INFO = Option.INFO  # to know about it
    GO = Option.GO  # to use it


@dataclass(frozen=True, slots=True)
class ListExports:
    """The client asks for the names of all exports. Answer: ``send_list``."""


@dataclass(frozen=True, slots=True)
class FindSnapshots:
    """The client asks for metadata contexts that depend on the snapshots beneath an export. Answer: ``send_contexts``.

    ``option`` is NBD_OPT_LIST_META_CONTEXT or NBD_OPT_SET_META_CONTEXT.
    """

    export: str
    option: int
    queries: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class OpenExport:
    """The client names an export; "" is the default one. Answer: ``accept_export`` or ``refuse_export``."""

    name: str
    purpose: Purpose
    wants_description: bool = False


@dataclass(frozen=True, slots=True)
class Aborted:
    """The client ended the negotiation. Nothing is to be answered; send what there is, and close."""


@dataclass(frozen=True, slots=True)
class StartTLS:
    """NBD_OPT_STARTTLS was agreed on. Send what there is, do the TLS handshake, and say so: ``tls_started``."""


class TLSMode(Enum):
    """What a server does about TLS ("Server-side requirements")."""

    OFF = "off"  # NOTLS
    ON = "on"  # SELECTIVETLS without an export that insists on it: the client chooses
    REQUIRED = "required"  # FORCEDTLS


Event = ListExports | FindSnapshots | OpenExport | StartTLS | Aborted


@dataclass(frozen=True, slots=True)
class Negotiated:
    """What was agreed: ``export.flags`` are the transmission flags as the client was told them.

    ``mode`` says what the messages of the transmission look like; ``contexts`` are the metadata contexts that were
    selected for this export: (id, name) of each.
    """

    export: ExportInfo
    mode: Mode
    contexts: tuple[tuple[int, str], ...] = ()
