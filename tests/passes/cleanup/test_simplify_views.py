"""Joining permutations and reshapes: it rewrites, it refuses, and every value keeps its index."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ir_tools.frontends.capture import capture
from ir_tools.frontends.source import prepare
from ir_tools.ir import Program, alias_analysis
from passes import CATALOGUE, rule_pass
from tests.check import (
    assert_bitwise_equal,
    assert_same_graph,
    assert_sites_can_be_skipped,
    captured,
    ops,
    outputs_of,
    rewritten,
)

simplify_views = CATALOGUE["simplify_views"]

X = torch.arange(24.0).reshape(2, 3, 4)


class Views(nn.Module):
    """Views of a value of the graph's own, read by another op."""

    def __init__(self, views: Callable[[Tensor], Tensor]):
        super().__init__()
        self.views = views

    def forward(self, x: Tensor) -> Tensor:
        return self.views(x.neg()).exp()


JOINED: dict[str, tuple[Callable, Callable]] = {
    "transpose, transpose": (lambda x: x.transpose(1, 2).transpose(-1, -2), lambda x: x),
    "transpose, mT": (lambda x: x.transpose(1, 2).mT, lambda x: x),
    "permute, permute": (lambda x: x.permute(2, 0, 1).permute(2, 1, 0), lambda x: x.permute(1, 0, 2)),
    "permute, inverse": (lambda x: x.permute(2, 0, 1).permute(1, 2, 0), lambda x: x),
    "permute, transpose": (lambda x: x.permute(-1, 0, 1).transpose(0, 1), lambda x: x.permute(0, 2, 1)),
    "four": (lambda x: x.transpose(0, 1).transpose(1, 2).transpose(0, 2).movedim(0, 2), lambda x: x.permute(2, 1, 0)),
    "t, t": (lambda x: x[0].t().t(), lambda x: x[0]),
    "T, t": (lambda x: x[0].T.t(), lambda x: x[0]),
    "movedim": (lambda x: x.movedim([0, 1], [1, 2]).movedim(0, 2), lambda x: x),
    "transpose of one axis": (lambda x: x.transpose(1, 1), lambda x: x),
    "permute of nothing": (lambda x: x.permute(0, 1, 2), lambda x: x),
    "t of a vector": (lambda x: x[0, 0].t(), lambda x: x[0, 0]),
    "reshape, reshape": (lambda x: x.reshape(6, 4).reshape(3, 8), lambda x: x.reshape(3, 8)),
    "reshape back": (lambda x: x.reshape(6, 4).reshape(2, 3, 4), lambda x: x),
    "view, flatten": (lambda x: x.view(6, 2, 2).flatten(1), lambda x: x.reshape(6, 4)),
    "flatten, unflatten": (lambda x: x.flatten().unflatten(0, (4, 6)), lambda x: x.reshape(4, 6)),
    "unsqueeze, squeeze": (lambda x: x.unsqueeze(1).squeeze(1), lambda x: x),
    "unsqueeze, unsqueeze": (lambda x: x.unsqueeze(0).unsqueeze(-1), lambda x: x.reshape(1, 2, 3, 4, 1)),
    "unsqueeze, squeeze all": (lambda x: x.unsqueeze(0).unsqueeze(2).squeeze(), lambda x: x),
    "squeeze of nothing": (lambda x: x.squeeze(1), lambda x: x),
    "reshape to its shape": (lambda x: x.reshape(2, -1, 4), lambda x: x),
    "between": (lambda x: x.transpose(1, 2).reshape(8, 3).reshape(24), lambda x: x.transpose(1, 2).reshape(24)),
    "unsqueeze of strides": (lambda x: x.mT.unsqueeze(1).squeeze(1), lambda x: x.mT),
}


@pytest.mark.parametrize("frontend", ["trace", "export"])
@pytest.mark.parametrize("name", JOINED)
def test_it_joins(name: str, frontend: str) -> None:
    views, expected = JOINED[name]
    program = captured(Views(views), X, frontend=frontend)
    after, log = rewritten(simplify_views, program, X)
    assert_same_graph(after, Views(expected), X, frontend=frontend)
    assert not [refused.reason for refused in log.refusals]
    assert_bitwise_equal([expected(X.neg()).exp()], outputs_of(after, X))


def of_any_batch(views: Callable) -> Program:
    dynamic = {"x": {0: torch.export.Dim("batch", min=2, max=64)}}
    return capture(prepare(Views(views), [((X,), {})], dynamic), "export").program


@pytest.mark.parametrize(
    "views, left",
    [
        (lambda x: x.reshape(x.shape[0], 12).reshape(x.shape[0], 3, 4), ["neg", "exp"]),
        (lambda x: x.flatten(1).unflatten(1, (6, 2)), ["neg", "reshape", "exp"]),
        (lambda x: x.transpose(1, 2).transpose(1, 2), ["neg", "exp"]),
        (lambda x: x.unsqueeze(0).unsqueeze(-1), ["neg", "reshape", "exp"]),
    ],
)
def test_a_dynamic_batch_is_followed(views: Callable, left: list[str]) -> None:
    program = of_any_batch(views)
    after, _ = rewritten(simplify_views, program, X)
    assert ops(simplify_views(after)) == ops(after) and [name for name in ops(after) if name != "size"] == left
    for batch in (2, 5):
        x = torch.randn(batch, 3, 4)
        assert_bitwise_equal(outputs_of(program, x), outputs_of(after, x))


# -- it refuses ---------------------------------------------------------------------------------------------------------

LAYOUT = "the result would lie in memory in another order"


def test_a_reshape_that_sorts_memory_stays() -> None:
    """Flattening a transposed value copies it: the copy is contiguous, the value itself is not."""
    program = captured(Views(lambda x: x.mT.reshape(24).reshape(2, 4, 3)), X)
    after, log = rewritten(simplify_views, program, X)
    assert after is program and [refused.reason for refused in log.refusals] == [LAYOUT]


def test_two_dynamic_sizes_are_refused() -> None:
    dims = {"x": {0: torch.export.Dim("batch", min=2, max=64), 2: torch.export.Dim("width", min=2, max=64)}}
    model = Views(lambda x: x.unsqueeze(0).unsqueeze(-1))
    program = capture(prepare(model, [((X,), {})], dims), "export").program
    after, log = rewritten(simplify_views, program, X)
    assert after is program
    assert [refused.reason for refused in log.refusals] == ["more than one size of the result is dynamic"]


def test_a_value_between_that_is_read_again_is_refused() -> None:
    program = captured(Views(lambda x: (lambda y: y.mT + y.sum())(x.mT)), X)
    after, log = rewritten(simplify_views, program, X)
    assert after is program and "another user (sum" in log.refusals[0].reason


class Written(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.exp()
        z = y.view(6, 4).view(24)
        y[0].mul_(2)
        return z.sin()


def test_views_of_what_is_written_are_refused() -> None:
    program = captured(Written(), X)
    after, log = rewritten(simplify_views, program, X)
    assert after is program and log.refusals[0].reason.endswith("is written in place")


def test_an_output_that_was_a_copy_is_no_view_of_the_input() -> None:
    class Bare(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mT.reshape(24).reshape(2, 4, 3)

    program = captured(Bare(), X)
    assert rewritten(simplify_views, program, X)[0] is program


def test_each_site_can_be_skipped() -> None:
    model = Views(lambda x: x.mT.mT.exp().flatten().reshape(6, 4))
    assert_sites_can_be_skipped(simplify_views, lambda: captured(model, X), X)


# -- teeth --------------------------------------------------------------------------------------------------------------


def test_permutations_joined_in_the_wrong_order_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(op, x, first, second):
        return op.permute(x, [second.axis_order[axis] for axis in first.axis_order])

    rules = [replace(rule, replace=wrong) for rule in simplify_views.rules if rule.slug == "permutations"]
    cube = torch.randn(3, 3, 3)
    program = captured(Views(lambda x: x.permute(2, 0, 1).permute(0, 2, 1)), cube)
    after, _ = rewritten(rule_pass("wrong", rules, effects={"rounds"}, doc=""), program, cube)
    with pytest.raises(AssertionError, match="moved by"):
        assert_bitwise_equal(outputs_of(program, cube), outputs_of(after, cube))


def test_a_long_row_of_views_is_not_walked_again_for_each(monkeypatch) -> None:
    """Whether the joined view may stand for the old one is seen near them: they are views of one value."""
    asked = 0
    aliased = alias_analysis.aliased_nodes

    def counted(node):
        nonlocal asked
        asked += 1
        return aliased(node)

    def count(views: int) -> int:
        nonlocal asked
        program, asked = captured(InARow(views), torch.randn(4, 6)), 0
        after = simplify_views(program)
        assert len(after) < 5
        return asked

    monkeypatch.setattr(alias_analysis, "aliased_nodes", counted)
    assert count(80) <= 3 * count(40)


class InARow(nn.Module):
    def __init__(self, views: int):
        super().__init__()
        self.views = views
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.views):
            x = x.reshape(6, 4).reshape(4, 6)
        return x * 2
