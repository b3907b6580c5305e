"""Who may have which export: the rules in the pool's settings file. docs/access.md says what they mean."""

from __future__ import annotations

import fnmatch
import hashlib
import pwd
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from itertools import chain
from typing import Any, TypeVar

from nbdclone.errors import InvalidName
from nbdclone.server.peer import Peer, Subject, parse_subject
from nbdclone.server.templates import PLUS
from nbdclone.store.names import split_name, validate_name

# What makes a pattern of a name. None of it can be in a name.
_PATTERN = re.compile(r"[*?\[]")
# What a pattern may have beside wildcards and sets, or nothing would match it.
_LITERALS = re.compile(r"[A-Za-z0-9._@-]*")
_WILDCARDS = re.compile(r"\[!?\]?[^\]]*\]|[*?]")
# The last uid is -1: no user.
_MAX_UID = (1 << 32) - 2
# The attributes that RFC 4514 has names for: others stand in a certificate's subject by their numbers.
_ATTRIBUTES = {"CN", "L", "ST", "O", "OU", "C", "STREET", "DC", "UID"}
_MAPPED = IPv6Network("::ffff:0:0/96")

T = TypeVar("T")
Network = IPv4Network | IPv6Network


@dataclass(frozen=True, slots=True)
class Rule:
    """Whom an export is for. None: not said; empty: nobody."""

    subjects: frozenset[Subject] | None = None
    networks: frozenset[Network] | None = None
    uids: frozenset[int] | None = None

    def admits(self, peer: Peer) -> bool:
        """Both must hold: what is said of certificates, and what is said of where a client is."""
        if self.subjects is not None and _subject(peer) not in self.subjects:
            return False
        if self.networks is None and self.uids is None:
            return True
        if peer.address is None:
            return peer.uid in (self.uids or ())
        return any(peer.address in network for network in self.networks or ())


class Access:
    """The rules of a pool, by the name or pattern that each was given."""

    def __init__(self, rules: Mapping[str, Rule] | None = None) -> None:
        self._key = secrets.token_bytes(32)
        self._rules: dict[str, Rule] = {}
        self._patterns: list[tuple[Callable[[str], object], str, Rule]] = []
        for name, rule in (rules or {}).items():
            if _PATTERN.search(name):
                self._patterns.append((re.compile(fnmatch.translate(name)).match, name, rule))
            else:
                self._rules[name] = rule

    def decoy(self, export_name: str) -> str:
        """A name that no export has, always the same for this one: to be looked for in its place."""
        return hashlib.blake2b(export_name.encode(), key=self._key, digest_size=16).hexdigest()

    def refusing_rule(self, export_name: str, peer: Peer) -> str | None:
        """The name of a rule that keeps the export from the client; None if it may have it.

        All the rules that match must admit the client: so their order does not matter. A rule for a clone is one for
        its snapshots too, which hold what the clone held: who may not have the one, may not have the others. So is one
        for a base for new clones of it, ``debian+``.
        """
        names = (export_name, split_name(export_name)[0].removesuffix(PLUS))
        # All patterns are tried, always: how long this takes says nothing about the rules.
        matching = [
            (name, rule) for match, name, rule in self._patterns if bool(match(names[0])) | bool(match(names[1]))
        ]
        matching += [(tried, self._rules[tried]) for tried in dict.fromkeys(names) if tried in self._rules]
        return next((name for name, rule in matching if not rule.admits(peer)), None)


def refused_by(rule: str, peer: Peer) -> str:
    """For the log: which rule it was, and the subject as it would have to stand there."""
    certificate = f" (certificate: {peer.subject!r})" if peer.subject is not None else ""
    return f'refused by access."{rule}"{certificate}'


def read_access(settings: dict[str, Any]) -> Access:
    """The rules in the settings. Raises ValueError: key, what is wrong."""
    rules = read_table(settings.get("access", {}), "access")
    return Access({name: _read_rule(name, given) for name, given in rules.items()})


def read_pattern(name: str, key: str) -> None:
    """Raises ValueError if no export can have a name that is this, or matches it."""
    if not _PATTERN.search(name):
        clone, snapshot = split_name(name)
        try:
            validate_name(clone)
            if snapshot is not None:
                validate_name(snapshot)
        except InvalidName as error:
            raise ValueError(f"{key}: {error}") from None
    elif not _LITERALS.fullmatch(_WILDCARDS.sub("", name)):
        raise ValueError(f"{key}: no export has a name that matches this pattern")


def _read_rule(name: str, given: Any) -> Rule:
    key = f'access."{name}"'
    read_pattern(name, key)
    rule = read_table(given, key)
    refuse_unknown(rule, ("subjects", "networks", "uids"), f"{key}.")
    if not rule:
        raise ValueError(f"{key}: says nothing: give subjects, networks or uids")
    return Rule(
        _read_list(rule, key, "subjects", _read_subject),
        _read_list(rule, key, "networks", _read_network),
        _read_list(rule, key, "uids", _read_uid),
    )


def _read_list(rule: dict[str, Any], key: str, name: str, read: Callable[[Any], T]) -> frozenset[T] | None:
    if name not in rule:
        return None
    if not isinstance(rule[name], list):
        raise ValueError(f"{key}.{name}: is to be a list, in [brackets]")
    try:
        return frozenset(read(value) for value in rule[name])
    except ValueError as error:
        raise ValueError(f"{key}.{name}: {error}") from None


def _read_subject(value: Any) -> Subject:
    subject = parse_subject(_string(value))
    for attribute, _form, _value in chain.from_iterable(subject):
        if attribute not in _ATTRIBUTES and not attribute[0].isdigit():
            raise ValueError(f"{value!r}: give {attribute} by its number, as the log does: RFC 4514 has no such name")
    return subject


def _read_network(value: Any) -> Network:
    network = ip_network(_string(value))
    if isinstance(network, IPv6Network) and (network.subnet_of(_MAPPED) or "%" in value):
        raise ValueError(f"{value!r}: give IPv4 networks as IPv4, and no interface")
    return network


def _read_uid(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value <= _MAX_UID:
            raise ValueError(f"{value} is no user's number")
        return value
    try:
        return pwd.getpwnam(_string(value)).pw_uid
    except KeyError:
        raise ValueError(f"there is no user {value!r}") from None


def _subject(peer: Peer) -> Subject | None:
    """A client's subject; None if it has none, or one that cannot be understood, which nobody else has either."""
    try:
        return parse_subject(peer.subject) if peer.subject is not None else None
    except ValueError:
        return None


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is to be a string, in quotes")
    return value


def read_table(value: Any, key: str) -> dict[str, Any]:
    """The table at this key of the settings. Raises ValueError."""
    if not isinstance(value, dict):
        raise ValueError(f"{key}: is to be a table")
    return value


def refuse_unknown(table: dict[str, Any], known: tuple[str, ...], prefix: str) -> None:
    """Raises ValueError for a key that is not known there."""
    for key in table:
        if key not in known:
            raise ValueError(f"{prefix}{key}: is not known; known here: {', '.join(known)}")


def in_a_line(error: BaseException) -> str:
    """What an error says, for a message of one line."""
    return " ".join(str(error).split())
