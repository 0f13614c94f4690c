"""The `op` that the right side of a rule is built with: `op.relu(x)`, `op.like(conv, x, w, b)`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ir_tools.ir import Draft
from ir_tools.ir.dialect import argument_kind, aten, bound_arguments
from ir_tools.ir.program import public_name
from ir_tools.ir.provenance import Record, record
from ir_tools.rewrite.rule import Call, Value, unwrap, wrap
from ir_tools.torch_compat.operators import OpOverload, OpOverloadPacket, schema_of


@dataclass(frozen=True)
class Shared:
    """What the `Ops` of one run of a pass share: tensors made once, and the values of the graph that are written into."""

    made_once: dict[Any, Tensor] = field(default_factory=dict)
    mutated: frozenset[fx.Node] = frozenset()


class Ops:
    """Adds ops to a draft. Plain tensors among the arguments become constants named after the module that reads them."""

    def __init__(self, draft: Draft, made_by: str, at: fx.Node, shared: Shared | None = None):
        self._draft = draft
        self._shared = Shared() if shared is None else shared
        self._made_by = made_by
        self._origin = record(at)
        self.declined = ""
        self.made: list[fx.Node] = []  # in order, so that a declined replacement leaves nothing behind

    def __getattr__(self, name: str) -> Callable[..., Value]:
        packet = getattr(torch.ops.torch_passes, name, None) or getattr(aten, name, None)
        if packet is None or name.startswith("_"):
            raise AttributeError(f"there is no op {name!r} in ATen or in the dialect")
        return lambda *args, **kwargs: self.call(overload_for(packet, args, kwargs), *args, **kwargs)

    def decline(self, reason: str) -> None:
        """Say why the usual replacement is not made here: by None, or by what is built instead."""
        self.declined = reason

    def call(self, target: OpOverload, /, *args: Any, **kwargs: Any) -> Value:
        """One op, by overload."""
        return self._call(target, self._origin, {}, args, kwargs)

    def like(self, call: Call, /, *args: Any, **kwargs: Any) -> Value:
        """The op of `call` again, with its origin in the model, and with the leading (or named) arguments replaced."""
        given = bound_arguments(call._node)
        names = [a.name for a in schema_of(call.target).arguments]
        changed = dict(zip(names, args, strict=False)) | kwargs
        positional = [changed.get(n, given[n]) for n in names if n not in call._node.kwargs]
        keywords = {n: changed.get(n, given[n]) for n in call._node.kwargs}
        return self._call(call.target, record(call._node), given, positional, keywords)

    def once(self, make: Callable[..., Tensor], *args: Any) -> Tensor:
        """The tensor that `make(*args)` gives, made once where many ops of a graph need it."""
        made = self._shared.made_once
        if (make, args) not in made:
            made[make, args] = make(*args)
        return made[make, args]

    def constant(self, name: str, tensor: Tensor) -> Value:
        """A constant named `<name>@<pass>`."""
        base = public_name(name)
        with self._draft.origin(self._origin.derived(self._made_by)):
            return wrap(self._draft.constant(f"{base}@{self._made_by}", tensor))


    def _call(self, target: OpOverload, at: Record, template: dict[str, Any], args: Any, kwargs: dict[str, Any]) -> Value:
        names = [a.name for a in schema_of(target).arguments]
        args = [self._argument(v, n, at, template) for n, v in zip(names, args, strict=False)]
        kwargs = {n: self._argument(v, n, at, template) for n, v in kwargs.items()}
        with self._draft.origin(at.derived(self._made_by)):
            self.made.append(self._draft.call(target, *args, **kwargs))
        return wrap(self.made[-1])

    def _argument(self, value: Any, name: str, at: Record, template: dict[str, Any]) -> Any:
        if not isinstance(value, Tensor):
            return unwrap(value)
        known = template.get(name)
        if isinstance(known, fx.Node) and known.op == "get_attr":
            base = str(known.target)
        else:
            base = f"{at.module}.{name}" if at.module else name
        return self.constant(base, value)._node


def overload_for(packet: OpOverloadPacket, args: tuple, kwargs: dict[str, Any]) -> OpOverload:
    """The first overload that takes these arguments: `add.Tensor` for two values, `add.Scalar` for a value and a number.

    Raises `TypeError` when there is none.
    """
    overloads = [getattr(packet, name) for name in packet.overloads() if not name.endswith("out")]
    for overload in overloads:
        if _takes(schema_of(overload), args, kwargs):
            return overload
    given = ", ".join([*(type(a).__name__ for a in args), *(f"{k}={type(v).__name__}" for k, v in kwargs.items())])
    raise TypeError(f"no overload of {packet} takes ({given}); there are:\n" + "\n".join(str(schema_of(o)) for o in overloads))


def _takes(schema: torch.FunctionSchema, args: tuple, kwargs: dict[str, Any]) -> bool:
    positional = [a.name for a in schema.arguments if not a.kwarg_only]
    given = dict(zip(positional, args)) | kwargs
    known = len(args) <= len(positional) and set(kwargs) <= {a.name for a in schema.arguments}
    return known and all(
        _fits(a, given[a.name]) if a.name in given else a.has_default_value() for a in schema.arguments
    )


def _fits(declared: Any, value: Any) -> bool:
    kind = argument_kind(declared)
    if value is None:
        return "Optional" in str(declared.real_type)
    if isinstance(value, (Value, Tensor)):
        return kind == "Tensor"
    if isinstance(value, (list, tuple)):
        return kind.startswith("List") and any(isinstance(v, (Value, Tensor)) for v in value) == ("Tensor" in kind)
    if isinstance(value, str):
        return kind == "str"
    return "Tensor" not in kind and kind != "str" and (not kind.startswith("List") or bool(declared.N))
