"""Scale matrix ops whose operand or result does not fit into half precision, by a power of two with which they fit.

    product(x, w, b)  ->  2^-k product(2^k x, w, 2^k b)

Exact: powers of two change exponents alone, and the observed ranges leave room for it. The scaling is done in float, where x
and the result fit; only the product is in half. A fused relu or leaky_relu scales with it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ir_tools.ir import Draft, facts
from ir_tools.ir.dialect import aten, bound_arguments, map_argument, short_name
from ir_tools.ir.program import public_name
from ir_tools.ir.provenance import location
from ir_tools.rewrite import RewriteLog
from ir_tools.verify.ranges import Range
from passes.precision.constraints import Policy, site_of
from passes.precision.reasons import LOSES, OVERFLOWS, READS_UNFIT
from passes.precision.representable import fits

LAYERS = "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split()
LINEAR_IN = {
    **dict.fromkeys(LAYERS, ("input", "bias")),
    **dict.fromkeys(("conv_act", "linear_act"), ("x", "b")),
    **dict.fromkeys(("matmul", "mm", "bmm"), ("self", "")),
}
"""Products by name: the operand that is scaled, and the bias."""

OUT_OF_RANGE = (OVERFLOWS, LOSES, READS_UNFIT)
SCALE_ALONG = ("", "relu", "leaky_relu")
"""Activations for which act(s x) = s act(x), s > 0."""

LARGEST_SHIFT = 24


def rescalings(policy: Policy) -> dict[Any, int]:
    """The products that only their ranges keep in float, and the k of the power of two with which they fit."""
    values = policy.hazards.reading.values
    found = {}
    for node, constraint in policy.constraints.items():
        operands = operands_of(node) if constraint.reason in OUT_OF_RANGE else None
        if operands is None:
            continue
        x, b = operands
        shift = shift_for(values[x].observed, values[node].observed, policy.hazards.half)
        if shift != 0 and (b is None or policy.block.constant(b) is not None):
            found[node] = shift
    return found


def rescale(draft: Draft, shifts: Mapping[Any, int], log: RewriteLog) -> None:
    for node, shift in shifts.items():
        x, b = scaled_operands(node)
        bias = draft.program.constant(b)
        with draft.before(node, "cast_half"):
            scaled = {x: draft.call(aten.mul.Scalar, x, 2.0**shift)}
            if bias is not None:
                scaled[b] = draft.constant(f"{public_name(str(b.target))}@cast_half", bias * 2.0**shift)
            product = draft.again(node, with_swapped(node.args, scaled), dict(node.kwargs))
            draft.replace(node, draft.call(aten.mul.Scalar, product, 2.0**-shift))
        name = short_name(product.target)
        log.rewrote(site_of(node), f"{name}(x) -> 2^{-shift} {name}(2^{shift} x)", location(product))


def with_swapped(args: Any, swapped: dict[Any, Any]) -> Any:
    return map_argument(args, lambda leaf: swapped.get(leaf, leaf) if isinstance(leaf, fx.Node) else leaf)


def operands_of(node: Any) -> tuple[Any, Any] | None:
    """The operand and the bias of a float32 product to scale; None where scaling these two is not enough."""
    name, given = short_name(node.target), bound_arguments(node)
    if name not in LINEAR_IN or facts.dtype(node) is not torch.float32:
        return None
    if given.get("act", "") not in SCALE_ALONG or given.get("residual") is not None:
        return None
    x, b = scaled_operands(node)
    alone = list(node.all_input_nodes).count(x) == 1 and sum(value is x for value in given.values()) == 1
    return (x, b) if alone and facts.dtype(x) is torch.float32 else None


def scaled_operands(node: Any) -> tuple[Any, Any]:
    x, b = (bound_arguments(node).get(argument) for argument in LINEAR_IN[short_name(node.target)])
    return x, b


def shift_for(x: Range | None, result: Range | None, half: torch.dtype) -> int:
    """The k of least magnitude with which 2^k x and 2^k result fit into `half`; 0 if they fit unscaled, or with no k."""
    if x is None or result is None:
        return 0
    shifts = sorted(range(-LARGEST_SHIFT, LARGEST_SHIFT + 1), key=abs)
    return next((k for k in shifts if fits(x.shifted(k), half) and fits(result.shifted(k), half)), 0)
