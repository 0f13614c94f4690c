"""The lowering pass of a target, made from its kernel providers.

    op, supported by providers     ->  the fastest of their variants; the first where none is faster by a tenth, twice
    op, supported by none          ->  what it is decomposed into, or left alone; the report says why, provider by provider

Variants are measured on tensors of the example's sizes, at most two seconds in all, and recorded by workload; `records` replays
the records of an earlier run. `variant=fused` takes the first variant everywhere and measures nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from ir_tools.errors import OptionError
from ir_tools.ir import Block, FactError
from ir_tools.rewrite import Call, Pass, RewriteLog, replace_by_table, table_pass
from ir_tools.rewrite.numeric_effects import NumericEffect, numeric_effects
from ir_tools.rewrite.shapes import TableEntry
from ir_tools.rewrite.subgraph import prepacked_by, why_not_in_place_of
from passes.lower.kernel_provider import REFERENCE, Builder, KernelProvider, operands
from passes.lower.target import Target
from passes.tune.tuning_record import TuningRecords

LAYOUT_IS_SEEN = "the graph writes in place or draws at random, and the layout of the result cannot be put back"


def lowering_pass(target: Target, doc: str | None = None, renamed: Mapping[str, str] | None = None) -> Pass:
    """The pass that lowers to `target`, called `target.lowering`. Where the target has no providers it has no options.

    `doc`: its docstring, by default a table of the providers. `renamed`: old names of options, which users may still give.
    """
    doc = doc or description(target)
    if not target.providers:
        return replace(table_pass(target.lowering, target.decompositions, effects=(), doc=doc), target=target)

    def lower(
        program: Block,
        log: RewriteLog,
        tuning: TuningRecords,
        *,
        variant: Literal["measured", "fused"] = "measured",
        records: str | None = None,
    ) -> tuple[Block, TuningRecords | None]:
        given = records or tuning.source
        if given and variant == "fused":
            name = target.lowering
            raise OptionError(f"{name}: variant=fused replays nothing; leave out records={given}, or variant=fused")
        if records is not None:
            tuning.replay(records)
        measured = tuning if variant == "measured" else None
        for name, table in Lowering(target, measured, program.layout_is_observable).tables.items():
            program = replace_by_table(program, table, name, log)
        return program, measured

    effects: Iterable[NumericEffect] = () if target.exact else {"rounds"}
    return Pass(target.lowering, lower, numeric_effects(effects), doc, renamed=renamed or {}, target=target)


def description(target: Target) -> str:
    """The docstring of a lowering: which providers look at which ops."""
    names = {provider.name: ", ".join(sorted(str(op) for op in provider.ops)) for provider in target.providers}
    rows = [f"    {ops}  ->  {name}\n" for name, ops in names.items()]
    return f"Lower to the kernels of {target.name!r}.\n\n{''.join(rows)}    everything else  ->  as in lower_aten\n"


@dataclass(frozen=True, eq=False)
class Candidate:
    """A provider that supports the subgraph which it sees in an op."""

    provider: KernelProvider
    subgraph: Any


@dataclass(frozen=True)
class Lowering:
    """One run of a lowering over a block. `records` is None where nothing is measured."""

    target: Target
    records: TuningRecords | None
    keeps_layout: bool

    @property
    def tables(self) -> dict[str, dict[Any, TableEntry]]:
        """As `replace_by_table` takes them, by the name of the sites. Patterns of several ops come first, before one op in them
        is lowered by itself."""
        several = [p for p in self.target.providers if p.takes_several_ops]
        single = [p for p in self.target.providers if not p.takes_several_ops]
        name, decompositions = self.target.lowering, self.target.decompositions
        return {
            f"{name}_patterns": dict.fromkeys(ops_of(several), partial(self.lowered, several, {})),
            name: dict.fromkeys([*decompositions, *ops_of(single)], partial(self.lowered, single, decompositions)),
        }

    def lowered(
        self, providers: Sequence[KernelProvider], decompositions: Mapping[Any, TableEntry], op: Any, call: Call
    ) -> Any:
        """What the op becomes; None where it stays."""
        decomposed = decompositions.get(call.target, left_alone)
        looking = [p for p in providers if call.target in p.ops and p.when(call)]
        if looking and self.keeps_layout and call.memory_format is None:
            op.decline(LAYOUT_IS_SEEN)
            return decomposed(op, call)
        candidates, reasons = supporting(looking, op, call)
        y = self._built(candidates, reasons, op, call) if candidates else None
        if reasons:
            op.decline("; ".join(reasons))
        return decomposed(op, call) if y is None else y

    def _built(self, candidates: Sequence[Candidate], reasons: list[str], op: Any, call: Call) -> Any:
        """The best variant as nodes, in the layout of `call` where that is seen; None for a result of other facts."""
        builder, candidate = self._best(candidates, reasons)
        try:
            y = builder(op, candidate.subgraph)
        except FactError as error:
            reasons.append(f"{candidate.provider.name}: the new op does not take these operands: {error}")
            return None
        if self.keeps_layout and not y.lies_like(call):  # packed kernels give another one
            y = op.contiguous(y, memory_format=call.memory_format)
        why_not = why_not_in_place_of(call, y, keeps_layout=False) or prepacked_by(op, candidate.provider.prepack_of(builder))
        if why_not is not None:
            reasons.append(f"{candidate.provider.name}: {why_not}")
        return y if why_not is None else None

    def _best(self, candidates: Sequence[Candidate], reasons: list[str]) -> tuple[Builder, Candidate]:
        """The fastest of all variants; in `reasons`, why it is not the first."""
        variants = variants_among(candidates)
        chosen = next(iter(variants))
        if self.records is not None and all(c.provider.can_be_timed(c.subgraph) for c in candidates):
            record = self.records.best(key_of(candidates), lambda: timed(variants), among=variants)
            chosen = record.variant
            if not record.is_default:
                reasons.append(record.reason)
        return variants[chosen]


def left_alone(op: Any, call: Call) -> None:
    return None


def ops_of(providers: Sequence[KernelProvider]) -> set[Any]:
    return {op for provider in providers for op in provider.ops}


def supporting(providers: Sequence[KernelProvider], op: Any, call: Call) -> tuple[list[Candidate], list[str]]:
    """The providers that support the op, and the reasons of those that do not."""
    candidates, reasons = [], []
    for provider in providers:
        subgraph, why_not = provider.subgraph_at(op, call)
        if subgraph is not None:
            values = [value for _, value in operands(subgraph)]
            device = values[0].device if values else None
            why_not = provider.supports(subgraph, device, tuple(value.dtype for value in values)) or ""
        if subgraph is not None and not why_not:
            candidates.append(Candidate(provider, subgraph))
        elif why_not:
            reasons.append(why_not if len(providers) == 1 else f"{provider.name}: {why_not}")
    return candidates, reasons


def variants_among(candidates: Sequence[Candidate]) -> dict[str, tuple[Builder, Candidate]]:
    """All variants by name, the default first. Those of several providers are called after their providers.

    The reference is one of them: a provider with several variants has it among these; else it is the last.
    """
    several, variants = len(candidates) > 1, {}
    for candidate in candidates:
        own = candidate.provider.variants_of(candidate.subgraph)
        for name, builder in own.items():
            if several:
                name = candidate.provider.name if len(own) == 1 else f"{candidate.provider.name} {name}"
            variants[name] = builder, candidate
    if len(variants) == len(candidates):
        variants[REFERENCE] = candidates[-1].provider.reference, candidates[-1]
    return variants


def key_of(candidates: Sequence[Candidate]) -> str:
    """The workload key of the first provider; where there are more, with their names, since others are measured too."""
    key = candidates[0].provider.key_of(candidates[0].subgraph)
    names = ", ".join(candidate.provider.name for candidate in candidates)
    return key if len(candidates) == 1 else f"{key}, by {names}"


def timed(variants: Mapping[str, tuple[Builder, Candidate]]) -> dict[str, Callable[[], Any]]:
    """The variants as calls on tensors. Those of one provider share the tensors."""
    calls: dict[str, Callable[[], Any]] = {}
    for candidate in dict.fromkeys(candidate for _, candidate in variants.values()):
        own = {name: builder for name, (builder, of) in variants.items() if of is candidate}
        calls |= candidate.provider.timed(candidate.subgraph, own)
    return {name: calls[name] for name in variants}
