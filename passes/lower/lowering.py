"""The lowering pass of a target, made from its kernel providers.

    op, supported by providers     ->  the fastest of their variants; the first where none is faster by a tenth, twice
    op, supported by none          ->  what it is decomposed into, or left alone; the report says why, provider by provider
    a result of other facts, or no kernel that runs here           ->  the next fastest variant; the report says why

Variants are measured on tensors of the example's sizes, at most two seconds in all, and recorded by workload; `records` replays
the records of an earlier run. `variant=fused` takes the first variant everywhere and measures nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from ir_tools.errors import OptionError
from ir_tools.ir import Block, FactError
from ir_tools.rewrite import Call, Pass, RewriteLog, replace_by_table, table_pass
from ir_tools.rewrite.numeric_effects import NumericEffect, numeric_effects
from ir_tools.rewrite.rewrite_log import Refusal
from ir_tools.rewrite.rule import Value
from ir_tools.rewrite.shapes import TableEntry
from ir_tools.rewrite.subgraph import prepacked_by, take_back, why_not_in_place_of
from passes.lower.candidates import (
    Candidate,
    KernelFailed,
    Variants,
    is_reference,
    looking_at,
    raised,
    supporting,
    timed,
    variants_among,
    workload_of,
)
from passes.lower.kernel_provider import KernelProvider
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
        refused = len(log.refusals)
        for table in Lowering(target, measured, program.layout_is_observable).tables:
            program = replace_by_table(program, table, target.lowering, log)
        log.refusals[refused:] = one_per_site(log.refusals[refused:])
        return program, measured

    effects: Iterable[NumericEffect] = () if target.exact else {"rounds"}
    return Pass(target.lowering, lower, numeric_effects(effects), doc, renamed=renamed or {}, target=target)


def description(target: Target) -> str:
    """The docstring of a lowering: which providers look at which ops."""
    names = {provider.name: ", ".join(sorted(str(op) for op in provider.ops)) for provider in target.providers}
    rows = [f"    {ops}  ->  {name}\n" for name, ops in names.items()]
    return f"Lower to the kernels of {target.name!r}.\n\n{''.join(rows)}    everything else  ->  as in lower_aten\n"


@dataclass(frozen=True)
class Lowering:
    """One run of a lowering over a block. `records` is None where nothing is measured.

    `failures`: by workload, the variants that did not run when they were timed, and why.
    """

    target: Target
    records: TuningRecords | None
    keeps_layout: bool
    failures: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def tables(self) -> list[dict[Any, TableEntry]]:
        """As `replace_by_table` takes them. Patterns of several ops come first, before one op in them is lowered by itself."""
        several = [p for p in self.target.providers if p.takes_several_ops]
        single = [p for p in self.target.providers if not p.takes_several_ops]
        decompositions = self.target.decompositions
        return [
            dict.fromkeys(ops_of(several), partial(self.lowered, several, {})),
            dict.fromkeys([*decompositions, *ops_of(single)], partial(self.lowered, single, decompositions)),
        ]

    def lowered(
        self, providers: Sequence[KernelProvider], decompositions: Mapping[Any, TableEntry], op: Any, call: Call
    ) -> Any:
        """What the op becomes; None where it stays."""
        decomposed, reasons = decompositions.get(call.target, left_alone), list[str]()
        looking = looking_at(providers, call, reasons)
        if looking and self.keeps_layout and call.memory_format is None:
            op.decline(LAYOUT_IS_SEEN)
            return decomposed(op, call)
        candidates = supporting(looking, op, call, reasons)
        y = self._built(candidates, reasons, op, call) if candidates else None
        if reasons:
            op.decline("; ".join(reasons))
        return decomposed(op, call) if y is None else y

    def _built(self, candidates: list[Candidate], reasons: list[str], op: Any, call: Call) -> Any:
        """The first of the ranked variants that has the facts of `call`, as nodes. None where the op is better left alone.

        That is where the reference comes next: the decomposition is that as well. Of several ops it is not built even where it
        is fastest: each of them may have a kernel of its own.
        """
        variants, ranked = self._ranked(candidates, reasons)
        for rank, name in enumerate(ranked):
            _, candidate = variants[name]
            if is_reference(name, variants) and (rank or candidate.provider.takes_several_ops):
                return None
            y, why_not = self._attempt(*variants[name], op, call)
            if why_not is None:
                return y
            take_back(op)
            reasons.append(f"{candidate.provider.name}: {why_not}")
        return None

    def _attempt(self, builder: Any, candidate: Candidate, op: Any, call: Call) -> tuple[Any, str | None]:
        """One variant as nodes, in the layout of `call` where that is seen, and why it cannot be used."""
        try:
            y = builder(op, candidate.subgraph)
            if not isinstance(y, Value):
                return None, f"build gives {y!r}, which is no value of the graph"
            if self.keeps_layout and not y.lies_like(call):  # packed kernels give another one
                y = op.contiguous(y, memory_format=call.memory_format)
        except FactError as error:
            return None, f"the new op does not take these operands: {error}"
        except Exception as error:  # anything: others wrote it
            return None, raised("build", error)
        why_not = why_not_in_place_of(call, y, keeps_layout=False)
        return y, why_not or prepacked_by(op, candidate.provider.prepack_of(builder))

    def _ranked(self, candidates: list[Candidate], reasons: list[str]) -> tuple[Variants, list[str]]:
        """All variants, and the names of those that run here: the chosen one, then the others from fast to slow.

        In `reasons`, why the default is not the chosen one, and which do not run.
        """
        workload = None if self.records is None else workload_of(candidates, reasons)
        variants = variants_among(candidates)
        if workload is None or self.records is None:
            return variants, list(variants)
        failures, left = self.failures.setdefault(workload, {}), dict(variants)
        record = None
        while record is None:
            left = {name: variant for name, variant in left.items() if name not in failures}
            if failures and all(is_reference(name, variants) for name in left):
                break
            try:
                record = self.records.best(workload, partial(timed, left), among=left)
            except KernelFailed as failure:
                failures.update(dict.fromkeys(failure.names, failure.reason))
        reasons += dict.fromkeys(failures.values())
        if record is None:
            return variants, []
        if not record.is_default:
            reasons.append(record.reason)
        seconds = record.seconds or dict.fromkeys(left, 0.0)
        others = [name for name in left if name != record.variant and name in seconds]
        return variants, [record.variant, *sorted(others, key=seconds.__getitem__)]


def left_alone(op: Any, call: Call) -> None:
    return None


def ops_of(providers: Sequence[KernelProvider]) -> set[Any]:
    return {op for provider in providers for op in provider.ops}


def one_per_site(refusals: Sequence[Refusal]) -> list[Refusal]:
    """The refusals of both tables; those of one site as one, with both reasons."""
    by_site: dict[str, Refusal] = {}
    for refusal in refusals:
        first = by_site.setdefault(refusal.site, refusal)
        if first is not refusal:
            by_site[refusal.site] = replace(first, reason=f"{first.reason}; {refusal.reason}")
    return list(by_site.values())
