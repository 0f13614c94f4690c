"""The pipeline: what users write, order rules, hooks, verification with teeth, dry runs, and rules of their own."""

from __future__ import annotations

import json
import math
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ir_tools.ir import Draft, Program
from ir_tools.rewrite import RewriteLog
from passes import (
    CATALOGUE,
    DEFAULT,
    GROUPS,
    NumericsError,
    OptionError,
    Pass,
    PassOrderError,
    Report,
    Rule,
    UnknownPassError,
    Value,
    graph_pass,
    optimize,
    rule_pass,
)
from passes.driver.catalogue import find_passes
from passes.driver.instrumentation import timed
from passes.driver.pipeline import check_order, order_rules, plan
from passes.driver.step import Step, run_pass, run_steps, wrap
from tests.check import captured, ops, with_random_statistics

ONEDNN = torch.backends.mkldnn.is_available()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.drop, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(F.relu(self.bn(self.conv(x)))).mean((2, 3)))


def net() -> nn.Module:
    return with_random_statistics(Net())


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))  # made before any test seeds


def names(passes: list[Pass]) -> list[str]:
    return [str(p) for p in passes]


# -- what users write ---------------------------------------------------------------------------------------------------


def test_names_groups_options_and_objects_are_found_in_order() -> None:
    mine = rule_pass("mine", [], effects=(), doc="")
    found = find_passes(["remove_dropout", mine, "cast_half:dtype=float16:level=O1"])
    assert names(found) == ["remove_dropout", "mine", "cast_half:dtype=float16:level=O1"]
    assert found[1] is mine and found[2].given == {"dtype": "float16", "level": "O1"}
    assert names(find_passes("fuse_conv_bn_relu")) == list(GROUPS["fuse_conv_bn_relu"])
    assert names(find_passes(["fuse_conv_bn", "fuse_conv_bn_relu"])) == [
        "fuse_conv_bn", "fold_constants", "remove_dropout", "fold_affine", "fuse_conv_relu",
    ]  # fmt: skip
    assert find_passes(CATALOGUE["cast_half"]) == [CATALOGUE["cast_half"]]


def test_what_the_user_repeats_runs_again() -> None:
    found = find_passes(["fuse_conv_bn_relu", "fold_constants", "fuse_conv_bn_relu", "fold_constants"])
    assert names(found) == [*GROUPS["fuse_conv_bn_relu"], "fold_constants", "fold_constants"]
    report = optimize(net(), ["fold_constants", "remove_dropout", "fold_constants"], example_inputs=X).report
    assert [s.name for s in report.steps][:3] == ["fold_constants", "remove_dropout", "fold_constants"]
    with pytest.raises(PassOrderError, match="fuse_conv_bn must come before cast_half"):
        check_order(find_passes(["fuse_conv_bn", "cast_half", "fuse_conv_bn"]))


def test_the_default_changes_no_precision_and_is_in_order() -> None:
    found = find_passes(DEFAULT)
    check_order(found)
    assert all(p.effects <= {"rounds"} for p in found)


@pytest.mark.parametrize(
    "wanted, message",
    [
        ("fuse_conv_bm", "there is no pass 'fuse_conv_bm'; did you mean fuse_conv_bn"),
        ("cast_hlaf:dtype=float16", "there is no pass 'cast_hlaf'; did you mean cast_half"),
        ("zzz", "there is no pass 'zzz'; there are: fold_constants, "),
        ([3], "a pass is a name or a Pass object, got int: 3"),
    ],
)
def test_unknown_passes_are_named_and_the_nearest_listed(wanted, message: str) -> None:
    with pytest.raises(UnknownPassError) as error:
        find_passes(wanted)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "wanted, message",
    [
        ("cast_half:float16", "an option is written name=value, got 'float16' in 'cast_half:float16'"),
        ("cast_half:dtype=int8", "cast_half: dtype must be one of 'bfloat16', 'float16', got 'int8'"),
        ("cast_half:width=16", "the pass cast_half has no option 'width'; it has: dtype, level"),
        ("fuse_conv_bn:eps=1", "the pass fuse_conv_bn has no option 'eps'; it has: none"),
        ("fuse_conv_bn_relu:level=O1", "the group 'fuse_conv_bn_relu' has no options; give them to one of its passes"),
    ],
)
def test_wrong_options_are_explained(wanted: str, message: str) -> None:
    with pytest.raises(OptionError) as error:
        find_passes(wanted)
    assert message in str(error.value)


# -- order --------------------------------------------------------------------------------------------------------------


RULES = order_rules(CATALOGUE.values())


@pytest.mark.parametrize("first, second, why", RULES, ids=[f"{a}-{b}" for a, b, _ in RULES])
def test_every_order_rule_is_checked_and_gives_its_reason(first: str, second: str, why: str) -> None:
    check_order([CATALOGUE[first], CATALOGUE[second]])
    with pytest.raises(PassOrderError) as error:
        plan([second, first], "auto")
    message = str(error.value)
    assert message.startswith(f"{first} must come before {second}: {why}. Given: {second}, {first}")
    proposed = message.split("An order that works: ")[1].split(", ")
    check_order([CATALOGUE[name] for name in proposed])


def test_the_proposed_order_works_for_all_passes_at_once() -> None:
    with pytest.raises(PassOrderError) as error:
        check_order([CATALOGUE[name] for name in reversed(list(CATALOGUE)) if name != "lower_aten"])
    proposed = str(error.value).split("An order that works: ")[1].split(", ")
    assert len(proposed) == len(CATALOGUE) - 1
    check_order([CATALOGUE[name] for name in proposed])


def test_dead_code_goes_before_any_lowering() -> None:
    assert names(plan("fuse_conv_bn", "auto")) == ["fuse_conv_bn", "remove_dead_code"]
    assert names(plan(["fuse_conv_bn", "lower_aten"], "auto")) == ["fuse_conv_bn", "remove_dead_code", "lower_aten"]
    assert names(plan(["remove_dead_code", "fuse_conv_bn"], "auto")) == ["remove_dead_code", "fuse_conv_bn"]


# -- engines ------------------------------------------------------------------------------------------------------------


def last_step(**options) -> str:
    report = optimize(net(), dry_run=True, example_inputs=X, frontend="trace", **options)
    lowering, *after = [step.name for step in report.steps if step.name.startswith("lower_") or step.name == "follow_inputs"]
    assert report.engine == CATALOGUE[lowering].target.name
    assert after == (["follow_inputs"] if report.engine == "aten" else [])
    return lowering


def test_the_engine_decides_the_lowering() -> None:
    assert last_step(engine="aten") == "lower_aten"
    assert last_step(passes=["fuse_conv_bn", "lower_aten"]) == "lower_aten"
    assert last_step() == ("lower_onednn" if ONEDNN else "lower_aten")
    if ONEDNN:
        assert last_step(engine="onednn_ops") == "lower_onednn"


def test_engines_that_contradict_or_do_not_exist_are_refused() -> None:
    with pytest.raises(OptionError, match="the pass lower_aten stands for engine='aten', but engine='onednn_ops' was given"):
        plan(["lower_aten"], "onednn_ops")
    with pytest.raises(OptionError, match=r"engine must be one of 'auto', 'aten', .*, got 'tpu'"):
        plan([], "tpu")


# -- hooks --------------------------------------------------------------------------------------------------------------


def test_hooks_wrap_a_step_the_first_one_outermost() -> None:
    heard: list[str] = []

    def hook(name: str):
        def wrapping(run):
            def wrapped(step: Step, program: Program) -> Program:
                heard.append(f"{name} before {step.pass_.name}")
                after = run(step, program)
                heard.append(f"{name} after {step.pass_.name}")
                return after

            return wrapped

        return wrapping

    program = captured(net(), X)
    passes = [CATALOGUE["remove_dropout"], CATALOGUE["fuse_conv_bn"]]
    after, steps = run_steps(program, passes, [hook("outer"), hook("inner"), timed])
    assert heard == [
        f"{who} {when} {name}"
        for name in ("remove_dropout", "fuse_conv_bn")
        for who, when in (("outer", "before"), ("inner", "before"), ("inner", "after"), ("outer", "after"))
    ]
    assert [len(step.report.rewrites) for step in steps] == [1, 1]
    assert [(step.report.nodes_before, step.report.nodes_after) for step in steps] == [(6, 5), (5, 4)]
    assert ops(after) == ["conv2d", "relu", "mean", "linear"]
    assert wrap(run_pass, [])(Step(1, passes[0]), program) is not program


def test_progress_is_reported_in_order() -> None:
    lines: list[str] = []
    optimize(net(), ["remove_dropout", "cast_half:level=O1"], example_inputs=X, engine="aten", progress=lines.append)
    steps = [line for line in lines if line.split(":")[0] in CATALOGUE]
    assert steps == ["remove_dropout", "cast_half:level=O1", "remove_dead_code", "lower_aten", "follow_inputs"]


def test_an_ill_formed_result_is_caught() -> None:
    @graph_pass(effects=())
    def breaks_the_contract(program: Program, log: RewriteLog) -> Program:
        copy = program.copy()
        copy.output.args = ([*copy.output.args[0]],)
        return copy

    with pytest.raises(AssertionError, match="the output must hold a flat tuple"):
        optimize(net(), [breaks_the_contract], example_inputs=X, engine="aten", verify="off")


# -- verification has teeth ---------------------------------------------------------------------------------------------


def relu(op, x: Value):
    return op.relu(x, name="act")


def wrong_rule(replace, name: str = "relu(x) -> ?", **kwargs) -> Pass:
    return rule_pass("wrong", [Rule(name, match=relu, replace=replace)], **{"effects": {"rounds"}, "doc": "", **kwargs})


def test_a_wrong_pass_is_named_with_its_first_rewrite_and_module() -> None:
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    wrong = wrong_rule(lambda op, x: op.sigmoid(x), "relu(x) -> sigmoid(x)")
    with pytest.raises(NumericsError) as error:
        optimize(Named().eval(), ["remove_dropout", wrong], example_inputs=torch.randn(2, 4), engine="aten")
    message = str(error.value)
    assert message.startswith("the pass wrong changed the numbers too much")
    assert "its first rewrite: relu(x) -> sigmoid(x) at body.1" in message
    assert "SQNR" in message and "allowed 80 dB" in message


@pytest.mark.parametrize("verify", ["each", "ends"])
def test_wrong_numbers_never_get_out_of_the_house(verify: str) -> None:
    wrong = wrong_rule(lambda op, x: op.mul(op.clamp_min(x, 0.0), 1.01))
    what = "the pass wrong" if verify == "each" else "the emitted module does not give the model's numbers"
    with pytest.raises(NumericsError, match=what):
        optimize(net(), [wrong], example_inputs=X, engine="aten", verify=verify)


def test_verification_can_be_switched_off_and_the_report_says_so() -> None:
    fast = optimize(net(), [wrong_rule(lambda op, x: op.sigmoid(x))], example_inputs=X, engine="aten", verify="off")
    assert not fast.report.verified and "not verified" in str(fast.report)


@pytest.mark.parametrize("value, name", [(math.nan, "NaN"), (math.inf, "Inf")])
def test_nan_and_inf_are_always_a_failure(value: float, name: str) -> None:
    def poisoned(op, x):
        return op.mul(op.sigmoid(x), value)

    wrong = wrong_rule(poisoned, effects={"quantizes"})
    with pytest.raises(NumericsError, match="output 0 holds NaN or Inf where the reference is finite"):
        optimize(net(), [wrong], example_inputs=X, engine="aten", tolerance=-1000)


def test_a_nan_of_the_users_own_is_no_failure() -> None:
    class Log(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x, 0.5, False).log()

    x = torch.tensor([-1.0, 0.0, 1.0, 2.0])
    fast = optimize(Log().eval(), example_inputs=x, engine="aten")
    assert torch.equal(fast(x).isnan(), torch.tensor([True, False, False, False])) and fast(x)[1] == -math.inf


def _next_float(op, x: Value):
    """One unit in the last place up, where the result is 1 or more."""
    return op.mul(op.clamp_min(x, 0.0), 1 + 2.0**-23)


def test_an_exact_pass_that_moves_numbers_by_one_bit_is_caught() -> None:
    class Relu(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x)

    x = torch.tensor([[1.0, -1.0, 0.0]])
    with pytest.raises(NumericsError, match=r"the pass wrong .* it is declared exact, but outputs moved by up to 1.19e-07"):
        optimize(Relu().eval(), [wrong_rule(_next_float, effects=())], example_inputs=x, engine="aten")
    fast = optimize(Relu().eval(), [wrong_rule(_next_float, effects={"rounds"})], example_inputs=x, engine="aten")
    assert fast(x)[0, 0] == 1 + 2.0**-23


def test_every_example_is_compared() -> None:
    """The wrong rule agrees with relu on inputs that are not negative: only the second example shows it."""
    wrong = wrong_rule(lambda op, x: op.abs(x))
    good, bad = torch.rand(2, 3, 6, 6), torch.randn(2, 3, 6, 6)

    class Relu(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x)

    optimize(Relu().eval(), [wrong], example_inputs=[(good,)], engine="aten")
    with pytest.raises(NumericsError):
        optimize(Relu().eval(), [wrong], example_inputs=[(good,), (bad,)], engine="aten")


def test_the_tolerance_is_the_users_to_set() -> None:
    with pytest.raises(NumericsError, match="allowed 200 dB"):
        optimize(net(), ["cast_half"], example_inputs=X, engine="aten", tolerance=200)
    report = optimize(net(), ["cast_half"], example_inputs=X, engine="aten", tolerance=10).report
    assert {s.tolerance for s in report.steps if s.name == "cast_half"} == {"SQNR >= 10 dB"}


def test_each_step_is_measured_against_the_eager_model() -> None:
    report = optimize(net(), [*DEFAULT, "cast_half"], example_inputs=X, engine="aten", frontend="trace").report
    by_name = {step.name: step for step in report.steps}
    assert by_name["remove_dropout"].tolerance == "bitwise" and by_name["remove_dropout"].sqnr_db == math.inf
    assert by_name["fuse_conv_bn"].tolerance == "SQNR >= 80 dB" and by_name["fuse_conv_bn"].sqnr_db > 100
    assert 15 < by_name["cast_half"].sqnr_db < 80
    assert by_name["fold_constants"].sqnr_db is None, "a pass that changed nothing is not measured"
    assert report.verified and 15 < report.sqnr_db < 80


def test_a_pass_that_swaps_classes_is_caught_however_large_the_products_are() -> None:
    @graph_pass(effects={"rounds", "lowers_precision"})
    def swap_classes(program, log):
        draft = Draft.of(program)
        last = draft.program.calls[-1]
        if str(last.target) != "aten.flip.default":
            draft.insert_after(last, list(last.users), "swap_classes", torch.ops.aten.flip.default, [1])
        return draft.finish()

    model = nn.Sequential(nn.Linear(8, 4), nn.Softmax(-1)).eval()
    x = torch.randn(2, 8) * 1000
    with pytest.raises(NumericsError, match="swap_classes"):
        optimize(model, ["cast_half", swap_classes], example_inputs=x)


# -- dry runs and reports -----------------------------------------------------------------------------------------------


class Refusing(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y).relu() + y


def test_a_dry_run_reports_what_would_fire_and_what_would_not() -> None:
    report = optimize(with_random_statistics(Refusing()), "fuse_conv_bn", example_inputs=X, dry_run=True, engine="aten")
    assert isinstance(report, Report)
    step = report.steps[0]
    assert not step.rewrites and [r.module for r in step.refusals] == ["conv"]
    assert "another user" in step.refusals[0].reason and "another user" in str(report)
    report = optimize(net(), "fuse_conv_bn", example_inputs=X, dry_run=True, engine="aten")
    assert [(r.rule, r.module) for r in report.steps[0].rewrites] == [("batch_norm(layer(x)) -> layer(x)", "conv")]
    assert "batch_norm" not in report.ops_left and report.ops_left["conv2d"] == 1


def test_a_dry_run_finds_wrong_passes_too() -> None:
    with pytest.raises(NumericsError, match="the pass wrong"):
        optimize(net(), [wrong_rule(lambda op, x: op.sigmoid(x))], example_inputs=X, dry_run=True)


def test_the_report_is_plain_data() -> None:
    report = optimize(net(), [*DEFAULT, "cast_half:dtype=bfloat16"], example_inputs=X, engine="aten").report
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    behind = ["cast_half", "remove_dead_code", "lower_aten", "follow_inputs"]
    assert [step["name"] for step in data["steps"]] == [*DEFAULT, *behind]
    by_name = {step["name"]: step for step in data["steps"]}
    assert by_name["cast_half"]["options"] == {"dtype": "bfloat16"}
    assert by_name["cast_half"]["effects"] == ["rounds", "lowers_precision"]
    (fold,) = by_name["fuse_conv_bn"]["rewrites"]
    assert fold == {
        "site": "layer_then_batch_norm@batch_norm", "rule": "batch_norm(layer(x)) -> layer(x)", "module": "conv",
    }  # fmt: skip
    assert by_name["remove_dropout"]["sqnr_db"] == "inf" and data["engine"] == "aten" and data["verified"] is True
    assert data["changed"] is True and data["sqnr_db"] > 15


def test_nothing_changed_is_reported() -> None:
    report = optimize(nn.Tanh().eval(), DEFAULT, example_inputs=X, engine="aten").report
    assert not report.changed and "nothing changed" in str(report)


# -- a user's own passes ------------------------------------------------------------------------------------------------


def test_a_rule_of_the_users_own_through_the_public_api() -> None:
    def scale_then_linear(op, x: Value, factor: float, w: Tensor, b: Tensor | None):
        return op.linear(op.mul(x, factor, name="mul"), w, b, name="linear")

    def factor_is_not_zero(factor):
        """The factor is not zero."""
        return factor != 0

    def scaled_weight(op, linear, x, factor, w, b):
        return op.like(linear, x, w * factor, b)

    fold = rule_pass(
        "fold_scale",
        [Rule("linear(s x) -> linear(x)", match=scale_then_linear, requires=(factor_is_not_zero,), replace=scaled_weight)],
        effects={"rounds"},
        doc="Fold a scale into the linear that reads it.\n\n    linear(s x, w, b)  ->  linear(x, s w, b)",
    )

    class Scaled(nn.Module):
        def __init__(self, factor: float):
            super().__init__()
            self.factor, self.linear = factor, nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x * self.factor)

    model, x = Scaled(0.125).eval(), torch.randn(2, 4)
    fast = optimize(model, [fold, *DEFAULT], example_inputs=x, engine="aten")
    assert fast.report.steps[0].name == "fold_scale" and len(fast.report.steps[0].rewrites) == 1
    assert ops(fast.program) == ["linear"] and "linear.weight@fold_scale" in fast.program.constants
    torch.testing.assert_close(fast(x), model(x))

    report = optimize(Scaled(0.0).eval(), [fold], example_inputs=x, dry_run=True)
    assert [r.reason for r in report.steps[0].refusals] == ["requirement not met: The factor is not zero."]


def test_a_dtype_stands_for_its_name_in_an_option() -> None:
    cast_half = CATALOGUE["cast_half"]
    assert cast_half.with_options(dtype=torch.float16).given == {"dtype": "float16"}
    assert str(cast_half.with_options(dtype=torch.bfloat16)) == "cast_half:dtype=bfloat16"
    for option, given in (("dtype", torch.float32), ("level", torch.float16)):
        with pytest.raises(OptionError, match=rf"cast_half: {option} must be one of .*, got {given}"):
            cast_half.with_options(**{option: given})


@pytest.mark.parametrize("text", ["keep_float=a,b", "overrides=a=O1,b=float"])
def test_names_in_an_option_are_joined_by_plus(text) -> None:
    with pytest.raises(OptionError, match=r"names are joined by '\+', not by ','"):
        find_passes(f"cast_half:{text}")
    assert CATALOGUE["cast_half"].with_options(keep_float=["a,b"]).given == {"keep_float": ("a,b",)}, "a name is free"


def test_options_say_how_they_are_written() -> None:
    assert CATALOGUE["cast_half"].option_syntax == {
        "dtype": "dtype=bfloat16|float16",
        "level": "level=O2|O1|O3",
        "keep_float": "keep_float=NAME+NAME",
        "overrides": "overrides=NAME=O1|O2|O3|float+NAME=...",
        "on_slower": "on_slower=warn|keep|revert",
    }
    assert CATALOGUE["fold_constants"].option_syntax == {}


def test_a_whole_graph_pass_with_options_of_the_users_own() -> None:
    seen: list[str] = []

    @graph_pass(effects=())
    def looks_around(program: Program, log: RewriteLog, *, mode: Literal["fast", "slow"] = "fast") -> Program:
        seen.append(f"{mode}: {', '.join(ops(program))}")
        return program

    optimize(nn.ReLU().eval(), [looks_around, looks_around.with_options(mode="slow")], example_inputs=X, engine="aten")
    assert seen == ["fast: relu", "slow: relu"]
