"""Shape inference where torch's fake kernels have no answer of their own; unknown stays unknown."""

from __future__ import annotations

import torch

from ir_tools.ir.facts import holds_always, new_mode, unknown_number
from ir_tools.ir.joins import NOTHING, Elements
from ir_tools.ir.shape_inference import compute_fact

aten = torch.ops.aten


def fake(mode, *shape, **options):
    with mode:
        return torch.empty(shape, **options)


def test_cat_and_stack_of_a_list_of_unknown_length_grow_where_they_join():
    mode = new_mode()
    elements = Elements(mode, [fake(mode, 2, 3)])
    cat, stack = (compute_fact(mode, op, (elements, 1), {}) for op in (aten.cat.default, aten.stack.default))
    assert cat.shape[0] == 2 and isinstance(cat.shape[1], torch.SymInt)
    assert (stack.shape[0], stack.shape[2]) == (2, 3) and isinstance(stack.shape[1], torch.SymInt)


def test_what_is_computed_from_the_unknown_is_unknown_and_from_nothing_nothing():
    mode = new_mode()
    node = torch.fx.Graph().placeholder("x")  # without a fact
    assert compute_fact(mode, aten.relu.default, (node,), {}) is None
    assert compute_fact(mode, aten.relu.default, (NOTHING,), {}) is NOTHING


def test_a_comparison_of_two_runtime_conditions_is_a_new_unknown():
    """torch fails on a sympy equality of equalities."""
    mode = new_mode()
    one, other = (unknown_number(mode, "int") > 0 for _ in range(2))
    found = compute_fact(mode, aten.ne.bool, (one, other), {})
    assert isinstance(found, torch.SymBool) and holds_always(found) is None
