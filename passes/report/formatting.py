"""Numbers and options as a report writes them: decibels, errors, seconds, bytes."""

from __future__ import annotations

import math

from ir_tools.rewrite.rewrite_log import Casts
from ir_tools.rewrite.shapes import spelled_option


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
    """`casts: 4 that move 1.2 MB in one pass through the graph; op by op it would be 107 and 93 MB; 0 before`.

    Not "per call": the body of a loop counts once, and both sides of a branch do.
    """
    after, one_by_one, before = casts.after, casts.one_by_one, casts.before
    moves = "moves" if after.count == 1 else "move"
    return (
        f"casts: {after.count} that {moves} {byte_size(after.bytes)} in one pass through the graph; "
        f"op by op it would be {one_by_one.count} and {byte_size(one_by_one.bytes)}; {before.count} before"
    )


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
    return spelled_option(value).removeprefix("torch.")
