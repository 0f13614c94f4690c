"""A subgraph as its kernels see it: what enters it, by name, as attributes."""

from __future__ import annotations

from types import SimpleNamespace

from ir_tools.ir.dialect import bound_arguments
from ir_tools.rewrite.rule import Call, wrap


def arguments_of(call: Call) -> SimpleNamespace:
    """One op: its `target`, and its arguments by their schema names."""
    return SimpleNamespace(target=call.target, **{name: wrap(value) for name, value in bound_arguments(call._node).items()})
