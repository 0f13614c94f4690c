"""A kernel provider: kernels for one kind of subgraph, written once, built as nodes by a lowering, run on tensors to be timed.

    pattern      the ops that it looks at, or the left side of a rule         when         a further condition on the last op
    supports     None where its kernels take the subgraph, else why not       workload_key what their speed depends on
    build        the kernel; `variants` where there are several               reference    what they must equal, in ATen
    prepack      ops that prepare constants for the kernels, once, when a file is loaded

`build`, `reference` and every variant are functions `(op, subgraph)`. In a lowering `op` adds nodes; with `OnTensors` the same
function runs at once. A subgraph has its operands as attributes: Values in a lowering, tensors when it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from ir_tools.errors import OptionError
from ir_tools.ir.dialect import short_name
from ir_tools.ir.prepack import check_prepack
from ir_tools.rewrite import Call, Rule, Value
from ir_tools.rewrite.subgraph import arguments_of, subgraph_at
from passes.lower.variants.workload import OnTensors, by, dtype_name, have_example_sizes, line, spread_like

REFERENCE = "plain"
"""The name of the variant that is a provider's reference."""

Builder = Callable[[Any, Any], Any]
Supports = Callable[[Any, "torch.device | None", "tuple[torch.dtype | None, ...]"], "str | None"]


def any_subgraph(subgraph: Any, device: torch.device | None, dtypes: tuple[torch.dtype | None, ...]) -> str | None:
    return None


def whenever(call: Call) -> bool:
    return True


def operands(subgraph: Any) -> Iterator[tuple[str, Any]]:
    """The Values and tensors among the attributes of a subgraph, with their names."""
    for name, value in vars(subgraph).items():
        for part in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(part, (Value, torch.Tensor)):
                yield name, part


def have_known_sizes(subgraph: Any) -> bool:
    """All operands are on the CPU, the example has their sizes, and none is empty. Kernels of other devices are not timed."""
    values = [value for _, value in operands(subgraph) if isinstance(value, Value)]
    on_cpu = all(value.device is not None and value.device.type == "cpu" for value in values)
    return on_cpu and have_example_sizes(*values) and all(0 not in (value.example_shape or ()) for value in values)


def as_example(subgraph: Any) -> Any:
    """The subgraph on tensors of the example's sizes and layouts, whatever their values."""

    def on_tensors(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [on_tensors(part) for part in value]
        return spread_like(value) if isinstance(value, Value) else value

    return type(subgraph)(**{name: on_tensors(value) for name, value in vars(subgraph).items()})


@dataclass(frozen=True, eq=False)
class KernelProvider:
    """Kernels for the subgraphs that it supports. Its functions are plain and keep no state.

    - `name`: what reports and tuning records call it.
    - `pattern`: ops, each with its overload; the subgraph has the op as `target` and its arguments by their schema names. Or
      the left side of a rule, a function `(op, x, w, ...)`, as in `ir_tools.rewrite.rule`; the subgraph has its parameters.
    - `build(op, subgraph)`: the kernel. `variants(subgraph)`: several by name, the default first, in place of `build`.
    - `reference(op, subgraph)`: the same in ATen. Where no other kernel is there, it is what `build` is measured against.
    - `supports(subgraph, device, dtypes)`: None, or a sentence that says why not, for the report. `device` and `dtypes` are
      those of the first operand and of all operands; None where unknown.
    - `when(call)`: where it does not hold, the provider does not look at the op, and nothing is reported.
    - `prepack`: pure ops on constants that `build` calls; emission runs them when the file is loaded. Operands may
      be made by other prepack ops; a kernel that gives one what is known at run time only is refused.
    - `subgraph(call)`: another view of the op; None for one that is left alone, without a report.
    - `exact`: the kernels give the same bits as the reference.

    >>> def scaled(op, s):
    ...     return op.call(torch.ops.aten.mul.Tensor, s.self, 2.0)
    >>> def doubled(op, s):
    ...     return op.call(torch.ops.aten.add.Tensor, s.self, s.self)
    >>> KernelProvider("doubling", [torch.ops.aten.mul.Tensor], build=doubled, reference=scaled).name
    'doubling'
    """

    name: str
    pattern: Collection[Any] | Callable[..., Any]
    reference: Builder
    build: Builder | None = None
    supports: Supports = any_subgraph
    when: Callable[[Call], bool] = whenever
    prepack: Collection[Any] = ()
    variants: Callable[[Any], Mapping[str, Builder]] | None = None
    subgraph: Callable[[Call], Any] = arguments_of
    workload_key: Callable[[Any], str] | None = None
    can_be_timed: Callable[[Any], bool] = have_known_sizes
    on_tensors: Callable[[Any], Any] = as_example
    exact: bool = False
    ops: frozenset[Any] = field(init=False, repr=False, compare=False)
    rule: Rule | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if (self.build is None) == (self.variants is None):
            raise OptionError(f"the kernel provider {self.name!r} needs either build= or variants=")
        if self.name == REFERENCE:
            raise OptionError(f"{REFERENCE!r} is what records call the reference of a kernel provider; give it another name")
        rule = Rule(self.name, match=self.pattern, replace=self.reference) if callable(self.pattern) else None
        object.__setattr__(self, "rule", rule)
        object.__setattr__(self, "ops", rule.roots if rule is not None else frozenset(self.pattern))  # type: ignore[arg-type]
        for op in self.prepack:
            check_prepack(op)

    @property
    def takes_several_ops(self) -> bool:
        """The pattern is of more than one op."""
        return self.rule is not None and len(self.rule.pattern.inner()) > 1

    def subgraph_at(self, op: Any, call: Call) -> tuple[Any, str]:
        """The subgraph that ends in `call`. None where the pattern does not fit, with a reason where it nearly does."""
        return (self.subgraph(call), "") if self.rule is None else subgraph_at(op, self.rule, call)

    def variants_of(self, subgraph: Any) -> Mapping[str, Builder]:
        """The variants by name, the default first."""
        if self.variants is not None:
            return self.variants(subgraph)
        assert self.build is not None
        return {self.name: self.build}

    def key_of(self, subgraph: Any) -> str:
        """The workload key, in one line."""
        return (self.workload_key or partial(default_key, self.name))(subgraph)

    def timed_variants(self, subgraph: Any) -> dict[str, Callable[[], Any]]:
        """The variants as calls on tensors of the example's sizes, whatever their values."""
        return self.timed(subgraph, self.variants_of(subgraph))

    def timed(self, subgraph: Any, variants: Mapping[str, Builder]) -> dict[str, Callable[[], Any]]:
        """These variants as calls on tensors; they share the tensors, and what is prepacked."""
        op, tensors = OnTensors(self.prepack), self.on_tensors(subgraph)
        ops = {name: op if self.prepack_of(variant) else OnTensors() for name, variant in variants.items()}
        return {name: partial(variant, ops[name], tensors) for name, variant in variants.items()}

    def prepack_of(self, builder: Builder) -> Collection[Any]:
        """The prepack ops of one of the kernels. The reference has none: it may use the same op in every call."""
        return () if builder is self.reference else self.prepack


def default_key(name: str, subgraph: Any) -> str:
    """The op, and sizes and strides of all operands; other arguments as they are.

    `small linear, linear, input float32 2x8 at 8x1, weight float32 4x8 at 8x1, bias None, 1 threads`
    """
    parts = []
    for argument, value in vars(subgraph).items():
        if isinstance(value, Value):
            parts.append(f"{argument} {dtype_name(value)} {by(value.example_shape)} at {by(value.example_strides)}")
        elif isinstance(value, torch.Tensor):
            parts.append(f"{argument} {dtype_name(value)} {by(value.shape)} at {by(value.stride())}")
        elif isinstance(value, (list, tuple)) and any(isinstance(part, (Value, torch.Tensor)) for part in value):
            parts.append(default_key(argument, SimpleNamespace(**{str(i): part for i, part in enumerate(value)})))
        else:
            parts.append(short_name(value) if argument == "target" else f"{argument} {value}")
    return line(name, *parts)
