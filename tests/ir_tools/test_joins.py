"""Facts that join: what is true of a value that is one thing or another."""

from __future__ import annotations

import pytest
import torch

from ir_tools.ir.facts import new_mode, size
from ir_tools.ir.joins import NOTHING, Elements, fresh, join
from ir_tools.ir.shape_inference import compute_fact

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
    assert Elements.widened == before  # no element was read before
    assert elements.read().shape == (2, 3)
    assert compute_fact(mode, aten.append.t, (elements, fake(mode, 4, 3)), {}) is elements
    assert isinstance(elements.known.shape[0], torch.SymInt) and elements.known.shape[1] == 3
    assert Elements.widened == before + 1
    elements.add(fake(mode, 1))
    assert elements.known is None and Elements.widened == before + 2
