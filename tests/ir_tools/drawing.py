"""Programs to draw, and how to find things in drawings."""

import inspect
import re
import shutil

import pytest
import torch
from torch import fx

from ir_tools.frontends.capture import capture
from ir_tools.frontends.source import prepare
from ir_tools.ir import Draft, InputSpec, Program, Record, Signature
from ir_tools.ir.prepack import prepack_conv
from ir_tools.ir.signature import binder, split_leaves
from ir_tools.torch_compat import pytree

aten = torch.ops.aten
needs_dot = pytest.mark.skipif(shutil.which("dot") is None, reason="the graphviz program `dot` is not installed")


def start(*examples: torch.Tensor, outputs: int = 1) -> Draft:
    """An empty draft of a model called as `forward(x, y, …)`, with placeholders of the same names."""
    names = "xyz"[: len(examples)]
    bind = binder([inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names])
    leaves, in_tree = pytree.tree_flatten(bind(*examples))
    specs = tuple(InputSpec(n, tuple(t.shape), t.dtype) for n, t in zip(names, examples))
    out_leaves, _tensors = split_leaves([torch.zeros(1)] * outputs)
    out_tree = pytree.tree_structure([0] * outputs)
    signature = Signature(bind, tuple(names), specs, in_tree, split_leaves(leaves)[0], out_tree, out_leaves)
    draft = Draft(Program(fx.Graph(), signature=signature, frontend="export"))
    for name, example in zip(names, examples):
        draft.placeholder(name, example)
    return draft


def small() -> Program:
    """conv -> batch norm -> + x -> conv_act with a residual, in modules block.0.conv, block.0.bn and head."""
    draft = start(torch.randn(1, 4, 8, 8))
    (x,) = draft.program.placeholders
    with draft.origin(Record("block.0.conv")):
        conv = draft.call(aten.conv2d.default, x, draft.constant("block.0.conv.weight", torch.randn(4, 4, 1, 1)))
    with draft.origin(Record("block.0.bn")):
        statistics = [draft.constant(f"block.0.bn.{n}", torch.rand(4)) for n in ("weight", "bias", "mean", "var")]
        norm = draft.call(aten.batch_norm.default, conv, *statistics, False, 0.1, 1e-5, False)
    with draft.origin(Record("block.0")):
        total = draft.call(aten.add.Tensor, norm, x)
    with draft.origin(Record("head").derived("fuse_conv_relu")):
        plain = draft.constant("head.weight@fuse_conv_bn", torch.randn(4, 4, 1, 1))
        weight = draft.call(prepack_conv, plain, [0, 0], [1, 1], [1, 1], 1, None)
        fused = draft.call(
            torch.ops.torch_passes.conv_act.default,
            total, weight, None, [1, 1], [0, 0], [1, 1], 1, x, "relu", [],
        )  # fmt: skip
    draft.output([fused])
    return draft.finish()


def chain(length: int) -> Program:
    draft = start(torch.randn(1, 2, 4, 4))
    (value,) = draft.program.placeholders
    skipped = value
    for i in range(length // 2):
        with draft.origin(Record(f"blocks.{i // 20}.{i % 20}")):
            value = draft.call(aten.relu.default, value)
            value = draft.call(aten.add.Tensor, value, skipped)
        skipped = value if i % 10 == 0 else skipped
    draft.output([value])
    return draft.finish()


def captured(model: torch.nn.Module, *args: torch.Tensor, sizes=None) -> Program:
    return capture(prepare(model.eval(), [(args, {})], sizes), "script").program


class Branches(torch.nn.Module):
    """An if in a loop, a list that the loop fills, and a result that one branch gives as a literal."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        factor = 1.0
        while len(seen) < 3 and bool(x.sum() > 0):
            if bool(x.mean() > 1):
                x = self.conv(x)
                factor = float(x.max())
            else:
                x = x - 1
                factor = 0.25
            seen.append(x)
        return x * factor + len(seen)


def box(dot: str, node: str) -> str:
    """The statement that writes one node."""
    (line,) = re.findall(rf"^\s*{node} \[.*$", dot, re.MULTILINE)
    return line
