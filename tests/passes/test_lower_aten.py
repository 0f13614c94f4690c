"""The dialect's own ops, back in plain ATen."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ir_tools.ir import Program
from ir_tools.ir.dialect import ACTIVATIONS, DIALECT_ONLY
from ir_tools.rewrite import decompositions as source
from passes import CATALOGUE
from tests.check import (
    assert_bitwise_equal,
    assert_same_graph,
    assert_sites_can_be_skipped,
    captured,
    one_fused_op,
    ops,
    outputs_of,
    rewritten,
)

lower_aten = CATALOGUE["lower_aten"]
CONVS = {1: nn.Conv1d(2, 4, 3, dilation=2), 2: nn.Conv2d(2, 4, 3, 2, 1, groups=2), 3: nn.Conv3d(2, 4, 2)}


def check_lowering(program: Program, *inputs: Tensor) -> Program:
    after, journal = rewritten(lower_aten, program, *inputs)
    assert journal.rewrites and not journal.refusals
    assert all(node.target not in DIALECT_ONLY for node in after.calls)
    assert_bitwise_equal(outputs_of(program, *inputs), outputs_of(after, *inputs))
    return after


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("act", ["", *ACTIVATIONS])
def test_every_activation_is_lowered(act: str, with_residual: bool) -> None:
    for layer in (CONVS[2], nn.Linear(5, 4)):
        after = check_lowering(*one_fused_op(layer, act, with_residual))
        first = "linear" if isinstance(layer, nn.Linear) else "conv2d"
        last = [act.removesuffix("_tanh")] if act else []
        assert ops(after) == [first, *(["add"] if with_residual else []), *last]


@pytest.mark.parametrize("dims", CONVS)
def test_every_rank_is_lowered(dims: int) -> None:
    assert ops(check_lowering(*one_fused_op(CONVS[dims], "relu", True))) == [f"conv{dims}d", "add", "relu"]


def test_fusing_and_lowering_gives_the_model_back() -> None:
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return F.leaky_relu(self.c(F.gelu(self.a(x) + self.b(x), approximate="tanh")), 0.3)

    model, x = Residual().eval(), torch.randn(2, 3, 6, 6)
    program, _ = rewritten(CATALOGUE["fuse_conv_relu"], captured(model, x), x)
    assert "conv_act" in ops(program) and "linear_act" in ops(program)
    after = check_lowering(program, x)
    assert sorted(ops(after)) == sorted(ops(captured(model, x)))
    assert_bitwise_equal(outputs_of(captured(model, x), x), outputs_of(after, x))


def test_stubs_are_taken_away() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), torch.randn(2, 3, 6, 6)
    program, _ = rewritten(CATALOGUE["insert_quant_stubs"], captured(model, x), x)
    assert ops(program).count("quant_stub") == 2
    assert_same_graph(check_lowering(program, x), model, x)


def test_plain_ops_are_left_alone() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), torch.randn(2, 3, 6, 6)
    program = captured(model, x)
    assert lower_aten(program) is program


def test_each_site_can_be_skipped() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.SiLU()).eval(), torch.randn(1, 3, 6, 6)
    assert_sites_can_be_skipped(lower_aten, lambda: CATALOGUE["fuse_conv_relu"](captured(model, x)), x)


@pytest.mark.parametrize(
    "broken", [lambda op, fused, y: y, lambda op, fused, y: source.activated(op, y, fused.act, [])], ids=["bare", "no r"]
)
def test_lost_parts_are_noticed(broken, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "finished", broken)
    program, x, r = one_fused_op(CONVS[2], "relu", True)
    with pytest.raises(AssertionError, match="moved by"):
        check_lowering(program, x, r)
