"""Counting what passes did on many models, and the table of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from rich import box
from rich.table import Table

from ir_tools.rewrite import Pass, RewriteLog
from ir_tools.rewrite.rule import reason


@dataclass
class Tally:
    """Counts of many runs. Keys are text: `pass: rule`, `pass: reason`, `front end: what it refused`.

    `tensors`: those that the ops of the last graphs gave on the CPU; `strides_known`: of how many the facts have strides.
    """

    models: int = 0
    untouched: int = 0
    tensors: int = 0
    strides_known: int = 0
    seconds: float = 0.0
    rewrites: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    captured: Counter[str] = field(default_factory=Counter)
    phrases: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, passes: Iterable[Pass]) -> Tally:
        """Zero for every rule of the passes and for every requirement, so that what never happened shows up."""
        tally = cls()
        for pass_ in passes:
            for rule in getattr(pass_, "rules", ()):
                tally.rewrites[f"{pass_.name}: {rule.name}"] += 0
                for requirement in rule.requires:
                    tally.refusals[f"{pass_.name}: requirement not met: {reason(requirement)}"] += 0
        return tally

    def count(self, pass_: Pass, log: RewriteLog) -> None:
        """Add what one run of one pass did."""
        self.rewrites.update(f"{pass_.name}: {rewrite.rule}" for rewrite in log.rewrites)
        self.refusals.update(f"{pass_.name}: {kind_of(refusal.reason)}" for refusal in log.refusals)

    def add(self, other: Tally) -> None:
        """Add the counts of `other`."""
        for name in (f.name for f in fields(self)):
            mine = getattr(self, name)
            if isinstance(mine, Counter):
                mine.update(getattr(other, name))
            else:
                setattr(self, name, mine + getattr(other, name))

    @property
    def share_untouched(self) -> float:
        """The share of models on which no rule fired."""
        return self.untouched / self.models if self.models else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values; counters as dicts, the largest count first."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: dict(v.most_common()) if isinstance(v, Counter) else v for name, v in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Tally:
        """What `to_dict` gave."""
        tally = cls()
        for name, value in values.items():
            setattr(tally, name, Counter(value) if isinstance(value, dict) else value)
        return tally

    def tables(self, title: str) -> list[Table]:
        """The summary, and a table each of rewrites, refusals and captures."""
        summary = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, title=title, title_justify="left")
        for heading in ("models", "seconds", "models a second", "rewrites", "no rule fired", "strides known"):
            summary.add_column(heading, justify="right")
        rate = f"{self.models / self.seconds:.1f}" if self.seconds else "-"
        share = f"{self.share_untouched:.1%}"
        known = f"{self.strides_known / self.tensors:.2%}" if self.tensors else "-"
        summary.add_row(str(self.models), f"{self.seconds:.1f}", rate, str(self.rewrites.total()), share, known)
        return [
            summary,
            *(_table(heading, counts) for heading, counts in
              (("rewrites, by rule", self.rewrites), ("refusals, by reason", self.refusals), ("captured", self.captured))
              if counts),
        ]  # fmt: skip


def _table(heading: str, counts: Counter[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column(heading, overflow="fold")
    table.add_column("times", justify="right")
    for key, times in counts.most_common():
        table.add_row(key.replace("[", r"\["), str(times), style="bold yellow" if not times else "")
    return table


PATTERNS: Sequence[tuple[str, str]] = (
    (r"^the result of .* has another user.*", "the result of an op inside has another user"),
    (r"^the result of .* is read twice by the pattern", "the result of an op inside is read twice by the pattern"),
    (r"^.* is written in place$", "a value of the match is written in place"),
    (r"^(the result would change \w+) from .*", r"\1"),
)


def kind_of(text: str) -> str:
    """A reason without what belongs to one location alone: module paths, names, shapes, numbers.

    >>> kind_of("the result of conv2d layer1.0 has another user (relu v3)")
    'the result of an op inside has another user'
    >>> kind_of("the op takes float64[2, 3] at body.4")
    'the op takes … at …'
    >>> kind_of("requirement not met: The addition has alpha = 1.")
    'requirement not met: The addition has alpha = 1.'
    """
    text = text.splitlines()[0] if text else ""
    if text.startswith(("requirement not met: ", "unknown: ")):
        return text
    for pattern, kind in PATTERNS:
        if re.match(pattern, text):
            return re.sub(pattern, kind, text)
    text = re.sub(r"\([^()]*\)|\w*\[[^\]]*\]|'[^']*'|\"[^\"]*\"", "…", text)
    text = re.sub(r"\S*(\d|\w\.\w)\S*", "…", text)
    return re.sub(r"…(\W*…)+", "…", text).strip()
