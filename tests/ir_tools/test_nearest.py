"""The nearest miss of a rule at an op: how far it got, and what it met."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ir_tools.ir import Block
from ir_tools.ir.dialect import short_name
from ir_tools.rewrite import Rule, Value
from ir_tools.rewrite.nearest import near_misses, nearest_miss
from passes import CATALOGUE, optimize
from tests.check import captured
from tests.script_cases import SCRIPT_MODELS, case

X = torch.randn(2, 3, 6, 6)
fuse_conv_bn = CATALOGUE["fuse_conv_bn"]
fold, moved = fuse_conv_bn.rules


class Net(nn.Module):
    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function
        self.conv, self.bn, self.linear = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def miss_of(function: Callable[..., Tensor], op: str, rule: Rule = fold) -> str | None:
    program = captured(Net(function).eval(), X)
    node = next(node for node in program.calls if node.name.startswith(op))
    return nearest_miss(rule, node, program)


@pytest.mark.parametrize(
    "function, op, sentence",
    [
        (lambda m, x: m.bn(m.conv(x) * x.mean()), "conv", "matched conv2d, but its user is mul, not batch_norm"),
        (lambda m, x: m.bn(m.conv(x).relu()), "batch", "matched batch_norm, but its operand input is relu, not layer"),
        (lambda m, x: m.conv(x), "conv", "matched conv2d, but its user is the model's output, not batch_norm"),
        (lambda m, x: (lambda y: y.exp() * y.sin())(m.conv(x)), "conv",
         "matched conv2d, but its users are exp and sin, not batch_norm"),
        (lambda m, x: (lambda y: m.bn(y) * y)(m.conv(x)), "conv",
         "matched, but the result of conv2d conv has another user (mul mul)"),
        (lambda m, x: m.bn(m.conv(x)), "conv", "matches: the rule applies"),
        (lambda m, x: m.bn(m.conv(x).relu()), "relu", None),
    ],
)  # fmt: skip
def test_the_nearest_miss_is_reported(function: Callable[..., Tensor], op: str, sentence: str | None) -> None:
    assert miss_of(function, op) == sentence


def test_a_requirement_that_does_not_hold_is_reported() -> None:
    assert miss_of(lambda m, x: m.bn(m.linear(x[:, :1].expand(-1, 4, -1, -1))), "linear") == (
        "matched, but requirement not met: The layer's channels are the axis that the batch norm normalises "
        "(convolutions batched, linears of two axes)."
    )


def test_the_deepest_match_is_reported() -> None:
    """Through alternatives and in either order; deeper beats nearer."""

    def gated(op, x: Value, y: Value):
        return op.mul(op.one_of(op.sigmoid(op.relu(x)), op.tanh(op.exp(x))), y)

    rule = Rule("gate", match=gated, replace=lambda x: x)
    assert miss_of(lambda m, x: x.sin() * x.exp().tanh(), "exp", rule) == "matches: the rule applies"
    assert miss_of(lambda m, x: x.sin() * x.cos().tanh(), "tanh", rule) == "matched tanh, but its operand self is cos, not exp"
    assert miss_of(lambda m, x: x.exp().tanh().sin(), "exp", rule) == "matched tanh, but its user is sin, not mul"


def test_literals_and_lists_that_differ_are_reported() -> None:
    def softmax_of_last(op, x: Value):
        return op.softmax(op.cat([x], ...), -1, ...)

    rule = Rule("last", match=softmax_of_last, replace=lambda x: x)
    one = miss_of(lambda m, x: torch.cat([x]).softmax(0), "softmax", rule)
    assert one == "matched softmax, but its operand dim is 0, not -1"
    two = miss_of(lambda m, x: torch.cat([x, x]).softmax(-1), "cat", rule)
    assert two == "matched cat, but its operand tensors is a list of 2, not a list of 1"


def test_near_misses_of_a_pass_at_a_module() -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.BatchNorm2d(4)).eval()
    program = captured(model, X)
    (miss,) = near_misses(fuse_conv_bn, program, "0")
    assert (miss.op, miss.module, miss.rule) == ("conv2d", "0.0", fold.name)
    assert miss.sentence == "matched conv2d, but its user is relu, not batch_norm"
    assert near_misses(fuse_conv_bn, program, "0.1") == [] == near_misses(CATALOGUE["remove_dead_code"], program, "0")
    assert {m.op for m in near_misses(fuse_conv_bn, program, "1")} == {"batch_norm"}


def test_optimize_reports_the_nearest_misses_on_request() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)).eval()
    report = optimize(model, "fuse_conv_bn", example_inputs=X, dry_run=True, explain_at="0")
    (step,) = [step for step in report.steps if step.name == "fuse_conv_bn"]
    assert [miss.sentence for miss in step.near_misses] == ["matched conv2d, but its user is relu, not batch_norm"]
    assert "nearest misses" in str(report) and "its user is relu, not batch_norm (0)" in str(report)
    assert report.to_dict()["steps"][0]["near_misses"][0]["module"] == "0"
    nowhere = optimize(model, "fuse_conv_bn", example_inputs=X, dry_run=True, explain_at="layer9")
    assert nowhere.notes == ["explain_at='layer9': no op of the captured graph comes from there"]
    assert "nearest misses" not in str(optimize(model, "fuse_conv_bn", example_inputs=X, dry_run=True))


def test_written_values_are_asked_for_once_for_each_block(monkeypatch) -> None:
    """Finding them takes a walk over the graph, and there may be a match at every op."""
    layers = [layer for _ in range(6) for layer in (nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))]
    program = captured(nn.Sequential(nn.Sequential(*layers)).eval(), X)
    asked: list[Block] = []
    wanted = Block.mutated_values.fget
    monkeypatch.setattr(Block, "mutated_values", property(lambda block: asked.append(block) or wanted(block)))
    near_misses(fuse_conv_bn, program, "0")
    assert len(asked) == 1


def test_bodies_of_branches_are_looked_at() -> None:
    this = case(SCRIPT_MODELS["early_exit"])
    program = captured(torch.jit.script(this.model), *next(iter(this.inputs.values())), frontend="script")
    inside = [node for node in program.all_calls if node not in set(program.calls)]
    names = [node.name for node in inside if short_name(node.target) == "linear"]
    assert names and all(near_misses(fuse_conv_bn, program, name) for name in names)
