"""Every model of a list through `optimize`: captured, optimised, verified, saved, reloaded; float32, then half precision.

    python -m benchmarks.zoo --out zoo
    python -m benchmarks.zoo --out zoo --only 'timm:.*vit'

Each model runs in a process of its own, under limits of time and memory. Its row is written to OUT/rows.jsonl when it ends,
and a later run with the same OUT goes on from there; `--fresh` runs again what is selected. OUT/zoo.md holds the table.

"refusals" counts the sites that `fuse_conv_bn_relu` left alone with a reason. SQNR compares the reloaded file with the eager
model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.zoo_models import LIST, Entry, read_list
from benchmarks.zoo_one import Row

COLUMNS = ("model", "front end", "nodes", "rewrites", "refusals", "SQNR dB", "SQNR half dB", "seconds", "error")
ERROR_SHOWN = 300


class Results:
    """The rows so far, in a file that is appended to after every model; the last row of a model counts."""

    def __init__(self, file: Path):
        self.file = file
        self.rows: dict[str, Row] = {}
        text = file.read_text() if file.exists() else ""
        if text and not text.endswith("\n"):
            file.write_text(text + "\n")  # cut short; what comes next starts a line of its own
        for line in text.splitlines():
            try:
                row = Row.from_dict(json.loads(line))
            except json.JSONDecodeError:  # the line that was cut short: its model runs again
                continue
            self.rows[row.model] = row

    def add(self, row: Row) -> None:
        self.rows[row.model] = row
        with self.file.open("a") as out:
            out.write(row.to_json() + "\n")


def run_one(entry: Entry, list_file: Path, timeout: float, memory: float) -> Row:
    """The row of one model, from a process of its own; a process that dies makes a row that says how."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "row.json"
        command = [sys.executable, "-m", "benchmarks.zoo_one", str(list_file), entry.title, str(result), str(memory)]
        try:
            child = subprocess.run(
                command, timeout=timeout, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return Row(entry.title, seconds=timeout, error=f"took longer than {timeout:g} s")
        if result.exists():
            return Row.from_dict(json.loads(result.read_text()))
    how = f"ended by signal {-child.returncode}" if child.returncode < 0 else f"exit code {child.returncode}"
    last = (child.stderr.strip().splitlines() or [""])[-1]
    return Row(entry.title, seconds=round(time.perf_counter() - start, 1), error=f"{how}: {last}")


def run(entries: Sequence[Entry], results: Results, list_file: Path, timeout: float, memory: float, console: Console) -> None:
    """Run the entries one after another, a line for each as it ends."""
    bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*bar, console=console) as progress:
        task = progress.add_task("", total=len(entries))
        for entry in entries:
            progress.update(task, description=entry.title)
            row = run_one(entry, list_file, timeout, memory)
            results.add(row)
            progress.console.print(_line(row), markup=False, highlight=False, soft_wrap=True)
            progress.advance(task)


def _line(row: Row) -> str:
    good = f"ok   {row.frontend}, {row.nodes} nodes, {_decibel(row.sqnr_db)} dB, half {_decibel(row.half_sqnr_db)} dB"
    verdict = f"MISS {_short(row.error)}" if row.error else good
    return f"{row.model:45} {row.seconds:6.1f} s  {verdict}"


# -- tables ---------------------------------------------------------------------------------------------------------------


def cells(row: Row) -> list[str]:
    """The row as texts, in the order of `COLUMNS`."""
    counts = [str(n) if row.frontend else "" for n in (row.nodes, row.rewrites, row.refusals)]
    numbers = [_decibel(row.sqnr_db), _decibel(row.half_sqnr_db), f"{row.seconds:.1f}"]
    return [row.model, row.frontend, *counts, *numbers, _short(row.error)]


def summary(rows: Sequence[Row], expected: int) -> str:
    """How many of the list went through; then each miss with its reason."""
    misses = [row for row in rows if row.error]
    good = len(rows) - len(misses)
    lines = [f"captured {good} of {expected} ({100 * good / max(expected, 1):.1f} %)"]
    if len(rows) < expected:
        lines.append(f"{expected - len(rows)} not run yet")
    return "\n".join([*lines, *(f"  {row.model}: {_short(row.error)}" for row in misses)])


def markdown(rows: Sequence[Row], expected: int) -> str:
    """The summary and the table as Markdown."""
    head, *misses = summary(rows, expected).splitlines()
    table = [COLUMNS, ["---"] * 2 + ["---:"] * 6 + ["---"], *map(cells, rows)]
    body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in table]
    return "\n".join([head, "", *(f"- {line.strip()}" for line in misses), "", *body, ""])


def rich_table(rows: Sequence[Row]) -> Table:
    table = Table()
    for column in COLUMNS:
        text = column in ("model", "front end", "error")
        table.add_column(column, justify="left" if text else "right", overflow="fold")
    for row in rows:
        table.add_row(*cells(row), style="red" if row.error else "")
    return table


def _decibel(value: float | None) -> str:
    return "" if value is None else "equal" if value == math.inf else f"{value:.1f}"


def _short(error: str) -> str:
    """The error on one line."""
    text = " ".join(error.split())
    return text if len(text) <= ERROR_SHOWN else text[: ERROR_SHOWN - 1] + "…"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression that the model's name must match somewhere")
    parser.add_argument("--list", type=Path, default=LIST, help="the list of models")
    parser.add_argument("--out", type=Path, default=Path("zoo"), help="the folder of rows.jsonl and zoo.md")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for each model")
    parser.add_argument("--memory", type=float, default=8.0, help="GiB for each model")
    parser.add_argument("--fresh", action="store_true", help="run again what has a row already")
    options = parser.parse_args()

    console = Console()
    if not console.is_terminal:
        console.width = 200  # a log has room for the table
    options.out.mkdir(parents=True, exist_ok=True)
    entries = read_list(options.list)
    results = Results(options.out / "rows.jsonl")
    wanted = [e for e in entries if re.search(options.only, e.title) and (options.fresh or e.title not in results.rows)]
    run(wanted, results, options.list, options.timeout, options.memory, console)

    rows = [results.rows[e.title] for e in entries if e.title in results.rows]
    (options.out / "zoo.md").write_text(markdown(rows, len(entries)))
    console.print(rich_table([row for row in rows if re.search(options.only, row.model)]))
    console.print(summary(rows, len(entries)), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
