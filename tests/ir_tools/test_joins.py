"""Facts that join: what is true of a value that is one thing or another."""

from __future__ import annotations

import pytest
import torch

from ir_tools.ir.facts import ABSENT, UNKNOWN, TensorFact
from ir_tools.ir.inference_mode import InferenceMode
from ir_tools.ir.joins import Elements, fresh, join
from ir_tools.ir.shape_inference import compute_fact

aten = torch.ops.aten


def known(*shape, **options):
    return TensorFact.of(torch.empty(shape, **options))


def test_joining_what_agrees_gives_the_very_first():
    mode = InferenceMode()
    one = known(2, 3)
    assert join(mode, one, known(2, 3)) is one
    assert join(mode, one, ABSENT) is one and join(mode, ABSENT, one) is one


def test_sizes_that_differ_become_symbols_and_the_others_stay():
    mode, free = InferenceMode(), set()
    joined = join(mode, known(2, 3), known(5, 3), free)
    assert joined.shape[0].is_Symbol and joined.shape[1] == 3 and free == {joined.shape[0]}
    assert join(mode, joined, known(9, 3), free) is joined, "a free size stands for any"


@pytest.mark.parametrize("other", [{"dtype": torch.float16}, {"device": "meta"}])
def test_what_differs_in_more_than_sizes_is_unknown(other):
    mode = InferenceMode()
    assert join(mode, known(2, 3), known(2, 3, **other)) is UNKNOWN
    assert join(mode, known(2, 3), known(2)) is UNKNOWN and join(mode, UNKNOWN, known(2)) is UNKNOWN


def test_where_layouts_differ_the_strides_of_the_join_are_not_known():
    mode = InferenceMode()
    joined = join(mode, known(2, 3), TensorFact.of(torch.empty(3, 2).t()))
    assert joined.shape == (2, 3) and joined.strides is None
    assert join(mode, joined, known(2, 3)) is joined


def test_fresh_renews_the_free_symbols_only():
    mode, free = InferenceMode(), set()
    joined = join(mode, known(2, 3), known(5, 3), free)
    again = fresh(mode, joined, free)
    assert again.shape[0] != joined.shape[0] and again.shape[1] == 3
    assert fresh(mode, joined, set()) is joined and fresh(mode, UNKNOWN, free) is UNKNOWN


def test_a_container_knows_what_is_true_of_every_tensor_in_it():
    mode = InferenceMode()
    elements, before = Elements(mode, []), Elements.widened
    assert elements.known is ABSENT
    elements.add(known(2, 3))
    elements.add(known(2, 3))
    assert Elements.widened == before  # no element was read before
    assert elements.read().shape == (2, 3)
    assert compute_fact(mode, aten.append.t, (elements, known(4, 3)), {}) is elements
    assert elements.known.shape[0].is_Symbol and elements.known.shape[1] == 3
    assert Elements.widened == before + 1
    elements.add(known(1))
    assert elements.known is UNKNOWN and Elements.widened == before + 2
