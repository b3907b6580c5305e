"""Who is connected: what is told of a client, to programs and to people; and the verb that sends clients away."""

from __future__ import annotations

import pwd
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from nbdclone.control.verbs import Steps, Target

# So many are named in a message.
SHOWN = 5


@lru_cache(maxsize=256)
def user_name(uid: int) -> str | None:
    """May take a while, where users are looked up in a network."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return None


def add_user(client: dict[str, Any]) -> dict[str, Any]:
    """The same with the name of the user, where it is known who that is."""
    return client | {"user": None if client["uid"] is None else user_name(client["uid"])}


def describe_clients(clients: Sequence[Mapping[str, Any]]) -> str:
    """For a person: the first few of them."""
    shown = [_describe(client) for client in clients[:SHOWN]]
    if len(clients) > SHOWN:
        shown.append(f"and {len(clients) - SHOWN} more")
    return ", ".join(shown)


def name_clients(message: str, exports: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """The message, and who is connected to these of a server's exports."""
    clients = [client for export in exports if export["name"] in names for client in export["clients"]]
    return f"{message}; connected: {describe_clients(clients)}" if clients else message


def _describe(client: Mapping[str, Any]) -> str:
    user = f" ({client['user']})" if client.get("user") else ""
    tls = f" under {client['tls']}" if client["tls"] else ""
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(client["since"]))
    return f"{client['peer']}{user}{tls} since {since}"


def disconnect(target: Target, name: str) -> Steps:
    """End the connections of the clients that have this clone now. They may come again at once."""
    clients = target.clients(name)
    target.disconnect(name)
    yield len(clients), len(clients)
    return {"disconnected": clients}
