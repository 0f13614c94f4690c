"""Facts that join: what is true of a value that is one thing or another; unknown stays unknown."""

from __future__ import annotations

import pytest
import torch

from ir_tools.ir.facts import NOTHING, Elements, compute_fact, fresh, holds_always, join, new_mode, size, unknown_number

aten = torch.ops.aten


def fake(mode, *shape, **options):
    with mode:
        return torch.empty(shape, **options)


def test_joining_what_agrees_gives_the_very_first():
    mode = new_mode()
    one = fake(mode, 2, 3)
    assert join(mode, one, fake(mode, 2, 3)) is one
    assert join(mode, one, NOTHING) is one and join(mode, NOTHING, one) is one


def test_sizes_that_differ_become_symbols_and_the_others_stay():
    mode, free = new_mode(), set()
    joined = join(mode, fake(mode, 2, 3), fake(mode, 5, 3), free)
    assert isinstance(joined.shape[0], torch.SymInt) and joined.shape[1] == 3 and free == {size(joined.shape[0])}
    assert join(mode, joined, fake(mode, 9, 3), free) is joined, "a free size stands for any"


@pytest.mark.parametrize("other", [{"dtype": torch.float16}, {"device": "meta"}])
def test_what_differs_in_more_than_sizes_is_unknown(other):
    mode = new_mode()
    assert join(mode, fake(mode, 2, 3), fake(mode, 2, 3, **other)) is None
    assert join(mode, fake(mode, 2, 3), fake(mode, 2)) is None and join(mode, None, fake(mode, 2)) is None


def test_where_one_is_not_contiguous_neither_is_the_join():
    mode = new_mode()
    joined = join(mode, fake(mode, 2, 3), fake(mode, 3, 2).t())
    assert joined.shape == (2, 3) and not joined.is_contiguous()


def test_fresh_renews_the_free_symbols_only():
    mode, free = new_mode(), set()
    joined = join(mode, fake(mode, 2, 3), fake(mode, 5, 3), free)
    again = fresh(mode, joined, free)
    assert size(again.shape[0]) != size(joined.shape[0]) and again.shape[1] == 3
    assert fresh(mode, joined, set()) is joined and fresh(mode, None, free) is None


def test_a_container_knows_what_is_true_of_every_tensor_in_it():
    mode = new_mode()
    elements, before = Elements(mode, []), Elements.widened
    assert elements.known is NOTHING
    elements.add(fake(mode, 2, 3))
    elements.add(fake(mode, 2, 3))
    assert Elements.widened == before  # nobody had read what was in it
    assert elements.read().shape == (2, 3)
    assert compute_fact(mode, aten.append.t, (elements, fake(mode, 4, 3)), {}) is elements
    assert isinstance(elements.known.shape[0], torch.SymInt) and elements.known.shape[1] == 3
    assert Elements.widened == before + 1
    elements.add(fake(mode, 1))
    assert elements.known is None and Elements.widened == before + 2


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


def test_conditions_on_symbols_hold_always_never_or_it_depends():
    mode = new_mode()
    n = unknown_number(mode, "int")
    assert holds_always(n == n) is True and holds_always(n + 1 == n) is False
    assert holds_always(n > 3) is None and holds_always(unknown_number(mode, "bool")) is None
    assert holds_always(True) is True and holds_always(0) is False and holds_always("text") is None


def test_a_comparison_of_two_conditions_of_the_run_is_a_new_unknown():
    """torch fails on a sympy equality of equalities."""
    mode = new_mode()
    one, other = (unknown_number(mode, "int") > 0 for _ in range(2))
    found = compute_fact(mode, aten.ne.bool, (one, other), {})
    assert isinstance(found, torch.SymBool) and holds_always(found) is None
