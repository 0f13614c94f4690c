"""The invariants, once over every pass and several models."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ir_tools.ir import Program
from ir_tools.ir.prepack import is_prepack
from ir_tools.rewrite import RewriteLog
from ir_tools.torch_compat import pytree
from ir_tools.verify.numerics import compare, smallest_sqnr
from passes import CATALOGUE, DEFAULT, GROUPS, Pass
from passes.driver.verification import compared_dtypes
from passes.testing import assert_facts_are_true, rewritten
from tests.check import captured, outputs_of, with_random_statistics
from tests.script_cases import SCRIPT_MODELS, ScriptCase, case

ROOT = Path(__file__).parent.parent


class Residual(nn.Module):
    """Convolutions of three kinds, batch norms, activations, a residual, a dropout, a pool, a linear."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.a = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8), nn.ReLU6(inplace=True))
        self.b = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8))
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 4, 2, 2), nn.BatchNorm2d(4), nn.Hardswish())
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.b(self.a(x)) + x)
        return self.head(self.up(x).mean((2, 3)))


class Attention(nn.Module):
    """Embeddings, a computed mask, attention, layer norm, a feed-forward block with its residual."""

    def __init__(self):
        super().__init__()
        self.embed, self.layer = nn.Embedding(11, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        mask = torch.full((4, 4), -1e9).triu(1)
        x = self.layer(self.embed(tokens), src_mask=mask)
        return x, x.softmax(-1)


class Writes(nn.Module):
    """Writes into an input, a buffer and a fresh tensor; reads before and after."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.register_buffer("count", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        before = x * 2
        x[0].mul_(0.5)
        y = self.bn(self.conv(x))
        table = torch.zeros(2, 4)
        table[0] = y.mean((0, 2, 3))
        return F.relu(y) * self.count + table.sum() + before.sum()


class Shared(nn.Module):
    """One convolution three times: with batch norms of its own, and bare; several outputs, one of them an input."""

    def __init__(self):
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.conv(F.gelu(self.a(self.conv(x))))
        left, right = y.chunk(2, 1)
        return self.b(y), F.silu(left + right), self.conv(x.neg()), x


class Affine(nn.Module):
    """Constants that scale and shift before and behind layers, batch norms before layers, layers next to each other."""

    def __init__(self):
        super().__init__()
        self.bn, self.conv, self.pointwise = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 4, 1)
        self.norm, self.a, self.b = nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.register_buffer("std", torch.rand(3, 1, 1) + 0.5)
        self.register_buffer("gain", torch.rand(4, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.bn((x - 0.5) / self.std)) * self.gain - 1
        x = self.pointwise(self.conv(-x[:, :3])).relu().mean((2, 3))
        return self.b(self.a(self.norm(x) * 2)) / 3


class ByHand(nn.Module):
    """Attention written out, with much that computes nothing, or the same again, or overflows."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.register_buffer("ones", torch.ones(6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.exp().transpose(1, 2).transpose(1, 2).clone() * self.ones
        q, k, v = self.q(x) * 0.5, self.k(x), self.v(x).unsqueeze(0).squeeze(0)
        y = torch.softmax(torch.matmul(q, k.transpose(-2, -1)), -1).matmul(v)
        return torch.log(1 + y.abs()) + torch.log(1 + y.abs()).sin(), torch.log(torch.softmax(y.neg().neg(), -1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 3))


def small_conv(dtype: torch.dtype) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU()).to(dtype)


def conv1d() -> nn.Module:
    return nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.Tanh())


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "residual": (Residual, lambda: (torch.randn(2, 3, 8, 8),)),
    "attention": (Attention, lambda: (torch.randint(11, (2, 4)),)),
    "writes": (Writes, lambda: (torch.randn(2, 3, 6, 6),)),
    "shared": (Shared, lambda: (torch.randn(2, 4, 6, 6),)),
    "affine": (Affine, lambda: (torch.randn(2, 3, 7, 7),)),
    "by hand": (ByHand, lambda: (torch.randn(2, 4, 6),)),
    "mlp": (mlp, lambda: (torch.randn(4, 6),)),
    "conv1d": (conv1d, lambda: (torch.randn(2, 3, 9),)),
    "bfloat16": (lambda: small_conv(torch.bfloat16), lambda: (torch.randn(2, 3, 6, 6, dtype=torch.bfloat16),)),
    "float64": (lambda: small_conv(torch.float64), lambda: (torch.randn(2, 3, 6, 6, dtype=torch.float64),)),
}

BEFORE: dict[str, tuple[str, ...]] = {
    "lower_aten": ("fuse_conv_bn", "fuse_conv_relu", "insert_quant_stubs"),
    "lower_onednn": ("fuse_conv_bn", "fuse_conv_relu", "insert_quant_stubs"),
    "insert_quant_stubs": ("fuse_conv_bn", "fuse_conv_relu"),
}
"""What a pass is given to chew on besides the captured graph."""


NEEDS_A_RUN = "follow_inputs"
"""Does nothing without what a run of the model found, and nothing in bodies: tests/passes/lower/test_follow_inputs.py."""


def programs(name: str, pass_: Pass) -> tuple[list[Program], tuple[Tensor, ...]]:
    build, make_inputs = MODELS[name]
    inputs = make_inputs()
    model = with_random_statistics(build())
    found = [captured(model, *inputs, frontend=frontend) for frontend in ("trace", "export")]
    prepared = found[0]
    for earlier in BEFORE.get(pass_.name, ()):
        prepared = CATALOGUE[earlier](prepared)
    return [*found, *([prepared] if prepared is not found[0] else [])], inputs


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", CATALOGUE)
def test_the_invariants_hold(name: str, model: str) -> None:
    """Input untouched, well-formed, facts true, a second run gives the same object (`rewritten`), numbers by its effects."""
    pass_ = CATALOGUE[name]
    found, inputs = programs(model, pass_)
    for program in found:
        expected = outputs_of(program, *inputs)
        after, _ = rewritten(pass_, program, *inputs)
        for _ in range(2):  # a first run must leave nothing behind for a second one
            comparison = compare(expected, outputs_of(after, *inputs))
            if pass_.is_exact:
                assert comparison.equal, comparison
            else:
                allowed = smallest_sqnr(pass_.effects, compared_dtypes(after))
                assert not comparison.problem and comparison.sqnr_db >= allowed, comparison


@pytest.mark.parametrize("name", [name for name in CATALOGUE if name != NEEDS_A_RUN])
def test_every_pass_has_something_to_do_on_these_models(name: str) -> None:
    """Or the invariants above would hold for the pass that does nothing."""
    pass_ = CATALOGUE[name]
    logs = []
    for model in MODELS:
        found, inputs = programs(model, pass_)
        if name == "remove_dead_code":
            from tests.passes.cleanup.test_remove_dead_code import with_dead_code

            found = [with_dead_code(found[0], (torch.ops.aten.abs.default,))]
        logs += [rewritten(pass_, program, *inputs)[1] for program in found]
    assert sum(bool(log.rewrites) for log in logs) >= 2


@pytest.mark.parametrize("model", MODELS)
def test_all_passes_one_after_the_other(model: str) -> None:
    build, make_inputs = MODELS[model]
    inputs = make_inputs()
    program = captured(with_random_statistics(build()), *inputs)
    expected = outputs_of(program, *inputs)
    for lowering in ("lower_aten", "lower_onednn"):
        after = program
        for name in (*DEFAULT, "insert_quant_stubs", "cast_half", "remove_dead_code", lowering):
            after, _ = rewritten(CATALOGUE[name], after, *inputs)
        comparison = compare(expected, outputs_of(after, *inputs))
        assert not comparison.problem and comparison.sqnr_db >= smallest_sqnr({"lowers_precision"}, {torch.bfloat16})
        ours = [node for node in after.calls if getattr(node.target, "namespace", "") == "torch_passes"]
        assert all(map(is_prepack, ours))  # these are hoisted: a file calls other ops in their place


# -- the same in branches and loops -------------------------------------------------------------------------------------

class ConstantInBranch(nn.Module):
    """What one branch computes from constants is folded there."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.sum() > 0):
            return self.linear(x) * torch.arange(4).float().exp()
        return x


def constant_in_branch() -> ScriptCase:
    return ScriptCase(ConstantInBranch(), {"taken": (torch.ones(2, 4),), "not taken": (-torch.ones(2, 4),)}, {})


class LayersInBranch(nn.Module):
    """A batch norm before a layer and two layers next to each other, on one path."""

    def __init__(self):
        super().__init__()
        self.norm, self.a, self.b = nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.sum() > 0):
            x = self.b(self.a(self.norm(x)))
        return x * 2


def layers_in_branch() -> ScriptCase:
    model = with_random_statistics(LayersInBranch())
    return ScriptCase(model, {"taken": (torch.ones(2, 4),), "not taken": (-torch.ones(2, 4),)}, {})


class ByHandInBranch(nn.Module):
    """The same work in a branch."""

    def __init__(self):
        super().__init__()
        self.by_hand = ByHand()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if bool(x.sum() > 0):
            return self.by_hand(x)
        return x.exp(), x.sin()


def by_hand_in_branch() -> ScriptCase:
    x = torch.rand(2, 4, 6)
    return ScriptCase(ByHandInBranch(), {"taken": (x,), "not taken": (-x,)}, {})


CONTROL_FLOW = {
    name: SCRIPT_MODELS[name]
    for name in ("router", "adaptive_depth", "shared_weight", "counting_gate", "lstm_loop", "greedy_decoder")
} | {"constant_in_branch": constant_in_branch, "layers_in_branch": layers_in_branch, "by_hand_in_branch": by_hand_in_branch}
"""What the passes do on these is done in branches and in the bodies of loops too."""


def with_regions(model: str, pass_: Pass) -> tuple[Program, list[list[Tensor]]]:
    """The Program of a scripted model, prepared for the pass, and the tensors of each of its calls."""
    this = case(CONTROL_FLOW[model])
    program = captured(torch.jit.script(this.model), *next(iter(this.inputs.values())), frontend="script")
    for earlier in BEFORE.get(pass_.name, ("fuse_conv_bn",) if pass_.name == "fuse_conv_relu" else ()):
        program = CATALOGUE[earlier](program)
    return program, [pytree.tree_leaves(args) for args in this.inputs.values()]


@pytest.mark.parametrize("model", CONTROL_FLOW)
@pytest.mark.parametrize("name", CATALOGUE)
def test_the_invariants_hold_in_regions(name: str, model: str) -> None:
    """As above, on every path; sites have names of their own, the same in every run, and can each be left alone."""
    pass_ = CATALOGUE[name]
    program, calls = with_regions(model, pass_)
    expected = [outputs_of(program, *call) for call in calls]
    after, log = rewritten(pass_, program, *calls[0])
    assert_facts_are_true(after, *calls[-1])
    for call, wanted in zip(calls, expected):
        comparison = compare(wanted, outputs_of(after, *call))
        allowed = smallest_sqnr(pass_.effects, compared_dtypes(after))
        assert not comparison.problem and (comparison.equal or comparison.sqnr_db >= allowed), comparison

    sites = [rewrite.site for rewrite in log.rewrites]
    assert len(set(sites)) == len(sites)
    assert [rewrite.site for rewrite in rewritten(pass_, with_regions(model, pass_)[0], *calls[0])[1].rewrites] == sites
    for site in {*sites[:1], *sites[-1:]}:
        partly, left = rewritten(pass_, program, *calls[0], skip={site})
        assert site not in [rewrite.site for rewrite in left.rewrites]
        if name != "insert_quant_stubs":  # a site is an op; its sites are values between ops
            before, now = (target_of(p, site.split("@")[1]) for p in (program, partly))
            assert before is now
    assert pass_(program, skip=sites) is program


def target_of(program: Program, name: str) -> Any:
    (target,) = [node.target for node in program.all_calls if node.name == name]
    return target


@pytest.mark.parametrize("name", sorted({*CATALOGUE} - {"remove_dead_code", "remove_dropout", NEEDS_A_RUN}))
def test_every_pass_has_something_to_do_in_bodies(name: str) -> None:
    pass_ = CATALOGUE[name]
    inside = []
    for model in CONTROL_FLOW:
        program, _ = with_regions(model, pass_)
        log = RewriteLog.skipping(())
        pass_(program, log=log)
        own = {node.name for node in program.nodes}
        inside += [rewrite.site for rewrite in log.rewrites if rewrite.site.split("@")[1] not in own]
    assert inside


# -- names and words ----------------------------------------------------------------------------------------------------


def module_of(name: str) -> ModuleType:
    (path,) = (ROOT / "passes").glob(f"*/{name}.py")
    return importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))


@pytest.mark.parametrize("name", CATALOGUE)
def test_one_name_for_file_function_and_string(name: str) -> None:
    module = module_of(name)
    assert getattr(module, name) is CATALOGUE[name] and CATALOGUE[name].name == name


@pytest.mark.parametrize("name", CATALOGUE)
def test_the_test_has_the_same_name(name: str) -> None:
    room = Path(str(module_of(name).__file__)).parent.name
    assert (ROOT / "tests" / "passes" / room / f"test_{name}.py").is_file()


@pytest.mark.parametrize("name", CATALOGUE)
def test_the_docstring_opens_with_a_sentence_and_an_equation_or_table(name: str) -> None:
    pass_ = CATALOGUE[name]
    lines = pass_.doc.strip().splitlines()
    assert pass_.doc == module_of(name).__doc__
    assert pass_.summary == lines[0] and lines[0].endswith(".") and lines[1] == "" and lines[2].startswith("    ")
    equation = pass_.equation
    assert "->" in equation or len(equation.splitlines()) > 1


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_pass_that_is_not_exact_has_a_tolerance(name: str) -> None:
    assert CATALOGUE[name].is_exact == (smallest_sqnr(CATALOGUE[name].effects, {torch.float32}) == math.inf)


def test_groups_hold_passes() -> None:
    assert GROUPS and all(name in CATALOGUE for names in GROUPS.values() for name in names)
