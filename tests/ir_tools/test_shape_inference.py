"""Shape inference where torch's fake kernels have no answer of their own; unknown stays unknown."""

from __future__ import annotations

import torch

from ir_tools.ir.facts import ABSENT, UNKNOWN, ScalarFact, TensorFact, holds_always
from ir_tools.ir.inference_mode import InferenceMode
from ir_tools.ir.joins import Elements
from ir_tools.ir.shape_inference import compute_fact

aten = torch.ops.aten


def known(*shape, **options):
    return TensorFact.of(torch.empty(shape, **options))


def test_cat_and_stack_of_a_list_of_unknown_length_grow_where_they_join():
    mode = InferenceMode()
    elements = Elements(mode, [known(2, 3)])
    cat, stack = (compute_fact(mode, op, (elements, 1), {}) for op in (aten.cat.default, aten.stack.default))
    assert cat.shape[0] == 2 and cat.shape[1].is_Symbol
    assert (stack.shape[0], stack.shape[2]) == (2, 3) and stack.shape[1].is_Symbol


def test_what_is_computed_from_the_unknown_is_unknown_and_from_nothing_nothing():
    mode = InferenceMode()
    node = torch.fx.Graph().placeholder("x")  # without a fact
    assert compute_fact(mode, aten.relu.default, (node,), {}) is UNKNOWN
    assert compute_fact(mode, aten.relu.default, (ABSENT,), {}) is ABSENT


def test_a_comparison_of_two_runtime_conditions_is_a_new_unknown():
    """torch fails on a sympy equality of equalities."""
    mode = InferenceMode()
    one, other = (ScalarFact.of(mode.unknown_number("int").symbol > 0) for _ in range(2))
    found = compute_fact(mode, aten.ne.bool, (one, other), {})
    assert found.kind is bool and not found.is_known and holds_always(found) is None
