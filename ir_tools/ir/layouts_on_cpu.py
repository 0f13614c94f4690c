"""Layouts that torch's fake kernels get wrong: ops whose results lie in memory another way on the CPU than torch 2.13 says.

Layouts decide which kernel the next op takes, and what it costs. Each entry gives the strides, None where they are not known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ir_tools.ir.facts import Fact, Sizes, TensorFact, as_meta, channels_last_of, contiguous_strides
from ir_tools.torch_compat.dispatch import without_modes
from ir_tools.torch_compat.tensors import likely_memory_format


def _batch_norm(operand: TensorFact, result: TensorFact) -> Sizes | None:
    """Contiguous or channels-last (aten/src/ATen/native/Normalization.cpp); the fake kernel copies the input's strides."""
    if operand.strides is None:
        return None
    return _new(result, likely_memory_format(as_meta(operand)))


def _reshape(operand: TensorFact, result: TensorFact) -> Sizes | None:
    """A reshape to the same shape gives axes of one element other strides; the fake kernel gives back its operand."""
    if result.shape != operand.shape or operand.strides is None:
        return result.strides
    return as_meta(operand).reshape(result.shape).stride()


def _packed_convolution(operand: TensorFact, result: TensorFact) -> Sizes | None:
    """Channels-last, whatever the input and the residual are (measured; with packed weights)."""
    return _new(result, *channels_last_of(result.rank))


def _contiguous(operand: TensorFact, result: TensorFact) -> Sizes | None:
    """Contiguous, where the fake kernel follows the input."""
    return contiguous_strides(result.shape)


def _new(like: TensorFact, format: torch.memory_format) -> Sizes:
    return torch.empty(like.shape, memory_format=format, device="meta").stride()


ON_CPU: dict[str, Callable[[TensorFact, TensorFact], Sizes | None]] = {
    "aten::batch_norm": _batch_norm,
    "aten::reshape": _reshape,
    "aten::view": _reshape,
    "mkldnn::_convolution_pointwise": _packed_convolution,
    "aten::log_sigmoid": _contiguous,
    "mkldnn::_linear_pointwise": _contiguous,
}


def layout_on_cpu(name: str, args: tuple, result: Fact) -> Fact:
    """The fact with the strides that the op's CPU kernel gives."""
    layout = ON_CPU.get(name)
    if layout is None or not isinstance(result, TensorFact) or result.device.type != "cpu":
        return result
    if args[0].has_symbols or result.has_symbols:
        return result
    with without_modes():
        strides = layout(args[0], result)
    return replace(result, strides=strides, example_strides=strides)
