"""What a pass did and what it declined, site by site.

A *site* is a node at which a rule could act. Its id, `<rule>@<node>`, is made of names that the front end gave, so it is the
same from run to run; a pass run with some ids in `skip` leaves those sites alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ir_tools.rewrite.former_fields import FormerFields


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


@dataclass
class RewriteLog(FormerFields):
    """Collects rewrites and refusals of one run of one pass; the sites whose ids are in `skip` are to be left alone."""

    skip: frozenset[str] = frozenset()
    rewrites: list[Rewrite] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)

    @classmethod
    def skipping(cls, sites: Iterable[str]) -> RewriteLog:
        return cls(skip=frozenset(sites))

    def allows(self, site: str) -> bool:
        return site not in self.skip

    def rewrote(self, site: str, rule: str, module: str) -> None:
        self.rewrites.append(Rewrite(site, rule, module))

    def refused(self, site: str, rule: str, module: str, reason: str, *, expected: bool = False) -> None:
        self.refusals.append(Refusal(site, rule, module, reason, expected))
