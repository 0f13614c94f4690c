"""One spelling per op: every front end builds its Program through `Normalizer`, and ends with `purify`.

    _convolution, convolution, conv2d.padding      ->  conv1d, conv2d, conv3d, conv_transpose*
    linear(x, w) with w of one axis                ->  matmul(x, w)
    linear(x, w, b), b not one number per output   ->  linear(x, w) + b
    relu6(x)                                       ->  hardtanh(x, 0, 6)
    norm(x, p, dim)                                ->  linalg_vector_norm(x, p, dim)
    view, _unsafe_view                             ->  reshape          (where nobody writes into the value)
    reshape_as(x, y), view_as(x, y)                ->  reshape(x, sizes of y)   (where they are known)
    to, float, type_as, contiguous, detach, ...    ->  the value itself when nothing changes, else to.dtype or clone
    add.Tensor(x, 2)                               ->  add.Scalar(x, 2)
    multiply, divide, clip, concat, arccos, ...    ->  mul, div, clamp, cat, acos, ...
    relu_(x), add_(x, y), ...                      ->  relu(x), add(x, y)   (where nobody can tell)
    writes into memory that nobody reads           ->  nothing
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ir_tools.frontends.errors import CaptureError
from ir_tools.ir import Draft, facts
from ir_tools.ir.dialect import (
    acts,
    aliased_nodes,
    argument_kind,
    changed_containers,
    getitem,
    has_effect,
    map_argument,
    op_name,
    overload_name,
    short_name,
    spell_arguments,
    written_arguments,
    written_nodes,
)
from ir_tools.ir.host import value_type
from ir_tools.ir.origin import place
from ir_tools.ir.program import Program
from ir_tools.torch_compat.fake import FakeTensor
from ir_tools.torch_compat.operators import OpOverload, schema_of
from ir_tools.torch_compat.tensors import storage_id

aten = torch.ops.aten

Spelling = Callable[..., Any]
_SPELLINGS: dict[str, Spelling] = {}

_CONV = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
_CONV_TRANSPOSE = {1: aten.conv_transpose1d.default, 2: aten.conv_transpose2d.input, 3: aten.conv_transpose3d.input}


class Normalizer:
    """Adds ops to a draft in the dialect's one spelling. `call` returns a node, or an existing value for an identity."""

    def __init__(self, draft: Draft):
        self.draft = draft

    def call(self, target: Any, /, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(target, OpOverload):
            return self.draft.call(target, *args, **kwargs)
        if target.namespace not in ("aten", "torch_passes", "mkldnn", "torchvision", "quantized_decomposed"):
            raise CaptureError(f"the operator {overload_name(target)} is not an ATen operator and cannot be captured")
        target = _scalar_overload(usual_name(target), args, kwargs)
        args, kwargs = spell_arguments(target, args, kwargs)
        args = tuple(map_argument(a, self._as_value) for a in args)
        spelling = _SPELLINGS.get(op_name(target))
        if spelling is None:
            return self.draft.call(target, *args, **kwargs)
        named = dict(zip((a.name for a in schema_of(target).arguments if not a.kwarg_only), args, strict=True)) | kwargs
        return spelling(self.draft, target, named)

    def _as_value(self, leaf: Any) -> Any:
        """A tensor that a front end holds becomes a constant, which has a fact like every value."""
        held = isinstance(leaf, torch.Tensor) and not isinstance(leaf, FakeTensor)
        return self.draft.constant("constant", leaf) if held else leaf


# ATen's second names, which TorchScript reads as the first (torch/csrc/jit/passes/normalize_ops.cpp). With a "_" behind
# both it is the op in place.
SECOND_NAMES: dict[str, str] = dict(
    pair.split("=")
    for pair in """absolute=abs adjoint=mH arccos=acos arccosh=acosh arcsin=asin arcsinh=asinh arctan=atan arctan2=atan2
    arctanh=atanh clip=clamp concat=cat concatenate=cat det=linalg_det divide=div fix=trunc ger=outer greater=gt
    greater_equal=ge inverse=linalg_inv less=lt less_equal=le linalg_matmul=matmul matrix_exp=linalg_matrix_exp
    matrix_power=linalg_matrix_power moveaxis=movedim multiply=mul negative=neg not_equal=ne
    orgqr=linalg_householder_product row_stack=vstack special_digamma=digamma special_erf=erf special_erfc=erfc
    special_erfinv=erfinv special_exp2=exp2 special_expit=sigmoid special_expm1=expm1 special_gammainc=igamma
    special_gammaincc=igammac special_gammaln=lgamma special_i0=i0 special_log1p=log1p special_log_softmax=log_softmax
    special_logit=logit special_logsumexp=logsumexp special_multigammaln=mvlgamma special_polygamma=polygamma
    special_psi=digamma special_round=round special_sinc=sinc special_softmax=softmax special_xlogy=xlogy subtract=sub
    swapaxes=transpose swapdims=transpose true_divide=div""".split()
)


@functools.cache
def usual_name(target: OpOverload) -> OpOverload:
    """`mul.Tensor` for `multiply.Tensor`; an op without a second name is itself."""
    name = short_name(target)
    in_place = "_" if name.endswith("_") else ""
    usual = SECOND_NAMES.get(name.removesuffix("_"))
    if target.namespace != "aten" or usual is None:
        return target
    packet = getattr(aten, usual + in_place, None)
    overloads = [getattr(packet, overload) for overload in packet.overloads()] if packet is not None else []
    return next((overload for overload in overloads if _takes_what(target, overload)), target)


def _takes_what(second: OpOverload, usual: OpOverload) -> bool:
    """Any call of `second` is one of `usual`: arguments of the same kinds, under the same names where they go by name."""
    ours, theirs = schema_of(usual).arguments, schema_of(second).arguments
    return len(ours) == len(theirs) and all(
        str(a.type) == str(b.type) and (a.name == b.name if b.kwarg_only else not a.kwarg_only)
        for a, b in zip(ours, theirs, strict=True)
    )


def _spells(*names: str) -> Callable[[Spelling], Spelling]:
    def register(function: Spelling) -> Spelling:
        for name in names:
            _SPELLINGS[f"aten::{name}"] = function
        return function

    return register


def _is_number(value: Any) -> bool:
    if isinstance(value, fx.Node):
        return value_type(value) in ("int", "float", "bool", "number", "complex")
    return isinstance(value, (bool, int, float, complex))


def _scalar_overload(target: OpOverload, args: tuple, kwargs: dict[str, Any]) -> OpOverload:
    """`add.Scalar` for `add.Tensor` called with a plain number where a tensor is declared."""
    positional = [a for a in schema_of(target).arguments if not a.kwarg_only]
    for declared, value in zip(positional, args, strict=False):
        if argument_kind(declared) == "Tensor" and _is_number(value):
            wanted = schema_of(target).overload_name.replace("Tensor", "Scalar") or "Scalar"
            packet = target.overloadpacket
            for name in (wanted, f"Tensor_{wanted}", "ScalarOther", "Scalar"):
                if name in packet.overloads():
                    return getattr(packet, name)
            raise CaptureError(f"{overload_name(target)} is given the number {value} where it declares a tensor")
    return target


# -- convolutions -------------------------------------------------------------------------------------------------------


@_spells("_convolution", "convolution")
def _convolution(draft: Draft, target: OpOverload, a: dict[str, Any]) -> Any:
    weight_rank = facts.rank(a["weight"])
    if weight_rank is None:
        raise CaptureError("a convolution whose weight has no known rank")
    dims = weight_rank - 2
    stride, padding, dilation, output_padding = (
        list(v) * dims if len(v) == 1 else list(v)
        for v in (a["stride"], a["padding"], a["dilation"], a["output_padding"])
    )
    x, w, b, groups = a["input"], a["weight"], a["bias"], a["groups"]
    if a["transposed"]:
        return draft.call(_CONV_TRANSPOSE[dims], x, w, b, stride, padding, output_padding, groups, dilation)
    return draft.call(_CONV[dims], x, w, b, stride, padding, dilation, groups)


@_spells("conv1d", "conv2d", "conv3d", "_convolution_mode")
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


@_spells("batch_norm", "layer_norm", "instance_norm", "group_norm")
def _norm(draft: Draft, target: OpOverload, a: dict[str, Any]) -> Any:
    # The switch for cuDNN is torch's to set where the model runs; front ends record it differently.
    for switch in ("cudnn_enabled", "cudnn_enable"):
        if switch in a:
            a[switch] = True
    return draft.call(target, **a)


@_spells("norm")
def _vector_norm(draft: Draft, target: OpOverload, a: dict[str, Any]) -> Any:
    # ATen's `norm` calls this very op (impl_func_norm in ReduceOps.cpp), as `Tensor.norm` does in Python.
    if "names" in schema_of(target).overload_name:
        return draft.call(target, **a)
    order = 2.0 if a["p"] is None else a["p"]
    return draft.call(
        aten.linalg_vector_norm.default, a["self"], order, a.get("dim"), a.get("keepdim", False), dtype=a.get("dtype")
    )


@_spells("relu6")
def _relu6(draft: Draft, target: OpOverload, a: dict[str, Any]) -> Any:
    return draft.call(aten.hardtanh.default, a["self"], 0.0, 6.0)


@_spells("relu6_")
def _relu6_(draft: Draft, target: OpOverload, a: dict[str, Any]) -> Any:
    return draft.call(aten.hardtanh_.default, a["self"], 0.0, 6.0)


@_spells("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d")
def _pool(draft: Draft, target: OpOverload, a: dict[str, Any]) -> Any:
    if a["stride"] == []:
        a["stride"] = list(a["kernel_size"])
    return draft.call(target, **a)


@_spells("dropout_", "feature_dropout_", "alpha_dropout_", "feature_alpha_dropout_")
def _dropout_in_place(draft: Draft, target: OpOverload, a: dict[str, Any]) -> Any:
    # In eval an in-place dropout is the identity; nothing is written.
    if not a["train"] or a["p"] == 0:
        return draft.call(getattr(aten, short_name(target).rstrip("_")).default, *a.values())
    return draft.call(target, *a.values())


# -- identities ---------------------------------------------------------------------------------------------------------


@_spells("lift_fresh_copy")
def _fresh_literal(draft: Draft, target: OpOverload, a: dict[str, Any]) -> Any:
    # A tensor made of numbers inside forward: new at every call. `purify` drops the copy where nobody writes into it.
    return draft.call(aten.clone.default, a["self"])


@_spells("_native_batch_norm_legit_no_training")
def _decomposed_batch_norm(draft: Draft, target: OpOverload, a: dict[str, Any]) -> Any:
    statistics = (a["running_mean"], a["running_var"])
    x, affine = a["input"], (a["weight"], a["bias"])
    return draft.call(aten.batch_norm.default, x, *affine, *statistics, False, a["momentum"], a["eps"], True), None, None


@_spells("native_layer_norm")
def _decomposed_layer_norm(draft: Draft, target: OpOverload, a: dict[str, Any]) -> Any:
    shape, affine = a["normalized_shape"], (a["weight"], a["bias"])
    return draft.call(aten.layer_norm.default, a["input"], shape, *affine, a["eps"], True), None, None


@_spells("addmm")
def _decomposed_linear(draft: Draft, target: OpOverload, a: dict[str, Any]) -> Any:
    weight = transposed_operand(a["mat2"])
    if weight is None or a["beta"] != 1 or a["alpha"] != 1 or facts.rank(a["self"]) != 1:
        return draft.call(target, **a)
    return draft.call(aten.linear.default, a["mat1"], weight, a["self"])


@_spells("linear")
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


@_spells("_softmax", "_log_softmax")
def _decomposed_softmax(draft: Draft, target: OpOverload, a: dict[str, Any]) -> Any:
    if a["half_to_float"]:
        return draft.call(target, **a)
    pure = aten.softmax.int if short_name(target) == "_softmax" else aten.log_softmax.int
    return draft.call(pure, a["self"], a["dim"], None)


@_spells("detach", "detach_", "alias", "lift_fresh", "positive", "data", "resolve_conj", "resolve_neg")
def _identity(draft: Draft, target: OpOverload, a: dict[str, Any]) -> Any:
    return a["self"]


@_spells("_assert_scalar")
def _assert_scalar(draft: Draft, target: OpOverload, a: dict[str, Any]) -> Any:
    if isinstance(a["self"], fx.Node):
        draft.require(a["self"], a["assert_msg"])


@_spells("_assert_tensor_metadata", "sym_constrain_range", "sym_constrain_range_for_size")
def _dropped(draft: Draft, target: OpOverload, a: dict[str, Any]) -> Any:
    # Made by exporters about facts that the emitted module checks at its inputs.
    return None


@_spells("contiguous")
def _contiguous(draft: Draft, target: OpOverload, a: dict[str, Any]) -> Any:
    # Whether it copies depends on the layout of the input at each call: `purify` drops it where nobody can tell.
    return draft.call(target, **a)


@_spells("to", "type_as", "_to_copy", "float", "double", "half", "bfloat16", "int", "long")
def _to(draft: Draft, target: OpOverload, a: dict[str, Any]) -> Any:
    x = a["self"]
    before = facts.fact(x)
    result = facts.compute_fact(draft.program.mode, target, tuple(_positional(target, a)), _keyword_only(target, a))
    if before is None or result is None:
        return draft.call(target, **a)
    if result.device != before.device:
        raise CaptureError(
            f"the model moves a value from {before.device} to {result.device}; models over several devices cannot be captured"
        )
    same_layout = a.get("memory_format") in (None, torch.preserve_format) or result.stride() == before.stride()
    copies = bool(a.get("copy", False)) or op_name(target) == "aten::_to_copy"
    if not same_layout:
        x = draft.call(aten.contiguous.default, x, memory_format=a["memory_format"])
    if result.dtype != before.dtype:
        return draft.call(aten.to.dtype, x, result.dtype)
    if copies and same_layout:
        return draft.call(aten.clone.default, x)
    return x


@_spells("slice")
def _slice(draft: Draft, target: OpOverload, a: dict[str, Any]) -> Any:
    size, end = facts.shape(a["self"]), a["end"]
    if size is not None and a["step"] == 1 and a["start"] in (None, 0) and not isinstance(a["dim"], fx.Node):
        length = size[a["dim"]]
        if end is None or (isinstance(end, int) and (end == LAST or (isinstance(length, int) and end >= length))):
            return a["self"]
    return draft.call(target, **a)


LAST = 2**63 - 1
"""How TorchScript and exporters write a slice up to the end."""


@_spells("reshape_as", "view_as")
def _reshape_as(draft: Draft, target: OpOverload, a: dict[str, Any]) -> Any:
    # Only its shape is read: as an operand, the other tensor would be kept from being folded or fused.
    sizes = facts.shape(a["other"])
    if sizes is None or not all(isinstance(size, int) for size in sizes):
        return draft.call(target, **a)
    plain = aten.reshape if short_name(target) == "reshape_as" else aten.view
    return draft.call(plain.default, a["self"], list(sizes))


@_spells("expand")
def _expand(draft: Draft, target: OpOverload, a: dict[str, Any]) -> Any:
    size = facts.shape(a["self"])
    if size is not None and len(size) == len(a["size"]) and all(w in (-1, s) for s, w in zip(size, a["size"], strict=True)):
        return a["self"]
    return draft.call(target, **a)


@_spells("as_strided", "as_strided_")
def _as_strided(draft: Draft, target: OpOverload, a: dict[str, Any]) -> Any:
    raise CaptureError("as_strided reads memory by address; a compiler that may change layouts cannot keep its meaning")


def _positional(target: OpOverload, a: dict[str, Any]) -> list[Any]:
    return [a[s.name] for s in schema_of(target).arguments if not s.kwarg_only]


def _keyword_only(target: OpOverload, a: dict[str, Any]) -> dict[str, Any]:
    return {s.name: a[s.name] for s in schema_of(target).arguments if s.kwarg_only}


# -- in-place ops -------------------------------------------------------------------------------------------------------


def purify(draft: Draft) -> None:
    """Replace in-place ops by pure ones where nobody can tell, views by reshapes, and register what stays as state.

    `op_(t, ...)` may become `t' = op(t, ...)` when t's storage belongs to the graph (no input, no constant), and no other
    value that may share it and was made before is read afterwards. Later readers of `t` read `t'`.
    """
    graph = draft.graph
    order = {node: i for i, node in enumerate(graph.nodes)}
    sharing: dict[fx.Node, list[fx.Node]] = {}
    for node in list(graph.nodes):
        if node.op == "call_function" and written_nodes(node):
            node = _purified(draft, node, sharing, order) or node
        group = [node]
        for other in aliased_nodes(node):
            others = sharing[other]
            if others is group:
                continue
            small, group = sorted((group, others), key=len)
            group.extend(small)
            for member in small:
                sharing[member] = group
        sharing[node] = group
    _drop_unread_writes(draft)
    memory = facts.Memory(graph)
    written = facts.mutated_values(graph)
    for name in memory.written_constants(graph):
        if name == "constant" or name.startswith("constant@"):
            raise CaptureError("the model writes into a tensor that is no buffer; make it a buffer")
        sharing_it = names_of_its_memory(draft.program, name)
        if sharing_it:
            raise CaptureError(
                f"the model writes into {name}, whose memory is that of {', '.join(sharing_it)} too, and a file would keep "
                "them apart. Give each memory of its own, or make them one buffer"
            )
        draft.program.state |= {name}
    # What others may write into when a body is over is nothing to be sure of either.
    mutated = written if isinstance(draft.program, Program) else written | memory.reachable(graph)
    for node in list(graph.nodes):
        if node in written and op_name(node.target) in LAYOUT_DECIDES:
            if any(member.op == "placeholder" for member in sharing[node]):
                if op_name(node.target) == "aten::flatten":
                    continue
                raise CaptureError(
                    f"the model writes into a value that is, or is not, its input: {short_name(node.target)} at "
                    f"{place(node)} copies or not by the input's memory layout"
                )
            _say_whether_it_copies(draft, node)
        elif node.op == "call_function" and _changes_nothing(node, mutated):
            draft.redirect(node, node.args[0])
        elif node.op == "call_function" and op_name(node.target) in ("aten::view", "aten::_unsafe_view"):
            known = facts.shape(node)
            if node in written or known is None or len(node.args) != 2:
                continue
            if not isinstance(node.args[1], list):  # view.dtype reads the bits anew
                continue
            sizes = list(known) if all(isinstance(size, int) for size in known) else node.args[1]
            with draft.before(node):
                draft.redirect(node, draft.call(aten.reshape.default, node.args[0], sizes))


def _drop_unread_writes(draft: Draft) -> None:
    """Remove writes into memory of the graph's own that neither an output nor an effect reads, with what they alone need."""
    classes = facts.storage_classes(draft.graph.nodes)
    members: dict[fx.Node, list[fx.Node]] = {}
    for node in draft.graph.nodes:
        members.setdefault(classes[node], []).append(node)
    own = {root for root, group in members.items() if facts.is_own(group)}

    def only_writes_own(node: fx.Node) -> bool:
        does_more = acts(node) or bool(changed_containers(node))
        return bool(written_nodes(node)) and not does_more and all(classes[n] in own for n in written_nodes(node))

    writers: dict[fx.Node, list[fx.Node]] = {}  # a region, unlike an op in place, need not give back what it writes into
    for node in draft.graph.nodes:
        for target in written_nodes(node):
            writers.setdefault(classes[target], []).append(node)
    needed: set[fx.Node] = set()
    waiting = [node for node in draft.graph.nodes if has_effect(node) and not only_writes_own(node)]
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += node.all_input_nodes
            # Whoever reads memory needs every write into it.
            waiting += writers.get(classes[node], ())
    unneeded = [node for node in draft.graph.nodes if node.op == "call_function" and node not in needed]
    if any(written_nodes(node) for node in unneeded):
        for node in reversed(unneeded):
            draft.remove(node)


def names_of_its_memory(program: Any, name: str) -> list[str]:
    """Other constants whose storage is that of the constant `name`."""
    storage = program.constants[name].untyped_storage().data_ptr()
    others = {n: t for n, t in program.constants.items() if n != name and t.layout is torch.strided and t.numel()}
    return [n for n, t in others.items() if t.untyped_storage().data_ptr() == storage]


def _say_whether_it_copies(draft: Draft, node: fx.Node) -> None:
    """A view, or a copy, in the place of an op that is one or the other by layout: passes may change layouts."""
    source, known = node.args[0], facts.fact(node)
    origin = facts.fact(source)
    if not isinstance(source, fx.Node) or not isinstance(known, torch.Tensor) or not isinstance(origin, torch.Tensor):
        return
    sizes = facts.shape(node) or ()
    if op_name(node.target) != "aten::contiguous" and not all(isinstance(size, int) for size in sizes):
        return
    copies = storage_id(known) != storage_id(origin)
    with draft.before(node):
        new: Any = source
        if copies:
            kept = node.kwargs.get("memory_format", torch.contiguous_format)
            new = draft.call(aten.clone.default, source, memory_format=kept)
        if op_name(node.target) != "aten::contiguous":
            new = draft.call(aten.view.default, new, list(sizes))
        draft.redirect(node, new)


LAYOUT_DECIDES = frozenset({"aten::contiguous", "aten::reshape", "aten::flatten"})
"""Ops that copy or alias by the memory layout of their operand."""


def _changes_nothing(node: fx.Node, mutated: frozenset[fx.Node]) -> bool:
    """A `contiguous` of what is contiguous, or a copy of a constant, where nobody writes into either."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or node in mutated or source in mutated:
        return False
    if op_name(node.target) == "aten::clone":
        return source.op == "get_attr" and not any(reader.op == "output" for reader in node.users)
    known = facts.fact(source)
    if op_name(node.target) != "aten::contiguous" or known is None:
        return False
    return bool(known.is_contiguous(memory_format=node.kwargs["memory_format"]))


def _purified(
    draft: Draft, writer: fx.Node, sharing: dict[fx.Node, list[fx.Node]], order: dict[fx.Node, int]
) -> fx.Node | None:
    """The pure node that took the place of `writer`, None when it must stay."""
    pure = pure_overload(writer.target)
    target = writer.args[0]
    if pure is None or not isinstance(target, fx.Node) or facts.dtype(target) is None:
        return None
    now = order[writer]
    for member in sharing[target]:
        if not facts.is_own([member]):
            return None
        if member is not target and any(order[reader] > now for reader in member.users):
            return None
    moves_axes = torch.Tag.inplace_view in getattr(writer.target, "tags", ())
    if moves_axes and any(order[reader] > now for reader in target.users):
        raise CaptureError(f"{short_name(writer.target)} at {place(writer)} changes the shape of a value that is read again")
    if not all(isinstance(size, int) for size in facts.shape(target) or ()) and _broadcasts(writer, target):
        return None
    with draft.before(writer):
        new = draft.call(pure, *writer.args, **writer.kwargs)
        if not moves_axes and facts.shape(new) != facts.shape(target):
            new = draft.call(aten.expand.default, new, list(facts.shape(target) or ()))
        if facts.dtype(new) != facts.dtype(target):
            new = draft.call(aten.to.dtype, new, facts.dtype(target))
    for n in reversed(list(_back_to(writer, new))):
        order[n] = now
        sharing[n] = [n]
    for reader in list(target.users):
        if order[reader] > now:
            draft.redirect_in(reader, target, new)
    draft.redirect(writer, new)
    draft.remove(writer)
    return new


def _broadcasts(writer: fx.Node, target: fx.Node) -> bool:
    """An operand of a writer has another shape than what it writes into, so that the pure result may have another one."""
    tensors = [n for n in writer.all_input_nodes if isinstance(facts.fact(n), torch.Tensor)]
    return any(facts.shape(n) != facts.shape(target) for n in tensors)


def _back_to(writer: fx.Node, new: fx.Node) -> list[fx.Node]:
    """The nodes just inserted in front of `writer`, up to `new` (at most an op, an expand and a cast)."""
    inserted, node = [new], new.prev
    while node in new.all_input_nodes and node.op == "call_function" and node.next is inserted[-1] and len(inserted) < 3:
        inserted.append(node)
        node = node.prev
    return inserted


def pure_overload(target: Any) -> OpOverload | None:
    """`relu` for `relu_`, `add.Tensor` for `add_.Tensor`; None when there is no pure twin with the same arguments."""
    if target is getitem or not isinstance(target, OpOverload):
        return None
    name = short_name(target)
    if not name.endswith("_") or name.endswith("__") or written_arguments(target) != (schema_of(target).arguments[0].name,):
        return None
    packet = getattr(aten, name[:-1], None)
    overload = schema_of(target).overload_name or "default"
    if packet is None or overload not in packet.overloads():
        return None
    pure = getattr(packet, overload)
    same = [a.name for a in schema_of(pure).arguments] == [a.name for a in schema_of(target).arguments]
    return pure if same else None
