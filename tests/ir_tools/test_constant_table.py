"""The table of constants: names, storage entered once, children, and what an addition costs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from benchmarks.compile_time import Gate, chain
from ir_tools.frontends.from_script import from_script
from ir_tools.frontends.source import prepare
from ir_tools.ir import Block, ConstantTable, Draft, constant_table
from ir_tools.ir.regions import bodies, is_region
from passes import CATALOGUE


def test_a_taken_name_gets_the_lowest_free_number() -> None:
    table = ConstantTable()
    assert [table.enter("w", torch.ones(1) * i) for i in range(3)] == ["w", "w@2", "w@3"]
    assert [table.enter("w@pass", torch.ones(1) * i) for i in range(3)] == ["w@pass", "w@pass_2", "w@pass_3"]
    del table["w@2"]
    assert [table.enter("w", torch.zeros(1)), table.enter("w", torch.zeros(1))] == ["w@2", "w@4"]


def test_the_same_storage_is_entered_once() -> None:
    table, weight = ConstantTable(), torch.ones(4, 4)
    assert [table.enter("w", weight), table.enter("other", weight)] == ["w", "w"]
    assert table.enter("view", weight[:2]) == "view"


def test_a_removed_constant_is_not_found_again() -> None:
    """Its memory may be that of another tensor by now."""
    table, weight = ConstantTable(), torch.ones(4)
    table.enter("w", weight)
    del table["w"]
    assert table.enter("new", weight) == "new"
    table["new"] = torch.zeros(4)
    assert table.enter("newer", weight) == "newer"


def test_a_child_adds_to_itself_alone_until_it_is_absorbed() -> None:
    table, weight, more = ConstantTable(), torch.ones(4), torch.zeros(4)
    table.enter("w", weight)
    child = table.child()
    grandchild = child.child()
    assert child.enter("v", weight) == "w" and child.enter("w", more) == "w@2"
    assert grandchild.enter("w", torch.ones(3)) == "w@3"
    grandchild.state |= {"w@2"}
    assert list(table) == ["w"] and list(grandchild) == ["w", "w@2", "w@3"]
    table.absorb(grandchild)
    assert list(table) == ["w", "w@2", "w@3"] and table.state == {"w@2"}
    assert table.enter("again", more) == "w@2" and table.enter("w", torch.ones(5)) == "w@4"
    with pytest.raises(ValueError, match="not one that was made of this one"):
        child.absorb(ConstantTable())


def test_a_copy_is_independent() -> None:
    table = ConstantTable()
    table.enter("w", torch.ones(4))
    copy = table.copy()
    copy.enter("w", torch.ones(4))
    del copy["w"]
    assert list(table) == ["w"] and list(copy) == ["w@2"] and table.enter("w", torch.ones(4)) == "w@2"


def naive_name(names: set[str], base: str) -> str:
    """The first of base, base 2, base 3 ... that is free, counted from the start each time."""
    candidate, count = base, 1
    while candidate in names:
        count += 1
        candidate = f"{base}_{count}" if "@" in base else f"{base}@{count}"
    return candidate


STEPS = st.lists(st.tuples(st.sampled_from("enter child absorb discard delete copy".split()), st.integers(0, 5)), max_size=40)
BASES = ("w", "w@p", "w@2", "b", "b@p_2", "b@p")


@given(STEPS)
def test_names_are_those_that_counting_from_the_start_gives(steps) -> None:
    tables: list[ConstantTable] = [ConstantTable()]
    tensors = [torch.ones(i + 1) for i in range(3)]
    for kind, number in steps:
        top = tables[-1]
        if kind == "enter":
            tensor = tensors[number] if number < len(tensors) else torch.ones(1)
            known = next((n for n, t in top.items() if t.data_ptr() == tensor.data_ptr()), None)
            expected = known or naive_name(set(top), BASES[number])
            assert top.enter(BASES[number], tensor) == expected
        elif kind == "child":
            tables.append(top.child())
        elif kind == "delete" and len(tables) == 1 and top:
            del top[list(top)[number % len(top)]]
        elif kind == "copy" and len(tables) == 1:
            tables = [top.copy()]
        elif len(tables) > 1:
            child = tables.pop()
            if kind == "absorb":
                tables[-1].absorb(child)


def test_a_discarded_draft_of_a_body_leaves_the_table_as_it_was() -> None:
    program = gates(2)
    before = list(program.constants)
    (region, *_) = (node for node in program.calls if is_region(node))
    body = program.of_body(bodies(region)[0])
    assert body.constants is program.constants
    draft = Draft.of(body)
    with draft.before(draft.program.calls[0]):
        draft.constant("new", torch.ones(3))
    assert draft.finish() is body and list(program.constants) == before


# -- what it costs ------------------------------------------------------------------------------------------------------


def gates(count: int):
    model = chain(12 * count, part=Gate, nodes_per_part=12)
    return from_script(prepare(torch.jit.script(model), [((torch.randn(1, 8, 4, 4),), {})]))


def identities_of(monkeypatch, run) -> int:
    """How often the storage of a tensor is looked at during a run."""
    count, identity = 0, constant_table._identity

    def counted(tensor):
        nonlocal count
        count += 1
        return identity(tensor)

    with monkeypatch.context() as patch:
        patch.setattr(constant_table, "_identity", counted)
        run()
    return count


@pytest.mark.parametrize("name", ["fuse_conv_bn", "cast_half"])
def test_bodies_share_one_index(monkeypatch, name) -> None:
    few, many = gates(4), gates(16)
    counts = [identities_of(monkeypatch, lambda p=program: CATALOGUE[name](p)) for program in (few, many)]
    assert 0 < counts[1] <= 4 * counts[0]


def test_equal_names_are_counted_once(monkeypatch) -> None:
    asked = 0
    numbered = constant_table._numbered

    def counted(name, count):
        nonlocal asked
        asked += 1
        return numbered(name, count)

    monkeypatch.setattr(constant_table, "_numbered", counted)
    draft = Draft(Block(fx.Graph()))
    for i in range(300):
        draft.constant("w", torch.full((1,), float(i)))
    assert asked <= 3 * 300
