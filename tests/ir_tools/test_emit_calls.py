"""Emitted calls: TorchScript reads the overload that is meant, or emission is refused."""

import pytest
import torch

from ir_tools.emit import statements
from ir_tools.emit.to_torchscript import emit
from ir_tools.errors import EmitError
from tests.ir_tools.emitting import assert_same, aten, build, torchscript_source, unary


def test_a_bare_none_that_two_overloads_could_take_is_typed():
    x = torch.randn(1, 1, 3, 3)
    program = build({"x": x}, lambda d, x: d.call(aten.upsample_bilinear2d.vec, x, [4, 4], False, None))
    assert "annotate(Optional[List[float]], None)" in torchscript_source(program)
    assert_same(program, x)


def test_a_bool_given_as_a_number_keeps_the_dtype_or_is_refused():
    x = torch.tensor([True, False])
    assert_same(build({"x": x}, lambda d, x: d.call(aten.full.default, [2], True)), x)
    assert_same(build({"x": x}, lambda d, x: d.call(aten.masked_fill.Scalar, x, x, False)), x)
    with pytest.raises(EmitError, match=r"add.*a bool given as a number.*int64, not torch.bool"):
        emit(build({"x": x}, lambda d, x: d.call(aten.add.Scalar, x, True)))


def test_a_call_that_resolves_to_another_overload_is_refused(monkeypatch):
    program = unary(aten.mean.dim, [1], True)
    emit(program)
    write = statements.call_text

    def sabotaged(node, target, variables):
        return write(node, target, variables).replace("mean(x, [1], True, ", "mean(x, ")

    monkeypatch.setattr(statements, "call_text", sabotaged)
    with pytest.raises(EmitError) as error:
        emit(program)
    message = str(error.value)
    assert "reads mean " in message and "aten::mean.dim(" in message and "read:  aten::mean(" in message


def test_a_call_too_many_and_a_call_too_few_are_refused(monkeypatch):
    program = unary(aten.relu.default)
    write = statements.call_text
    monkeypatch.setattr(statements, "call_text", lambda n, t, v: f"torch.neg({write(n, t, v)})")
    with pytest.raises(EmitError, match="a call that the Program does not have: aten::neg"):
        emit(program)
    monkeypatch.setattr(statements, "call_text", lambda n, t, v: v.read(n.args[0]))
    with pytest.raises(EmitError, match="the call is gone"):
        emit(program)


def test_text_that_does_not_compile_is_an_emit_error(monkeypatch):
    monkeypatch.setattr(statements, "call_text", lambda n, t, v: "torch.no_such_op(x)")
    with pytest.raises(EmitError, match=r"does not accept the text of _chunk_0:[\s\S]*no_such_op"):
        emit(unary(aten.relu.default))
