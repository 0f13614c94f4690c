"""Compute in half precision where it pays and is safe; the model's inputs and outputs keep their dtypes.

    level   matrix ops   pointwise, shape and pool ops        norms, softmax, exp, long sums     ops in no table
    O1      half         half when all float operands are     float                              float
    O2      half         half                                 float                              float
    O3      half         half                                 half                               float

Constants (weights, biases) are cast once, ahead of time; a value is cast once per dtype; a cast that would undo another
one reads its source instead. Levels are named after NVIDIA Apex's. An op with a float64 operand, an op that writes in
place, and an explicit cast in the model stay as they are. So does an op with a number beyond the half dtype's range (a
mask of -1e9), and the pointwise and shape ops behind it; their result is clamped to that range where it is cast.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import torch

from ir_tools.ir import Block, Draft
from ir_tools.ir.dialect import nodes_in, numbers_in, short_name
from ir_tools.ir.facts import dtype as dtype_of
from ir_tools.ir.facts import is_unknown
from ir_tools.ir.origin import origin, place
from ir_tools.ir.view import upstream
from ir_tools.rewrite import Journal, graph_pass
from ir_tools.rewrite.cast import Caster, is_float

MATRIX = frozenset(
    """conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d conv_act linear linear_act matmul mm bmm
    addmm baddbmm addbmm mv einsum scaled_dot_product_attention""".split()
)
FOLLOWS = frozenset(
    """add sub mul div rsub neg abs relu relu6 hardtanh leaky_relu hardswish hardsigmoid silu sigmoid tanh gelu elu mish
    clamp clamp_min clamp_max maximum minimum where masked_fill embedding
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d adaptive_max_pool2d
    upsample_nearest2d upsample_bilinear2d pad constant_pad_nd reflection_pad2d replication_pad2d
    reshape view flatten unflatten transpose permute t numpy_T mT squeeze unsqueeze expand slice select narrow index
    gather cat stack split split_with_sizes chunk unbind roll flip repeat tile contiguous clone movedim
    pixel_shuffle pixel_unshuffle channel_shuffle prelu dropout feature_dropout alpha_dropout quant_stub getitem""".split()
)
FRAGILE = frozenset(
    """softmax log_softmax layer_norm batch_norm group_norm instance_norm rms_norm exp expm1 log log1p log2 log10 pow
    rsqrt sqrt reciprocal sum mean var std norm linalg_vector_norm cumsum cumprod prod logsumexp softplus erf
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d cosine_similarity normalize""".split()
)
NO_KERNEL = frozenset("avg_pool3d cdist".split())
"""Torch's CPU kernels know no half dtype."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@graph_pass(declares="lower_precision")
def cast_half(
    program: Block,
    journal: Journal,
    *,
    dtype: Literal["bfloat16", "float16"] = "bfloat16",
    level: Literal["O1", "O2", "O3"] = "O2",
    keep_float: tuple[str, ...] = (),
    overrides: Mapping[str, Literal["O1", "O2", "O3", "float"]] = MappingProxyType({}),
    on_slower: Literal["warn", "keep", "revert"] = "warn",
) -> Block:
    half = DTYPES[dtype]
    draft = Draft.of(program)
    caster = Caster(draft, "cast_half")
    mutated = set(draft.program.mutated_values)
    original = {node: dtype_of(node) for node in draft.program.nodes}
    outputs = [dtype_of(value) for value in nodes_in(draft.program.output.args)]

    def was_cast(operand):
        return dtype_of(operand) is half and original.get(operand) is not half

    precise = upstream(draft.program, is_periodic, passes_a_phase_on(draft.program))
    for node in draft.program.calls:
        site = f"cast_half@{node.name}"
        why_float = IS_A_PHASE if node in precise else reason_for_float(node, original, mutated, caster.wide, level, half)
        if why_float is IS_A_CAST:
            continue
        in_half = why_float is None and journal.allows(site)
        new = caster.recompute(node, half, is_float) if in_half else caster.recompute(node, torch.float32, was_cast)
        original[new] = original[node]
        if node in mutated:
            mutated.add(new)
        if why_float in (IS_WIDE, READS_WIDE):
            caster.wide.add(new)
        if in_half and new is not node:
            journal.rewrote(site, short_name(node.target), place(node))
        elif why_float is IS_WIDE or (new is not node and why_float not in (None, *EXPECTED)):
            journal.refused(site, "cast_half", place(node), why_float)
    caster.restore_outputs(outputs)
    return draft.finish()


FOLLOWS_FLOAT = "an operand is float, and at O1 the op follows its operands"
IS_FRAGILE = "norms, softmax, exponentials and long sums lose too much in half precision"
IS_A_CAST = "the model casts explicitly"
IS_WIDE = "a number in it lies beyond the range of half precision; its result is clamped where it is cast"
READS_WIDE = "an operand may lie beyond the range of half precision"
IS_A_PHASE = "a sine, a cosine or a rounding is taken of it, where half precision has no digits behind the point"
LACKS_A_KERNEL = "torch has no kernel for it in half precision on the CPU"
KEEPS_FLOAT = "the model switches autocast off around it"
IS_UNKNOWN = "unknown, give example_inputs: the dtype of a value that comes out of a list or dict"
EXPECTED = (FOLLOWS_FLOAT, IS_FRAGILE, IS_A_CAST, READS_WIDE, IS_A_PHASE, KEEPS_FLOAT)
PERIODIC = frozenset("sin cos tan floor ceil round trunc frac remainder fmod".split())


def is_periodic(node):
    return short_name(node.target) in PERIODIC


def passes_a_phase_on(program):
    """Ops between a position and the sine of it: pointwise and shape ops, and a product that no other product feeds."""
    after_product = set()
    for node in program.calls:
        if any(n in after_product or short_name(n.target) in MATRIX for n in nodes_in(node.args)):
            after_product.add(node)
    return lambda node: short_name(node.target) in FOLLOWS or (
        short_name(node.target) in MATRIX and node not in after_product
    )


def reason_for_float(node, original, mutated, wide, level, half):
    """Why an op is computed in float, None when it may be computed in half."""
    name = short_name(node.target)
    if name == "to":
        return IS_A_CAST
    if origin(node).keep_float:
        return KEEPS_FLOAT
    operands = [n for n in nodes_in(node.args) if (dtype_of(n) or torch.bool).is_floating_point]
    if node in mutated or any(n in mutated for n in nodes_in(node.args)):
        return "its operands or result are written in place"
    if any(is_unknown(n) for n in (node, *nodes_in(node.args))):
        return IS_UNKNOWN
    if any(dtype_of(n) is torch.float64 for n in operands) or original.get(node) is torch.float64:
        return "an operand or the result is float64"
    largest = torch.finfo(half).max
    if original.get(node) is torch.float32 and any(largest <= abs(number) < math.inf for number in numbers_in(node)):
        return IS_WIDE
    if name in MATRIX:
        return None
    if name in FOLLOWS and not wide.isdisjoint(operands):
        return READS_WIDE
    if name in FOLLOWS:
        all_half = all(dtype_of(n) is half for n in operands if n.op != "get_attr")
        return None if level != "O1" or all_half else FOLLOWS_FLOAT
    if name in NO_KERNEL:
        return LACKS_A_KERNEL
    if name in FRAGILE:
        return None if level == "O3" else IS_FRAGILE
    return f"{name} is in no table of cast_half"
