"""Which passes run, and in which order: the default pipeline, the order rules, the lowering of a target."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import networkx as nx

from ir_tools.frontends.source import Source
from ir_tools.rewrite import Pass
from passes.driver.catalogue import CATALOGUE, find_passes, lowering_to
from passes.driver.instrumentation import PROVIDED
from passes.errors import OptionError, PassOrderError
from passes.lower.target import Target
from passes.lower.targets import ATEN, AUTO, available_target, find_target

DEFAULT = (
    "fold_constants",  # first: rules ask for constants, and computed weights become ones here
    "remove_dropout",  # it stands between ops that fuse,
    "remove_neutral_ops",  # as does what computes its own operand,
    "simplify_views",  # and what moves axes there and back
    "fuse_conv_bn",  # before activations fuse: a batch norm stands between convolution and activation
    "fold_affine",  # the same for constants that scale and shift; and batch norms behind those
    "fuse_bn_conv",  # batch norms that found no layer before them
    "fold_input_affine",  # constants likewise
    "merge_linear_chains",  # layers that only constants kept apart
    "eliminate_common_subexpressions",  # behind the folds: each of two equal layers folds what is its own, then they are one
    "fuse_attention",
    "fuse_conv_relu",  # last: what is left behind a convolution now is its residual and activation
)
"""Changes no precision: clean-up, folding, fusing. `optimize` adds dead-code removal and the engine's lowering.

Not in it: `merge_parallel_linears`, which gains nothing on a CPU, and `use_stable_forms`, which changes what overflows.
"""

FOLDS = ("fuse_conv_bn", "fold_affine", "fuse_bn_conv", "fold_input_affine", "merge_linear_chains")
LOOK_FOR_OPS = (*FOLDS, "remove_dropout", "fuse_conv_relu", "merge_parallel_linears", "insert_quant_stubs", "cast_half")
"""Passes that look for ops which lowering replaces."""

ORDER_RULES: tuple[tuple[str, str, str], ...] = (
    *((name, "cast_half", "weights are folded in full precision") for name in FOLDS),
    ("fuse_conv_bn", "fuse_conv_relu", "a batch norm between convolution and activation must be gone before they fuse"),
    ("fold_affine", "fuse_conv_relu", "constants between convolution and activation must be gone before they fuse"),
    *((name, "insert_quant_stubs", "a stub between two ops would keep them apart") for name in (*FOLDS, "fuse_conv_relu")),
    ("fuse_attention", "cast_half", "casts around the softmax would keep it apart from the products"),
    ("use_stable_forms", "cast_half", "casts between the ops of an unstable expression would hide it"),
    ("insert_quant_stubs", "cast_half", "quantisable subgraphs are found on float32 values"),
    ("fold_constants", "follow_inputs", "a tensor that is made on an input's device is no constant"),
)
"""(first, second, why): where a pipeline has both, `first` comes first. `order_rules` adds those of lowerings."""


def order_rules(passes: Iterable[Pass]) -> list[tuple[str, str, str]]:
    """All rules that a pipeline of these passes has to keep: `ORDER_RULES`, and those of the lowerings among them."""
    lowerings = [p for p in passes if p.target is not None]
    rules = [
        (name, lowering.name, "lowering replaces the ops that the pass looks for")
        for lowering in lowerings
        for name in LOOK_FOR_OPS
    ]
    rules += [
        (first.name, second.name, f"{second.name} would undo the fusions that the kernels of {first.name} take")
        for first in lowerings
        for second in lowerings
        if first.target.providers and not second.target.providers
    ]
    return [*ORDER_RULES, *rules]


def check_order(passes: Sequence[Pass]) -> None:
    """Raise `PassOrderError` with the reason when a hard order rule is broken."""
    names = [p.name for p in passes]
    rules = order_rules(passes)
    for first, second, why in rules:
        if second in names and first in names[names.index(second) :]:  # a pass may come more than once
            raise PassOrderError(
                f"{first} must come before {second}: {why}. Given: {', '.join(names)}. "
                f"An order that works: {', '.join(legal_order(names, rules))}"
            )


def check_needs(passes: Sequence[Pass]) -> None:
    """Raise `PassOrderError` for a pass that needs an artifact which neither the driver makes nor a pass before it gives."""
    given = set(PROVIDED)
    for pass_ in passes:
        for kind in sorted(pass_.needs - given, key=lambda kind: kind.__name__):
            later = [p.name for p in passes if kind in p.gives and p is not pass_]
            first = f"put {' or '.join(dict.fromkeys(later))} before it" if later else "no pass of the pipeline gives it"
            raise PassOrderError(f"{pass_.name} needs {kind.__name__}, which no pass before it gives: {first}")
        given |= pass_.gives


def legal_order(names: Sequence[str], rules: Iterable[tuple[str, str, str]]) -> list[str]:
    """`names` in an order that breaks none of the rules, and otherwise as given."""
    graph: nx.DiGraph = nx.DiGraph()
    graph.add_nodes_from(names)
    graph.add_edges_from((a, b) for a, b, _ in rules if a in graph and b in graph)
    return list(nx.lexicographical_topological_sort(graph, key=names.index))


def plan(passes: str | Pass | Iterable[str | Pass], engine: str | Target) -> list[Pass]:
    """The passes that will run, checked for order, with dead-code removal before any lowering."""
    wanted = None if engine == AUTO else lowering_to(find_target(engine)).target
    found = find_passes(passes)
    check_order(found)
    check_lowerings(found)
    check_needs(found)
    lowering = lowering_of(found)
    if lowering is not None and wanted is not None and lowering.target is not wanted:
        stands_for = f"engine={lowering.target.name!r}"
        another = "another target, " if lowering.target.name == wanted.name else ""
        raise OptionError(f"the pass {lowering.name} stands for {stands_for}, but {another}engine={wanted.name!r} was given")
    if CATALOGUE["remove_dead_code"] not in found:
        found.insert(len(found) if lowering is None else found.index(lowering), CATALOGUE["remove_dead_code"])
    return found


def check_lowerings(passes: Sequence[Pass]) -> None:
    """Raise `OptionError` where passes lower to two targets. Only `lower_aten` may come behind the lowering of another one."""
    first = lowering_of(passes)
    for other in passes:
        if first is not None and other.target not in (None, first.target, ATEN):
            raise OptionError(
                f"the passes {first.name} and {other.name} lower to two targets, {first.target.name!r} and "
                f"{other.target.name!r}; a Program is emitted as one: give one of them"
            )


def lowering_of(passes: Sequence[Pass]) -> Pass | None:
    """The lowering among the passes, None where there is none."""
    return next((p for p in passes if p.target is not None), None)


def with_lowering(passes: Sequence[Pass], engine: str | Target, source: Source) -> tuple[list[Pass], Target]:
    """The passes with what the engine needs behind them where they lack it, and the target that they lower to.

    That is its lowering; and last, so that nothing is kept from folding, `follow_inputs`, if its files move between devices.
    Raises `OptionError` where the engine is not available here, or for inputs on these devices.
    """
    found, own = list(passes), lowering_of(passes)
    target = available_target(engine if own is None else own.target, {t.device for t in source.tensors})
    if own is None:
        found.append(lowering_to(target))
    if target.portable and CATALOGUE["follow_inputs"] not in found:
        found.append(CATALOGUE["follow_inputs"])
    return found, target
