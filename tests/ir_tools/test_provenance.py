"""Provenance: one location from capture to lowering, what an op was made from, and that no op is without a source."""

from __future__ import annotations

import gc
import weakref
from importlib.util import find_spec

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

from ir_tools.errors import PassesError
from ir_tools.ir import Draft, Program, Record, facts
from ir_tools.ir.dialect import short_name
from ir_tools.ir.prepack import is_prepack
from ir_tools.ir.provenance import CONSTANT, INPUT, location, locations, record
from ir_tools.ir.regions import all_nodes
from ir_tools.rewrite import RewriteLog
from ir_tools.torchvision_ops import import_torchvision
from passes import CATALOGUE, optimize
from passes.driver.pipeline import DEFAULT
from tests.check import captured, with_random_statistics
from tests.script_cases import SCRIPT_MODELS, case
from tests.strategies import random_models


def named(program: Program, name: str):
    return next(node for node in all_nodes(program.graph) if node.name == name)


def through(program: Program, *names: str) -> tuple[Program, list[RewriteLog]]:
    logs = [RewriteLog() for _ in names]
    for name, log in zip(names, logs, strict=True):
        program = CATALOGUE[name](program, log=log)
    return program, logs


class Residual(nn.Module):
    """Calls one relu twice, like torchvision's blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Residual()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


X = torch.randn(1, 3, 8, 8)


def net() -> Program:
    return captured(with_random_statistics(Net()), X)


def convolutions(program: Program) -> list[str]:
    """The locations of the ops that convolve."""
    return [program.provenance.location(n) for n in program.all_calls if "conv" in short_name(n.target) and not is_prepack(n)]


# -- one op, one location ----------------------------------------------------------------------------------------------


def test_calls_of_one_module_have_names_of_their_own() -> None:
    program = net()
    found = [program.provenance.location(node) for node in program.calls]
    assert found == "block.conv1 block.bn1 block.relu block.conv2 block.bn2 block block.relu:2".split()


def test_a_fused_op_is_named_after_its_convolution_until_it_is_lowered() -> None:
    program = net()
    for name in ("fuse_conv_bn", "fuse_conv_relu", "lower_onednn"):
        program = CATALOGUE[name](program)
        assert convolutions(program) == ["block.conv1", "block.conv2"]


def test_what_is_taken_apart_again_has_the_names_it_had() -> None:
    program, _ = through(net(), "fuse_conv_relu", "lower_aten")
    kinds = {short_name(n.target): location(n) for n in program.calls if short_name(n.target) in ("add", "relu")}
    assert kinds == {"add": "block", "relu": "block.relu:2"} or "relu_" in {short_name(n.target) for n in program.calls}
    assert convolutions(program) == ["block.conv1", "block.conv2"]


@pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")
def test_resnet18_has_one_location_for_each_convolution_at_every_step() -> None:
    model = with_random_statistics(import_torchvision().models.resnet18(weights=None))
    paths = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    every_path = {name for name, _ in model.named_modules()}
    program = captured(model, torch.randn(1, 3, 32, 32))
    names = {node.name for node in program.all_calls}
    assert len(paths) == 20
    for step in (*DEFAULT, "lower_onednn"):
        log = RewriteLog()
        program = CATALOGUE[step](program, log=log)
        found = convolutions(program)
        assert sorted(found) == sorted(paths), step
        names |= {node.name for node in program.all_calls}
        for said in (*log.rewrites, *log.refusals):
            assert said.module.partition(":")[0] in every_path or said.module in names, said
        for node in program.calls:
            assert program.provenance.location(node).partition(":")[0] in every_path | names


def test_ops_outside_modules_keep_the_name_of_the_captured_op() -> None:
    program, _ = through(captured(nn.Conv2d(1, 1, 1).eval(), torch.randn(1, 1, 2, 2)), "lower_aten")
    assert [location(n) for n in program.calls] == [n.name for n in program.calls]
    weight = torch.randn(3, 3, 1, 1)
    functional = captured(Function(lambda x: torch.relu(torch.conv2d(x, weight))), X)
    fused, _ = through(functional, "fuse_conv_relu")
    assert [(n.name, location(n)) for n in fused.calls] == [("conv_act", "conv2d")]


class Function(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


# -- what an op was made from -------------------------------------------------------------------------------------------


def test_history_lists_captured_ops_and_rewrites() -> None:
    program, logs = through(net(), "fuse_conv_bn", "fuse_conv_relu", "lower_onednn")
    provenance = program.provenance
    (first, *_) = [node for node in program.calls if "conv" in short_name(node.target)]
    history = provenance.history(first)
    assert sorted((r.op, r.location) for r in history if not r.made_from) == [
        ("batch_norm", "block.bn1"), ("conv2d", "block.conv1"), ("relu", "block.relu"),
    ]  # fmt: skip
    made = [(r.made_by, r.rewrite) for r in history if r.made_from]
    assert [made_by for made_by, _ in made] == ["fuse_conv_bn", "fuse_conv_relu", "lower_onednn"]
    assert all(site in {w.site for log in logs for w in log.rewrites} for _, site in made)
    assert history[-1] is record(first) and all(set(r.made_from) <= set(history[:i]) for i, r in enumerate(history))
    assert provenance.modules(first) == ("block.conv1", "block.bn1", "block.relu")
    assert provenance.made_by(first, "fuse_conv_relu") and not provenance.made_by(first, "cast_half")
    assert all("test_provenance.py" in r.source for r in history if not r.made_from and r.op == "relu")


def test_an_op_found_twice_stands_for_both() -> None:
    program, _ = through(captured(Twice().eval(), X), "eliminate_common_subexpressions")
    (relu,) = [node for node in program.calls if short_name(node.target) == "relu"]
    assert program.provenance.modules(relu) == ("a", "b") and location(relu) == "a"
    assert program.provenance.made_by(relu, "eliminate_common_subexpressions")


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * self.b(x)


def test_linears_side_by_side_keep_their_parts_apart() -> None:
    program, _ = through(captured(SideBySide().eval(), torch.randn(2, 4)), "merge_parallel_linears")
    wide = next(node for node in program.calls if short_name(node.target) == "linear")
    assert program.provenance.modules(wide) == ("q", "k") and location(wide) == "q"
    parts = [node for node in program.calls if short_name(node.target) == "getitem"]
    assert [location(node) for node in parts] == ["q", "k"]


class SideBySide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x).exp() * self.k(x).sin()


@pytest.mark.parametrize("name", ["block.bn1", "block.relu", "block.conv1", "relu", "conv_act", "block.relu:2"])
def test_overrides_by_the_names_of_fused_parts(name) -> None:
    program, _ = through(net(), "fuse_conv_bn", "fuse_conv_relu")
    after = CATALOGUE["cast_half"].with_options(overrides={name: "float"})(program)
    in_float = [location(n) for n in after.all_calls if n.name.startswith("conv_act") and facts.dtype(n) is torch.float32]
    both, second = ["block.conv1", "block.conv2"], ["block.conv2"]
    wanted = {"relu": both, "block.relu": both, "conv_act": both, "block.relu:2": second}
    assert in_float == wanted.get(name, ["block.conv1"])


def test_names_of_an_op_include_those_around_its_modules() -> None:
    program, _ = through(net(), "fuse_conv_bn")
    assert {"block", "block.conv1", "block.bn1", "batch_norm"} <= set(locations(program.calls[0]))


def test_what_is_cast_at_an_input_is_no_op_of_that_name() -> None:
    program, _ = through(captured(nn.Linear(4, 4).eval(), torch.randn(2, 4)), "cast_half")
    casts = [node for node in program.calls if short_name(node.target) == "to"]
    assert {location(casts[0]), *locations(casts[0])} == {program.placeholders[0].name, casts[0].name}


def test_explain_at_reads_the_call_number() -> None:
    report = optimize(with_random_statistics(Net()), "fuse_conv_bn", example_inputs=X, dry_run=True, explain_at="block.relu:2")
    assert not any("no op of the captured graph" in note for note in report.notes)


# -- the table ----------------------------------------------------------------------------------------------------------


def test_bodies_are_in_the_table() -> None:
    this = case(SCRIPT_MODELS["early_exit"])
    program = captured(torch.jit.script(this.model), *next(iter(this.inputs.values())), frontend="script")
    program, _ = through(program, *DEFAULT)
    inside = [node for node in program.all_calls if node not in set(program.calls)]
    assert inside and all(record(node) in program.provenance.records for node in inside)


def test_records_of_ops_that_are_gone_are_forgotten() -> None:
    program = captured(Function(lambda x: torch.relu(x) * 1 + torch.zeros(3, 1, 1)), X)
    gone = [weakref.ref(record(node)) for node in program.calls if short_name(node.target) in ("mul", "zeros")]
    kept = [weakref.ref(record(node)) for node in program.calls if short_name(node.target) in ("relu",)]
    after, _ = through(program, *DEFAULT)
    assert gone and kept
    assert not any(ref() in after.provenance.records for ref in gone)
    after = after.copy()  # fx keeps the nodes that were erased from a graph as long as the graph
    del program
    gc.collect()
    assert all(ref() is None for ref in gone) and all(ref() is not None for ref in kept)


def test_a_discarded_draft_leaves_the_records_as_they_were() -> None:
    program = net()
    before = program.provenance.records
    draft = Draft.of(program)
    (first, *_) = draft.program.calls
    with draft.before(first, "tested"):
        draft.call(torch.ops.aten.relu.default, first.args[0])
    assert draft.finish() is program and program.provenance.records == before


def test_a_long_chain_of_rewrites_needs_no_deep_stack() -> None:
    here = Record(name="x", op="relu")
    for _ in range(5000):
        here = here.derived("tested")
    assert len(here.history()) == 5001 and here.location == "x" and len(here.passes) == 5000


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(random_models())
def test_every_op_goes_back_to_captured_ops_or_constants(model) -> None:
    try:
        program = captured(model.module(), *model.inputs())
    except PassesError:
        return
    names = {node.name for node in all_nodes(program.graph)}
    after, _ = through(program, *DEFAULT, "merge_parallel_linears", "use_stable_forms", "cast_half", "lower_onednn")
    reached = set()
    for node in after.all_calls:
        history = after.provenance.history(node)
        sources = [r for r in history if not r.made_from]
        assert sources and all(r.index >= 0 or r.op in (INPUT, CONSTANT) for r in sources), (node, history)
        assert all(r.name in names for r in sources if r.index >= 0)
        assert all(r.made_by for r in history if r.made_from)
        reached.update(history)
    assert {r for r in after.provenance.records if r.op != CONSTANT} == {r for r in reached if r.op != CONSTANT}
