"""Shape inference: the fact of an op's result from those of its arguments, by running torch's fake kernels.

Where these are missing or wrong, and for ops on numbers and containers, which have none, the fact is made here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import fx

from ir_tools.errors import PassesError
from ir_tools.ir.dialect import bound_arguments, map_argument, nodes_in, op_name, overload_name
from ir_tools.ir.facts import SYMBOLS, fact, has_symbols, rank, same_layout, unknown_number, unknown_size
from ir_tools.ir.host import CONSTRUCTORS, is_host, make_list, make_tuple, meaning
from ir_tools.ir.joins import NOTHING, Elements, join
from ir_tools.torch_compat.dispatch import python_kernels, without_modes
from ir_tools.torch_compat.fake import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from ir_tools.torch_compat.operators import schema_or
from ir_tools.torch_compat.symbols import GuardOnDataDependentSymNode, backed_size_oblivious
from ir_tools.torch_compat.tensors import likely_memory_format


class FactError(PassesError, RuntimeError):
    """An op rejects the shapes or dtypes of its arguments."""


# Ops without a fake kernel in torch: the position of the argument that has the shape and dtype of the result.
SAME_FACT_AS = {
    "mkldnn::_convolution_pointwise.binary": 1,
    "mkldnn::_convolution_pointwise_.binary": 0,
    "mkldnn::_linear_pointwise.binary": 1,
}


def _packed_sequence(mode: FakeTensorMode, values: torch.Tensor, lengths: torch.Tensor, batch_first: bool) -> Any:
    """As many rows as the lengths add up to, and how many sequences each step has."""
    rows, steps = (unknown_size(mode, set()) for _ in range(2))
    with mode:
        data = torch.empty([rows, *values.shape[2:]], dtype=values.dtype, device=values.device)
        return data, torch.empty([steps], dtype=torch.int64)


def _recurrent(mode: FakeTensorMode, values: torch.Tensor, states: Any, parameters: Any, *options: Any) -> Any:
    """`lstm.input` and its kin: one row of features per step and direction, then the state, or (of an LSTM) both states."""
    *_, bidirectional, _ = options
    last = states if isinstance(states, (list, tuple)) else [states]
    sizes = [*values.shape[:-1], last[0].shape[-1] * (2 if bidirectional else 1)]
    with mode:
        made = [torch.empty(list(size), dtype=values.dtype, device=values.device) for size in (sizes, *(s.shape for s in last))]
    return tuple(made)


def _batch_norm_layout(values: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """Contiguous or channels-last (aten/src/ATen/native/Normalization.cpp); the fake kernel copies the input's strides."""
    return torch.empty_like(result, memory_format=likely_memory_format(values))


def _reshape_layout(values: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """A reshape to the same shape gives axes of one element other strides; the fake kernel gives back its operand."""
    if result.shape != values.shape:
        return result
    with without_modes():
        plain = torch.empty_strided(tuple(values.shape), values.stride(), device="meta").reshape(values.shape)
    return values.as_strided(values.shape, plain.stride())


LAYOUTS_ON_CPU = {"aten::batch_norm": _batch_norm_layout, "aten::reshape": _reshape_layout, "aten::view": _reshape_layout}
"""Ops whose results have other layouts than torch 2.13's fake kernels say. Layouts decide which kernel the next op takes."""


# torch 2.13's fake kernels of these give the wrong sizes or dtypes, or unroll over the length of a sequence.
OWN_FACTS = {"aten::_pack_padded_sequence": _packed_sequence}
UNROLLED = frozenset(getattr(torch.ops.aten, kind).input for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu"))


def compute_fact(mode: FakeTensorMode, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What `target` gives on the facts of its arguments; None when one of them is unknown.

    Raises `FactError` when the op itself rejects them.
    """
    unknown = False

    def known(value: Any) -> Any:
        nonlocal unknown
        out = fact(value)
        unknown = unknown or (isinstance(value, fx.Node) and out is None)
        return out

    fake_args = tuple(map_argument(a, known) for a in args)
    fake_kwargs = {k: map_argument(v, known) for k, v in kwargs.items()}
    nothing = any(v is NOTHING for v in _leaves((fake_args, fake_kwargs)))
    if is_host(target):
        return _host_fact(mode, target, fake_args, unknown or nothing)
    if nothing or unknown:
        return NOTHING if nothing else None
    if target in UNROLLED:
        return _recurrent(mode, *fake_args)
    if op_name(target) in OWN_FACTS:
        return OWN_FACTS[op_name(target)](mode, *fake_args)
    if any(isinstance(v, Elements) for v in _leaves((fake_args, fake_kwargs))):
        joins = op_name(target) in GROWS_WITH_LIST and isinstance(fake_args[0], Elements)
        return _fact_of_joined_elements(mode, target, fake_args, fake_kwargs) if joins else None
    symbolic = any(isinstance(v, SYMBOLS) or has_symbols(v) for v in _leaves((fake_args, fake_kwargs)))
    if symbolic and op_name(target).removesuffix("_") == "aten::squeeze" and not _rank_is_known(*fake_args):
        return None
    try:
        with torch.no_grad(), _for_symbols() if symbolic else nullcontext(), mode:
            if torch.Tag.inplace_view in getattr(target, "tags", ()):
                # It changes the shape of the very tensor: give it another one over the same storage.
                fake_args = (torch.ops.aten.alias.default(fake_args[0]), *fake_args[1:])
            result = target(*fake_args, **fake_kwargs)
            on_cpu = None if symbolic else LAYOUTS_ON_CPU.get(op_name(target))
            if on_cpu is not None and isinstance(result, torch.Tensor) and result.device.type == "cpu":
                result = on_cpu(fake_args[0], result)
            return result
    except (GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException):
        return None
    except UnsupportedOperatorException as error:
        like = SAME_FACT_AS.get(overload_name(target))
        if like is None:
            raise FactError(f"{overload_name(target)} has no fake kernel, so its result's shape cannot be known") from error
        return fake_args[like]
    except Exception as error:
        if any(isinstance(v, SYMBOLS) for v in _leaves((fake_args, fake_kwargs))):
            return None  # it may be the symbol that the op rejects, where a number would do
        shapes = ", ".join(_describe(a) for a in fake_args)
        raise FactError(f"{overload_name(target)}({shapes}) fails: {str(error).splitlines()[0]}") from error


def _rank_is_known(values: torch.Tensor, axes: Any = None) -> bool:
    """Each size that a squeeze asks about is a number: a symbol may be 1, although torch takes it for 2 at least."""
    asked = values.shape if axes is None else [values.shape[axis] for axis in ([axes] if isinstance(axes, int) else axes)]
    return all(isinstance(s, int) for s in asked)


@contextmanager
def _for_symbols() -> Iterator[None]:
    """Ops whose C++ kernels decide on sizes use their Python kernels.

    No guard is added about the library that convolves, nor (`backed_size_oblivious`) about a size of 1 that only saves work.
    """
    oblivious = backed_size_oblivious()
    no_library = torch.backends.mkldnn.flags(enabled=False), torch.backends.nnpack.flags(enabled=False)
    with python_kernels(), no_library[0], no_library[1], oblivious:
        yield


def _leaves(value: Any) -> Iterable[Any]:
    if isinstance(value, (list, tuple)):
        for v in value:
            yield from _leaves(v)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    else:
        yield value


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return repr(value)


ASKS_FOR_NONE = frozenset({"aten::__is__", "aten::__isnot__"})
"""Ops that ask whether a value is None. The fact of a value that may be None describes it for the case that it is a tensor."""


PUTS = frozenset({"aten::append", "aten::insert", "aten::_set_item"})
TAKES = frozenset({"aten::__getitem__", "aten::pop"})
COPIES = frozenset({"aten::copy", "aten::list", "aten::slice", "aten::values"})
GROWS_WITH_LIST = frozenset({"aten::cat", "aten::stack"})


def _fact_of_elements(mode: FakeTensorMode, name: str, args: tuple) -> Any:
    """What an op on a container gives: the container itself, a tensor in it, a new container of the same tensors."""
    elements = args[0]
    if name in PUTS:
        elements.add(args[-1])
        return elements
    if name in ("aten::extend", "aten::add_"):
        elements.add(args[1].read() if isinstance(args[1], Elements) else None)
        return elements
    if name in TAKES:
        return elements.read()
    return Elements(mode, [elements.read()]) if name in COPIES else None


def _fact_of_joined_elements(mode: FakeTensorMode, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """`cat` and `stack` of a list of unknown length: the result of one element joined with that of two."""
    known = args[0].read()
    if not isinstance(known, torch.Tensor):
        return known
    short, long = (compute_fact(mode, target, ([known] * n, *args[1:]), kwargs) for n in (1, 2))
    return join(mode, short, long)


def _host_fact(mode: FakeTensorMode, target: Any, args: tuple, unknown: bool) -> Any:
    """A number or string where it is known, a symbol for an unknown number."""
    if target is make_tuple:
        return args
    if target in CONSTRUCTORS:
        return Elements(mode, args if target is make_list else args[1])
    if args and isinstance(args[0], Elements):
        found = _fact_of_elements(mode, op_name(target), args)
        if found is not None:
            return found
        unknown = True
    function = meaning(target)
    assert function is not None
    # torch's own operator would take a symbol for the number of the example, and pin it.
    unknown = unknown or (function is target and any(isinstance(v, SYMBOLS) for v in _leaves(args)))
    result = None
    if not unknown and op_name(target) not in ASKS_FOR_NONE:
        try:
            with torch.no_grad(), mode:
                result = function(*args)
        except Exception:  # what symbols do not support; an error of the model's own comes when it runs
            result = None
    if isinstance(result, (list, dict)):
        return None
    returns = getattr(schema_or(target, None), "returns", ())
    return unknown_number(mode, str(returns[0].type)) if result is None and returns else result


def copy_keeps_layout(mode: FakeTensorMode, value: fx.Node) -> bool:
    """A copy of the value has the layout of the value; expanded values, and those with gaps, do not keep theirs."""
    copied = compute_fact(mode, torch.ops.aten.clone.default, (value,), {})
    return isinstance(copied, torch.Tensor) and same_layout(fact(value), copied)


def axis_order(node: fx.Node) -> list[int] | None:
    """Which axis of its operand each axis of the result is, for an op that only moves axes; None when it is not known."""
    operand, *arguments = bound_arguments(node).values()
    known = rank(operand)
    if known is None or any(nodes_in(arguments)):
        return None
    probe = torch.empty(()).expand(list(range(known)))  # a different size for each axis
    return list(node.target(probe, *arguments).shape)  # type: ignore[operator]
