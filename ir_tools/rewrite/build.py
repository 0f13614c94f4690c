"""The `op` that the right side of a rule is built with: `op.relu(x)`, `op.like(conv, x, w, b)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from ir_tools.ir import Draft, Packing
from ir_tools.ir.dialect import aten, bound_arguments
from ir_tools.ir.origin import Origin, origin
from ir_tools.ir.program import public_name
from ir_tools.rewrite.rule import Call, Value, unwrap, wrap


class Ops:
    """Adds ops to a draft. Plain tensors among the arguments become constants named after their place in the model."""

    def __init__(self, draft: Draft, made_by: str, at: fx.Node):
        self._draft = draft
        self._made_by = made_by
        self._origin = origin(at)
        self.declined = ""

    def __getattr__(self, name: str) -> Callable[..., Value]:
        packet = getattr(torch.ops.torch_passes, name, None) or getattr(aten, name, None)
        if packet is None or name.startswith("_"):
            raise AttributeError(f"there is no op {name!r} in ATen or in the dialect")
        overloads = packet.overloads()
        preferred = next((o for o in ("Tensor", "default") if o in overloads), overloads[0])
        return lambda *args, **kwargs: self.call(getattr(packet, preferred), *args, **kwargs)

    def decline(self, reason: str) -> None:
        """Say why the usual replacement is not made here; what is built instead, if anything, is the entry's to choose."""
        self.declined = reason

    def call(self, target: OpOverload, /, *args: Any, **kwargs: Any) -> Value:
        """One op, by overload."""
        return self._call(target, self._origin, {}, args, kwargs)

    def like(self, call: Call, /, *args: Any, **kwargs: Any) -> Value:
        """The op of `call` again, at its place in the model, with the leading (or named) arguments replaced."""
        given = bound_arguments(call._node)
        names = [a.name for a in call.target._schema.arguments]
        changed = dict(zip(names, args, strict=False)) | kwargs
        positional = [changed.get(n, given[n]) for n in names if n not in call._node.kwargs]
        keywords = {n: changed.get(n, given[n]) for n in call._node.kwargs}
        return self._call(call.target, origin(call._node), given, positional, keywords)

    def constant(self, name: str, tensor: Tensor, packing: Packing | None = None) -> Value:
        """A constant named `<name>@<pass>`."""
        base = public_name(name)
        return wrap(self._draft.constant(f"{base}@{self._made_by}", tensor, packing=packing))

    def packed(self, value: Value, packing: Packing) -> Value:
        """A constant that oneDNN packs where it runs."""
        name = str(value._node.target)
        return self.constant(name, self._draft.program.constants[name], packing)

    def _call(self, target: OpOverload, at: Origin, template: dict[str, Any], args: Any, kwargs: dict[str, Any]) -> Value:
        names = [a.name for a in target._schema.arguments]
        args = [self._argument(v, n, at, template) for n, v in zip(names, args, strict=False)]
        kwargs = {n: self._argument(v, n, at, template) for n, v in kwargs.items()}
        with self._draft.origin(at.made_by(self._made_by)):
            return wrap(self._draft.call(target, *args, **kwargs))

    def _argument(self, value: Any, name: str, at: Origin, template: dict[str, Any]) -> Any:
        if not isinstance(value, Tensor):
            return unwrap(value)
        known = template.get(name)
        if isinstance(known, fx.Node) and known.op == "get_attr":
            base = str(known.target)
        else:
            base = f"{at.module}.{name}" if at.module else name
        return self.constant(base, value)._node
