"""Symbolic sizes: the environment that they live in, their expressions, and what is known about them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.fx.experimental import _config, symbolic_shapes
from torch.utils._sympy import printers, value_ranges

ShapeEnv = symbolic_shapes.ShapeEnv
"""The symbols of one capture, with what was asked of them."""

DimDynamic = symbolic_shapes.DimDynamic
"""How a size is meant to vary."""

GuardOnDataDependentSymNode = symbolic_shapes.GuardOnDataDependentSymNode
"""Raised where an answer depends on a symbol without an example."""

PythonPrinter = printers.PythonPrinter
"""Writes an expression of symbols in Python."""

ValueRanges = value_ranges.ValueRanges
"""The least and the largest value of an expression."""

bounds_of = value_ranges.bound_sympy
"""The range of an expression, given those of its symbols."""

SYMBOLIC_SHAPES_LOGGER = "torch.fx.experimental.symbolic_shapes"
"""The logger that reports failed guards."""


def backed_size_oblivious() -> AbstractContextManager[None]:
    """A context in which no operator asks whether a symbolic size is 1 where the answer only saves work."""
    return _config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined, no-any-return]


def expression_as_made(number: torch.SymInt) -> Any:
    """The sympy expression that a symbolic number was made with, before anything was found out about its symbols."""
    return number.node._expr


def value_for_all(condition: torch.SymBool) -> Any:
    """True or False where a condition is that for all values of its symbols, otherwise None."""
    return condition.node.shape_env._maybe_evaluate_static(condition.node.expr)


def replaced(env: Any, expression: Any) -> Any:
    """An expression with what was found out about its symbols: that two are equal, or one a number."""
    return env.replace(expression)


def declare_size(number: Any) -> None:
    """Say of a symbolic number that it is not negative."""
    torch._check(number >= 0)
