"""Tensors: which memory they share, whether they were written into, how they lie in memory."""

from __future__ import annotations

import torch
from torch import _prims_common


def storage_id(tensor: torch.Tensor) -> int:
    """A number that tensors have in common if and only if they share memory, fake ones included; free for reuse after them."""
    return tensor.untyped_storage()._cdata


def version_of(tensor: torch.Tensor) -> int:
    """How often the tensor, or one that shares its memory, was written into."""
    return tensor._version


likely_memory_format = _prims_common.suggest_memory_format
"""The memory format that the strides of a tensor suggest; it is the one that most kernels give their result."""
