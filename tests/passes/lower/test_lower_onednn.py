"""Lowering to oneDNN's fused, packed kernels: the numbers, the memory that is reused, and what is declined."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ir_tools.emit.to_torchscript import emit
from ir_tools.ir import Program
from ir_tools.ir.dialect import ACTIVATIONS, DIALECT_ONLY, overload_name
from ir_tools.ir.prepack import is_prepack
from passes import CATALOGUE
from tests.check import (
    assert_bitwise_equal,
    assert_numbers_agree,
    assert_sites_can_be_skipped,
    captured,
    one_fused_op,
    ops,
    outputs_of,
    relative_error,
    rewritten,
)

lower_onednn = CATALOGUE["lower_onednn"].with_options(variant="fused")
source = importlib.import_module("passes.lower.variants.onednn")

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch is built without oneDNN")

WITHIN = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Relative error allowed: float rounding; for bfloat16 a few of its last bits, since the sum is rounded once, not twice."""
DTYPES = [torch.float32, torch.bfloat16]
CONV, CONV_SUM, CONV_SUM_IN_PLACE = (
    "mkldnn::_convolution_pointwise",
    "mkldnn::_convolution_pointwise.binary",
    "mkldnn::_convolution_pointwise_.binary",
)
LINEAR, LINEAR_SUM = "mkldnn::_linear_pointwise", "mkldnn::_linear_pointwise.binary"


def kernels(program: Program) -> list[str]:
    return [overload_name(node.target) for node in program.calls if not is_prepack(node)]


def check_lowering(program: Program, *inputs: Tensor, within: float | None = None) -> Program:
    """Lower without declining; the numbers are those of the reference implementation, twice (nothing was written into)."""
    after, log = rewritten(lower_onednn, program, *inputs)
    assert log.rewrites and not log.refusals, log.refusals
    assert all(node.target not in DIALECT_ONLY for node in after.calls)
    before = [t.clone() for t in inputs]
    expected, allowed = outputs_of(program, *inputs), within or WITHIN[inputs[0].dtype]
    for _ in range(2):
        error = relative_error(expected, after.run(*inputs))
        assert error <= allowed, f"relative error {error:.3g}, allowed {allowed:g}"
    assert_bitwise_equal(before, inputs)
    return after


# -- every activation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("act", ["", *ACTIVATIONS])
def test_activations_are_fused(act: str, dtype: torch.dtype) -> None:
    """But for elu, which oneDNN's kernels in torch do not know: it follows."""
    after = ["aten::elu"] if act == "elu" else []
    assert kernels(check_lowering(*one_fused_op(nn.Conv2d(4, 6, 3).to(dtype), act, False))) == [CONV, *after]
    assert kernels(check_lowering(*one_fused_op(nn.Linear(5, 8).to(dtype), act, False))) == [LINEAR, *after]


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("act", ["", *ACTIVATIONS])
def test_activations_after_a_sum_are_fused_or_follow(act: str, dtype: torch.dtype) -> None:
    after = [] if act == "" else [overload_name(ACTIVATIONS[act][0])]
    conv = check_lowering(*one_fused_op(nn.Conv2d(4, 6, 3).to(dtype), act, True))
    assert kernels(conv) == [CONV_SUM, *(after if act != "relu" else [])]
    assert kernels(check_lowering(*one_fused_op(nn.Linear(5, 8).to(dtype), act, True))) == [LINEAR_SUM, *after]


# -- every layer --------------------------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "strided, padded, dilated": (lambda: nn.Conv2d(4, 6, 3, 2, 1, 2), (2, 4, 9, 8)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 7)),
    "depthwise": (lambda: nn.Conv2d(16, 16, 3, padding=1, groups=16), (2, 16, 7, 7)),
    "depthwise, doubled": (lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 7, 7)),
    "no bias": (lambda: nn.Conv2d(4, 6, 3, bias=False), (1, 4, 7, 7)),
    "one by one": (lambda: nn.Conv2d(4, 6, 1), (1, 4, 1, 1)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3, padding=1), (1, 4, 4, 5, 6)),
    "conv3d, grouped": (lambda: nn.Conv3d(4, 6, 2, groups=2), (1, 4, 4, 5, 6)),
    "linear of a vector": (lambda: nn.Linear(5, 8), (5,)),
    "linear of a matrix": (lambda: nn.Linear(5, 8), (3, 5)),
    "linear of a batch": (lambda: nn.Linear(5, 8), (2, 3, 5)),
    "linear, no bias": (lambda: nn.Linear(5, 8, bias=False), (2, 3, 5)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_lowered(name: str, dtype: torch.dtype) -> None:
    build, shape = LAYERS[name]
    layer, x = build().to(dtype), torch.randn(shape, dtype=dtype)
    kernel = LINEAR if isinstance(layer, nn.Linear) else CONV
    assert kernels(check_lowering(captured(nn.Sequential(layer).eval(), x), x)) == [kernel]
    fused = CATALOGUE["fuse_conv_relu"](captured(nn.Sequential(layer, nn.ReLU()).eval(), x))
    assert kernels(check_lowering(fused, x)) == [kernel]


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", [name for name in LAYERS if not name.startswith("one")])
def test_layers_with_a_residual_are_lowered(name: str, dtype: torch.dtype) -> None:
    build, shape = LAYERS[name]
    model = Residual(build(), lambda y, r: F.relu(y + r.exp())).to(dtype)
    x = torch.randn(shape, dtype=dtype)
    r = torch.randn_like(model.layer(x)).detach()
    check_lowering(CATALOGUE["fuse_conv_relu"](captured(model.eval(), x, r)), x, r)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_any_layout_of_input_and_weight_will_do(memory_format: torch.memory_format) -> None:
    model = nn.Sequential(nn.Conv2d(8, 6, 3), nn.ReLU()).eval().to(memory_format=memory_format)
    x = torch.randn(2, 8, 7, 7).contiguous(memory_format=memory_format)
    after = check_lowering(CATALOGUE["fuse_conv_relu"](captured(model, x)), x)
    (result,) = outputs_of(after, x)
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_a_weight_used_twice_is_packed_once() -> None:
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x))

    x = torch.randn(1, 4, 6, 6)
    after = check_lowering(captured(Twice().eval(), x), x)
    assert sorted(after.constants) == ["conv.bias", "conv.weight"] and len(after) == 2
    assert len(emit(after).packed.weights) == 1


def test_stubs_are_taken_away() -> None:
    x = torch.randn(1, 4, 6, 6)
    program = CATALOGUE["insert_quant_stubs"](captured(nn.Sequential(nn.Conv2d(4, 4, 3)).eval(), x))
    assert kernels(check_lowering(program, x)) == [CONV]


# -- the residual's memory ----------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """`function(layer(x), r)`."""

    def __init__(self, layer: nn.Module, function: Callable[..., Tensor]):
        super().__init__()
        self.layer, self.function = layer, function

    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        return self.function(self.layer(x), r)


class WithConstant(Residual):
    def __init__(self, layer: nn.Module, function: Callable[..., Tensor]):
        super().__init__(layer, function)
        self.register_buffer("c", torch.randn(2, 6, 8, 8))

    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        return self.function(self.layer(x), self.c) + r


def _read_later(y: Tensor, r: Tensor) -> Tensor:
    r = r.exp()
    return F.relu(y + r) * r


def _viewed(y: Tensor, r: Tensor) -> Tensor:
    r = r.exp()
    return F.relu(y + r.reshape(2, 6, 8, 8)) * r


def _view_read_later(y: Tensor, r: Tensor) -> Tensor:
    r = r.exp()
    part = r[:, 1:3]
    return F.relu(y + r) + part.sum()


def _other_chunk_read_later(y: Tensor, r: Tensor) -> Tensor:
    a, b = torch.cat([r, r.neg()], 1).exp().chunk(2, 1)
    return F.relu(y + a) * b


def _also_an_output(y: Tensor, r: Tensor) -> Tensor:
    r = r.exp()
    return F.relu(y + r), r


def residual_program(function: Callable, dtype: torch.dtype, kind: type[Residual] = Residual):
    model = kind(nn.Conv2d(4, 6, 3, padding=1), function).to(dtype).eval()
    x, r = torch.randn(2, 4, 8, 8, dtype=dtype), torch.randn(2, 6, 8, 8, dtype=dtype)
    program, log = rewritten(CATALOGUE["fuse_conv_relu"], captured(model, x, r), x, r)
    assert log.rewrites
    return program, x, r


KEPT: dict[str, tuple[Callable, type[Residual]]] = {
    "an input": (lambda y, r: F.relu(y + r), Residual),
    "a view of an input": (lambda y, r: F.relu(y + r.reshape(2, 6, 8, 8)), Residual),
    "a transposed view of an input": (lambda y, r: F.relu(y + r.transpose(2, 3)), Residual),
    "read later": (_read_later, Residual),
    "a view, its source read later": (_viewed, Residual),
    "a part of it read later": (_view_read_later, Residual),
    "a chunk, another one read later": (_other_chunk_read_later, Residual),
    "an output": (_also_an_output, Residual),
    "a constant": (lambda y, c: F.relu(y + c), WithConstant),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", KEPT)
def test_a_residual_that_is_needed_is_kept(case: str, dtype: torch.dtype) -> None:
    function, kind = KEPT[case]
    after = check_lowering(*residual_program(function, dtype, kind))
    assert CONV_SUM in kernels(after) and CONV_SUM_IN_PLACE not in kernels(after)


def _expanded(y: Tensor, r: Tensor) -> Tensor:
    return F.relu(y + r[:1, :, :1, :1].exp().expand(2, 6, 8, 8))


REUSED: dict[str, Callable] = {
    "fresh": lambda y, r: F.relu(y + r.exp()),
    "no activation": lambda y, r: y + r.exp(),
    "activation outside the kernel": lambda y, r: F.silu(y + r.exp()),
    "channels last": lambda y, r: F.relu(y + r.exp().contiguous(memory_format=torch.channels_last)),
    "transposed": lambda y, r: F.relu(y + r.exp().transpose(2, 3)),
    "a slice": lambda y, r: F.relu(y + torch.cat([r, r], 1).exp()[:, 3:9]),
    "expanded": _expanded,  # many elements at one address: adding into that memory would be an error
    "read before": lambda y, r: (lambda e: F.relu(y + e))(r.exp()),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", REUSED)
def test_the_memory_of_a_residual_that_dies_is_reused(case: str, dtype: torch.dtype) -> None:
    """Whatever its layout is: the kernel wants channels last, and the residual is brought there first."""
    after = check_lowering(*residual_program(REUSED[case], dtype))
    assert CONV_SUM_IN_PLACE in kernels(after)


def test_a_residual_that_the_convolution_reads_too_is_kept() -> None:
    class Same(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = x.exp()
            return F.relu(self.conv(y) + y)

    x = torch.randn(1, 4, 6, 6)
    after = check_lowering(CATALOGUE["fuse_conv_relu"](captured(Same().eval(), x)), x)
    assert kernels(after)[-1] == CONV_SUM


def test_a_chain_of_blocks_reuses_memory_where_it_dies() -> None:
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            x = self.convs[0](x)
            for conv in self.convs[1:]:
                x = F.relu(conv(F.relu(x)) + x)
            return x

    x = torch.randn(1, 4, 6, 6)
    after = check_lowering(CATALOGUE["fuse_conv_relu"](captured(Blocks().eval(), x)), x)
    assert kernels(after).count(CONV_SUM_IN_PLACE) == 3


# -- what is declined ---------------------------------------------------------------------------------------------------


class WeightAtRunTime(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], act: bool):
        super().__init__()
        self.function, self.act = function, act

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        y = self.function(x, w)
        return F.relu(y) if self.act else y


NOT_CONSTANT = "the weight is not a constant, so it cannot be packed ahead of time"
EMPTY = "an operand has no elements"
RANK = "oneDNN's packed convolution takes batched 2-d and 3-d inputs"


def dtypes(dtype: torch.dtype) -> str:
    return f"oneDNN's kernels here take float32 and bfloat16, not {dtype} with a weight of {dtype}"


DECLINED: dict[str, tuple[nn.Module, tuple[Tensor, ...], str]] = {
    "empty batch": (nn.Conv2d(4, 6, 3), (torch.randn(0, 4, 6, 6),), EMPTY),
    "empty batch, linear": (nn.Linear(4, 6), (torch.randn(0, 4),), EMPTY),
    "float16": (nn.Conv2d(4, 6, 3).half(), (torch.randn(1, 4, 6, 6).half(),), dtypes(torch.float16)),
    "float64": (nn.Conv2d(4, 6, 3).double(), (torch.randn(1, 4, 6, 6).double(),), dtypes(torch.float64)),
    "float64, linear": (nn.Linear(4, 6).double(), (torch.randn(1, 4).double(),), dtypes(torch.float64)),
    "weight at run time": (WeightAtRunTime(F.conv2d, False), (torch.randn(1, 4, 6, 6), torch.randn(6, 4, 3, 3)), NOT_CONSTANT),
    "weight at run time, fused": (
        WeightAtRunTime(F.conv2d, True), (torch.randn(1, 4, 6, 6), torch.randn(6, 4, 3, 3)), NOT_CONSTANT,
    ),
    "weight at run time, linear": (WeightAtRunTime(F.linear, False), (torch.randn(3, 4), torch.randn(6, 4)), NOT_CONSTANT),
    "weight at run time, linear, fused": (
        WeightAtRunTime(F.linear, True), (torch.randn(3, 4), torch.randn(6, 4)), NOT_CONSTANT,
    ),
    "conv1d, fused": (nn.Sequential(nn.Conv1d(4, 6, 3), nn.ReLU()), (torch.randn(1, 4, 9),), RANK),
}  # fmt: skip


@pytest.mark.parametrize("case", DECLINED)
def test_it_declines(case: str) -> None:
    model, inputs, reason = DECLINED[case]
    program = captured(model.eval(), *inputs)
    fused = CATALOGUE["fuse_conv_relu"](program)
    after, log = rewritten(lower_onednn, fused, *inputs)
    assert [refused.reason for refused in log.refusals] == [reason]
    assert ops(after) == ops(program), "what oneDNN cannot take must come out in plain ATen"
    assert_bitwise_equal(outputs_of(program, *inputs), outputs_of(after, *inputs))


def test_an_unbatched_conv_is_declined() -> None:
    model, x = nn.Conv2d(4, 6, 3).eval(), torch.randn(4, 6, 6)
    program = captured(model, x, frontend="export")
    after, log = rewritten(lower_onednn, program, x)
    assert after is program and [refused.reason for refused in log.refusals] == [RANK]


# -- sites and teeth ----------------------------------------------------------------------------------------------------


def test_each_site_can_be_skipped() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 4)).eval(), torch.randn(1, 3, 8, 8)
    assert_sites_can_be_skipped(lower_onednn, lambda: captured(model, x), x)


def test_the_wrong_activation_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(source.ONEDNN_NAME, "silu", "relu")
    monkeypatch.setitem(source.ALGORITHM, "gelu_tanh", "none")
    for act in ("silu", "gelu_tanh"):
        with pytest.raises(AssertionError, match="relative error"):
            check_lowering(*one_fused_op(nn.Conv2d(4, 6, 3), act, False))


def test_a_lost_bias_or_residual_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = source.Layer.of
    for lost in ("b", "residual"):
        monkeypatch.setattr(source.Layer, "of", lambda call, lost=lost: replace(right(call), **{lost: None}))
        with pytest.raises(AssertionError, match="relative error"):
            check_lowering(*one_fused_op(nn.Conv2d(4, 6, 3), "relu", True))


@pytest.mark.parametrize("case", ["an input", "read later", "an output"])
def test_writing_into_a_residual_that_is_needed_is_noticed(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the copy into channels last, which hides the write: channels-last residuals have none."""
    monkeypatch.setattr("ir_tools.rewrite.rule.Value.dies_at", lambda residual, user: True)
    function, kind = KEPT[case]
    program, x, r = residual_program(function, torch.float32, kind)
    r = r.contiguous(memory_format=torch.channels_last)
    with pytest.raises(AssertionError):
        check_lowering(program, x, r)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_residual_that_is_read_again_behind_a_grouped_convolution(groups: int, dtype: torch.dtype) -> None:
    """The kernel adds by itself there, and has no sum with relu in bfloat16."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=groups)

        def forward(self, x):
            return torch.relu(self.conv(x) + x) * x

    model, x = Block().to(dtype).eval(), torch.randn(2, 4, 4, 4, dtype=dtype)
    program = CATALOGUE["fuse_conv_relu"](captured(model, x))
    after = CATALOGUE["lower_onednn"].with_options(variant="fused")(program)
    assert_numbers_agree(model, after, x, within=WITHIN[dtype])
