"""The client of a running server's API, for the command line: synchronous, and soon imported."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nbdclone.control.address import connect
from nbdclone.control.failures import from_record
from nbdclone.control.local import LocalTarget
from nbdclone.control.verbs import Arguments, OnProgress, Steps, drive, find_verb
from nbdclone.errors import ConnectionFailed, NBDCloneError
from nbdclone.store.pool import Pool

API = "/v1"
# An answer that is no verb's takes milliseconds; the first one of a server's life, a second.
TIMEOUT_S = 60.0


class Control:
    """The server of a pool, as far as it can be asked. Raises what is wrong, as it would be raised here; and
    ConnectionFailed.
    """

    def __init__(self, pool: Path) -> None:
        self._pool = pool

    @classmethod
    def of(cls, pool: Path) -> Control | None:
        """None if no server has the pool, or none that this user may ask. Raises OSError."""
        sock = connect(pool)
        if sock is None:
            return None
        sock.close()
        return cls(pool)

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """Ask, as ``GET``, ``/exports``."""
        connection = _Connection(self._pool)
        try:
            connection.request(method, API + path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            answer = json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._lost(error) from None
        finally:
            connection.close()
        if response.status >= 400:
            raise from_record(answer["error"])
        return answer

    def exports(self) -> list[dict[str, Any]]:
        """What is open, and by whom."""
        exports: list[dict[str, Any]] = self.call("GET", "/exports")
        return exports

    def clients(self, name: str) -> list[dict[str, Any]]:
        """Who is connected to this one."""
        return [client for export in self.exports() if export["name"] == name for client in export["clients"]]

    def set_quota(self, name: str, quota: int | None) -> Any:
        return self.call("PUT", f"/entries/{quote(name, safe='@')}/quota", {"quota": quota})

    def run(self, verb: str, arguments: Arguments) -> Steps:
        """Run a verb there. Whoever closes this generator before its end interrupts the verb."""
        connection = _Connection(self._pool)
        try:
            connection.request("POST", f"{API}/jobs", json.dumps({"verb": verb, "arguments": dict(arguments)}))
            connection.sock.settimeout(None)  # from here on it takes what the verb takes
            response = connection.getresponse()
            if response.status >= 400:
                raise from_record(json.loads(response.read())["error"])
            while line := response.readline():
                event = json.loads(line)
                if "progress" in event:
                    done, total = event["progress"]
                    yield done, total
                elif "error" in event:
                    raise from_record(event["error"])
                else:
                    return event["result"]
            raise ConnectionFailed(self._ended())
        except (ConnectionError, http.client.HTTPException, ValueError) as error:
            raise self._lost(error) from None
        finally:
            connection.close()

    def _lost(self, error: Exception) -> NBDCloneError:
        return error if isinstance(error, NBDCloneError) else ConnectionFailed(f"{self._ended()} ({error})")

    def _ended(self) -> str:
        return f"the server of pool {self._pool} ended before it had answered: ask again"


class _Connection(http.client.HTTPConnection):
    def __init__(self, pool: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._pool = pool
        self.sock: socket.socket

    def connect(self) -> None:
        sock = connect(self._pool)
        if sock is None:
            raise ConnectionFailed(f"no server has pool {self._pool} any more")
        sock.settimeout(TIMEOUT_S)
        self.sock = sock


def run_verb(pool: Pool, verb: str, arguments: Arguments, progress: OnProgress | None = None) -> Any:
    """Run a verb: by the server of the pool, if there is one, else here. Returns its result, raises what it raises.

    ``progress(done, total)`` is called now and then; what it raises (and Ctrl-C) interrupts the verb.
    """
    known = find_verb(verb)
    known.check(arguments)
    control = Control.of(pool.path)
    steps = control.run(verb, arguments) if control else known.begin(LocalTarget(pool), arguments)
    return drive(steps, progress)


@contextlib.contextmanager
def set_aside(pool: Pool, name: str, *, disconnect: bool) -> Iterator[None]:
    """Until the end of the ``with`` no server of the pool has this clone open, and who connects to it waits.

    Raises InUse that names the clients; with ``disconnect`` they are sent away.
    """
    control = Control.of(pool.path)
    if control is None:
        yield
        return
    with contextlib.closing(control.run("set-aside", {"name": name, "disconnect": disconnect})) as steps:
        next(steps)
        yield
