"""Facts about values: shape and dtype (as fake tensors), and which values share storage.

Facts are three-valued: a question about a value without a fact is answered None, "unknown", and a rule that needs the
answer refuses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from networkx.utils import UnionFind
from torch import fx

from ir_tools.errors import PassesError
from ir_tools.ir.dialect import (
    PLAIN_TYPES,
    acts,
    aliased_nodes,
    bound_arguments,
    changed_containers,
    getitem,
    has_effect,
    is_random,
    map_argument,
    nodes_in,
    op_name,
    overload_name,
    written_nodes,
)
from ir_tools.ir.host import CONSTRUCTORS, TENSOR, is_container_type, is_host, make_list, make_tuple, meaning, value_type
from ir_tools.ir.regions import NOBODY, Effects, Outside, bodies, inputs_of, is_region, region_loop
from ir_tools.torch_compat.dispatch import python_kernels, without_modes
from ir_tools.torch_compat.fake import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from ir_tools.torch_compat.operators import schema_or
from ir_tools.torch_compat.symbols import (
    GuardOnDataDependentSymNode,
    ShapeEnv,
    backed_size_oblivious,
    declare_size,
    value_for_all,
)
from ir_tools.torch_compat.tensors import likely_memory_format


class FactError(PassesError, RuntimeError):
    """An op rejects the shapes or dtypes of its arguments."""


def new_mode() -> FakeTensorMode:
    """A mode in which sizes may be symbols: those declared dynamic, and those that depend on data."""
    env = ShapeEnv(allow_scalar_outputs=True, allow_dynamic_output_shape_ops=True)
    return FakeTensorMode(allow_non_fake_inputs=False, shape_env=env)


def fact(value: Any) -> Any:
    """The fake tensor (or tuple/list of them) of a node, None when unknown; anything else stands for itself."""
    return value.meta.get("val") if isinstance(value, fx.Node) else value


def set_fact(node: fx.Node, value: Any) -> None:
    node.meta["val"] = value


def is_unknown(value: fx.Node) -> bool:
    """A tensor of which nothing is known."""
    return value_type(value) == TENSOR and not isinstance(fact(value), (torch.Tensor, tuple, list))


def shape(value: Any) -> tuple[Any, ...] | None:
    """The sizes of a tensor: ints, and sympy expressions for those that are symbols.

    Expressions are compared by their form: equal ones have equal values whatever the symbols stand for.
    """
    known = fact(value)
    return tuple(map(size, known.shape)) if isinstance(known, torch.Tensor) else None


def size(value: Any) -> Any:
    """An int, or the expression of a symbolic one."""
    if not isinstance(value, torch.SymInt):
        return value
    expression = value.node.expr
    return int(expression) if expression.is_number else expression


def example_shape(value: Any) -> tuple[int, ...] | None:
    """The sizes of a tensor, those of the example where they are dynamic; None when one is unknown."""
    known = fact(value)
    return _of_example(known.shape) if isinstance(known, torch.Tensor) else None


def example_strides(value: Any) -> tuple[int, ...] | None:
    """The strides of a tensor, those of the example where they are dynamic; None when one is unknown."""
    known = fact(value)
    return _of_example(known.stride()) if isinstance(known, torch.Tensor) else None


def _of_example(sizes: Iterable[Any]) -> tuple[int, ...] | None:
    numbers: list[Any] = [s if isinstance(s, int) else s.node.hint if s.node.has_hint() else None for s in sizes]
    return None if None in numbers else tuple(numbers)


def rank(value: Any) -> int | None:
    known = fact(value)
    return known.dim() if isinstance(known, torch.Tensor) else None


def dtype(value: Any) -> torch.dtype | None:
    known = fact(value)
    return known.dtype if isinstance(known, torch.Tensor) else None


def device(value: Any) -> torch.device | None:
    known = fact(value)
    return known.device if isinstance(known, torch.Tensor) else None


# Ops without a fake kernel in torch: the position of the argument that has the shape and dtype of the result.
SAME_FACT_AS = {
    "mkldnn::_convolution_pointwise.binary": 1,
    "mkldnn::_convolution_pointwise_.binary": 0,
    "mkldnn::_linear_pointwise.binary": 1,
}


def _packed_sequence(mode: FakeTensorMode, values: torch.Tensor, lengths: torch.Tensor, batch_first: bool) -> Any:
    """As many rows as the lengths add up to, and how many sequences each step has."""
    rows, steps = (_unknown_size(mode, set()) for _ in range(2))
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
"""What lies in memory otherwise than torch 2.13's fake kernels say. Layouts decide which kernel the next op takes."""


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
    symbolic = any(isinstance(v, SYMBOLS) or _has_symbols(v) for v in _leaves((fake_args, fake_kwargs)))
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


TELLS_NONE = frozenset({"aten::__is__", "aten::__isnot__"})
"""Of what may be None, a fact says what it is where it is a tensor: these ops ask whether it is."""
SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


class Elements:
    """The fact of a list or dict: what is true of every tensor in it. Values that are the same container share it.

    `widened` counts how often a container that had been read turned out to hold more kinds of tensors than known then: a loop
    in which that happens is walked again, because what was read had too narrow a fact.
    """

    widened = 0

    def __init__(self, mode: FakeTensorMode, values: Iterable[Any]):
        self.mode = mode
        self.known: Any = NOTHING
        self.was_read = False
        self.free: set[Any] = set()
        for value in values:
            self.add(value)

    def add(self, value: Any) -> None:
        wider = join(self.mode, self.known, value, self.free)
        if wider is not self.known:
            self.known = wider
            Elements.widened += self.was_read

    def read(self) -> Any:
        self.was_read = True
        return self.known

    def __repr__(self) -> str:
        return f"elements {self.known}"


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
    """`cat` and `stack` of a list of unknown length: what is true of one element is told from two by what grows."""
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
    if not unknown and op_name(target) not in TELLS_NONE:
        try:
            with torch.no_grad(), mode:
                result = function(*args)
        except Exception:  # what symbols do not support; an error of the model's own comes when it runs
            result = None
    if isinstance(result, (list, dict)):
        return None
    returns = getattr(schema_or(target, None), "returns", ())
    return unknown_number(mode, str(returns[0].type)) if result is None and returns else result


def unknown_number(mode: FakeTensorMode, annotation: str) -> Any:
    """A fresh symbol for a number of that TorchScript type, None for anything else."""
    env = mode.shape_env
    assert env is not None
    if annotation == "int":
        return env.create_unbacked_symint()
    if annotation == "float":
        return env.create_unbacked_symfloat()
    return env.create_unbacked_symbool() if annotation == "bool" else None


class _Nothing:
    """The fact of a value that is no tensor yet (a None that a loop starts from), and of whatever is computed from it."""

    def __repr__(self) -> str:
        return "nothing"


NOTHING = _Nothing()


def join(mode: FakeTensorMode, one: Any, other: Any, free: set[Any] | None = None) -> Any:
    """What is true of a tensor that is one or the other: sizes that differ become symbols; None when too little is.

    Where one is not contiguous, neither is the result. Gives `one` itself when that is true of both. The new symbols are put
    into `free`; a size of `one` that is in it already stands for any.
    """
    free = set() if free is None else free
    if one is NOTHING or other is NOTHING:
        return other if one is NOTHING else one
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return None
    if (one.dim(), one.dtype, one.device, one.layout) != (other.dim(), other.dtype, other.device, other.layout):
        return None
    differ = [size(a) not in free and size(a) != size(b) for a, b in zip(one.shape, other.shape, strict=True)]
    if not any(differ):
        return one if same_layout(one, other) or not _is_contiguous(one) else _like(mode, one, one.shape, False)
    sizes = [_unknown_size(mode, free) if new else a for a, new in zip(one.shape, differ, strict=True)]
    return _like(mode, one, sizes, _is_contiguous(one) and _is_contiguous(other))


def fresh(mode: FakeTensorMode, known: Any, free: set[Any]) -> Any:
    """`known` with a new symbol for each size that is in `free`."""
    if not isinstance(known, torch.Tensor) or not any(size(s) in free for s in known.shape):
        return known
    sizes = [_unknown_size(mode, set()) if size(s) in free else s for s in known.shape]
    return _like(mode, known, sizes, _is_contiguous(known))


def _like(mode: FakeTensorMode, known: torch.Tensor, sizes: Sequence[Any], contiguous: bool) -> torch.Tensor:
    with mode:
        if contiguous or known.dim() < 2:
            return torch.empty(list(sizes), dtype=known.dtype, device=known.device)
        axes = list(range(known.dim()))[::-1]
        return torch.empty(list(sizes)[::-1], dtype=known.dtype, device=known.device).permute(axes)


def _is_contiguous(known: torch.Tensor) -> bool:
    try:
        return known.is_contiguous()
    except GuardOnDataDependentSymNode:
        return False


def same_layout(one: torch.Tensor, other: torch.Tensor) -> bool:
    """The same strides; or both contiguous, and where axes of one element make that ambiguous, for the same memory format."""
    if tuple(map(size, one.stride())) == tuple(map(size, other.stride())):
        return True
    if not _is_contiguous(one) or not _is_contiguous(other):
        return False
    # Kernels are chosen by the strides of such axes too.
    return _has_symbols(one) or _has_symbols(other) or likely_memory_format(one) == likely_memory_format(other)


def memory_format(value: Any) -> torch.memory_format | None:
    """The memory format that a tensor is contiguous in, if any."""
    known = fact(value)
    if not isinstance(known, torch.Tensor) or _has_symbols(known):
        return None
    ranks = {4: torch.channels_last, 5: torch.channels_last_3d}
    formats = [torch.contiguous_format, *([ranks[known.dim()]] if known.dim() in ranks else [])]
    return next((f for f in formats if known.is_contiguous(memory_format=f)), None)


def copy_keeps_layout(mode: FakeTensorMode, value: fx.Node) -> bool:
    """A copy of the value lies in memory as the value does: not so for expanded ones, and those with gaps."""
    copied = compute_fact(mode, torch.ops.aten.clone.default, (value,), {})
    return isinstance(copied, torch.Tensor) and same_layout(fact(value), copied)


def _unknown_size(mode: FakeTensorMode, free: set[Any]) -> Any:
    symbol = unknown_number(mode, "int")
    declare_size(symbol)
    free.add(size(symbol))
    return symbol


def holds_always(value: Any) -> bool | None:
    """What a (symbolic) condition is for all values of its symbols; None when it depends on them."""
    if not isinstance(value, torch.SymBool):
        return bool(value) if isinstance(value, (bool, int, float)) else None
    known = value_for_all(value)
    return None if known is None else bool(known)


@contextmanager
def _for_symbols() -> Iterator[None]:
    """Ops that decide on sizes in C++ let their twins in Python do so.

    No guard tells which library will convolve, nor (`backed_size_oblivious`) whether a size is 1 where that only saves work.
    """
    oblivious = backed_size_oblivious()
    no_library = torch.backends.mkldnn.flags(enabled=False), torch.backends.nnpack.flags(enabled=False)
    with python_kernels(), no_library[0], no_library[1], oblivious:
        yield


def _has_symbols(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not all(isinstance(s, int) for s in value.shape)


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


def storage_classes(nodes: Iterable[fx.Node]) -> UnionFind:
    """Values grouped by "may share storage", with the names of constants whose memory they may have."""
    classes = UnionFind()
    for node in nodes:
        classes[node]
        for other in aliased_nodes(node):
            classes.union(node, other)
        for name in constants_seen(node, "escaping_constants"):
            classes.union(node, name)
    return classes


def axis_order(node: fx.Node) -> list[int] | None:
    """Which axis of its operand each axis of the result is, for an op that only moves axes; None when it is not known."""
    operand, *arguments = bound_arguments(node).values()
    known = rank(operand)
    if known is None or any(nodes_in(arguments)):
        return None
    telling = torch.empty(()).expand(list(range(known)))  # a size of its own for each axis
    return list(node.target(telling, *arguments).shape)  # type: ignore[operator]


def constants_seen(node: fx.Node, which: str) -> frozenset[str]:
    """Names of constants: the one that a `get_attr` reads, those that a region's effects name under `which`."""
    if node.op == "get_attr":
        return frozenset({str(node.target)})
    if not is_region(node):
        return frozenset()
    return frozenset().union(*(getattr(body.effects, which) for body in bodies(node)))


class Memory:
    """Which values of a graph share storage, and which of that storage is written into, here or by `outside`.

    `written`, `changed`: the classes (roots in `classes`) of tensors written into, and of containers changed.
    """

    def __init__(self, graph: fx.Graph, outside: Outside = NOBODY):
        self.classes = storage_classes(graph.nodes)
        inputs = graph.find_nodes(op="placeholder")
        results: list[Any] = [v for n in graph.find_nodes(op="output") for v in n.args[0]]
        for placeholder, result in zip(inputs[1 : 1 + outside.carried], results[1:]):
            if isinstance(result, fx.Node):
                self.classes.union(placeholder, result)
        self.written = {self.classes[n] for n in _numbered(inputs, results, outside.written)}
        self.changed = {self.classes[n] for n in _numbered(inputs, results, outside.changed)}
        for node in graph.nodes:
            self.written |= {self.classes[n] for n in written_nodes(node)}
            self.changed |= {self.classes[n] for n in changed_containers(node)}
            if is_region(node):
                self.written |= {self.classes[name] for name in constants_seen(node, "written_constants")}

    def is_written(self, value: Any) -> bool:
        return self.classes[value] in self.written

    def is_changed(self, node: fx.Node) -> bool:
        return is_container_type(value_type(node)) and self.classes[node] in self.changed

    def reachable(self, graph: fx.Graph) -> frozenset[fx.Node]:
        """The values that can be reached when the graph is over: its results, and what it put into containers given to it."""
        held = [n for n in graph.find_nodes(op="placeholder") if self.is_changed(n)]
        roots = {self.classes[n] for output in graph.find_nodes(op="output") for n in (*nodes_in(output.args), *held)}
        return frozenset(n for n in graph.nodes if self.classes[n] in roots)

    def written_constants(self, graph: fx.Graph) -> frozenset[str]:
        """Names of the constants that are written into, by whatever name or way they are reached."""
        names: set[str] = set()
        for node in graph.nodes:
            names |= constants_seen(node, "written_constants") | constants_seen(node, "escaping_constants")
        return frozenset(name for name in names if self.is_written(name))


def _numbered(inputs: Sequence[fx.Node], results: Sequence[Any], numbers: frozenset[tuple[str, int]]) -> list[fx.Node]:
    given = {"input": inputs, "result": results}
    return [value for kind, i in numbers if isinstance(value := given[kind][i], fx.Node)]


def mutated_values(graph: fx.Graph, outside: Outside = NOBODY) -> frozenset[fx.Node]:
    """Every value that some node of the graph, or `outside` of it, may change: passes leave these alone."""
    if outside is NOBODY and not any(n.op == "call_function" and _writes(n) for n in graph.nodes):
        return frozenset()
    memory = Memory(graph, outside)
    return frozenset(n for n in graph.nodes if memory.is_written(n) or memory.is_changed(n))


def _writes(node: fx.Node) -> bool:
    return bool(written_nodes(node) or changed_containers(node) or constants_seen(node, "written_constants"))


def outside_of(node: fx.Node, memory: Memory) -> Outside:
    """Who else writes into what the bodies of the region `node` are given, and give; `memory` is that of the graph around."""
    first = 1 if node.target is region_loop else 0  # a loop's result number 0 says whether it goes on
    reached: list[tuple[str, Any, fx.Node]] = []
    reached += [("input", i, n) for i, given in enumerate(inputs_of(node)) for n in nodes_in(given)]
    reached += [("result", first + user.args[1], user) for user in node.users if user.target is getitem]  # type: ignore[operator]
    carried = len(node.args[3]) if node.target is region_loop else 0  # type: ignore[arg-type]
    return Outside(
        written=frozenset((kind, i) for kind, i, n in reached if memory.is_written(n) and holds_memory(n)),
        changed=frozenset((kind, i) for kind, i, n in reached if memory.is_changed(n)),
        carried=carried,
    )


def effects_of(graph: fx.Graph, carried: int = 0) -> Effects:
    """What a body does to its inputs and to constants. A loop hands its last `carried` results to its next round."""
    memory = Memory(graph, Outside(carried=carried))
    placeholders = graph.find_nodes(op="placeholder")
    calls = [n for n in graph.nodes if n.op == "call_function"]
    changed = frozenset(i for i, p in enumerate(placeholders) if memory.is_changed(p))
    reachable = memory.reachable(graph)
    names = {name for n in reachable for name in constants_seen(n, "escaping_constants")}
    written_names = memory.written_constants(graph)
    return Effects(
        written=frozenset(i for i, p in enumerate(placeholders) if memory.is_written(p)),
        changed=changed,
        escaping=frozenset(i for i, p in enumerate(placeholders) if p in reachable and holds_memory(p)),
        written_constants=written_names,
        escaping_constants=frozenset(names),
        acts=bool(written_names) or any(acts(n) for n in calls),
        random=any(is_random(n) for n in calls),
    )


def holds_memory(value: fx.Node) -> bool:
    """The value is a tensor or may hold one; numbers and strings share nothing."""
    return value_type(value) not in PLAIN_TYPES


def dies_at(node: fx.Node, reader: fx.Node) -> bool:
    """`reader` reads `node` once and last, and no other value that is read from here on shares its memory."""
    if sum(n is node for n in nodes_in([*reader.args, *reader.kwargs.values()])) != 1:
        return False
    last = reader
    while node.op == "call_function" and not constants_seen(node, "escaping_constants"):
        if any(user is not last and (user > last or node in aliased_nodes(user)) for user in node.users):
            return False
        sources = aliased_nodes(node)
        if not sources:
            return True
        if len(sources) > 1:
            return False
        # The memory is that of an earlier value (written in place, or viewed): that one must be dead by now too.
        last, node = node, sources[0]
    return False


def sharing(node: fx.Node) -> set[fx.Node]:
    """`node` and the values that may share storage with it, found from here: no other part of the graph is looked at."""
    found, waiting = {node}, [node]
    while waiting:
        here = waiting.pop()
        for other in (*aliased_nodes(here), *(reader for reader in here.users if here in aliased_nodes(reader))):
            if other not in found:
                found.add(other)
                waiting.append(other)
    return found


def derived(node: fx.Node) -> set[fx.Node]:
    """`node` and the values that may get its memory from it: views of it, what holds it, and views of these."""
    found, waiting = {node}, [node]
    while waiting:
        here = waiting.pop()
        for reader in here.users:
            if here in aliased_nodes(reader):
                new = {reader, *changed_containers(reader)} - found
                found |= new
                waiting += new
    return found


def is_handed_out(values: Iterable[fx.Node]) -> bool:
    """Who runs the graph gets one of `values`: as an output, or in a list of his own."""
    return any(
        any(reader.op == "output" for reader in value.users)
        or (value.op == "placeholder" and is_container_type(value_type(value)))
        for value in values
    )


def is_own(values: Iterable[fx.Node]) -> bool:
    """None of `values` is an input or a constant, nor what a region may have taken from the table."""
    return all(value.op == "call_function" and not constants_seen(value, "escaping_constants") for value in values)


def can_stand_for(new: fx.Node, old: fx.Node) -> bool:
    """Where `new` is read in place of `old`, no two outputs share memory that did not, and no output that of an input.

    That nobody writes into either is another question.
    """
    if not aliased_nodes(new) and new.op == "call_function" and not new.users:
        return True
    group = sharing(new)
    if old in group or not is_handed_out(derived(old)):
        return True
    return is_own(group) and not is_handed_out(group)


def live_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that the outputs, or an effect, need."""
    live: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node in live or has_effect(node):
            live.add(node)
            live.update(node.all_input_nodes)
    return live
