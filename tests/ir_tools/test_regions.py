"""Regions: built by hand, run, copied, what is known of their effects, and what the checks make of broken ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from ir_tools.ir import Block, Draft, IllFormedError, Program, alias_analysis, check_wellformed, facts
from ir_tools.ir.alias_analysis import dies_at, mutated_values
from ir_tools.ir.dialect import aten, getitem
from ir_tools.ir.effects import acts, changed_containers, has_effect, is_random, written_nodes
from ir_tools.ir.host import fail, make_list, set_value_type, value_type
from ir_tools.ir.program import body_of
from ir_tools.ir.regions import NOBODY, Body, Outside, bodies, is_region, region_if, region_loop, with_bodies
from passes.testing import fingerprint
from tests.check import outputs_of
from tests.ir_tools.emitting import build

X = torch.tensor([[1.0, -2.0, 3.0], [4.0, 0.5, -6.0]])

Fill = Callable[..., Any]
"""Adds the ops of a body to a draft, given its placeholders; gives its results."""


def body(outer: Draft, name: str, fill: Fill, operands: list[fx.Node], carried: int = 0, is_loop: bool = False) -> Body:
    """A body over `operands`; that of a loop has the number of the round in front."""
    draft = Draft.inside(outer, name)
    given = [draft.operand(f"in{i}", facts.fact(n), value_type(n)) for i, n in enumerate(operands)]
    if is_loop:
        number = draft.operand("round", draft.program.mode.unknown_number("int"), "int")
        next(iter(draft.graph.nodes)).prepend(number)
        given.insert(0, number)
    draft.output(fill(draft, *given))
    return body_of(draft.program, carried)


def branches(
    draft: Draft, condition: Any, operands: list[fx.Node], then: Fill, orelse: Fill, like: list[fx.Node]
) -> list[fx.Node]:
    """An if whose results have the facts and types of `like`."""
    count = sum(map(is_region, draft.graph.nodes))
    sides = [body(draft, f"if{count}_{i}_", fill, operands) for i, fill in enumerate((then, orelse))]
    return draft.region(region_if, [condition, *sides, operands], [facts.fact(n) for n in like], [value_type(n) for n in like])


def loop(
    draft: Draft, trips: Any, carried: list[fx.Node], operands: list[fx.Node], fill: Fill, condition: Any = True
) -> list[fx.Node]:
    """A loop whose results have the facts and types of what it carries."""
    count = sum(map(is_region, draft.graph.nodes))
    inside = body(draft, f"loop{count}_", fill, [*carried, *operands], len(carried), is_loop=True)
    values, types = [facts.fact(n) for n in carried], [value_type(n) for n in carried]
    return draft.region(region_loop, [trips, condition, inside, carried, operands], values, types)


def is_positive(draft: Draft, x: fx.Node) -> fx.Node:
    return draft.call(aten.Bool.Tensor, draft.call(aten.gt.Scalar, draft.call(aten.sum.default, x), 0))


def with_if(then: Fill, orelse: Fill) -> Program:
    """y = if x.sum() > 0: then(x) else: orelse(x)"""
    return build({"x": X}, lambda d, x: branches(d, is_positive(d, x), [x], then, orelse, [x])[0])


def region_of(program: Block) -> fx.Node:
    (node,) = filter(is_region, program.calls)
    return node


def doubled(draft: Draft, x: fx.Node) -> list[fx.Node]:
    return [draft.call(aten.mul.Scalar, x, 2)]


def negated(draft: Draft, x: fx.Node) -> list[fx.Node]:
    return [draft.call(aten.neg.default, x)]


def effects(fill: Fill, *values: tuple[Any, str], carried: int = 0, is_loop: bool = False) -> Any:
    """The effects of a body over placeholders of the given facts and types, with the constants `weight` and `bias`."""
    found = []

    def around(draft: Draft, x: fx.Node) -> fx.Node:
        for name in ("weight", "bias"):
            draft.constant(name, torch.ones(2, 3) if name == "weight" else torch.zeros(2, 3))
        operands = [x if of is None else draft.operand(f"o{i}", of, t) for i, (of, t) in enumerate(values)]
        found.append(body(draft, "b_", fill, operands, carried, is_loop).effects)
        return x

    mode_draft = Draft(Program(fx.Graph(), signature=build({"x": X}, lambda d, x: x).signature))
    around(mode_draft, mode_draft.placeholder("x", X))
    return found[0]


TENSOR: tuple[Any, str] = (facts.UNKNOWN, "Tensor")
LIST: tuple[Any, str] = (facts.UNKNOWN, "List[Tensor]")


# -- running ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x", [X.abs(), -X.abs()])
def test_an_if_runs_the_body_taken(x: Tensor) -> None:
    program = with_if(doubled, negated)
    assert torch.equal(program(x), x * 2 if x.sum() > 0 else -x)


def test_a_loop_hands_on_what_it_carries() -> None:
    """Swapped in every round, with the number of the round added to one of them."""

    def swap(draft: Draft, number: fx.Node, a: fx.Node, b: fx.Node, x: fx.Node) -> list[Any]:
        return [True, draft.call(aten.add.Scalar, b, number), draft.call(aten.mul.Tensor, a, x)]

    def make(draft: Draft, x: fx.Node) -> list[fx.Node]:
        return loop(draft, 3, [draft.call(aten.neg.default, x), draft.call(aten.abs.default, x)], [x], swap)

    a, b = -X, X.abs()
    for number in range(3):
        a, b = b + number, a * X
    got = build({"x": X}, make)(X)
    assert torch.equal(got[0], a) and torch.equal(got[1], b)


@pytest.mark.parametrize("trips, condition, stops_at, rounds", [
    (None, True, 3, 3), (2, True, 3, 2), (5, True, 3, 3), (0, True, 3, 0), (None, False, 3, 0), (-1, True, 3, 0),
])  # fmt: skip
def test_a_loop_ends_by_its_limit_or_its_condition(trips: Any, condition: bool, stops_at: int, rounds: int) -> None:
    def one_more(draft: Draft, number: fx.Node, a: fx.Node) -> list[Any]:
        goes_on = draft.call(aten.lt.int, draft.call(aten.add.int, number, 1), stops_at)
        return [goes_on, draft.call(aten.add.Scalar, a, 1)]

    program = build({"x": X}, lambda d, x: loop(d, trips, [x], [], one_more, condition)[0])
    assert torch.equal(program(X), X + rounds)


def test_an_if_in_a_loop_and_a_constant_by_name() -> None:
    def step(draft: Draft, number: fx.Node, a: fx.Node) -> list[Any]:
        weight = draft.constant("weight", torch.full((2, 3), 0.5))

        def scaled(inner: Draft, a: fx.Node) -> list[fx.Node]:
            return [inner.call(aten.mul.Tensor, a, inner.get("weight"))]

        even = draft.call(aten.eq.int, draft.call(aten.remainder.int, number, 2), 0)
        return [True, branches(draft, even, [a], scaled, negated, [weight])[0]]

    program = build({"x": X}, lambda d, x: loop(d, 3, [x], [], step)[0])
    assert torch.equal(program(X), -(X * 0.5) * 0.5)
    assert program.used_constants() == ["weight"]
    names = [node.name for node in program.all_calls]
    assert len(set(names)) == len(names) == len(program) == 8


@pytest.mark.parametrize("x", [X.abs(), -X.abs()])
def test_a_copy_and_a_graph_module_run_the_same(x: Tensor) -> None:
    def nested(draft: Draft, x: fx.Node) -> list[fx.Node]:
        def step(inner: Draft, number: fx.Node, a: fx.Node) -> list[Any]:
            return [True, inner.call(aten.add.Tensor, a, inner.constant("w", torch.ones(2, 3)))]

        return loop(draft, 2, [x], [], step)

    program = with_if(nested, doubled)
    before, expected = fingerprint(program), program(x)
    assert torch.equal(expected, x + 2 if x.sum() > 0 else x * 2)
    assert torch.equal(program.copy()(x), expected)
    module = program.graph_module()
    assert torch.equal(module(x)[0], expected)
    assert len([m for m in module.modules() if isinstance(m, fx.GraphModule)]) == 4  # itself, two sides, the loop's body
    assert fingerprint(program) == before


def test_a_requirement_raises_its_message_and_is_never_dead() -> None:
    def make(draft: Draft, x: fx.Node) -> fx.Node:
        draft.require(is_positive(draft, x), "the sum must be positive")
        return x

    program = build({"x": X}, make)
    assert has_effect(region_of(program)) and torch.equal(program(X.abs()), X.abs())
    with pytest.raises(RuntimeError, match="the sum must be positive"):
        program(-X.abs())


# -- effects ------------------------------------------------------------------------------------------------------------


def test_a_pure_body_has_no_effects() -> None:
    found = effects(doubled, TENSOR)
    assert not found.matter and not found.escaping and not found.random


def test_a_write_through_a_view_is_seen() -> None:
    def write(draft: Draft, x: fx.Node, y: fx.Node) -> list[fx.Node]:
        draft.call(aten.add_.Scalar, draft.call(aten.select.int, y, 0, 0), 1)
        return []

    found = effects(write, TENSOR, TENSOR)
    assert (found.written, found.changed, found.escaping, found.acts) == ({1}, frozenset(), frozenset(), False)
    assert found.matter


def test_a_write_into_memory_of_its_own_is_no_effect() -> None:
    def write(draft: Draft, x: fx.Node) -> list[fx.Node]:
        return [draft.call(aten.add_.Scalar, draft.call(aten.clone.default, x), 1)]

    assert not effects(write, TENSOR).matter


def test_results_that_are_or_view_an_operand_escape() -> None:
    def view(draft: Draft, x: fx.Node, y: fx.Node, z: fx.Node) -> list[fx.Node]:
        return [draft.call(aten.t.default, y), z]

    assert effects(view, TENSOR, TENSOR, TENSOR).escaping == {1, 2}


def test_numbers_do_not_escape() -> None:
    def give_back(draft: Draft, n: fx.Node) -> list[fx.Node]:
        return [n]

    assert effects(give_back, (3, "int")).escaping == frozenset()


def test_what_is_put_into_a_list_can_be_reached_through_it() -> None:
    def put(draft: Draft, x: fx.Node, values: fx.Node, y: fx.Node) -> list[fx.Node]:
        draft.call(aten.append.t, values, draft.call(aten.t.default, y))
        return []

    found = effects(put, TENSOR, LIST, TENSOR)
    assert (found.written, found.changed, found.escaping) == (frozenset(), {1}, {1, 2})


def test_constants_that_are_written_or_given_back() -> None:
    def write(draft: Draft) -> list[fx.Node]:
        draft.call(aten.add_.Scalar, draft.get("weight"), 1)
        return [draft.call(aten.t.default, draft.get("bias"))]

    found = effects(write)
    assert (found.written_constants, found.escaping_constants) == ({"weight"}, {"bias"})
    assert found.acts, "whoever reads the constant later must find it written"


def test_the_effects_of_an_inner_region_are_those_of_the_outer() -> None:
    def outer(draft: Draft, x: fx.Node, y: fx.Node) -> list[fx.Node]:
        def inner(inside: Draft, a: fx.Node, b: fx.Node) -> list[fx.Node]:
            inside.call(aten.mul_.Scalar, a, 2)
            inside.call(aten.bernoulli.default, inside.get("weight"))
            return [b]

        return branches(draft, is_positive(draft, x), [y, x], inner, inner, [x])

    found = effects(outer, TENSOR, TENSOR)
    assert (found.written, found.escaping) == ({1}, {0})
    assert found.random and found.acts


@pytest.mark.parametrize("fill, expected", [
    (lambda d, x: d.call(fail, "no") and [], (True, False)),
    (lambda d, x: [d.call(aten.bernoulli.default, x)], (True, True)),
    (lambda d, x: loop(d, 2, [x], [], lambda e, i, a: [True, a]), (True, False)),
    (lambda d, x: branches(d, is_positive(d, x), [x], doubled, negated, [x]), (False, False)),
])  # fmt: skip
def test_raising_drawing_and_looping_are_acts(fill: Fill, expected: tuple[bool, bool]) -> None:
    found = effects(fill, TENSOR)
    assert (found.acts, found.random) == expected


def test_a_round_writes_into_what_the_round_before_gave() -> None:
    """a.add_(1); a = y    in the second round this writes into y."""

    def step(draft: Draft, number: fx.Node, a: fx.Node, y: fx.Node) -> list[Any]:
        draft.call(aten.add_.Scalar, a, 1)
        return [True, y]

    assert effects(step, TENSOR, TENSOR, carried=1, is_loop=True).written == {1, 2}


# -- effects, as the graph around sees them -----------------------------------------------------------------------------


def test_a_region_writes_into_the_operands_that_its_bodies_write_into() -> None:
    def write(draft: Draft, a: fx.Node, b: fx.Node) -> list[fx.Node]:
        draft.call(aten.add_.Scalar, a, 1)
        return []

    def make(draft: Draft, x: fx.Node) -> fx.Node:
        a, b = draft.call(aten.neg.default, x), draft.call(aten.abs.default, x)
        view = draft.call(aten.t.default, a)
        branches(draft, is_positive(draft, x), [view, b], write, lambda d, a, b: [], [])
        return draft.call(aten.add.Tensor, a, b)

    program = build({"x": X}, make)
    region = region_of(program)
    assert [n.name for n in written_nodes(region)] == ["t"]
    assert {n.name for n in mutated_values(program.graph)} == {"neg", "t"}
    for x in (X.abs(), -X.abs()):
        assert torch.equal(program(x), -x + (x.sum() > 0) + x.abs())


def test_a_result_shares_memory_with_what_escapes() -> None:
    """So that a write into the result changes the operand."""

    def make(draft: Draft, x: fx.Node) -> fx.Node:
        a = draft.call(aten.neg.default, x)
        (y,) = branches(draft, is_positive(draft, x), [a], lambda d, a: [a], doubled, [a])
        draft.call(aten.add_.Scalar, y, 1)
        return a

    program = build({"x": X}, make)
    assert "neg" in {n.name for n in mutated_values(program.graph)}
    assert torch.equal(program(X.abs()), -X.abs() + 1) and torch.equal(program(-X.abs()), X.abs())


def test_a_body_knows_what_others_write_into() -> None:
    """The result is written into outside, the operand is not; another round writes into what a loop carries."""

    def make(draft: Draft, x: fx.Node) -> fx.Node:
        a, b = draft.call(aten.neg.default, x), draft.call(aten.abs.default, x)

        def side(inside: Draft, a: fx.Node, b: fx.Node) -> list[fx.Node]:
            return [inside.call(aten.t.default, a), inside.call(aten.mul.Tensor, b, b)]

        y, z = branches(draft, is_positive(draft, x), [a, b], side, side, [draft.call(aten.t.default, a), b])
        draft.call(aten.add_.Scalar, y, 1)
        return draft.call(aten.add.Tensor, a, z)

    program = build({"x": X}, make)
    region = region_of(program)
    outside = alias_analysis.outside_of(region, alias_analysis.Memory(program.graph))
    assert outside.written == {("input", 0), ("result", 0), ("result", 1)}  # results of one region are one class
    (then, _) = bodies(region)
    assert {n.name.removeprefix("if0_0_") for n in program.of_body(then, outside).mutated_values} == {"in0", "t", "mul"}
    assert program.of_body(then).mutated_values == frozenset()


def test_the_outside_of_a_loop_is_also_its_next_round() -> None:
    def step(draft: Draft, number: fx.Node, a: fx.Node) -> list[Any]:
        draft.call(aten.add_.Scalar, a, 1)
        return [True, draft.call(aten.neg.default, draft.get("weight"))]

    def make(draft: Draft, x: fx.Node) -> fx.Node:
        draft.constant("weight", torch.ones(2, 3))
        return loop(draft, 3, [draft.call(aten.neg.default, x)], [], step)[0]

    program = build({"x": X}, make)
    region = region_of(program)
    (inside,) = bodies(region)
    assert "loop0_neg" not in {n.name for n in mutated_values(inside.graph, NOBODY)}
    outside = alias_analysis.outside_of(region, alias_analysis.Memory(program.graph))
    assert outside.carried == 1
    assert "loop0_neg" in {n.name for n in program.of_body(inside, outside).mutated_values}


def test_a_result_dies_only_if_what_it_may_be_is_dead_too() -> None:
    def make(draft: Draft, x: fx.Node) -> fx.Node:
        a, b = draft.call(aten.neg.default, x), draft.call(aten.neg.default, x)
        (y,) = branches(draft, is_positive(draft, x), [a], lambda d, a: [a], doubled, [a])
        (z,) = branches(draft, is_positive(draft, x), [b], doubled, negated, [b])
        last = draft.call(aten.abs.default, draft.call(aten.add.Tensor, y, z))
        return draft.call(aten.add.Tensor, draft.call(aten.add.Tensor, a, b), last)

    node = {n.name: n for n in build({"x": X}, make).calls}
    assert not dies_at(node["region_if_0"], node["add"]), "it may be `neg`, which is read again"
    assert dies_at(node["region_if_1_0"], node["add"]), "both bodies make a new tensor"
    assert dies_at(node["neg"], node["add_1"]) is False, "it may be `region_if_0`"


def test_state_read_outside_and_written_inside() -> None:
    def write(draft: Draft) -> list[fx.Node]:
        draft.call(aten.add_.Scalar, draft.get("count"), 1)
        return []

    def make(draft: Draft, x: fx.Node) -> list[fx.Node]:
        count = draft.constant("count", torch.zeros(1), state=True)
        before = draft.call(aten.clone.default, count)
        branches(draft, is_positive(draft, x), [], write, lambda d: [], [])
        return [before, draft.call(aten.clone.default, count)]

    program = build({"x": X}, make)
    assert {n.name for n in mutated_values(program.graph)} == {"count"}
    assert has_effect(region_of(program)) and not written_nodes(region_of(program))
    for x, after in ((X.abs(), 1), (-X.abs(), 0), (X.abs(), 1)):
        assert [t.item() for t in outputs_of(program, x)] == [0, after], "a run starts from the captured state"
    assert program.constants["count"].item() == 0


# -- dead code ----------------------------------------------------------------------------------------------------------


def appends(draft: Draft, values: fx.Node) -> list[fx.Node]:
    draft.call(aten.append.t, values, draft.get("w"))
    return []


def writes(draft: Draft, x: fx.Node) -> list[fx.Node]:
    draft.call(aten.neg_.default, x)
    return []


@pytest.mark.parametrize("unread, stays", [
    (lambda d, x: branches(d, is_positive(d, x), [x], doubled, negated, [x]), False),
    (lambda d, x: branches(d, is_positive(d, x), [x], doubled, lambda e, a: [e.call(fail, "no") and a], [x]), True),
    (lambda d, x: branches(d, is_positive(d, x), [x], doubled, lambda e, a: [e.call(aten.bernoulli.default, a)], [x]), True),
    (lambda d, x: branches(d, is_positive(d, x), [x], writes, lambda e, a: [], []), True),
    (lambda d, x: loop(d, 3, [x], [], lambda e, i, a: [True, a]), True),
], ids=["pure if", "if that raises", "if that draws", "if that writes", "loop"])  # fmt: skip
def test_an_unread_region_goes_only_where_that_is_not_observable(unread: Fill, stays: bool) -> None:
    def make(draft: Draft, x: fx.Node) -> fx.Node:
        unread(draft, x)
        return draft.call(aten.relu.default, x)

    program = build({"x": X}, make)  # `finish` sweeps
    assert any(map(is_region, program.calls)) is stays


def test_a_region_that_changes_a_list_stays() -> None:
    def make(draft: Draft, x: fx.Node) -> fx.Node:
        draft.constant("w", torch.ones(2, 3))
        values = draft.call(make_list, x)
        set_value_type(values, "List[Tensor]")
        branches(draft, is_positive(draft, x), [values], appends, lambda d, v: [], [])
        return draft.call(aten.add.Scalar, x, draft.call(aten.len.t, values))

    program = build({"x": X}, make)
    region = region_of(program)
    assert [n.name for n in changed_containers(region)] == ["make_list"] and not acts(region) and not is_random(region)
    assert torch.equal(program(X.abs()), X.abs() + 2) and torch.equal(program(-X.abs()), -X.abs() + 1)


# -- checks -------------------------------------------------------------------------------------------------------------


def broken(change: Callable[[Program, fx.Node], None]) -> str:
    program = with_if(doubled, negated)
    change(program, region_of(program))
    with pytest.raises(IllFormedError) as error:
        check_wellformed(program)
    return str(error.value)


def replace_argument(node: fx.Node, index: int, value: Any) -> None:
    node.args = (*node.args[:index], value, *node.args[index + 1 :])


def test_wellformed_counts_operands_and_results() -> None:
    too_few = broken(lambda program, node: replace_argument(node, 3, []))
    assert "region_if gives 0 values to a body that takes 1" in too_few

    def give_two(program: Program, node: fx.Node) -> None:
        output = bodies(node)[1].graph.output_node()
        output.args = ((*output.args[0], None),)  # type: ignore[misc]

    assert "a body of region_if gives 2 results instead of 1" in broken(give_two)


def test_wellformed_finds_nodes_of_another_graph_and_unknown_constants() -> None:
    def read_outer(program: Program, node: fx.Node) -> None:
        inside = bodies(node)[0].graph
        inside.output_node().args = ((program.placeholders[0],),)

    assert "output reads x before it is computed" in broken(read_outer)

    def read_unknown(program: Program, node: fx.Node) -> None:
        inside = bodies(node)[0].graph
        with inside.inserting_before(inside.output_node()):
            inside.get_attr("nowhere")

    assert "reads the constant 'nowhere', which is not in the table" in broken(read_unknown)


def test_wellformed_wants_names_that_are_unique_across_bodies() -> None:
    def same_body_twice(program: Program, node: fx.Node) -> None:
        then, _ = bodies(node)
        node.args = with_bodies(node, [then, then])

    assert "two nodes are called if0_0_in0" in broken(same_body_twice)


# -- editing ------------------------------------------------------------------------------------------------------------


def test_a_changed_body_makes_a_new_region_of_the_same_name_and_leaves_the_old_program_alone() -> None:
    program = with_if(doubled, negated)
    before = fingerprint(program)
    seen: list[tuple[str, Outside]] = []

    def tripled(block: Block) -> Block:
        seen.append((block.name, block.outside))
        if block.name != "if0_0_":
            return block
        draft = Draft.of(block)
        (old,) = draft.program.calls
        with draft.before(old):
            draft.redirect(old, draft.call(aten.mul.Tensor, old.args[0], draft.constant("three", torch.full((2, 3), 3.0))))
        return draft.finish()

    draft = Draft.of(program)
    draft.change_bodies(tripled)
    after = draft.finish()
    assert after is not program and fingerprint(program) == before
    assert seen == [("if0_0_", NOBODY), ("if0_1_", NOBODY)]
    assert region_of(after).name == region_of(program).name and "three" in after.constants
    assert bodies(region_of(after))[1] is bodies(region_of(program))[1]
    check_wellformed(after)
    assert torch.equal(after(X.abs()), X.abs() * 3) and torch.equal(after(-X.abs()), X.abs())


def test_bodies_left_alone_give_the_very_program_back() -> None:
    program = with_if(doubled, negated)
    draft = Draft.of(program)
    draft.change_bodies(lambda block: block)
    assert draft.finish() is program


def test_the_results_of_a_region_carry_facts_and_types() -> None:
    program = build({"x": X}, lambda d, x: branches(d, is_positive(d, x), [x], doubled, negated, [x])[0])
    region = region_of(program)
    (result,) = region.users
    assert result.target is getitem and facts.shape(result) == (2, 3) and value_type(region) == "Tuple[Tensor]"
