"""Kernels that others wrote badly: refused with a reason that names them, never the end of a compilation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from passes import KernelProvider, OptimizedModel, PassesError, Target, Value, optimize
from passes.lower.lowering import lowering_pass
from passes.lower.targets import ONEDNN
from passes.tune.timing import using_timer
from tests.timers import never, winner

aten = torch.ops.aten
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch is built without oneDNN")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).relu())


MODEL, X = Net().eval(), torch.randn(2, 5)


def as_linear(op, s):
    return op.call(aten.linear.default, s.input, s.weight, s.bias)


def as_product(op, s):
    """The same by other ops."""
    return op.call(aten.add.Tensor, op.call(aten.matmul.default, s.input, op.call(aten.t.default, s.weight)), s.bias)


good = KernelProvider("good", [aten.linear.default], build=as_product, reference=as_linear)


def raises(*given: Any) -> Any:
    raise ValueError("no such luck\nand more")


def compiled(*providers: KernelProvider, timer: Callable[..., Any] | None = None, **options: Any) -> OptimizedModel:
    target = options.pop("target", None) or Target("toy", providers=providers)
    with using_timer(timer or winner(0)):
        model = optimize(MODEL, options.pop("passes", []), example_inputs=X, engine=options.pop("engine", target))
    torch.testing.assert_close(model(X), MODEL(X))
    return model


def reasons(model: OptimizedModel) -> dict[str, str]:
    (step,) = [step for step in model.report.steps if step.name.startswith("lower_")]
    refusals = {refusal.site: refusal.reason for refusal in step.refusals}
    assert len(refusals) == len(step.refusals)  # a site has one reason
    return refusals


def called(variants, **options) -> dict[str, list[float]]:
    """A timer that calls each variant, and finds the later ones slower."""
    for call in variants.values():
        call()
    return {name: [float(1 + position)] for position, name in enumerate(variants)}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "supports": ({"supports": raises}, "bad: supports raises ValueError: no such luck"),
    "when": ({"when": raises}, "bad: when raises ValueError: no such luck"),
    "subgraph": ({"subgraph": raises}, "bad: subgraph raises ValueError: no such luck"),
    "no attributes": ({"subgraph": lambda call: 3}, "bad: subgraph raises TypeError: "),
    "build": ({"build": raises}, "bad: build raises ValueError: no such luck"),
    "build gives None": ({"build": lambda op, s: None}, "bad: build gives None, which is no value of the graph"),
    "build gives a tuple": ({"build": lambda op, s: (s.input,)}, "bad: build gives ("),
    "another shape": ({"build": lambda op, s: op.call(aten.sum.default, s.input)}, "bad: the result would change shape"),
    "no such operands": ({"build": lambda op, s: op.call(aten.matmul.default, s.bias, s.input)}, "bad: the new op does not"),
    "variants": ({"build": None, "variants": raises}, "bad: variants raises ValueError: no such luck"),
    "no variants": ({"build": None, "variants": lambda s: {}}, "bad: variants gives {}, which names no functions"),
    "workload_key": ({"workload_key": raises}, "bad: workload_key raises ValueError: no such luck"),
    "no key": ({"workload_key": lambda s: None}, "bad: workload_key gives None, which is no text"),
    "can_be_timed": ({"can_be_timed": raises}, "bad: can_be_timed raises ValueError: no such luck"),
    "on_tensors": ({"on_tensors": raises}, "bad: on_tensors raises ValueError: no such luck"),
    "when timed": (
        {"build": lambda op, s: raises() if isinstance(s.input, Tensor) else as_product(op, s)},
        "bad: the kernel, when it is timed, raises ValueError: no such luck",
    ),
}


@pytest.mark.parametrize("position", ["alone", "in front", "behind"])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_kernel_is_refused_and_takes_no_good_one_away(kind: str, position: str) -> None:
    changes, reason = BAD[kind]
    bad = replace(good, name="bad", **changes)
    providers = {"alone": (bad,), "in front": (bad, good), "behind": (good, bad)}[position]
    by_calls = kind in ("on_tensors", "when timed")
    model = compiled(*providers, timer=called if by_calls else winner(0))
    kernels = {"linear": 2} if position == "alone" else {"add": 2, "matmul": 2, "t": 2}
    assert {op: count for op, count in model.report.ops_left.items() if op != "relu"} == kernels
    asked = position != "behind" or by_calls or not kind.startswith(("build", "another", "no such", "workload", "no key"))
    if asked:  # only the first one says what it is timed for, and only the chosen one is built
        assert set(reasons(model)) == {"lower_toy@linear", "lower_toy@linear_1"}
        assert all(reason in text for text in reasons(model).values())


@pytest.mark.parametrize("kind", ["build", "another shape", "build gives None"])
def test_without_measuring_the_next_one_is_taken_too(kind: str) -> None:
    bad = replace(good, name="bad", **BAD[kind][0])
    lowering = lowering_pass(Target("toy", providers=[bad, good])).with_options(variant="fused")
    model = compiled(passes=[lowering], engine="auto", timer=never)
    assert model.report.ops_left == {"add": 2, "matmul": 2, "t": 2, "relu": 1}


@pytest.mark.parametrize("answer", [True, False, "", 3])
def test_supports_that_gives_no_reason_is_an_error_of_its_author(answer: Any) -> None:
    bad = replace(good, name="bad", supports=lambda *given: answer)
    message = f"lower_toy@linear: supports of the kernel provider 'bad' gives {answer!r}; it gives None where"
    with pytest.raises(PassesError, match=message):
        compiled(bad, good)


def test_a_slower_kernel_than_the_reference_does_not_follow_a_refused_one() -> None:
    """Fastest first: bad, plain, good. What comes behind plain is not built."""
    bad = replace(good, name="bad", build=raises, on_tensors=lambda s: s)

    def timer(variants, **options):
        return {name: [{"bad": 1.0, "plain": 2.0, "good": 3.0}[name]] for name in variants}

    assert compiled(bad, good, timer=timer).report.ops_left == {"linear": 2, "relu": 1}


@needs_onednn
def test_a_bad_kernel_in_front_of_our_own_leaves_them() -> None:
    for kind in BAD:
        bad = replace(good, name="bad", **BAD[kind][0])
        model = compiled(target=ONEDNN.with_providers(bad), timer=called)
        assert model.report.ops_left["_linear_pointwise"] == 2, kind


# -- patterns of several ops --------------------------------------------------------------------------------------------


def relu_of_linear(op, x: Value, w: Value, b: Value | None):
    return op.relu(op.linear(x, w, b))


def clamped(op, s):
    return op.call(aten.clamp_min.default, op.call(aten.linear.default, s.x, s.w, s.b), 0)


def written(op, s):
    return op.call(aten.relu.default, op.call(aten.linear.default, s.x, s.w, s.b))


pair = KernelProvider("pair", relu_of_linear, build=clamped, reference=written)


def test_what_a_pattern_was_replaced_by_is_lowered_no_further() -> None:
    chosen = compiled(pair, good)
    assert chosen.report.ops_left == {"linear": 1, "clamp_min": 1, "add": 1, "matmul": 1, "t": 1}
    (step,) = [step for step in chosen.report.steps if step.name == "lower_toy"]
    assert [rewrite.site for rewrite in step.rewrites] == ["lower_toy@relu", "lower_toy@linear_1"]


def test_where_the_reference_is_faster_each_op_has_its_own_kernel() -> None:
    def slow_pair(variants, **options):
        return {name: [9.0 if name == "pair" else 1.0] for name in variants}

    model = compiled(pair, good, timer=slow_pair)
    assert model.report.ops_left == {"relu": 1, "add": 2, "matmul": 2, "t": 2}
    assert "the variant plain is faster here" in reasons(model)["lower_toy@relu"]


def test_a_site_of_both_tables_has_one_refusal_with_both_reasons() -> None:
    refusing = replace(pair, supports=lambda *given: "not today")
    relu = replace(good, name="relu", pattern=[aten.relu.default], supports=lambda *given: "not here")
    model = compiled(refusing, relu)
    assert reasons(model) == {"lower_toy@relu": "not today; not here"}
