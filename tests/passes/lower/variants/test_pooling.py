"""Means over all pixels, pooled where that is faster: what is built, and what is left alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ir_tools.rewrite import Call
from passes import CATALOGUE, optimize
from passes.lower.variants.pooling import POOLING_KERNELS, Pooling, workload_key
from tests.check import captured, ops, outputs_of, relative_error, rewritten
from tests.timers import UseTimer, never, winner

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch is built without oneDNN")

lower_onednn = CATALOGUE["lower_onednn"]
WITHIN = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}

MEANS: dict[str, tuple[Callable[[Tensor], Tensor], list[str]]] = {
    "keeps axes": (lambda x: x.mean((2, 3), keepdim=True), ["avg_pool2d"]),
    "drops axes": (lambda x: x.mean((2, 3)), ["avg_pool2d", "flatten"]),
    "axes from behind": (lambda x: x.mean((-1, -2), keepdim=True), ["avg_pool2d"]),
    "pooled to one": (lambda x: F.adaptive_avg_pool2d(x, 1), ["avg_pool2d"]),
}
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "one axis": lambda x: x.mean(3),
    "channels too": lambda x: x.mean((1, 2, 3)),
    "all": lambda x: x.mean(),
    "three axes": lambda x: x[0].mean((1, 2)),
    "in another dtype": lambda x: x.mean((2, 3), dtype=torch.float64),
    "pooled to two": lambda x: F.adaptive_avg_pool2d(x, 2),
    "no pixels": lambda x: x[:, :, :0].mean((2, 3)),
    "float64": lambda x: x.double().mean((2, 3)),
}


class Means(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", WITHIN)
@pytest.mark.parametrize("case", MEANS)
def test_a_mean_is_pooled(case: str, dtype: torch.dtype, layout: torch.memory_format, use_timer: UseTimer) -> None:
    function, expected = MEANS[case]
    x = torch.randn(2, 5, 9, 7, dtype=dtype).contiguous(memory_format=layout) + 1
    program = captured(Means(function).eval(), x)
    use_timer(winner(1))
    after, log = rewritten(lower_onednn, program, x)
    assert ops(after) == expected and len(log.rewrites) == 1
    assert relative_error(outputs_of(program, x), outputs_of(after, x)) <= WITHIN[dtype]
    use_timer(winner(0))
    assert ops(rewritten(lower_onednn, program, x)[0]) == ops(program)


@pytest.mark.parametrize("case", OTHERS)
def test_other_means_are_left_alone(case: str, use_timer: UseTimer) -> None:
    use_timer(never)
    x = torch.randn(2, 5, 9, 7)
    program = captured(Means(OTHERS[case]).eval(), x)
    after, _ = rewritten(lower_onednn, program, x)
    assert ops(after) == ops(program)


def test_a_record_is_replayed(use_timer: UseTimer, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    x = torch.randn(2, 3, 9, 7)
    use_timer(winner(1))
    first = optimize(model, example_inputs=x)
    assert first.report.ops_left["avg_pool2d"] == 1 and "adaptive_avg_pool2d" not in first.report.ops_left
    first.report.tuning_records.save(tmp_path / "tuning.json")
    use_timer(never)
    assert optimize(model, example_inputs=x, tuning_records=tmp_path / "tuning.json").report.ops_left == first.report.ops_left


def test_without_measuring_a_mean_stays() -> None:
    x = torch.randn(2, 5, 9, 7)
    program = captured(Means(MEANS["keeps axes"][0]).eval(), x)
    assert ops(lower_onednn.with_options(variant="fused")(program)) == ops(program)


def test_the_workload_key_and_the_variants_that_are_timed() -> None:
    x = torch.randn(2, 5, 9, 7)
    program = captured(Means(lambda x: x.relu().mean((2, 3))).eval(), x)
    pooling = Pooling.of(Call(program.calls[-1]))
    assert pooling is not None
    assert workload_key(pooling) == f"mean float32 2x5x9x7, {torch.get_num_threads()} threads"
    laid_out = captured(Means(lambda x: x.relu().mean((2, 3))).eval(), x.contiguous(memory_format=torch.channels_last))
    other = Pooling.of(Call(laid_out.calls[-1]))
    assert other is not None and "2x5x9x7 channels last" in workload_key(other)
    results = {name: variant() for name, variant in POOLING_KERNELS.timed_variants(pooling).items()}
    assert results.keys() == {"mean", "pooled"} and torch.allclose(results["mean"], results["pooled"])


def test_a_window_that_is_wrong_is_noticed(use_timer: UseTimer, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 5, 9, 7)
    program = captured(Means(MEANS["keeps axes"][0]).eval(), x)
    use_timer(winner(1))
    of = Pooling.of

    def smaller(call: Call) -> Pooling | None:
        pooling = of(call)
        if pooling is not None:
            pooling.window[0] -= 1
        return pooling

    monkeypatch.setattr(Pooling, "of", staticmethod(smaller))
    assert relative_error(outputs_of(program, x), outputs_of(lower_onednn(program), x)) > 1e-2
