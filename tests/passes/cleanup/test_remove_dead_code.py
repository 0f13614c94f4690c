"""Removing what neither the outputs nor an effect need."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from ir_tools.ir import Draft, Program
from passes import CATALOGUE
from tests.check import assert_bitwise_equal, assert_same_graph, captured, ops, outputs_of, rewritten

remove_dead_code = CATALOGUE["remove_dead_code"]
aten = torch.ops.aten
X = torch.randn(2, 3)


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).relu()


def with_dead_code(program: Program, *targets) -> Program:
    """A Program that computes `targets` of its first input, and `targets` of that, for nobody."""
    draft = Draft.of(program)
    value: fx.Node = draft.program.placeholders[0]
    with draft.before(draft.program.output):
        for target, *args in targets:
            value = draft.call(target, value, *args)
    return draft.program


def test_a_chain_that_nobody_reads_goes() -> None:
    model = Linear().eval()
    program = with_dead_code(captured(model, X), (aten.exp.default,), (aten.mul.Scalar, 2.0), (aten.neg.default,))
    assert ops(program)[-3:] == ["exp", "mul", "neg"]
    after, log = rewritten(remove_dead_code, program, X)
    assert [r.site for r in log.rewrites] == [f"remove_dead_code@{name}" for name in ("neg", "mul", "exp")]
    assert_same_graph(after, model, X)
    assert_bitwise_equal(outputs_of(program, X), outputs_of(after, X))


def test_constants_that_only_dead_code_read_go() -> None:
    model = Linear().eval()
    program = captured(model, X)
    draft = Draft.of(program)
    with draft.before(draft.program.output):
        draft.call(aten.add.Tensor, draft.program.placeholders[0], draft.constant("unread", torch.randn(3)))
    assert "unread" in draft.program.constants
    after, _ = rewritten(remove_dead_code, draft.program, X)
    assert sorted(after.constants) == ["linear.bias", "linear.weight"]


def test_live_code_stays() -> None:
    program = captured(Linear().eval(), X)
    after, log = rewritten(remove_dead_code, program, X)
    assert after is program and not log.rewrites


@pytest.mark.parametrize(
    "effect",
    [
        (aten.mul_.Scalar, 2.0),  # pytorch#68301: a write that nobody reads by name
        (aten.bernoulli.p, 0.5),  # moves the random state for those who draw later
        (aten.dropout.default, 0.5, True),
    ],
    ids=["write", "random", "dropout"],
)
def test_effects_stay_and_so_does_what_they_read(effect: tuple) -> None:
    program = with_dead_code(captured(Linear().eval(), X), (aten.exp.default,), effect)
    after, log = rewritten(remove_dead_code, program, X)
    assert after is program and not log.rewrites and len(ops(program)) == 4


def test_an_assertion_stays() -> None:
    program = with_dead_code(
        captured(Linear().eval(), X), (aten.sum.default,), (aten.gt.Scalar, 0.0), (aten._assert_async.msg, "positive")
    )
    assert remove_dead_code(program) is program


def test_a_dropout_that_is_off_goes() -> None:
    program = with_dead_code(captured(Linear().eval(), X), (aten.dropout.default, 0.5, False))
    assert ops(rewritten(remove_dead_code, program, X)[0]) == ["linear", "relu"]


def test_a_batch_norm_in_training_stays() -> None:
    """It moves the running statistics, although its schema does not say so."""

    class Moves(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))
            self.register_buffer("var", torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            torch.nn.functional.batch_norm(x, self.mean, self.var, training=True)
            return x + self.mean

    model = Moves()
    program = captured(model, X)
    after, _ = rewritten(remove_dead_code, program, X)
    assert "batch_norm" in ops(after) and after.state == {"mean", "var"}
    assert_bitwise_equal([X + 0.1 * X.mean(0)], outputs_of(after, X))
    assert torch.equal(model.mean, torch.zeros(3))


def test_removing_what_is_read_is_noticed() -> None:
    """The comparison of graphs sees a missing op."""
    program = captured(nn.Sequential(nn.ReLU(), nn.Sigmoid()).eval(), X)
    with pytest.raises(AssertionError, match="expected:"):
        assert_same_graph(program, nn.Sequential(nn.ReLU()).eval(), X)
