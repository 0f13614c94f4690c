"""Shape inference: the fact of an op's result from those of its arguments, by running torch's fake kernels.

Where these are missing or wrong (`layouts_on_cpu`), and for ops on numbers and containers, the fact is made here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import fx

from ir_tools.errors import PassesError
from ir_tools.ir.dialect import bound_arguments, map_argument, nodes_in, op_name, overload_name
from ir_tools.ir.effects import written_arguments
from ir_tools.ir.facts import (
    ABSENT,
    SYMBOLS,
    UNKNOWN,
    Fact,
    ListFact,
    ScalarFact,
    TensorFact,
    TupleFact,
    contiguous_strides,
    fact,
    rank,
    same_layout,
)
from ir_tools.ir.host import CONSTRUCTORS, is_host, make_list, make_tuple, meaning
from ir_tools.ir.inference_mode import InferenceMode
from ir_tools.ir.joins import Elements, join
from ir_tools.ir.layouts_on_cpu import layout_on_cpu
from ir_tools.torch_compat.dispatch import python_kernels
from ir_tools.torch_compat.fake import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    UnsupportedOperatorException,
)
from ir_tools.torch_compat.operators import OpOverload, schema_of, schema_or
from ir_tools.torch_compat.symbols import GuardOnDataDependentSymNode, backed_size_oblivious
from ir_tools.torch_compat.tensors import storage_id


class FactError(PassesError, RuntimeError):
    """An op rejects the shapes or dtypes of its arguments."""


# Ops without a fake kernel in torch: the position of the argument that has the shape and dtype of the result.
SAME_FACT_AS = {
    "mkldnn::_convolution_pointwise.binary": 1,
    "mkldnn::_convolution_pointwise_.binary": 0,
    "mkldnn::_linear_pointwise.binary": 1,
}


def _packed_sequence(mode: InferenceMode, values: torch.Tensor, lengths: torch.Tensor, batch_first: bool) -> Any:
    """As many rows as the lengths add up to, and how many sequences each step has."""
    (rows, steps), device = (mode.unknown_size(set()) for _ in range(2)), torch.device("cpu")
    known = TensorFact.of(values)
    data = TensorFact((rows, *known.shape[2:]), known.dtype, known.device, None)
    return TupleFact((data, TensorFact((steps,), torch.int64, device, (1,))))


def _recurrent(mode: InferenceMode, values: torch.Tensor, states: Any, parameters: Any, *options: Any) -> Any:
    """`lstm.input` and its kin: one row of features per step and direction, then the state, or (of an LSTM) both states.

    Rows lie in memory step by step, whether or not the batch comes first.
    """
    *_, bidirectional, batch_first = options
    last = states if isinstance(states, (list, tuple)) else [states]
    one, other, features = *values.shape[:2], last[0].shape[-1] * (2 if bidirectional else 1)
    with mode:
        rows = torch.empty([other, one, features] if batch_first else [one, other, features],
                           dtype=values.dtype, device=values.device)  # fmt: skip
        made = [torch.empty(list(s.shape), dtype=values.dtype, device=values.device) for s in last]
        return (rows.transpose(0, 1) if batch_first else rows, *made)


# torch 2.13's fake kernels of these give the wrong sizes or dtypes, or unroll over the length of a sequence.
OWN_FACTS = {"aten::_pack_padded_sequence": _packed_sequence}
UNROLLED = frozenset(getattr(torch.ops.aten, kind).input for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu"))


def compute_fact(mode: InferenceMode, target: Any, args: tuple, kwargs: dict[str, Any]) -> Fact:
    """What `target` gives on the facts of its arguments; UNKNOWN when too little is known of one of them.

    Raises `FactError` when the op itself rejects them.
    """
    known_args = tuple(map_argument(a, mode_fact(mode)) for a in args)
    known_kwargs = {k: map_argument(v, mode_fact(mode)) for k, v in kwargs.items()}
    leaves = list(_leaves((known_args, known_kwargs)))
    unknown, absent = any(v is UNKNOWN for v in leaves), any(v is ABSENT for v in leaves)
    if is_host(target):
        return _host_fact(mode, target, known_args, unknown or absent)
    if absent or unknown:
        return ABSENT if absent else UNKNOWN
    if any(isinstance(v, (Elements, ListFact)) for v in leaves):
        joins = op_name(target) in GROWS_WITH_LIST and isinstance(known_args[0], (Elements, ListFact))
        return _fact_of_joined_elements(mode, target, known_args, known_kwargs) if joins else UNKNOWN
    key = (target, _frozen(known_args), _frozen(known_kwargs), torch.get_default_dtype())
    found = mode.results.get(key)
    if found is None:
        found = _inferred(mode, target, known_args, known_kwargs, leaves)
        if not any(_has_symbols(v) for v in leaves) and not _has_symbols(found):
            mode.results[key] = found
    return found


def mode_fact(mode: InferenceMode) -> Any:
    """The fact of an argument: that of its node, or of a fake tensor; a literal stands for itself."""
    return lambda value: mode.fact_of(value) if isinstance(value, FakeTensor) else fact(value)


def _inferred(mode: InferenceMode, target: Any, args: tuple, kwargs: dict[str, Any], leaves: list[Any]) -> Fact:
    """Where strides of an operand are not known, the op is run on several layouts: what all agree on is known."""
    if not any(map(_lacks_strides, leaves)):
        return _run(mode, target, args, kwargs, leaves)
    found: Fact | None = None
    for order in AXES_IN_MEMORY:
        probe = partial(_laid_out, order)
        probed = tuple(_mapped(a, probe) for a in args), {k: _mapped(v, probe) for k, v in kwargs.items()}
        try:
            result = _run(mode, target, *probed, list(_leaves(probed)))
        except FactError:
            if found is None:  # the contiguous one: what the op rejects there it rejects
                raise
            result = UNKNOWN
        found = result if found is None else _common(found, result)
    assert found is not None
    return found


AXES_IN_MEMORY: tuple[Callable[[int], list[int]], ...] = (
    lambda rank: list(range(rank)),
    lambda rank: list(range(rank))[::-1],
    lambda rank: [0, *range(2, rank), 1] if rank > 2 else list(range(rank)),  # channels-last, where there are channels
    lambda rank: [1, 0, *range(2, rank)] if rank > 1 else [0] * rank,
)
"""Layouts that are tried where strides are not known: the axes of a rank from the outermost in memory to the innermost."""


def _lacks_strides(value: Any) -> bool:
    return isinstance(value, TensorFact) and value.strides is None and value.layout is torch.strided


def _laid_out(order: Callable[[int], list[int]], value: Any) -> Any:
    """The fact with the strides of a dense tensor whose axes lie in that order; any other argument as it is."""
    if isinstance(value, TupleFact):
        return TupleFact(tuple(_laid_out(order, part) for part in value.parts))
    if not _lacks_strides(value):
        return value
    axes = order(value.rank)
    dense = contiguous_strides(tuple(value.shape[axis] for axis in axes))
    return replace(value, strides=tuple(dense[axes.index(axis)] for axis in range(value.rank)))


def _common(one: Fact, other: Fact) -> Fact:
    if isinstance(one, TupleFact):
        others = other.parts if isinstance(other, TupleFact) else [UNKNOWN] * len(one)
        return TupleFact(tuple(map(_common, one.parts, others)))
    if isinstance(one, TensorFact) and (not isinstance(other, TensorFact) or one.strides != other.strides):
        return one.lying(None)
    return one


def _run(mode: InferenceMode, target: Any, args: tuple, kwargs: dict[str, Any], leaves: list[Any]) -> Fact:
    fake_args = tuple(_mapped(a, mode.fake) for a in args)
    fake_kwargs = {k: _mapped(v, mode.fake) for k, v in kwargs.items()}
    if target in UNROLLED:
        return mode.fact_of(_recurrent(mode, *fake_args))
    if op_name(target) in OWN_FACTS:
        return mode.fact_of(OWN_FACTS[op_name(target)](mode, *fake_args))
    symbolic = any(map(_has_symbols, leaves))
    if symbolic and op_name(target).removesuffix("_") == "aten::squeeze" and not _rank_is_known(*fake_args):
        return UNKNOWN
    try:
        with torch.no_grad(), _for_symbols() if symbolic else nullcontext(), mode:
            if isinstance(target, OpOverload) and schema_of(target).is_mutable:
                # It may change the shape of the very tensor, which stands for others too: give it one of its own.
                own = partial(_own, set(written_arguments(target)))
                fake_args = tuple(own(a.name, v) for a, v in zip(schema_of(target).arguments, fake_args))
                fake_kwargs = {name: own(name, v) for name, v in fake_kwargs.items()}
            result = target(*fake_args, **fake_kwargs)
        return layout_on_cpu(target, args, mode.fact_of(result))
    except (GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException):
        return UNKNOWN
    except UnsupportedOperatorException as error:
        like = SAME_FACT_AS.get(overload_name(target))
        if like is None:
            raise FactError(f"{overload_name(target)} has no fake kernel, so its result's shape cannot be known") from error
        return layout_on_cpu(target, args, mode.fact_of(fake_args[like]))
    except Exception as error:
        if any(isinstance(v, ScalarFact) and not v.is_known for v in leaves):
            return UNKNOWN  # it may be the symbol that the op rejects, where a number would do
        shapes = ", ".join(_describe(a) for a in fake_args)
        raise FactError(f"{overload_name(target)}({shapes}) fails: {str(error).splitlines()[0]}") from error


def _own(written: set[str], name: str, value: Any) -> Any:
    return _mapped(value, torch.ops.aten.alias.default) if name in written else value


def shares_memory(mode: InferenceMode, node: fx.Node) -> bool | None:
    """The result of an op is a view of its first operand; None where strides of that are not known."""
    if _lacks_strides(fact(node.args[0])):
        return None
    args = tuple(map_argument(a, lambda v: mode.fake(fact(v))) for a in node.args)
    kwargs = {k: map_argument(v, lambda v: mode.fake(fact(v))) for k, v in node.kwargs.items()}
    with torch.no_grad(), _for_symbols(), mode:
        return storage_id(node.target(*args, **kwargs)) == storage_id(args[0])  # type: ignore[operator]


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


def _mapped(value: Any, function: Any) -> Any:
    """`function` of each leaf of an argument; facts are leaves."""
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(v, function) for v in value)
    return {k: _mapped(v, function) for k, v in value.items()} if isinstance(value, dict) else function(value)


def _frozen(value: Any) -> Any:
    """The argument as a key, in which 1 is not 1.0."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    if isinstance(value, dict):
        return tuple((k, _frozen(v)) for k, v in sorted(value.items()))
    return value if isinstance(value, Fact) else (type(value), repr(value))


def _has_symbols(known: Any) -> bool:
    if isinstance(known, TupleFact):
        return any(map(_has_symbols, known.parts))
    if isinstance(known, TensorFact):
        return known.has_symbols
    return _is_symbol(known)


def _leaves(value: Any) -> Iterable[Any]:
    if isinstance(value, TupleFact):
        yield from _leaves(value.parts)
    elif isinstance(value, (list, tuple)):
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


def _fact_of_elements(mode: InferenceMode, name: str, args: tuple) -> Fact:
    """What an op on a container gives: the container itself, a tensor in it, a new container of the same tensors."""
    container = args[0]
    if name in PUTS:
        return _with(mode, container, args[-1])
    if name in ("aten::extend", "aten::add_"):
        return _with(mode, container, _read(args[1]))
    if name in TAKES:
        return _read(container)
    if name not in COPIES:
        return UNKNOWN
    return Elements(mode, [container.read()]) if isinstance(container, Elements) else container  # type: ignore[no-any-return]


def _read(container: Any) -> Fact:
    if isinstance(container, Elements):
        return container.read()
    return container.elements if isinstance(container, ListFact) else UNKNOWN


def _with(mode: InferenceMode, container: Any, value: Fact) -> Fact:
    """The container with one more tensor in it."""
    if isinstance(container, ListFact):
        return ListFact(join(mode, container.elements, value))
    container.add(value)
    return container  # type: ignore[no-any-return]


def _fact_of_joined_elements(mode: InferenceMode, target: Any, args: tuple, kwargs: dict[str, Any]) -> Fact:
    """`cat` and `stack` of a list of unknown length: the result of one element joined with that of two."""
    known = _read(args[0])
    if not isinstance(known, TensorFact):
        return known
    short, long = (compute_fact(mode, target, ([known] * n, *args[1:]), kwargs) for n in (1, 2))
    return join(mode, short, long)


def _host_fact(mode: InferenceMode, target: Any, args: tuple, unknown: bool) -> Fact:
    """A number or string where it is known, a symbol for an unknown number."""
    if target is make_tuple:
        return TupleFact(tuple(v if isinstance(v, Fact) else ScalarFact.of(v) for v in args))
    if target in CONSTRUCTORS:
        return Elements(mode, args if target is make_list else args[1])
    if args and isinstance(args[0], (Elements, ListFact)):
        found = _fact_of_elements(mode, op_name(target), args)
        if found is not UNKNOWN:
            return found
        unknown = True
    if args and isinstance(args[0], TupleFact) and op_name(target) in TAKES and isinstance(args[1], int):
        return args[0].parts[args[1]]
    function = meaning(target)
    assert function is not None
    # torch's own operator would take a symbol for the number of the example, and pin it.
    unknown = unknown or (function is target and any(map(_is_symbol, _leaves(args))))
    result = None
    if not unknown and op_name(target) not in ASKS_FOR_NONE:
        try:
            with torch.no_grad(), mode:
                result = function(*(_mapped(a, mode.fake) for a in args))
        except Exception:  # what symbols do not support; an error of the model's own comes when it runs
            result = None
    if isinstance(result, (list, dict)):
        return UNKNOWN
    returns = getattr(schema_or(target, None), "returns", ())
    return mode.unknown_number(str(returns[0].type)) if result is None and returns else mode.fact_of(result)


def _is_symbol(value: Any) -> bool:
    return isinstance(value, SYMBOLS) or (isinstance(value, ScalarFact) and not value.is_known)


def copy_keeps_layout(mode: InferenceMode, value: fx.Node) -> bool:
    """A copy of the value has the layout of the value; expanded values, and those with gaps, do not keep theirs."""
    known, copied = fact(value), compute_fact(mode, torch.ops.aten.clone.default, (value,), {})
    return isinstance(known, TensorFact) and isinstance(copied, TensorFact) and bool(same_layout(known, copied))


def axis_order(node: fx.Node) -> list[int] | None:
    """Which axis of its operand each axis of the result is, for an op that only moves axes; None when it is not known."""
    operand, *arguments = bound_arguments(node).values()
    known = rank(operand)
    if known is None or any(nodes_in(arguments)):
        return None
    probe = torch.empty(()).expand(list(range(known)))  # a different size for each axis
    return list(node.target(probe, *arguments).shape)  # type: ignore[operator]
