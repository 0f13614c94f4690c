"""Layouts that torch's fake kernels get wrong: ops whose results on the CPU have other strides than torch 2.13 says.

Layouts decide which kernel the next op takes, and what it costs. Each entry gives the strides, None where they are not known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ir_tools.ir.dialect import op_name, overload_name
from ir_tools.ir.facts import (
    Fact,
    Sizes,
    TensorFact,
    as_meta,
    channels_last_of,
    contiguous_strides,
    is_contiguous,
)
from ir_tools.torch_compat.dispatch import without_modes
from ir_tools.torch_compat.operators import schema_of
from ir_tools.torch_compat.tensors import likely_memory_format


def _batch_norm(args: tuple, result: TensorFact) -> Sizes | None:
    """Contiguous or channels-last (aten/src/ATen/native/Normalization.cpp); the fake kernel copies the input's strides."""
    return _new(result, torch.contiguous_format) if is_contiguous(args[0]) else _likely(args, result)


def _likely(args: tuple, result: TensorFact) -> Sizes | None:
    """In the memory format that the strides of the operand suggest, where the fake kernel gives a contiguous result."""
    return _new(result, likely_memory_format(as_meta(args[0])))


def _pad(args: tuple, result: TensorFact) -> Sizes | None:
    """With a constant as `constant_pad_nd`; what goes round is put together as the fake kernel says."""
    if args[2] == "circular":
        return result.strides
    return _constant_pad(args, result) if args[2] == "constant" else _likely(args, result)


def _constant_pad(args: tuple, result: TensorFact) -> Sizes | None:
    """A copy where nothing is padded, else in the memory format that the operand suggests."""
    return _likely(args, result) if any(args[1]) else as_meta(args[0]).clone().stride()


def _reshape(args: tuple, result: TensorFact) -> Sizes | None:
    """A reshape to the same shape gives axes of one element other strides; the fake kernel gives back its operand."""
    return as_meta(args[0]).reshape(result.shape).stride() if result.shape == args[0].shape else result.strides


def _elementwise(args: tuple, result: TensorFact) -> Sizes | None:
    """As the sum of the operands, where the fake kernel is written in Python."""
    operands = [as_meta(a) for a in args if isinstance(a, TensorFact)]
    if len(operands) == 1:
        return result.strides
    strides = sum(operands[1:], operands[0]).stride()
    both = bool(is_contiguous(replace(result, strides=strides))) and _is_ambiguous(replace(result, strides=strides))
    return contiguous_strides(result.shape) if both else strides


def _roll(args: tuple, result: TensorFact) -> Sizes | None:
    """Parts put together along one axis after the other; without an axis all is one row."""
    if len(args) < 3 or not args[2]:
        return contiguous_strides(result.shape)
    return None if _is_ambiguous(args[0]) else _likely(args, result)


def _like_first(args: tuple, result: TensorFact) -> Sizes | None:
    """As an elementwise op of the first operand, where each element has a result of its own."""
    return (as_meta(args[0]) + 1).stride() if result.shape == args[0].shape else result.strides


def _packed_convolution(args: tuple, result: TensorFact) -> Sizes | None:
    """Channels-last, whatever the input and the residual are (measured; with packed weights)."""
    formats = channels_last_of(result.rank)
    return _new(result, formats[0]) if formats else None


def _contiguous(args: tuple, result: TensorFact) -> Sizes | None:
    """Contiguous, where the fake kernel follows the input."""
    return contiguous_strides(result.shape)


def _new(like: TensorFact, format: torch.memory_format) -> Sizes:
    return torch.empty(like.shape, memory_format=format, device="meta").stride()


ON_CPU: dict[str, Callable[[tuple, TensorFact], Sizes | None]] = {
    "aten::batch_norm": _batch_norm,
    **dict.fromkeys(("aten::reshape", "aten::view"), _reshape),
    **dict.fromkeys(("aten::channel_shuffle", "aten::max_unpool2d", "aten::group_norm"), _likely),
    "aten::roll": _roll,
    "aten::constant_pad_nd": _constant_pad,
    "aten::pad": _pad,
    "aten::binary_cross_entropy": _like_first,
    **dict.fromkeys(
        (f"aten::{name}" for name in "div.Tensor_mode floor_divide copysign xlogy special_xlog1py".split()), _elementwise
    ),
    **dict.fromkeys(("aten::log_sigmoid", "aten::max_pool1d", "aten::rrelu", "aten::pow.Scalar"), _contiguous),
    "mkldnn::_linear_pointwise": _contiguous,
    "mkldnn::_convolution_pointwise": _packed_convolution,
}


def layout_on_cpu(target: Any, args: tuple, result: Fact) -> Fact:
    """The fact with the strides that the op's CPU kernel gives."""
    name = overload_name(target) if overload_name(target) in ON_CPU else op_name(target)
    operands = [a for a in args if isinstance(a, TensorFact)]
    if not isinstance(result, TensorFact) or result.device.type != "cpu" or result.strides is None or not operands:
        return result
    if result.has_symbols or any(o.has_symbols for o in operands):
        # A size that is 1 when the file runs changes what these make of layouts that are not contiguous.
        known = all(is_contiguous(o) for o in operands) or name not in (*ON_CPU, "aten::flatten")
        return result if known else result.lying(None)
    with without_modes():
        if name in ON_CPU:
            strides = ON_CPU[name](args, result)
        else:
            strides = contiguous_strides(result.shape) if _ignores_formats(target, args, operands, result) else result.strides
        if strides is not None and any(map(_is_odd, operands)):
            lies = replace(result, strides=strides)
            if _is_ambiguous(lies) or _order_is_open(target, operands, result):
                strides = None
    return result if strides == result.strides else result.lying(strides, strides)


def _ignores_formats(target: Any, args: tuple, operands: list[TensorFact], result: TensorFact) -> bool:
    """An elementwise kernel takes operands of one shape that are contiguous for plain ones, whatever axes of one element say.

    TensorIterator's fast path (aten/src/ATen/TensorIterator.cpp); a number for a tensor keeps it off, and the fake
    kernels have no such path.
    """
    if not _is_elementwise(target) or op_name(target) in SLOW or overload_name(target) in SLOW:
        return False
    declared = [a.type for a in schema_of(target).arguments]
    numbers = any(str(t) == "Tensor" and isinstance(a, (int, float)) for a, t in zip(args, declared))
    return not numbers and all(o.shape == result.shape and is_contiguous(o) for o in operands)


def _is_elementwise(target: Any) -> bool:
    return torch.Tag.pointwise in getattr(target, "tags", ()) or op_name(target) in UNTAGGED


def _order_is_open(target: Any, operands: list[TensorFact], result: TensorFact) -> bool:
    """An elementwise op whose operands do not say which of two axes of the result is the inner one: none has both.

    Strides of axes of one element decide it then, on the CPU and in the fake kernels in different orders.
    """
    axes = [axis for axis, n in enumerate(result.shape) if n != 1]
    has = [{result.rank - o.rank + i for i, n in enumerate(o.shape) if n != 1} for o in operands]
    return _is_elementwise(target) and any(not any({a, b} <= h for h in has) for a in axes for b in axes)


UNTAGGED = frozenset({"aten::hardswish"})
"""Elementwise ops that torch does not tag as such."""

SLOW = frozenset(
    {"aten::clone", "aten::to", "aten::_to_copy", "aten::hardtanh", "aten::relu6", "aten::rsub"}
    | {f"aten::{name}.Scalar" for name in ("add", "sub", "mul", "div")}
)
"""Elementwise kernels without the fast path: copies, and those that make a tensor of a number."""


def _is_ambiguous(known: TensorFact) -> bool:
    """Axes of one element have strides that mean nothing, and by which a kernel would take the tensor for another format."""
    return 1 in known.shape and len({likely_memory_format(_at(known, strides)) for strides in _readings(known)}) > 1


def _is_odd(known: TensorFact) -> bool:
    """Axes of one element have strides that only a slice, a turn or a new axis gives: kernels differ in what these mean."""
    formats = [torch.contiguous_format, *channels_last_of(known.rank)]
    return 1 in known.shape and all(known.strides != _new(known, f) for f in formats)


def _readings(known: TensorFact) -> list[Sizes]:
    """The strides, and with others for axes of one element: ones, those of each memory format."""
    assert known.strides is not None
    formats = [torch.contiguous_format, *channels_last_of(known.rank)]
    others = [(1,) * known.rank, *(_new(known, format) for format in formats)]
    pairs = list(zip(known.shape, known.strides, strict=True))
    return [known.strides, *(tuple(o if n == 1 else s for (n, s), o in zip(pairs, other)) for other in others)]


def _at(known: TensorFact, strides: Sizes) -> torch.Tensor:
    return as_meta(replace(known, strides=strides))
