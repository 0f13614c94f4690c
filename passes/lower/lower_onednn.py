"""Lower convolutions and linears to oneDNN's fused kernels, with weights packed when the file is loaded.

    conv_act(x, w, b, act)               ->  mkldnn::_convolution_pointwise(x, pack(w), b, act)
    conv_act(x, w, b, r, act in {, relu})->  mkldnn::_convolution_pointwise.binary(x, r, pack(w), b, "add", act)
    linear_act(x, w, b, act)             ->  mkldnn::_linear_pointwise(x, pack(w), b, act)
    linear_act(x, w, b, r)               ->  mkldnn::_linear_pointwise.binary(x, r, pack(w), b, "add")
    conv2d, conv3d, linear               ->  the same without activation
    attention that fuse_attention fused  ->  scaled_dot_product_attention(q, k, v, mask, scale)
    mean(x, (2, 3)), adaptive_avg_pool2d(x, 1)  ->  avg_pool2d(x, (height, width))
    everything else of the dialect       ->  as in lower_aten

Which variant of a kernel (`passes/lower/variants`) is fastest is measured. By default layers and attention are fused, and means
stay. Where it is faster, residual and activation stay apart from the packed kernel, or all is left to ATen; attention is taken
apart again; means over pixels are pooled. `records` replays the tuning records of an earlier run; `variant=fused` takes the
defaults and measures nothing.

A sum with a residual that has no later user is written into the residual's memory. A packed convolution returns channels-last
results, and the ops between convolutions keep that layout, so it holds throughout; in a graph that writes in place or draws at
random, results are put back into the layout they had. oneDNN's fused relu and hardtanh return a number for NaN, where ATen
returns NaN.
"""

from functools import cache, partial
from typing import Any, Literal

import torch

from ir_tools.errors import OptionError
from ir_tools.ir import Block
from ir_tools.ir.dialect import aten, conv_act, linear_act, quant_stub
from ir_tools.rewrite import Call, RewriteLog, graph_pass, replace_by_table
from ir_tools.rewrite.decompositions import DECOMPOSITIONS, without_stub
from passes.lower.variants import attention, onednn, pooling
from passes.lower.variants.attention import ATTENTION, Attention, is_ours, later_keys
from passes.lower.variants.onednn import Layer
from passes.lower.variants.pooling import MEANS, Pooling
from passes.tune.tuning_record import TuningRecords

SUPPORTED = (torch.float32, torch.bfloat16)
LAYERS = (conv_act, aten.conv2d.default, aten.conv3d.default, linear_act, aten.linear.default)


@graph_pass(effects={"rounds"}, renamed={"choose": "variant", "choices": "records"})
def lower_onednn(
    program: Block,
    log: RewriteLog,
    tuning: TuningRecords,
    *,
    variant: Literal["measured", "fused"] = "measured",
    records: str | None = None,
) -> tuple[Block, TuningRecords | None]:
    if records is not None and variant == "fused":
        raise OptionError(f"lower_onednn: variant=fused replays nothing; leave out records={records}, or variant=fused")
    if records is not None:
        tuning.replay(records)
    measured = tuning if variant == "measured" else None

    def lowering(lower, *given):
        lower = partial(lower, measured, *given)
        return partial(in_its_layout, lower) if program.layout_is_observable else lower

    table: dict[Any, Any] = {quant_stub: without_stub, **dict.fromkeys(LAYERS, lowering(packed))}
    if any(is_ours(Call(node)) for node in program.calls):
        table[ATTENTION] = partial(if_ours, lowering(attended, cache(later_keys)))
    table |= dict.fromkeys(MEANS, lowering(averaged))
    return replace_by_table(program, table, "lower_onednn", log), measured


def packed(records, op, call):
    layer = Layer.of(call)
    if why_not := objection(layer):
        op.decline(why_not)
        return DECOMPOSITIONS[call.target](op, call) if call.target in DECOMPOSITIONS else None
    return in_best_variant(records, op, onednn, layer)


def attended(records, later, op, call):
    site = Attention.of(call, later)
    return site and in_best_variant(records, op, attention, site)


def averaged(records, op, call):
    site = Pooling.of(call)
    return site and in_best_variant(records, op, pooling, site)


def if_ours(lower, op, call):
    return lower(op, call) if is_ours(call) else None


def in_best_variant(records, op, kernel, site):
    """The layer, attention or mean in the variant that is fastest here; `kernel` is the module of its variants."""
    variants = kernel.variants_of(site)
    if records is None or not kernel.can_be_timed(site):
        return next(iter(variants.values()))(op, site)
    best = records.best(kernel.workload_key(site), partial(kernel.timed_variants, site), among=variants)
    if not best.is_default:
        op.decline(best.reason)
    return variants[best.variant](op, site)


def in_its_layout(lower, op, call):
    """In a graph whose results depend on layouts, the packed result is put back into the layout that it had."""
    if call.memory_format is None:
        op.decline("the graph writes in place or draws at random, and the layout of the result cannot be put back")
        return DECOMPOSITIONS[call.target](op, call) if call.target in DECOMPOSITIONS else None
    y = lower(op, call)
    return y if y is None or y.lies_like(call) else op.contiguous(y, memory_format=call.memory_format)


def objection(layer):
    """Why oneDNN's kernel cannot take this layer, None when it can."""
    if layer.x.shape is None:
        return "the shape of its input is unknown"
    if layer.w.shape is None:
        return "the shape of its weight is unknown"
    if layer.x.device.type != "cpu":
        return "oneDNN's kernels run on the CPU"
    if layer.x.dtype not in SUPPORTED or layer.w.dtype != layer.x.dtype:
        return f"oneDNN's kernels here take float32 and bfloat16, not {layer.x.dtype} with a weight of {layer.w.dtype}"
    sizes = [n for size in layer.sizes or () for n in size]
    if not all(isinstance(n, (int, float)) for n in (*sizes, layer.groups, *layer.act_args)):
        return "a size, or a number of the activation, is known at run time only"
    if not layer.w.is_constant:
        return "the weight is not a constant, so it cannot be packed ahead of time"
    if 0 in layer.x.shape or 0 in layer.w.shape:
        return "an operand has no elements"
    if layer.sizes is not None and (layer.x.rank != layer.w.rank or layer.w.rank not in (4, 5)):
        return "oneDNN's packed convolution takes batched 2-d and 3-d inputs"
    return None
