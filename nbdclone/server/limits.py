"""How much of an export is to be had: requests and bytes a second. docs/limits.md says what they mean. Pure."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

# What an export that was quiet may have at once, beyond its rate: so many seconds' worth.
BURST_S = 0.1


@dataclass(frozen=True, slots=True)
class Limit:
    """Requests a second, and bytes of reads and writes a second. None: no end of them."""

    iops: float | None = None
    bps: float | None = None


UNLIMITED = Limit()


class Bucket:
    """Fills at ``rate`` a second, up to ``BURST_S`` of it. Who takes more than is in it leaves a debt."""

    def __init__(self, rate: float, now: float) -> None:
        self.rate = rate
        self.level = rate * BURST_S
        self._filled_at = now

    def fill(self, now: float) -> float:
        """What is in it at this moment: below 0, a debt."""
        self.level = min(self.level + (now - self._filled_at) * self.rate, self.rate * BURST_S)
        self._filled_at = now
        return self.level

    def change(self, rate: float, now: float) -> None:
        """Another rate from now on. A debt takes as long to pay back as it would have taken."""
        self.fill(now)
        self.level *= rate / self.rate
        self.rate = rate


class Meter:
    """The buckets of one export. A request may be run while there is something in each, and then takes what it takes:
    one that is larger than a bucket is run too, and those after it wait for so much longer.
    """

    def __init__(self, limit: Limit, now: float) -> None:
        self.limit = limit
        self._requests = None if limit.iops is None else Bucket(limit.iops, now)
        self._bytes = None if limit.bps is None else Bucket(limit.bps, now)

    def change(self, limit: Limit, now: float) -> None:
        """Other limits from now on."""
        self.limit = limit
        self._requests = _changed(self._requests, limit.iops, now)
        self._bytes = _changed(self._bytes, limit.bps, now)

    def wait_s(self, now: float) -> float:
        """How long it is until a request may be run: 0 if now."""
        return max(_wait(self._requests, now), _wait(self._bytes, now))

    def take(self, size: int) -> None:
        """A request is run that reads or writes ``size`` bytes."""
        if self._requests is not None:
            self._requests.level -= 1
        if self._bytes is not None:
            self._bytes.level -= size


def _changed(bucket: Bucket | None, rate: float | None, now: float) -> Bucket | None:
    if rate is None:
        return None
    if bucket is None:
        return Bucket(rate, now)
    bucket.change(rate, now)
    return bucket


def _wait(bucket: Bucket | None, now: float) -> float:
    if bucket is None or (level := bucket.fill(now)) > 0:
        return 0.0
    # Past the moment at which it is empty, or it would be so still.
    return math.nextafter(-level / bucket.rate, math.inf)


@dataclass(frozen=True, slots=True)
class Rule:
    """What the settings say of a name or pattern. None: nothing; math.inf: no limit."""

    iops: float | None = None
    bps: float | None = None


class Limits:
    """The limits of all exports: ``default``, and what the rules say of names and patterns of names.

    A rule for a name itself comes before patterns; of several patterns that match, the lowest number holds.
    """

    def __init__(self, default: Limit = UNLIMITED, rules: Mapping[str, Rule] | None = None) -> None:
        self._default = default
        self._rules = dict(rules or {})
        self._patterns = [
            (re.compile(fnmatch.translate(name)).match, rule)
            for name, rule in self._rules.items()
            if set(name) & set("*?[")
        ]

    def of(self, export_name: str) -> Limit:
        """The limit of one export."""
        named = self._rules.get(export_name, Rule())
        matching = [rule for match, rule in self._patterns if match(export_name)]
        return Limit(
            _choose(named.iops, [rule.iops for rule in matching], self._default.iops),
            _choose(named.bps, [rule.bps for rule in matching], self._default.bps),
        )


def _choose(named: float | None, patterns: list[float | None], default: float | None) -> float | None:
    said = named if named is not None else min((value for value in patterns if value is not None), default=default)
    return None if said == math.inf else said
