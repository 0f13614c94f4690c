"""What a pass did and what it declined, site by site.

A *site* is one place where a rule could act. Its id, `<rule>@<node>`, is made of names that the front end gave, so it is the
same from run to run; a pass run with some ids in `skip` leaves those places alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Rewrite:
    """One rewrite: its site id, the rule, and the module path (or node name) for people."""

    site: str
    rule: str
    module: str


@dataclass(frozen=True)
class Refusal:
    """One place where a rule matched but was not applied, and the reason in a sentence."""

    site: str
    rule: str
    module: str
    reason: str


@dataclass(frozen=True)
class Traffic:
    """Casts of run-time values: how many, and how many bytes they read and write per call."""

    count: int = 0
    bytes: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.count + other.count, self.bytes + other.bytes)


@dataclass(frozen=True)
class Casts:
    """What casts move: in the graph that the pass was given, had each op been cast by itself, and in the result."""

    before: Traffic = Traffic()
    one_by_one: Traffic = Traffic()
    after: Traffic = Traffic()

    def __add__(self, other: Casts) -> Casts:
        """Both together: a graph and the bodies in it."""
        return Casts(self.before + other.before, self.one_by_one + other.one_by_one, self.after + other.after)


@dataclass
class Journal:
    """Collects rewrites and refusals of one run of one pass.

    What the pass is told beside its options: `skip`, the site ids to leave alone; `ranges`, the magnitudes that values had on
    example or calibration data, by the name of the node (each a `Range` of `verify/ranges.py`; none where none was observed).
    What it tells: `choices`, what it chose by measurement; `casts`, what its casts move; None of a pass that has neither.
    """

    skip: frozenset[str] = frozenset()
    ranges: Mapping[str, Any] = field(default_factory=dict)
    rewrites: list[Rewrite] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    choices: Any = None
    casts: Casts | None = None

    @classmethod
    def skipping(cls, sites: Iterable[str]) -> Journal:
        return cls(skip=frozenset(sites))

    def allows(self, site: str) -> bool:
        return site not in self.skip

    def rewrote(self, site: str, rule: str, module: str) -> None:
        self.rewrites.append(Rewrite(site, rule, module))

    def refused(self, site: str, rule: str, module: str, reason: str) -> None:
        self.refusals.append(Refusal(site, rule, module, reason))
