"""Operators as torch registers them: their classes, their schemas, and the names that begin with an underscore."""

from __future__ import annotations

from typing import Any

import torch
from torch import _ops

OpOverload = _ops.OpOverload
"""One overload of an operator, such as `aten.add.Tensor`."""

OpOverloadPacket = _ops.OpOverloadPacket
"""All overloads of an operator, such as `aten.add`."""

HigherOrderOperator = _ops.HigherOrderOperator
"""An operator that takes graphs, such as `cond`."""


def schema_of(operator: OpOverload) -> torch.FunctionSchema:
    """The schema of an overload: its name, its arguments and its returns."""
    return operator._schema


def schema_or(target: Any, default: Any) -> Any:
    """The schema of what may be an overload; `default` for anything else."""
    return getattr(target, "_schema", default)


symbolic_sqrt = torch._sym_sqrt  # type: ignore[attr-defined]
"""What torch.export records for the square root of a symbolic number."""

set_grad_enabled = torch._C._set_grad_enabled
"""What torch.export records where a model switches gradients on or off."""


UNDERSCORED_OPERATORS = frozenset(
    """
    aten::_assert_async aten::_assert_scalar aten::_assert_tensor_metadata aten::_functional_assert_async
    aten::_autocast_to_full_precision aten::_autocast_to_reduced_precision
    aten::_cast_Byte aten::_cast_Char aten::_cast_Double aten::_cast_Float aten::_cast_Half aten::_cast_Int aten::_cast_Long
    aten::_cast_Short
    aten::_batch_norm_with_update aten::_batch_norm_with_update_functional aten::_native_batch_norm_legit
    aten::_native_batch_norm_legit_functional aten::_native_batch_norm_legit_no_training
    aten::_convolution aten::_convolution_mode
    aten::_softmax aten::_log_softmax aten::_safe_softmax aten::_weight_norm
    aten::_index_put_impl_ aten::_local_scalar_dense aten::_pack_padded_sequence aten::_set_item aten::_shape_as_tensor
    aten::_to_copy aten::_to_cpu aten::_unsafe_view aten::_unwrap_optional
    mkldnn::_convolution_pointwise mkldnn::_convolution_pointwise_ mkldnn::_linear_pointwise
    mkldnn::_is_mkldnn_bf16_supported mkldnn::_is_mkldnn_fp16_supported
    mkldnn::_reorder_convolution_weight mkldnn::_reorder_linear_weight
    """.split()
)
"""The operators that are called or named anywhere although their name begins with an underscore.

These are no internals of Python: graphs and saved files name them, and torch keeps files loadable. So they are used by name
everywhere, and only listed here.
"""
