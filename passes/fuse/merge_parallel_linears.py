"""Merge linears that read the same value into one, split into their results.

    linear(x, w1, b1), linear(x, w2, b2), ...  ->  split(linear(x, [w1; w2; ...], [b1; b2; ...]))

A missing bias is zero where another linear has one. The case in mind is the query, key and value of attention.

On a CPU it does not pay: BERT-base (12 layers, 12 heads of 64, 128 tokens, one thread, oneDNN's kernels) runs 1.00
times as fast, in float32 and in bfloat16: one of the three products keeps a thread busy already.
"""

from ir_tools.ir import Block, Draft
from ir_tools.ir.provenance import location
from ir_tools.rewrite import RewriteLog, graph_pass
from ir_tools.rewrite.parallel import kind_of, merge, side_by_side, why_alone

RULE = "linear(x), linear(x), ... -> split(linear(x))"


@graph_pass(effects={"rounds"})
def merge_parallel_linears(program: Block, log: RewriteLog) -> Block:
    draft = Draft.of(program)
    mutated, layout_is_observable = draft.program.mutated_values, draft.program.layout_is_observable
    for group in side_by_side(draft.program):
        by_kind: dict[tuple, list] = {}
        for node in group:
            why_not = why_alone(node, draft.program, mutated, layout_is_observable)
            if why_not is None:
                by_kind.setdefault(kind_of(node, draft.program), []).append(node)
            else:
                log.refused(f"merge_parallel_linears@{node.name}", RULE, location(node), why_not)
        for linears in by_kind.values():
            site = f"merge_parallel_linears@{linears[0].name}"
            if not log.allows(site):
                continue
            if len(linears) == 1:
                log.refused(site, RULE, location(linears[0]), "the others have weights of another dtype, or are refused")
                continue
            merge(draft, linears, "merge_parallel_linears")
            log.rewrote(site, RULE, location(linears[0]))
    return draft.finish()
