"""Computing ahead of time what depends on constants only."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passes import CATALOGUE
from tests.check import (
    assert_bitwise_equal,
    assert_same_graph,
    assert_sites_can_be_skipped,
    captured,
    ops,
    outputs_of,
    rewritten,
)

fold_constants = CATALOGUE["fold_constants"]
source = importlib.import_module("passes.cleanup.fold_constants")


class ComputedWeight(nn.Module):
    """A standardised weight, computed from the stored one at every call (timm's StdConv2d)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.scale = nn.Parameter(torch.randn(4, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        centred = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, centred / centred.std((1, 2, 3), keepdim=True) * self.scale)


class TwoSites(nn.Module):
    """Two chains that do not depend on each other."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.a.exp() + self.b.neg()


def check_fold(model: nn.Module, *inputs: Tensor):
    program = captured(model.eval(), *inputs)
    after, log = rewritten(fold_constants, program, *inputs)
    assert_bitwise_equal(outputs_of(program, *inputs), outputs_of(after, *inputs))
    return after, log


# -- it rewrites --------------------------------------------------------------------------------------------------------


def test_a_computed_weight_becomes_a_constant() -> None:
    model, x = ComputedWeight(), torch.randn(2, 3, 6, 6)
    after, _ = check_fold(model, x)

    class PlainWeight(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mul_1", torch.randn(4, 3, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.mul_1)

    name = next(iter(after.constants)).split("@")[0]
    assert_same_graph(after, PlainWeight(), x, called={"mul_1": name})
    assert list(after.constants) == [f"{name}@fold_constants"], "the constants that were folded away stayed in the table"


def test_ops_without_tensor_operands_fold() -> None:
    class Positions(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.arange(4).float().sqrt()

    after, log = check_fold(Positions(), torch.randn(3, 4))
    assert ops(after) == ["add"] and len(log.rewrites) >= 2


def test_a_folded_constant_shares_no_memory_with_the_users() -> None:
    class View(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w.t()

    model = View()
    after, _ = check_fold(model, torch.randn(2, 3))
    (folded,) = after.constants.values()
    assert folded.untyped_storage().data_ptr() != model.w.untyped_storage().data_ptr()


# -- it refuses ---------------------------------------------------------------------------------------------------------


class Expanded(nn.Module):
    def __init__(self, columns: int):
        super().__init__()
        self.columns = columns
        self.register_buffer("c", torch.randn(1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.c.expand(8, self.columns)


def test_a_result_that_would_swell_the_file_is_refused() -> None:
    large = source.LARGEST // 4 // 8
    after, log = check_fold(Expanded(large), torch.randn(8, large))
    assert ops(after) == ["add"], "the largest result that is kept"
    after, log = check_fold(Expanded(large + 1), torch.randn(8, large + 1))
    assert ops(after) == ["expand", "add"] and not log.rewrites
    assert [r.reason for r in log.refusals] == ["the result is much larger than its operands"]


class FilledInPlace(nn.Module):
    """A tensor made of nothing, and then filled: folding it would let calls write into one shared constant."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros(2, 3)
        y[0] = x
        return y * 1.0


class ClonedAndFilled(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("c", torch.randn(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.c.clone()
        y[0] += x
        return y * 1.0


@pytest.mark.parametrize("frontend", ["trace", "export"])
@pytest.mark.parametrize("model", [FilledInPlace(), ClonedAndFilled()])
def test_what_is_written_in_place_is_refused(model: nn.Module, frontend: str) -> None:
    x = torch.randn(3)
    program = captured(model, x, frontend=frontend)
    after, log = rewritten(fold_constants, program, x)
    assert not log.rewrites
    assert [r.reason for r in log.refusals] == ["its result is written in place"]
    for inputs in (x, -x, x):
        assert_bitwise_equal([model(inputs)], outputs_of(after, inputs))


def test_state_is_not_a_constant() -> None:
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            return x * (self.count + 1)

    model, x = Counter(), torch.randn(3)
    program = captured(model, x)
    assert fold_constants(program) is program and len(program) == 3


def test_random_numbers_are_drawn_at_every_call() -> None:
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand(3)

    x = torch.zeros(3)
    program = captured(Noise(), x)
    assert fold_constants(program) is program
    assert not torch.equal(outputs_of(program, x)[0], outputs_of(program, x)[0])


def test_run_time_values_do_not_fold() -> None:
    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.exp() + 1

    program = captured(Nothing(), torch.randn(3))
    assert fold_constants(program) is program


# -- sites and teeth ----------------------------------------------------------------------------------------------------


def test_each_site_can_be_skipped() -> None:
    model, x = TwoSites(), torch.randn(3)
    assert_sites_can_be_skipped(fold_constants, lambda: captured(model, x), x)


def test_a_skipped_site_keeps_what_depends_on_it() -> None:
    model, x = ComputedWeight(), torch.randn(1, 3, 6, 6)
    program = captured(model, x)
    _, log = rewritten(fold_constants, program, x)
    first = log.rewrites[0].site
    after, _ = rewritten(fold_constants, program, x, skip={first})
    assert ops(after) == ops(program)


@pytest.mark.parametrize("broken", ["stale", "rounded"])
def test_a_wrong_value_is_noticed(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = source.evaluate

    def wrong(program, node):
        value, size = right(program, node)
        return (torch.zeros_like(value) if broken == "stale" else value.bfloat16().to(value.dtype)), size

    monkeypatch.setattr(source, "evaluate", wrong)
    with pytest.raises(AssertionError, match="moved by"):
        check_fold(ComputedWeight(), torch.randn(1, 3, 6, 6))
