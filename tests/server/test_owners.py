"""The supervisor's book: which worker has which export."""

from __future__ import annotations

import random

import pytest

from nbdclone.server.owners import Owners


def owners(count: int) -> Owners:
    book = Owners()
    for worker in range(count):
        book.add(worker)
        book.ready(worker)
    return book


def test_all_connections_to_an_export_go_to_one_worker() -> None:
    book = owners(3)
    for number in range(9):
        book.arrive(number)
    assert len({book.claim(number, "web1") for number in range(9)}) == 1


@pytest.mark.parametrize("together", [True, False])
def test_exports_are_spread_evenly_whether_their_clients_come_together_or_not(together: bool) -> None:
    book = owners(2)
    found = []
    if together:
        for number in range(8):
            book.arrive(number)
    for number in range(8):
        at = None if together else book.arrive(number)
        found.append(book.claim(number, f"web{number}"))
        assert together or at == found[-1], "no connection is moved without need"
        book.move(number, found[-1], relayed=False)
    assert sorted(found) == [0] * 4 + [1] * 4


def test_an_export_stays_where_it_is_until_the_last_connection_has_released_it() -> None:
    book = owners(2)
    for number in range(3):
        book.arrive(number)
    first = book.claim(0, "web1")
    assert book.claim(1, "web1") == first
    book.release(0)
    assert book.claim(2, "web1") == first
    book.leave(1)
    assert book.claim(2, "web1") == first
    book.leave(2)
    for number in (10, 11):  # the one that had it is the busiest now
        book.arrive(number)
        book.claim(number, f"other{number}")
    book.arrive(12)
    assert book.claim(12, "web1") in (0, 1)


def test_a_worker_that_is_dying_is_given_nothing_and_keeps_what_it_has() -> None:
    book = owners(2)
    book.arrive(0)
    owner = book.claim(0, "web1")
    book.close(owner)
    for number in range(1, 5):
        assert book.arrive(number) == 1 - owner
        assert book.claim(number, f"web{number + 1}") == 1 - owner
    book.arrive(9)
    assert book.claim(9, "web1") == owner  # which is not opened by another before it is dead


def test_with_a_worker_its_exports_and_its_connections_go() -> None:
    book = owners(2)
    for number in range(4):
        book.arrive(number)
    at = {number: book.claim(number, f"web{number}") for number in range(4)}
    for number, worker in at.items():
        book.move(number, worker, relayed=False)
    gone = [number for number, worker in at.items() if worker == 0]
    assert book.remove(0) == ([f"web{number}" for number in gone], gone)
    assert [number in book for number in range(4)] == [number not in gone for number in range(4)]
    assert book.arrive(9) == 1
    assert book.claim(9, f"web{gone[0]}") == 1


def test_a_relayed_connection_is_gone_when_both_its_ends_are() -> None:
    book = owners(2)
    for number in range(2):
        book.arrive(number)
    book.claim(0, "web1")
    owner = book.claim(1, "web1")
    book.move(1, owner, relayed=True)
    assert not book.leave(1)
    assert book.leave(1, relay=True)
    book.arrive(2)
    book.claim(2, "web1")
    book.move(2, owner, relayed=True)
    assert not book.leave(2, relay=True)
    assert book.claim(2, "web1") == owner, "it has its export until the end that serves it is gone"
    assert book.leave(2)


def test_a_worker_may_have_both_ends() -> None:
    book = owners(1)
    book.arrive(0)
    book.claim(0, "web1")
    book.move(0, 0, relayed=True)
    assert book.remove(0) == (["web1"], [0])
    assert 0 not in book


def test_the_death_of_a_worker_that_relays_leaves_the_export_where_it_is() -> None:
    book = owners(2)
    book.arrive(0)
    owner = book.claim(0, "web1")
    number = next(number for number in range(1, 5) if book.arrive(number) != owner)
    book.claim(number, "web1")
    book.move(number, owner, relayed=True)
    assert book.remove(1 - owner)[0] == []
    assert number in book
    assert book.leave(number)


def test_one_that_claimed_and_was_not_moved_yet_claims_again_when_the_owner_died() -> None:
    book = owners(2)
    book.arrive(0)
    owner = book.claim(0, "web1")
    number = next(number for number in range(1, 5) if book.arrive(number) != owner)
    assert book.claim(number, "web1") == owner
    assert number not in book.remove(owner)[1]
    assert book.claim(number, "web1") == 1 - owner


def test_workers_without_anything_are_known() -> None:
    book = owners(2)
    assert book.idle() == [0, 1]
    assert book.without_exports()
    at = book.arrive(0)
    assert book.idle() == [1 - at]
    book.claim(0, "web1")
    book.arrive(1)
    assert book.idle() == []
    assert book.without_exports()
    book.claim(1, "web2")
    assert not book.without_exports()


def test_a_worker_that_is_starting_may_have_exports_and_makes_no_handshakes() -> None:
    book = owners(1)
    book.add(7)
    assert [book.arrive(number) for number in range(4)] == [0] * 4
    assert book.available == [0]
    assert book.claim(0, "web1") == 7
    assert book.arrive(9) == 0
    book.ready(7)
    assert book.arrive(10) == 7


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_no_export_is_open_in_two_workers_and_nothing_is_left_behind(seed: int) -> None:
    """Workers as they behave: they open at a claim that is theirs, and release after they have closed."""
    rng = random.Random(seed)
    book = owners(3)
    workers = {0, 1, 2}
    numbers = iter(range(3, 10_000))
    at: dict[int, int] = {}  # the worker that serves a connection
    users: dict[tuple[int, str], set[int]] = {}  # of an open export: (worker, name)
    for _ in range(1500):
        action = rng.random()
        if action < 0.3:
            number = next(numbers)
            at[number] = book.arrive(number)
        elif action < 0.6 and at:
            number = rng.choice(list(at))
            if not any(number in them for them in users.values()):
                name = f"web{rng.randrange(6)}"
                owner = book.claim(number, name)
                if owner != at[number]:
                    book.move(number, owner, relayed=False)
                    at[number] = owner
                users.setdefault((owner, name), set()).add(number)
        elif action < 0.98 and at:
            number = rng.choice(list(at))
            for key, them in list(users.items()):
                if number in them:
                    them.discard(number)
                    if not them:
                        del users[key]
            if rng.random() < 0.3:
                book.release(number)
            else:
                assert book.leave(number)
                del at[number]
        elif len(workers) > 1:
            dead = rng.choice(list(workers))
            names, gone = book.remove(dead)
            assert names == sorted(name for worker, name in users if worker == dead)
            assert set(gone) == {number for number, worker in at.items() if worker == dead}
            users = {key: them for key, them in users.items() if key[0] != dead}
            at = {number: worker for number, worker in at.items() if worker != dead}
            workers.discard(dead)
            workers.add(new := next(numbers))
            book.add(new)
            book.ready(new)
        assert len({name for _worker, name in users}) == len(users), "in two at once"
    for number in at:
        book.leave(number)
    assert book.idle() == sorted(workers)
    assert all(worker.load == 0 for worker in book._workers.values())
    assert book._owners == book._claims == book._connections == {}
