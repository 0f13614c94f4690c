"""What is known of the numbers of values: literals, constants, what was observed."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from ir_tools.ir import regions
from ir_tools.ir.regions import is_region
from ir_tools.verify.ranges import range_of
from passes.analysis.value_ranges import ValueRange, ValueRanges
from tests.check import captured, observe


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("one", torch.tensor([3.0]))
        self.register_buffer("counts", torch.tensor([1, 2, 3, 4]))

    def forward(self, x: Tensor) -> Tensor:
        y = (self.linear(x) + 1e-12) * self.one + self.counts
        if bool(x.sum() > 0):
            return y.relu()
        return y * 5.0


X = torch.rand(2, 4)


def test_each_value_has_its_numbers() -> None:
    program = captured(Net().eval(), X, frontend="script")
    values = ValueRanges.of(program)
    named = {node.name: values[node] for node in program.nodes}
    assert named["add"].literals == (1e-12, 1) and named["linear"] == ValueRange()
    assert named["linear_weight"].constant == range_of(program.constants["linear.weight"])
    assert named["one"] == ValueRange((), range_of(torch.tensor([3.0])), 3.0)
    assert named["linear_weight"].number is None and named["counts"] == ValueRange()
    assert not values.is_observed and values.was_run, "nothing was observed: nothing is known to be unknown"


def test_what_was_observed_comes_by_name() -> None:
    program = captured(Net().eval(), X, frontend="script")
    for sign in (1, -1):
        values = ValueRanges.of(program, observe(program, [[sign * X]]))
        known = {node.name: values[node].observed for node in program.nodes}
        assert known["x"] == range_of(X) and known["one"] == range_of(torch.tensor([3.0])) and known["counts"] is None
        assert values.is_observed and values.was_run


def test_only_a_body_that_was_run_counts_as_run() -> None:
    program = captured(Net().eval(), X, frontend="script")
    bodies = [body for node in program.calls if is_region(node) for body in regions.bodies(node)]
    ran = [[ValueRanges.of(program.of_body(body), observe(program, [[x]])).was_run for body in bodies] for x in (X, -X)]
    assert ran == [[True, False], [False, True]]


def test_it_is_frozen() -> None:
    values = ValueRanges.of(captured(nn.Linear(4, 4).eval(), X))
    with pytest.raises(dataclasses.FrozenInstanceError):
        values.was_run = False  # type: ignore[misc]
    with pytest.raises(TypeError):
        values.by_value[None] = ValueRange()  # type: ignore[index]
