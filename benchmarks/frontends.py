"""Every model of a list through each front end, without passes: who captures it, and whether they agree.

    python -m benchmarks.frontends --out frontends
    python -m benchmarks.frontends --out frontends --only 'timm:.*vit'

Each model runs in a process of its own, and a later run goes on where one ended, as in `benchmarks.zoo`. OUT/frontends.md
holds the table: the SQNR of each Program against the eager model, and the compute ops whose counts differ between front ends.
A Program with branches or loops is another one than a trace: its numbers are compared, its ops are not. Ops that follow from
no input do not count, as a trace holds their results; where they differ, the table says "on constants".
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from benchmarks.frontends_one import FrontendsRow
from benchmarks.zoo import console_of, markdown_table, options_of, rich_table, run_list, short
from benchmarks.zoo_one import decibel
from ir_tools.frontends.capture import ORDER

COLUMNS = ("model", "captured by", *(f"{frontend} dB" for frontend in ORDER), "ops", "refused", "seconds")
TEXTS = ("model", "captured by", "ops", "refused")
PREFIX = re.compile(r"^the front end '\w+' cannot capture this model: ")


def cells(row: FrontendsRow) -> list[str]:
    """The row as texts, in the order of `COLUMNS`."""
    numbers = [row.problems.get(frontend) or decibel(row.sqnr_db.get(frontend)) for frontend in ORDER]
    refused = row.error or "; ".join(f"{frontend}: {reason(why)}" for frontend, why in row.refusals.items())
    return [row.model, " ".join(row.captured), *numbers, ops_in_words(row), refused, f"{row.seconds:.1f}"]


def reason(why: str) -> str:
    """A refusal on one line, without what the table says already."""
    return short(PREFIX.sub("", why), 120)


def ops_in_words(row: FrontendsRow) -> str:
    """ "agree", or each op whose count differs; nothing where there are not two to compare."""
    flow = f" (control flow: {' '.join(row.control_flow)})" if row.control_flow else ""
    if len(row.comparable) < 2:
        return flow.strip()
    constants = f" (on constants: {_in_words(row.differing_constant_ops)})" if row.differing_constant_ops else ""
    return (_in_words(row.differing_ops) or "agree") + constants + flow


def _in_words(differing: Mapping[str, Mapping[str, int]]) -> str:
    return "; ".join(
        f"{op.removeprefix('aten::')}: " + " ".join(f"{frontend} {n}" for frontend, n in by.items())
        for op, by in differing.items()
    )


def summary(rows: Sequence[FrontendsRow], expected: int) -> str:
    """How many models each number of front ends captured, and how many agree; then each exception."""
    by_count = Counter(len(row.captured) for row in rows)
    several = [row for row in rows if len(row.captured) >= 2]
    compared = [row for row in several if len(row.comparable) >= 2]
    wrong = [row for row in rows if row.problems or not row.same_numbers]
    agreeing = [row for row in several if row.same_numbers]
    equal = [row for row in agreeing if all(sqnr == float("inf") for sqnr in row.sqnr_db.values())]
    other = [row for row in compared if row.differing_ops]
    by = "; ".join(f"{frontend} {sum(frontend in row.captured for row in rows)}" for frontend in ORDER)
    lines = [
        f"{len(rows)} of {expected} models; captured by "
        + ", ".join(f"{n} front ends: {by_count[n]}" for n in sorted(by_count)[::-1]),
        f"by front end: {by}",
        f"captured by two or more: {len(several)}",
        f"of which the numbers agree: {len(agreeing)} (to the bit: {len(equal)})",
        f"of which two or more have no control flow: {len(compared)}, and the ops agree: {len(compared) - len(other)}",
    ]
    lines += [f"  {row.model}: not run: {short(row.error)}" for row in rows if row.error]
    lines += [f"  {row.model}: numbers: {_numbers(row)}" for row in wrong]
    lines += [f"  {row.model}: ops: {ops_in_words(row)}" for row in other]
    return "\n".join(lines)


def _numbers(row: FrontendsRow) -> str:
    found = {f: row.problems.get(f) or decibel(row.sqnr_db.get(f)) for f in ORDER}
    return ", ".join(f"{frontend} {number}" for frontend, number in found.items() if number)


def markdown(rows: Sequence[FrontendsRow], expected: int) -> str:
    """The summary and the table as Markdown."""
    listed = [f"- {line.strip()}" for line in summary(rows, expected).splitlines()]
    return "\n".join([*listed, "", *markdown_table(COLUMNS, TEXTS, map(cells, rows)), ""])


def main() -> None:
    options, console = options_of(__doc__, "frontends"), console_of()
    rows, expected = run_list(options, FrontendsRow, console)
    (options.out / "frontends.md").write_text(markdown(rows, expected))
    shown = [(cells(row), "red" if _is_exception(row) else "") for row in rows if re.search(options.only, row.model)]
    console.print(rich_table(COLUMNS, TEXTS, shown))
    console.print(summary(rows, expected), markup=False, highlight=False, soft_wrap=True)


def _is_exception(row: FrontendsRow) -> bool:
    return bool(row.error or not row.same_numbers or row.differing_ops)


if __name__ == "__main__":
    main()
