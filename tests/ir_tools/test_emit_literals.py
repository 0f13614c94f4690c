"""Literals in emitted text come back as the same values of the same types, also from a file."""

import math

import pytest
import torch

from ir_tools.emit.literals import string_literal
from ir_tools.emit.package import round_trip
from ir_tools.emit.to_torchscript import emit
from ir_tools.emit.torch_jit import define, new_box, script_tree
from ir_tools.errors import EmitError
from tests.ir_tools.emitting import assert_same, aten, build, mkldnn, unary

FLOATS = [0.1, -0.0, 1e-5, 5e-324, 1.7976931348623157e308, 1e22, 65504.0, 1e9, 1e10, -1e10, 2.0**53, 1e16, 1e17]


@pytest.mark.parametrize("value", [*FLOATS, math.inf, -math.inf, math.nan])
def test_floats_come_back_exactly(value):
    x = torch.zeros(2, dtype=torch.float64)
    program = build({"x": x}, lambda d, x: d.call(aten.full.default, [1], value, dtype=torch.float64))
    assert_same(program, x)
    got = round_trip(emit(program))(x)
    assert math.copysign(1, got.item()) == math.copysign(1, value) or math.isnan(value)


@pytest.mark.parametrize("value", [1e9, 1e10, 1e16])
def test_a_float_that_decides_the_dtype_stays_a_float(value):
    x = torch.zeros(1)
    assert_same(build({"x": x}, lambda d, x: d.call(aten.full.default, [1], value)), x)


def test_a_float_list_keeps_floats_that_torch_would_save_as_ints():
    x = torch.randn(1, 1, 2, 2)
    program = build({"x": x}, lambda d, x: d.call(aten.upsample_nearest2d.vec, x, None, [2.0, 1.0]))
    assert_same(program, x)
    clamped = build({"x": x}, lambda d, x: d.call(aten.hardtanh.default, x, -1e10, 1e16))
    assert_same(clamped, x)


@pytest.mark.parametrize("value", [0, -5, 2**63 - 1, -(2**63)])
def test_ints(value):
    x = torch.arange(3)
    assert_same(build({"x": x}, lambda d, x: d.call(aten.eq.Scalar, x, value)), x)
    assert_same(build({"x": x}, lambda d, x: d.call(aten.full.default, [1], value)), x)


def test_an_int_for_a_float_argument_and_an_int_beyond_64_bits():
    x = torch.randn(3)
    assert_same(build({"x": x}, lambda d, x: d.call(aten.leaky_relu.default, x, 1)), x)
    program = build({"x": x}, lambda d, x: d.call(aten.leaky_relu.default, x, 1))
    next(n for n in program.calls).args = (program.placeholders[0], 2**64)
    with pytest.raises(EmitError, match=r"leaky_relu.*18446744073709551616 does not fit"):
        emit(program)


@pytest.mark.parametrize(
    "op, args, kwargs",
    [
        (aten.to.dtype, (torch.bfloat16,), {}),
        (aten.to.device, (torch.device("cpu"), torch.float64), {}),
        (aten.clone.default, (), {"memory_format": torch.contiguous_format}),
        (
            aten.full_like.default,
            (2.5,),
            {"dtype": torch.float16, "layout": torch.strided, "device": torch.device("cpu")},
        ),
        (aten.gelu.default, (), {"approximate": "tanh"}),
        (aten.sum.dim_IntList, ([], True), {"dtype": None}),
        (aten.sum.default, (), {"dtype": torch.float64}),
        (aten.clamp.default, (None, 0.5), {}),
        (aten.mul.Scalar, (1 + 2j,), {}),
        (aten.var.correction, ([1],), {"correction": 0, "keepdim": True}),
        (aten.arange.start_step, (), {}),
        (aten.norm.ScalarOpt_dim, (2, [1]), {}),
        (aten.any.dim, (1, True), {}),
    ],
)
def test_other_literals(op, args, kwargs):
    x = torch.randn(2, 3)
    if op is aten.arange.start_step:
        program = build({"x": x}, lambda d, x: d.call(op, 0, 7, 2))
    else:
        program = unary(op, *args, **kwargs)
    assert_same(program, x)


@pytest.mark.parametrize("text", ["", "it's", 'a "b"', "a\nb\t\\", "é☃ {}", "\x01\x7f", "#"])
def test_strings(text):
    # No plain op takes any string at all, so the literal itself is tried.
    scripted = script_tree(new_box("Model"))
    define(scripted, f"def forward(self) -> str:\n    return {string_literal(text)}\n")
    assert scripted() == text and round_trip(scripted)() == text


def test_a_string_that_a_file_cannot_hold_is_refused():
    with pytest.raises(EmitError, match="carriage return"):
        string_literal("a\rb")


def test_lists_are_typed_by_the_schema():
    x, index = torch.randn(2, 3, 4), torch.tensor([1, 0])
    assert_same(build({"x": x, "i": index}, lambda d, x, i: d.call(aten.index.Tensor, x, [None, i])), x, index)
    assert_same(build({"x": x}, lambda d, x: d.call(aten.cat.default, [x, x], 1)), x)
    assert_same(build({"x": x}, lambda d, x: d.call(aten.fft_fftn.default, x, None, [0], None)), x)
    image, weight = torch.randn(1, 3, 5, 5), torch.randn(4, 3, 3, 3)

    def conv(d, x):
        w = d.constant("w", weight)
        same = ([1, 1], [1, 1], [1, 1], 1)
        a = d.call(mkldnn._convolution_pointwise.default, x, w, None, *same, "relu", [], None)
        b = d.call(mkldnn._convolution_pointwise.default, x, w, None, *same, "hardtanh", [0.0, 6.0], "")
        return a, b

    assert_same(build({"x": image}, conv), image)
