"""Prepack ops: what a Program holds, that no pass folds them, and what a file does with them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ir_tools.emit.package import round_trip
from ir_tools.emit.to_torchscript import emit
from ir_tools.errors import EmitError, OptionError
from ir_tools.ir import Draft, Program
from ir_tools.ir.dialect import short_name
from ir_tools.ir.facts import fact
from ir_tools.ir.host import set_value_type
from ir_tools.ir.prepack import is_prepack, prepack_conv, prepack_linear, register_prepack
from ir_tools.ir.program import body_of
from ir_tools.ir.regions import region_if
from passes import CATALOGUE
from tests.check import captured, outputs_of, rewritten
from tests.ir_tools.emitting import aten, build, mkldnn

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch is built without oneDNN")

lower = CATALOGUE["lower_onednn"].with_options(variant="fused")
X = torch.randn(2, 3, 6, 6)

scale = aten.mul.Tensor
"""Stands for a prepack op that cannot be undone: two constants, one result."""


class Shared(nn.Module):
    """One weight twice, and read plain as well."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv(self.conv(x)), self.conv.weight + x.mean()


def lowered() -> Program:
    return lower(captured(Shared().eval(), X))


@needs_onednn
def test_a_prepack_op_reads_the_plain_constant_and_counts_for_nothing() -> None:
    program = lowered()
    found = [node for node in program.calls if is_prepack(node)]
    assert [node.target for node in found] == [prepack_conv] * 2 and len(program) == len(program.calls) - 2
    assert fact(found[0]).shape == (3, 3, 3, 3) and fact(found[0]).dtype == torch.float32
    assert sorted(program.constants) == ["conv.bias", "conv.weight"]


@needs_onednn
def test_equal_ones_are_hoisted_once_and_the_constant_that_is_read_plain_stays() -> None:
    program = lowered()
    loaded = round_trip(emit(program))
    assert len(loaded.packed.weights) == 1 and set(loaded.state_dict()) == {"conv.weight", "conv.bias"}
    assert "_reorder" not in loaded.code and "_reorder_convolution_weight" in loaded.packed._pack_0.code
    for got, expected in zip(loaded(X), outputs_of(program, X), strict=True):
        assert torch.equal(got, expected)


@needs_onednn
def test_a_graph_module_holds_what_is_prepacked() -> None:
    program = lowered()
    module = program.graph_module()
    assert "prepack" not in module.code and [t.is_mkldnn for t in module.buffers()].count(True) == 1
    for got, expected in zip(module(X), outputs_of(program, X), strict=True):
        assert torch.equal(got, expected)
    assert len([node for node in program.calls if is_prepack(node)]) == 2  # the Program is left as it was


@needs_onednn
@pytest.mark.parametrize("name", [name for name, p in CATALOGUE.items() if p.target is None])
def test_no_pass_folds_or_breaks_them(name: str) -> None:
    program = lowered()
    after, _ = rewritten(CATALOGUE[name], program, X)
    kept = [node.target for node in after.all_calls if is_prepack(node)]
    assert kept in ([prepack_conv] * 2, [prepack_conv])  # equal ones may become one
    close = dict(atol=0.1, rtol=0.1) if name == "cast_half" else dict(atol=1e-6, rtol=1e-5)
    for got, expected in zip(outputs_of(after, X), outputs_of(program, X), strict=True):
        torch.testing.assert_close(got, expected, **close)
    emit(after)


def test_one_that_is_given_a_runtime_value_is_no_constant_and_has_no_file() -> None:
    program = build({"w": torch.randn(4, 3)}, lambda d, w: d.call(prepack_linear, w, 2))
    assert not is_prepack(program.calls[0]) and len(program) == 1
    with pytest.raises(EmitError, match="still holds torch_passes::prepack_linear"):
        emit(program)


def scaled(times: int = 1) -> tuple[Program, Tensor, Tensor]:
    """x @ (w * s), the product prepacked."""
    register_prepack(scale)
    w, s = torch.randn(3, 3), torch.randn(3, 1)

    def body(d, x):
        for _ in range(times):
            packed = d.call(scale, d.constant("w", w), d.constant("s", s))
            x = d.call(aten.matmul.default, x, packed)
        return x

    return build({"x": torch.randn(2, 3)}, body), w, s


@pytest.fixture
def _scale_is_a_prepack_op(monkeypatch: pytest.MonkeyPatch) -> None:
    from ir_tools.ir import prepack

    monkeypatch.setattr(prepack, "_known", dict(prepack._known))


@pytest.mark.usefixtures("_scale_is_a_prepack_op")
def test_what_cannot_be_undone_is_saved_plain_and_prepared_again() -> None:
    program, w, s = scaled(times=3)
    x = torch.randn(2, 3)
    module = emit(program, chunk_size=1)
    loaded = round_trip(round_trip(module))
    assert [t.shape for t in loaded.prepared.plain] == [w.shape, s.shape] and len(loaded.prepared.results) == 1
    assert torch.equal(loaded.prepared.results[0], w * s) and not loaded.state_dict()
    assert torch.equal(loaded(x), program(x)) and "torch.mul(" not in loaded._chunk_0.code
    assert [short_name(node.target) for node in program.calls if not is_prepack(node)] == ["matmul"] * 3


@needs_onednn
def test_one_that_a_region_is_given_is_read_inside() -> None:
    weight, x = torch.randn(4, 3), torch.randn(2, 3)

    def body(d, x):
        packed = d.call(prepack_linear, d.constant("w", weight), 2)
        sides, result = [], None
        for name, act in (("then_", "relu"), ("else_", "none")):
            inner = Draft.inside(d, name)
            given = inner.operand("x", fact(x), "Tensor"), inner.operand("w", fact(packed), "Tensor")
            result = inner.call(mkldnn._linear_pointwise.default, *given, None, act, [], "")
            inner.output([result])
            sides.append(body_of(inner.program))
        condition = d.call(aten.Bool.Tensor, d.call(aten.gt.Scalar, d.call(aten.sum.default, x), 0))
        set_value_type(condition, "bool")
        (y,) = d.region(region_if, [condition, *sides, [x, packed]], [fact(result)], ["Tensor"])
        return y

    program = build({"x": x}, body)
    loaded = round_trip(emit(program))
    for given in (x.abs(), -x.abs()):
        assert torch.equal(loaded(given), program(given)) and len(loaded.packed.weights) == 1


def test_only_a_pure_op_with_one_new_result_is_a_prepack_op() -> None:
    for op in (aten.add_.Tensor, aten.view.default, aten.split.Tensor):
        with pytest.raises(OptionError, match="a prepack op is pure and gives one new tensor; the schema is aten::"):
            register_prepack(op)
