"""Notes: an artifact of passes. Lines that the report shows to the user, beside the sites of the rewrite log."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Notes:
    """Lines, each once.

    >>> (Notes(("a", "b")) + Notes(("b", "c"))).lines
    ('a', 'b', 'c')
    """

    lines: tuple[str, ...] = ()

    def __add__(self, other: Notes) -> Notes:
        return Notes(tuple(dict.fromkeys((*self.lines, *other.lines))))
