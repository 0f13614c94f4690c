"""Merging linears that read one value: it rewrites, it refuses, the numbers agree, the numbers have teeth."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ir_tools.rewrite import parallel
from passes import CATALOGUE, optimize
from tests.check import assert_numbers_agree, assert_sites_can_be_skipped, captured, ops, relative_error, rewritten
from tests.models import bert_base

merge_parallel_linears = CATALOGUE["merge_parallel_linears"]

EXACT = 1e-10


class Heads(nn.Module):
    """Three linears of one input, of several widths; `biases` says which of them has one."""

    def __init__(self, combine: Callable | None = None, biases: tuple[bool, ...] = (True, True, True), between=lambda x: x):
        super().__init__()
        self.combine = combine or (lambda q, k, v: q.sin().sum() + k.cos().sum() + v.exp())
        self.between = between
        self.q, self.k, self.v = (nn.Linear(6, n, bias=b) for n, b in zip((4, 5, 3), biases))

    def forward(self, x: Tensor):
        x = self.between(x)
        return self.combine(self.q(x), self.k(x), self.v(x))


X = torch.randn(2, 7, 6, dtype=torch.float64)


def check_merged(model: nn.Module, x: Tensor = X) -> None:
    after, log = rewritten(merge_parallel_linears, captured(model.double().eval(), x), x)
    assert ops(after).count("linear") == 1 and ops(after).count("split_with_sizes") == 1 and len(log.rewrites) == 1
    assert_numbers_agree(model, after, x, within=EXACT)


# -- it rewrites, and the numbers agree ---------------------------------------------------------------------------------


@pytest.mark.parametrize("biases", [(True, True, True), (False, False, False), (False, True, False), (True, False, True)])
def test_linears_of_one_input_are_merged(biases: tuple[bool, ...]) -> None:
    check_merged(Heads(biases=biases))


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 4, 6)])
def test_any_number_of_axes(shape: tuple[int, ...]) -> None:
    check_merged(Heads(), torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize("frontend", ["trace", "export", "script"])
def test_the_graph_is_one_linear_and_one_split(frontend: str) -> None:
    model = Heads(lambda q, k, v: (q.sin(), k.cos(), v.exp())) if frontend != "script" else Scripted()
    after, _ = rewritten(merge_parallel_linears, captured(model.double().eval(), X, frontend=frontend), X)
    assert ops(after)[:5] == ["linear", "split_with_sizes", "getitem", "getitem", "getitem"]
    assert {name: tuple(t.shape) for name, t in after.constants.items()} == {
        "q.weight@merge_parallel_linears": (12, 6),
        "q.weight@merge_parallel_linears_bias": (12,),
    }


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 4), nn.Linear(6, 5), nn.Linear(6, 3)

    def forward(self, x: Tensor):
        return self.q(x).sin(), self.k(x).cos(), self.v(x).exp()


def test_query_key_and_value_of_every_layer_of_bert() -> None:
    pytest.importorskip("transformers")
    sizes = dict(hidden_size=16, num_attention_heads=2, intermediate_size=32, vocab_size=50, num_hidden_layers=3)
    model, tokens = bert_base(**sizes, max_position_embeddings=32).model.eval().double(), torch.randint(50, (2, 8))
    program = captured(model, tokens)
    after, log = rewritten(merge_parallel_linears, program, tokens)
    assert [rewrite.module for rewrite in log.rewrites] == [f"encoder.layer.{i}.attention.self.query" for i in range(3)]
    assert ops(program).count("linear") == 19 and ops(after).count("linear") == 13  # with the pooler
    assert relative_error(program.run(tokens), after.run(tokens)) <= EXACT


def test_one_linear_for_all_three_has_nothing_to_merge() -> None:
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).reshape(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
            return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 8))

    x = torch.randn(2, 5, 8)
    program = captured(Block().eval(), x)
    after, log = rewritten(merge_parallel_linears, program, x)
    assert after is program and not log.refusals


@pytest.mark.parametrize("engine", ["aten", "onednn_ops"])
def test_it_runs_through_optimize(engine: str) -> None:
    if engine == "onednn_ops" and not torch.backends.mkldnn.is_available():
        pytest.skip("no oneDNN")
    model, x = Heads().eval(), X.float()
    fast = optimize(model, "merge_parallel_linears", example_inputs=x, engine=engine)
    torch.testing.assert_close(fast(x), model(x))


# -- it refuses ---------------------------------------------------------------------------------------------------------

WRITTEN = "its operands or result are written in place"
CONSTANTS = "its weight and bias are not constants known now"
OUTPUT = "its result is the model's output, which must not be a part of a larger tensor"
OTHERS = "the others have weights of another dtype, or are refused"


def fuses(user: str) -> str:
    return f"its user {user} would fuse into it, which is worth more"


def refusals(model: nn.Module, *inputs: Tensor) -> list[str]:
    inputs = inputs or (X.float(),)
    program = captured(model.eval(), *inputs)
    after, log = rewritten(merge_parallel_linears, program, *inputs)
    assert after is program and not log.rewrites
    return [refused.reason for refused in log.refusals]


def test_one_that_an_activation_or_a_sum_would_fuse_into_stays() -> None:
    model = Heads(lambda q, k, v: F.gelu(q).sum() + F.relu(k).sum() + (v + v.sin()).sum())
    assert refusals(model) == [fuses("gelu"), fuses("relu"), OTHERS]  # v has two users: nothing would fuse
    model = Heads(lambda q, k, v: F.gelu(q).sum() + (k + X[..., :5].float()).sum() + F.relu(v).sum())
    assert refusals(model) == [fuses("gelu"), fuses("add"), fuses("relu")]


def test_the_others_are_merged_all_the_same() -> None:
    model = Heads(lambda q, k, v: F.gelu(q).sum() + k.cos().sum() + v.exp()).double()
    after, log = rewritten(merge_parallel_linears, captured(model.eval(), X), X)
    assert ops(after).count("linear") == 2 and len(log.rewrites) == 1
    assert [refused.reason for refused in log.refusals] == [fuses("gelu")]
    assert_numbers_agree(model, after, X, within=EXACT)


def test_outputs_stay_tensors_of_their_own() -> None:
    assert refusals(Heads(lambda q, k, v: (q, k.reshape(-1), v[0]))) == [OUTPUT] * 3
    assert refusals(Heads(lambda q, k, v: (q.sin(), k, v))) == [OUTPUT] * 2 + [OTHERS]


class RunTimeWeights(nn.Module):
    def forward(self, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.linear(x, w).sin() + F.linear(x, w, b).cos()


def test_runtime_weights_are_refused() -> None:
    assert refusals(RunTimeWeights(), torch.randn(2, 6), torch.randn(4, 6), torch.randn(4)) == [CONSTANTS] * 2


class ResultWritten(Heads):
    def forward(self, x: Tensor):
        q, k, v = self.q(x), self.k(x), self.v(x)
        q[0].mul_(2)
        k[0].mul_(2)
        return q.sin().sum() + k.sum() + v.exp()


class InputWritten(Heads):
    def forward(self, x: Tensor):
        q = self.q(x)
        x[0].mul_(2)
        return q.sin().sum() + self.k(x).sin().sum()


def test_what_is_written_is_refused() -> None:
    observable = "the graph writes in place or draws at random, so that it matters how a part of a larger tensor lies in memory"
    assert refusals(ResultWritten()) == [WRITTEN, WRITTEN, observable]
    assert refusals(InputWritten()) == [WRITTEN] * 2


def test_linears_of_other_values_are_no_group() -> None:
    class Two(Heads):
        def forward(self, x: Tensor):
            return self.q(x).sin().sum() + self.k(x.exp()).cos().sum()

    assert refusals(Two()) == []


def test_each_site_can_be_skipped() -> None:
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Heads(lambda q, k, v: q.sin().sum() + k.cos().sum() + v.exp().sum()), Heads()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(x + self.a(x))

    model = Twice().double().eval()
    assert_sites_can_be_skipped(merge_parallel_linears, lambda: captured(model, X), X)


# -- the numbers have teeth ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [lambda ts: torch.cat(ts[::-1]), lambda ts: torch.cat(ts).flip(0)])
def test_weights_joined_in_the_wrong_order_are_noticed(wrong: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "joined", wrong)
    with pytest.raises(AssertionError, match="relative error"):
        check_merged(Heads())
