"""Put a stub on every value that enters or leaves a quantisable region.

    x -> [conv, relu, add, ...] -> y     becomes     x -> quant_stub -> [conv, relu, add, ...] -> quant_stub -> y

A region is a connected set of quantisable ops on float32 values. A stub is the identity; its site, `<region>.in<i>` or
`<region>.out<i>`, is where calibration will keep the statistics of that value. Lowering removes stubs.
"""

import torch

from ir_tools.ir import Block, Draft
from ir_tools.ir.dialect import nodes_in, quant_stub, short_name
from ir_tools.ir.facts import dtype
from ir_tools.ir.origin import place
from ir_tools.ir.shape_inference import copy_keeps_layout
from ir_tools.ir.view import regions
from ir_tools.rewrite import Journal, graph_pass

QUANTISABLE = frozenset(
    """conv1d conv2d conv3d conv_act linear linear_act matmul add mul cat relu hardtanh leaky_relu hardswish hardsigmoid
    sigmoid max_pool2d avg_pool2d adaptive_avg_pool2d mean flatten reshape transpose permute""".split()
)
STARTS_A_REGION = frozenset("conv1d conv2d conv3d conv_act linear linear_act matmul".split())
"""A region without any of these gains nothing from int8 and gets no stub."""


@graph_pass(declares="exact")
def insert_quant_stubs(program: Block, journal: Journal) -> Block:
    draft = Draft.of(program)
    mutated = draft.program.mutated_values
    found = regions(draft.program, lambda node: is_quantisable(node) and mutated.isdisjoint((node, *nodes_in(node.args))))
    for number, region in enumerate(region for region in found if any(map(is_worth_it, region.nodes))):
        for kind, values in (("in", region.entries), ("out", region.exits)):
            for i, value in enumerate(values):
                readers = [reader for reader in region.readers(value) if short_name(reader.target) != "quant_stub"]
                if dtype(value) is not torch.float32 or is_stub(value) or not readers:
                    continue
                # Two regions may read one value: the first reader tells their stubs apart.
                site = f"insert_quant_stubs@{value.name}.{kind}" + (f".{readers[0].name}" if kind == "in" else "")
                if not journal.allows(site):
                    continue
                if not copy_keeps_layout(draft.program.mode, value):
                    journal.refused(site, "insert_quant_stubs", place(value), "a stub would change its memory layout")
                    continue
                draft.insert_after(value, readers, "insert_quant_stubs", quant_stub, f"region{number}.{kind}{i}")
                journal.rewrote(site, "insert_quant_stubs", place(value))
    return draft.finish()


def is_quantisable(node):
    return short_name(node.target) in QUANTISABLE and dtype(node) is torch.float32


def is_worth_it(node):
    return short_name(node.target) in STARTS_A_REGION


def is_stub(value):
    return short_name(value.target) == "quant_stub"
