"""Computing once what is computed twice: it rewrites, it refuses, every bit stays, in linear time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ir_tools.ir import Program
from ir_tools.rewrite import common
from passes import CATALOGUE
from tests.check import assert_bitwise_equal, assert_sites_can_be_skipped, captured, ops, outputs_of, rewritten
from tests.ir_tools.rewriting import Function

eliminate = CATALOGUE["eliminate_common_subexpressions"]

X, Y = torch.randn(3, 4), torch.randn(3, 4)


def program_of(function: Callable, *inputs: Tensor, frontend: str = "trace", **buffers: Tensor) -> Program:
    return captured(Function(function, **buffers).eval(), *(inputs or (X,)), frontend=frontend)


def twice(function: Callable) -> Callable:
    """The sine of `function`, computed twice."""
    return lambda m, *inputs: function(m, *inputs).sin() + function(m, *inputs).sin() * 2


FOUND: dict[str, tuple[Callable, tuple[Tensor, ...]]] = {
    "a chain": (lambda m, x: x.exp().clamp(0, 1).mT, (X,)),
    "keyword arguments": (lambda m, x: torch.add(x, x.exp(), alpha=2), (X,)),
    "parts of a split": (lambda m, x: x.split(2, 1)[1], (X,)),
    "a linear": (lambda m, x: F.linear(x, m.a), (X,)),
    "equal constants": (lambda m, x: x * 3 + m.a, (X,)),
    "a dropout that is off": (lambda m, x: F.dropout(x.exp(), training=False), (X,)),
    "sizes": (lambda m, x: torch.zeros(x.shape[0]).sum() + x, (X,)),
}


@pytest.mark.parametrize("frontend", ["trace", "export"])
@pytest.mark.parametrize("name", FOUND)
def test_it_is_computed_once(name: str, frontend: str) -> None:
    function, inputs = FOUND[name]
    buffers = {"a": torch.randn(4, 4) if name == "a linear" else torch.randn(3, 4)}
    program = program_of(twice(function), *inputs, frontend=frontend, **buffers)
    once = program_of(lambda m, *i: (lambda y: y + y * 2)(function(m, *i).sin()), *inputs, frontend=frontend, **buffers)
    after, log = rewritten(eliminate, program, *inputs)
    assert sorted(ops(after)) == sorted(ops(once))
    assert len(log.rewrites) == len(ops(program)) - len(ops(after)) and not log.refusals
    assert_bitwise_equal(outputs_of(program, *inputs), outputs_of(after, *inputs))


def test_sums_and_products_are_the_same_in_either_order() -> None:
    program = program_of(lambda m, x, y: (x + y).exp() * (x * y) + (y + x).sin() * (y * x), X, Y)
    after, log = rewritten(eliminate, program, X, Y)
    assert ops(after).count("mul") == 3 and ops(after).count("add") == 2 and len(log.rewrites) == 2
    assert_bitwise_equal(outputs_of(program, X, Y), outputs_of(after, X, Y))


def test_constants_of_equal_bytes_are_the_same() -> None:
    ones = torch.ones(4)
    program = program_of(lambda m, x: (x * m.a).exp() - (x * m.b).cos(), a=ones, b=ones.clone())
    after, log = rewritten(eliminate, program, X)
    assert ops(after).count("mul") == 1 and [*after.constants] == ["a"]
    assert_bitwise_equal(outputs_of(program, X), outputs_of(after, X))


@pytest.mark.parametrize(
    "b", [torch.zeros(4, dtype=torch.float64), -torch.zeros(4), torch.zeros(1, 4), torch.tensor([0.0, 0, 0, 1e-45])]
)
def test_constants_that_differ_at_all_are_not(b: Tensor) -> None:
    program = program_of(lambda m, x: (x * m.a).exp() - (x * m.b).cos(), a=torch.zeros(4), b=b)
    assert rewritten(eliminate, program, X)[0] is program


def test_large_constants_of_the_user_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    a = torch.randn(4, 4)
    monkeypatch.setattr(common, "LARGEST_CONSTANT", 63)
    program = program_of(lambda m, x: (x @ m.a).exp() - (x @ m.b).cos(), a=a, b=a.clone())
    assert rewritten(eliminate, program, X)[0] is program
    computed = program_of(lambda m, x: (x @ m.a.neg()).exp() - (x @ m.a.neg().neg().neg()).cos(), a=a)
    folded = CATALOGUE["fold_constants"](computed)
    assert len(folded.constants) == 2 and ops(eliminate(folded)).count("matmul") == 1


# -- it refuses ---------------------------------------------------------------------------------------------------------

OUTPUTS = "both results are outputs of the model, which must not share memory"
WRITTEN = "its operands or result are written in place"


def refusals(function: Callable, *inputs: Tensor) -> list[str]:
    program = program_of(function, *inputs)
    after, log = rewritten(eliminate, program, *(inputs or (X,)))
    assert after is program
    assert_bitwise_equal(outputs_of(program, *(inputs or (X,))), outputs_of(after, *(inputs or (X,))))
    return [refused.reason for refused in log.refusals]


def test_two_outputs_stay_two_tensors() -> None:
    assert refusals(lambda m, x: (x.exp(), x.exp())) == [OUTPUTS]
    assert refusals(lambda m, x: (x.exp()[0], x.exp().mT)) == [OUTPUTS]
    program = program_of(lambda m, x: (x.exp(), x.exp().sin()))
    assert ops(rewritten(eliminate, program, X)[0]) == ["exp", "sin"]


class Collected(nn.Module):
    def forward(self, x: Tensor):
        found: list[Tensor] = []
        for _ in range(int(x.abs().sum()) + 1):
            found.append(x.exp())
            found.append(x.exp())
        return found[0], found[1]


def test_two_elements_of_a_list_stay_two_tensors() -> None:
    x = torch.ones(2, 2)
    program = captured(torch.jit.script(Collected().eval()), x, frontend="script")
    after, log = rewritten(eliminate, program, x)
    assert after is program and OUTPUTS in [refused.reason for refused in log.refusals]


def test_what_is_written_stays() -> None:
    def result(m, x):
        y, z = torch.zeros(3), torch.zeros(3)
        y[0] = x.sum()
        return y + z

    def operand(m, x):
        y = x.exp()
        before = y.sum()
        y[0] = 7.0
        return before + y.sum()

    assert refusals(result) == [WRITTEN]
    assert WRITTEN in refusals(operand)


def test_other_layouts_are_other_results() -> None:
    x = torch.randn(3, 3)
    assert refusals(lambda m, x: (lambda y: (x + y).exp() * (y + x).cos())(x.mT.exp()), x)[0] == (
        "the two results lie in memory in different orders"
    )


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: torch.rand_like(x) - torch.rand_like(x).exp(),
        lambda m, x: F.dropout(x, training=True) + F.dropout(x, training=True).exp(),
        lambda m, x: (x * 1).exp() + (x * 1.0).cos(),
        lambda m, x: (x + 0.0).exp() + (x + -0.0).cos(),
        lambda m, x: (x - 1).exp() + (1 - x).cos(),
        lambda m, x: torch.add(x, x.mT.mT.abs(), alpha=2).exp() + torch.add(x.abs(), x, alpha=2).cos(),
        lambda m, x: x.sum(0).exp() + x.sum(0, dtype=torch.float64).cos(),
    ],
)
def test_what_differs_does_not_fit(function: Callable) -> None:
    program = program_of(function, frontend="export")  # TorchScript takes 0.0 and -0.0 for one constant
    after, log = rewritten(eliminate, program, X)
    left = [name for name in ops(program) if name not in ("abs", "mT")]
    assert [name for name in ops(after) if name not in ("abs", "mT")] == left and not log.refusals


def test_complex_products_in_another_order_round_differently() -> None:
    z = torch.randn(3, 4, dtype=torch.complex64)
    program = program_of(lambda m, x, y: (x * y).exp() + (y * x).cos(), z, z.flip(0))
    after, log = rewritten(eliminate, program, z, z.flip(0))
    assert after is program and not log.refusals


def test_each_site_can_be_skipped() -> None:
    assert_sites_can_be_skipped(
        eliminate, lambda: program_of(lambda m, x: x.exp() + x.exp().cos() + x.sin() + x.sin().tan()), X
    )


def test_every_op_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal ops are found by their keys: no op is compared with every other."""
    program = program_of(lambda m, x: sum(torch.sin(x + i % 7) for i in range(200)))
    looked, of = [], common.Keys.of
    monkeypatch.setattr(common.Keys, "of", lambda self, node: (looked.append(node), of(self, node))[1])
    after = eliminate(program)
    assert len(after.calls) < len(program.calls) and len(looked) <= len(program.calls)


# -- teeth --------------------------------------------------------------------------------------------------------------


def test_a_key_that_takes_numbers_for_the_same_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common.Keys, "_literal", lambda self, v: v if isinstance(v, torch.fx.Node) else type(v))
    program = program_of(lambda m, x: (x * 1.5).exp() + (x * 2.5).cos())
    after, _ = rewritten(eliminate, program, X)
    with pytest.raises(AssertionError, match="moved by"):
        assert_bitwise_equal(outputs_of(program, X), outputs_of(after, X))
