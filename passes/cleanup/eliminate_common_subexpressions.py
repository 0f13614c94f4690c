"""Compute once what is computed twice.

    y = op(x, ...),  z = op(x, ...)   ->   y for both        the same op, operands and arguments
    x + y,  y + x;  x * y,  y * x     ->   one               where the results lie in memory alike

Constants are the same operand where their bytes, dtype, shape and strides are equal. Those of passes are compared at any size,
those of the user up to 1 MB: larger ones are equal only where they are tied, and tied ones are one constant already.

An op that writes, draws random numbers or may raise is left alone, as is one whose operands or result are written in place.
Two outputs of the model stay two tensors.
"""

from collections.abc import Hashable

from torch import fx

from ir_tools.ir import Block, Draft
from ir_tools.ir.provenance import location, stand_for
from ir_tools.rewrite import RewriteLog, graph_pass
from ir_tools.rewrite.common import Keys, why_apart

RULE = "the same computation -> once"


@graph_pass(effects=())
def eliminate_common_subexpressions(program: Block, log: RewriteLog) -> Block:
    draft = Draft.of(program)
    keys = Keys(draft.program)
    mutated = draft.program.mutated_values
    first_with: dict[Hashable, fx.Node] = {}
    for node in draft.program.calls:  # operands come first: those of a second op are the first one's by now
        key = keys.of(node)
        if key is None:
            continue
        first = first_with.setdefault(key, node)
        site = f"eliminate_common_subexpressions@{node.name}"
        if first is node or not log.allows(site):
            continue
        why_not = why_apart(first, node, mutated)
        if why_not is not None:
            log.refused(site, RULE, location(node), why_not)
            continue
        draft.redirect(node, first)
        stand_for(first, [node], "eliminate_common_subexpressions", site)
        log.rewrote(site, RULE, location(node))
    return draft.finish()
