"""Numbers and options as a report prints them: decibels, errors, seconds, bytes, casts."""

from __future__ import annotations

import math

from ir_tools.rewrite.cast import Casts
from ir_tools.rewrite.shapes import option_text


def decibel(value: float | None, unit: str = " dB") -> str:
    if value is None:
        return "-"
    if math.isinf(value) and value > 0:
        return "equal"  # no noise at all: the outputs are bitwise those of the eager model
    return f"{value:.1f}{unit}"


def agreement(sqnr_db: float, max_abs_error: float | None) -> str:
    if math.isinf(sqnr_db) and sqnr_db > 0:
        return "bitwise equal to the eager model"
    largest = f", max error {error(max_abs_error)}" if max_abs_error is not None else ""
    return f"SQNR {decibel(sqnr_db)}{largest} against the eager model"


def error(value: float | None) -> str:
    return "-" if value is None else "0" if value == 0 else f"{value:.1e}"


def seconds(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def casts_line(casts: Casts) -> str:
    """`4 dtype casts, 1.2 MB per run (per-op autocast: 107 casts, 93 MB); 0 before`.

    A run counts every op of the graph once: the body of a loop counts once, whatever its trip count, and so do both sides of
    a branch. "Per-op autocast": each op casts its own operands. "Before": the model's own casts.
    """
    after, one_by_one, before = casts.after, casts.one_by_one, casts.before
    autocast = f"per-op autocast: {one_by_one.count} {_casts(one_by_one.count)}, {byte_size(one_by_one.bytes)}"
    return f"{after.count} dtype {_casts(after.count)}, {byte_size(after.bytes)} per run ({autocast}); {before.count} before"


def _casts(count: int) -> str:
    return "cast" if count == 1 else "casts"


def byte_size(count: int) -> str:
    """Decimal units: `950 B`, `1.2 MB`, `93 MB`.

    >>> [byte_size(n) for n in (0, 950, 1234, 93_400_000, 999_999)]
    ['0 B', '950 B', '1.2 kB', '93 MB', '1.0 MB']
    """
    if count < 1000:
        return f"{count} B"
    size = float(count)
    units = iter(("kB", "MB", "GB", "TB", "PB", "EB"))
    unit = "B"
    while size >= 999.5:
        size, unit = size / 1000, next(units)
    return f"{size:.1f} {unit}" if size < 9.95 else f"{size:.0f} {unit}"


def option(value: object) -> str:
    return option_text(value).removeprefix("torch.")
