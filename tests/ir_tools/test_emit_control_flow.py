"""Emitted regions: ifs and loops in the text, on every path what the Program gives."""

import pytest
import torch

from ir_tools.emit import statements
from ir_tools.emit.to_torchscript import emit
from ir_tools.errors import EmitError
from tests.ir_tools import test_regions as by_hand
from tests.ir_tools.emitting import assert_same, aten, build, torchscript_source


def region_program(make):
    """A Program over x, with the tools of test_regions."""
    return build({"x": by_hand.X}, lambda d, x: make(by_hand, d, x))


def assert_same_on_both_paths(program, x, chunk_size=250):
    text = torchscript_source(program, chunk_size)
    for value in (x.abs(), -x.abs()):
        assert_same(program, value, chunk_size=chunk_size)
    return text


@pytest.mark.parametrize("chunk_size", [1, 3, 250])
def test_ifs_and_loops_nested_across_chunk_boundaries(chunk_size):
    def make(r, draft, x):
        def step(inner, number, a, b):
            return [True, b, r.branches(inner, r.is_positive(inner, a), [a], r.doubled, r.negated, [a])[0]]

        y = draft.call(aten.sigmoid.default, x)
        (z,) = r.branches(draft, r.is_positive(draft, x), [y], r.doubled, r.negated, [y])
        a, b = r.loop(draft, 3, [z, draft.call(aten.neg.default, y)], [], step)
        return [draft.call(aten.sub.Tensor, a, b), z]

    text = assert_same_on_both_paths(region_program(make), torch.ones(2, 3), chunk_size)
    assert "for count in range(3)" in text and "else:" in text


def test_a_loop_that_a_condition_ends_is_a_while():
    def make(r, draft, x):
        def step(inner, number, a):
            return [r.is_positive(inner, a), inner.call(aten.sub.Scalar, a, number)]

        return r.loop(draft, 9, [x], [], step)[0]

    assert "while goes_on and count < 9" in assert_same_on_both_paths(region_program(make), torch.ones(2, 3))


def test_a_constant_is_an_operand_of_a_region_and_of_one_in_it():
    """Constant folding puts it there."""

    def make(r, draft, x):
        def outer(inner, a, w):
            return r.branches(inner, r.is_positive(inner, a), [a, w], lambda d, a, w: [d.call(aten.mul.Tensor, a, w)],
                              lambda d, a, w: [w], [a])  # fmt: skip

        w = draft.constant("layer.weight", torch.full((2, 3), 3.0))
        return r.branches(draft, r.is_positive(draft, x), [x, w], outer, lambda d, a, w: [w], [x])[0]

    assert "self.layer.weight" in assert_same_on_both_paths(region_program(make), torch.ones(2, 3))


def test_a_dead_write_in_a_region_that_may_raise_is_not_taken_for_a_misreading():
    def make(r, draft, x):
        def write(inner, a):
            inner.call(aten.add_.Scalar, a, 1)
            return []

        a = draft.call(aten.cos.default, x)
        r.branches(draft, r.is_positive(draft, x), [a], write, lambda d, a: d.call(r.fail, "negative") and [], [])
        return draft.call(aten.neg.default, x)

    program = region_program(make)
    x = torch.ones(2, 3)
    assert_same(program, x)
    with pytest.raises(Exception, match="negative"):
        emit(program)(-x)


def test_a_call_in_a_region_that_is_read_differently_is_refused(monkeypatch):
    program = region_program(lambda r, d, x: r.branches(d, r.is_positive(d, x), [x], r.doubled, r.negated, [x])[0])
    original = statements.call_text

    def misread(node, target, variables):
        return original(node, target, variables).replace("aten.mul(", "aten.add(")

    monkeypatch.setattr(statements, "call_text", misread)
    with pytest.raises(EmitError, match=r"aten::add"):
        emit(program)
