"""The API, asked as anybody may ask it, and the document that describes it."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from secure import certificates, trusting
from serving import BASE, CLONES, until, where
from supervising import children, holder, supervised
from test_process import end, program, ready

from nbdclone.client import Client
from nbdclone.control import api as api_module
from nbdclone.control import clients as clients_module
from nbdclone.control.address import connect, listen
from nbdclone.control.api import Api
from nbdclone.control.client import Control, run_verb
from nbdclone.errors import ConnectionFailed, NBDCloneError
from nbdclone.server.tls import ServerTLS
from nbdclone.store.pool import Pool

DOCUMENT = json.loads(resources.files("nbdclone.control").joinpath("openapi.json").read_text())


class Answer:
    """Status, what kind of text, and the text."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.kind = response.headers.get_content_type()
        self.text = response.read().decode()
        self.json = None if self.kind == "application/jsonl" else json.loads(self.text or "null")


async def ask(pool: Pool, method: str, path: str, body: Any = None) -> Answer:
    """Ask the server of the pool; a body that is no str is sent as JSON."""

    def asked() -> Answer:
        sock = connect(pool.path)
        assert sock is not None
        connection = http.client.HTTPConnection("localhost")
        connection.sock = sock
        with contextlib.closing(connection):
            text = body if isinstance(body, str | bytes | None) else json.dumps(body)
            connection.request(method, path, text)
            return Answer(connection.getresponse())

    return await asyncio.to_thread(asked)


# The document


def resolved(schema: Any) -> Any:
    while "$ref" in schema:
        place = DOCUMENT
        for part in schema["$ref"].removeprefix("#/").split("/"):
            place = place[part]
        schema = place
    return schema


def require(value: Any, schema: Any) -> None:
    """Of JSON Schema, what the document uses; members that it does not name are refused."""
    schema = resolved(schema)
    if "oneOf" in schema:
        fitting = [part for part in schema["oneOf"] if fits(value, part)]
        assert len(fitting) == 1, (value, schema)
        return
    if "const" in schema:
        assert value == schema["const"]
    kinds = {
        "string": str,
        "integer": int,
        "number": (int, float),
        "object": dict,
        "array": list,
        "null": type(None),
        "boolean": bool,
    }
    if wanted := schema.get("type"):
        wanted = [wanted] if isinstance(wanted, str) else wanted
        assert any(isinstance(value, kinds[kind]) for kind in wanted), (value, schema)
    if isinstance(value, dict) and "properties" in schema:
        assert set(schema["required"]) <= set(value) <= set(schema["properties"]), (value, schema)
        for name, member in value.items():
            require(member, schema["properties"][name])
    if isinstance(value, list) and "items" in schema:
        for item in value:
            require(item, schema["items"])


def fits(value: Any, schema: Any) -> bool:
    try:
        require(value, schema)
    except AssertionError:
        return False
    return True


def operation(method: str, path: str) -> Any:
    return DOCUMENT["paths"][path.removeprefix("/v1")][method.lower()]


def require_as_documented(answer: Answer, method: str, path: str) -> Answer:
    """What came is what the document says of this status."""
    responses = operation(method, path)["responses"]
    response = resolved(responses.get(str(answer.status), responses["default"]))
    schema = response["content"][answer.kind]["schema"]
    if answer.kind == "application/jsonl":
        for line in answer.text.splitlines():
            require(json.loads(line), schema)
    else:
        require(answer.json, schema)
    return answer


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, member in value.items():
            if name == "$ref":
                yield member
            else:
                yield from references(member)
    elif isinstance(value, list):
        for item in value:
            yield from references(item)


def test_the_document_describes_exactly_the_routes_that_there_are(pool: Pool) -> None:
    api = Api(type("Served", (), {"pool": pool})())  # type: ignore[arg-type]
    routes = {(route.method, route.path) for route in api.routes()}
    described = {
        (method.upper(), "/v1" + path)
        for path, item in DOCUMENT["paths"].items()
        for method in item
        if method != "parameters"
    }
    assert described == routes
    for path, item in DOCUMENT["paths"].items():
        named = [parameter["name"] for parameter in item.get("parameters", [])]
        assert named == re.findall(r"\{(\w+)\}", path)


def test_the_page_lists_the_same_routes() -> None:
    page = (Path(__file__).parents[2] / "docs" / "control.md").read_text()
    listed = re.findall(r"^\| `([A-Z]+) /v1(/\S*)` \|", page, re.M)
    described = [(method.upper(), path) for path, item in DOCUMENT["paths"].items() for method in item]
    assert sorted(listed) == sorted(entry for entry in described if entry[0] != "PARAMETERS")


def test_whatever_the_document_refers_to_is_in_it_and_all_that_is_in_it_is_referred_to() -> None:
    found = set(references(DOCUMENT))
    for reference in found:
        resolved({"$ref": reference})
    names = {f"#/components/{kind}/{name}" for kind, them in DOCUMENT["components"].items() for name in them}
    assert found == names


def test_the_bodies_that_the_document_describes_are_those_that_are_taken(pool: Pool) -> None:
    for method, path, wrong in [
        ("delete", "/entries", {"names": ["a"], "more": 1}),
        ("put", "/entries/{name}/quota", {"quota": "x"}),
        ("post", "/clones", {"source": "base"}),
        ("post", "/jobs", {"verb": "quota", "arguments": []}),
    ]:
        schema = DOCUMENT["paths"][path][method]["requestBody"]["content"]["application/json"]["schema"]
        assert not fits(wrong, schema)


async def test_every_answer_is_as_documented(pool: Pool) -> None:
    async with supervised(pool, 1) as server, await Client.connect(where(server, "web1")):

        async def good(method: str, path: str, body: Any = None, route: str | None = None) -> Any:
            answer = require_as_documented(await ask(pool, method, path, body), method, route or path)
            assert answer.status < 300, answer.text
            return answer.json

        described = await good("GET", "/v1/")
        assert (described["pid"], described["uris"]) == (os.getpid(), server.uris)
        assert described["workers"] == [{"pid": holder(pool, "web1"), "exports": ["web1"]}]
        assert "quota" in described["verbs"]
        assert await good("GET", "/v1/openapi.json") == DOCUMENT
        assert [entry["name"] for entry in await good("GET", "/v1/entries")] == ["base", *CLONES]
        one = "/v1/entries/{name}"
        assert (await good("GET", "/v1/entries/base", route=one))["clones"] == list(CLONES)
        made = await good("POST", "/v1/clones", {"source": "base", "names": ["new1", "new2"], "quota": 1 << 20})
        assert [(entry["name"], entry["quota"]) for entry in made] == [("new1", 1 << 20), ("new2", 1 << 20)]
        put = await good("PUT", "/v1/entries/new1/quota", {"quota": None}, "/v1/entries/{name}/quota")
        assert put["quota"] is None
        assert put == (await good("GET", "/v1/entries/new1", route=one))
        await good("DELETE", "/v1/entries/new1", route=one)
        assert await good("DELETE", "/v1/entries", {"names": ["new2"]}) == {"removed": ["new2"]}
        assert pool.names() == ["base", *CLONES]
        answer = await ask(
            pool, "POST", "/v1/jobs", {"verb": "fill", "arguments": {"name": "web1", "byte": 1, "blocks": 2}}
        )
        lines = [json.loads(line) for line in require_as_documented(answer, "POST", "/v1/jobs").text.splitlines()]
        assert lines[0]["progress"][1] == 2
        assert lines[-1]["result"]["filled"] == 2
        [export] = await good("GET", "/v1/exports")
        assert (export["name"], export["worker"], len(export["clients"])) == ("web1", holder(pool, "web1"), 1)
        slow = {"name": "web1", "byte": 1, "blocks": 1000, "step_ms": 5}
        async with server.begin("fill", slow) as job:
            async for _progress in job.progress():
                break
            [shown] = await good("GET", "/v1/jobs")
            assert (shown["verb"], shown["arguments"]) == ("fill", slow)
        await until(lambda: not server.jobs())


async def test_every_error_is_json_of_one_form(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_module, "MAX_BODY", 5000)
    fill = {"verb": "fill", "arguments": {"name": "web9", "byte": 1, "blocks": 1}}
    async with supervised(pool, 1):
        for method, path, body, status, kind, said in [
            ("GET", "/", None, 404, "NotFound", "/: Not Found; GET /v1/openapi.json says"),
            ("GET", "/v2/entries", None, 404, "NotFound", "Not Found"),
            ("POST", "/v1/entries", None, 405, "UsageError", "/v1/entries takes DELETE, GET"),
            ("GET", "/v1/entries/none", None, 404, "NotFound", "no base or clone 'none'"),
            ("GET", "/v1/entries/web1@x", None, 404, "NotFound", "no snapshot 'web1@x'"),
            ("GET", "/v1/entries/..%2F..%2Fetc", None, 404, "NotFound", "no base or clone '../../etc'"),
            ("DELETE", "/v1/entries/base", None, 409, "InUse", "base 'base' is needed by"),
            ("DELETE", "/v1/entries", "", 400, "UsageError", "entries: the argument 'names' is missing"),
            ("POST", "/v1/clones", "{", 400, "UsageError", "clones: the body is no JSON"),
            ("POST", "/v1/clones", b"\xff\xfe\xff", 400, "UsageError", "clones: the body is no JSON"),
            ("POST", "/v1/clones", "[" * 4000, 400, "UsageError", "clones: the body is no JSON"),
            ("POST", "/v1/clones", [], 400, "UsageError", "clones: the body is to be a JSON object"),
            ("POST", "/v1/clones", {"source": "base", "names": []}, 400, "UsageError", "'names' is empty"),
            ("POST", "/v1/clones", {"source": "base", "names": "x"}, 400, "UsageError", "'names' is to be a list"),
            ("POST", "/v1/clones", {"source": "base", "names": ["x/y"]}, 400, "InvalidName", "'x/y' cannot be a name"),
            ("POST", "/v1/clones", {"source": "base", "names": ["web1"]}, 409, "NameTaken", "'web1'"),
            ("POST", "/v1/clones", {"source": "none", "names": ["new"]}, 404, "NotFound", "'none'"),
            ("PUT", "/v1/entries/web1/quota", {"quota": 5}, 400, "UsageError", "a quota is from"),
            ("PUT", "/v1/entries/web1/quota", {}, 400, "UsageError", "the argument 'quota' is missing"),
            ("POST", "/v1/clones", "x" * 5001, 413, "UsageError", "a body has 5000 bytes at the most"),
            ("POST", "/v1/jobs", {"verb": "fly", "arguments": {}}, 404, "NotFound", "no verb 'fly'"),
            ("POST", "/v1/jobs", {"verb": "fill", "arguments": {}}, 400, "UsageError", "fill: the argument 'name'"),
            ("POST", "/v1/jobs", fill, 404, "NotFound", "no base or clone 'web9'"),
            ("POST", "/v1/jobs", fill | {"more": 1}, 400, "UsageError", "there is no argument 'more'"),
        ]:
            answer = await ask(pool, method, path, body)
            assert (answer.status, answer.json["error"]["kind"]) == (status, kind), (path, body, answer.text)
            assert said in answer.json["error"]["message"], (path, body, answer.text)
            require(answer.json, DOCUMENT["components"]["responses"]["Error"]["content"]["application/json"]["schema"])


async def test_an_error_after_progress_is_the_last_line(pool: Pool) -> None:
    async with supervised(pool, 1):
        answer = await ask(pool, "POST", "/v1/jobs", {"verb": "refuse", "arguments": {"name": "web1", "late": True}})
        assert (answer.status, answer.kind) == (200, "application/jsonl")
        first, last = [json.loads(line) for line in answer.text.splitlines()]
        assert first == {"progress": [1, 2]}
        assert last == {"error": {"kind": "InUse", "message": "'web1' is wanted by somebody else"}}


# Who is connected


async def test_who_is_connected_is_known_wherever_its_export_and_its_tls_are(pool: Pool, tmp_path: Path) -> None:
    secured = ServerTLS(certificates(), required=False)
    control = Control(pool.path)
    async with supervised(pool, 2, sockets=[tmp_path / "s"], listen=[("127.0.0.1", 0)], tls=secured) as server:
        tcp, unix = server.uris
        clients = [
            await Client.connect(f"{tcp}/web1", tls=trusting()),
            await Client.connect(f"{tcp}/web2", tls=trusting()),
            await Client.connect(f"{tcp}/web2", tls=trusting()),  # one of these two is relayed
            await Client.connect(f"{unix.replace('unix:///', 'unix:///web1')}"),
        ]
        exports = {export["name"]: export for export in await asyncio.to_thread(control.exports)}
        assert {name: export["worker"] for name, export in exports.items()} == {
            name: holder(pool, name) for name in ("web1", "web2")
        }
        assert len(set(children())) == 2
        web1 = sorted(exports["web1"]["clients"], key=lambda client: client["peer"])
        assert [client["tls"] for client in web1] == ["TLSv1.3", None]
        assert [client["address"] for client in web1] == ["127.0.0.1", None]
        assert [client["uid"] for client in web1] == [None, os.geteuid()]
        assert [client["user"] is not None for client in web1] == [False, True]
        assert [client["tls"] for client in exports["web2"]["clients"]] == ["TLSv1.3"] * 2
        told = clients_module.name_clients("it is in use", list(exports.values()), ["web1"])
        tcp_client, unix_client = told.removeprefix("it is in use; connected: ").split(", ")
        assert re.fullmatch(r"127\.0\.0\.1:\d+ under TLSv1\.3 since \d{4}-\S+ \S+", tcp_client)
        who = rf"unix uid {os.geteuid()} pid {os.getpid()} \(\w+\)"
        assert re.fullmatch(rf"{who} since \d{{4}}-\S+ \S+", unix_client)
        assert clients_module.name_clients("it is in use", list(exports.values()), ["base"]) == "it is in use"
        answer = await ask(pool, "DELETE", "/v1/entries/web2")
        assert answer.status == 409
        assert re.search("clone 'web2' is in use by process .*; connected: 127", answer.json["error"]["message"])
        for client in clients:
            await client.close()


def test_of_many_clients_the_first_few_are_named() -> None:
    client = {"peer": "10.0.0.1:1", "user": None, "tls": None, "since": 0}
    shown = clients_module.describe_clients([client] * 12)
    assert shown.count("10.0.0.1:1") == clients_module.SHOWN
    assert shown.endswith(f"and {12 - clients_module.SHOWN} more")


# The server's end, and the client's


def test_the_first_to_ask_is_answered_although_what_answers_is_loaded_only_then(pool: Pool, tmp_path: Path) -> None:
    with program(pool.path, "--socket", tmp_path / "s", "--workers", "1") as process:
        ready(process)
        maps = Path(f"/proc/{process.pid}/maps")
        assert "aiohttp" not in maps.read_text()
        control = Control.of(pool.path)
        assert control is not None
        assert control.call("GET", "/")["pid"] == process.pid
        assert "aiohttp" in maps.read_text()
        assert end(process) == (0, "")
    assert not (pool.path / ".control").exists()
    assert Control.of(pool.path) is None


def test_a_server_that_nobody_asked_removes_its_socket_too(pool: Pool, tmp_path: Path) -> None:
    with program(pool.path, "--socket", tmp_path / "s") as process:
        ready(process)
        assert (pool.path / ".control").exists()
        assert end(process) == (0, "")
    assert not (pool.path / ".control").exists()


def test_beside_the_socket_of_a_server_that_was_killed_work_is_done_here(pool: Pool, tmp_path: Path) -> None:
    with program(pool.path, "--socket", tmp_path / "s", "--workers", "1") as process:
        ready(process)
        process.kill()
        process.wait()
        assert (pool.path / ".control").exists()
        assert run_verb(pool, "look", {"name": "web1"})["by"] == os.getpid()


def test_a_server_that_is_killed_in_the_middle_is_a_failed_connection(pool: Pool, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    with program(pool.path, "--socket", tmp_path / "s", "--workers", "1", env=environment) as process:
        ready(process)

        def kill(done: int, total: int) -> None:
            process.kill()

        with pytest.raises(ConnectionFailed, match="ended before it had answered"):
            run_verb(pool, "fill", {"name": "web1", "byte": 1, "blocks": 1000, "step_ms": 5}, kill)


async def test_a_server_whose_pool_can_have_no_socket_serves_without(
    pool: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    (pool.path / ".control.new").mkdir()
    async with supervised(pool, 1) as server:
        async with await Client.connect(where(server, "web1")) as client:
            assert await client.pread(512, 0) == BASE[:512]
        assert Control.of(pool.path) is None
    assert "no control socket" in caplog.text
    (pool.path / ".control.new").rmdir()


async def test_what_speaks_no_http_harms_nobody(pool: Pool) -> None:
    async with supervised(pool, 1):
        for garbage in (b"\0" * 5000, b"GET\r\n\r\n", b"NBDMAGIC"):
            sock = connect(pool.path)
            assert sock is not None
            with sock:
                sock.setblocking(False)
                loop = asyncio.get_running_loop()
                await loop.sock_sendall(sock, garbage)
                sock.shutdown(socket.SHUT_WR)
                while await asyncio.wait_for(loop.sock_recv(sock, 65536), 5):
                    pass
        assert (await ask(pool, "GET", "/v1/")).status == 200


def test_the_command_line_loads_none_of_it(tmp_path: Path) -> None:
    code = (
        "import sys, nbdclone.cli, nbdclone.control.client, nbdclone.server.supervisor; print('aiohttp' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_an_answer_that_is_none_is_a_failed_connection(pool: Pool) -> None:
    def hang_up(sock: socket.socket) -> None:
        sock.setblocking(True)
        for _ in range(2):
            sock.accept()[0].close()

    with listen(pool.path) as sock:
        thread = threading.Thread(target=hang_up, args=(sock,))
        thread.start()
        control = Control.of(pool.path)
        assert control is not None
        with pytest.raises(NBDCloneError, match="ended before it had answered"):
            control.exports()
        thread.join()
