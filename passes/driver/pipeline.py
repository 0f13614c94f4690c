"""Which passes run, and in which order: the default pipeline, the order rules, the lowering of an engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import networkx as nx
import torch

from ir_tools.frontends.source import Source
from ir_tools.rewrite import Pass
from passes.driver.catalogue import CATALOGUE, find_passes
from passes.errors import OptionError, PassOrderError

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
    *(
        (name, lowering, "lowering replaces the ops that the pass looks for")
        for lowering in ("lower_aten", "lower_onednn")
        for name in LOOK_FOR_OPS
    ),
    ("fold_constants", "follow_inputs", "a tensor that is made on an input's device is no constant"),
    ("lower_onednn", "lower_aten", "lower_aten would undo the fusions that oneDNN's kernels take"),
)
"""(first, second, why): where a pipeline has both, `first` comes first."""

LOWERINGS = {"lower_aten": "aten", "lower_onednn": "onednn_ops"}
"""Lowering passes and the engine each one stands for."""

ENGINES = ("auto", *LOWERINGS.values())


def check_order(passes: Sequence[Pass]) -> None:
    """Raise `PassOrderError` with the reason when a hard order rule is broken."""
    names = [p.name for p in passes]
    for first, second, why in ORDER_RULES:
        if second in names and first in names[names.index(second) :]:  # a pass may come more than once
            raise PassOrderError(
                f"{first} must come before {second}: {why}. Given: {', '.join(names)}. "
                f"An order that works: {', '.join(legal_order(names))}"
            )


def legal_order(names: Sequence[str]) -> list[str]:
    """`names` in an order that breaks no rule, and otherwise as given."""
    graph: nx.DiGraph = nx.DiGraph()
    graph.add_nodes_from(names)
    graph.add_edges_from((a, b) for a, b, _ in ORDER_RULES if a in graph and b in graph)
    return list(nx.lexicographical_topological_sort(graph, key=names.index))


def plan(passes: str | Pass | Iterable[str | Pass], engine: str) -> list[Pass]:
    """The passes that will run, checked for order, with dead-code removal before any lowering."""
    if engine not in ENGINES:
        raise OptionError(f"engine must be one of {', '.join(map(repr, ENGINES))}, got {engine!r}")
    found = find_passes(passes)
    check_order(found)
    lowering = lowering_of(found)
    if lowering and engine not in ("auto", LOWERINGS[lowering]):
        raise OptionError(f"the pass {lowering} stands for engine={LOWERINGS[lowering]!r}, but engine={engine!r} was given")
    if CATALOGUE["remove_dead_code"] not in found:
        at = [p.name for p in found].index(lowering) if lowering else len(found)
        found.insert(at, CATALOGUE["remove_dead_code"])
    return found


def lowering_of(passes: Sequence[Pass]) -> str:
    """The name of the lowering among the passes, "" where there is none."""
    return next((p.name for p in passes if p.name in LOWERINGS), "")


def with_lowering(passes: Sequence[Pass], engine: str, source: Source) -> list[Pass]:
    """The passes, and behind them what the engine needs where they lack it: its lowering, and `follow_inputs` for "aten"."""
    found = [*passes, *([] if lowering_of(passes) else [CATALOGUE[lowering_for(engine, source)]])]
    # Only the files of "aten" move between devices. Last, so that nothing is kept from folding.
    needed = LOWERINGS[lowering_of(found)] == "aten" and CATALOGUE["follow_inputs"] not in found
    return [*found, *([CATALOGUE["follow_inputs"]] if needed else [])]


def lowering_for(engine: str, source: Source) -> str:
    """The lowering pass of an engine; "auto" is oneDNN where it is built in and the inputs are on the CPU."""
    on_cpu = all(t.device.type == "cpu" for t in source.tensors)
    if engine == "auto":
        engine = "onednn_ops" if torch.backends.mkldnn.is_available() and on_cpu else "aten"
    if engine == "onednn_ops" and not torch.backends.mkldnn.is_available():
        raise OptionError("engine='onednn_ops' needs a torch built with oneDNN, which this one is not; use engine='aten'")
    return next(name for name, stands_for in LOWERINGS.items() if stands_for == engine)
