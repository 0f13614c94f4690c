"""Rules: an equation as three plain functions.

    match(op, x, w, ...)    the left side, written with `op.<name>(...)`; `...` stands for arguments that do not matter
    requires                named one-sentence functions; their docstring is the reason printed on refusal
    replace(op, x, w, ...)  the right side, built with the same `op.<name>(...)`
    when                    like `requires`, but part of the left side: where it does not hold the rule does not fit, and no
                            refusal is reported (most products do not have the factor one)

Parameters of `match` are the unknowns; their annotation says what they may be:

    Value           a tensor known only at run time (or a constant: it does not matter)
    Tensor          a constant, known now, passed to `requires` and `replace` as a `torch.Tensor`; where the graph has a
                    runtime value, the rule is refused, and the reason says so
    Known           a constant too, but where the graph has a runtime value the rule does not fit at all
    list[Value]     a list of values of any length, the operands of a variadic op
    int, float, bool, str, list, torch.dtype        a plain argument of that type (an int is a float too)
    A | B           either; `| None` makes an operand optional

The left side may also say

    op.one_of(a, b)     alternatives; what only the others name is None
    op.each(a)          a list, every element of which fits `a`; what `a` names becomes a list
    [a, b]              a list of just these
    op.conv, op.activation, ...     one of a family of ops (`FAMILIES`)
    op.getitem(a, i)    part `i` of an op that gives several

`takes_runtime_numbers`: the rule is also right where plain arguments of its ops are runtime numbers (a size, an `item()`). Any
other rule is refused there.

Sums and products fit in either order (`COMMUTATIVE`). `requires`, `when` and `replace` get what they need by parameter
name: unknowns, named ops (`name="conv"`), and `op`. A requirement answers True, False, or None for "unknown", which refuses
too.
`replace` may give None after `op.decline("why")`.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ir_tools.deprecation import warn_renamed
from ir_tools.errors import OptionError
from ir_tools.ir import alias_analysis, facts, shape_inference
from ir_tools.ir.dialect import (
    ACTIVATIONS,
    AXIS_MOVES,
    CONVOLUTIONS,
    RESHAPINGS,
    TRANSPOSED_CONVOLUTIONS,
    argument,
    aten,
    getitem,
    short_name,
)
from ir_tools.ir.provenance import location, record
from ir_tools.torch_compat.operators import OpOverload

Requirement = Callable[..., "bool | None"]

FAMILIES: dict[str, frozenset[OpOverload]] = {
    "conv": CONVOLUTIONS,
    "conv_transpose": TRANSPOSED_CONVOLUTIONS,
    "layer": CONVOLUTIONS | TRANSPOSED_CONVOLUTIONS | {aten.linear.default},
    "activation": frozenset(op for op, _ in ACTIVATIONS.values()),
    "permutation": AXIS_MOVES,
    "reshaping": RESHAPINGS,
}
"""Names that stand for several ops in a pattern; every other name stands for all overloads of that op."""

PARTS: frozenset[Any] = frozenset({getitem})

COMMUTATIVE = frozenset({aten.add.Tensor, aten.mul.Tensor, aten.maximum.default, aten.minimum.default})
"""Ops whose first two arguments a pattern may meet in either order (of `add`, where alpha is 1): the result is the same."""


class Known:
    """In the signature of a `match`: a constant. What is known at run time only does not fit."""


class Value:
    """A value of the graph as rules see it: its facts, each None when unknown."""

    def __init__(self, node: fx.Node):
        self._node = node

    @property
    def shape(self) -> tuple[Any, ...] | None:
        """Ints, and expressions for sizes that are dynamic; equal expressions have equal values."""
        return facts.shape(self._node)

    @property
    def example_shape(self) -> tuple[int, ...] | None:
        """The sizes, those of the example where they are dynamic: a hint, not a fact."""
        return facts.example_shape(self._node)

    @property
    def example_strides(self) -> tuple[int, ...] | None:
        """The strides, those of the example where they are dynamic."""
        return facts.example_strides(self._node)

    @property
    def rank(self) -> int | None:
        return facts.rank(self._node)

    @property
    def dtype(self) -> torch.dtype | None:
        return facts.dtype(self._node)

    @property
    def device(self) -> torch.device | None:
        return facts.device(self._node)

    @property
    def memory_format(self) -> torch.memory_format | None:
        """The memory format in which the value is contiguous; None for other layouts, and where it is unknown."""
        return facts.memory_format(self._node)

    @property
    def is_constant(self) -> bool:
        """Known now: an entry of the Block's table."""
        return self._node.op == "get_attr"

    def lies_like(self, other: Value) -> bool | None:
        """The two have the same memory layout: the same strides, or both contiguous."""
        one, two = facts.tensor(self._node), facts.tensor(other._node)
        return None if one is None or two is None else facts.same_layout(one, two)

    def dies_at(self, user: Value) -> bool:
        """`user` is the last user of this value, whose memory is the graph's own and shared with no other value.

        Its elements may still share memory among themselves (an expanded value): make it contiguous before writing.
        """
        return alias_analysis.dies_at(self._node, user._node)

    def made_by(self, name: str) -> bool:
        """A pass of this name made the value, or what it was made from."""
        return name in record(self._node).passes

    @property
    def location(self) -> str:
        """The module path, or the node's name."""
        return location(self._node)

    @property
    def place(self) -> str:
        """The old name of `location`."""
        warn_renamed("place of a value", "location")
        return self.location

    def __repr__(self) -> str:
        return f"{short_name(self._node.target)} {self.location}" if self._node.op == "call_function" else self._node.name


class Call(Value):
    """A value made by an op; the op's arguments are attributes by their schema names (`conv.groups`, `bn.eps`)."""

    @property
    def target(self) -> Any:
        return self._node.target

    @property
    def axis_order(self) -> list[int] | None:
        """Of an op that moves axes (`op.permutation`): which axis of the operand each axis of the result is."""
        return shape_inference.axis_order(self._node)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return wrap(argument(self._node, name))


def wrap(value: Any) -> Any:
    """A node as a `Value`; lists element by element; literals as they are."""
    if isinstance(value, fx.Node):
        return Call(value) if value.op == "call_function" else Value(value)
    return [wrap(v) for v in value] if isinstance(value, (list, tuple)) else value


def unwrap(value: Any) -> Any:
    if isinstance(value, Value):
        return value._node
    return [unwrap(v) for v in value] if isinstance(value, (list, tuple)) else value


# -- the left side as data ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unknown:
    """A parameter of `match`, and the types that its annotation names."""

    name: str
    types: tuple[Any, ...]
    optional: bool = False

    @property
    def variadic(self) -> bool:
        return list[Value] in self.types

    def takes_literal(self, value: Any) -> bool:
        plain = tuple(t for t in self.types if isinstance(t, type) and t not in (Value, Tensor, Known))
        if isinstance(value, bool):
            return bool in plain
        return isinstance(value, plain) or (isinstance(value, int) and float in plain)


class Pattern:
    """A part of the left side."""

    def inner(self) -> list[OpPattern]:
        """The ops of this part, outermost first; of alternatives, those of all."""
        raise NotImplementedError

    def __str__(self) -> str:
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class OpPattern(Pattern):
    """An op of the left side: any of `targets`, with sub-patterns as arguments; `rest` when `...` closed the list."""

    called: str
    targets: frozenset[OpOverload]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rest: bool
    name: str | None

    @property
    def parts(self) -> list[Any]:
        return [*self.args, *self.kwargs.values()]

    def inner(self) -> list[OpPattern]:
        return [self, *_ops_in(self.parts)]

    def __str__(self) -> str:
        return self.called


@dataclass(frozen=True, eq=False)
class OneOf(Pattern):
    """Alternatives, tried in order."""

    options: tuple[Any, ...]

    def inner(self) -> list[OpPattern]:
        return _ops_in(self.options)

    def __str__(self) -> str:
        return " or ".join(dict.fromkeys(str(option) for option in self.options if isinstance(option, Pattern)))


@dataclass(frozen=True, eq=False)
class Each(Pattern):
    """A list, every element of which fits `element`."""

    element: Any

    def inner(self) -> list[OpPattern]:
        return _ops_in([self.element])

    def __str__(self) -> str:
        return f"a list of {self.element}"


def _ops_in(parts: Iterable[Any]) -> list[OpPattern]:
    found: list[OpPattern] = []
    for part in parts:
        if isinstance(part, Pattern):
            found += part.inner()
        elif isinstance(part, list):
            found += _ops_in(part)
    return found


class _PatternOps:
    """The `op` that `match` is called with: `op.relu(x)` gives an `OpPattern`."""

    def one_of(self, *options: Any) -> OneOf:
        return OneOf(options)

    def each(self, element: Any) -> Each:
        return Each(element)

    def __getattr__(self, op: str) -> Callable[..., OpPattern]:
        targets = targets_called(op)

        def pattern(*args: Any, name: str | None = None, **kwargs: Any) -> OpPattern:
            rest = bool(args) and args[-1] is ...
            args = args[:-1] if rest else args
            return OpPattern(op, targets, args, kwargs, rest, name)

        return pattern


def targets_called(name: str) -> frozenset[OpOverload]:
    """The overloads that a name in a rule stands for. Raises `AttributeError` for a name that is not an op."""
    if name in FAMILIES:
        return FAMILIES[name]
    if name == "getitem":
        return PARTS
    for namespace in (torch.ops.aten, torch.ops.torch_passes):
        packet = getattr(namespace, name, None)
        if packet is not None:
            return frozenset(getattr(packet, overload) for overload in packet.overloads())
    raise AttributeError(f"there is no op {name!r} in ATen or in the dialect")


@dataclass(frozen=True)
class Rule:
    """One rewrite, as an equation. See the module's docstring.

    >>> def twice(op, x: Value):
    ...     return op.relu(op.relu(x))
    >>> def once(op, x):
    ...     return op.relu(x)
    >>> Rule("relu(relu(x)) -> relu(x)", match=twice, replace=once).slug
    'twice'
    """

    name: str
    match: Callable[..., Any]
    replace: Callable[..., Any]
    requires: Sequence[Requirement] = ()
    when: Sequence[Requirement] = ()
    takes_runtime_numbers: bool = False
    takes_run_numbers: InitVar[bool | None] = None
    pattern: Pattern = field(init=False, compare=False, repr=False)
    unknowns: dict[str, Unknown] = field(init=False, compare=False, repr=False)

    def __post_init__(self, takes_run_numbers: bool | None) -> None:
        if takes_run_numbers is not None:
            if self.takes_runtime_numbers:
                raise OptionError("takes_run_numbers= is the old name of takes_runtime_numbers=; give that alone")
            warn_renamed("takes_run_numbers= of a rule", "takes_runtime_numbers=")
            object.__setattr__(self, "takes_runtime_numbers", takes_run_numbers)
        unknowns = _unknowns(self.match)
        pattern = self.match(_PatternOps(), **unknowns)
        if not isinstance(pattern, (OpPattern, OneOf)) or not all(isinstance(p, OpPattern) for p in _roots(pattern)):
            raise TypeError(f"{self.match.__name__} must return an op, got {type(pattern).__name__}")
        for requirement in (*self.requires, *self.when):
            if not inspect.getdoc(requirement):
                raise TypeError(f"{requirement.__name__} needs a docstring: it is the reason printed on refusal")
        object.__setattr__(self, "unknowns", unknowns)
        object.__setattr__(self, "pattern", pattern)

    @property
    def roots(self) -> frozenset[OpOverload]:
        """The ops at which the rule may fit."""
        return frozenset(target for root in _roots(self.pattern) for target in root.targets)

    @property
    def slug(self) -> str:
        """The name of the match function: short, and stable from run to run."""
        return self.match.__name__


def reason(requirement: Requirement) -> str:
    """The sentence of a requirement: the first line of its docstring."""
    return (inspect.getdoc(requirement) or requirement.__name__).splitlines()[0]


def call_with(function: Callable[..., Any], available: dict[str, Any]) -> Any:
    """Call `function` with the parameters it names."""
    wanted = inspect.signature(function).parameters
    missing = [name for name in wanted if name not in available]
    if missing:
        raise TypeError(f"{function.__name__} asks for {missing[0]!r}; the rule has {', '.join(sorted(available))}")
    return function(**{name: available[name] for name in wanted})


def _unknowns(match: Callable[..., Any]) -> dict[str, Unknown]:
    hints = typing.get_type_hints(match)
    names = list(inspect.signature(match).parameters)[1:]
    return {name: _unknown(name, hints.get(name, Value)) for name in names}


def _unknown(name: str, hint: Any) -> Unknown:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union else (hint,)
    wanted = tuple(option for option in options if option is not type(None))
    for option in wanted:
        if not isinstance(option, type) and option != list[Value]:
            raise TypeError(f"{name}: {option} is no annotation of an unknown; see the docstring of {__name__}")
    return Unknown(name, wanted, optional=len(wanted) < len(options))


def _roots(pattern: Any) -> list[Any]:
    return [root for option in pattern.options for root in _roots(option)] if isinstance(pattern, OneOf) else [pattern]
