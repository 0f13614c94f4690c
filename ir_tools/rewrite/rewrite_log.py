"""What a pass did and what it declined, site by site.

A *site* is a node at which a rule could act. Its id, `<rule>@<node>`, is made of names that the front end gave, so it is the
same from run to run; a pass run with some ids in `skip` leaves those sites alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ir_tools.deprecation import warn_renamed


@dataclass(frozen=True)
class Rewrite:
    """One rewrite: its site id, the rule, and the module path (or node name) for people."""

    site: str
    rule: str
    module: str


@dataclass(frozen=True)
class Refusal:
    """One site where a rule matched but was not applied, and the reason in a sentence.

    `expected`: the reason is obvious. The printed report omits such refusals; `explain` and `to_dict` list them.
    """

    site: str
    rule: str
    module: str
    reason: str
    expected: bool = False


@dataclass(frozen=True)
class Traffic:
    """A number of casts, and the bytes that they read and write in one run."""

    count: int = 0
    bytes: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.count + other.count, self.bytes + other.bytes)


@dataclass(frozen=True)
class Casts:
    """Casts between floating dtypes: in the graph before a pass, in the graph after it, and as per-op autocast has them
    (`one_by_one`: each op casts its own operands)."""

    before: Traffic = Traffic()
    one_by_one: Traffic = Traffic()
    after: Traffic = Traffic()

    def __add__(self, other: Casts) -> Casts:
        return Casts(self.before + other.before, self.one_by_one + other.one_by_one, self.after + other.after)


@dataclass
class RewriteLog:
    """Collects rewrites and refusals of one run of one pass.

    Inputs of the pass beside its options: `skip`, the site ids to leave alone; `ranges`, the magnitudes that values had on
    example or calibration data, by the name of the node (none where nothing was observed).
    Outputs of the pass beside its Program: `tuning_records`, what it measured; `casts`, how many casts there are and how many
    bytes they move. Each is None for a pass that does not measure or cast.
    """

    skip: frozenset[str] = frozenset()
    ranges: Mapping[str, Any] = field(default_factory=dict)
    rewrites: list[Rewrite] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    tuning_records: Any = None
    casts: Casts | None = None

    @property
    def choices(self) -> Any:
        """The old name of `tuning_records`."""
        warn_renamed("choices of a rewrite log", "tuning_records")
        return self.tuning_records

    @choices.setter
    def choices(self, records: Any) -> None:
        warn_renamed("choices of a rewrite log", "tuning_records")
        self.tuning_records = records

    @classmethod
    def skipping(cls, sites: Iterable[str]) -> RewriteLog:
        return cls(skip=frozenset(sites))

    def allows(self, site: str) -> bool:
        return site not in self.skip

    def rewrote(self, site: str, rule: str, module: str) -> None:
        self.rewrites.append(Rewrite(site, rule, module))

    def refused(self, site: str, rule: str, module: str, reason: str, *, expected: bool = False) -> None:
        self.refusals.append(Refusal(site, rule, module, reason, expected))
