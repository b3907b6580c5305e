"""Verbs, and how they are run without a server."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from nbdclone.control.local import LocalTarget
from nbdclone.control.verbs import VERBS, Verb, check_arguments, drive, find_verb
from nbdclone.errors import InUse, NotFound, UsageError
from nbdclone.store.pool import Pool

KNOWN = list(VERBS.values())  # before the samples of the tests are added


def run(pool: Pool, verb: str, progress: Any = None, /, **arguments: Any) -> Any:
    return drive(find_verb(verb).begin(LocalTarget(pool), arguments), progress)


@pytest.mark.parametrize("verb", KNOWN, ids=lambda verb: verb.name)
def test_every_verb_that_is_registered_can_be_loaded_and_says_what_it_takes(verb: Verb) -> None:
    assert VERBS[verb.name] is verb
    function = verb.load()
    assert inspect.isgeneratorfunction(function)
    assert function.__doc__
    parameters = list(inspect.signature(function).parameters)
    assert parameters[0] == "target"
    assert verb.place == "process" or verb.clone in parameters
    with pytest.raises(UsageError, match="there is no argument 'nonsense'"):
        check_arguments(function, {"nonsense": 1}, verb.name, given=1)


def test_a_verb_says_how_far_it_is_and_returns_its_result(pool: Pool) -> None:
    said: list[tuple[int, int]] = []
    result = run(pool, "fill", lambda *progress: said.append(progress), name="web1", byte=7, blocks=3)
    assert result["filled"] == 3
    assert said == [(1, 3), (2, 3), (3, 3)]
    with pool.open_clone("web1") as clone:
        assert clone.pread(4 * 4096, 0)[: 3 * 4096] == b"\7" * 3 * 4096


def test_what_progress_raises_interrupts_the_verb_which_lets_go_of_the_clone(pool: Pool, tmp_path: Path) -> None:
    mark = tmp_path / "mark"

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(pool, "fill", stop, name="web1", byte=7, blocks=10, mark=str(mark))
    assert mark.read_text() == "interrupted"
    pool.open_clone("web1").close()


def test_a_verb_runs_others(pool: Pool) -> None:
    assert run(pool, "twice", name="web1")["all"] == [2, 1]


def test_nobody_is_connected_where_there_is_no_server(pool: Pool) -> None:
    result = run(pool, "look", name="web1")
    assert (result["open"], result["clients"]) == (False, [])
    assert run(pool, "send_away", name="web1") == {"before": 0, "after": 0}


def test_a_verb_that_refuses_raises(pool: Pool) -> None:
    with pytest.raises(InUse, match="wanted by somebody else"):
        run(pool, "refuse", name="web1")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({}, "fill: the argument 'name' is missing"),
        ({"name": "web1", "byte": 1}, "fill: the argument 'blocks' is missing"),
        ({"name": 5, "byte": 1, "blocks": 1}, "fill: 'name' is to be a string"),
        ({"name": "web1", "byte": True, "blocks": 1}, "fill: 'byte' is to be a whole number"),
        ({"name": "web1", "byte": 1.5, "blocks": 1}, "fill: 'byte' is to be a whole number"),
        ({"name": "web1", "byte": 1, "blocks": 1, "mark": 3}, "fill: 'mark' is to be a string or null"),
        ({"name": "web1", "byte": 1, "blocks": 1, "step_ms": "x"}, "fill: 'step_ms' is to be a number"),
        ({"name": "web1", "byte": 1, "blocks": 1, "step_ms": False}, "fill: 'step_ms' is to be a number"),
        ({"target": 1}, "fill: there is no argument 'target'"),
    ],
)
def test_wrong_arguments_are_refused_with_what_was_expected(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_verb("fill").check(arguments)
    assert str(caught.value).startswith(complaint)


def test_right_arguments_are_taken() -> None:
    find_verb("fill").check({"name": "web1", "byte": 1, "blocks": 1, "mark": None, "step_ms": 2})


def from_the_store(target: OnlyForTypeCheckers, name: str) -> AsWell:  # type: ignore[name-defined]  # noqa: F821
    """For the next test."""


def test_a_verb_need_not_import_what_only_its_annotations_name() -> None:
    check_arguments(from_the_store, {"name": "web1"}, "it", given=1)
    with pytest.raises(UsageError, match="it: 'name' is to be a string"):
        check_arguments(from_the_store, {"name": 1}, "it", given=1)


def names_only(names: list[str]) -> None:
    """For the next test."""


@pytest.mark.parametrize("given", ["web1", ["web1", 2], None, {"web1": 1}])
def test_a_list_of_names_is_nothing_else(given: Any) -> None:
    with pytest.raises(UsageError, match="'names' is to be a list, each of it a string"):
        check_arguments(names_only, {"names": given}, "rm")
    check_arguments(names_only, {"names": ["web1", "web2"]}, "rm")


def test_a_verb_that_nobody_knows_is_not_found() -> None:
    with pytest.raises(NotFound, match="there is no verb 'fly'"):
        find_verb("fly")


def test_a_snapshot_is_in_the_hands_of_its_clones_worker() -> None:
    assert find_verb("fill").clone_in({"name": "web1@golden"}) == "web1"


def test_a_quota_is_changed_and_taken_away_again(pool: Pool) -> None:
    assert run(pool, "quota", name="web1", quota=1 << 20)["quota"] == 1 << 20
    assert run(pool, "quota", name="web1", quota=None)["quota"] is None
    with pytest.raises(UsageError, match="only clones have a quota"):
        run(pool, "quota", name="base", quota=1 << 20)
