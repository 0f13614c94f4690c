"""What a pass may do to numbers: a set of effects. A pass that has none is exact, bit for bit.

    rounds                          sums in another order, factors multiplied ahead of time: rounding of the dtype
    non_finite_may_become_finite    what overflowed to NaN or Inf may be a number
    lowers_precision                values are held in a float dtype of fewer bits
    quantizes                       values are held as integers with a scale

The effects of several passes are the union of theirs. What each one allows is in `ir_tools.verify.numerics`. (What an op does
besides computing its result is another matter: `ir_tools.ir.effects`.)
"""

from __future__ import annotations

import typing
from collections.abc import Collection, Iterable
from typing import Literal

from ir_tools.deprecation import warn_renamed
from ir_tools.errors import OptionError

NumericEffect = Literal["rounds", "non_finite_may_become_finite", "lowers_precision", "quantizes"]
NumericEffects = frozenset[NumericEffect]

WORDS: dict[NumericEffect, str] = {
    "rounds": "rounds",
    "non_finite_may_become_finite": "may turn NaN and Inf into numbers",
    "lowers_precision": "lowers precision",
    "quantizes": "quantizes",
}
NUMERIC_EFFECTS: tuple[NumericEffect, ...] = typing.get_args(NumericEffect)


def numeric_effects(given: Iterable[str]) -> NumericEffects:
    """The set of these effects. Raises `OptionError` for what is none.

    >>> numeric_effects(["rounds"])
    frozenset({'rounds'})
    """
    names = [given] if isinstance(given, str) else list(given)
    unknown = [name for name in names if name not in NUMERIC_EFFECTS]
    if unknown or isinstance(given, str):
        have = ", ".join(map(repr, NUMERIC_EFFECTS))
        raise OptionError(f"effects must be a set of {have}, empty for an exact pass; got {given!r}")
    return frozenset(typing.cast("list[NumericEffect]", names))


def in_order(effects: Collection[str]) -> tuple[NumericEffect, ...]:
    """The effects in the order of the table above."""
    return tuple(effect for effect in NUMERIC_EFFECTS if effect in effects)


def in_words(effects: Collection[str]) -> str:
    """For people.

    >>> in_words(()), in_words({"rounds", "lowers_precision"})
    ('exact', 'rounds, lowers precision')
    """
    return ", ".join(WORDS[effect] for effect in in_order(effects)) or "exact"


# -- `declares=`, for one more release ------------------------------------------------------------------------------------

DECLARATIONS: dict[str, NumericEffects] = {
    "exact": frozenset(),
    "reassociates": frozenset({"rounds"}),
    "stabilises": frozenset({"rounds", "non_finite_may_become_finite"}),
    "lower_precision": frozenset({"rounds", "lowers_precision"}),
    "quantizes": frozenset({"rounds", "quantizes"}),
}
"""What passes once declared, mildest first, and the effects that it stands for."""


DECLARED_FOR: dict[str, str] = {
    "rounds": "reassociates",
    "non_finite_may_become_finite": "stabilises",
    "lowers_precision": "lower_precision",
    "quantizes": "quantizes",
}
"""What a pass declared whose strongest effect, the last one of the table above, is this."""


def declared(declares: str) -> NumericEffects:
    """The effects that a declaration stands for; raises a `DeprecationWarning`."""
    if declares not in DECLARATIONS:
        raise OptionError(f"declares must be one of {', '.join(map(repr, DECLARATIONS))}, got {declares!r}; give effects=")
    effects = DECLARATIONS[declares]
    now = ", ".join(map(repr, in_order(effects)))
    warn_renamed(f"declares={declares!r} of a pass", f"effects={{{now}}}" if now else "effects=()")
    return effects


def declaration(effects: Collection[str]) -> str:
    """The declaration of the strongest of these effects; that of none speaks of all combinations.

    >>> declaration({"rounds"}), declaration({"lowers_precision", "non_finite_may_become_finite"})
    ('reassociates', 'lower_precision')
    """
    strongest = max(effects, key=NUMERIC_EFFECTS.index, default=None)  # type: ignore[arg-type]
    return "exact" if strongest is None else DECLARED_FOR[strongest]
