"""The verbs of a clone's life: what a verb is, what it works on, and which there are.

A verb is a function that is written once and run in three places:

- in the worker of a running server that has the clone open, or opens it for the verb (``place="worker"``);
- in a process that a running server starts for it (``place="process"``);
- in the process of the command line, when there is no server.

It is a synchronous generator. It is given a :class:`Target` and its arguments by name (str, int, float, bool, lists of
these, or None: what JSON can hold), yields (done, total) after each small step, and returns what is to be told of it,
again as JSON can hold it:

    def flatten(target: Target, name: str) -> Steps:
        with target.opened(name) as opened:
            clone = opened.clone
            for offset in range(0, clone.size, STEP):
                opened.change(lambda offset=offset: clone.copy_up(offset, STEP))
                yield offset, clone.size
            opened.flush()
            ...
        return {"name": name}

and an entry in ``VERBS``: ``Verb("flatten", "worker", "nbdclone.store.flatten:flatten")``. From then on ``run_verb``
(client.py) and POST /v1/jobs know it.

What a verb has to observe:

- A step takes milliseconds, and some MiB at the most: a client's writes wait while one is under way. In a worker there
  is as long a pause after each step, at its ``yield``, if anybody is connected.
- Whatever changes an open clone goes through ``Opened.change``: no client's change runs beside it. Reads do, and
  flushes. What only reads needs no ``change``.
- Who needs the pool's lock and a turn to change a clone, takes the lock first (``Places.changing``, then ``change``).
- It may be interrupted: by GeneratorExit at a ``yield`` when whoever asked has gone or the server ends, by any
  exception at any point, by a kill. ``with`` and ``finally`` put right what they can; what a kill leaves must be what
  it was, or what the same verb goes on from.
- One that is refused raises something of nbdclone.errors, and has changed nothing.
- A verb in a worker opens one clone: the one that its argument ``Verb.clone`` names. What is to be done to others is
  done by other verbs: ``result = yield from target.run("relayer", {"name": other})``.
"""

from __future__ import annotations

import importlib
import inspect
import types
import typing
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from nbdclone.errors import NotFound, UsageError
from nbdclone.store.clone import Clone
from nbdclone.store.pool import Pool

T = TypeVar("T")

Arguments = Mapping[str, Any]
# Yields (done, total), of whatever the verb counts, and returns the verb's result.
Steps = Generator[tuple[int, int], None, Any]
OnProgress = Callable[[int, int], None]


class Opened(Protocol):
    """A clone that is open, perhaps for clients too."""

    @property
    def clone(self) -> Clone:
        """The clone itself: what reads it may be called at any time."""

    def change(self, step: Callable[[], T]) -> T:
        """Call ``step`` while nobody else changes the clone, and return what it returns.

        Clients' changes wait meanwhile, so a step is short. It is called in another thread than the verb's, and gets no
        GeneratorExit. Raises what it raises.
        """

    def change_here(self, step: Callable[[], T]) -> T:
        """The same, where no read is half done either: in a worker, on its event loop. To be over at once."""

    def flush(self) -> None:
        """Make durable what was changed before. Raises OSError, CloneFailed."""


class Target(Protocol):
    """What a verb works on."""

    @property
    def pool(self) -> Pool:
        """The pool, for what takes no open clone. Its operations lock each other out by themselves."""

    def opened(self, name: str) -> AbstractContextManager[Opened]:
        """The clone of this name, open until the end of the ``with``; in a worker, along with its clients.

        Raises what ``Pool.open_clone`` raises.
        """

    def if_open(self, name: str) -> AbstractContextManager[Opened | None]:
        """The same, but nothing is opened: None where this process does not have it open already."""

    def clients(self, name: str) -> list[dict[str, Any]]:
        """The clients that have this clone now, as GET /v1/exports tells of each; none without a server."""

    def disconnect(self, name: str) -> None:
        """End the connections of all clients that have this clone now, and return when they are gone.

        They may come again at once.
        """

    def alone(self, names: Sequence[str], *, disconnect: bool = False) -> AbstractContextManager[None]:
        """Until the end of the ``with`` this server has none of these open, a clone and snapshots of it: who connects
        meanwhile, waits. What to do with their files then takes the locks that keep other processes away.

        Raises InUse that names the clients; with ``disconnect`` these are sent away.
        """

    def run(self, verb: str, arguments: Arguments) -> Steps:
        """Run another verb where it belongs, to be used with ``yield from``: yields its progress, returns its result.

        Raises what it raises.
        """


@dataclass(frozen=True, slots=True)
class Verb:
    """A verb: where it is run if there is a server, its function ("module:name"), and the argument that names the clone
    whose worker it is run in. A snapshot's name there, ``web1@golden``, counts as that of its clone.
    """

    name: str
    place: Literal["worker", "process"]
    function: str
    clone: str = "name"

    def load(self) -> Callable[..., Steps]:
        """The function."""
        module, _, name = self.function.partition(":")
        function: Callable[..., Steps] = getattr(importlib.import_module(module), name)
        return function

    def clone_in(self, arguments: Arguments) -> str:
        """Which clone's worker these arguments are for."""
        name: str = arguments[self.clone]
        return name.partition("@")[0]

    def check(self, arguments: Arguments) -> None:
        """Raises UsageError unless the function takes these arguments."""
        check_arguments(self.load(), arguments, self.name, given=1)

    def begin(self, target: Target, arguments: Arguments) -> Steps:
        """The steps to be made. Raises UsageError."""
        self.check(arguments)
        return self.load()(target, **arguments)


VERBS: dict[str, Verb] = {
    verb.name: verb
    for verb in [
        Verb("quota", "worker", "nbdclone.control.quota:change_quota"),
        Verb("flatten", "worker", "nbdclone.store.flattening:flatten"),
        Verb("compact", "worker", "nbdclone.store.compacting:compact"),
        Verb("merge", "process", "nbdclone.store.merging:merge_all"),
        Verb("merge-into", "worker", "nbdclone.store.merging:merge_into"),
        Verb("relayer", "worker", "nbdclone.store.merging:relayer"),
        Verb("disconnect", "worker", "nbdclone.control.clients:disconnect"),
        Verb("promote", "process", "nbdclone.store.promoting:promote"),
        Verb("keep", "process", "nbdclone.store.ephemeral:keep"),
        Verb("snapshot", "worker", "nbdclone.control.naming:snapshot"),
        Verb("seal", "worker", "nbdclone.control.naming:seal"),
        Verb("rollback", "worker", "nbdclone.control.naming:rollback"),
        Verb("reset", "worker", "nbdclone.control.naming:reset"),
        Verb("rename", "worker", "nbdclone.control.naming:rename_one", clone="old"),
        Verb("resize", "worker", "nbdclone.control.space:resize_clone"),
        Verb("rm", "process", "nbdclone.control.space:remove_all"),
        Verb("du", "process", "nbdclone.control.space:measure"),
        Verb("hoist", "process", "nbdclone.store.hoisting:hoist"),
        Verb("rebase", "process", "nbdclone.store.rebasing:rebase"),
        Verb("diff", "process", "nbdclone.store.differing:diff"),
        Verb("diff-open", "worker", "nbdclone.store.differing:diff_open"),
        Verb("set-aside", "worker", "nbdclone.control.naming:set_aside"),
        Verb("move-clone", "worker", "nbdclone.store.moving:move_clone"),
        Verb("renew-clone", "worker", "nbdclone.store.moving:renew_clone"),
    ]
}  # fmt: skip


def find_verb(name: str) -> Verb:
    """Raises NotFound."""
    try:
        return VERBS[name]
    except KeyError:
        raise NotFound(f"there is no verb {name[:100]!r}") from None


def drive(steps: Steps, progress: OnProgress | None = None) -> Any:
    """Make all the steps and return the result. What ``progress`` raises interrupts them, and comes out in the end."""
    with closing(steps):
        while True:
            try:
                done, total = next(steps)
            except StopIteration as end:
                return end.value
            if progress is not None:
                progress(done, total)


def check_arguments(function: Callable[..., Any], arguments: Arguments, what: str, given: int = 0) -> None:
    """Raises UsageError unless ``function`` takes these by name, each of the type that it says.

    ``given``: so many parameters, the first, have their values from elsewhere.
    """
    parameters = dict(list(inspect.signature(function).parameters.items())[given:])
    wanted = {name: function.__annotations__[name] for name in parameters}  # the others may not be there at run time
    hints = typing.get_type_hints(types.SimpleNamespace(__annotations__=wanted), function.__globals__)
    for name in arguments:
        if name not in parameters:
            known = ", ".join(parameters) or "nothing"
            raise UsageError(f"{what}: there is no argument {name[:100]!r}: it takes {known}")
    for name, parameter in parameters.items():
        if name not in arguments:
            if parameter.default is parameter.empty:
                raise UsageError(f"{what}: the argument '{name}' is missing")
        elif not _fits(arguments[name], hints[name]):
            raise UsageError(f"{what}: '{name}' is to be {_in_words(hints[name])}")


_WORDS = {str: "a string", int: "a whole number", float: "a number", bool: "true or false", types.NoneType: "null"}


def _fits(value: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if origin is list:
        return isinstance(value, list) and all(_fits(item, typing.get_args(hint)[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is hint


def _in_words(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(_in_words, typing.get_args(hint)))
    if origin is list:
        return f"a list, each of it {_in_words(typing.get_args(hint)[0])}"
    return _WORDS.get(hint) or "an object"
