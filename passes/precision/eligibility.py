"""Which ops are arithmetic in float32, pure and of known dtypes: the only ones that a dtype can be chosen for."""

from collections.abc import Set
from typing import Any

import torch

from ir_tools.ir.alias_analysis import derived, is_handed_out
from ir_tools.ir.dialect import bound_arguments, short_name
from ir_tools.ir.facts import dtype as dtype_of
from ir_tools.ir.facts import is_unknown
from ir_tools.ir.regions import is_region
from ir_tools.rewrite.cast import is_filled, parts
from passes.precision.op_table import CASTS, NAMED, NO_FLOATS
from passes.precision.reasons import HAS_FLOAT64, HAS_OTHERS, IS_A_CAST, IS_CONTROL_FLOW, IS_UNKNOWN, IS_WRITTEN


def why_ineligible(node: Any, mutated: Set[Any], half: torch.dtype) -> str | None:
    """Why an op stays as it is; "" where it computes nothing in float32, None where a dtype can be chosen for it."""
    if is_region(node):
        return IS_CONTROL_FLOW
    read = [dtype_of(n) for n in node.all_input_nodes]
    given = [dtype_of(node), *(part.dtype for part in parts(node))]
    if node in mutated or not mutated.isdisjoint(node.all_input_nodes):
        return IS_WRITTEN if any(d is not None and d.is_floating_point for d in (*read, *given)) else ""
    if any(is_unknown(n) for n in (node, *node.all_input_nodes)):
        return IS_UNKNOWN
    if short_name(node.target) in NO_FLOATS:
        return ""
    if short_name(node.target) in CASTS and has_given_dtype(node):
        # A cast that becomes a no-op would return an alias of another value.
        return IS_A_CAST if dtype_of(node) is half and is_handed_out(derived(node)) else ""
    if torch.float64 in read or torch.float64 in given:
        return HAS_FLOAT64
    if torch.float32 not in (*read, *given) or has_given_dtype(node):
        return ""
    others = (d for d in (*read, *given) if d is not None and d not in (torch.float32, half))
    return HAS_OTHERS if any(d.is_complex or d.is_floating_point for d in others) else None


def reads_float32(node: Any) -> bool:
    return any(dtype_of(n) is torch.float32 for n in node.all_input_nodes)


def has_given_dtype(node: Any) -> bool:
    """The op casts its operands to a dtype that the model states (a softmax in float32)."""
    to, name = bound_arguments(node).get("dtype"), short_name(node.target)
    return isinstance(to, torch.dtype) and name in NAMED and (to.is_floating_point or name in CASTS) and not is_filled(node)
