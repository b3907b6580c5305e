"""The pool and the verbs of between.py: what each verb makes of what the disks read."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nbdclone.control.local import LocalTarget
from nbdclone.control.verbs import drive, find_verb
from nbdclone.store.check import check_pool
from nbdclone.store.finding import WRONG
from nbdclone.store.layer import BLOCK_SIZE
from nbdclone.store.pool import Pool
from nbdclone.store.receiving import Receiving
from nbdclone.store.sending import Sending

BLOCKS = 256  # of each base
LARGER = (BLOCKS + 16) * BLOCK_SIZE
UPDATED = range(10, 30)  # where the two bases differ
ALIKE = range(40, 60)  # what some clones have written alike
OWN = 100  # where each has something of its own
STREAM = "web1@one"  # what was sent of it, beside the pool


def _content(*parts: tuple[range, bytes]) -> bytes:
    content = bytearray(b"=" * BLOCK_SIZE * BLOCKS)
    for where, what in parts:
        content[where.start * BLOCK_SIZE : where.stop * BLOCK_SIZE] = what * BLOCK_SIZE * len(where)
    return bytes(content)


def make_pool(directory: Path) -> Pool:
    """A pool in ``directory``.

    base <- web1@zero <- web1@one <- web1, web4      web2, web3: alike in a part, on the base
         <- [no name] <- web5, web6                  web7 stands on what is left of web7@gone
    """
    pool = Pool.open(directory / "pool", create=True)
    for name, content in (("base", _content((UPDATED, b"o"))), ("new", _content((UPDATED, b"n")))):
        (directory / f"{name}.img").write_bytes(content)
        pool.import_base(directory / f"{name}.img", name)

    def write(name: str, own: int, alike: bytes = b"") -> None:
        with pool.open_clone(name) as clone:
            clone.pwrite(name.encode() * 1024, (OWN + own) * BLOCK_SIZE)
            if alike:
                clone.pwrite(alike * BLOCK_SIZE * len(ALIKE), ALIKE.start * BLOCK_SIZE)

    pool.create_clones("base", ["web1", "web5", "web6", "web7"])
    write("web1", 0)
    pool.snapshot("web1@zero")
    write("web1", 1)
    pool.snapshot("web1@one")
    write("web1", 2)
    pool.create_clones("web1@one", ["web4"])
    write("web4", 4)
    for name in ("web5", "web6"):
        write(name, 5, b"a")
    do(pool, "hoist", base="base")
    pool.create_clones("base", ["web2", "web3"])
    for name in ("web2", "web3"):
        write(name, 3, b"b")
    write("web7", 7)
    pool.snapshot("web7@gone")
    write("web7", 8)
    pool.remove(["web7@gone"])
    with open(directory / STREAM, "wb") as stream, Sending(pool.places, "web1@one") as sending:
        list(sending.run(stream))
    return pool


@dataclass(frozen=True)
class State:
    """What each name reads; and, of each clone that verbs reset, what it was made from."""

    disks: dict[str, bytes]
    origins: dict[str, bytes]

    def with_disks(self, **disks: bytes) -> State:
        return replace(self, disks=self.disks | disks)


def disks_of(pool: Pool) -> dict[str, bytes]:
    """Of all that has a name."""
    found = {}
    for name in pool.names():
        with pool.open_clone(name) as disk:
            found[name] = disk.pread(disk.size, 0)
    return found


def state_of(pool: Pool) -> State:
    """Of one that ``make_pool`` made."""
    disks = disks_of(pool)
    return State(disks, {"web3": disks["base"]})


# The verbs


def do(pool: Pool, verb: str, /, **arguments: Any) -> Any:
    return drive(find_verb(verb).begin(LocalTarget(pool), arguments))


Then = Callable[[State], State]


@dataclass(frozen=True)
class Verb:
    """``run`` does it, and ``then`` is what it makes of the state."""

    run: Callable[[Pool], object]
    then: Then = lambda state: state


def _verb(verb: str, then: Then = lambda state: state, **arguments: Any) -> Verb:
    return Verb(lambda pool: do(pool, verb, **arguments), then)


def _without(*gone: str) -> Then:
    def then(state: State) -> State:
        left = {name: disk for name, disk in state.disks.items() if not {name, name.partition("@")[0]} & set(gone)}
        if left == state.disks:
            raise KeyError(gone)  # it is refused, in this order
        return replace(state, disks=left)

    return then


def _renamed(old: str, new: str) -> Then:
    def then(state: State) -> State:
        names = {name: new + name[len(old) :] for name in state.disks if name == old or name.startswith(f"{old}@")}
        origins = {names.get(name, name): origin for name, origin in state.origins.items()}
        return State({names.get(name, name): disk for name, disk in state.disks.items()}, origins)

    return then


def _copied(source: str, *names: str) -> Then:
    return lambda state: state.with_disks(**{name: state.disks[source] for name in names if source in state.disks})


def _from_new(state: State) -> State:
    return replace(state, origins=dict.fromkeys(state.origins, state.disks["new"]))


def _reset(state: State) -> State:
    return state.with_disks(web3=state.origins["web3"].ljust(len(state.disks["web3"]), b"\0"))


def _grown(state: State) -> State:
    return state.with_disks(web3=state.disks["web3"].ljust(LARGER, b"\0"))


def _received(state: State) -> State:
    zero = bytearray(_content((UPDATED, b"o")))
    zero[OWN * BLOCK_SIZE : (OWN + 1) * BLOCK_SIZE] = b"web1" * 1024
    one = zero[:]
    one[(OWN + 1) * BLOCK_SIZE : (OWN + 2) * BLOCK_SIZE] = b"web1" * 1024
    here = {name.partition("@")[2] for name in state.disks}
    if "one" in here and "zero" not in here:  # the one was merged into the other
        return state.with_disks(**{"web8@one": bytes(one), "web8": bytes(one)})
    return state.with_disks(**{"web8@zero": bytes(zero), "web8@one": bytes(one), "web8": bytes(one)})


def _made_again(state: State) -> State:
    return _from_new(state.with_disks(web3=state.disks["new"]))


def check(pool: Pool, **wishes: bool) -> None:
    if wrong := [finding for finding in check_pool(pool.path, fs=pool.places.fs, **wishes) if finding.level == WRONG]:
        raise AssertionError(f"check: {wrong[0]}")


def list_all(pool: Pool) -> None:
    if wrong := [entry for entry in pool.entries(unnamed=True) if entry.error]:
        raise AssertionError(f"list: {wrong[0].name}: {wrong[0].error}")


def _du(pool: Pool) -> None:
    if wrong := [entry for entry in do(pool, "du", names=[])["entries"] if entry["error"]]:
        raise AssertionError(f"du: {wrong[0]['name']}: {wrong[0]['error']}")


def _receive(pool: Pool) -> None:
    with open(pool.path.parent / STREAM, "rb") as stream:
        list(Receiving(pool.places, stream, name="web8").run())


def _send(pool: Pool, since: str | None = None) -> None:
    with Sending(pool.places, "web1@one", since=since) as sending:
        list(sending.run(io.BytesIO()))


def _merge_lower(pool: Pool) -> None:
    pool.remove(["web1@zero"])
    do(pool, "merge")


def _again(pool: Pool) -> None:
    pool.remove(["web3"])
    pool.create_clones("new", ["web3"])


VERBS: dict[str, Verb] = {
    "rebase": _verb("rebase", _from_new, names=["web1", "web4", "web2", "web3"], onto="new"),
    "rebase two": _verb("rebase", _from_new, names=["web2", "web3"], onto="new"),
    "rebase hoisted": _verb("rebase", names=["web5", "web6"], onto="new"),
    "rebase one of them": _verb("rebase", names=["web5"], onto="new"),
    "rebase again": _verb("rebase", names=["web1", "web4"], onto="new"),
    "hoist": _verb("hoist", base="base"),
    "merge": _verb("merge"),
    "flatten": _verb("flatten", name="web3"),
    "flatten above": _verb("flatten", name="web1"),
    "compact": _verb("compact", name="web3"),
    "promote": _verb("promote", _copied("web3", "made"), name="web3", new="made"),
    "promote snapshot": _verb("promote", _copied("web1@one", "made"), name="web1@one", new="made"),
    "snapshot": _verb("snapshot", _copied("web3", "web3@two"), name="web3@two"),
    "snapshot above": _verb("snapshot", _copied("web1", "web1@two"), name="web1@two"),
    "reset": _verb("reset", _reset, name="web3"),
    "rollback": _verb("rollback", lambda state: state.with_disks(web1=state.disks["web1@one"]), name="web1@one"),
    "rename": _verb("rename", _renamed("web3", "named"), old="web3", new="named"),
    "rename below": _verb("rename", _renamed("web1", "named"), old="web1", new="named"),
    "rename base": _verb("rename", _renamed("base", "named"), old="base", new="named"),
    "rename snapshot": _verb("rename", _renamed("web1@one", "web1@named"), old="web1@one", new="web1@named"),
    "rm": _verb("rm", _without("web3"), names=["web3"]),
    "rm other": _verb("rm", _without("web7"), names=["web7"]),
    "rm hoisted": _verb("rm", _without("web6"), names=["web6"]),
    "rm snapshot": _verb("rm", _without("web1@one"), names=["web1@one"]),
    "rm with snapshot": _verb("rm", _without("web1", "web4"), names=["web1", "web4"]),
    "merge lower": Verb(_merge_lower, _without("web1@zero")),
    "again": Verb(_again, _made_again),
    "clone": Verb(lambda pool: pool.create_clones("web1@one", ["web8", "web9"]), _copied("web1@one", "web8", "web9")),
    "clone of base": Verb(lambda pool: pool.create_clones("base", ["web8"]), _copied("base", "web8")),
    "send": Verb(_send),
    "send since": Verb(lambda pool: _send(pool, "zero")),
    "receive": Verb(_receive, _received),
    "resize": _verb("resize", _grown, name="web3", size=LARGER),
    "diff": _verb("diff", a="base", b="web3"),
    "diff content": _verb("diff", a="web1@one", b="web4", content=True),
    "du": Verb(_du),
    "quota": _verb("quota", name="web3", quota=1 << 30),
    "list": Verb(list_all),
    "check": Verb(check),
    "check deep": Verb(lambda pool: check(pool, deep=True)),
    "repair": Verb(lambda pool: check(pool, deep=True, repair=True)),
}

# What looks at all of the pool is done whatever comes or goes.
NEVER_REFUSED = {"merge", "du", "list", "check", "check deep", "repair"}
# What changes nothing is no second verb, and what is two verbs is no first.
FIRST = [name for name in VERBS if name not in ("again", "merge lower")]
SECOND = [
    name
    for name in VERBS
    if name not in ("send", "send since", "diff", "diff content", "du", "list", "check", "check deep")
]
