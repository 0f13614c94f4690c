"""Put a stub on every value that enters or leaves a quantisable subgraph.

    x -> [conv, relu, add, ...] -> y     becomes     x -> quant_stub -> [conv, relu, add, ...] -> quant_stub -> y

A subgraph is a connected set of quantisable ops on float32 values. A stub is the identity; under its site, `region0.in0` or
`region0.out0` for subgraph 0, calibration will keep the statistics of that value. Lowering removes stubs.
"""

import torch

from ir_tools.ir import Block, Draft
from ir_tools.ir.dialect import nodes_in, quant_stub, short_name
from ir_tools.ir.facts import dtype
from ir_tools.ir.provenance import location
from ir_tools.ir.shape_inference import copy_keeps_layout
from ir_tools.ir.view import subgraphs
from ir_tools.rewrite import RewriteLog, graph_pass

QUANTISABLE = frozenset(
    """conv1d conv2d conv3d conv_act linear linear_act matmul add mul cat relu hardtanh leaky_relu hardswish hardsigmoid
    sigmoid max_pool2d avg_pool2d adaptive_avg_pool2d mean flatten reshape transpose permute""".split()
)
STARTS_A_SUBGRAPH = frozenset("conv1d conv2d conv3d conv_act linear linear_act matmul".split())
"""A subgraph without any of these gains nothing from int8 and gets no stub."""


@graph_pass(effects=())
def insert_quant_stubs(program: Block, log: RewriteLog) -> Block:
    draft = Draft.of(program)
    mutated = draft.program.mutated_values
    found = subgraphs(draft.program, lambda node: is_quantisable(node) and mutated.isdisjoint((node, *nodes_in(node.args))))
    for number, subgraph in enumerate(subgraph for subgraph in found if any(map(is_worth_it, subgraph.nodes))):
        for kind, values in (("in", subgraph.entries), ("out", subgraph.exits)):
            for i, value in enumerate(values):
                users = [user for user in subgraph.users_of(value) if short_name(user.target) != "quant_stub"]
                if dtype(value) is not torch.float32 or is_stub(value) or not users:
                    continue
                # Two subgraphs may read one value: the name of the first user makes their site ids differ.
                site = f"insert_quant_stubs@{value.name}.{kind}" + (f".{users[0].name}" if kind == "in" else "")
                if not log.allows(site):
                    continue
                if not copy_keeps_layout(draft.program.mode, value):
                    log.refused(site, "insert_quant_stubs", location(value), "a stub would change its memory layout")
                    continue
                # "region" is an older word for a subgraph: the names of stubs stay the same from release to release.
                draft.insert_after(value, users, "insert_quant_stubs", quant_stub, f"region{number}.{kind}{i}")
                log.rewrote(site, "insert_quant_stubs", location(value))
    return draft.finish()


def is_quantisable(node):
    return short_name(node.target) in QUANTISABLE and dtype(node) is torch.float32


def is_worth_it(node):
    return short_name(node.target) in STARTS_A_SUBGRAPH


def is_stub(value):
    return short_name(value.target) == "quant_stub"
