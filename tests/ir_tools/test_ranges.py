"""Ranges of values: counted right, merged, asked, and which values of a Program have one."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ir_tools.ir.prepack import is_prepack
from ir_tools.verify.ranges import COUNTED_TOGETHER, MOST_WAITING, Observation, Range, range_of
from passes import CATALOGUE
from tests.check import captured, observe

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def by_frexp(values: Tensor) -> Range:
    """The definition, as torch and Python have it."""
    numbers = [abs(x) for x in values.double().flatten().tolist()]
    finite = [x for x in numbers if math.isfinite(x) and x]
    exponents: dict[int, int] = {}
    for x in finite:
        exponents[math.frexp(x)[1]] = exponents.get(math.frexp(x)[1], 0) + 1
    zeros = sum(x == 0 for x in numbers)
    return Range(exponents, max(finite, default=0.0), min(finite, default=math.inf), zeros,
                 not all(map(math.isfinite, numbers)))  # fmt: skip


def every_magnitude(dtype: torch.dtype) -> Tensor:
    """Numbers of all sizes: zero of both signs, subnormals, the least normal, the largest, and in between."""
    info = torch.finfo(dtype)
    numbers = torch.cat([torch.randn(300, dtype=torch.float64) * 2.0**e for e in range(-1090, 1020, 30)]).to(dtype)
    ends = [0.0, -0.0, info.tiny, -info.max, info.smallest_normal, info.eps, 1.0, 2.0, -0.5]
    return torch.cat([numbers[numbers.isfinite()], torch.tensor(ends, dtype=dtype)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_range_is_what_frexp_says(dtype) -> None:
    values = every_magnitude(dtype)
    assert range_of(values) == by_frexp(values)
    exponents = torch.frexp(values[values != 0].double()).exponent
    assert set(range_of(values).exponents) == set(exponents.tolist())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("odd", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_reported_and_not_counted(dtype, odd) -> None:
    values = torch.tensor([1.0, odd, 0.0, -3.0], dtype=dtype)
    assert range_of(values) == Range({1: 1, 2: 1}, 3.0, 1.0, 1, True)
    assert range_of(torch.tensor([odd], dtype=dtype)) == Range(nonfinite=True)
    assert not range_of(values[2:]).nonfinite


@pytest.mark.parametrize("values", [torch.zeros(0), torch.zeros(2, 0, 3)])
def test_no_elements(values) -> None:
    assert range_of(values) == Range()
    assert Range().largest == 0.0 and Range().smallest == math.inf


def test_zeros_alone() -> None:
    assert range_of(torch.zeros(3, 4)) == Range(zeros=12)


def test_views_and_numbers_alone_are_counted_as_they_are_seen() -> None:
    base = torch.arange(1.0, 13.0).reshape(3, 4)
    assert range_of(base.t()[1:, ::2]) == by_frexp(base.t()[1:, ::2])
    assert range_of(torch.tensor(3.0)) == Range({2: 1}, 3.0, 3.0)
    assert range_of(torch.tensor(2.0).expand(5, 2)) == Range({2: 10}, 2.0, 2.0)


floats = st.lists(st.floats(width=32), max_size=30)


@given(floats, floats)
def test_sums_of_ranges_are_ranges_of_both(one: list[float], other: list[float]) -> None:
    a, b = (torch.tensor(numbers, dtype=torch.float32) for numbers in (one, other))
    assert range_of(a) + range_of(b) == range_of(torch.cat([a, b])) == by_frexp(torch.cat([a, b]))


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=30), st.integers(-150, 130))
def test_what_lies_below_a_power_of_two_is_counted_exactly(numbers: list[float], power: int) -> None:
    values = torch.tensor(numbers, dtype=torch.float64)
    below = (values != 0) & (values.abs() < 2.0**power)
    assert sum(count for exponent, count in range_of(values).exponents.items() if exponent <= power) == below.sum().item()


# -- of a Program -------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)

    def forward(self, x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        first, second = (self.linear(x) * 1000).chunk(2, 1)
        return first.relu(), (second > 0).long() + n


def test_every_float_value_of_the_graph_has_a_range() -> None:
    model, x, n = Net().eval(), torch.randn(3, 4), torch.arange(3)
    program = captured(model, x, n)
    found = observe(program, [[x, n]])
    seen = {node.name: value for node, value in program.trace_values(x, n) if isinstance(value, Tensor)}
    assert found == {name: by_frexp(value) for name, value in seen.items() if value.is_floating_point()}
    kinds = {node.op for node in program.nodes if node.name in found}
    assert kinds == {"placeholder", "get_attr", "call_function"}
    assert n.dtype is torch.int64 and set(seen) - set(found), "integers and booleans have none"


def test_calls_add_up_and_constants_count_once() -> None:
    model = nn.Linear(4, 2).eval()
    xs = [torch.randn(3, 4) * 10.0**i for i in range(4)]
    program = captured(model, xs[0])
    found = observe(program, ([x] for x in xs))
    by_op = {node.op: found[node.name] for node in program.nodes if node.name in found and "bias" not in str(node.target)}
    assert by_op["placeholder"] == by_frexp(torch.cat(xs))
    assert by_op["get_attr"] == by_frexp(model.weight.detach())
    assert by_op["call_function"] == by_frexp(model(torch.cat(xs)).detach())


@pytest.mark.parametrize("rows", [1, 300, COUNTED_TOGETHER])
def test_what_waits_to_be_counted_is_not_lost(rows: int) -> None:
    """And may be asked for at any time."""
    xs = [torch.randn(rows, 4) * 10.0 ** (i % 5 - 2) for i in range(MOST_WAITING + 6 if rows == 1 else 9)]
    program = captured(nn.ReLU().eval(), xs[0])
    observation = Observation(program)
    for i, x in enumerate(xs):
        observation.call([x])
        if i in (0, 3, len(xs) - 1):
            assert observation.ranges["relu"] == by_frexp(torch.cat(xs[: i + 1]).relu())


def test_an_observation_leaves_inputs_and_state_alone() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            return x.mul_(2) + self.count

    x = torch.ones(3, 2)
    program = captured(Counts().eval(), x.clone(), frontend="export")
    observation = Observation(program)
    first, again = observation.call([x]), observation.call([x])
    assert torch.equal(x, torch.ones(3, 2)) and torch.equal(first[0], again[0]) and first[0][0, 0] == 4


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs a torch with oneDNN")
def test_packed_weights_have_none() -> None:
    x = torch.randn(1, 3, 6, 6)
    program = CATALOGUE["lower_onednn"].with_options(variant="fused")(captured(nn.Conv2d(3, 4, 3).eval(), x))
    found = observe(program, [[x]])
    packed = [node.name for node in program.nodes if is_prepack(node)]
    assert packed and not set(packed) & set(found) and len(found) >= 2


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 3
        if bool(y.sum() > 0):
            y = y.exp() * 7
        return F.relu(y)


def test_values_in_a_branch_count_on_the_calls_that_take_it() -> None:
    x = torch.rand(2, 2)
    program = captured(Branches().eval(), x, frontend="script")
    taken = [x, 2 * x]
    found = observe(program, [[taken[0]], [-x], [taken[1]]])
    assert found["if1_then_exp"] == by_frexp(torch.cat([(y * 3).exp() for y in taken]))
    assert found["if1_then_mul_1"] == by_frexp(torch.cat([(y * 3).exp() * 7 for y in taken]))
    assert found["mul"] == by_frexp(torch.cat([x * 3, -x * 3, x * 6]))
    assert not any(name.startswith("if1_then") for name in observe(program, [[-x]]))
    assert found["region_if_0"].largest == pytest.approx((x * 6).exp().max().item() * 7)


class Grows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("w", torch.tensor([3.0, -2.0]))

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        for _ in range(int(n)):
            x = x * self.w
            if bool(x.sum() > 100):
                x = x - 50
        return x


def test_values_in_a_loop_count_in_all_rounds_and_constants_once() -> None:
    x, n = torch.tensor([[1.0, 4.0]]), torch.tensor(6)
    program = captured(Grows().eval(), x, n, frontend="script")
    found = observe(program, [[x, n], [x, torch.tensor(1)]])
    carried, products, taken = [], [], []
    for rounds in (6, 1):
        y = x
        for _ in range(rounds):
            carried.append(y)
            products.append(y * torch.tensor([3.0, -2.0]))
            y = products[-1]
            if y.sum() > 100:
                taken.append(y)
                y = y - 50
    assert len(products) == 7 and taken, "the test needs rounds of both kinds"
    assert found["loop1_carried0"] == by_frexp(torch.cat(carried))
    assert found["loop1_mul"] == by_frexp(torch.cat(products))
    assert found["loop1_if2_then_sub"] == by_frexp(torch.cat(taken) - 50)
    assert found["loop1_w"] == by_frexp(torch.tensor([3.0, -2.0]))
    assert not any(name.startswith("loop1") for name in observe(program, [[x, torch.tensor(0)]]))


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.ones(1))

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        for _ in range(int(n)):
            self.count.mul_(10)
            x = x + self.count
        return x


def test_state_that_a_loop_writes_counts_as_each_round_reads_it() -> None:
    x, n = torch.ones(2), torch.tensor(3)
    program = captured(Counts().eval(), x, n, frontend="script")
    found = observe(program, [[x, n]])
    assert found["loop1_count"] == by_frexp(torch.tensor([1.0, 10.0, 100.0]))
    assert observe(program, [[x, n]]) == found, "a run leaves no trace"
