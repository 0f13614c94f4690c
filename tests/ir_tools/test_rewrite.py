"""The rule engine: the conditions that hold for every rule, sites, and the three shapes of a pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from ir_tools.errors import OptionError
from ir_tools.ir import Program
from ir_tools.ir.dialect import aten, overload_name
from ir_tools.ir.provenance import record
from ir_tools.rewrite import Ops, RewriteLog, Rule, Value, graph_pass, rule_pass, table_pass
from ir_tools.rewrite.apply import EndlessRuleError
from ir_tools.rewrite.match import matches_at
from ir_tools.rewrite.nearest import nearest_miss
from tests.check import assert_bitwise_equal, captured, ops, outputs_of, rewritten
from tests.ir_tools.rewriting import RELU, X, Y, apply, once_relu, pass_of, program_of, twice_relu

# -- the conditions that hold for every rule ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function, reason",
    [
        (lambda m, x: (lambda y: y.relu() + y)(x.relu()), "the result of relu relu has another user (add add)"),
        (lambda m, x: (lambda y: (y.relu(), y))(x.relu()), "has another user (the model's output)"),
    ],
    ids=["an op", "the output"],
)
def test_an_inner_value_with_another_user_is_refused(function: Callable, reason: str) -> None:
    program = program_of(function)
    after, log = apply(RELU, program)
    assert after is program
    (refused,) = log.refusals
    assert refused.reason.endswith(reason)


def test_a_pattern_whose_operand_is_inside_it_is_refused() -> None:
    def sum_of_relu(op, x: Value, y: Value):
        return op.add(op.relu(x), y, ...)

    def other(op, x, y):
        return op.add(x, y)

    rule = Rule("relu(x) + y -> x + y", match=sum_of_relu, replace=other)
    program = program_of(lambda m, x: (lambda y: y + y)(x.relu()))
    after, log = apply(rule, program)
    assert after is program and [r.reason for r in log.refusals] == ["the result of relu relu is read twice by the pattern"]


def test_a_value_written_in_place_is_refused() -> None:
    def function(m: nn.Module, x: Tensor) -> Tensor:
        y = x.relu().relu()
        x[0].add_(1.0)
        return y

    def whole(m: nn.Module, x: Tensor) -> Tensor:
        y = x.relu().relu()
        y[0].add_(1.0)
        return y

    for written in (function, whole):
        program = program_of(written)
        after, log = apply(RELU, program)
        assert after is program
        assert all(r.reason.endswith("is written in place") for r in log.refusals) and log.refusals


def test_a_new_value_of_another_shape_or_dtype_is_refused() -> None:
    def relu(op, x: Value):
        return op.relu(x)

    for replace, reason in (
        (lambda op, x: op.sum(x), "the result would change shape from (3, 4) to ()"),
        (lambda op, x: op.call(aten.to.dtype, x, torch.float64),
         "the result would change dtype from torch.float32 to torch.float64"),
    ):  # fmt: skip
        program = program_of(lambda m, x: x.relu())
        after, log = apply(Rule("relu(x) -> ?", match=relu, replace=replace), program)
        assert after is program and [r.reason for r in log.refusals] == [reason]


def test_requirements_refuse_by_their_sentence_and_unknown_refuses_too() -> None:
    def never(x):
        """It is a Tuesday."""
        return False

    def who_knows(x):
        """The moon is full."""
        return None

    program = program_of(lambda m, x: x.relu().relu())
    for requirement, reason in (
        (never, "requirement not met: It is a Tuesday."),
        (who_knows, "unknown: The moon is full."),
    ):
        rule = Rule("relu(relu(x)) -> relu(x)", match=twice_relu, requires=(requirement,), replace=once_relu)
        after, log = apply(rule, program)
        assert after is program and [r.reason for r in log.refusals] == [reason]


def test_what_an_earlier_rewrite_left_behind_is_no_user() -> None:
    """The dead `relu + 0 y` must not count as a user of y, or a second run would find more to do."""

    def plus_nothing(op, x: Value, y: Value):
        return op.add(x, op.mul(y, 0), ...)

    rule = Rule("x + 0 y -> x", match=plus_nothing, replace=lambda x: x)
    program = program_of(lambda m, x, y: (lambda s: (x + s * 0) * s.relu())(y.relu()), X, Y)
    after, log = rewritten(pass_of(rule, RELU), program, X, Y)
    assert len(log.rewrites) == 2 and sorted(ops(after)) == ["mul", "relu"]


def test_the_overload_is_chosen_by_the_arguments() -> None:
    def relu(op, x: Value):
        return op.relu(x)

    def chain(op: Ops, x: Value) -> Value:
        y = op.clamp(op.pow(op.mul(x, 2), 2), None, 3.0)
        y = op.add(op.add(y, 1), x, alpha=2)
        y = op.sum(op.cat([y, op.maximum(y, x)], 1), -1, keepdim=True)
        return op.expand_as(op.where(op.gt(y, 0.5), y, op.neg(y)), x)

    # Not exact: what is expanded lies otherwise in memory.
    chained = rule_pass("tested", [Rule("relu(x) -> chain", match=relu, replace=chain)], effects={"rounds"}, doc="")
    after = chained(program_of(lambda m, x: x.relu()))
    assert [overload_name(node.target).removeprefix("aten::") for node in after.calls] == [
        "mul.Scalar", "pow.Tensor_Scalar", "clamp", "add.Scalar", "add.Tensor", "maximum", "cat", "sum.dim_IntList",
        "gt.Scalar", "neg", "where.self", "expand_as",
    ]  # fmt: skip
    with pytest.raises(TypeError, match=r"no overload of aten.relu takes \(Call, int\); there are:\naten::relu\(Tensor"):
        pass_of(Rule("r", match=relu, replace=lambda op, x: op.relu(op.exp(x), 3)))(program_of(lambda m, x: x.relu()))


# -- origins, names and sites ------------------------------------------------------------------------------------------


def test_new_nodes_carry_where_they_come_from_and_what_made_them() -> None:
    model = nn.Sequential(nn.ReLU(), nn.ReLU()).eval()
    after, log = apply(RELU, captured(model, X))
    (node,) = after.calls
    assert record(node).passes == ("tested",) and record(node).module == log.rewrites[0].module.replace("0", "1")
    assert (log.rewrites[0].site, log.rewrites[0].module) == ("twice_relu@relu_1", "0")


def test_new_constants_are_named_after_their_module() -> None:
    def linear(op, x: Value, w: Tensor):
        return op.linear(x, w, None, name="linear")

    def with_bias(op, linear, x, w):
        return op.like(linear, x, w.clone(), torch.ones(4))

    model = nn.Sequential(nn.Linear(4, 4, bias=False)).eval()
    after = pass_of(Rule("linear -> linear", match=linear, replace=with_bias))(captured(model, X))
    assert sorted(after.constants) == ["0.bias@tested", "0.weight@tested"]


def test_skipped_sites_are_left_alone_and_not_logged() -> None:
    program = program_of(lambda m, x: x.relu().relu())
    log = RewriteLog.skipping({"twice_relu@relu_1"})
    assert pass_of(RELU)(program, log=log) is program
    assert not log.rewrites and not log.refusals


def test_the_first_rule_that_fits_wins() -> None:
    def relu(op, x: Value):
        return op.relu(x)

    to_sigmoid = Rule("relu -> sigmoid", match=relu, replace=lambda op, x: op.sigmoid(x))
    to_tanh = Rule("relu -> tanh", match=relu, replace=lambda op, x: op.tanh(x))
    program = program_of(lambda m, x: x.relu())
    assert ops(pass_of(to_sigmoid, to_tanh)(program)) == ["sigmoid"]
    assert ops(pass_of(to_tanh, to_sigmoid)(program)) == ["tanh"]


def test_a_rule_that_fits_its_own_result_is_stopped() -> None:
    def relu(op, x: Value):
        return op.relu(x)

    rule = Rule("relu(x) -> relu(x)", match=relu, replace=lambda op, x: op.relu(x))
    with pytest.raises(EndlessRuleError, match=r"after 100 rewrites at relu\w* the rule 'relu\(x\) -> relu\(x\)' still fits"):
        pass_of(rule)(program_of(lambda m, x: x.relu()))


# -- errors that rules make --------------------------------------------------------------------------------------------


def test_mistakes_in_rules_are_named() -> None:
    def nameless(x):
        return True

    def unknown_op(op, x: Value):
        return op.no_such_op(x)

    with pytest.raises(TypeError, match="nameless needs a docstring: it is the reason printed on refusal"):
        Rule("r", match=twice_relu, requires=(nameless,), replace=once_relu)
    with pytest.raises(AttributeError, match="there is no op 'no_such_op' in ATen or in the dialect"):
        Rule("r", match=unknown_op, replace=once_relu)
    with pytest.raises(TypeError, match="must return an op, got int"):
        Rule("r", match=lambda op: 3, replace=once_relu)
    program = program_of(lambda m, x: x.relu().relu())
    with pytest.raises(TypeError, match=r"asks for 'w'; the rule has op, x"):
        pass_of(Rule("r", match=twice_relu, replace=lambda op, w: w))(program)
    with pytest.raises(TypeError, match="must return a Value, got NoneType"):
        pass_of(Rule("r", match=twice_relu, replace=lambda x: None))(program)


# -- tables and whole-graph passes -------------------------------------------------------------------------------------


def test_a_table_replaces_op_by_op_and_says_what_it_declines() -> None:
    def tanh(op: Ops, relu):
        return op.tanh(relu.self)

    def declined(op: Ops, exp):
        return op.decline("too steep")

    table = table_pass("tabled", {aten.relu.default: tanh, aten.exp.default: declined}, effects=(), doc="")
    program = program_of(lambda m, x: x.relu().exp().sigmoid())
    after, log = rewritten(table, program, X)
    assert ops(after) == ["tanh", "exp", "sigmoid"]
    assert [r.site for r in log.rewrites] == ["tabled@relu"]
    assert [(r.site, r.reason) for r in log.refusals] == [("tabled@exp", "too steep")]
    assert table(program, skip={"tabled@relu", "tabled@exp"}) is program


def test_a_table_leaves_values_written_in_place_alone() -> None:
    def function(m: nn.Module, x: Tensor) -> Tensor:
        y = x.relu()
        x[0].add_(1.0)
        return y

    table = table_pass("tabled", {aten.relu.default: lambda op, relu: op.tanh(relu.self)}, effects=(), doc="")
    program = program_of(function)
    after, log = rewritten(table, program, X)
    assert after is program
    assert [r.reason for r in log.refusals] == ["its operands or result are written in place"]


def test_options_of_a_pass() -> None:
    @graph_pass(effects=())
    def chosen(program: Program, log: RewriteLog, *, mode: Literal["a", "b"] = "a", limit: int = 3) -> Program:
        seen.append((mode, limit))
        return program

    seen: list[tuple] = []
    program = program_of(lambda m, x: x.relu())
    assert chosen(program) is program and chosen.with_options(mode="b")(program) is program
    assert seen == [("a", 3), ("b", 3)]
    assert chosen.options == {"mode": "a", "limit": 3} and str(chosen.with_options(mode="b")) == "chosen:mode=b"
    with pytest.raises(OptionError, match="mode must be one of 'a', 'b', got 'c'"):
        chosen.with_options(mode="c")
    with pytest.raises(OptionError, match="has no option 'moed'; it has: mode, limit"):
        chosen.with_options(moed="a")


# -- conditions of the left side, and memory ---------------------------------------------------------------------------


def test_where_a_condition_of_the_left_side_does_not_hold_nothing_is_reported() -> None:
    def product(op, x: Value, c: float):
        return op.mul(x, c)

    def is_one(c):
        """The factor is one."""
        return c == 1

    program = program_of(lambda m, x: (x.exp() * 2).sin())
    spoken = Rule("x * 1 -> x", match=product, requires=(is_one,), replace=lambda x: x)
    silent = Rule("x * 1 -> x", match=product, when=(is_one,), replace=lambda x: x)
    assert [r.reason for r in apply(spoken, program)[1].refusals] == ["requirement not met: The factor is one."]
    assert not apply(silent, program)[1].refusals
    assert nearest_miss(silent, program.calls[1], program) == "matched, but requirement not met: The factor is one."
    after, log = apply(silent, program_of(lambda m, x: (x.exp() * 1).sin()))
    assert ops(after) == ["exp", "sin"] and len(log.rewrites) == 1


def test_a_condition_needs_its_sentence_too() -> None:
    with pytest.raises(TypeError, match="needs a docstring"):
        Rule("wrong", match=twice_relu, when=(lambda x: True,), replace=once_relu)


def test_outputs_get_no_memory_of_inputs_constants_or_each_other() -> None:
    def product(op, x: Value):
        return op.mul(x, 1)

    rule = Rule("x * 1 -> x", match=product, replace=lambda x: x)
    shares = "the model's output would share memory with an input, a constant or another output"
    for function in (
        lambda m, x: x * 1,
        lambda m, x: x.t() * 1,
        lambda m, x: (x * 1)[0],
        lambda m, x: m.c * 1,
        lambda m, x: (lambda y: (y, y * 1))(x.exp()),
    ):
        program = program_of(function, c=torch.randn(4))
        after, log = apply(rule, program)
        assert after is program and [r.reason for r in log.refusals] == [shares]
    for function, left in ((lambda m, x: x.exp() * 1, ["exp"]), (lambda m, x: (x * 1).exp(), ["exp"])):
        assert ops(apply(rule, program_of(function))[0]) == left


def test_one_value_twice_on_the_left_side() -> None:
    def by_hand(op, x: Value, axis: list):
        return op.div(op.exp(x), op.sum(op.exp(x), axis, True, ...))

    rule = Rule("softmax", match=by_hand, replace=lambda op, x, axis: op.softmax(x, axis[0]))
    program = program_of(lambda m, x: (lambda e: e / e.sum(1, keepdim=True))(x.exp()))
    after = rule_pass("tested", [rule], effects={"rounds"}, doc="")(program)
    assert ops(after) == ["softmax"]
    below = program_of(lambda m, x: (lambda e: e / e.sum(1, keepdim=True))((x - 1).exp()))
    (root,) = [node for node in below.calls if overload_name(node.target) == "aten::div.Tensor"]
    match = next(matches_at(rule, root, below))
    assert [overload_name(node.target) for node in match.nodes] == ["aten::div.Tensor", "aten::sum.dim_IntList", "aten::exp"]
    read_elsewhere = program_of(lambda m, x: (lambda e: e / e.sum(1, keepdim=True) + e)(x.exp()))
    assert apply(rule, read_elsewhere)[0] is read_elsewhere


def test_parts_of_what_an_op_gives_are_named_getitem() -> None:
    def values_of_max(op, x: Value):
        return op.getitem(op.max(x, 1, True), 0)

    rule = Rule("max(x)[0] -> amax(x)", match=values_of_max, replace=lambda op, x: op.amax(x, [1], True))
    program = program_of(lambda m, x: x.max(1, keepdim=True)[0].exp())
    after, _ = apply(rule, program)
    assert ops(after) == ["amax", "exp"]
    assert_bitwise_equal(outputs_of(program, X), outputs_of(after, X))
    indices = program_of(lambda m, x: x.max(1, keepdim=True)[1])
    assert apply(rule, indices)[0] is indices
