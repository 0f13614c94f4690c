"""Merge linears that read the same value into one, split into their results.

    linear(x, w1, b1), linear(x, w2, b2), ...  ->  split(linear(x, [w1; w2; ...], [b1; b2; ...]))

A missing bias is zero where another linear has one. The case in mind is the query, key and value of attention.

On a CPU it does not pay: BERT-base (12 layers, 12 heads of 64, 128 tokens, one thread, oneDNN's kernels) runs 1.00
times as fast, in float32 and in bfloat16: one of the three products keeps a thread busy already.
"""

from ir_tools.ir import Block, Draft
from ir_tools.ir.origin import place
from ir_tools.rewrite import Journal, graph_pass
from ir_tools.rewrite.parallel import kind_of, merge, side_by_side, why_alone

RULE = "linear(x), linear(x), ... -> split(linear(x))"


@graph_pass(declares="reassociates")
def merge_parallel_linears(program: Block, journal: Journal) -> Block:
    draft = Draft.of(program)
    mutated, layout_tells = draft.program.mutated_values, draft.program.layout_tells
    for group in side_by_side(draft.program):
        by_kind: dict[tuple, list] = {}
        for node in group:
            why_not = why_alone(node, draft.program, mutated, layout_tells)
            if why_not is None:
                by_kind.setdefault(kind_of(node, draft.program), []).append(node)
            else:
                journal.refused(f"merge_parallel_linears@{node.name}", RULE, place(node), why_not)
        for linears in by_kind.values():
            site = f"merge_parallel_linears@{linears[0].name}"
            if not journal.allows(site):
                continue
            if len(linears) == 1:
                journal.refused(site, RULE, place(linears[0]), "the others have weights of another dtype, or are refused")
                continue
            merge(draft, linears, "merge_parallel_linears")
            journal.rewrote(site, RULE, place(linears[0]))
    return draft.finish()
