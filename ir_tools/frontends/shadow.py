"""Running a model on shadows: tensors whose values only a dispatch mode can reach.

A `Shadow` carries a real tensor inside and nothing outside: sizes, a dtype, and the device that it claims to be on. Ops on it
come to the mode that is switched on, which computes on what is inside. What would read the memory itself (numpy, tolist,
C++ code that takes the data pointer) raises, so whatever a mode concludes from what it saw, it saw everything.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ir_tools.ir.dialect import HIDDEN_WRITES, op_name, written_arguments
from ir_tools.torch_compat import pytree
from ir_tools.torch_compat.dispatch import FILES_AROUND_MODES, TorchDispatchMode, no_torch_function, wrapper_tensor
from ir_tools.torch_compat.operators import OpOverload, schema_of

aten = torch.ops.aten


class ShadowError(Exception):
    """The run does what shadows cannot follow, so that nothing is known about it."""


class Shadow(torch.Tensor):
    """Claims `device`; `inside` is where the values are."""

    inside: torch.Tensor
    __torch_function__ = no_torch_function  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inside: torch.Tensor, device: torch.device) -> Shadow:
        assert not isinstance(inside, Shadow)
        if inside.layout is not torch.strided:
            raise ShadowError(f"a tensor has the layout {inside.layout}")
        shadow = wrapper_tensor(cls, inside, device)
        shadow.inside = inside
        return shadow

    data = property(torch.Tensor.detach)  # type: ignore[assignment]  # torch's own gives a tensor that is no shadow

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Shadow({self.dtype}, {list(self.shape)}, {self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        raise ShadowError(f"{func} met a shadow outside of its mode")


class ShadowMode(TorchDispatchMode):
    """Computes every op on what is inside its shadows. What it means, and what the results claim, is said by `follow`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        leaves, tree = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if torch.Tag.inplace_view in func.tags and any(isinstance(t, Shadow) for t in tensors):
            raise ShadowError(f"{func} changes the shape of a tensor in place")
        outer = {id(t.inside): t for t in tensors if isinstance(t, Shadow)}
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
        outer: dict[int, Shadow],
    ) -> Any:
        """Run `func(*inner_args, **inner_kwargs)` and give its result, wrapped again by `clothe`.

        `args`, `kwargs` and the `tensors` among them are as the model gave them; `outer` has the shadow around each tensor
        inside, by its id.
        """
        raise NotImplementedError


class ShadowFunctions(TorchFunctionMode):
    """Goes with every `ShadowMode`: keeps a model from what dispatch does not see, and would crash on.

    Assigning `.data` gives a tensor the memory of another, and a shadow has none.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func == _SET_DATA:
            raise ShadowError("forward assigns .data, which dispatch does not see")
        return func(*args, **(kwargs or {}))


_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]


def _inside(leaf: Any) -> Any:
    return leaf.inside if isinstance(leaf, Shadow) else leaf


def clothe(result: Any, outer: dict[int, Shadow], device: torch.device) -> Any:
    """An op's result with its new tensors as shadows on `device`. One that an in-place op gave back keeps its shadow."""
    return pytree.tree_map_only(torch.Tensor, lambda t: outer[id(t)] if id(t) in outer else Shadow(t, device), result)


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


# -- where in the model's Python ----------------------------------------------------------------------------------------

Frame = tuple[str, int]
"""File and line."""


def frames() -> Iterator[Frame]:
    """The Python frames that lead here, innermost first, without those of the modes that look on."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename.replace("\\", "/")
        if not file.endswith(_LOOKING_ON):
            yield frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back


_LOOKING_ON = (
    *(f"ir_tools/frontends/{name}.py" for name in ("shadow", "verdict", "portability")),
    *FILES_AROUND_MODES,
)


def in_torch(frame: Frame) -> bool:
    return "/torch/" in frame[0].replace("\\", "/")


def users_frame(stack: Sequence[Frame]) -> Frame:
    """The innermost frame that is not torch's own, as `source_line` of a captured node says it."""
    return next((frame for frame in stack if not in_torch(frame)), stack[0])


def spelled(frame: Frame) -> str:
    """ "file.py:12" """
    return f"{frame[0].replace(chr(92), '/').rsplit('/', 1)[-1]}:{frame[1]}"
