"""Numbers into tensors, and tensors into numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ir_tools.errors import CaptureError
from ir_tools.frontends.torchscript.environment import Environment
from ir_tools.frontends.torchscript.registry import handles
from ir_tools.frontends.torchscript.values import holds
from ir_tools.ir import facts
from ir_tools.ir.dialect import DTYPE_NUMBERS
from ir_tools.ir.host import TENSOR, value_type

aten = torch.ops.aten

_DTYPE_OF_TYPE = {"int": torch.int64, "float": torch.float64, "bool": torch.bool}


def as_tensor(env: Environment, value: Any, dtype: torch.dtype | None) -> Any:
    """A runtime number, or a list of them, as a tensor."""
    if isinstance(value, (list, tuple)):
        return env.normalizer.call(aten.stack.default, [as_tensor(env, v, dtype) for v in value], 0)
    if isinstance(value, fx.Node) and value_type(value) not in _DTYPE_OF_TYPE:
        raise CaptureError(f"a tensor is made from a runtime {value_type(value)}, which is not supported")
    kind = value_type(value) if isinstance(value, fx.Node) else type(value).__name__
    if isinstance(value, fx.Node) and kind == "bool":
        value = env.draft.call(aten.Int.bool, value)  # TorchScript has no bool numbers
    wanted = dtype or (torch.get_default_dtype() if kind == "float" else _DTYPE_OF_TYPE[kind])
    return env.normalizer.call(aten.scalar_tensor.default, value, dtype=wanted)


@handles("prim::NumToTensor")
def _num_to_tensor(env: Environment, node: Any, a: list[Any]) -> Any:
    if isinstance(a[0], fx.Node):
        return as_tensor(env, a[0], _DTYPE_OF_TYPE.get(value_type(a[0])))
    return torch.tensor(a[0])


@handles("aten::tensor", "aten::as_tensor", "aten::scalar_tensor")
def _tensor(env: Environment, node: Any, a: list[Any]) -> Any:
    dtype = DTYPE_NUMBERS[a[1]] if len(a) > 1 and a[1] is not None else None
    if holds(a[0], fx.Node):
        if isinstance(a[0], fx.Node) and value_type(a[0]) == TENSOR and node.kind() == "aten::as_tensor":
            wanted = dtype or facts.dtype(a[0])
            return a[0] if wanted is facts.dtype(a[0]) else env.draft.call(aten.to.dtype, a[0], wanted)
        return as_tensor(env, env.all_here(a[0]), dtype)
    return torch.as_tensor(a[0], dtype=dtype) if isinstance(a[0], torch.Tensor) else torch.tensor(a[0], dtype=dtype)


@handles("aten::_shape_as_tensor")
def _shape_as_tensor(env: Environment, node: Any, a: list[Any]) -> Any:
    """The sizes as a tensor of ints: how tracing into ONNX-ready code reads them."""
    rank = facts.rank(a[0])
    if rank is None:
        return NotImplemented
    sizes = [env.draft.size(a[0], axis) for axis in range(rank)]
    return as_tensor(env, sizes, torch.int64) if holds(sizes, fx.Node) else torch.tensor(sizes)


@handles("aten::Int", "aten::Float", "aten::Bool", "aten::item", "aten::IntImplicit", "aten::FloatImplicit",
          "aten::ScalarImplicit", "prim::ImplicitTensorToNum")  # fmt: skip
def _number(env: Environment, node: Any, a: list[Any]) -> Any:
    if isinstance(a[0], fx.Node):
        return NotImplemented
    convert = {"Int": int, "IntImplicit": int, "Float": float, "FloatImplicit": float, "Bool": bool}
    name = node.kind().split("::")[1]
    value = a[0].item() if isinstance(a[0], torch.Tensor) else a[0]
    return convert[name](value) if name in convert else value
