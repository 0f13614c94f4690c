"""At O1, a float residual is added in float: where it was fused into a matrix op, which is half, it is taken out again.

    linear_act(x, w, b, r, act)  ->  act(linear(x, w, b) + r)          r float by nature

The residual stream of a transformer sums many small terms; rounding it at every layer costs several dB; autocast does not.
"""

from collections.abc import Sequence
from typing import Any

from ir_tools.ir import Draft
from ir_tools.ir.dialect import short_name
from ir_tools.ir.origin import location
from ir_tools.rewrite import Call, Ops, RewriteLog
from ir_tools.rewrite.decompositions import DECOMPOSITIONS
from ir_tools.rewrite.rule import unwrap
from passes.precision.constraints import HALF, Policy, adds_a_float, site_of


def float_residuals(policy: Policy) -> list[Any]:
    """The matrix ops in half whose fused residual is float by nature, where the level is O1."""
    given = policy.hazards, policy.options, policy.natural
    return [node for node, constraint in policy.constraints.items() if constraint is HALF and adds_a_float(node, *given)]


def take_residuals_out(draft: Draft, nodes: Sequence[Any], log: RewriteLog) -> None:
    for node in nodes:
        fused = Call(node)
        with draft.before(node):
            apart = DECOMPOSITIONS[fused.target](Ops(draft, "cast_half", node), fused)
        draft.replace(node, unwrap(apart))
        name = short_name(node.target)
        log.rewrote(site_of(node), f"{name}(x, r) -> {name.removesuffix('_act')}(x) + r", location(node))
