"""Compute now what depends on constants only.

    op(c1, c2, ...)  ->  c        c1, c2, ... constants; op pure, not random, not writing

A result much larger than what it is made from (an `expand` or a wide `arange`) stays an op: it would swell the file.
"""

from ir_tools.ir import Block, Draft
from ir_tools.ir.provenance import location
from ir_tools.rewrite import RewriteLog, graph_pass
from ir_tools.rewrite.constants import evaluate, is_foldable

LARGEST = 1 << 20
"""Bytes up to which any result is kept; beyond, only one no larger than its operands together."""


@graph_pass(effects=())
def fold_constants(program: Block, log: RewriteLog) -> Block:
    if not any(is_foldable(program, node) for node in program.calls):
        return program
    draft = Draft.of(program)
    mutated = draft.program.mutated_values
    for node in draft.program.calls:
        site = f"fold_constants@{node.name}"
        if not is_foldable(draft.program, node) or not log.allows(site):
            continue
        if node in mutated:
            log.refused(site, "fold_constants", location(node), "its result is written in place")
            continue
        value, operand_bytes = evaluate(draft.program, node)
        if value.nbytes > max(LARGEST, operand_bytes):
            log.refused(site, "fold_constants", location(node), "the result is much larger than its operands")
            continue
        draft.redirect(node, draft.constant(f"{node.name}@fold_constants", value))
        log.rewrote(site, "fold_constants", location(node))
    return draft.finish()
