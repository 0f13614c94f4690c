"""Running a model on wrapper tensors, whose values only a dispatch mode can reach.

A `WrapperTensor` carries a real tensor inside and nothing outside: sizes, a dtype, and the device that it claims to be on. Ops
on it come to the mode that is switched on, which computes on what is inside. What would read the memory itself (numpy,
tolist, C++ code that takes the data pointer) raises, so a mode sees every read and every op.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ir_tools.ir.dialect import op_name
from ir_tools.ir.effects import HIDDEN_WRITES, written_arguments
from ir_tools.torch_compat import pytree
from ir_tools.torch_compat.dispatch import TorchDispatchMode, no_torch_function, wrapper_tensor
from ir_tools.torch_compat.operators import OpOverload, schema_of


class WrapperError(Exception):
    """The run does what wrapper tensors cannot follow, so that nothing is known about it."""


class WrapperTensor(torch.Tensor):
    """Claims `device`; `inside` is where the values are."""

    inside: torch.Tensor
    __torch_function__ = no_torch_function  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inside: torch.Tensor, device: torch.device) -> WrapperTensor:
        assert not isinstance(inside, WrapperTensor)
        if inside.layout is not torch.strided:
            raise WrapperError(f"a tensor has the layout {inside.layout}")
        wrapper = wrapper_tensor(cls, inside, device)
        wrapper.inside = inside
        return wrapper

    data = property(torch.Tensor.detach)  # type: ignore[assignment]  # torch's own gives a tensor that is no wrapper

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"WrapperTensor({self.dtype}, {list(self.shape)}, {self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        raise WrapperError(f"{func} met a wrapper tensor outside of its mode")


class WrapperMode(TorchDispatchMode):
    """Computes every op on what is inside its wrappers. A subclass decides in `follow` what the results claim."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        leaves, tree = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if torch.Tag.inplace_view in func.tags and any(isinstance(t, WrapperTensor) for t in tensors):
            raise WrapperError(f"{func} changes the shape of a tensor in place")
        outer = {id(t.inside): t for t in tensors if isinstance(t, WrapperTensor)}
        inner_args, inner_kwargs = pytree.tree_unflatten(map(_inside, leaves), tree)
        return self.follow(func, args, kwargs, tensors, inner_args, inner_kwargs, outer)

    def follow(
        self,
        func: OpOverload,
        args: tuple,
        kwargs: dict[str, Any],
        tensors: Sequence[torch.Tensor],
        inner_args: tuple,
        inner_kwargs: dict[str, Any],
        outer: dict[int, WrapperTensor],
    ) -> Any:
        """Run `func(*inner_args, **inner_kwargs)` and give its result, wrapped again by `wrap_result`.

        `args`, `kwargs` and the `tensors` among them are as the model gave them; `outer` has the wrapper around each tensor
        inside, by its id.
        """
        raise NotImplementedError


class WrapperFunctions(TorchFunctionMode):
    """Goes with every `WrapperMode`: refuses what dispatch does not see and would crash on.

    Assigning `.data` gives a tensor the memory of another, and a wrapper tensor has none.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func == _SET_DATA:
            raise WrapperError("forward assigns .data, which dispatch does not see")
        return func(*args, **(kwargs or {}))


_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]


def _inside(leaf: Any) -> Any:
    return leaf.inside if isinstance(leaf, WrapperTensor) else leaf


def wrap_result(result: Any, outer: dict[int, WrapperTensor], device: torch.device) -> Any:
    """An op's result with its new tensors wrapped, on `device`. One that an in-place op gave back keeps its wrapper."""
    return pytree.tree_map_only(torch.Tensor, lambda t: outer[id(t)] if id(t) in outer else WrapperTensor(t, device), result)


def given(func: OpOverload, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by schema name; those left out are missing."""
    names = [a.name for a in schema_of(func).arguments]
    return {**dict(zip(names, args)), **kwargs}


def written(func: OpOverload, args: tuple, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors among the arguments that the op writes into."""
    names = written_arguments(func)
    switch, hidden = HIDDEN_WRITES.get(op_name(func), ("", ()))
    by_name = given(func, args, kwargs)
    if hidden and by_name.get(switch) is not False:
        names += hidden
    return [t for name in names for t in pytree.tree_leaves(by_name.get(name)) if isinstance(t, torch.Tensor)]
