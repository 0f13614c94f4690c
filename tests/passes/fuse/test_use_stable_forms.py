"""Using stable forms, which neither overflow nor cancel: it rewrites, it refuses, the numbers agree, and stay finite."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passes import CATALOGUE, NumericsError, optimize, rule_pass
from tests.check import assert_numbers_agree, assert_same_graph, assert_sites_can_be_skipped, captured, rewritten

use_stable_forms = CATALOGUE["use_stable_forms"]
source = importlib.import_module("passes.fuse.use_stable_forms")

EXACT = 1e-10
X = torch.randn(3, 4, 5, dtype=torch.float64)
LARGE = torch.tensor([[1000.0, 1000.0, 999.0], [1.0, 2.0, -3.0]])


class Function(nn.Module):
    def __init__(self, function: Callable):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor):
        return self.function(x)


def shared_exp(x: Tensor) -> Tensor:
    e = x.exp()
    return e / e.sum(1, keepdim=True)


PAIRS: dict[str, tuple[Callable, Callable]] = {
    "log softmax": (lambda x: x.softmax(-1).log(), lambda x: x.log_softmax(-1)),
    "softmax": (shared_exp, lambda x: x.softmax(1)),
    "softmax, exp twice": (lambda x: x.exp() / x.exp().sum([-1], True), lambda x: x.softmax(-1)),
    "softmax below amax": (lambda x: shared_exp(x - x.amax(1, keepdim=True)), lambda x: x.softmax(1)),
    "softmax below max": (lambda x: shared_exp(x - x.max(1, keepdim=True)[0]), lambda x: x.softmax(1)),
    "softmax of a softmax's operand": (lambda x: (x - x.amax(-1, True)).softmax(2), lambda x: x.softmax(2)),
    "log of softmax by hand": (lambda x: shared_exp(x).log(), lambda x: x.log_softmax(1)),
    "logsumexp": (lambda x: x.exp().sum(1).log(), lambda x: x.logsumexp([1])),
    "logsumexp over two": (lambda x: x.exp().sum([0, -1], keepdim=True).log(), lambda x: x.logsumexp([0, -1], True)),
    "log1p": (lambda x: (1 + x.abs()).log(), lambda x: x.abs().log1p()),
    "expm1": (lambda x: x.exp() - 1, lambda x: x.expm1()),
    "log sigmoid": (lambda x: x.sigmoid().log(), lambda x: F.logsigmoid(x)),
}


def check_stable(name: str, pass_=use_stable_forms) -> None:
    fragile, _ = PAIRS[name]
    after, log = rewritten(pass_, captured(Function(fragile), X), X)
    assert log.rewrites
    assert_numbers_agree(Function(fragile), after, X, within=EXACT)


@pytest.mark.parametrize("name", PAIRS)
def test_the_numbers_agree(name: str) -> None:
    check_stable(name)


@pytest.mark.parametrize("frontend", ["trace", "export"])
@pytest.mark.parametrize("name", PAIRS)
def test_the_graph_is_the_stable_form(name: str, frontend: str) -> None:
    fragile, stable = PAIRS[name]
    after, _ = rewritten(use_stable_forms, captured(Function(fragile), X, frontend=frontend), X)
    assert_same_graph(after, Function(stable), X, frontend=frontend)


FRAGILE: dict[str, tuple[Callable, Tensor, Callable]] = {
    "softmax": (PAIRS["softmax, exp twice"][0], LARGE, lambda x: x.softmax(-1)),
    "log softmax": (PAIRS["log softmax"][0], torch.tensor([[200.0, 0.0, 1.0], [1.0, 2.0, -3.0]]), lambda x: x.log_softmax(-1)),
    "logsumexp": (lambda x: x.exp().sum(1).log(), LARGE, lambda x: x.logsumexp(1)),
    "log sigmoid": (PAIRS["log sigmoid"][0], torch.tensor([-200.0, 1.0]), F.logsigmoid),
}


@pytest.mark.parametrize("engine", ["aten", "onednn_ops"])
@pytest.mark.parametrize("name", FRAGILE)
def test_a_model_that_overflows_comes_out_finite(name: str, engine: str) -> None:
    if engine == "onednn_ops" and not torch.backends.mkldnn.is_available():
        pytest.skip("no oneDNN")
    function, x, stable = FRAGILE[name]
    model = Function(function).eval()
    assert not model(x).isfinite().all()
    fast = optimize(model, "use_stable_forms", example_inputs=x, engine=engine, frontend="trace")
    assert fast(x).isfinite().all()
    torch.testing.assert_close(fast(x), stable(x.double()).float())
    step = next(step for step in fast.report.steps if step.name == "use_stable_forms")
    assert step.tolerance == "SQNR >= 80 dB, where the model gives no NaN or Inf"


def test_a_pass_that_does_not_declare_it_fails() -> None:
    function, x, _ = FRAGILE["softmax"]
    undeclared = rule_pass("undeclared", use_stable_forms.rules, effects={"rounds"}, doc="")
    with pytest.raises(NumericsError, match="differs where the reference is NaN or Inf"):
        optimize(Function(function).eval(), undeclared, example_inputs=x, frontend="trace")
    both = optimize(Function(function).eval(), ["use_stable_forms", undeclared], example_inputs=x, frontend="trace")
    assert both(x).isfinite().all()


def test_it_holds_for_the_steps_behind() -> None:
    function, x, _ = FRAGILE["softmax"]
    linear = nn.Sequential(nn.Linear(3, 3), Function(function)).eval()
    with torch.no_grad():
        linear[0].weight.copy_(torch.eye(3))
        linear[0].bias.zero_()
    fast = optimize(linear, ["use_stable_forms", "cast_half"], example_inputs=x, frontend="trace")
    assert fast(x).isfinite().all()


def test_nothing_to_compare_is_a_failure() -> None:
    function, _, _ = FRAGILE["softmax"]
    with pytest.raises(NumericsError, match="the reference is NaN or Inf throughout"):
        optimize(Function(function).eval(), "use_stable_forms", example_inputs=LARGE[:1, :2], frontend="trace")


@pytest.mark.parametrize("function, exact", [("log1p", 1e-9), ("expm1", 1e-9)])
def test_small_values_keep_their_bits(function: str, exact: float) -> None:
    x = torch.full((1, 2, 3), exact)
    after = use_stable_forms(captured(Function(PAIRS[function][0]), x))
    torch.testing.assert_close(after.run(x)[0], x, rtol=1e-6, atol=0)


# -- it refuses ---------------------------------------------------------------------------------------------------------

FLOATING = "requirement not met: The operand is of a floating dtype."
ONE_AXIS = "requirement not met: The sum goes over one axis."
NAMED = "requirement not met: The sum names the axes that it goes over."
SAME_AXIS = "requirement not met: The largest value is taken over the axis of the softmax."

INTS = torch.randint(1, 5, (3, 4))
CUBE = torch.randn(4, 4, 4)

REFUSED: dict[str, tuple[Callable, Tensor, list[str]]] = {
    "log of ints": (lambda x: (1 + x).log(), INTS, [FLOATING]),
    "exp of ints": (lambda x: x.exp() - 1, INTS, [FLOATING]),
    "softmax of ints": (lambda x: x.exp() / x.exp().sum(1, True), INTS, [FLOATING]),
    "logsumexp of ints": (lambda x: x.exp().sum(1).log(), INTS, [FLOATING]),
    "log softmax of ints": (lambda x: x.softmax(-1, dtype=torch.float32).log(), INTS, [FLOATING]),
    "sigmoid of ints": (lambda x: x.sigmoid().log(), INTS, [FLOATING]),
    "two axes": (lambda x: x.exp() / x.exp().sum([0, 1], True), CUBE, [ONE_AXIS]),
    "all axes": (lambda x: x.exp().sum([], True).log(), CUBE, [NAMED]),
    "the largest of another axis": (lambda x: (x - x.amax(0, True)).softmax(1), CUBE, [SAME_AXIS]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_refuses(name: str) -> None:
    function, x, reasons = REFUSED[name]
    program = captured(Function(function), x)
    after, log = rewritten(use_stable_forms, program, x)
    assert after is program and [refused.reason for refused in log.refusals] == reasons


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.exp() / x.exp().sum(1),  # broadcasts along another axis
        lambda x: x.exp() / x.neg().exp().sum(1, True),
        lambda x: (2 + x).log(),
        lambda x: torch.add(torch.ones_like(x), x, alpha=2).log(),
        lambda x: x.exp() + 1,
        lambda x: (x - x.amax(1)).softmax(1),
        lambda x: (x - x.max(1, keepdim=True)[1]).softmax(1),
        lambda x: x.exp().sum(1, dtype=torch.float64).log(),
    ],
)
def test_what_differs_does_not_fit(function: Callable) -> None:
    program = captured(Function(function), CUBE)
    after, log = rewritten(use_stable_forms, program, CUBE)
    assert after is program and not log.refusals


def test_an_exp_that_is_read_again_is_refused() -> None:
    program = captured(Function(lambda x: (lambda e: e / e.sum(1, keepdim=True) + e)(x.exp())), X)
    after, log = rewritten(use_stable_forms, program, X)
    assert after is program and "has another user (add" in log.refusals[0].reason


def test_each_site_can_be_skipped() -> None:
    model = Function(lambda x: (1 + x.abs()).log().exp() - 1)
    assert_sites_can_be_skipped(use_stable_forms, lambda: captured(model, X), X)


# -- the numbers have teeth ---------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[str, Callable]] = {
    "softmax": ("softmax_by_hand", lambda op, x, axes: op.softmax(x, 0, None)),
    "log softmax": ("log_of_softmax", lambda op, x, axis, cast: op.log_softmax(x, 0, cast)),
    "logsumexp": ("log_of_sum_of_exp", lambda op, x, axes, keep: op.sum(x, axes, keep)),
    "log1p": ("log_of_one_more", lambda op, x: op.log(x)),
    "expm1": ("one_less_than_exp", lambda op, x: op.exp(x)),
    "log sigmoid": ("log_of_sigmoid", lambda op, x: op.softplus(x)),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_right_side_is_noticed(name: str) -> None:
    slug, wrong = WRONG[name]
    rules = [replace(rule, replace=wrong) for rule in use_stable_forms.rules if rule.slug == slug]
    with pytest.raises(AssertionError, match="relative error"):
        check_stable(name, rule_pass("wrong", rules, effects=use_stable_forms.effects, doc=""))


@pytest.mark.parametrize("name", ["two axes"])
def test_a_missing_requirement_is_noticed(name: str) -> None:
    function, x, _ = REFUSED[name]
    rules = [replace(rule, requires=()) for rule in use_stable_forms.rules if rule.slug == "softmax_by_hand"]
    careless = rule_pass("careless", rules, effects=use_stable_forms.effects, doc="")
    after, _ = rewritten(careless, captured(Function(function), x), x)
    with pytest.raises(AssertionError, match="relative error"):
        assert_numbers_agree(Function(function), after, x, within=1e-3)
