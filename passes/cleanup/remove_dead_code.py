"""Remove ops that neither the outputs nor an effect need.

    y = op(x), y never read, op pure  ->  nothing        (writes, assertions and random draws stay)
"""

from ir_tools.ir import Block, Draft
from ir_tools.rewrite import RewriteLog, graph_pass


@graph_pass(effects=())
def remove_dead_code(program: Block, log: RewriteLog) -> Block:
    draft = Draft.of(program)
    for name, where in draft.sweep():
        log.rewrote(f"remove_dead_code@{name}", "remove_dead_code", where)
    return draft.finish()
