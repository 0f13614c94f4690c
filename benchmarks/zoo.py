"""Every model of a list through `optimize`: captured, optimised, verified, saved, reloaded; float32, then half precision.

    python -m benchmarks.zoo --out zoo
    python -m benchmarks.zoo --out zoo --only 'timm:.*vit'

Each model runs in a process of its own, under limits of time and memory. Its row is written to OUT/rows.jsonl when it ends,
and a later run with the same OUT goes on from there; `--fresh` runs again what is selected. OUT/zoo.md holds the table.

"refusals" counts the sites that the passes left alone with a reason; most often it is a rule of a pair that does not fit. SQNR
compares the reloaded file with the eager model. OUT/folds.md counts what each pass did to each model, and the reasons for
which batch norms were left.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Generic

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.zoo_models import LIST, Entry, read_list
from benchmarks.zoo_one import AnyRow, BaseRow, Row, decibel

COLUMNS = ("model", "front end", "nodes", "rewrites", "refusals", "SQNR dB", "SQNR half dB", "seconds", "error")
TEXTS = ("model", "front end", "error")
ERROR_SHOWN = 300


class Results(Generic[AnyRow]):
    """The rows so far, in a file that is appended to after every model; the last row of a model counts."""

    def __init__(self, file: Path, kind: type[AnyRow]):
        self.file = file
        self.kind = kind
        self.rows: dict[str, AnyRow] = {}
        text = file.read_text() if file.exists() else ""
        if text and not text.endswith("\n"):
            file.write_text(text + "\n")  # cut short; what comes next starts a line of its own
        for line in text.splitlines():
            try:
                row = kind.from_dict(json.loads(line))
            except json.JSONDecodeError:  # the line that was cut short: its model runs again
                continue
            self.rows[row.model] = row

    def add(self, row: AnyRow) -> None:
        self.rows[row.model] = row
        with self.file.open("a") as out:
            out.write(row.to_json() + "\n")


def run_one(entry: Entry, list_file: Path, timeout: float, memory: float, kind: type[AnyRow]) -> AnyRow:
    """The row of one model, from a process of its own; a process that dies makes a row that says how."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "row.json"
        command = [sys.executable, "-m", kind.module, str(list_file), entry.title, str(result), str(memory)]
        try:
            child = subprocess.run(
                command, timeout=timeout, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return kind(entry.title, seconds=timeout, error=f"took longer than {timeout:g} s")
        if result.exists():
            return kind.from_dict(json.loads(result.read_text()))
    how = f"ended by signal {-child.returncode}" if child.returncode < 0 else f"exit code {child.returncode}"
    last = (child.stderr.strip().splitlines() or [""])[-1]
    return kind(entry.title, seconds=round(time.perf_counter() - start, 1), error=f"{how}: {last}")


def run(
    entries: Sequence[Entry], results: Results[AnyRow], list_file: Path, timeout: float, memory: float, console: Console
) -> None:
    """Run the entries one after another, a line for each as it ends."""
    bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*bar, console=console) as progress:
        task = progress.add_task("", total=len(entries))
        for entry in entries:
            progress.update(task, description=entry.title)
            row = run_one(entry, list_file, timeout, memory, results.kind)
            results.add(row)
            progress.console.print(line(row), markup=False, highlight=False, soft_wrap=True)
            progress.advance(task)


def line(row: BaseRow) -> str:
    """The line of the log for a finished model."""
    outcome = f"MISS {short(row.error)}" if row.error else f"ok   {row.in_words()}"
    return f"{row.model:45} {row.seconds:6.1f} s  {outcome}"


# -- tables ---------------------------------------------------------------------------------------------------------------


def cells(row: Row) -> list[str]:
    """The row as texts, in the order of `COLUMNS`."""
    counts = [str(n) if row.frontend else "" for n in (row.nodes, row.rewrites, row.refusals)]
    numbers = [decibel(row.sqnr_db), decibel(row.half_sqnr_db), f"{row.seconds:.1f}"]
    return [row.model, row.frontend, *counts, *numbers, short(row.error)]


FOLD_COLUMNS = {
    "fuse_conv_bn": "bn behind",
    "fold_affine": "affine behind",
    "fuse_bn_conv": "bn before",
    "fold_input_affine": "affine before",
    "merge_linear_chains": "chains",
    "fuse_conv_relu": "conv, linear + act",
    "merge_parallel_linears": "q/k/v",
    "fuse_attention": "attention",
    "eliminate_common_subexpressions": "common",
    "simplify_views": "views",
    "remove_neutral_ops": "neutral",
    "remove_dropout": "dropout",
    "fold_constants": "constants",
}
"""Passes, and what their column is called."""


def folds(rows: Sequence[Row]) -> str:
    """How often each pass fired on each model, as Markdown; and why batch norms were left."""
    columns = ["model", "batch norms", "left", *FOLD_COLUMNS.values()]
    good = [row for row in rows if not row.error]
    table = [[row.model, str(row.norms or ""), str(row.norms_left or ""),
              *(str(row.fired.get(name, "")) for name in FOLD_COLUMNS)] for row in good]  # fmt: skip
    totals = [sum(row.fired.get(name, 0) for row in good) for name in FOLD_COLUMNS]
    table.append(["all", *map(str, (sum(r.norms for r in good), sum(r.norms_left for r in good), *totals))])
    norms = ("fuse_conv_bn", "fuse_bn_conv")
    why: Counter[str] = Counter()
    for row in good:
        why.update({reason: n for reason, n in row.refused.items() if row.norms_left and reason.split(":")[0] in norms})
    reasons = [f"- {reason} ({n})" for reason, n in why.most_common(20)]
    return "\n".join([*markdown_table(columns, ["model"], table), "", "Why batch norms were left:", "", *reasons, ""])


def summary(rows: Sequence[Row], expected: int) -> str:
    """How many of the list went through; then each miss with its reason."""
    misses = [row for row in rows if row.error]
    good = len(rows) - len(misses)
    lines = [f"captured {good} of {expected} ({100 * good / max(expected, 1):.1f} %)"]
    if len(rows) < expected:
        lines.append(f"{expected - len(rows)} not run yet")
    return "\n".join([*lines, *(f"  {row.model}: {short(row.error)}" for row in misses)])


def markdown(rows: Sequence[Row], expected: int) -> str:
    """The summary and the table as Markdown."""
    head, *misses = summary(rows, expected).splitlines()
    body = markdown_table(COLUMNS, TEXTS, map(cells, rows))
    return "\n".join([head, "", *(f"- {miss.strip()}" for miss in misses), "", *body, ""])


def rich_table(columns: Sequence[str], left: Collection[str], rows: Iterable[tuple[list[str], str]]) -> Table:
    """A table for the terminal, of rows with their styles; the columns `left` hold text, the others numbers."""
    table = Table()
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", overflow="fold")
    for texts, style in rows:
        table.add_row(*texts, style=style)
    return table


def markdown_table(columns: Sequence[str], left: Collection[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    rule = ["---" if column in left else "---:" for column in columns]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in texts) + " |" for texts in (columns, rule, *rows)]


def short(error: str, most: int = ERROR_SHOWN) -> str:
    """The error on one line."""
    text = " ".join(error.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def options_of(description: str | None, out: str) -> argparse.Namespace:
    """The command line of a benchmark over the zoo."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression that the model's name must match somewhere")
    parser.add_argument("--list", type=Path, default=LIST, help="the list of models")
    parser.add_argument("--out", type=Path, default=Path(out), help=f"the folder of rows.jsonl and {out}.md")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for each model")
    parser.add_argument("--memory", type=float, default=8.0, help="GiB for each model")
    parser.add_argument("--fresh", action="store_true", help="run again what has a row already")
    return parser.parse_args()


def console_of() -> Console:
    console = Console()
    if not console.is_terminal:
        console.width = 200  # a log has room for the table
    return console


def run_list(options: argparse.Namespace, kind: type[AnyRow], console: Console) -> tuple[list[AnyRow], int]:
    """Run what the options select and has no row yet: the rows of the whole list so far, and its length."""
    options.out.mkdir(parents=True, exist_ok=True)
    entries = read_list(options.list)
    results = Results(options.out / "rows.jsonl", kind)
    wanted = [e for e in entries if re.search(options.only, e.title) and (options.fresh or e.title not in results.rows)]
    run(wanted, results, options.list, options.timeout, options.memory, console)
    return [results.rows[e.title] for e in entries if e.title in results.rows], len(entries)


def main() -> None:
    options, console = options_of(__doc__, "zoo"), console_of()
    rows, expected = run_list(options, Row, console)
    (options.out / "zoo.md").write_text(markdown(rows, expected))
    (options.out / "folds.md").write_text(folds(rows))
    shown = [(cells(row), "red" if row.error else "") for row in rows if re.search(options.only, row.model)]
    console.print(rich_table(COLUMNS, TEXTS, shown))
    console.print(summary(rows, expected), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
