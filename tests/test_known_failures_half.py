"""What users of other tools suffer in half precision, line by line: the issue, the model, the outcome wanted."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ir_tools.ir import Program, facts
from ir_tools.ir.dialect import argument, short_name
from ir_tools.rewrite.cast import traffic
from passes import OptimizedModel, Report, SlowerWarning, load, optimize
from tests.timers import SpeedComparisons, UseTimer

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
LOWEST = torch.finfo(torch.float32).min
both_dtypes = pytest.mark.parametrize("dtype", HALVES)


def halved(model: nn.Module, *inputs: Tensor, dtype: str = "float16", level: str = "O2", **options: Any) -> OptimizedModel:
    options = {"engine": "aten", "verify": "each", **options}
    cast = f"cast_half:dtype={dtype}:level={level}:on_slower=keep"
    return optimize(model.eval(), ["fuse_conv_bn_relu", cast], example_inputs=inputs, **options)


def reasons(report: Report) -> list[str]:
    return [r.reason for step in report.steps if step.name == "cast_half" for r in step.refusals]


def dtypes_of(program: Program, op: str) -> list[torch.dtype | None]:
    return [facts.dtype(node) for node in program.all_calls if short_name(node.target) == op]


class Attention(nn.Module):
    """One head; `mask(scores)` hides some of them, and makes what it needs itself."""

    def __init__(self, mask: Callable[[Tensor], Tensor]):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(-1, -2) / 8**0.5
        return self.mask(scores).softmax(-1) @ self.v(x)


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


@both_dtypes
def test_pytorch_84092_89241_75956_casts_are_in_the_graph_and_weights_are_cast_ahead(dtype: str, tmp_path: Path) -> None:
    """Autocast and trace: graphs that differ, cannot run in C++, and cast weights on every call."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    x = torch.randn(2, 3, 8, 8)
    fast = halved(model, x, dtype=dtype)
    assert traffic(fast.program).count == 2, "the input and the output"
    for node in fast.program.calls:
        if short_name(node.target) == "to":
            assert argument(node, "self").op != "get_attr", "a weight is cast at run time"
    assert {t.dtype for t in fast.program.constants.values() if t.is_floating_point()} == {HALVES[dtype]}
    fast.save(tmp_path / "model.pt")
    plain = torch.jit.load(tmp_path / "model.pt")  # as C++ does: no autocast around it, none inside
    assert torch.equal(plain(x), fast(x)) and "autocast" not in str(plain.inlined_graph)
    assert torch.equal(load(tmp_path / "model.pt")(x), fast(x))


@both_dtypes
def test_transformers_1344_masks_and_buffers_made_in_forward_follow_the_policy(dtype: str) -> None:
    class MakesThem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.register_buffer("scale", torch.rand(8))

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            mask = torch.ones(x.shape[1], dtype=torch.float32, device=x.device)
            bias = torch.zeros_like(y) + 0.5
            return self.linear(y * mask[:, None] * self.scale + bias)

    fast = halved(MakesThem(), X, dtype=dtype)
    assert {d for op in ("mul", "add", "ones", "zeros_like") for d in dtypes_of(fast.program, op)} <= {HALVES[dtype]}
    assert fast.program.constants["scale@cast_half"].dtype is HALVES[dtype]
    assert traffic(fast.program).count == 2


@both_dtypes
def test_pytorch_145995_42170_62961_no_device_is_baked(dtype: str, tmp_path: Path) -> None:
    """Captured on the CPU, moved, and called there: what follows the input's device still does."""

    class OnTheInputsDevice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            positions = torch.arange(x.shape[1], device=x.device)[:, None] / 10
            return self.linear(x + positions).softmax(-1)

    fast = halved(OnTheInputsDevice(), X, dtype=dtype)
    code = fast.scripted.code
    assert 'torch.device("cpu")' not in code, code
    fast.save(tmp_path / "model.pt")
    on_meta = torch.jit.load(tmp_path / "model.pt", map_location="meta")(X.to("meta"))  # refuses tensors on two devices
    assert on_meta.device.type == "meta" and on_meta.dtype is torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the emitted module cannot be moved to one")
@pytest.mark.parametrize("level", ["O1", "O2"])
def test_a_model_captured_on_the_cpu_and_cast_to_float16_runs_on_cuda(level: str) -> None:
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(2), nn.Linear(36, 16), nn.LayerNorm(16))
    model, x = nn.Sequential(layers, nn.Softmax(-1), nn.Linear(16, 4)), torch.randn(2, 3, 8, 8)
    fast = halved(model, x, level=level)
    expected = model(x)
    moved = fast.scripted.to("cuda")(x.to("cuda"))
    assert moved.device.type == "cuda" and (moved.cpu() - expected).abs().max() <= 1e-2 * expected.abs().max()


MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "apex#1052: masked_fill": lambda s: s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), -1e9),
    "apex#1105: where": lambda s: torch.where(torch.ones_like(s, dtype=torch.bool).tril(), s, LOWEST),
    "fairseq#3575: added": lambda s: s + torch.full_like(s, -1e9).triu(1),
    "lerobot PR#710: added, computed": lambda s: s + (1.0 - torch.ones_like(s).tril()) * LOWEST,
    "a row is masked as a whole": lambda s: s.masked_fill(torch.ones_like(s, dtype=torch.bool).tril(-1).logical_not(), -1e9),
}


@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
@both_dtypes
@pytest.mark.parametrize("mask", MASKS)
def test_masks_do_not_overflow(mask: str, dtype: str, level: str) -> None:
    """apex#1052, #1105, fairseq#3575, lerobot PR#710: clamped, or kept in float, and said."""
    model = Attention(MASKS[mask]).eval()
    fast = halved(model, X, dtype=dtype, level=level)
    error = (fast(X) - model(X)).abs().max() / model(X).abs().max()
    assert fast(X).isfinite().all() and error <= 3e-2
    if dtype == "float16":
        assert any("exceed" in why and "the range of half precision" in why for why in reasons(fast.report))


@pytest.mark.parametrize("low", [-1e9, LOWEST])
def test_float16_attention_with_a_mask_gives_no_nan(low: float) -> None:
    """As an input, and with torch's fused attention."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=(1.0 - mask) * low)

    mask = torch.ones(5, 5).tril()
    mask[2] = 0
    model = Masked().eval()
    for level in ("O1", "O2", "O3"):
        assert halved(model, X, mask, level=level, tolerance=0)(X, mask).isfinite().all()


def test_onnxruntime_11384_onnxconverter_249_tensorrt_4662_what_stays_float_is_found_and_listed() -> None:
    """The user need not guess which nodes would break: they are named, with the reason, from the data."""

    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.second(self.first(x).exp() * 1e6)  # 65504 is the largest number of float16
            return self.last(torch.log_softmax(y * 1e-6, -1))

    fast = halved(Breaks(), X)
    step = next(step for step in fast.report.steps if step.name == "cast_half")
    listed = {r.reason for r in step.refusals}
    assert any("exceed" in why and "the range of half precision" in why for why in listed)
    assert "refused" in str(fast.report) and "range of half precision" in " ".join(str(fast.report).split())
    assert fast(X).isfinite().all() and json.dumps(fast.report.to_dict())


def test_pytorch_86270_118499_ipex_637_slower_is_measured_and_reported(use_timer: UseTimer) -> None:
    """Both models are timed on the machine; here the times are given, so that the outcome is known."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    times = {"without": [1.0] * 5, "with": [2.0] * 5}
    use_timer(SpeedComparisons(times))
    with pytest.warns(SlowerWarning, match="makes the model slower on this machine"):
        fast = optimize(model.eval(), ["cast_half"], example_inputs=torch.randn(2, 8))
    assert "SLOWER" in str(fast.report) and dtypes_of(fast.program, "_linear_pointwise") + dtypes_of(fast.program, "linear")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reverted = optimize(model, ["cast_half:on_slower=revert"], example_inputs=torch.randn(2, 8))
    assert {t.dtype for t in reverted.program.constants.values()} == {torch.float32}


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_mmdeploy_337_a_layer_norm_does_not_overflow(level: str) -> None:
    """Squares of activations beyond 256 are beyond float16: norms, softmax and long sums compute in float."""

    class Norms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.norm = nn.LayerNorm(8)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = self.linear(x) * 900
            by_hand = (y - y.mean(-1, keepdim=True)) / (y.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
            return self.linear(self.norm(y)), self.linear(by_hand), y.sum((0, 1)), self.linear(y).softmax(-1)

    model = Norms().eval()
    for fast in (halved(model, X, level=level), halved(model, X, level=level, dtype="bfloat16")):
        for expected, got in zip(model(X), fast(X)):
            assert got.isfinite().all() and (got - expected).abs().max() <= 4e-2 * expected.abs().max()
