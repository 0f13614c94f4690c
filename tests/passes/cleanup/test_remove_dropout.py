"""Dropping what does nothing outside training."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passes import CATALOGUE, Rule, rule_pass
from passes.cleanup.remove_dropout import dropout, operand
from tests.check import (
    assert_bitwise_equal,
    assert_same_graph,
    assert_sites_can_be_skipped,
    captured,
    ops,
    outputs_of,
    rewritten,
)

remove_dropout = CATALOGUE["remove_dropout"]

KINDS: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: nn.Dropout(0.4),
    "alpha_dropout": lambda: nn.AlphaDropout(0.4),
    "feature_dropout": lambda: nn.Dropout2d(0.4),
    "feature_alpha_dropout": lambda: nn.FeatureAlphaDropout(0.4),
}
X = torch.randn(2, 3, 4, 4)


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("frontend", ["trace", "export", "script", "fx"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_dropout_in_eval_mode_goes(kind: str, frontend: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), KINDS[kind](), nn.ReLU()).eval()
    program = captured(model, X, frontend=frontend)
    after, log = rewritten(remove_dropout, program, X)
    assert kind in ops(program) and len(log.rewrites) == 1
    assert_same_graph(after, nn.Sequential(model[0], nn.Identity(), nn.ReLU()), X, frontend=frontend)
    assert_bitwise_equal(outputs_of(program, X), outputs_of(after, X))


def test_a_dropout_that_never_drops_goes_even_when_it_trains() -> None:
    program = captured(Function(lambda x: F.dropout(x.exp(), 0.0, training=True)), X)
    after, log = rewritten(remove_dropout, program, X)
    assert ops(program) == ["exp", "dropout"] and ops(after) == ["exp"] and len(log.rewrites) == 1
    assert_bitwise_equal(outputs_of(program, X), outputs_of(after, X))


def test_the_result_may_be_an_output_or_an_input() -> None:
    program = captured(nn.Dropout().eval(), X)
    after, _ = rewritten(remove_dropout, program, X)
    assert ops(after) == []
    assert_bitwise_equal([X], outputs_of(after, X))


def test_a_dropout_in_a_row_of_dropouts_goes() -> None:
    model = nn.Sequential(nn.Dropout(), nn.ReLU(), nn.Dropout(), nn.Dropout2d()).eval()
    after, log = rewritten(remove_dropout, captured(model, X), X)
    assert ops(after) == ["relu"] and len(log.rewrites) == 3


def test_an_in_place_dropout_goes() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Dropout(inplace=True), nn.Sigmoid()).eval()
    after, log = rewritten(remove_dropout, captured(model, X), X)
    assert ops(after) == ["relu", "sigmoid"] and len(log.rewrites) == 1


# -- it refuses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [F.dropout, F.alpha_dropout, F.dropout2d, F.feature_alpha_dropout])
def test_a_dropout_that_drops_is_refused(function: Callable) -> None:
    program = captured(Function(lambda x: function(x, 0.5, training=True)), X)
    after, log = rewritten(remove_dropout, program, X)
    assert after is program
    (refused,) = log.refusals
    assert refused.reason == "requirement not met: The dropout is in inference mode, or its probability is zero."


def test_a_dropout_beside_a_write_is_refused() -> None:
    """In eval mode a dropout may give its very operand: whoever writes into one writes into the other."""

    def function(x: Tensor) -> Tensor:
        y = F.dropout(x, 0.5, training=False)
        x[0].add_(1.0)
        return y.exp()

    program = captured(Function(function), X)
    after, log = rewritten(remove_dropout, program, X)
    assert after is program and log.refusals[0].reason.endswith("is written in place")


# -- sites and teeth ----------------------------------------------------------------------------------------------------


def test_each_site_can_be_skipped() -> None:
    model = nn.Sequential(nn.Dropout(), nn.ReLU(), nn.Dropout2d(), nn.ReLU(), nn.AlphaDropout()).eval()
    assert_sites_can_be_skipped(remove_dropout, lambda: captured(model, X), X)


def test_removing_a_dropout_that_drops_is_noticed() -> None:
    careless = rule_pass("careless", [Rule("dropout(x) -> x", match=dropout, replace=operand)], effects=(), doc="")
    program = captured(Function(lambda x: F.dropout(x, 0.5, training=True)), X)
    after, _ = rewritten(careless, program, X)
    with pytest.raises(AssertionError, match="moved by"):
        assert_bitwise_equal(outputs_of(program, X), outputs_of(after, X))
