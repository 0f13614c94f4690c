"""How a model is called: names, structure and sizes of what goes in, structure of what comes out.

A call is bound to the parameter names of `forward`, so that `model(x, mask=m)` and `model(x, m)` are one call. The bound
arguments are flattened as pytrees; tensor leaves are the Program's inputs, every other leaf (a flag, a
number, None) was baked in at capture and is compared at later calls.
"""

from __future__ import annotations

import copyreg
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ir_tools.errors import SignatureError
from ir_tools.torch_compat import pytree


@dataclass(frozen=True)
class DynamicSize:
    """A size that is free from `least` to `most` (None: any). Sizes of one name are equal in every call."""

    name: str
    least: int = 1
    most: int | None = None

    @property
    def allowed(self) -> str:
        """`from 2 to 8`."""
        return f"at least {self.least}" if self.most is None else f"from {self.least} to {self.most}"

    def holds(self, value: int) -> bool:
        return self.least <= value and (self.most is None or value <= self.most)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Condition:
    """What dynamic sizes must meet: `text` in Python, which TorchScript reads the same, over the sizes called `names`."""

    text: str
    names: tuple[str, ...]

    def holds(self, sizes: dict[str, int]) -> bool:
        return bool(eval(self.text, {"__builtins__": {}, "max": max, "min": min}, dict(sizes)))


@dataclass(frozen=True)
class InputSpec:
    """One tensor input. `name` is the path in the call ("x", "batch['mask']"); ints in `shape` are baked in."""

    name: str
    shape: tuple[int | DynamicSize, ...]
    dtype: torch.dtype

    @property
    def is_dynamic(self) -> bool:
        return any(isinstance(size, DynamicSize) for size in self.shape)

    @property
    def shape_text(self) -> str:
        """`[batch, 3, 224, 224]`."""
        return f"[{', '.join(map(str, self.shape))}]"

    def __str__(self) -> str:
        return f"{self.name}: {str(self.dtype).removeprefix('torch.')}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class _Baked:
    """A leaf of a call or result that is not a tensor."""

    value: Any


@dataclass(frozen=True)
class Signature:
    """The call signature of a captured model.

    `parameters`: names of the arguments given at capture, in order. `in_tree`: structure of `{name: value}`.
    `in_leaves`/`out_leaves`: per leaf an index into the flat tensors, or the baked value. `bind` turns any call into
    `{name: value}`.
    """

    bind: Callable[..., dict[str, Any]]
    parameters: tuple[str, ...]
    inputs: tuple[InputSpec, ...]
    in_tree: pytree.TreeSpec
    in_leaves: tuple[int | _Baked, ...]
    out_tree: pytree.TreeSpec
    out_leaves: tuple[int | _Baked, ...]
    conditions: tuple[Condition, ...] = ()

    @property
    def dynamic_sizes(self) -> dict[str, tuple[DynamicSize, list[tuple[int, int]]]]:
        """By name: the size, and where it stands, as (number of the input, axis)."""
        found: dict[str, tuple[DynamicSize, list[tuple[int, int]]]] = {}
        for i, spec in enumerate(self.inputs):
            for axis, size in enumerate(spec.shape):
                if isinstance(size, DynamicSize):
                    found.setdefault(size.name, (size, []))[1].append((i, axis))
        return found

    @property
    def output_count(self) -> int:
        return sum(isinstance(leaf, int) for leaf in self.out_leaves)

    @cached_property
    def is_plain(self) -> bool:
        """Every argument is one tensor, in the order of `forward`, and the result is one tensor: nothing to flatten."""
        try:
            by_position = self.bind(*range(len(self.parameters)))
        except SignatureError:  # some go by keyword only
            return False
        return (
            tuple(by_position) == self.parameters
            and all(argument.is_leaf() for argument in self.in_tree.children())
            and self.in_leaves == tuple(range(len(self.parameters)))
            and self.out_tree.is_leaf()
        )

    def flatten(self, args: tuple, kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """The tensors of a call, in the order of `inputs`. Raises `SignatureError` when the call has another shape."""
        bound = self.bind(*args, **kwargs)
        try:
            leaves = self.in_tree.flatten_up_to(bound)  # the order of a dict's keys does not matter
        except ValueError:
            got, tree = pytree.tree_flatten(bound)
            raise SignatureError(
                f"the call has another structure than the one captured: expected {self.describe()}, "
                f"got {describe_tree(tree, got)}"
            ) from None
        tensors: list[torch.Tensor] = []
        for name, leaf, wanted in zip(self._leaf_names, leaves, self.in_leaves, strict=True):
            if isinstance(wanted, int):
                if not isinstance(leaf, torch.Tensor):
                    raise SignatureError(f"input '{name}' must be a tensor, got {type(leaf).__name__}")
                tensors.append(leaf)
            elif not _same_leaf(leaf, wanted.value):
                raise SignatureError(
                    f"input '{name}' was {wanted.value!r} when the model was captured and is baked in; got "
                    f"{'a tensor' if isinstance(leaf, torch.Tensor) else repr(leaf)}. Capture again with the new value."
                )
        return tensors

    @cached_property
    def _result_holds_objects(self) -> bool:
        return _holds_open(self.out_tree)

    @cached_property
    def _leaf_names(self) -> list[str]:
        return leaf_names(self.in_tree)

    def check(self, tensors: Sequence[torch.Tensor]) -> None:
        """Raise `SignatureError`, naming the input, when a rank, size or dtype differs from what was captured."""
        for spec, t in zip(self.inputs, tensors, strict=True):
            if t.dtype != spec.dtype:
                raise SignatureError(f"input '{spec.name}' must have dtype {spec.dtype}, got {t.dtype}")
            fits = t.dim() == len(spec.shape) and all(
                isinstance(wanted, DynamicSize) or wanted == got for wanted, got in zip(spec.shape, t.shape, strict=True)
            )
            if not fits:
                raise SignatureError(
                    f"input '{spec.name}' must have shape {spec.shape_text} (sizes were baked in at capture), "
                    f"got {list(t.shape)}"
                )
        self._check_sizes(tensors)

    def _check_sizes(self, tensors: Sequence[torch.Tensor]) -> None:
        sizes: dict[str, int] = {}
        for name, (size, locations) in self.dynamic_sizes.items():
            for i, axis in locations:
                got = tensors[i].shape[axis]
                where = f"size {axis} of input '{self.inputs[i].name}' ({name})"
                if got != sizes.setdefault(name, got):
                    raise SignatureError(f"{where} is {got}, but {name} is {sizes[name]} elsewhere in the call")
                if not size.holds(got):
                    raise SignatureError(f"{where} must be {size.allowed}, got {got}")
        for condition in self.conditions:
            if not condition.holds(sizes):
                given = ", ".join(f"{n} = {sizes[n]}" for n in condition.names)
                raise SignatureError(f"the sizes must meet {condition.text}, got {given}")

    def arguments(self, tensors: Sequence[Any]) -> dict[str, Any]:
        """The bound arguments of a call from flat tensors: the inverse of `flatten`."""
        return pytree.tree_unflatten(_fill(self.in_leaves, tensors), self.in_tree)

    def unflatten_outputs(self, tensors: Sequence[Any]) -> Any:
        """The user's output structure from the Program's flat outputs."""
        result = pytree.tree_unflatten(_fill(self.out_leaves, tensors), self.out_tree)
        return _closed(result) if self._result_holds_objects else result

    def describe(self) -> str:
        return ", ".join(map(str, self.inputs)) or "no tensors"


def _fill(leaves: Sequence[int | _Baked], tensors: Sequence[Any]) -> list[Any]:
    return [tensors[leaf] if isinstance(leaf, int) else leaf.value for leaf in leaves]


def leaf_names(tree: pytree.TreeSpec) -> list[str]:
    """A readable path per leaf of `{name: value}`: `x`, `batch['mask']`, `pair[0]`."""
    paths, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten([0] * tree.num_leaves, tree))
    return [_path_name(path) for path, _ in paths]


def _path_name(path: tuple) -> str:
    first, *rest = path
    name = str(first.key) if hasattr(first, "key") else str(first)
    return name + "".join(pytree.keystr((p,)) for p in rest)


def describe_tree(tree: pytree.TreeSpec, leaves: Sequence[Any]) -> str:
    parts = []
    for name, leaf in zip(leaf_names(tree), leaves, strict=True):
        if isinstance(leaf, torch.Tensor):
            parts.append(f"{name}: {str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}")
        else:
            parts.append(f"{name}={leaf!r}")
    return ", ".join(parts) or "no arguments"


def binder(parameters: Sequence[inspect.Parameter]) -> Callable[..., dict[str, Any]]:
    """A function that binds any legal call of `forward` to `{parameter: value}`, leaving defaults out."""
    signature = inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters])

    def bind(*args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise SignatureError(f"the call does not fit forward{signature}: {error}") from None
        out: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                out.update(value)
            elif not _is_default(value, signature.parameters[name].default):
                out[name] = value
        return out

    return bind


def _same_leaf(value: Any, baked: Any) -> bool:
    """A baked leaf given again: of the same type (1, 1.0 and True make different graphs) and value; NaN equals NaN."""
    if type(value) is not type(baked):
        return False
    return value is baked or bool(value == baked) or (value != value and baked != baked)


def _is_default(value: Any, default: Any) -> bool:
    """Giving `value` is the same as leaving the argument out."""
    plain = type(value) is type(default) and isinstance(value, (bool, int, float, str))
    return value is default or (plain and value == default)


def split_leaves(leaves: Sequence[Any]) -> tuple[tuple[int | _Baked, ...], list[torch.Tensor]]:
    """Leaves as indices into the list of tensors, or baked values; and that list."""
    tensors: list[torch.Tensor] = []
    out: list[int | _Baked] = []
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            out.append(len(tensors))
            tensors.append(leaf)
        else:
            out.append(_Baked(leaf))
    return tuple(out), tensors


# -- results --------------------------------------------------------------------------------------------------------------


def flatten_result(result: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """The leaves and the structure of what a model returns.

    Unlike pytree's own, this opens objects that hold tensors in their attributes (a key-value cache, a distribution):
    `Signature.unflatten_outputs` makes new ones of them. Raises `SignatureError` for an object that cannot be made anew.
    """
    return pytree.tree_flatten(_opened(result))


def result_leaves(result: Any) -> list[Any]:
    """The leaves alone."""
    return flatten_result(result)[0]


def result_tensors(result: Any) -> list[torch.Tensor]:
    """The tensors among the leaves, which are the Program's outputs in their order."""
    return split_leaves(result_leaves(result))[1]


class _Open:
    """An object of a class that pytree does not know, as a node of the tree: its class, and its attributes."""

    def __init__(self, kind: type, attributes: dict[str, Any]):
        self.kind = kind
        self.attributes = attributes


pytree.register_pytree_node(_Open, lambda node: ([node.attributes], node.kind), lambda children, kind: _Open(kind, *children))


def _opened(value: Any, outer: tuple[int, ...] = ()) -> Any:
    def open_leaf(leaf: Any) -> Any:
        if not _holds_tensors(leaf):
            return leaf
        if id(leaf) in outer or not _is_made_of_attributes(leaf):
            raise SignatureError(
                f"the model returns a {type(leaf).__name__}, which holds tensors and cannot be taken apart and made anew; "
                f"return a tuple or dict, or register the class with {pytree.REGISTRATION}"
            )
        return _Open(type(leaf), _opened(dict(vars(leaf)), (*outer, id(leaf))))

    return pytree.tree_map(open_leaf, value)


def _closed(value: Any) -> Any:
    def close(leaf: Any) -> Any:
        if not isinstance(leaf, _Open):
            return leaf
        made: Any = object.__new__(leaf.kind)
        vars(made).update(_closed(leaf.attributes))
        return made

    return pytree.tree_map(close, value, is_leaf=lambda leaf: isinstance(leaf, _Open))


def _holds_open(tree: pytree.TreeSpec) -> bool:
    return tree.type is _Open or any(_holds_open(child) for child in tree.children())


def _holds_tensors(value: Any) -> bool:
    """A leaf of a tree, not itself a tensor, with tensors among its attributes or theirs.

    A module that is returned stays the very module.
    """
    seen: set[int] = set()

    def holds(leaf: Any) -> bool:
        if isinstance(leaf, torch.Tensor):
            return True
        if id(leaf) in seen or not hasattr(leaf, "__dict__") or isinstance(leaf, (type, torch.nn.Module)) or callable(leaf):
            return False
        seen.add(id(leaf))
        return any(holds(part) for part in pytree.tree_leaves(dict(vars(leaf))))

    return not isinstance(value, torch.Tensor) and holds(value)


def _is_made_of_attributes(value: Any) -> bool:
    """The object consists of its class and `vars(value)` alone, according to its `__reduce_ex__`."""
    try:
        make, given, state, *more = value.__reduce_ex__(2)
        plain = make is copyreg.__newobj__ and given == (type(value),)  # type: ignore[attr-defined]
        return plain and bool(state == vars(value)) and not any(part is not None for part in more)
    except Exception:  # it refuses to be copied, or its state is something else altogether
        return False
