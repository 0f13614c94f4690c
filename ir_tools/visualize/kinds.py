"""Kinds of ops, for the fill of their boxes and the legend."""

from __future__ import annotations

from torch import fx

from ir_tools.ir.dialect import DIALECT_ONLY, op_name, short_name
from ir_tools.ir.host import fail, is_host
from ir_tools.torch_compat.operators import OpOverload, schema_of
from ir_tools.visualize.control import is_result, is_whole

# kind -> (fill colour, what the legend says)
KINDS: dict[str, tuple[str, str]] = {
    "fused": ("#a5d8ff", "fused: op, residual and activation in one"),
    "packed": ("#96f2d7", "oneDNN kernel, weight packed"),
    "quantised": ("#d0bfff", "quantisation"),
    "compute": ("#d0ebff", "convolution, linear, attention"),
    "norm": ("#ffec99", "normalisation"),
    "activation": ("#d8f5a2", "activation"),
    "cast": ("#fcc2d7", "change of dtype or layout"),
    "effect": ("#ffc9c9", "writes into its argument, or raises"),
    "control": ("#ffd8a8", "if, loop: condition and results"),
    "host": ("#dee2e6", "numbers and containers, no tensors"),
    "other": ("#f8f9fa", "other"),
}

_OPS_BY_KIND = {
    "compute": """conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear matmul mm bmm addmm
        baddbmm einsum scaled_dot_product_attention embedding lstm gru""",
    "norm": "batch_norm layer_norm group_norm instance_norm rms_norm local_response_norm softmax log_softmax",
    "activation": """relu relu6 hardtanh leaky_relu prelu hardswish hardsigmoid silu sigmoid tanh gelu elu selu mish
        clamp clamp_min clamp_max softplus""",
    "cast": "to to_mkldnn to_dense contiguous type_as _to_copy",
}
_KIND_OF_OP = {op: kind for kind, ops in _OPS_BY_KIND.items() for op in ops.split()}


def kind_of(node: fx.Node) -> str:
    """Which colour a call gets: a key of `KINDS`."""
    target = node.target
    writes = isinstance(target, OpOverload) and schema_of(target).is_mutable
    if is_whole(node) or is_result(node):
        return "control"
    if is_host(target):
        return "effect" if writes or target is fail else "host"
    namespace = op_name(target).partition("::")[0]
    if namespace == "quantized_decomposed" or short_name(target) == "quant_stub":
        return "quantised"
    if target in DIALECT_ONLY:
        return "fused"
    if namespace in ("mkldnn", "onednn"):
        return "packed"
    known = _KIND_OF_OP.get(short_name(target))
    if known:
        return known
    return "effect" if writes else "other"
