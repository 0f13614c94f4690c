"""Attention that `fuse_attention` fused, taken apart again where that is faster: what is built, measured, and left alone."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ir_tools.ir import Program
from ir_tools.rewrite import Artifacts, Call
from passes import CATALOGUE, DEFAULT, load, optimize
from passes.lower.variants.attention import ATTENTION, ATTENTION_KERNELS, Attention, is_ours, variants_of, workload_key
from passes.tune.tuning_record import TuningRecords
from tests.check import assert_sites_can_be_skipped, captured, graph_lines, ops, outputs_of, relative_error, rewritten
from tests.timers import UseTimer, never, winner

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch is built without oneDNN")

fuse_attention, lower_onednn = CATALOGUE["fuse_attention"], CATALOGUE["lower_onednn"]
lowering = importlib.import_module("passes.lower.variants.attention")

WITHIN = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2}
MASKS: dict[str, tuple[Callable[[Tensor], Tensor], list[str]]] = {
    "none": (lambda scores: scores, []),
    "mask": (lambda scores: scores + torch.linspace(-3, 3, 36).reshape(6, 6).to(scores.dtype), ["add"]),
    "causal": (lambda scores: scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -math.inf), ["add"]),
}


class SelfAttention(nn.Module):
    """Three heads of four over six tokens, by hand, as often as `layers` says."""

    def __init__(self, mask: str = "none", layers: int = 1, scale: float = 0.5) -> None:
        super().__init__()
        self.masked, self.layers, self.scale = MASKS[mask][0], layers, scale

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.layers):
            q = x.view(-1, 6, 3, 4).transpose(1, 2)
            k, v = q.cos(), q.sin()
            scores = self.masked(q @ k.transpose(-2, -1) * self.scale)
            x = (scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, 6, 12)
        return x


def fused(mask: str = "none", dtype: torch.dtype = torch.float32, **options) -> tuple[Program, Tensor]:
    """SelfAttention with the fused op, and an input."""
    x = torch.randn(2, 6, 12, dtype=dtype)
    program = CATALOGUE["fold_constants"](captured(SelfAttention(mask, **options).eval(), x))
    after = fuse_attention(program)
    assert "scaled_dot_product_attention" in ops(after)
    return after, x


def core(program: Program) -> list[str]:
    """The ops that are of attention."""
    return [name for name in ops(program) if name not in ("view", "reshape", "cos", "sin")]


# -- the best variant is built ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", WITHIN)
@pytest.mark.parametrize("mask", MASKS)
def test_it_is_taken_apart_where_that_is_faster(use_timer: UseTimer, mask: str, dtype: torch.dtype) -> None:
    program, x = fused(mask, dtype)
    use_timer(winner(1))
    after, log = rewritten(lower_onednn, program, x)
    apart = ["mul", "transpose", "matmul", *MASKS[mask][1], "softmax", "matmul"]
    assert core(after) == ["transpose", *apart, "transpose"]
    assert relative_error(outputs_of(program, x), outputs_of(after, x)) < WITHIN[dtype]
    assert relative_error([SelfAttention(mask)(x)], outputs_of(after, x)) < WITHIN[dtype]
    assert [refusal.reason for refusal in log.refusals] == ["the variant apart is faster here: 1000 ms fused, 0 ms apart"]


@pytest.mark.parametrize("mask", MASKS)
def test_it_stays_fused_where_that_is_faster(use_timer: UseTimer, mask: str) -> None:
    program, x = fused(mask)
    use_timer(winner(0))
    artifacts = Artifacts()
    after, log = rewritten(lower_onednn, program, x, artifacts=artifacts)
    assert ops(after) == ops(program) and not log.refusals
    assert len(log.rewrites) == len(artifacts[TuningRecords].measured) == 1
    assert relative_error(outputs_of(program, x), outputs_of(after, x)) == 0
    use_timer(never)
    artifacts = Artifacts()
    unmeasured, _ = rewritten(lower_onednn.with_options(variant="fused"), program, x, artifacts=artifacts)
    assert graph_lines(unmeasured) == graph_lines(after) and TuningRecords not in artifacts


def test_a_scale_of_one_is_no_op(use_timer: UseTimer) -> None:
    program, x = fused(scale=1.0)
    use_timer(winner(1))
    after, _ = rewritten(lower_onednn, program, x)
    assert "mul" not in ops(after) and relative_error(outputs_of(program, x), outputs_of(after, x)) < 1e-5


def test_sites_are_the_same_whatever_variant_is_built(use_timer: UseTimer) -> None:
    program, x = fused("mask", layers=2)
    found = []
    for position in range(2):
        use_timer(winner(position))
        artifacts = Artifacts()
        _, log = rewritten(lower_onednn, program, x, artifacts=artifacts)
        found.append([rewrite.site for rewrite in log.rewrites])
        assert len(artifacts[TuningRecords].measured) == 1  # equal workloads once
        assert_sites_can_be_skipped(lower_onednn, lambda: fused("mask", layers=2)[0], x)
    assert found[0] == found[1] and len(found[0]) == 2


def test_causal_masks_of_one_size_are_one_constant(use_timer: UseTimer) -> None:
    program, x = fused("causal", layers=3)
    use_timer(winner(1))
    after, _ = rewritten(lower_onednn, program, x)
    used = {str(n.target) for n in after.nodes if n.op == "get_attr" and n.users}
    assert ops(after).count("softmax") == 3 and len(used) == 1


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_a_record_gives_the_same_ops(use_timer: UseTimer, tmp_path: Path, half: bool) -> None:
    model, x = SelfAttention("causal").eval(), torch.randn(2, 6, 12)
    pipeline = [*DEFAULT, "fuse_attention", *(["cast_half"] if half else [])]
    use_timer(winner(1))
    first = optimize(model, pipeline, example_inputs=x)
    assert "softmax" in first.report.ops_left and "scaled_dot_product_attention" not in first.report.ops_left
    torch.testing.assert_close(first(x), model(x), **(dict(atol=0.05, rtol=0.05) if half else {}))
    first.report.tuning_records.save(tmp_path / "tuning.json")
    use_timer(never)
    again = optimize(model, pipeline, example_inputs=x, tuning_records=tmp_path / "tuning.json")
    assert graph_lines(again.program) == graph_lines(first.program)
    assert again.report.tuning_records.replayed == first.report.tuning_records.measured
    again.save(tmp_path / "model.pt")
    torch.testing.assert_close(load(tmp_path / "model.pt")(x), first(x), rtol=0, atol=0)


def test_a_batch_that_is_free_stays_free(use_timer: UseTimer) -> None:
    model, x = SelfAttention("causal").eval(), torch.randn(2, 6, 12)
    use_timer(winner(1))
    batch = {"x": {0: torch.export.Dim("batch", max=64)}}
    fast = optimize(model, [*DEFAULT, "fuse_attention"], example_inputs=x, dynamic_shapes=batch)
    assert "softmax" in fast.report.ops_left and len(fast.report.tuning_records.measured) == 1
    for n in (2, 5):
        y = torch.randn(n, 6, 12)
        torch.testing.assert_close(fast(y), model(y))


# -- what is measured ---------------------------------------------------------------------------------------------------


def attentions(program: Program) -> list[Attention]:
    found = [Attention.of(Call(node)) for node in program.calls if node.target is ATTENTION]
    return [a for a in found if a is not None]


@pytest.mark.parametrize("mask", MASKS)
def test_the_variants_that_are_timed_compute_the_same(mask: str) -> None:
    program, _ = fused(mask)
    (attention,) = attentions(program)
    timed = ATTENTION_KERNELS.timed_variants(attention)
    one, other = (timed[name]() for name in variants_of(attention))
    assert relative_error([one], [other]) < 1e-5 and one.shape == (2, 3, 6, 4)
    tensors = timed["fused"].args[1]
    assert tensors.q.stride() == tensors.k.stride() == (72, 4, 12, 1)  # heads behind tokens, as in the model


def test_a_workload_key_holds_what_speed_depends_on() -> None:
    threads = torch.get_num_threads()
    at = "2x3x6x4 at 72x4x12x1"
    (attention,) = attentions(fused("mask")[0])
    line = f"attention float32, q {at}, k {at}, v {at}, mask 6x6 at 6x1, scaled, {threads} threads"
    assert workload_key(attention) == line
    (causal,) = attentions(fused("causal", torch.bfloat16, scale=1.0)[0])
    assert workload_key(causal) == f"attention bfloat16, q {at}, k {at}, v {at}, causal, {threads} threads"


# -- what is left alone -------------------------------------------------------------------------------------------------


class Users(nn.Module):
    """Attention that the model itself calls fused."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **self.options)


def qkv(heads: int = 3) -> tuple[Tensor, ...]:
    return torch.randn(2, 3, 6, 4), torch.randn(2, heads, 6, 4), torch.randn(2, heads, 6, 4)


def test_attention_that_the_user_fused_is_left_alone(use_timer: UseTimer) -> None:
    use_timer(never)
    program = captured(Users().eval(), *qkv())
    after, log = rewritten(lower_onednn, program, *qkv())
    assert after is program and not log.refusals


def test_beside_one_of_ours_too(use_timer: UseTimer) -> None:
    class Both(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention((q @ k.mT).softmax(-1) @ v, k, v)

    inputs = qkv()
    program = fuse_attention(captured(Both().eval(), *inputs))
    assert [is_ours(Call(node)) for node in program.calls] == [True, False]
    use_timer(winner(1))
    after, log = rewritten(lower_onednn, program, *inputs)
    assert ops(after) == ["transpose", "matmul", "softmax", "matmul", "scaled_dot_product_attention"]
    assert len(log.rewrites) == 1 and relative_error(outputs_of(program, *inputs), outputs_of(after, *inputs)) < 1e-5


USES = [{}, {"is_causal": True}, {"attn_mask": torch.randn(6, 6)}, {"scale": -0.3}, {"attn_mask": torch.randn(3, 1, 6)}]


@pytest.mark.parametrize("options", USES, ids=str)
def test_it_is_taken_apart_with_any_arguments(use_timer: UseTimer, monkeypatch: pytest.MonkeyPatch, options: dict) -> None:
    """The variants compute the same; with the default scale, too."""
    monkeypatch.setattr(lowering, "is_ours", lambda call: call.target is ATTENTION)
    use_timer(winner(1))
    inputs = qkv()
    program = captured(Users(**options).eval(), *inputs)
    after, log = rewritten(lower_onednn, program, *inputs)
    assert ops(after).count("softmax") == 1 and ATTENTION not in {node.target for node in after.calls}
    assert relative_error(outputs_of(program, *inputs), outputs_of(after, *inputs)) < 1e-5


@pytest.mark.parametrize(
    "options", [{"dropout_p": 0.1}, {"enable_gqa": True}, {"attn_mask": torch.ones(6, 6).tril().bool()}], ids=str
)
def test_other_uses_of_the_op_stay(use_timer: UseTimer, monkeypatch: pytest.MonkeyPatch, options: dict) -> None:
    monkeypatch.setattr(lowering, "is_ours", lambda call: call.target is ATTENTION)
    use_timer(never)
    inputs = qkv(heads=1 if "enable_gqa" in options else 3)
    program = captured(Users(**options).eval(), *inputs)
    assert lower_onednn(program) is program


@pytest.mark.parametrize("position", [0, 1])
def test_observable_layouts_are_kept(use_timer: UseTimer, monkeypatch: pytest.MonkeyPatch, position: int) -> None:
    class Draws(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            y = F.scaled_dot_product_attention(q, k, v)
            return y + torch.rand_like(y)

    monkeypatch.setattr(lowering, "is_ours", lambda call: call.target is ATTENTION)
    use_timer(winner(position))
    inputs = qkv()
    program = captured(Draws().eval(), *inputs)
    assert program.layout_is_observable
    after, _ = rewritten(lower_onednn, program, *inputs)
    found = []
    for candidate in (program, after):
        torch.manual_seed(0)
        found.append(outputs_of(candidate, *inputs))
    assert relative_error(*found) < 1e-5
    assert [node.target for node in program.calls].count(ATTENTION) == 1


# -- the numbers have teeth ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["scale", "later"])
def test_a_wrong_variant_is_noticed(use_timer: UseTimer, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    from dataclasses import replace

    right, lost = Attention.of, {"scale": 1.0} if wrong == "scale" else {"causal": False}
    monkeypatch.setattr(Attention, "of", lambda *given: replace(right(*given), **lost))
    use_timer(winner(1))
    program, x = fused("causal")
    after, _ = rewritten(lower_onednn, program, x)
    assert relative_error(outputs_of(program, x), outputs_of(after, x)) > 1e-2
