"""One canonical form per op: which op each variant that front ends record is rewritten to.

    _convolution, convolution, conv2d.padding      ->  conv1d, conv2d, conv3d, conv_transpose*
    linear(x, w) with w of one axis                ->  matmul(x, w)
    linear(x, w, b), b not one number per output   ->  linear(x, w) + b
    relu6(x)                                       ->  hardtanh(x, 0, 6)
    norm(x, p, dim)                                ->  linalg_vector_norm(x, p, dim)
    reshape_as(x, y), view_as(x, y)                ->  reshape(x, sizes of y)   (where they are known)
    to, float, type_as, contiguous, detach, ...    ->  the value itself when nothing changes, else to.dtype or clone

An op that is not named in this file is canonical as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ir_tools.errors import CaptureError
from ir_tools.ir import Draft, facts, shape_inference
from ir_tools.ir.dialect import op_name, short_name
from ir_tools.ir.facts import TensorFact
from ir_tools.torch_compat.operators import OpOverload, schema_of

aten = torch.ops.aten

Canonicalization = Callable[..., Any]
"""Takes the draft, the overload, and all its arguments by name; gives a node, or an existing value for an identity."""
CANONICALIZATIONS: dict[str, Canonicalization] = {}


def canonicalizes(*names: str) -> Callable[[Canonicalization], Canonicalization]:
    def register(function: Canonicalization) -> Canonicalization:
        for name in names:
            CANONICALIZATIONS[f"aten::{name}"] = function
        return function

    return register


# -- convolutions -------------------------------------------------------------------------------------------------------

_CONV = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
_CONV_TRANSPOSE = {1: aten.conv_transpose1d.default, 2: aten.conv_transpose2d.input, 3: aten.conv_transpose3d.input}


@canonicalizes("_convolution", "convolution")
def _convolution(draft: Draft, target: OpOverload, a: dict[str, Any]) -> Any:
    weight_rank = facts.rank(a["weight"])
    if weight_rank is None:
        raise CaptureError("a convolution whose weight has no known rank")
    dims = weight_rank - 2
    stride, padding, dilation, output_padding = (
        list(v) * dims if len(v) == 1 else list(v) for v in (a["stride"], a["padding"], a["dilation"], a["output_padding"])
    )
    x, w, b, groups = a["input"], a["weight"], a["bias"], a["groups"]
    if a["transposed"]:
        return draft.call(_CONV_TRANSPOSE[dims], x, w, b, stride, padding, output_padding, groups, dilation)
    return draft.call(_CONV[dims], x, w, b, stride, padding, dilation, groups)


@canonicalizes("conv1d", "conv2d", "conv3d", "_convolution_mode")
def _conv_with_padding_mode(draft: Draft, target: OpOverload, a: dict[str, Any]) -> Any:
    mode = a["padding"]
    if not isinstance(mode, str):
        return draft.call(target, *a.values())
    x, w = a.get("input"), a["weight"]
    kernel = facts.shape(w)
    if kernel is None:
        raise CaptureError("a convolution whose weight has no known shape")
    dims = len(kernel) - 2
    dilation = list(a["dilation"]) if len(a["dilation"]) == dims else list(a["dilation"]) * dims
    stride = list(a["stride"]) if len(a["stride"]) == dims else list(a["stride"]) * dims
    total = [0] * dims if mode == "valid" else [d * (k - 1) for d, k in zip(dilation, kernel[2:], strict=True)]
    if any(t % 2 for t in total):
        # torch pads the odd element on the right: pad explicitly, last dimension first.
        pads = [p for t in reversed(total) for p in (t // 2, t - t // 2)]
        x = draft.call(aten.constant_pad_nd.default, x, pads, 0)
        total = [0] * dims
    return draft.call(_CONV[dims], x, w, a["bias"], stride, [t // 2 for t in total], dilation, a["groups"])


# -- norms, activations, pools ------------------------------------------------------------------------------------------


@canonicalizes("batch_norm", "layer_norm", "instance_norm", "group_norm")
def _norm(draft: Draft, target: OpOverload, a: dict[str, Any]) -> Any:
    # Front ends record the cuDNN flag differently; torch sets it where the model runs.
    for switch in ("cudnn_enabled", "cudnn_enable"):
        if switch in a:
            a[switch] = True
    return draft.call(target, **a)


@canonicalizes("norm")
def _vector_norm(draft: Draft, target: OpOverload, a: dict[str, Any]) -> Any:
    # ATen's `norm` calls this very op (impl_func_norm in ReduceOps.cpp), as `Tensor.norm` does in Python.
    if "names" in schema_of(target).overload_name:
        return draft.call(target, **a)
    order = 2.0 if a["p"] is None else a["p"]
    return draft.call(
        aten.linalg_vector_norm.default, a["self"], order, a.get("dim"), a.get("keepdim", False), dtype=a.get("dtype")
    )


@canonicalizes("relu6")
def _relu6(draft: Draft, target: OpOverload, a: dict[str, Any]) -> Any:
    return draft.call(aten.hardtanh.default, a["self"], 0.0, 6.0)


@canonicalizes("relu6_")
def _relu6_(draft: Draft, target: OpOverload, a: dict[str, Any]) -> Any:
    return draft.call(aten.hardtanh_.default, a["self"], 0.0, 6.0)


@canonicalizes("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d")
def _pool(draft: Draft, target: OpOverload, a: dict[str, Any]) -> Any:
    if a["stride"] == []:
        a["stride"] = list(a["kernel_size"])
    return draft.call(target, **a)


@canonicalizes("dropout_", "feature_dropout_", "alpha_dropout_", "feature_alpha_dropout_")
def _dropout_in_place(draft: Draft, target: OpOverload, a: dict[str, Any]) -> Any:
    # In eval an in-place dropout is the identity; nothing is written.
    if not a["train"] or a["p"] == 0:
        return draft.call(getattr(aten, short_name(target).rstrip("_")).default, *a.values())
    return draft.call(target, *a.values())


# -- linear layers, and what decompositions made ------------------------------------------------------------------------


@canonicalizes("_native_batch_norm_legit_no_training")
def _decomposed_batch_norm(draft: Draft, target: OpOverload, a: dict[str, Any]) -> Any:
    statistics = (a["running_mean"], a["running_var"])
    x, affine = a["input"], (a["weight"], a["bias"])
    return draft.call(aten.batch_norm.default, x, *affine, *statistics, False, a["momentum"], a["eps"], True), None, None


@canonicalizes("native_layer_norm")
def _decomposed_layer_norm(draft: Draft, target: OpOverload, a: dict[str, Any]) -> Any:
    shape, affine = a["normalized_shape"], (a["weight"], a["bias"])
    return draft.call(aten.layer_norm.default, a["input"], shape, *affine, a["eps"], True), None, None


@canonicalizes("addmm")
def _decomposed_linear(draft: Draft, target: OpOverload, a: dict[str, Any]) -> Any:
    weight = transposed_operand(a["mat2"])
    if weight is None or a["beta"] != 1 or a["alpha"] != 1 or facts.rank(a["self"]) != 1:
        return draft.call(target, **a)
    return draft.call(aten.linear.default, a["mat1"], weight, a["self"])


@canonicalizes("linear")
def _linear(draft: Draft, target: OpOverload, a: dict[str, Any]) -> Any:
    if facts.rank(a["weight"]) == 1:  # which takes no bias, and has no output features
        return draft.call(aten.matmul.default, a["input"], a["weight"])
    bias, weight = facts.shape(a["bias"]) if a["bias"] is not None else None, facts.shape(a["weight"])
    if bias is not None and weight is not None and bias != weight[:1]:  # it is added as sums are: it broadcasts
        return draft.call(aten.add.Tensor, draft.call(target, **{**a, "bias": None}), a["bias"])
    return draft.call(target, **a)


def transposed_operand(value: Any) -> fx.Node | None:
    """`w` when `value` is the transpose of a matrix `w`, else None."""
    if not isinstance(value, fx.Node) or value.op != "call_function" or facts.rank(value) != 2:
        return None
    name, (source, *axes) = op_name(value.target), value.args
    flips = name in ("aten::t", "aten::numpy_T") or (name == "aten::permute" and axes in ([[1, 0]], [[-1, -2]]))
    flips = flips or (name == "aten::transpose" and sorted(map(str, axes)) in (["0", "1"], ["-1", "-2"]))
    return source if flips and isinstance(source, fx.Node) else None


@canonicalizes("_softmax", "_log_softmax")
def _decomposed_softmax(draft: Draft, target: OpOverload, a: dict[str, Any]) -> Any:
    if a["half_to_float"]:
        return draft.call(target, **a)
    pure = aten.softmax.int if short_name(target) == "_softmax" else aten.log_softmax.int
    return draft.call(pure, a["self"], a["dim"], None)


# -- identities ---------------------------------------------------------------------------------------------------------


@canonicalizes("lift_fresh_copy")
def _fresh_literal(draft: Draft, target: OpOverload, a: dict[str, Any]) -> Any:
    # A tensor made of numbers inside forward: new at every call. `functionalize` drops the copy where no op writes into it.
    return draft.call(aten.clone.default, a["self"])


@canonicalizes("resolve_conj", "resolve_neg")
def _resolved(draft: Draft, target: OpOverload, a: dict[str, Any]) -> Any:
    # Only complex tensors, and their real and imaginary parts, are conjugated or negated lazily.
    dtype = facts.dtype(a["self"])
    is_plain = dtype is not None and not dtype.is_complex and op_name(target) == "aten::resolve_conj"
    return a["self"] if is_plain else draft.call(target, **a)


@canonicalizes("detach", "detach_", "alias", "lift_fresh", "positive", "data")
def _identity(draft: Draft, target: OpOverload, a: dict[str, Any]) -> Any:
    return a["self"]


@canonicalizes("_assert_scalar")
def _assert_scalar(draft: Draft, target: OpOverload, a: dict[str, Any]) -> Any:
    if isinstance(a["self"], fx.Node):
        draft.require(a["self"], a["assert_msg"])


@canonicalizes("_assert_tensor_metadata", "sym_constrain_range", "sym_constrain_range_for_size")
def _dropped(draft: Draft, target: OpOverload, a: dict[str, Any]) -> Any:
    # Exporters insert these for facts that the emitted module checks at its inputs.
    return None


@canonicalizes("contiguous")
def _contiguous(draft: Draft, target: OpOverload, a: dict[str, Any]) -> Any:
    # Whether it copies depends on the input's layout at each call: `functionalize` drops it where that is unobservable.
    return draft.call(target, **a)


@canonicalizes("to", "type_as", "_to_copy", "float", "double", "half", "bfloat16", "int", "long")
def _to(draft: Draft, target: OpOverload, a: dict[str, Any]) -> Any:
    x = a["self"]
    before = facts.fact(x)
    result = shape_inference.compute_fact(draft.program.mode, target, tuple(_positional(target, a)), _keyword_only(target, a))
    if not isinstance(before, TensorFact) or not isinstance(result, TensorFact):
        return draft.call(target, **a)
    if result.device != before.device:
        raise CaptureError(
            f"the model moves a value from {before.device} to {result.device}; models over several devices cannot be captured"
        )
    keeps = a.get("memory_format") in (None, torch.preserve_format)
    same_layout = keeps or (before.strides is not None and result.strides == before.strides)
    copies = bool(a.get("copy", False)) or op_name(target) == "aten::_to_copy"
    if not same_layout:
        x = draft.call(aten.contiguous.default, x, memory_format=a["memory_format"])
    if result.dtype != before.dtype:
        return draft.call(aten.to.dtype, x, result.dtype)
    if copies and same_layout:
        return draft.call(aten.clone.default, x)
    return x


@canonicalizes("slice")
def _slice(draft: Draft, target: OpOverload, a: dict[str, Any]) -> Any:
    size, end = facts.shape(a["self"]), a["end"]
    if size is not None and a["step"] == 1 and a["start"] in (None, 0) and not isinstance(a["dim"], fx.Node):
        length = size[a["dim"]]
        if end is None or (isinstance(end, int) and (end == LAST or (isinstance(length, int) and end >= length))):
            return a["self"]
    return draft.call(target, **a)


LAST = 2**63 - 1
"""How TorchScript and exporters write a slice up to the end."""


@canonicalizes("reshape_as", "view_as")
def _reshape_as(draft: Draft, target: OpOverload, a: dict[str, Any]) -> Any:
    # Only its shape is read: as an operand, the other tensor would be kept from being folded or fused.
    sizes = facts.shape(a["other"])
    if sizes is None or not all(isinstance(size, int) for size in sizes):
        return draft.call(target, **a)
    plain = aten.reshape if short_name(target) == "reshape_as" else aten.view
    return draft.call(plain.default, a["self"], list(sizes))


@canonicalizes("expand")
def _expand(draft: Draft, target: OpOverload, a: dict[str, Any]) -> Any:
    size = facts.shape(a["self"])
    if size is not None and len(size) == len(a["size"]) and all(w in (-1, s) for s, w in zip(size, a["size"], strict=True)):
        return a["self"]
    return draft.call(target, **a)


@canonicalizes("as_strided", "as_strided_")
def _as_strided(draft: Draft, target: OpOverload, a: dict[str, Any]) -> Any:
    raise CaptureError("as_strided reads memory by address; a compiler that may change layouts cannot keep its meaning")


def _positional(target: OpOverload, a: dict[str, Any]) -> list[Any]:
    return [a[s.name] for s in schema_of(target).arguments if not s.kwarg_only]


def _keyword_only(target: OpOverload, a: dict[str, Any]) -> dict[str, Any]:
    return {s.name: a[s.name] for s in schema_of(target).arguments if s.kwarg_only}
