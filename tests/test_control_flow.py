"""Control flow on tensor data: kept, rewritten inside, right on every path, whatever path the example inputs took."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ir_tools.torch_compat import pytree
from ir_tools.torch_compat.modules import BatchNorm
from passes import load, optimize
from passes.errors import EmitError, PassesError
from tests.branches_taken import outcomes_missed, path_taken
from tests.script_cases import SCRIPT_MODELS, ScriptCase, case


def called(model: Any, args: tuple) -> list[torch.Tensor]:
    """The tensors that a model returns on copies of its arguments."""
    with torch.no_grad():
        return [t.clone() for t in pytree.tree_leaves(model(*copy.deepcopy(args)))]


def structure(args: tuple) -> list[bool]:
    """Which arguments are None: one capture serves one structure."""
    return [leaf is None for leaf in pytree.tree_leaves(args, is_leaf=lambda leaf: leaf is None)]


def same_structure(this: ScriptCase, example: str) -> dict[str, tuple]:
    """The inputs that raise nothing and have the structure of the example."""
    return {name: args for name, args in this.working.items() if structure(args) == structure(this.inputs[example])}


def assert_same_numbers(expected: list[torch.Tensor], got: list[torch.Tensor], message: str, within: float = 1e-5) -> None:
    assert len(expected) == len(got) > 0, message
    for e, g in zip(expected, got):
        torch.testing.assert_close(g, e, rtol=within, atol=within * e.abs().amax().item(), msg=lambda m: f"{message}: {m}")


def assert_agrees(this: ScriptCase, fast: Any, example: str, within: float = 1e-5) -> None:
    """`fast` gives what the eager model gives, on every input, called in the same order (a model may count)."""
    eager = copy.deepcopy(this.model)
    for name, args in same_structure(this, example).items():
        assert_same_numbers(called(eager, args), called(fast, args), f"captured on {example}, called on {name}", within)


def optimized(this: ScriptCase, example: str, passes: Any = "fuse_conv_bn_relu", **options: Any) -> Any:
    scripted = torch.jit.script(copy.deepcopy(this.model))
    return optimize(scripted, passes, example_inputs=this.inputs[example], **options)


def nodes(block: Any) -> Iterator[Any]:
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from nodes(inner)


def control_flow(block: Any) -> Counter[str]:
    """Ifs and loops of a TorchScript graph, nested ones too, without the ifs that only decide on an error."""
    found: Counter[str] = Counter()
    for node in block.nodes():
        blocks = list(node.blocks())
        if any(inner.kind() == "prim::RaiseException" for b in blocks for inner in b.nodes()):
            continue
        found[node.kind()] += bool(blocks)
        for inner in blocks:
            found += control_flow(inner)
    return +found


def rewrites(report: Any, name: str) -> list[Any]:
    return [rewrite for step in report.steps if step.name == name for rewrite in step.rewrites]


# -- the models themselves ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPT_MODELS)
def test_the_inputs_take_every_branch_and_each_its_own_path(name):
    this = case(SCRIPT_MODELS[name])
    model = copy.deepcopy(this.model)
    paths = [path_taken(model, copy.deepcopy(args)) for args in this.inputs.values()]
    assert not outcomes_missed(model, paths)
    assert len({tuple(path) for path in paths}) == len(paths) >= 2


def test_an_input_left_out_is_noticed():
    this = case(SCRIPT_MODELS["nested_ifs"])
    del this.inputs["minus_plus"]
    paths = [path_taken(this.model, args) for args in this.inputs.values()]
    (missed,) = outcomes_missed(this.model, paths)
    assert "is never True" in missed


@pytest.mark.parametrize("name", SCRIPT_MODELS)
def test_the_models_are_the_same_in_eager_and_in_torchscript(name):
    """And their scripted graphs have the control flow that the table says, so that capture has something to keep."""
    this = case(SCRIPT_MODELS[name])
    scripted, eager = torch.jit.script(copy.deepcopy(this.model)), copy.deepcopy(this.model)
    for input_name, args in this.working.items():
        assert_same_numbers(called(eager, args), called(scripted, args), input_name)
    found = control_flow(scripted.inlined_graph)
    assert found["prim::If"] >= this.ifs and found["prim::Loop"] >= this.loops
    norms = [m for m in this.model.modules() if isinstance(m, BatchNorm)]
    assert sum(this.folds.values()) == len(norms) > 0


# -- optimised ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPT_MODELS)
def test_every_path_agrees_after_fusing_and_after_saving(name, tmp_path):
    this = case(SCRIPT_MODELS[name])
    example = next(iter(this.inputs))
    fast = optimized(this, example)
    fast.save(tmp_path / "model.pt")  # before the calls: some models count them
    assert_agrees(this, fast, example)
    for loaded in (load(tmp_path / "model.pt"), torch.jit.load(str(tmp_path / "model.pt"))):
        # What is no tensor was baked in, and is no argument of the file.
        assert_agrees(this, lambda *args: loaded(*(a for a in args if a is not None)), example)  # noqa: B023


@pytest.mark.parametrize("name", SCRIPT_MODELS)
def test_every_batch_norm_folds_wherever_it_is(name):
    this = case(SCRIPT_MODELS[name])
    fast = optimized(this, next(iter(this.inputs)), verify="off")
    folded = Counter(rewrite.module.partition(":")[0] for rewrite in rewrites(fast.report, "fuse_conv_bn"))
    assert folded in (Counter(this.folds), Counter(this.unrolled)), str(fast.report)
    left = [node.kind() for node in nodes(fast.scripted.inlined_graph) if "batch_norm" in node.kind()]
    assert not left and "batch_norm" not in fast.scripted.code


@pytest.mark.parametrize("name", SCRIPT_MODELS)
def test_control_flow_on_data_is_still_there(name):
    this = case(SCRIPT_MODELS[name])
    fast = optimized(this, next(iter(this.inputs)), [], engine="aten", verify="off")
    found = control_flow(fast.scripted.inlined_graph)

    assert found["prim::If"] >= this.ifs and found["prim::Loop"] >= this.loops, found


@pytest.mark.parametrize("name", SCRIPT_MODELS)
def test_any_path_can_be_the_example(name):
    this = case(SCRIPT_MODELS[name])
    for example in list(this.working)[1:]:
        assert_agrees(this, optimized(this, example, engine="aten"), example)


@pytest.mark.parametrize("name", ["nested_ifs", "greedy_decoder", "optional_memory"])
def test_all_paths_as_examples_are_all_verified(name):
    this = case(SCRIPT_MODELS[name])
    example = next(iter(this.inputs))
    scripted = torch.jit.script(copy.deepcopy(this.model))
    fast = optimize(scripted, "fuse_conv_bn_relu", example_inputs=list(same_structure(this, example).values()))
    assert fast.report.verified and fast.report.sqnr_db > 90
    assert_agrees(this, fast, example)


@pytest.mark.parametrize("name, runs_all", [("early_exit", True), ("nested_ifs", False)])
def test_branches_are_cast_to_half(name, runs_all):
    """Within bfloat16's rounding, in every branch; the conditions of these models are far from their thresholds.

    Without calibration data the first example is observed: what it does not run stays float.
    """
    this = case(SCRIPT_MODELS[name])
    example = next(iter(this.inputs))
    every_path = list(same_structure(this, example).values())
    fast = optimized(this, example, ["fuse_conv_bn_relu", "cast_half"], engine="aten", calibration_data=every_path)
    assert_agrees(this, fast, example, within=0.03)
    assert rewrites(fast.report, "cast_half")
    weights = [t.dtype for t in fast.program.constants.values() if t.dim() == 4]
    assert weights.count(torch.bfloat16) == sum(this.folds.values())
    one_path = optimized(this, example, ["fuse_conv_bn_relu", "cast_half"], engine="aten")
    assert_agrees(this, one_path, example, within=0.03)
    weights = [t.dtype for t in one_path.program.constants.values() if t.dim() == 4]
    assert 0 < weights.count(torch.bfloat16) <= sum(this.folds.values())
    assert (weights.count(torch.bfloat16) == sum(this.folds.values())) == runs_all


# -- what is special about some of them ---------------------------------------------------------------------------------


def test_an_error_that_data_causes_is_raised():
    this = case(SCRIPT_MODELS["checked"])
    fast = optimized(this, "positive")
    for name, message in this.raises.items():
        with pytest.raises(Exception, match=message):
            this.model(*this.inputs[name])
        with pytest.raises(Exception, match=message):
            fast(*this.inputs[name])


def test_an_example_that_raises_is_refused_with_the_models_own_words():
    with pytest.raises(PassesError, match="the input holds NaN"):
        optimized(case(SCRIPT_MODELS["checked"]), "nan")


def test_a_counter_counts_only_in_its_branch():
    this = case(SCRIPT_MODELS["counting_gate"])
    fast, eager = optimized(this, "closed"), copy.deepcopy(this.model)
    for name in ("open", "closed", "open", "open", "closed"):
        assert_same_numbers(called(eager, this.inputs[name]), called(fast, this.inputs[name]), name)
    assert eager.hits == 6 and [b.item() for b in fast.scripted.buffers() if b.dim() == 0] == [6]
    assert this.model.hits == 3


def test_the_users_module_is_left_as_it_was():
    """The taken branch writes into a buffer of the ScriptModule given: capture and verification must put it back."""
    this = case(SCRIPT_MODELS["counting_gate"])
    scripted = torch.jit.script(copy.deepcopy(this.model))
    before = {name: value.clone() for name, value in scripted.state_dict().items()}
    optimize(scripted, example_inputs=this.inputs["open"])
    assert all(torch.equal(before[name], value) for name, value in scripted.state_dict().items())


def test_a_weight_shared_with_the_outside_is_folded_in_the_branch_only():
    this = case(SCRIPT_MODELS["shared_weight"])
    fast = optimized(this, "skipped", engine="aten")  # captured where the branch is not taken
    (fold,) = rewrites(fast.report, "fuse_conv_bn")
    assert fold.module == "conv:2"  # the second call of the module
    weights = [t for t in fast.program.constants.values() if t.shape == this.model.conv.weight.shape]
    norm = this.model.norm
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().view(-1, 1, 1, 1)
    assert len(weights) == 2
    assert sum(torch.equal(w, this.model.conv.weight) for w in weights) == 1
    assert sum(torch.allclose(w, this.model.conv.weight * scale) for w in weights) == 1
    assert [node.kind() for node in nodes(fast.scripted.inlined_graph)].count("aten::conv2d") == 3
    assert_agrees(this, fast, "skipped")


class WritesIntoList(torch.nn.Module):
    """Writes into an element of a list in a branch, and reads the whole list afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ys = [x, self.linear(x)]
        if bool(x.sum() > 0):
            ys[-1].mul_(0.5)
        return torch.stack(ys).sum(0)


def test_a_write_into_an_element_of_a_known_list_is_kept():
    """torch 2.13's TorchScript optimiser drops this write from a scripted model: emitted text must not rely on it."""
    model, x = WritesIntoList().eval(), torch.rand(2, 3)
    fast = optimize(model, [], example_inputs=-x, frontend="script", engine="aten")
    for value in (-x, x):
        for _ in range(3):  # the optimiser comes in with the second call
            assert_same_numbers(called(model, (value,)), called(fast, (value,)), "a write in a branch")


class WritesIntoGrownList(torch.nn.Module):
    """The same, where the length of the list is known at run time only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ys: list[torch.Tensor] = [x * 2]
        while len(ys) < 2 + int(x.abs().sum()):
            ys.append(x + len(ys))
        ys[0].mul_(0.5)
        return torch.stack(ys).sum(0)


def test_a_write_into_an_element_of_a_runtime_list_is_refused():
    """That write TorchScript's optimiser drops some of the time: no file may rely on it."""
    with pytest.raises(EmitError, match=r"mul_ at .* writes into a tensor that a list or dict holds"):
        optimize(WritesIntoGrownList().eval(), [], example_inputs=torch.rand(2, 3), frontend="script", engine="aten")
