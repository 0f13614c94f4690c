"""The dialect: which targets a node may call, and how their arguments are named.

Targets are pre-dispatch ATen `OpOverload`s, `operator.getitem` on an op's tuple or list of results, ops on numbers and
containers (`host`), regions (`regions`), and the ops that this module registers.
Arguments are stored in canonical form: everything that is not keyword-only goes by position, with every
default filled in, so that reading an argument by its schema name is a table look-up.

Fused ops, registered here with a reference implementation in plain ATen, so that every Program runs anywhere:

    conv_act(x, w, b, stride, padding, dilation, groups, residual, act, act_args)   = act(conv(x, w, b) + residual)
    linear_act(x, w, b, residual, act, act_args)                                    = act(linear(x, w, b) + residual)
    quant_stub(x, site)                                                             = x
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import fx

from ir_tools.torch_compat.operators import OpOverload, schema_of

aten = torch.ops.aten

# Activation names of `conv_act` and `linear_act`: name -> (ATen op, names of the arguments that `act_args` holds).
ACTIVATIONS: dict[str, tuple[OpOverload, tuple[str, ...]]] = {
    "relu": (aten.relu.default, ()),
    "hardtanh": (aten.hardtanh.default, ("min_val", "max_val")),
    "leaky_relu": (aten.leaky_relu.default, ("negative_slope",)),
    "hardswish": (aten.hardswish.default, ()),
    "hardsigmoid": (aten.hardsigmoid.default, ()),
    "silu": (aten.silu.default, ()),
    "sigmoid": (aten.sigmoid.default, ()),
    "tanh": (aten.tanh.default, ()),
    "elu": (aten.elu.default, ("alpha", "scale", "input_scale")),
    "gelu": (aten.gelu.default, ()),
    "gelu_tanh": (aten.gelu.default, ()),
}


def activate(x: torch.Tensor, act: str, act_args: list[float]) -> torch.Tensor:
    """Apply the activation called `act`; the empty name is the identity."""
    if act == "":
        return x
    if act == "gelu_tanh":
        return aten.gelu.default(x, approximate="tanh")
    return ACTIVATIONS[act][0](x, *act_args)


_CONV_BY_RANK = {3: aten.conv1d.default, 4: aten.conv2d.default, 5: aten.conv3d.default}


def _conv_act(x, w, b, stride, padding, dilation, groups, residual, act, act_args):
    y = _CONV_BY_RANK[w.dim()](x, w, b, stride, padding, dilation, groups)
    return activate(y if residual is None else y + residual, act, act_args)


def _linear_act(x, w, b, residual, act, act_args):
    y = aten.linear.default(x, w, b)
    return activate(y if residual is None else y + residual, act, act_args)


def _quant_stub(x, site):
    return x.clone()


_library = torch.library.Library("torch_passes", "DEF")
_library.define(
    "conv_act(Tensor x, Tensor w, Tensor? b, int[] stride, int[] padding, int[] dilation, int groups,"
    " Tensor? residual, str act, float[] act_args) -> Tensor"
)
_library.define("linear_act(Tensor x, Tensor w, Tensor? b, Tensor? residual, str act, float[] act_args) -> Tensor")
_library.define("quant_stub(Tensor x, str site) -> Tensor")
_library.impl("conv_act", _conv_act, "CompositeImplicitAutograd")
_library.impl("linear_act", _linear_act, "CompositeImplicitAutograd")
_library.impl("quant_stub", _quant_stub, "CompositeImplicitAutograd")

conv_act: OpOverload = torch.ops.torch_passes.conv_act.default
linear_act: OpOverload = torch.ops.torch_passes.linear_act.default
quant_stub: OpOverload = torch.ops.torch_passes.quant_stub.default

DIALECT_ONLY = frozenset({conv_act, linear_act, quant_stub})
"""Ops that no emitted file may hold: stock torch does not know them."""

getitem = operator.getitem

# Families of overloads that rules may name as one op.
CONVOLUTIONS = frozenset(_CONV_BY_RANK.values())
TRANSPOSED_CONVOLUTIONS = frozenset(
    {aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input}
)

AXIS_MOVES = frozenset(
    {aten.permute.default, aten.transpose.int, aten.t.default, aten.numpy_T.default, aten.mT.default, aten.movedim.int}
    | {aten.movedim.intlist}
)
RESHAPINGS = frozenset(
    {aten.reshape.default, aten.view.default, aten.flatten.using_ints, aten.unflatten.int, aten.unsqueeze.default}
    | {aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims}
)
"""Ops that give the same elements in the same order, in another shape."""


def op_name(target: Any) -> str:
    """The schema name without overload, such as `aten::conv2d`; `getitem` for the container read."""
    if isinstance(target, OpOverload):
        return schema_of(target).name
    return getattr(target, "__name__", str(target))


def short_name(target: Any) -> str:
    """The op's name without its namespace, such as `conv2d`."""
    return op_name(target).rsplit("::", 1)[-1]


def overload_name(target: Any) -> str:
    """The full name with overload, such as `aten::add.Tensor`."""
    if not isinstance(target, OpOverload):
        return op_name(target)
    return schema_of(target).name + (f".{schema_of(target).overload_name}" if schema_of(target).overload_name else "")


@lru_cache(maxsize=4096)
def argument_names(target: OpOverload) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(positional names, keyword-only names) of an overload, in schema order."""
    arguments = schema_of(target).arguments
    return (
        tuple(a.name for a in arguments if not a.kwarg_only),
        tuple(a.name for a in arguments if a.kwarg_only),
    )


def canonicalize_arguments(target: OpOverload, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Arguments in the dialect's canonical form: by position with defaults filled in, keyword-only by name.

    Raises `TypeError` when an argument is missing, unknown, or given twice.
    """
    schema = schema_of(target)
    positional = [a for a in schema.arguments if not a.kwarg_only]
    if len(args) > len(positional):
        raise TypeError(f"{overload_name(target)} takes {len(positional)} positional arguments, got {len(args)}")
    left = dict(kwargs)
    out_args = list(args)
    for a in positional[len(args) :]:
        out_args.append(_take(target, a, left))
    out_kwargs = {a.name: _canonical(a, _take(target, a, left)) for a in schema.arguments if a.kwarg_only}
    if left:
        raise TypeError(f"{overload_name(target)} has no argument {sorted(left)[0]!r} (or it was given twice)")
    return tuple(_canonical(a, v) for a, v in zip(positional, out_args, strict=True)), out_kwargs


_MEMORY_FORMATS = (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d)
_LAYOUTS = (torch.strided, torch.sparse_coo)
# c10::ScalarType in order: TorchScript's graphs and code write dtypes as these numbers.
DTYPE_NUMBERS: dict[int, torch.dtype] = dict(
    enumerate(
        (
            torch.uint8,
            torch.int8,
            torch.int16,
            torch.int32,
            torch.int64,
            torch.float16,
            torch.float32,
            torch.float64,
            torch.complex32,
            torch.complex64,
            torch.complex128,
            torch.bool,
            torch.qint8,
            torch.quint8,
            torch.qint32,
            torch.bfloat16,
        )
    )
)


def _canonical(argument: Any, value: Any) -> Any:
    """One literal in canonical form: dtypes as `torch.dtype`, not TorchScript's numbers; `1` for `int[2]` as `[1, 1]`."""
    if isinstance(value, bool) or value is None:
        return value
    kind = argument_kind(argument)
    if isinstance(value, int):
        if kind == "ScalarType":
            return DTYPE_NUMBERS[value]
        if kind == "MemoryFormat":
            return _MEMORY_FORMATS[value]
        if kind == "Layout":
            return _LAYOUTS[value]
        if kind == "float":
            return float(value)
        if argument.N:
            return [value] * argument.N
    if isinstance(value, str) and kind == "Device":
        return torch.device(value)
    if isinstance(value, (list, tuple)) and argument.N and len(value) == 1:
        return list(value) * argument.N
    return value


def argument_kind(argument: Any) -> str:
    """The schema type of an argument without `Optional`, such as `ScalarType` or `List[int]`."""
    kind = str(argument.real_type)
    return kind.removeprefix("Optional[").removesuffix("]") if kind.startswith("Optional[") else kind


def _take(target: OpOverload, argument: Any, given: dict[str, Any]) -> Any:
    if argument.name in given:
        return given.pop(argument.name)
    if argument.has_default_value():
        return argument.default_value
    raise TypeError(f"{overload_name(target)} needs the argument {argument.name!r}")


def bound_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a `call_function` node by schema name, in schema order."""
    if node.target is getitem:
        return {"container": node.args[0], "index": node.args[1]}
    if not isinstance(node.target, OpOverload):
        return {str(i): a for i, a in enumerate(node.args)}
    positional, _ = argument_names(node.target)
    return dict(zip(positional, node.args, strict=False)) | dict(node.kwargs)


def argument(node: fx.Node, name: str) -> Any:
    """One argument of a `call_function` node by its schema name."""
    try:
        return bound_arguments(node)[name]
    except KeyError:
        raise AttributeError(
            f"{overload_name(node.target)} has no argument {name!r}; it has {', '.join(bound_arguments(node))}"
        ) from None


def numbers_in(node: fx.Node) -> list[float]:
    """The literal numbers that an op computes with: its schema's Scalars and floats (sizes and indices are ints)."""
    if not isinstance(node.target, OpOverload):
        return []
    given = bound_arguments(node)
    found: list[float] = []
    for a in schema_of(node.target).arguments:
        if argument_kind(a) in ("number", "float", "List[float]"):
            values = given[a.name] if isinstance(given[a.name], (list, tuple)) else [given[a.name]]
            found += [v for v in values if isinstance(v, (int, float))]
    return found


def nodes_in(value: Any) -> Iterator[fx.Node]:
    """The nodes in a (nested) argument, in order."""
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from nodes_in(v)
    elif isinstance(value, dict):
        for v in value.values():
            yield from nodes_in(v)


def map_argument(value: Any, function: Callable[[Any], Any]) -> Any:
    """`value` with `function` applied to its leaves; lists and tuples become lists (TorchScript has no tuple arguments)."""
    if isinstance(value, (list, tuple)):
        return [map_argument(v, function) for v in value]
    return function(value)
