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
from ir_tools.ir.prepack import check_prepack, is_prepack, mark_prepacks, prepack_conv, prepack_linear
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
    w, s = torch.randn(3, 3), torch.randn(3, 1)

    def body(d, x):
        for _ in range(times):
            packed = d.call(scale, d.constant("w", w), d.constant("s", s))
            assert mark_prepacks([packed], [scale]) is None
            x = d.call(aten.matmul.default, x, packed)
        return x

    return build({"x": torch.randn(2, 3)}, body), w, s


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
            check_prepack(op)


def test_the_same_op_of_the_model_stays_ordinary() -> None:
    """Marked in one of two, `mul` of two constants is folded elsewhere; common subexpressions keep the two apart."""
    w, s = torch.randn(3, 3), torch.randn(3, 1)

    def body(d, x):
        own, packed = (d.call(scale, d.constant("w", w), d.constant("s", s)) for _ in range(2))
        mark_prepacks([packed], [scale])
        return d.call(aten.matmul.default, d.call(aten.matmul.default, x, own), packed)

    program = build({"x": torch.randn(2, 3)}, body)
    merged, _ = rewritten(CATALOGUE["eliminate_common_subexpressions"], program, torch.randn(2, 3))
    assert [is_prepack(n) for n in merged.calls] == [False, True, False, False]
    folded, _ = rewritten(CATALOGUE["fold_constants"], merged.copy(), torch.randn(2, 3))
    assert [short_name(n.target) for n in folded.calls] == ["mul", "matmul", "matmul"] and is_prepack(folded.calls[0])


@pytest.mark.parametrize("inner_is_read", [False, True])
def test_a_prepack_op_of_another_is_hoisted_with_it(inner_is_read: bool) -> None:
    w, s, x = torch.randn(3, 3), torch.randn(3, 1), torch.randn(2, 3)

    def body(d, x):
        inner = d.call(scale, d.constant("w", w), d.constant("s", s))
        outer = d.call(aten.clone.default, inner, memory_format=None)
        assert mark_prepacks([inner, outer], [scale, aten.clone.default]) is None
        y = d.call(aten.matmul.default, x, outer)
        return d.call(aten.matmul.default, y, inner) if inner_is_read else y

    program = build({"x": x}, body)
    loaded = round_trip(round_trip(emit(program)))
    assert len(program) == 1 + inner_is_read and len(loaded.prepared.results) == 1 + inner_is_read
    assert "mul(" not in loaded._chunk_0.code.replace("matmul(", "") and "clone" not in loaded._chunk_0.code
    assert torch.equal(loaded(x), program(x)) and torch.equal(program.graph_module()(x)[0], program(x))
    assert "mul(" not in program.graph_module().code.replace("matmul(", "")


@needs_onednn
def test_what_is_made_from_a_packed_weight_keeps_the_plain_one_beside_it() -> None:
    """The inner weight is packed from a constant, the outer ones from a packed weight, or from what another op prepares."""
    w, x = torch.randn(4, 3), torch.randn(2, 3)

    def body(d, x):
        plain = d.constant("w", w)
        doubled = d.call(aten.mul.Tensor, plain, 2.0)
        packed, other = d.call(prepack_linear, plain, 2), d.call(prepack_linear, doubled, 2)
        dense = d.call(aten.to_dense.default, packed, None)
        assert mark_prepacks([doubled, dense], [aten.mul.Tensor, aten.to_dense.default]) is None
        y = d.call(mkldnn._linear_pointwise.default, x, packed, None, "none", [], "")
        z = d.call(mkldnn._linear_pointwise.default, x, other, None, "none", [], "")
        return d.call(aten.add.Tensor, d.call(aten.add.Tensor, y, z), d.call(aten.linear.default, x, dense, None))

    program = build({"x": x}, body)
    loaded = round_trip(round_trip(emit(program)))
    assert len(loaded.packed.weights) == 1 and len(loaded.prepared.results) == 2
    torch.testing.assert_close(loaded(x), 4 * x @ w.T)


def test_one_that_is_marked_stays_so_in_copies_and_under_other_operands() -> None:
    program, _, _ = scaled()
    draft = Draft.of(program.copy())
    node = draft.program.calls[0]
    with draft.before(node):
        again = draft.again(node, node.args, node.kwargs)
    assert is_prepack(node) and is_prepack(again)
