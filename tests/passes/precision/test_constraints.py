"""Analysis apart from policy: hazards know no options, and a constraint is a function, whoever asks first."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ir_tools.ir.dialect import short_name
from passes.analysis.value_ranges import ValueRanges
from passes.precision import reasons
from passes.precision.constraints import Policy, PrecisionOptions, constraint_of
from passes.precision.hazards import Hazards
from passes.testing import random_models
from tests.check import captured, observe, outputs_of, relative_error
from tests.passes.precision.half_casts import HALVES, LEVELS, Model, X, cast_half, check_cast


@given(st.data())
def test_constraints_asked_in_any_order_and_twice_are_the_same(data: st.DataObject) -> None:
    drawn = data.draw(random_models(dtypes=(torch.float32,)))
    model, inputs = drawn.module(), drawn.inputs()
    program = captured(model, *inputs)
    options = PrecisionOptions(data.draw(st.sampled_from([*HALVES.values()])), data.draw(st.sampled_from([*LEVELS])))
    torch.manual_seed(0)
    observed = observe(program, [inputs]) if data.draw(st.booleans()) else {}
    policy = Policy.of(program, options, observed)
    hazards, natural = policy.hazards, policy.natural
    order = data.draw(st.permutations(program.calls))
    asked = {node: constraint_of(node, hazards, options, natural) for node in (*order, *reversed(order))}
    assert asked == policy.constraints
    again = Policy.of(program, options, observed)
    assert again.constraints == policy.constraints and again.natural == natural
    assert again.hazards.by_value == hazards.by_value


def test_the_analysis_is_frozen() -> None:
    policy = Policy.of(captured(nn.Linear(4, 4).eval(), X), PrecisionOptions(torch.bfloat16, "O2"))
    for record, name in ((policy, "natural"), (policy.hazards, "by_value"), (policy.hazards.reading, "unfit")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, name, {})
    for mapping in (policy.constraints, policy.natural, policy.hazards.by_value, policy.hazards.reading.unfit):
        with pytest.raises(TypeError):
            mapping[None] = None  # type: ignore[index]


KEEP = torch.tensor([[True, True, True, True], [False, True, False, False], [False] * 4])


def masked(m: Model, x: Tensor) -> Tensor:
    return m.l(m.l(x).masked_fill(KEEP, -1e9)).relu()


@pytest.mark.parametrize("how", ["skip", "keep_float", "overrides"])
def test_hazards_know_no_options(how: str) -> None:
    """A mask whose op is kept in float all the same holds -1e9, and is clamped where it is cast."""
    program = captured(Model(lambda m, x: (m.l(x).masked_fill(KEEP, -1e9)) @ m.l(x).t() * 1e-9, l=nn.Linear(4, 4)).eval(), X)
    given = {"skip": {}, "keep_float": {"keep_float": ["masked_fill"]}, "overrides": {"overrides": {"masked_fill": "float"}}}
    skip = {"cast_half@masked_fill"} if how == "skip" else set()
    after = cast_half.with_options(dtype="float16", **given[how])(program, skip=skip)
    names = [short_name(node.target) for node in after.calls]
    assert names[names.index("masked_fill") + 1] == "clamp"
    (hazard,) = (
        Hazards.of(ValueRanges.of(program), torch.float16)[node]
        for node in program.calls
        if short_name(node.target) == "masked_fill"
    )
    assert hazard.wide and hazard.written == reasons.IS_WIDE


PARTS = {
    "chunk": lambda y: y.chunk(2, -1),
    "split": lambda y: y.split([2, 2], -1),
    "unbind": lambda y: y.reshape(3, 2, 2).unbind(1),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("case", PARTS)
def test_a_part_of_a_mask_is_clamped_as_the_whole(case: str, level: str) -> None:
    """A row that is masked as a whole must not become NaN."""

    def function(m: Model, x: Tensor) -> Tensor:
        first, second = PARTS[case](m.l(x).masked_fill(KEEP, -1e9))
        return first.softmax(-1) @ m.k(second.softmax(-1)).t()

    check_cast(Model(function, l=nn.Linear(4, 4), k=nn.Linear(2, 2)), X, dtype="float16", level=level)


@pytest.mark.parametrize("level", LEVELS)
def test_a_part_of_what_an_epsilon_guards_stays_guarded(level: str) -> None:
    def function(m: Model, x: Tensor) -> Tensor:
        y = m.l(x)
        first, second = (y.abs() + 1e-12).chunk(2, -1)
        return y[:, :2] / first + y[:, 2:] / second

    x = torch.cat([torch.zeros(1, 4), X])
    model = Model(function, l=nn.Linear(4, 4, bias=False)).eval()
    program = captured(model, x)
    after = cast_half.with_options(dtype="float16", level=level)(program)
    assert relative_error(outputs_of(program, x), outputs_of(after, x)) <= 5e-3
