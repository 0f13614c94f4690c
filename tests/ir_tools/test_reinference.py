"""Facts of what a change reaches are inferred again: shapes stay, strides follow, symbols are kept, bodies are entered."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

import passes
from ir_tools.ir import Draft, FactError, Program, facts, reinference, shape_inference
from ir_tools.ir.dialect import aten, short_name
from ir_tools.ir.facts import TensorFact
from ir_tools.ir.program import all_nodes
from ir_tools.ir.regions import is_region
from passes.testing.true_facts import known_strides, untrue_facts
from tests.check import captured

IMAGE = torch.randn(2, 3, 16, 16)


def named(program: Program, name: str) -> list[fx.Node]:
    return [node for node in all_nodes(program.graph) if node.op == "call_function" and short_name(node.target) == name]


def in_channels_last(program: Program, name: str) -> Program:
    """The Program with the first op of that name followed by a copy into channels-last: another layout, the same numbers."""
    draft = Draft.of(program)
    node = next(n for n in draft.program.calls if short_name(n.target) == name)
    with draft.graph.inserting_after(node):
        new = draft.call(aten.contiguous.default, node, memory_format=torch.channels_last)
    draft.redirect(node, new)
    return draft.finish()


def test_the_layout_of_a_pool_follows_that_of_a_lowered_convolution() -> None:
    """conv-relu-pool twice: the pools lay contiguous before the lowering and channels-last behind it."""
    stage = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*stage, nn.Conv2d(8, 8, 3), nn.ReLU(), nn.MaxPool2d(2)).eval()
    program = captured(model, IMAGE)
    assert [facts.memory_format(n) for n in named(program, "max_pool2d")] == [torch.contiguous_format] * 2
    after = passes.CATALOGUE["lower_onednn"].with_options(variant="fused")(program)
    assert [facts.memory_format(n) for n in named(after, "max_pool2d")] == [torch.channels_last] * 2
    assert untrue_facts(after, IMAGE) == [] and untrue_facts(program, IMAGE) == []


def test_layouts_follow_into_a_residual_block() -> None:
    conv, other = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = conv, other

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.one(x).relu()
            return nn.functional.avg_pool2d(self.two(y).sigmoid() * y, 2)

    program = captured(Residual().eval(), IMAGE)
    after = passes.CATALOGUE["lower_onednn"].with_options(variant="fused")(program)
    layouts = [facts.memory_format(n) for name in ("mul", "avg_pool2d") for n in named(after, name)]
    assert layouts == [torch.channels_last] * 2 and untrue_facts(after, IMAGE) == []


def test_a_fact_that_does_not_follow_is_noticed() -> None:
    """Sabotage: a layout is swapped behind the back of re-inference."""
    program = captured(nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2)).eval(), IMAGE)
    after = in_channels_last(program, "conv2d")
    assert untrue_facts(after, IMAGE) == []
    (pool,), (old,) = named(after, "max_pool2d"), named(program, "max_pool2d")
    facts.set_fact(pool, facts.fact(old))
    (line,) = untrue_facts(after, IMAGE)
    assert line.startswith("max_pool2d: the fact says float32[2, 8, 7, 7] at [392, 49, 7, 1], running gives")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the ops that are inferred again, in order."""
    names: list[str] = []
    infer = shape_inference.compute_fact
    monkeypatch.setattr(reinference, "compute_fact", lambda m, t, a, k: names.append(short_name(t)) or infer(m, t, a, k))
    return names


def test_only_the_cone_of_a_change_is_inferred_again(seen: list[str]) -> None:
    model = Model(lambda m, x: (x.exp().sin().cos(), x.relu().tanh().neg())).eval()
    program = captured(model, IMAGE)
    after = in_channels_last(program, "exp")
    assert seen == ["sin", "cos"]
    assert [facts.memory_format(n) for n in (*named(after, "cos"), *named(after, "neg"))] == [
        torch.channels_last, torch.contiguous_format]  # fmt: skip
    seen.clear()
    draft = Draft.of(program)
    node = next(n for n in draft.program.calls if short_name(n.target) == "exp")
    with draft.graph.inserting_after(node):
        same = draft.call(aten.exp.default, node.args[0])
    draft.redirect(node, same)
    draft.finish()
    assert seen == [], "a value with the same fact changes nothing behind it"


def test_the_change_stops_where_facts_are_what_they_were(seen: list[str]) -> None:
    program = captured(Model(lambda m, x: x.exp().sum((2, 3)).sin().cos()).eval(), IMAGE)
    in_channels_last(program, "exp")
    assert seen == ["sum"]


def test_an_op_keeps_its_symbols() -> None:
    """`nonzero` gives a fresh symbol whenever it is asked; the second time it is that of the first."""
    program = captured(Model(lambda m, x: x.exp().relu().nonzero().float().sum(1)).eval(), IMAGE, frontend="export")
    after = in_channels_last(program, "exp")
    (one,), (other,) = named(program, "nonzero"), named(after, "nonzero")
    assert facts.shape(one) == facts.shape(other)
    assert [facts.shape(n) for n in named(program, "sum")] == [facts.shape(n) for n in named(after, "sum")]
    assert untrue_facts(after, IMAGE) == []


def test_a_draft_that_rejects_the_new_operand_says_so() -> None:
    program = captured(Model(lambda m, x: x.exp() @ m.w, w=torch.randn(16, 4)).eval(), IMAGE)
    draft = Draft.of(program)
    node = next(n for n in draft.program.calls if short_name(n.target) == "exp")
    with draft.graph.inserting_after(node):
        new = draft.call(aten.sum.dim_IntList, node, [-1], True)
    draft.redirect(node, new)
    with pytest.raises(FactError, match="matmul"):
        draft.finish()


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.pool = nn.MaxPool2d(3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        if bool(x.sum() > 0):
            y = self.pool(y).relu()
        else:
            y = self.pool(y.tanh())
        return y.sin()


class Convolves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)


class Rounds(Convolves):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        n = int(x.abs().sum() > 0) + 1
        for _ in range(n):
            y = y.relu() * 2
        return y.sin()


class BackToContiguous(Convolves):
    """The loop starts channels-last (behind the lowering) and goes on contiguous."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        n = int(x.abs().sum() > 0) + 1
        for _ in range(n):
            y = y.relu().flatten(1).reshape(2, 3, 16, 16)
        return y.sin()


@pytest.mark.parametrize("model, known", [(Branches, True), (Rounds, True), (BackToContiguous, False)])
def test_bodies_follow_what_they_are_given(model: Any, known: bool) -> None:
    x = IMAGE
    program = captured(torch.jit.script(model().eval()), x, frontend="script")
    after = passes.CATALOGUE["lower_onednn"].with_options(variant="fused")(program)
    assert any(map(is_region, after.calls)) and untrue_facts(after, x) == [] and untrue_facts(program, x) == []
    assert untrue_facts(after, -x) == []
    (last,) = named(after, "sin")
    assert facts.memory_format(last) is (torch.channels_last if known else None)
    assert (facts.strides(last) is not None) is known and facts.shape(last) == (2, 3, 16, 16)
    assert (known_strides(after, x).share == 1) is known


def test_bodies_of_the_program_given_stay_as_they_were() -> None:
    program = captured(torch.jit.script(Branches().eval()), IMAGE, frontend="script")
    before = {node.name: facts.fact(node) for node in all_nodes(program.graph)}
    passes.CATALOGUE["lower_onednn"].with_options(variant="fused")(program)
    assert {node.name: facts.fact(node) for node in all_nodes(program.graph)} == before


def test_facts_are_compared_by_value() -> None:
    one = TensorFact.of(torch.zeros(2, 3))
    assert one == TensorFact.of(torch.ones(2, 3)) and hash(one) == hash(TensorFact.of(torch.ones(2, 3)))
    assert one != TensorFact.of(torch.zeros(3, 2).t()) and one != TensorFact.of(torch.zeros(2, 3, dtype=torch.float64))


class Model(nn.Module):
    def __init__(self, function: Any, **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.register_buffer(name, part)

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)
