"""The builder of every front end: each op goes through `Normalizer.call`, which adds it in its canonical form."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ir_tools.errors import CaptureError
from ir_tools.frontends.canonicalize import CANONICALIZATIONS
from ir_tools.frontends.second_names import usual_name
from ir_tools.ir import Draft
from ir_tools.ir.dialect import argument_kind, canonicalize_arguments, map_argument, op_name, overload_name
from ir_tools.ir.host import value_type
from ir_tools.torch_compat.fake import FakeTensor
from ir_tools.torch_compat.operators import OpOverload, schema_of


class Normalizer:
    """Adds ops to a draft in canonical form. `call` returns a node, or an existing value for an identity."""

    def __init__(self, draft: Draft):
        self.draft = draft

    def call(self, target: Any, /, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(target, OpOverload):
            return self.draft.call(target, *args, **kwargs)
        if target.namespace not in ("aten", "torch_passes", "mkldnn", "torchvision", "quantized_decomposed"):
            raise CaptureError(f"the operator {overload_name(target)} is not an ATen operator and cannot be captured")
        target = _scalar_overload(usual_name(target), args, kwargs)
        args, kwargs = canonicalize_arguments(target, args, kwargs)
        args = tuple(map_argument(a, self._as_value) for a in args)
        canonicalization = CANONICALIZATIONS.get(op_name(target))
        if canonicalization is None:
            return self.draft.call(target, *args, **kwargs)
        named = dict(zip((a.name for a in schema_of(target).arguments if not a.kwarg_only), args, strict=True)) | kwargs
        return canonicalization(self.draft, target, named)

    def _as_value(self, leaf: Any) -> Any:
        """A tensor that a front end holds becomes a constant, which has a fact like every value."""
        held = isinstance(leaf, torch.Tensor) and not isinstance(leaf, FakeTensor)
        return self.draft.constant("constant", leaf) if held else leaf


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
