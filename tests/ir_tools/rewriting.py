"""What the tests of the rule engine share: programs made of functions, and a pass of given rules."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ir_tools.ir import Program
from ir_tools.rewrite import RewriteLog, Rule, Value, rule_pass
from tests.check import captured, rewritten

X, Y = torch.randn(3, 4), torch.randn(3, 4)


class Function(nn.Module):
    def __init__(self, function: Callable, **buffers: Tensor):
        super().__init__()
        self.function = function
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)

    def forward(self, *inputs: Tensor):
        return self.function(self, *inputs)


def program_of(function: Callable, *inputs: Tensor, **buffers: Tensor) -> Program:
    return captured(Function(function, **buffers), *(inputs or (X,)))


def pass_of(*rules: Rule):
    return rule_pass("tested", rules, effects=(), doc="")


def apply(rule: Rule, program: Program, *inputs: Tensor) -> tuple[Program, RewriteLog]:
    return rewritten(pass_of(rule), program, *(inputs or (X,)))


# -- matching ----------------------------------------------------------------------------------------------------------


def twice_relu(op, x: Value):
    return op.relu(op.relu(x))


def once_relu(op, x):
    return op.relu(x)


RELU = Rule("relu(relu(x)) -> relu(x)", match=twice_relu, replace=once_relu)
