"""At O1, a float residual is added in float: where it was fused into a matrix op, which is half, it is taken out again.

    linear_act(x, w, b, r, act)  ->  act(linear(x, w, b) + r)          r float by nature

The residual stream of a transformer sums many small terms; rounding it at every layer costs several dB; autocast does not.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ir_tools.ir import Draft
from ir_tools.ir.dataflow import forward
from ir_tools.ir.dialect import short_name
from ir_tools.ir.provenance import location
from ir_tools.rewrite import Call, Ops, RewriteLog
from ir_tools.rewrite.decompositions import DECOMPOSITIONS
from ir_tools.rewrite.rule import unwrap
from passes.precision.constraints import HALF, Policy, adds_a_float, is_half_by_nature, site_of


def float_residuals(policy: Policy, scaled: Collection[Any]) -> list[Any]:
    """The matrix ops in half whose fused residual is float by nature, where the level is O1.

    `scaled`: products that `rescaling` is about to make half; their results are, too, where they fit.
    """
    hazards, options = policy.hazards, policy.options

    def is_natural(node: Any, known: Mapping[Any, bool]) -> bool:
        fits = node in scaled and node not in hazards.reading.unfit
        return fits or is_half_by_nature(node, hazards, options, known)

    natural = forward(policy.block, is_natural) if scaled else policy.natural
    halves = (node for node, constraint in policy.constraints.items() if constraint is HALF)
    return [node for node in halves if adds_a_float(node, hazards, options, natural)]


def take_residuals_out(draft: Draft, nodes: Sequence[Any], log: RewriteLog) -> None:
    for node in nodes:
        fused = Call(node)
        with draft.before(node, "cast_half"):
            apart = DECOMPOSITIONS[fused.target](Ops(draft, "cast_half", node), fused)
        draft.replace(node, unwrap(apart))
        name = short_name(node.target)
        log.rewrote(site_of(node), f"{name}(x, r) -> {name.removesuffix('_act')}(x) + r", location(node))
