"""What tests of passes share: capturing a small model, checking the invariants of a pass, comparing graphs and numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import networkx as nx
import torch
from networkx.algorithms.isomorphism import DiGraphMatcher
from torch import Tensor, fx, nn

from ir_tools.frontends.capture import capture
from ir_tools.frontends.source import prepare
from ir_tools.ir import Draft, Program, facts
from ir_tools.ir.dialect import bound_arguments, conv_act, linear_act, nodes_in, overload_name, short_name
from ir_tools.ir.prepack import is_prepack
from ir_tools.ir.program import public_name
from ir_tools.rewrite import Pass
from ir_tools.torch_compat.modules import BatchNorm
from ir_tools.verify.ranges import Observation, Ranges
from passes.testing.invariants import rewritten
from passes.testing.true_facts import sketch

# -- making Programs ----------------------------------------------------------------------------------------------------


def captured(model: nn.Module, *inputs: Tensor, frontend: str = "trace") -> Program:
    """The Program of `model` called on `inputs`."""
    return capture(prepare(model, [(inputs, {})]), frontend).program


def with_random_statistics(model: nn.Module) -> nn.Module:
    """`model` in eval mode; every batch norm has statistics and an affine map that are far from the identity."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, BatchNorm):
                if module.running_mean is not None:
                    module.running_mean.normal_()
                    module.running_var.uniform_(0.2, 3.0)
                if module.affine:
                    module.weight.uniform_(-2.0, 2.0)
                    module.bias.normal_()
    return model.eval()


ACT_ARGUMENTS = {"hardtanh": [-0.5, 0.75], "leaky_relu": [0.25], "elu": [1.25, 0.75, 0.5]}


class _Layer(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        return self.layer(x)


def one_fused_op(layer: nn.Module, act: str, with_residual: bool) -> tuple[Program, Tensor, Tensor]:
    """`act(layer(x) + r)` as one op of the dialect, for every activation there is; and inputs x and r."""
    weight, dims = layer.weight, layer.weight.dim() - 2
    # Wide enough that every branch of every activation is taken.
    x = (3 * torch.randn(2, layer.in_channels, *[6] * dims) if dims else 3 * torch.randn(2, 3, layer.in_features)).to(weight)
    with torch.no_grad():
        r = torch.randn_like(layer(x))
    draft = Draft.of(captured(_Layer(layer).eval(), x, r))
    (node,) = draft.program.calls
    fused = (draft.program.placeholders[1] if with_residual else None, act, ACT_ARGUMENTS.get(act, []))
    with draft.before(node):
        new = draft.call(conv_act if dims else linear_act, *node.args, *fused)
    draft.redirect(node, new)
    return draft.finish(), x, r


# -- comparing numbers --------------------------------------------------------------------------------------------------


def outputs_of(program: Program, *inputs: Tensor) -> list[Tensor]:
    """The Program's flat outputs on copies of `inputs`."""
    return program.run(*(t.clone() for t in inputs))


def relative_error(expected: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """The largest |difference| over the largest |expected|, per output; the worst output counts."""
    assert len(expected) == len(got) > 0
    worst = 0.0
    for e, g in zip(expected, got):
        assert (e.shape, e.dtype) == (g.shape, g.dtype)
        assert e.isfinite().all(), "the reference itself is not finite: the test compares nothing"
        if e.numel() == 0:
            continue
        scale = e.double().abs().max().item()
        assert scale > 0, "the reference is zero: the test compares nothing"
        error = (e.double() - g.double()).abs().max().item()
        worst = max(worst, error / scale if error == error else float("inf"))
    return worst


def assert_numbers_agree(model: nn.Module, program: Program, *inputs: Tensor, within: float) -> None:
    """The Program gives what the eager model gives, to a relative error."""
    with torch.no_grad():
        expected = nn.Module.__call__(model, *(t.clone() for t in inputs))
    expected = [expected] if isinstance(expected, Tensor) else [t for t in expected if isinstance(t, Tensor)]
    error = relative_error(expected, outputs_of(program, *inputs))
    assert error <= within, f"relative error {error:.3g}, allowed {within:g}"


def assert_bitwise_equal(expected: Sequence[Tensor], got: Sequence[Tensor]) -> None:
    assert len(expected) == len(got) > 0
    for e, g in zip(expected, got):
        assert (e.shape, e.dtype) == (g.shape, g.dtype)
        assert torch.equal(e, g), f"moved by up to {(e.double() - g.double()).abs().max().item():.3g}"


# -- comparing graphs ---------------------------------------------------------------------------------------------------


def ops(program: Program) -> list[str]:
    """Short names of the ops that run in a call, in order of execution."""
    return [short_name(node.target) for node in program.calls if not is_prepack(node)]


def graph_lines(program: Program) -> list[str]:
    """Every op of the program as text, with its name and arguments."""
    return [f"{node.name} {node.target} {node.args} {node.kwargs}" for node in program.all_calls]


def assert_same_graph(program: Program, expected: nn.Module, *inputs: Tensor, frontend: str = "trace",
                      called: Mapping[str, str] | None = None) -> None:  # fmt: skip
    """The Program computes as `expected`, captured by the same front end: same ops, arguments, wiring and constants' names.

    Constants are compared by the user's parameter path, shape and dtype; their values are for the numbers to prove.
    `called` maps parameter paths of `expected` to those of the model where the two must differ.
    """
    want = captured(expected, *inputs, frontend=frontend)
    a, b = _labelled(program, {}), _labelled(want, called or {})
    same = DiGraphMatcher(
        a, b, node_match=lambda x, y: x["label"] == y["label"], edge_match=lambda x, y: x["positions"] == y["positions"]
    )
    assert same.is_isomorphic(), f"\ngot:\n{_listing(a)}\n\nexpected:\n{_listing(b)}"


def _labelled(program: Program, called: Mapping[str, str]) -> nx.DiGraph:
    """Nodes labelled by what they compute (names of nodes left out), edges by the argument positions that they fill."""
    graph: nx.DiGraph = nx.DiGraph()
    for node in program.nodes:
        if node.op == "get_attr" and not node.users:
            continue
        graph.add_node(node, label=_label(program, node, called))
        for position, value in enumerate([*nodes_in(node.args), *nodes_in(node.kwargs)]):
            if graph.has_edge(value, node):
                graph.edges[value, node]["positions"] += (position,)
            else:
                graph.add_edge(value, node, positions=(position,))
    return graph


def _label(program: Program, node: fx.Node, called: Mapping[str, str]) -> str:
    if node.op == "placeholder":
        return f"input {program.placeholders.index(node)} {sketch(facts.fact(node))}"
    if node.op == "get_attr":
        name = str(node.target)
        path = called.get(public_name(name), public_name(name))
        return f"constant {path} {sketch(program.constants[name])}"
    if node.op == "output":
        return f"output {len(list(nodes_in(node.args)))}"
    literals = {name: fx.map_arg(value, lambda n: "·") for name, value in bound_arguments(node).items()}
    return f"{overload_name(node.target)}({', '.join(f'{k}={_plain(v)}' for k, v in literals.items())})"


def _plain(value: Any) -> str:
    if isinstance(value, fx.Node):
        return "·"
    return "[" + ", ".join(map(_plain, value)) + "]" if isinstance(value, (list, tuple)) else str(value)


def _listing(graph: nx.DiGraph) -> str:
    return "\n".join(sorted(data["label"] for _, data in graph.nodes(data=True)))


# -- sites --------------------------------------------------------------------------------------------------------------


def assert_sites_can_be_skipped(pass_: Pass, capture_again: Callable[[], Program], *inputs: Tensor) -> None:
    """Site ids are the same from run to run, and each alone can be left as it is. The sites must not depend on each other."""
    program = capture_again()
    _, log = rewritten(pass_, program, *inputs)
    sites = [rewrite.site for rewrite in log.rewrites]
    assert len(set(sites)) == len(sites) >= 2, "the test needs a model with two sites at least"
    _, again = rewritten(pass_, capture_again(), *inputs)
    assert [rewrite.site for rewrite in again.rewrites] == sites
    for site in sites:
        after, log = rewritten(pass_, program, *inputs, skip={site})
        assert [rewrite.site for rewrite in log.rewrites] == [s for s in sites if s != site]
        assert site.split("@")[1] in [node.name for node in after.calls], "the skipped op is gone"
    assert pass_(program, skip=sites) is program


def observe(program: Program, calls: Iterable[Sequence[torch.Tensor]]) -> Ranges:
    """The ranges over several calls, each of which is the Program's flat inputs. Seed torch for equal random draws."""
    observation = Observation(program)
    for tensors in calls:
        observation.call(tensors)
    return Ranges(observation.ranges)
