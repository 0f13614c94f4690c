"""Lower convolutions and linears to oneDNN's fused kernels, with weights packed when the file is loaded.

    conv_act(x, w, b, act)               ->  mkldnn::_convolution_pointwise(x, pack(w), b, act)
    conv_act(x, w, b, r, act in {, relu})->  mkldnn::_convolution_pointwise.binary(x, r, pack(w), b, "add", act)
    linear_act(x, w, b, act)             ->  mkldnn::_linear_pointwise(x, pack(w), b, act)
    linear_act(x, w, b, r)               ->  mkldnn::_linear_pointwise.binary(x, r, pack(w), b, "add")
    conv2d, conv3d, linear               ->  the same without activation
    attention that fuse_attention fused  ->  scaled_dot_product_attention(q, k, v, mask, scale)
    mean(x, (2, 3)), adaptive_avg_pool2d(x, 1)  ->  avg_pool2d(x, (height, width))
    everything else of the dialect       ->  as in lower_aten

Where it is measured to be faster, residual and activation stay apart from the packed kernel, or all is left to ATen
(`onednn_forms`), attention is taken apart again (`attention_forms`), and means over pixels are pooled (`pooling_forms`);
`choices` replays what an earlier run chose, `choose=fused` measures nothing and fuses. A sum with a residual that nobody reads
afterwards is written into the residual's memory. A packed convolution gives channels-last results, and the ops between
convolutions keep that layout, so it holds throughout; in a graph that writes in place or draws at random, results are put back
into the layout they had. oneDNN's fused relu and hardtanh give a number for NaN, where ATen gives NaN.
"""

from functools import cache, partial
from typing import Any, Literal

import torch

from ir_tools.ir import Block
from ir_tools.ir.dialect import aten, conv_act, linear_act, quant_stub
from ir_tools.rewrite import Call, Journal, OptionError, graph_pass, replace_by_table
from ir_tools.rewrite.decompositions import DECOMPOSITIONS, without_stub
from passes.lower.variants import attention as attention_forms
from passes.lower.variants import onednn as onednn_forms
from passes.lower.variants import pooling as pooling_forms
from passes.lower.variants.attention import ATTENTION, Attention, is_ours, later_keys
from passes.lower.variants.onednn import Product
from passes.lower.variants.pooling import MEANS, Pooling
from passes.tune.tuning_record import Choices

SUPPORTED = (torch.float32, torch.bfloat16)
PRODUCTS = (conv_act, aten.conv2d.default, aten.conv3d.default, linear_act, aten.linear.default)


@graph_pass(declares="reassociates")
def lower_onednn(
    program: Block, journal: Journal, *, choose: Literal["measured", "fused"] = "measured", choices: str | None = None
) -> Block:
    if choices is not None and choose == "fused":
        raise OptionError(f"lower_onednn: choose=fused replays nothing; leave out choices={choices}, or choose=fused")
    if choose == "measured" and journal.choices is None:  # the blocks of a Program share one table
        journal.choices = Choices() if choices is None else Choices.load(choices)

    def lowering(lower, *given):
        lower = partial(lower, journal.choices, *given)
        return partial(in_its_layout, lower) if program.layout_tells else lower

    table: dict[Any, Any] = {quant_stub: without_stub, **dict.fromkeys(PRODUCTS, lowering(packed))}
    if any(is_ours(Call(node)) for node in program.calls):
        table[ATTENTION] = partial(if_ours, lowering(attended, cache(later_keys)))
    table |= dict.fromkeys(MEANS, lowering(averaged))
    return replace_by_table(program, table, "lower_onednn", journal)


def packed(choices, op, call):
    product = Product.of(call)
    if why_not := objection(product):
        op.decline(why_not)
        return DECOMPOSITIONS[call.target](op, call) if call.target in DECOMPOSITIONS else None
    return in_its_form(choices, op, onednn_forms, product)


def attended(choices, later, op, call):
    attention = Attention.of(call, later)
    return attention and in_its_form(choices, op, attention_forms, attention)


def averaged(choices, op, call):
    pooling = Pooling.of(call)
    return pooling and in_its_form(choices, op, pooling_forms, pooling)


def if_ours(lower, op, call):
    return lower(op, call) if is_ours(call) else None


def in_its_form(choices, op, module, what):
    """The product or the attention in the form that is faster here; `module` has the forms."""
    forms = module.forms_of(what)
    if choices is None or not module.can_be_timed(what):
        return next(iter(forms.values()))(op, what)
    choice = choices.choose(module.signature(what), partial(module.timed_forms, what), among=forms)
    if not choice.is_favourite:
        op.decline(choice.reason)
    return forms[choice.form](op, what)


def in_its_layout(lower, op, call):
    """In a graph whose layouts show in the numbers, the packed result is put back into the layout that it had."""
    if call.memory_format is None:
        op.decline("the graph writes in place or draws at random, and the layout of the result cannot be put back")
        return DECOMPOSITIONS[call.target](op, call) if call.target in DECOMPOSITIONS else None
    y = lower(op, call)
    return y if y is None or y.lies_like(call) else op.contiguous(y, memory_format=call.memory_format)


def objection(p):
    """Why oneDNN's kernel cannot take this product, None when it can."""
    if p.x.shape is None or p.w.shape is None:
        return "unknown, give example_inputs: shapes"
    if p.x.device.type != "cpu":
        return "oneDNN's kernels run on the CPU"
    if p.x.dtype not in SUPPORTED or p.w.dtype != p.x.dtype:
        return f"oneDNN's kernels here take float32 and bfloat16, not {p.x.dtype} with a weight of {p.w.dtype}"
    if not all(isinstance(n, (int, float)) for n in (*(n for size in p.sizes or () for n in size), p.groups, *p.act_args)):
        return "a size, or a number of the activation, is known at run time only"
    if not p.w.is_constant:
        return "the weight is not a constant, so it cannot be packed ahead of time"
    if 0 in p.x.shape or 0 in p.w.shape:
        return "an operand has no elements"
    if p.sizes is not None and (p.x.rank != p.w.rank or p.w.rank not in (4, 5)):
        return "oneDNN's packed convolution takes batched 2-d and 3-d inputs"
    return None
