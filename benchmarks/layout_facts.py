"""How much is known of memory layouts before a model runs, and whether it is true.

    python -m benchmarks.layout_facts --models 300 --seed 1

Models of the zoo's sample and random ones are captured, go through the default pipeline and the lowering to oneDNN, in
float32 and with `cast_half`, and run. Each tensor that an op gives is compared with its fact. "known": the share of the
tensors whose strides are known; "false": values whose shape, dtype or strides are not those of the fact. There must be none.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any

import torch
import typer
from hypothesis import HealthCheck, Phase, given, seed, settings
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.zoo_models import SAMPLE, read_list
from ir_tools.errors import PassesError
from ir_tools.frontends.capture import capture
from ir_tools.frontends.source import prepare
from ir_tools.ir import Program
from passes.driver.catalogue import find_passes
from passes.driver.pipeline import DEFAULT
from passes.testing.model_strategy import random_models
from passes.testing.true_facts import known_strides, untrue_facts

PIPELINES = {
    "captured": (),
    "float32": (*DEFAULT, "lower_onednn:variant=fused"),
    "bfloat16": (*DEFAULT, "cast_half", "lower_onednn:variant=fused"),
}


LEAST_OF_ZOO, LEAST_OF_RANDOM = 0.99, 0.95
"""The least share of tensors of known strides; the exit status is 1 below it, and where a fact is false."""

CHECKS = list(HealthCheck)


class Row:
    """Sums over the models of one row."""

    def __init__(self) -> None:
        self.models = self.tensors = self.known = self.false = 0
        self.lacking: Counter[str] = Counter()

    def add(self, program: Program, inputs: tuple[torch.Tensor, ...]) -> None:
        found = known_strides(program, *inputs)
        self.models += 1
        self.tensors += found.tensors
        self.known += found.known
        self.lacking += found.lacking
        self.false += len(untrue_facts(program, *inputs))


def measure(model: nn.Module, args: Any, kwargs: dict[str, Any], rows: dict[str, Row]) -> None:
    """Add one model to a row for each pipeline."""
    with torch.no_grad():
        source = prepare(model.eval(), [(args, kwargs)])
        captured = capture(source).program
        for name, passes in PIPELINES.items():
            program = captured
            for pass_ in find_passes(passes):
                program = pass_(program)
            rows[name].add(program, tuple(source.tensors))


def random_rows(models: int, first: int) -> Iterator[tuple[str, dict[str, Row]]]:
    rows = {name: Row() for name in PIPELINES}

    @seed(first)
    @settings(max_examples=models, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=CHECKS)
    @given(random_models(dtypes=(torch.float32,)))
    def one(spec: Any) -> None:
        try:
            measure(spec.module(), spec.inputs(), {}, rows)
        except PassesError:  # capture refused it
            return

    one()
    yield f"{models} random models", rows


def zoo_rows() -> Iterator[tuple[str, dict[str, Row]]]:
    entries = {entry.title: entry for entry in read_list()}
    for title in SAMPLE:
        rows = {name: Row() for name in PIPELINES}
        measure(entries[title].build(), *entries[title].arguments(), rows)
        yield title, rows


def main(
    models: Annotated[int, typer.Option(help="how many random models")] = 300,
    seed: Annotated[int, typer.Option(help="of the random models")] = 0,
    zoo: Annotated[bool, typer.Option(help="the sample of the zoo, too")] = True,
) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    table = Table("model", "graph", title="strides known before running", title_justify="left")
    for heading in ("models", "tensors", "known", "false"):
        table.add_column(heading, justify="right")
    lacking: Counter[str] = Counter()
    failed = False
    for title, rows in (*(zoo_rows() if zoo else ()), *random_rows(models, seed)):
        for name, row in rows.items():
            share = f"{row.known / max(row.tensors, 1):.2%}"
            table.add_row(title, name, str(row.models), str(row.tensors), share, str(row.false))
            lacking += row.lacking
            short = row.known < (LEAST_OF_RANDOM if "random" in title else LEAST_OF_ZOO) * row.tensors
            failed = failed or short or row.false > 0
    console = Console()
    console.print(table)
    console.print("not known, most often:", ", ".join(f"{op} {n}" for op, n in lacking.most_common(12)) or "none")
    raise typer.Exit(int(failed))


if __name__ == "__main__":
    typer.run(main)
