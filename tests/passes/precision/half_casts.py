"""What the tests of `cast_half` share: models, inputs, and what holds of every cast."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ir_tools.ir import Program, facts
from ir_tools.ir.dialect import argument, short_name
from ir_tools.rewrite import Artifacts, RewriteLog
from passes import CATALOGUE
from tests.check import captured, observe, outputs_of, relative_error, rewritten

cast_half = CATALOGUE["cast_half"]
source = importlib.import_module("passes.precision.cast_half")
reasons = importlib.import_module("passes.precision.reasons")

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
WITHIN = {"bfloat16": 4e-2, "float16": 5e-3}
"""Relative error allowed to a net of a few layers: some ten times the last bit."""


class Model(nn.Module):
    """`function(self, *inputs)` over layers and buffers given by name."""

    def __init__(self, function: Callable, **parts: nn.Module | Tensor):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, *inputs: Tensor):
        return self.function(self, *inputs)


def check_cast(model: nn.Module, *inputs: Tensor, dtype: str = "bfloat16", level: str = "O2"):
    """Cast, and hold the result to what holds for every model: dtypes at the border, lean casts, near numbers."""
    program = captured(model.eval(), *inputs)
    after, log = rewritten(cast_half.with_options(dtype=dtype, level=level), program, *inputs)
    expected, got = outputs_of(program, *inputs), outputs_of(after, *inputs)
    assert [t.dtype for t in got] == [t.dtype for t in expected], "outputs keep their dtypes"
    assert [facts.dtype(p) for p in after.placeholders] == [t.dtype for t in inputs], "inputs keep their dtypes"
    assert_casts_are_lean(after)
    error = relative_error(expected, got)
    assert error <= WITHIN[dtype], f"relative error {error:.3g}, allowed {WITHIN[dtype]:g}"
    return after, log


def assert_casts_are_lean(program: Program) -> None:
    """No cast of a constant, no value cast twice to one dtype, no cast of a lossless cast, no cast to the same dtype."""
    seen = set()
    for node in program.calls:
        if short_name(node.target) != "to":
            continue
        read, dtype = argument(node, "self"), facts.dtype(node)
        assert read.op != "get_attr", f"{node.name} casts a constant at run time"
        assert (read, dtype) not in seen, f"{read.name} is cast to {dtype} twice"
        assert facts.dtype(read) is not dtype, f"{node.name} casts {dtype} to itself"
        if short_name(read.target) == "to":
            before = facts.dtype(argument(read, "self"))
            widens = torch.promote_types(before, facts.dtype(read)) is facts.dtype(read)
            assert not widens, f"{node.name} casts what was cast from {before} without loss"
        seen.add((read, dtype))


def computes_in(program: Program) -> dict[str, torch.dtype | None]:
    """name of the op -> dtype of its result (the last one of that name)."""
    return {short_name(node.target): facts.dtype(node) for node in program.calls}


_NUMBERS = torch.Generator().manual_seed(0)  # of their own: which numbers these are must not depend on what is imported before
X = torch.randn(3, 4, generator=_NUMBERS)
IMAGE = torch.randn(2, 3, 8, 8, generator=_NUMBERS)


# -- the table of levels -----------------------------------------------------------------------------------------------


def every_kind(m: Model, x: Tensor) -> Tensor:
    y = m.linear(x)  # matrix
    z = F.silu(y)  # pointwise, all operands half
    s = z + x  # pointwise, one operand a float input
    return m.norm(s).softmax(-1).cumsum(-1)


H, S = "half", torch.float32
LEVELS = {
    "O1": {"linear": H, "silu": H, "add": S, "layer_norm": S, "softmax": S, "cumsum": S},
    "O2": {"linear": H, "silu": H, "add": H, "layer_norm": S, "softmax": S, "cumsum": S},
    "O3": {"linear": H, "silu": H, "add": H, "layer_norm": H, "softmax": H, "cumsum": H},
}


# -- masks and other large numbers -------------------------------------------------------------------------------------

LOWEST = torch.finfo(torch.float32).min


# -- what was seen on data ---------------------------------------------------------------------------------------------


def seen_on(program: Program, *inputs: Tensor, dtype: str = "float16", level: str = "O2") -> tuple[Program, RewriteLog]:
    """Cast with the ranges that the values of `program` take on `inputs`."""
    log, seen = RewriteLog(), Artifacts(observe(program, [inputs]))
    return cast_half.with_options(dtype=dtype, level=level)(program, log=log, artifacts=seen), log
