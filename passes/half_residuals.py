"""At O1, a float residual is added in float: where it was fused with a product, which is half, it is taken out again.

    linear_act(x, w, b, r, act)  ->  act(linear(x, w, b) + r)          r float by nature

The stream of a transformer adds up many small terms; rounding it at every layer costs several dB, and autocast does not.
"""

from typing import Any

from ir_tools.ir import Draft
from ir_tools.ir.dialect import argument, conv_act, linear_act, short_name
from ir_tools.ir.origin import place
from ir_tools.rewrite import Call, Journal, Ops
from ir_tools.rewrite.rule import unwrap
from passes.half_policy import HALF, Policy
from passes.lower_aten import PLAIN


def take_residuals_out(draft: Draft, policy: Policy, journal: Journal) -> bool:
    """Whether any was taken out of the ops for which the level is O1."""
    found = [node for node, stance in policy.stances.items() if stance is HALF and adds_a_float(policy, node)]
    for node in found:
        with draft.before(node):
            apart = PLAIN[node.target](Ops(draft, "cast_half", node), Call(node))
        draft.replace(node, unwrap(apart))
        name = short_name(node.target)
        journal.rewrote(f"cast_half@{node.name}", f"{name}(x, r) -> {name.removesuffix('_act')}(x) + r", place(node))
    return bool(found)


def adds_a_float(policy: Policy, node: Any) -> bool:
    if node.target not in (conv_act, linear_act) or policy.level_of(node) != "O1":
        return False
    residual = argument(node, "residual")
    return residual is not None and policy.is_float_by_nature(residual)
