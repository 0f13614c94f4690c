"""Every rule, broken on purpose, is caught: its numbers made wrong, and each of its requirements left out.

What has to notice are the invariants that `check_pass` and the fuzzer check, on the random models that they draw, or on a model
made for it where those seldom meet the case. A requirement without which nothing goes wrong fails here, unless a table
below says why it is there all the same.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from ir_tools.rewrite import RewriteLog, Rule, rule_pass
from ir_tools.rewrite.build import Ops
from ir_tools.rewrite.rule import Value
from passes import CATALOGUE, Pass
from passes.testing import CaptureRefused, random_models
from passes.testing.search import search
from passes.testing.trial import CaptureIsWrong, Trial, held
from tests.check import captured, rewritten, with_random_statistics

OFF = 1 + 1e-5
"""What broken numbers are multiplied by."""

RULES = [(pass_, rule) for pass_ in CATALOGUE.values() for rule in pass_.rules if not (
    pass_.name == "fold_affine" and rule in CATALOGUE["fuse_conv_bn"].rules)]  # fmt: skip


REQUIREMENTS = [(pass_, rule, condition) for pass_, rule in RULES for condition in (*rule.requires, *rule.when)]


def names(pass_: Pass, rule: Rule) -> str:
    return f"{pass_.name}: {rule.slug}"


class _Wrong:
    """The `op` of a right side whose constants and numbers are a little off."""

    def __init__(self, op: Ops):
        self._op, self.touched = op, False

    def __getattr__(self, name: str) -> Any:
        made = getattr(self._op, name)
        if not callable(made) or name == "decline":
            return made
        return lambda *args, **kwargs: made(*map(self._off, args), **{k: self._off(v) for k, v in kwargs.items()})

    def _off(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._off(v) for v in value]
        if isinstance(value, float) or (isinstance(value, Tensor) and value.is_floating_point() and value.numel()):
            self.touched = True
            return value * OFF
        return value


def with_wrong_numbers(rule: Rule) -> Rule:
    """The rule with its new constants and numbers a little off; without any, its result."""

    @functools.wraps(rule.replace)
    def wrong(**given: Any) -> Any:
        op = _Wrong(given["op"])
        wanted = inspect.signature(rule.replace).parameters
        result = rule.replace(**{name: op if name == "op" else given[name] for name in wanted})
        return result if result is None or op.touched else _moved(given["op"], result)

    parameters = inspect.signature(rule.replace).parameters
    op = [] if "op" in parameters else [inspect.Parameter("op", inspect.Parameter.KEYWORD_ONLY)]
    wrong.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [*(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters.values()), *op]
    )
    return dataclasses.replace(rule, replace=wrong)


def _moved(op: Ops, result: Value) -> Value:
    if result.dtype is not None and result.dtype.is_floating_point:
        return op.mul(result, OFF)
    return op.logical_not(result) if result.dtype is torch.bool else op.add(result, 1)


PHRASES: dict[str, list[str]] = {
    "remove_dropout": ["dropouts"],
    "remove_neutral_ops": ["neutral"],
    "simplify_views": ["layout_chain"],
    "use_stable_forms": ["fragile"],
    "fuse_conv_bn": ["conv_norm", "linear_norm", "unbatched_conv_norm"],
    "fold_affine": ["affine_after"],
    "fuse_bn_conv": ["norm_conv", "norm_linear"],
    "fold_input_affine": ["affine_before"],
    "merge_linear_chains": ["linear_linear", "conv_pointwise", "pointwise_conv"],
    "fuse_conv_relu": ["layer_activation", "two_layers_summed"],
    "fuse_attention": ["attention"],
}
"""What random models are made of where a pass of rules is to find work."""

LOWERED = (CATALOGUE["lower_onednn"].with_options(variant="fused"),)
BEHIND = {"fuse_conv_relu": LOWERED}
"""What runs behind a broken pass: a wrong fused op may show in its kernel alone."""


class Trap(nn.Module):
    """A model on which a rule goes wrong, or would without one of its requirements."""

    def __init__(self, function: Callable[..., Any], **parts: Any):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.register_buffer(name, part) if isinstance(part, Tensor) else self.add_module(name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1), -1) @ v


X, CUBE = torch.randn(2, 3, 4), torch.randn(3, 3, 3)
PLANE, POINTS = torch.randn(2, 3, 5, 5), torch.tensor([[-1.0, -0.0], [2.0, 3.0]])
HIDDEN = torch.zeros(3, 3).index_fill(0, torch.tensor([1]), -torch.inf)

FIRES: dict[str, tuple[Callable[..., Any], dict[str, Any], tuple[Tensor, ...]]] = {
    "permutation": (lambda m, x: x.exp().permute(0, 1, 2).sin(), {}, (X,)),
    "softmax_below_the_largest": (lambda m, x: torch.softmax(x - x.amax(-1, keepdim=True), -1), {}, (X.double(),)),
    "negated_layer": (lambda m, x: -m.layer(x), {"layer": nn.Linear(4, 3).double()}, (X.double(),)),
    "layer_of_negation": (lambda m, x: m.layer(-x), {"layer": nn.Linear(4, 3).double()}, (X.double(),)),
}
"""Models for rules that random ones seldom meet."""

TRAPS: dict[tuple[str, str], tuple[Callable[..., Any], dict[str, Any], tuple[Tensor, ...]]] = {
    ("dropout", "dropout_is_off"): (lambda m, x: F.dropout(x.exp(), 0.5, training=True).sin(), {}, (X,)),
    ("product_or_quotient", "constant_is_one"): (lambda m, x: (x.exp() * 2).sin(), {}, (X,)),
    ("sum_or_difference", "constant_is_zero"): (lambda m, x: (x.exp() - 2).sin(), {}, (X,)),
    ("product_or_quotient", "is_real"):
        (lambda m, x: torch.view_as_real(torch.view_as_complex(x.neg()) * m.c), {"c": torch.ones((), dtype=torch.complex64)},
         (torch.tensor([[1.0, torch.inf]]),)),
    ("sum_or_difference", "is_real"): (lambda m, x: (torch.view_as_complex(x) + 0).angle(), {}, (POINTS,)),
    ("sum_or_difference", "keeps_the_sign_of_zero"): (lambda m, x: 1 / (x + 0), {}, (POINTS,)),
    ("softmax_by_hand", "sum_is_over_one_axis"): (lambda m, x: (lambda e: e / e.sum((1, 2), keepdim=True))(x.exp()), {}, (X,)),
    ("softmax_below_the_largest", "largest_is_of_the_same_axis"):
        (lambda m, x: torch.softmax(x - x.amax(0, keepdim=True), -1), {}, (X,)),
    ("moved_linear_then_batch_norm", "batch_norm_is_frozen"):
        (lambda m, x: m.norm(m.layer(x).transpose(1, 2)),
         {"layer": nn.Linear(4, 3), "norm": nn.BatchNorm1d(3, track_running_stats=False)}, (X,)),
    ("moved_linear_then_batch_norm", "features_become_the_second_axis"):
        (lambda m, x: m.norm(m.layer(x).transpose(0, 1)), {"layer": nn.Linear(3, 3), "norm": nn.BatchNorm1d(3)}, (CUBE,)),
    ("conv_plus_residual", "summands_are_alike"):
        (lambda m, x, r: m.layer(x) + r, {"layer": nn.Conv2d(3, 4, 3)}, (PLANE, torch.randn(4, 1, 1))),
    ("linear_plus_residual", "summands_are_alike"):
        (lambda m, x, r: m.layer(x) + r, {"layer": nn.Linear(4, 3)}, (X, torch.randn(3, 1))),
    ("attention", "each_row_sees_something"):
        (lambda m, x: torch.nan_to_num(torch.softmax(x @ x.transpose(1, 2) + m.mask, -1) @ x, nan=1.0), {"mask": HIDDEN}, (X,)),
    ("attention", "factors_are_numbers"): (lambda m, x: by_hand(x * m.c, x, x), {"c": torch.randn(4)}, (X,)),
    ("attention", "keys_are_transposed"):
        (lambda m, x: torch.softmax(x @ x.transpose(0, 1), -1) @ x, {}, (CUBE,)),
    ("conv_of_pointwise", "neither_is_grouped"):
        (lambda m, x: m.layer(m.first(x)), {"first": nn.Conv2d(4, 8, 1), "layer": nn.Conv2d(8, 2, 3, groups=2)},
         (torch.randn(1, 4, 5, 5),)),
}  # fmt: skip
"""Models that go wrong without a requirement, where random ones seldom do."""

HELD_BY_THE_ENGINE = {
    "the_input_is_not_widened": (lambda m, x: m.layer(x * m.c), {"layer": nn.Conv2d(3, 4, 3), "c": torch.randn(3, 1, 1)},
                                 (PLANE[:, :1],)),
    "looks_alike": (lambda m, x: x[1:].exp(), {}, (X,)),
    "nothing_is_padded": (lambda m, x: F.pad(x, (1, 0)).exp(), {}, (X,)),
    "axes_stay": (lambda m, x: x.permute(1, 0, 2).exp(), {}, (X,)),
    "shape_stays": (lambda m, x: x.reshape(4, 6).exp(), {}, (X,)),
    "mask_has_the_dtype": (lambda m, x: torch.softmax(x @ x.transpose(1, 2) + m.mask, -1) @ x,
                           {"mask": torch.randn(3, 3).half()}, (X,)),
    "sum_names_its_axes": (lambda m, x: torch.log(torch.sum(torch.exp(x), [])), {}, (X,)),
    "softmax_is_in_the_dtype": (lambda m, x, v: torch.softmax(x @ x.transpose(1, 2), -1, dtype=torch.float64) @ v, {},
                                (X, X.double())),
}  # fmt: skip
"""Without these a rule is refused all the same, with a less precise reason: a model each."""

HELD_BY_THE_LOWERING = ("summands_are_alike",)
"""Without these the kernel that would be wrong is refused, because its result has another shape."""

SAY_NOTHING_OF_NUMBERS = {
    "it_saves_work": "the merged layer is right, and slower",
    "operands_are_alike": "the fused op broadcasts as well; which of its kernels can is not written down",
    "axes_are_known": "axes that are runtime numbers have no order to join",
    "operand_is_floating": "of whole numbers the functions are the same, where they take any",
}


def is_caught(pass_: Pass, rule: Rule, broken: Rule, trap: tuple | None, examples: int = 150) -> bool:
    """An invariant is broken on a model, when `broken` stands where `rule` is in the pass."""
    wrong = with_rule(pass_, rule, broken)
    pipeline = (wrong, *BEHIND.get(pass_.name, ()))
    if trap is not None:
        return breaks(pipeline, trap)
    models = random_models(PHRASES[pass_.name], dtypes=(torch.float64, torch.float32), most=2)
    trials = st.builds(Trial, models, st.just(pipeline), st.just("trace"))
    _, failure = search(
        trials, Trial.run, examples=examples, seed=0, shrink_seconds=0,
        expected=lambda failure: isinstance(failure.error, (CaptureRefused, CaptureIsWrong)),
    )  # fmt: skip
    return failure is not None


def with_rule(pass_: Pass, rule: Rule, other: Rule) -> Pass:
    rules = [other if each is rule else each for each in pass_.rules]
    return rule_pass(pass_.name, rules, effects=pass_.effects, doc=pass_.doc)


def breaks(pipeline: tuple[Pass, ...], trap: tuple) -> bool:
    function, parts, inputs = trap
    try:
        held(with_random_statistics(Trap(function, **copy.deepcopy(parts))), inputs, pipeline, (), "trace")
    except (CaptureRefused, CaptureIsWrong):
        raise
    except Exception:  # an invariant, or a crash of the broken rule
        return True
    return False


def without(rule: Rule, requirement: Callable) -> Rule:
    return dataclasses.replace(
        rule, **{name: [q for q in getattr(rule, name) if q is not requirement] for name in ("requires", "when")}
    )


@pytest.mark.parametrize("pass_, rule", RULES, ids=[names(*each) for each in RULES])
def test_wrong_numbers_are_caught(pass_: Pass, rule: Rule) -> None:
    trap = FIRES.get(rule.slug)
    assert trap is None or not breaks((pass_,), trap)
    assert is_caught(pass_, rule, with_wrong_numbers(rule), trap)


CHECKED = [each for each in REQUIREMENTS if each[2].__name__ not in {*HELD_BY_THE_ENGINE, *SAY_NOTHING_OF_NUMBERS}
           or (each[1].slug, each[2].__name__) in TRAPS]  # fmt: skip
LOWERING_HOLDS = [each for each in CHECKED if each[2].__name__ in HELD_BY_THE_LOWERING]
CHECKED = [each for each in CHECKED if each not in LOWERING_HOLDS]


@pytest.mark.parametrize(
    "pass_, rule, requirement", CHECKED, ids=[f"{names(p, r)}: {q.__name__}" for p, r, q in CHECKED]
)
def test_a_requirement_left_out_is_caught(pass_: Pass, rule: Rule, requirement: Callable) -> None:
    trap = TRAPS.get((rule.slug, requirement.__name__))
    assert trap is None or not breaks((pass_, *BEHIND.get(pass_.name, ())), trap)
    assert is_caught(pass_, rule, without(rule, requirement), trap)


@pytest.mark.parametrize("pass_, rule, requirement", LOWERING_HOLDS, ids=[names(p, r) for p, r, _ in LOWERING_HOLDS])
def test_what_the_lowering_holds_too_is_refused_there(pass_: Pass, rule: Rule, requirement: Callable) -> None:
    trap = TRAPS[rule.slug, requirement.__name__]
    function, parts, inputs = trap
    broken = with_rule(pass_, rule, without(rule, requirement))
    program = captured(with_random_statistics(Trap(function, **copy.deepcopy(parts))), *inputs)
    log = RewriteLog()
    LOWERED[0](broken(program), log=log)
    reasons = [refusal.reason for refusal in log.refusals]
    assert len(reasons) == 1 and reasons[0].startswith("oneDNN layers: the result would change shape from "), reasons
    assert not breaks((broken, *BEHIND[pass_.name]), trap)


@pytest.mark.parametrize("name", HELD_BY_THE_ENGINE)
def test_what_the_engine_holds_too_is_refused(name: str) -> None:
    function, parts, inputs = HELD_BY_THE_ENGINE[name]
    for pass_, rule, requirement in REQUIREMENTS:
        if requirement.__name__ == name:
            wrong = with_rule(pass_, rule, without(rule, requirement))
            program = captured(Trap(function, **copy.deepcopy(parts)).eval(), *inputs)
            after, _ = rewritten(wrong, program, *inputs)
            assert after is program


def test_every_exception_is_one() -> None:
    """The tables name rules and requirements that there are."""
    known = {(rule.slug, requirement.__name__) for _, rule, requirement in REQUIREMENTS}
    assert set(TRAPS) <= known and set(FIRES) <= {rule.slug for _, rule in RULES}
    named = {*HELD_BY_THE_ENGINE, *HELD_BY_THE_LOWERING, *SAY_NOTHING_OF_NUMBERS}
    assert named <= {name for _, name in known} and len(LOWERING_HOLDS) == 2
    assert set(PHRASES) == {pass_.name for pass_, _ in RULES}
