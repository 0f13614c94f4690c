"""The rule engine: what a left side matches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ir_tools.rewrite import Known, Rule, Value
from tests.check import assert_bitwise_equal, captured, ops, outputs_of, rewritten
from tests.ir_tools.rewriting import RELU, X, Y, apply, pass_of, program_of


def test_a_rule_is_applied_until_it_fits_no_more() -> None:
    program = program_of(lambda m, x: x.relu().relu().relu().relu())
    after, log = apply(RELU, program)
    assert ops(after) == ["relu"] and len(log.rewrites) == 3
    assert_bitwise_equal(outputs_of(program, X), outputs_of(after, X))


def test_a_program_in_which_nothing_fits_comes_back_itself() -> None:
    program = program_of(lambda m, x: x.relu().exp().relu())
    after, log = apply(RELU, program)
    assert after is program and not log.rewrites and not log.refusals


def test_an_unknown_that_comes_twice_must_be_one_value() -> None:
    def same(op, x: Value):
        return op.add(x, x, ...)

    def doubled(op, x):
        return op.mul(x, 2)

    rule = Rule("x + x -> 2 x", match=same, replace=doubled)
    assert ops(apply(rule, program_of(lambda m, x: x + x))[0]) == ["mul"]
    program = program_of(lambda m, x, y: x + y, X, Y)
    assert apply(rule, program, X, Y)[0] is program


def test_literals_must_be_equal_and_unknown_literals_are_bound() -> None:
    def softmax_of_last(op, x: Value):
        return op.softmax(x, -1, ...)

    def clamped(op, x: Value, low: float):
        return op.clamp(x, low, None)

    def leaky(op, x, low):
        return op.clamp(x, low, low + 1)

    last = Rule("softmax(x, -1) -> x", match=softmax_of_last, replace=lambda x: x)
    assert ops(apply(last, program_of(lambda m, x: x.exp().softmax(-1)))[0]) == ["exp"]
    program = program_of(lambda m, x: x.softmax(0))
    assert apply(last, program)[0] is program
    bound = Rule("clamp(x, low) -> clamp(x, low, low + 1)", match=clamped, replace=leaky)
    after = pass_of(bound)(program_of(lambda m, x: x.clamp(min=0.25)))
    assert_bitwise_equal([X.clamp(0.25, 1.25)], outputs_of(after, X))


def test_arguments_that_the_pattern_leaves_out_must_be_dots() -> None:
    def without_dots(op, x: Value, y: Value):
        return op.add(x, y)

    def with_dots(op, x: Value, y: Value):
        return op.add(x, y, ...)

    program = program_of(lambda m, x, y: x.exp() + y, X, Y)
    for match in (without_dots, with_dots):  # alpha is keyword-only: both fit
        rule = Rule("x + y -> x", match=match, replace=lambda x: x)
        assert ops(pass_of(rule)(program)) == ["exp"]


def test_optional_and_constant_operands() -> None:
    def linear(op, x: Value, w: Tensor, b: Tensor | None):
        return op.linear(x, w, b)

    def product(op, x, w, b):
        y = op.matmul(x, w.t().contiguous())
        return y if b is None else op.add(y, b)

    rule = Rule("linear(x, w, b) -> x w' + b", match=linear, replace=product)
    for model in (nn.Linear(4, 4), nn.Linear(4, 4, bias=False)):
        program = captured(model.eval(), X)
        after, _ = apply(rule, program)
        assert ops(after) == (["matmul"] if model.bias is None else ["matmul", "add"])
        torch.testing.assert_close(outputs_of(after, X), outputs_of(program, X))


def test_a_value_where_a_constant_is_wanted_is_refused_by_name() -> None:
    def linear(op, x: Value, w: Tensor, b: Tensor | None):
        return op.linear(x, w, b)

    rule = Rule("linear(x) -> x", match=linear, replace=lambda x: x)
    program = program_of(lambda m, x, w: torch.nn.functional.linear(x, w), X, torch.randn(4, 4))
    after, log = apply(rule, program, X, torch.randn(4, 4))
    assert after is program and [r.reason for r in log.refusals] == ["known at run time only: w"]


def test_sums_and_products_fit_in_either_order() -> None:
    def relu_plus(op, x: Value, y: Value):
        return op.add(op.relu(x), y, ...)

    rule = Rule("relu(x) + y -> x + y", match=relu_plus, replace=lambda op, x, y: op.add(x, y))
    for function in (lambda m, x, y: x.relu() + y, lambda m, x, y: y + x.relu()):
        assert ops(apply(rule, program_of(function, X, Y), X, Y)[0]) == ["add"]
    scaled = program_of(lambda m, x, y: torch.add(y, x.relu(), alpha=2), X, Y)
    assert apply(rule, scaled, X, Y)[0] is scaled
    difference = Rule("relu(x) - y -> y", match=lambda op, x, y: op.sub(op.relu(x), y, ...), replace=lambda y: y)
    program = program_of(lambda m, x, y: y - x.relu(), X, Y)
    assert apply(difference, program, X, Y)[0] is program


def test_the_second_order_is_tried_where_the_first_is_refused() -> None:
    """The first summand is a relu that is read twice; the second one is free."""

    def relu_plus(op, x: Value, y: Value):
        return op.add(op.relu(x), y, ...)

    rule = Rule("relu(x) + y -> x + y", match=relu_plus, replace=lambda op, x, y: op.add(x, y))
    program = program_of(lambda m, x, y: (lambda r: (r + y.relu(), r.exp()))(x.relu()), X, Y)
    after, log = apply(rule, program, X, Y)
    assert sorted(ops(after)) == ["add", "exp", "relu"] and len(log.rewrites) == 1
    both = program_of(lambda m, x, y: (lambda r, s: (r + s, r.exp(), s.exp()))(x.relu(), y.relu()), X, Y)
    after, log = apply(rule, both, X, Y)
    assert after is both and len(log.refusals) == 1  # one site, one reason: that of the order as written


def test_alternatives_are_tried_in_order_and_may_name_nothing() -> None:
    def exp_of_relu_or_not(op, x: Value):
        return op.exp(op.one_of(op.relu(x, name="relu"), op.sigmoid(x), x))

    def marked(op, relu, x):
        return op.neg(x) if relu is not None else op.sin(x)

    rule = Rule("exp(relu?(x)) -> ...", match=exp_of_relu_or_not, replace=marked)
    assert ops(apply(rule, program_of(lambda m, x: x.relu().exp()))[0]) == ["neg"]
    assert ops(apply(rule, program_of(lambda m, x: x.sigmoid().exp()))[0]) == ["sin"]
    assert ops(apply(rule, program_of(lambda m, x: x.exp()))[0]) == ["sin"]
    # Read twice, the relu cannot go; as the operand of a lone exp it may stay.
    after, _ = apply(rule, program_of(lambda m, x: (lambda r: (r.exp(), r))(x.relu())))
    assert ops(after) == ["relu", "sin"]


def test_a_root_may_have_alternatives() -> None:
    def either(op, x: Value):
        return op.one_of(op.relu(x), op.exp(x))

    rule = Rule("relu(x) or exp(x) -> x", match=either, replace=lambda x: x)
    assert ops(apply(rule, program_of(lambda m, x: x.relu().exp().sin()))[0]) == ["sin"]
    with pytest.raises(TypeError, match="either_value must return an op"):
        def either_value(op, x: Value):
            return op.one_of(op.relu(x), x)

        Rule("r", match=either_value, replace=lambda x: x)


def test_variadic_operands() -> None:
    def joined(op, xs: list[Value]):
        return op.cat(xs, 1)

    def joined_relus(op, x: Value):
        return op.cat(op.each(op.relu(x, name="relu")), ...)

    def of_one(op, x: Value):
        return op.cat([x], ...)

    def relu_of_all(op, relu, x):
        assert len(relu) == len(x) >= 2
        return op.relu(op.cat(x, 0))

    backwards = Rule("cat(xs) -> cat(reversed xs)", match=joined, replace=lambda op, xs: op.neg(op.cat(xs[::-1], -1)))
    after, _ = apply(backwards, program_of(lambda m, x, y: torch.cat([x, y, x], 1), X, Y), X, Y)
    assert_bitwise_equal([-torch.cat([X, Y, X], 1)], outputs_of(after, X, Y))
    outside = Rule("cat(relu(x)...) -> relu(cat(x...))", match=joined_relus, replace=relu_of_all)
    after, _ = apply(outside, program_of(lambda m, x, y: torch.cat([x.relu(), y.relu()]), X, Y), X, Y)
    assert ops(after) == ["cat", "relu"]
    mixed = program_of(lambda m, x, y: torch.cat([x.relu(), y.exp()]), X, Y)
    assert apply(outside, mixed, X, Y)[0] is mixed
    read_twice = program_of(lambda m, x, y: (lambda r: (torch.cat([r, y.relu()]), r))(x.relu()), X, Y)
    after, log = apply(outside, read_twice, X, Y)
    assert after is read_twice and "has another user" in log.refusals[0].reason
    alone = Rule("cat([x]) -> x", match=of_one, replace=lambda x: x)
    assert ops(apply(alone, program_of(lambda m, x: torch.cat([x]).exp()))[0]) == ["exp"]
    two = program_of(lambda m, x, y: torch.cat([x, y]), X, Y)
    assert apply(alone, two, X, Y)[0] is two


def test_annotations_say_what_fits() -> None:
    def shifted(op, x: Value, c: Known | float):
        return op.add(x, c, ...)

    rule = Rule("x + c -> x", match=shifted, replace=lambda op, x, c: op.mul(x, float(c)))
    row = {"c": torch.tensor(2.0)}
    assert ops(apply(rule, program_of(lambda m, x: x + m.c, **row))[0]) == ["mul"]
    assert ops(apply(rule, program_of(lambda m, x: m.c + x, **row))[0]) == ["mul"]
    assert ops(apply(rule, program_of(lambda m, x: x + 2))[0]) == ["mul"]
    run = program_of(lambda m, x, y: x + y, X, Y)
    after, log = apply(rule, run, X, Y)
    assert after is run and not log.refusals  # a `Tensor` would have refused

    def flag(op, x: Value, keep: int):
        return op.sum(x, [0], keep, ...)

    with_flag = Rule("r", match=flag, replace=lambda x: x)
    program = program_of(lambda m, x: x.sum(0, keepdim=True))
    assert apply(with_flag, program)[0] is program  # a bool is no int
    with pytest.raises(TypeError, match=r"c: list\[int\] is no annotation of an unknown"):
        def wrong(op, c: list[int]):
            return op.relu(c)

        Rule("r", match=wrong, replace=lambda c: c)


def test_a_right_side_may_decline_and_leaves_nothing_behind() -> None:
    """What it built before does not count as a user of its operands: the rule behind it still finds one user."""

    def exp(op, x: Value):
        return op.exp(x)

    def after_all_not(op, x):
        op.neg(op.sin(x))
        return op.decline("changed its mind")

    mind = Rule("exp(x) -> ?", match=exp, replace=after_all_not)
    program = program_of(lambda m, x: x.exp())
    after, log = apply(mind, program)
    assert after is program and [r.reason for r in log.refusals] == ["changed its mind"]
    program = program_of(lambda m, x: (lambda y: (y.relu(), y))(x.relu().exp()))
    after, _ = rewritten(pass_of(mind, RELU), program, X)
    assert after is program


def test_rules_are_tried_again_when_a_later_rewrite_removed_a_user() -> None:
    """relu(relu(x)) is met first, while `relu(x) + 0 y` still reads the inner one."""

    def minus_itself(op, x: Value):
        return op.exp(op.sub(x, x, ...))

    program = program_of(lambda m, x, y: (lambda r: (r.relu(), (r - r).exp() + y))(x.relu()), X, Y)
    ones = Rule("exp(x - x) -> 1", match=minus_itself, replace=lambda op, x: op.ones_like(x))
    after, log = rewritten(pass_of(RELU, ones), program, X, Y)
    assert "ones_like" in ops(after) and log.rewrites
