"""What is asked about a tensor beside its elements: sizes, rank, dtype, device."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ir_tools.errors import CaptureError
from ir_tools.frontends.torchscript.environment import Environment
from ir_tools.frontends.torchscript.nodes import where
from ir_tools.frontends.torchscript.registry import handles
from ir_tools.frontends.torchscript.values import NUMBER_OF_DTYPE
from ir_tools.ir import facts


@handles("aten::size", "aten::sym_size")
def _size(env: Environment, node: Any, a: list[Any]) -> Any:
    rank = a[0].dim() if isinstance(a[0], torch.Tensor) else facts.rank(a[0])
    if rank is None or (len(a) == 2 and isinstance(a[1], fx.Node)):
        return NotImplemented
    if len(a) == 1:
        return [env.draft.size(a[0], axis) for axis in range(rank)]
    return env.draft.size(a[0], a[1] % rank if rank else a[1])


@handles("aten::dim")
def _dim(env: Environment, node: Any, a: list[Any]) -> Any:
    rank = facts.rank(a[0])
    return NotImplemented if rank is None else rank


@handles("aten::numel")
def _numel(env: Environment, node: Any, a: list[Any]) -> Any:
    shape = facts.shape(a[0])
    if shape is None or not all(isinstance(s, int) for s in shape):
        return NotImplemented
    return torch.Size(shape).numel()


@handles("aten::stride")
def _stride(env: Environment, node: Any, a: list[Any]) -> Any:
    raise CaptureError(f"the model reads strides{where(node)}, which a compiler that may change layouts cannot keep")


@handles("prim::dtype", "prim::device", "prim::layout", "prim::is_cuda", "prim::is_cpu", "prim::requires_grad",
          "prim::is_quantized", "prim::is_mkldnn", "prim::is_sparse", "prim::is_mps", "prim::is_meta", "prim::is_xla",
          "prim::is_nested", "aten::is_floating_point", "aten::is_complex")  # fmt: skip
def _tensor_fact(env: Environment, node: Any, a: list[Any]) -> Any:
    known = facts.TensorFact.of(a[0]) if isinstance(a[0], torch.Tensor) else facts.tensor(a[0])
    if known is None:
        if node.kind() in ("prim::device", "aten::is_floating_point", "aten::is_complex"):
            return NotImplemented
        raise CaptureError(f"{node.kind()} of a tensor of which too little is known at capture{where(node)}")
    name = node.kind().split("::")[1]
    if name == "dtype":
        return NUMBER_OF_DTYPE[known.dtype]
    if name == "requires_grad":
        return False
    if name == "layout":
        return 0
    if name == "device":
        return known.device
    if name in ("is_floating_point", "is_complex"):
        return getattr(known.dtype, name)
    if name == "is_sparse":
        return known.layout is torch.sparse_coo
    return name.removeprefix("is_") == known.device.type  # is_cpu ...; no value of a Program is quantized, nested or packed
