"""At O1, a float residual is added in float: where it was fused into a matrix op, which is half, it is taken out again.

    linear_act(x, w, b, r, act)  ->  act(linear(x, w, b) + r)          r float by nature

The residual stream of a transformer sums many small terms; rounding it at every layer costs several dB; autocast does not.
"""

from ir_tools.ir import Draft
from ir_tools.ir.dialect import short_name
from ir_tools.ir.provenance import location
from ir_tools.rewrite import Call, Ops, RewriteLog
from ir_tools.rewrite.decompositions import DECOMPOSITIONS
from ir_tools.rewrite.rule import unwrap
from passes.precision.constraints import Policy, site_of


def take_residuals_out(draft: Draft, policy: Policy, log: RewriteLog) -> bool:
    """Take out such residuals where the level is O1; return whether there were any."""
    for node in [n for n in policy.block.calls if n in policy.adds_a_float]:
        fused = Call(node)
        with draft.before(node, "cast_half"):
            apart = DECOMPOSITIONS[fused.target](Ops(draft, "cast_half", node), fused)
        draft.replace(node, unwrap(apart))
        name = short_name(node.target)
        log.rewrote(site_of(node), f"{name}(x, r) -> {name.removesuffix('_act')}(x) + r", location(node))
    return bool(policy.adds_a_float)
