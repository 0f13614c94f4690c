"""Casts are placed where they are fewest: the minimum cut against every allowed set of half ops, on random small graphs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, note
from hypothesis import strategies as st
from torch import Tensor, nn

from ir_tools.ir import Program, facts
from ir_tools.ir.dialect import short_name
from ir_tools.rewrite import Artifacts
from ir_tools.rewrite.cast import Casts, traffic, users
from ir_tools.rewrite.cut import Freedom, Split, cheapest
from passes import CATALOGUE
from passes.precision.cast_placement import casts_one_by_one, placed
from passes.precision.constraints import (
    AS_IT_COMES,
    BETWEEN,
    EITHER,
    HALF,
    WITH_OPERANDS,
    WITH_USERS,
    Policy,
    PrecisionOptions,
)
from tests.check import captured, ops

cast_half = CATALOGUE["cast_half"]

# Of a 4x4 value and another one; all give 4x4 again, or two of them.
OPS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "matrix": lambda x, y, w: F.linear(x, w),
    "product": lambda x, y, w: x @ y,
    "follows": lambda x, y, w: x + y,
    "pointwise": lambda x, y, w: F.silu(x),
    "moves": lambda x, y, w: F.relu(x),
    "turned": lambda x, y, w: x.t(),
    "joined": lambda x, y, w: torch.cat([x, y])[:4],
    "parted": lambda x, y, w: x.chunk(2, 0)[1].repeat(2, 1),
    "inside": lambda x, y, w: x.softmax(-1),
    "fragile": lambda x, y, w: F.log_softmax(x, -1),
    "searched": lambda x, y, w: x.sort(0)[0],
    "compared": lambda x, y, w: torch.where(x > y, x, y),
    "weighed": lambda x, y, w: x * w,
}
STEPS = st.lists(st.tuples(st.sampled_from(list(OPS)), st.integers(0, 20), st.integers(0, 20)), min_size=2, max_size=8)


class Drawn(nn.Module):
    """Values are made one after the other, each from two earlier ones; what nobody reads is returned."""

    def __init__(self, steps: list[tuple[str, int, int]]):
        super().__init__()
        self.steps = steps
        self.register_buffer("w", torch.randn(4, 4))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        values, read = [x, y], set()
        for kind, a, b in self.steps:
            a, b = a % len(values), b % len(values)
            values.append(OPS[kind](values[a], values[b], self.w))
            read |= {a, b}
        return tuple(v for i, v in enumerate(values) if i not in read and i > 1)


X, Y = torch.randn(4, 4), torch.randn(4, 4)


def all_placements(policy: Policy) -> Iterator[set]:
    """Every set of ops in half that the precision constraints allow, by trying all of them."""
    free = [n for n, constraint in policy.constraints.items() if constraint in (EITHER, WITH_USERS, BETWEEN, WITH_OPERANDS)]
    fixed = {n for n, constraint in policy.constraints.items() if constraint is HALF}
    for sides in itertools.product((True, False), repeat=len(free)):
        half = fixed | {n for n, side in zip(free, sides) if side}
        if all(allowed(policy, n, half) for n in free):
            yield half


def allowed(policy: Policy, node: object, half: set) -> bool:
    constraint, in_half = policy.constraints[node], node in half
    operands = [n for n in node.all_input_nodes if facts.dtype(n) is torch.float32 and n.op != "get_attr"]
    if short_name(node.target) == "getitem":
        return in_half == (node.args[0] in half)
    if constraint is WITH_OPERANDS:
        return all(in_half == (n in half) for n in operands)
    if not in_half or constraint is EITHER:
        return True
    return set(users(node)) <= half and (constraint is WITH_USERS or set(operands) <= half)


def casts(policy: Policy, half: set) -> int:
    """One per value that an op reads in the other dtype."""
    values = [n for n in (*policy.block.placeholders, *policy.block.calls) if facts.dtype(n) is torch.float32]
    return sum(
        any((r in half) != (v in half) for r in v.users if policy.constraints.get(r) is not AS_IT_COMES) for v in values
    )


def cast(program: Program, level: str) -> tuple[Program, Casts]:
    artifacts = Artifacts()
    return cast_half.with_options(level=level)(program, artifacts=artifacts), artifacts[Casts]


@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
@given(steps=STEPS)
def test_no_placement_needs_fewer_casts(level: str, steps: list[tuple[str, int, int]]) -> None:
    program = captured(Drawn(steps).eval(), X, Y)
    policy = Policy.of(program, PrecisionOptions(torch.bfloat16, level))
    fewest = min(casts(policy, half) for half in all_placements(policy)) if HALF in policy.constraints.values() else 0
    after, moved = cast(program, level)
    note(f"{program}\n{after}")
    assert ops(after).count("to") == fewest
    assert moved.after.count == fewest
    assert moved.one_by_one.count >= fewest


def test_the_exhaustive_search_sees_dearer_placements() -> None:
    """linear -> relu -> relu -> linear: all four in half is cheapest, the relus in float cost two casts more."""
    model = Drawn([("matrix", 0, 0), ("moves", 2, 2), ("moves", 3, 3), ("matrix", 4, 4)])
    policy = Policy.of(captured(model.eval(), X, Y), PrecisionOptions(torch.bfloat16, "O2"))
    counts = sorted(casts(policy, half) for half in all_placements(policy))
    assert counts == [2, 4, 4, 4]


def test_of_equal_counts_the_fewest_bytes_move() -> None:
    """The sum over an axis is smaller than what is summed: the cast stands behind it, not before."""

    class Shrinks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ x)[:1].abs().exp().cumsum(0)

    after, moved = cast(captured(Shrinks().eval(), X), "O1")
    assert ops(after) == ["to", "matmul", "slice", "abs", "to", "exp", "cumsum"]
    assert moved.after.bytes == 16 * (4 + 2) + 4 * (4 + 2)


def test_what_autocast_would_do_is_counted() -> None:
    """Two linears read one input, and each of two weights: four casts op by op, and one output each."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    program = captured(Two().eval(), X)
    after, moved = cast(program, "O2")
    assert moved.before == traffic(program) and moved.before.count == 0
    assert moved.one_by_one.count == 6 and moved.one_by_one.bytes == 6 * 16 * 6
    assert moved.after.count == traffic(after).count == 3
    assert placed(Policy.of(program, PrecisionOptions(torch.bfloat16, "O2"))) == set(program.calls)
    assert casts_one_by_one(Policy.of(program, PrecisionOptions(torch.bfloat16, "O2"))).count == 6


def test_casts_of_the_model_itself_are_counted() -> None:
    class Converts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x.half().float() @ x).double()

    program = captured(Converts().eval(), X)
    assert cast(program, "O2")[1].before.count == 3
    assert isinstance(program, Program) and facts.dtype(program.calls[0]) is torch.float16


# -- the cut by itself --------------------------------------------------------------------------------------------------


@given(st.data())
def test_a_split_is_the_cheapest_one(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 7))
    fixed = {i: data.draw(st.booleans()) for i in range(count) if data.draw(st.integers(0, 2)) == 0}
    nodes = st.integers(0, count - 1)
    charges = [(i, data.draw(st.lists(nodes, max_size=3)), data.draw(st.integers(0, 9))) for i in range(count)]
    follows = data.draw(st.lists(st.tuples(nodes, nodes), max_size=2))
    follows = [(a, b) for a, b in follows if not (fixed.get(a) is True and fixed.get(b) is False)]
    follows = follows[:1]  # a chain of two might contradict what is fixed

    def cost(first: set[int]) -> float:
        fits = all((i in first) is side for i, side in fixed.items()) and all(a not in first or b in first for a, b in follows)
        return sum(c for i, to, c in charges if any((r in first) != (i in first) for r in to)) if fits else float("inf")

    split = Split()
    for i, side in fixed.items():
        split.fix(i, first=side)
    for a, b in follows:
        split.follow(a, [b])
    for i, to, c in charges:
        split.charge(i, to, c)
    best = [set(s) for n in range(count + 1) for s in itertools.combinations(range(count), n)]
    first = split.first_side()
    assert cost({i for i in range(count) if i in first}) == min(map(cost, best))


SECOND = Freedom(first=False)
CHAIN = {"x": SECOND, "matrix": Freedom(first=True), "wide": Freedom(), "narrow": Freedom(), "out": SECOND}
HANDED_OVER = {"x": ["matrix"], "matrix": ["wide"], "wide": ["narrow"], "narrow": ["out"]}


@pytest.mark.parametrize(
    "costs, expected",
    [
        ({"x": (1, 9), "matrix": (1, 4), "wide": (1, 8), "narrow": (1, 2)}, {"matrix", "wide", "narrow"}),
        ({"x": (1, 9), "matrix": (1, 4), "wide": (2, 0), "narrow": (2, 0)}, {"matrix"}),
        ({"x": (0, 9), "matrix": (0, 4), "wide": (0, 3), "narrow": (0, 5)}, {"matrix", "wide"}),
    ],
)
def test_costs_are_the_callers(costs: dict[str, tuple[int, int]], expected: set[str]) -> None:
    """The first unit decides, then the second: what hands over where it is cheapest, whatever the two sides are."""
    assert cheapest(CHAIN, HANDED_OVER, costs.__getitem__) == expected


def test_freedoms_bind_whatever_it_costs() -> None:
    costs = {"x": (1, 9), "matrix": (1, 4), "wide": (1, 8), "narrow": (1, 2)}
    bound = CHAIN | {"narrow": Freedom(only_with=["out"])}
    assert cheapest(bound, HANDED_OVER, costs.__getitem__) == {"matrix"}
    tied = CHAIN | {"wide": Freedom(together_with=["narrow"]), "narrow": Freedom(first=False)}
    assert cheapest(tied, HANDED_OVER, costs.__getitem__) == {"matrix"}
    assert cheapest(CHAIN | {"wide": Freedom(only_with=["matrix"])}, HANDED_OVER, costs.__getitem__) > {"wide"}
