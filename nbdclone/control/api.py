"""The API of a running server: HTTP with JSON. openapi.json beside this file describes it; a test compares the two.

Every answer is JSON, errors too: {"error": {"kind": "InUse", "message": ...}}, where the kind is a class of
nbdclone.errors, OSError, or Defect. aiohttp is imported here and nowhere else.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib import resources
from typing import Any, Protocol, TypeVar

from aiohttp import web

from nbdclone import __version__
from nbdclone.control.clients import add_user, name_clients
from nbdclone.control.failures import to_record
from nbdclone.control.verbs import VERBS, Arguments, check_arguments
from nbdclone.errors import Interrupted, InUse, NameTaken, NBDCloneError, NotFound, UsageError
from nbdclone.store.catalog import CloneInfo, Info
from nbdclone.store.pool import Pool

logger = logging.getLogger("nbdclone")

T = TypeVar("T")

API = "/v1"
# Names of 30,000 clones of the longest kind; a larger body is refused before it is read.
MAX_BODY = 4 << 20
# What looks at the pool or changes it, for the API: it waits for disks, and for the pool's lock.
THREADS = 4
# How long a client has, at the end of the server, to take its last answer.
SHUTDOWN_S = 2.0
# A verb's answer is a line for each event.
LINES = "application/jsonl"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Job(Protocol):
    """A verb at work."""

    def progress(self) -> AsyncIterator[tuple[int, int]]:
        """How far it is, now and then, until it has ended."""

    def result(self) -> Any:
        """Afterwards: its result. Raises what it raised."""


class Served(Protocol):
    """The server, as the API sees it."""

    pool: Pool
    uris: list[str]

    def workers(self) -> list[dict[str, Any]]:
        """Its processes."""

    async def exports(self) -> list[dict[str, Any]]:
        """What is open, where, and for whom."""

    def jobs(self) -> list[dict[str, Any]]:
        """The verbs at work."""

    def begin(self, verb: str, arguments: Arguments) -> contextlib.AbstractAsyncContextManager[Job]:
        """Begin a verb, which is interrupted if it has not ended by the end of the ``async with``.

        Raises NotFound, UsageError, InUse.
        """


class Api:
    """The handlers of all routes."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._pool = served.pool
        self._threads = ThreadPoolExecutor(THREADS, "nbdclone-api")

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get(f"{API}/", self.describe),
            web.get(f"{API}/openapi.json", self.document),
            web.get(f"{API}/entries", self.entries),
            web.delete(f"{API}/entries", self.remove),
            web.get(f"{API}/entries/{{name}}", self.entry),
            web.delete(f"{API}/entries/{{name}}", self.remove_one),
            web.put(f"{API}/entries/{{name}}/quota", self.quota),
            web.post(f"{API}/clones", self.clone),
            web.get(f"{API}/exports", self.exports),
            web.get(f"{API}/jobs", self.jobs),
            web.post(f"{API}/jobs", self.job),
        ]

    async def close(self, _app: web.Application) -> None:
        self._threads.shutdown(wait=False)

    # What there is

    async def describe(self, _request: web.Request) -> web.Response:
        served = self._served
        facts = {
            "server": "nbdclone",
            "version": __version__,
            "pid": os.getpid(),
            "pool": str(self._pool.path.absolute()),
            "uris": served.uris,
            "workers": served.workers(),
            "verbs": sorted(VERBS),
        }
        return _json(facts)

    async def document(self, _request: web.Request) -> web.Response:
        text = resources.files("nbdclone.control").joinpath("openapi.json").read_text()
        return web.Response(text=text, content_type="application/json")

    async def entries(self, _request: web.Request) -> web.Response:
        return _json([_entry(entry) for entry in await self._run(self._pool.entries)])

    async def entry(self, request: web.Request) -> web.Response:
        return _json(_entry(await self._run(lambda: self._pool.info(request.match_info["name"]))))

    async def exports(self, _request: web.Request) -> web.Response:
        return _json(await self._exports())

    async def jobs(self, _request: web.Request) -> web.Response:
        return _json(self._served.jobs())

    # Changes

    async def clone(self, request: web.Request) -> web.Response:
        def make(source: str, names: list[str], size: int | None = None, quota: int | None = None) -> list[CloneInfo]:
            return self._pool.create_clones(source, names, size=size, quota=quota)

        given = await _read(request, make, "clones")
        if not given["names"]:
            raise UsageError("clones: 'names' is empty")
        return _json([_entry(made) for made in await self._run(lambda: make(**given))], status=201)

    async def remove(self, request: web.Request) -> web.Response:
        def remove(names: list[str]) -> None:
            self._pool.remove(names)

        given = await _read(request, remove, "entries")
        return await self._remove(given["names"])

    async def remove_one(self, request: web.Request) -> web.Response:
        return await self._remove([request.match_info["name"]])

    async def _remove(self, names: list[str]) -> web.Response:
        try:
            await self._run(lambda: self._pool.remove(names))
        except InUse as error:
            raise InUse(name_clients(str(error), await self._exports(), names)) from None
        return _json({"removed": names})

    async def quota(self, request: web.Request) -> web.Response:
        def change(quota: int | None) -> None: ...

        given = await _read(request, change, "quota")
        async with self._served.begin("quota", {"name": request.match_info["name"], **given}) as job:
            async for _progress in job.progress():
                pass
            return _json(job.result())

    async def job(self, request: web.Request) -> web.StreamResponse:
        """Stream a verb's progress and result; an error that comes before any progress is an answer like others.

        When the client goes away, this handler is cancelled or cannot write, and with it the verb ends.
        """

        def begin(verb: str, arguments: dict[str, Any]) -> None: ...

        given = await _read(request, begin, "jobs")
        response = web.StreamResponse(headers={"Content-Type": LINES})
        async with self._served.begin(**given) as job:
            async for progress in job.progress():
                await _write_line(request, response, {"progress": progress})
            try:
                last = {"result": job.result()}
            except Exception as error:
                if not response.prepared:
                    raise
                last = {"error": to_record(error)}
            await _write_line(request, response, last)
        await response.write_eof()
        return response

    async def _exports(self) -> list[dict[str, Any]]:
        exports = await self._served.exports()
        return await self._run(
            lambda: [export | {"clients": [add_user(client) for client in export["clients"]]} for export in exports]
        )

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def make_app(served: Served) -> web.Application:
    """The application."""
    api = Api(served)
    app = web.Application(middlewares=[_tell_errors], client_max_size=MAX_BODY)
    app.add_routes(api.routes())
    app.on_cleanup.append(api.close)
    return app


def make_runner(served: Served) -> web.AppRunner:
    """What speaks HTTP on the connections that come."""
    return web.AppRunner(
        make_app(served), access_log=None, handle_signals=False, handler_cancellation=True, shutdown_timeout=SHUTDOWN_S
    )


@web.middleware
async def _tell_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as error:
        failure = NotFound if error.status == 404 else UsageError
        return _failed(failure(_http_message(request, error)), error.status)
    except (NBDCloneError, OSError) as error:
        return _failed(error, status_of(error))
    except Exception as error:
        logger.exception("%s %s: a defect of the server", request.method, request.path)
        return _failed(error, 500)


def _http_message(request: web.Request, error: web.HTTPException) -> str:
    if isinstance(error, web.HTTPMethodNotAllowed):
        return f"{request.path[:100]} takes {', '.join(sorted(error.allowed_methods))}, not {request.method[:20]}"
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return f"a body has {MAX_BODY} bytes at the most"
    return f"{request.path[:100]}: {error.reason}; GET {API}/openapi.json says what there is"


def _failed(error: BaseException, status: int) -> web.Response:
    return _json({"error": to_record(error)}, status=status)


def status_of(error: BaseException) -> int:
    """The HTTP status that says the same."""
    if isinstance(error, NotFound):
        return 404
    if isinstance(error, InUse | NameTaken):
        return 409
    if isinstance(error, UsageError):
        return 400
    return 503 if isinstance(error, Interrupted) else 500


def _json(value: Any, status: int = 200) -> web.Response:
    return web.json_response(value, status=status)


async def _write_line(request: web.Request, response: web.StreamResponse, event: dict[str, Any]) -> None:
    if not response.prepared:
        await response.prepare(request)
    await response.write(json.dumps(event).encode() + b"\n")


async def _read(request: web.Request, function: Callable[..., Any], what: str) -> dict[str, Any]:
    """The body: an object whose members this function takes. Raises UsageError."""
    try:
        given = json.loads(await request.read() or b"{}")
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{what}: the body is no JSON: {error}") from None
    if not isinstance(given, dict):
        raise UsageError(f"{what}: the body is to be a JSON object")
    check_arguments(function, given, what)
    return given


def _entry(entry: Info) -> dict[str, Any]:
    return {"kind": entry.kind} | asdict(entry)
