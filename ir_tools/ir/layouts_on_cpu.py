"""Layouts that torch's fake kernels get wrong: ops whose results lie in memory another way on the CPU than torch 2.13 says.

Layouts decide which kernel the next op takes, and what it costs. Each entry gives the strides, None where they are not known.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ir_tools.ir.facts import Fact, Sizes, TensorFact, as_meta
from ir_tools.torch_compat.dispatch import without_modes
from ir_tools.torch_compat.tensors import likely_memory_format


def _batch_norm(args: tuple, result: TensorFact) -> Sizes | None:
    """Contiguous or channels-last (aten/src/ATen/native/Normalization.cpp); the fake kernel copies the input's strides."""
    format = likely_memory_format(as_meta(args[0]))
    return torch.empty(result.shape, device="meta").contiguous(memory_format=format).stride()


def _reshape(args: tuple, result: TensorFact) -> Sizes | None:
    """A reshape to the same shape gives axes of one element other strides; the fake kernel gives back its operand."""
    if result.shape != args[0].shape:
        return result.strides
    return as_meta(args[0]).reshape(result.shape).stride()


ON_CPU = {"aten::batch_norm": _batch_norm, "aten::reshape": _reshape, "aten::view": _reshape}


def layout_on_cpu(name: str, args: tuple, result: Fact) -> Fact:
    """The fact with the strides that the op's CPU kernel gives."""
    correct = ON_CPU.get(name)
    if correct is None or not isinstance(result, TensorFact) or result.device.type != "cpu":
        return result
    first: Any = args[0]
    if first.strides is None or first.has_symbols or result.has_symbols:
        return result
    with without_modes():
        strides = correct(args, result)
    return replace(result, strides=strides, example_strides=strides)
