"""Numeric verification: Programs after each step, and the emitted module, are compared with the user's own model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ir_tools.frontends.source import Example
from ir_tools.frontends.undisturbed import seeded
from ir_tools.ir import Program, facts
from ir_tools.ir.dialect import nodes_in, short_name
from ir_tools.rewrite import Pass
from ir_tools.rewrite.numeric_effects import NumericEffects
from ir_tools.verify.numerics import PERFECT, Comparison, compare, smallest_sqnr
from passes.driver.step import Run, Step
from passes.errors import NumericsError

ROUNDS: NumericEffects = frozenset({"rounds"})
"""The effects of capturing and of emitting: sums may be added in another order."""


class Numerics:
    """Compares Programs, and finally the emitted module, with the outputs of the user's model."""

    def __init__(self, examples: Sequence[Example], tolerance: float | None):
        self.examples = examples
        self.tolerance = tolerance
        self.effects: NumericEffects = ROUNDS
        self.captured: Comparison | None = None
        self.largest = 0.0
        self.last: list[list[torch.Tensor]] = []

    def check_capture(self, program: Program) -> None:
        """The captured Program against the model; raises `NumericsError`."""
        self.largest = max(largest_product(program, example) for example in self.examples)
        self.last = self._run(program)
        self.captured = self._judge(program, self.last, "the captured graph does not give the model's numbers")

    def hook(self, run: Run) -> Run:
        def verified_run(step: Step, program: Program) -> Program:
            after = run(step, program)
            if after is program:
                return after
            self.allow([step.pass_])
            outputs = self._run(after)
            if step.pass_.is_exact:
                self._check_exact(program, outputs, _blame(step))
                step.report.tolerance = "bitwise"
            else:
                left_out = ", where the model gives no NaN or Inf" if self._where_finite else ""
                step.report.tolerance = f"SQNR >= {self._smallest(after):g} dB{left_out}"
            comparison = self._judge(after, outputs, _blame(step))
            step.report.max_abs_error, step.report.sqnr_db = comparison.max_abs_error, comparison.sqnr_db
            self.last = outputs
            return after

        return verified_run

    def allow(self, passes: Sequence[Pass]) -> None:
        """From here on, the numbers may differ by the effects of the passes too."""
        self.effects = self.effects.union(*(p.effects for p in passes))

    @property
    def _where_finite(self) -> bool:
        return "non_finite_may_become_finite" in self.effects

    def check_emitted(self, program: Program, call: Callable[[int], list[torch.Tensor]], times: int = 3) -> Comparison:
        """The emitted module on every example, several times over: what executes may specialise as it warms up."""
        worst = PERFECT
        for _ in range(times):
            outputs = [call(i) for i in range(len(self.examples))]
            worst = worst.worse(self._judge(program, outputs, "the emitted module does not give the model's numbers"))
        return worst

    def _run(self, program: Program) -> list[list[torch.Tensor]]:
        return [run_seeded(program, example) for example in self.examples]

    def _check_exact(self, before: Program, outputs: list[list[torch.Tensor]], blame: str) -> None:
        """Bitwise equal to the step before, unless that step is not even equal to itself from run to run."""
        for example, expected, got in zip(self.examples, self.last, outputs, strict=True):
            comparison = compare(expected, got)
            if comparison.equal or not compare(expected, run_seeded(before, example)).equal:
                continue
            moved = comparison.problem or f"outputs moved by up to {comparison.max_abs_error:.3g}"
            raise NumericsError(f"{blame}: it is declared exact, but {moved}")

    def _judge(self, program: Program, outputs: list[list[torch.Tensor]], what: str) -> Comparison:
        """Compare with the model's outputs; raises `NumericsError`."""
        worst = PERFECT
        for example, got in zip(self.examples, outputs, strict=True):
            worst = worst.worse(compare(example.outputs, got, where_finite=self._where_finite))
        if worst.problem:
            raise NumericsError(f"{what}: {worst.problem}")
        # Outputs that cancel to almost nothing have no meaningful SQNR: float32's rounding of the largest product is no
        # failure. (Not that of a half dtype: an eighth of a percent of a large product would excuse any softmax.)
        rounding = torch.finfo(torch.float32).eps * self.largest
        if worst.sqnr_db < self._smallest(program) and (self.tolerance is not None or worst.max_abs_error > rounding):
            raise NumericsError(
                f"{what}: SQNR {worst.sqnr_db:.1f} dB, allowed {self._smallest(program):g} dB; "
                f"maximum absolute error {worst.max_abs_error:.3g}. Set tolerance= (dB) to allow more."
            )
        return worst

    def _smallest(self, program: Program) -> float:
        """The smallest SQNR allowed now, in dB."""
        return self.tolerance if self.tolerance is not None else smallest_sqnr(self.effects, compared_dtypes(program))


def _blame(step: Step) -> str:
    text = f"the pass {step.pass_} changed the numbers too much"
    if step.log.rewrites:
        first = step.log.rewrites[0]
        text += f" (its first rewrite: {first.rule} at {first.module})"
    return text


def run_seeded(program: Program, example: Example) -> list[torch.Tensor]:
    """Run on copies of the inputs, which a Program may write into, with the random numbers of the model's own run."""
    with seeded():
        return program.run(*(t.clone() for t in example.tensors))


def largest_product(program: Program, example: Example) -> float:
    """The largest magnitude that a convolution, linear or matrix product of the Program gives."""
    largest = 0.0
    with seeded():
        for node, value in program.trace_values(*(t.clone() for t in example.tensors)):
            if node.op == "call_function" and short_name(node.target) in PRODUCTS and value.numel():
                largest = max(largest, value.abs().max().item())
    return largest if math.isfinite(largest) else 0.0


PRODUCTS = frozenset(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear matmul mm bmm addmm".split()
)
WIDTH = {torch.float64: 4, torch.float32: 3, torch.float16: 2, torch.bfloat16: 1}


def narrowest_float(program: Program) -> torch.dtype:
    """The narrowest floating dtype that the graph computes in."""
    return min(compared_dtypes(program), key=WIDTH.__getitem__)


def compared_dtypes(program: Program) -> set[torch.dtype]:
    """The floating dtypes that the graph computes in and the tables of tolerances know; float32 where there is none."""
    return float_dtypes(program) & WIDTH.keys() or {torch.float32}


def float_dtypes(program: Program) -> set[torch.dtype]:
    """The floating dtypes that the graph computes in."""
    found: set[Any] = {facts.dtype(n) for node in program.all_calls for n in (node, *nodes_in(node.args))}
    return {d for d in found if d is not None and d.is_floating_point}
