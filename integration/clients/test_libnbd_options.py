"""libnbd in its option mode: what may be asked before an export is opened, in any order, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from integration.clients.programs import SIZE, WAYS, nbdsh, uri
from integration.served import Served

pytestmark = pytest.mark.timeout(120)

ALL_CONTEXTS = ["base:allocation", "qemu:allocation-depth", "nbdclone:origin"]

NEGOTIATING = """
import json
h.set_opt_mode(True)
h.connect_uri(uri)
assert h.aio_is_negotiating()

def refused(number, call, *args):
    try:
        call(*args)
    except nbd.Error as error:
        assert error.errno == number, (error.errno, number, args)
        return error.string
    else:
        raise AssertionError((number, args))

def contexts(*queries):
    h.clear_meta_contexts()
    for query in queries:
        h.add_meta_context(query)
    found = []
    assert h.opt_list_meta_context(lambda name: found.append(name) or 0) == len(found)
    return found

def exports():
    found = []
    assert h.opt_list(lambda name, description: found.append((name, description)) or 0) == len(found)
    return found
"""


def negotiate(server: Served, script: str, export: str = "", way: str = "unix") -> Any:
    """What the script gives to ``tell``."""
    told = nbdsh(uri(server, export, way), f"{NEGOTIATING}\ntell = lambda what: print(json.dumps(what))\n{script}")
    return json.loads(told) if told else None


@pytest.mark.parametrize("way", WAYS)
def test_an_export_is_found_looked_at_and_opened(server: Served, clone: str, way: str) -> None:
    script = f"""
h.set_full_info(True)  # the name, too
assert {{"base", "spare", {clone!r}}} <= {{name for name, description in exports()}}
h.set_export_name("base")
h.opt_info()
assert (h.get_size(), h.is_read_only()) == ({SIZE}, True)
h.set_export_name({clone!r})
h.opt_info()
assert (h.get_size(), h.is_read_only(), h.can_trim()) == ({SIZE}, False, True)
assert h.get_block_size(nbd.SIZE_MAXIMUM) == 32 << 20
refused("EINVAL", h.pread, 512, 0)  # it is not open yet
h.opt_go()
assert h.aio_is_ready() and h.get_canonical_export_name() == {clone!r}
h.pwrite(b"x" * 512, 0)
assert h.pread(512, 0) == b"x" * 512
h.shutdown()
"""
    negotiate(server, script, way=way)


def test_after_a_refusal_the_next_option_is_answered_as_if_nothing_had_been(server: Served) -> None:
    script = """
for name in ("nothing", "", "a" * 4096, "../base", "base/"):
    h.set_export_name(name)
    refused("ENOENT", h.opt_info)
    refused("ENOENT", h.opt_go)
    assert h.aio_is_negotiating()
assert {"base", "spare"} <= {name for name, description in exports()}
h.set_export_name("spare")
h.opt_go()
assert len(h.pread(4096, 0)) == 4096
h.shutdown()
"""
    negotiate(server, script)


def test_the_text_of_a_refusal_is_the_servers(server: Served) -> None:
    script = """
told = []
h.set_debug_callback(lambda context, message: told.append(message) or 0)
h.set_debug(True)
h.set_export_name("nothing")
told.append(refused("ENOENT", h.opt_go))  # where newer versions have it
h.set_debug(False)
h.opt_abort()
tell(told)
"""
    assert any("there is no base or clone 'nothing'" in message for message in negotiate(server, script))


def test_whoever_wants_nothing_after_all_says_so_and_the_server_lets_go(server: Served, clone: str) -> None:
    script = f"""
h.set_export_name({clone!r})
h.opt_info()
h.opt_abort()
assert h.aio_is_closed()
"""
    negotiate(server, script)


def test_the_contexts_of_an_export_are_listed_as_they_are_asked_for(server: Served) -> None:
    script = """
h.set_export_name("spare")
tell([
    contexts(),
    contexts("base:"),
    contexts("nbdclone:"),
    contexts("qemu:allocation-depth", "base:allocation"),
    contexts("base:allocation", "base:"),
    contexts("x-strange:", "base:nothing", "qemu:dirty-bitmap:b0"),
    contexts(*(f"x-strange:{number}" for number in range(200)), "nbdclone:origin"),
])
h.opt_abort()
"""
    everything, base, own, two, once, strange, last = negotiate(server, script)
    assert everything == ALL_CONTEXTS
    assert base == ["base:allocation"]
    assert own == ["nbdclone:origin"]
    assert sorted(two) == ["base:allocation", "qemu:allocation-depth"]
    assert once == ["base:allocation"]
    assert strange == []
    assert last == ["nbdclone:origin"]


def test_contexts_are_those_of_the_export_that_is_opened_and_of_the_queries_before_that(server: Served) -> None:
    script = """
h.set_export_name("base")
h.add_meta_context("nbdclone:origin")
h.opt_info()  # which selects them for "base", and for no other
assert h.can_meta_context("nbdclone:origin")
h.set_export_name("spare")
h.clear_meta_contexts()
for name in ("base:allocation", "x-strange:thing", "qemu:"):
    h.add_meta_context(name)
h.opt_go()
told = {}
def note(name, offset, entries, error):
    told[name] = sum(entries[::2])
    return 0
h.block_status(h.get_size(), 0, note)
names = ["base:allocation", "nbdclone:origin", "qemu:allocation-depth"]
tell([told, [name for name in names if h.can_meta_context(name)]])
h.shutdown()
"""
    told, selected = negotiate(server, script)
    assert selected == list(told) == ["base:allocation"]
    assert told["base:allocation"] == SIZE


def test_two_hundred_options_on_one_connection_are_each_answered(server: Served) -> None:
    script = """
for _ in range(100):
    h.set_export_name("spare")
    h.opt_info()
    h.set_export_name("nothing")
    refused("ENOENT", h.opt_info)
h.set_export_name("spare")
h.opt_go()
h.shutdown()
"""
    negotiate(server, script)
