"""`check_pass` catches every broken invariant, reports it with a test to paste, and refuses what never fired."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from ir_tools.rewrite import RewriteLog, graph_pass
from passes import CATALOGUE, Pass, PassesError, Rule, Value, check_pass, rule_pass
from passes.testing import CaptureRefused, CheckFailed, InvariantBroken, NeverFired, hold, random_models
from passes.testing.tally import Tally, kind_of

DOC = """Do something to a relu.

    relu(x)  ->  relu(x)
"""


def relu(op, x: Value):
    return op.relu(x)


def relu_twice(op, x: Value):
    return op.relu(op.relu(x))


def relu_of(op, x):
    return op.relu(x)


def nothing(op, x):
    return x


def made(replace: Any, match: Any = relu, effects: Any = (), doc: str = DOC, requires: Any = ()) -> Pass:
    return rule_pass("my_pass", [Rule("a rule", match=match, replace=replace, requires=requires)], effects=effects, doc=doc)


class Twice(nn.Module):
    def forward(self, x):
        return torch.relu(torch.relu(x))


PAIR = (Twice(), torch.randn(2, 3))
ACTIVATED = random_models(["layer_activation", "neutral"])


def test_a_sound_pass_passes_and_is_reported() -> None:
    report = check_pass(made(relu_of, relu_twice), models=[PAIR], examples=30)
    assert report.models == 31 and report.rewrites["my_pass: a rule"] >= 1 and 0 < report.share_untouched < 1
    text = str(report)
    assert "my_pass keeps the invariants" in text and "no rule fired" in text and "my_pass: a rule" in text
    assert "trace: captured" in text


def test_requirements_that_never_refused_are_listed() -> None:
    """As far as the pass shows its rules."""

    def it_is_positive(x):
        """The value is positive."""
        return True

    pass_ = made(relu_of, relu_twice, requires=(it_is_positive,))
    listed = Tally.of([ShowsRules(pass_)])
    assert listed.rewrites == {"my_pass: a rule": 0}
    assert listed.refusals == {"my_pass: requirement not met: The value is positive.": 0}


class ShowsRules:
    def __init__(self, pass_: Pass):
        def it_is_positive(x):
            """The value is positive."""

        self.name = pass_.name
        self.rules = [Rule("a rule", match=relu_twice, replace=relu_of, requires=(it_is_positive,))]


def test_numbers_that_move_are_caught_and_the_pasted_test_fails_too() -> None:
    wrong = made(nothing)
    with pytest.raises(CheckFailed, match="my_pass is declared exact, but outputs moved") as caught:
        check_pass(wrong, models=ACTIVATED, examples=200)
    message = str(caught.value)
    test = message.partition("Paste this into a test:\n\n")[2]
    assert "class Model(nn.Module)" in test and test.count("v") < 60, "it was not made small"
    assert "# from your_module import my_pass" in test
    names: dict[str, Any] = {"my_pass": wrong, "__name__": "pasted"}
    exec(test, names)
    (function,) = (value for name, value in names.items() if name.startswith("test_"))
    with pytest.raises(InvariantBroken, match="my_pass is declared exact, but outputs moved"):
        function()
    names["my_pass"] = made(relu_of, relu_twice)
    function()


def test_small_errors_are_caught_in_float64() -> None:
    """1e-9 is more than rounding."""

    def nearly(op, x):
        return op.mul(op.abs(x), 1 + 1e-9)

    def absolute(op, x: Value):
        return op.abs(op.abs(x))

    with pytest.raises(CheckFailed, match=r"changed the numbers.*relative error 1e-09, allowed 1e-10"):
        check_pass(made(nearly, absolute, {"rounds"}), models=random_models(["neutral"]), examples=400)


def test_a_zero_that_changes_its_sign_is_caught() -> None:
    class Plus(nn.Module):
        def forward(self, x):
            return (x + 0.0).neg()

    def plus_zero(op, x: Value, c: float):
        return op.add(x, c, ...)

    with pytest.raises(CheckFailed, match="a zero changed its sign"):
        check_pass(made(nothing, plus_zero), models=[(Plus(), torch.tensor([-0.0, 1.0]))], examples=0)


def test_a_pass_that_never_fires_is_refused() -> None:
    def erfinv(op, x: Value):
        return op.erfinv(op.erfinv(x))

    with pytest.raises(NeverFired, match=r"did nothing on any of 5 models.*check_pass\(my_pass, models=\["):
        check_pass(made(nothing, erfinv), examples=5)


@graph_pass(effects=())
def changes_its_input(program, log):
    for node in program.calls:
        node.name = f"{node.name}_"
    return program


@graph_pass(effects=())
def copies(program, log):
    return program.copy()


@graph_pass(effects=())
def lies(program, log):
    log.rewrote("lies@x", "lies", "x")
    return program


@graph_pass(effects=())
def raises(program, log: RewriteLog):
    raise KeyError("lost")


def with_doc(pass_: Pass) -> Pass:
    return Pass(pass_.name, pass_.function, pass_.effects, DOC)


@pytest.mark.parametrize(
    "pass_, why",
    [
        (with_doc(changes_its_input), "changes_its_input changed its input"),
        (with_doc(copies), "copies gave a new Program, but reports no rewrite"),
        (with_doc(lies), "lies reports 1 rewrites, but gave back the Program it came from"),
        (with_doc(raises), "KeyError: 'lost'"),
        (made(relu_of, relu_twice, doc="No equation."), "the docstring of my_pass must open with"),
    ],
)
def test_every_other_invariant_is_checked(pass_: Pass, why: str) -> None:
    with pytest.raises(CheckFailed, match=why):
        check_pass(pass_, models=[PAIR], examples=0)
    with pytest.raises(CheckFailed, match=why):
        check_pass(pass_, models=random_models(["layer_activation"]), examples=50)


def test_a_second_run_that_finds_more_is_caught() -> None:
    """A pass that takes one relu away each time."""

    @graph_pass(effects=())
    def one_at_a_time(program, log):
        from ir_tools.ir import Draft

        draft = Draft.of(program)
        for node in draft.program.calls:
            if "relu" in str(node.target) and node.all_input_nodes[0].op == "call_function":
                draft.redirect(node, node.all_input_nodes[0])
                draft.remove(node)
                log.rewrote(f"one_at_a_time@{node.name}", "one_at_a_time", node.name)
                break
        return draft.finish()

    model = nn.Sequential(nn.ReLU(), nn.ReLU(), nn.ReLU())
    with pytest.raises(CheckFailed, match="a second run of one_at_a_time found more to do: one_at_a_time at"):
        check_pass(with_doc(one_at_a_time), models=[(model, torch.randn(3))], examples=0)


def test_passes_that_run_before_and_other_front_ends() -> None:
    report = check_pass("lower_aten", before=["fuse_conv_relu"], frontends=("trace", "fx"), models=ACTIVATED, examples=30)
    assert sum(report.rewrites.values()) and {"trace: captured", "fx: captured"} <= set(report.tally.captured)


@pytest.mark.parametrize("name", ["fold_constants", "remove_dropout", "fuse_conv_bn", "fuse_conv_relu", "cast_half"])
def test_the_passes_of_the_catalogue_keep_the_invariants(name: str) -> None:
    assert check_pass(CATALOGUE[name], examples=40).models == 40


def test_errors_are_of_the_one_tree() -> None:
    assert all(issubclass(error, PassesError) for error in (CheckFailed, NeverFired, InvariantBroken))
    with pytest.raises(PassesError, match="there is no pass"):
        check_pass("fuse_conv_nb")


def test_what_no_front_end_can_capture_is_no_fault_of_the_pass() -> None:
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(CaptureRefused, match="fx"):
        hold(Branches, lambda: (torch.randn(2),), "remove_dropout", frontend="fx")


def test_importing_passes_does_not_import_hypothesis() -> None:
    code = "import sys, passes; assert 'hypothesis' not in sys.modules; passes.check_pass; assert 'hypothesis' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "one, other",
    [
        ("the result of relu a.0 has another user (x)", "the result of conv2d b has another user (add c.1)"),
        ("the result would change shape from (1, 2) to (2, 1)", "the result would change shape from (4,) to ()"),
        ("body.0 is written in place", "x3 is written in place"),
    ],
)
def test_reasons_of_one_kind_are_counted_together(one: str, other: str) -> None:
    assert kind_of(one) == kind_of(other)
