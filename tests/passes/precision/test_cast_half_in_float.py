"""What `cast_half` leaves as it is: other dtypes, what the model states, writes, state, ops in no table."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ir_tools.ir import facts
from ir_tools.ir.dialect import argument, short_name
from passes.precision import constraints
from tests.check import captured, ops, outputs_of, relative_error, rewritten
from tests.passes.precision.half_casts import HALVES, LEVELS, WITHIN, Model, X, cast_half, check_cast, computes_in, reasons
from tests.passes.precision.test_cast_half_ranges import fused

# -- what stays as it is -----------------------------------------------------------------------------------------------


def test_a_float64_island_stays_float64() -> None:
    model = Model(lambda m, x: m.l((m.l(x).double() * 2.5).exp().float()), l=nn.Linear(4, 4))
    after, _ = check_cast(model, X)
    found = [facts.dtype(node) for node in after.calls if short_name(node.target) in ("mul", "exp")]
    assert found == [torch.float64, torch.float64]


def test_promotion_by_a_float64_constant_stays() -> None:
    after, log = check_cast(Model(lambda m, x: m.l(x) * m.k, l=nn.Linear(4, 4), k=torch.randn(4).double()), X)
    assert computes_in(after)["mul"] is torch.float64
    assert [r.reason for r in log.refusals] == ["an operand or the result is float64"]


def test_a_sum_that_is_stated_in_float64_reads_float_at_every_level() -> None:
    model = Model(lambda m, x: m.l(x).sum(-1, dtype=torch.float64), l=nn.Linear(4, 4))
    for level in LEVELS:
        after, log = check_cast(model, X, level=level)
        (total,) = (node for node in after.calls if short_name(node.target) == "sum")
        assert facts.dtype(argument(total, "self")) is torch.float32
        assert [r.reason for r in log.refusals] == ["an operand or the result is float64"]


def test_a_product_with_a_float64_number_stays_float() -> None:
    """A tensor without axes promotes nothing: the product is float32, and as exact as the model wanted it."""
    after, log = check_cast(Model(lambda m, x: m.l(x) * m.k, l=nn.Linear(4, 4), k=torch.randn(()).double()), X)
    assert computes_in(after)["mul"] is torch.float32 and after.constants["k"].dtype is torch.float64
    assert [r.reason for r in log.refusals] == ["an operand or the result is float64"]


def test_a_constant_that_half_holds_does_not_keep_an_op_in_float_at_o1() -> None:
    model = Model(lambda m, x: m.l(x) + m.k, l=nn.Linear(4, 4), k=torch.tensor([1.0, 0.5, -2.0, 3.0]))
    after, _ = check_cast(model, X, level="O1")
    assert computes_in(after)["add"] is torch.bfloat16 and list(after.constants)[-1] == "k@cast_half"


def test_a_constant_that_half_would_round_does_at_o1_as_in_autocast() -> None:
    model = Model(lambda m, x: m.l(x) + m.k, l=nn.Linear(4, 4), k=torch.randn(4))
    assert computes_in(check_cast(model, X, level="O1")[0])["add"] is torch.float32
    assert computes_in(check_cast(model, X, level="O2")[0])["add"] is torch.bfloat16
    number = Model(lambda m, x: m.l(x) * m.k, l=nn.Linear(4, 4), k=torch.tensor(0.3))
    assert computes_in(check_cast(number, X, level="O1")[0])["mul"] is torch.bfloat16, "a number promotes nothing"


@pytest.mark.parametrize("constant", [False, True], ids=["value", "constant"])
def test_a_float_residual_is_added_in_float_at_o1(constant: bool) -> None:
    """Fused with a linear it would be rounded at every layer; a residual that is half stays fused."""

    def block(m: Model, x: Tensor) -> Tensor:
        return fused(x, m.l.weight, m.l.bias, m.r if constant else x, "relu", [])

    program = captured(Model(block, l=nn.Linear(4, 4), r=torch.randn(3, 4)).eval(), X)
    after, log = rewritten(cast_half.with_options(level="O1"), program, X)
    assert ops(after) == ["to", "linear", "to", "add", "relu"]
    assert [r.rule for r in log.rewrites] == ["linear_act(x, r) -> linear(x) + r", "linear"]
    assert ops(rewritten(cast_half, program, X)[0]) == ["to", "linear_act", "to"]
    twice = Model(lambda m, x: block(m, block(m, x)), l=nn.Linear(4, 4), r=torch.randn(3, 4)).eval()
    after, _ = rewritten(cast_half.with_options(level="O1"), captured(twice, X), X)
    assert [d for n, d in zip(ops(after), map(facts.dtype, after.calls)) if n == "add"] == [torch.float32] * 2
    in_half = Model(lambda m, x: fused(m.l(x), m.l.weight, m.l.bias, m.l(x), "relu", []), l=nn.Linear(4, 4)).eval()
    after, _ = rewritten(cast_half.with_options(level="O1"), captured(in_half, X), X)
    assert ops(after) == ["to", "linear", "linear", "linear_act", "to"]


def test_a_float64_model_is_left_alone() -> None:
    program = captured(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).double().eval(), X.double())
    assert cast_half(program) is program


@pytest.mark.parametrize("dtype", HALVES)
def test_a_half_model_is_left_alone(dtype: str) -> None:
    half = HALVES[dtype]
    program = captured(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Softmax(-1)).to(half).eval(), X.to(half))
    assert rewritten(cast_half.with_options(dtype=dtype), program, X.to(half))[0] is program


def test_an_explicit_cast_in_a_half_model_is_read_through() -> None:
    half = torch.bfloat16
    model = Model(lambda m, x: m.b(m.a(x).float()), a=nn.Linear(4, 4).to(half), b=nn.Linear(4, 4))
    after, _ = check_cast(model, X.to(half))
    assert ops(after) == ["linear", "linear", "to"], "what was half before the model's own cast is read as it was"


def test_an_explicit_cast_to_float_before_a_fragile_op_stays() -> None:
    half = torch.bfloat16
    model = Model(lambda m, x: m.a(x).float().softmax(-1), a=nn.Linear(4, 4).to(half))
    program = captured(model.eval(), X.to(half))
    assert cast_half(program) is program


def test_an_explicit_rounding_is_kept() -> None:
    """x.half().float() loses bits on purpose; reading x itself would be another model."""
    model = Model(lambda m, x: m.a(x.half().float()), a=nn.Linear(4, 4))
    program = captured(model.eval(), X)
    after, _ = rewritten(cast_half, program, X)
    assert ops(after)[0] == "to" and facts.dtype(after.calls[0]) is torch.float16


def test_a_half_island_beside_float_keeps_its_dtype() -> None:
    """Also where an op of the island is made anew, for its float operand without axes, and a fragile op reads it."""

    def function(m: Model, x: Tensor, h: Tensor) -> Tensor:
        y = m.island(h * m.scale).softmax(-1)
        return torch.index_add(y, 0, torch.tensor([0, 1, 2]), m.island(y)) * m.sea(x)

    island, sea = nn.Linear(4, 4).to(torch.bfloat16), nn.Linear(4, 4)
    model = Model(function, island=island, sea=sea, scale=torch.tensor(0.5))
    after, _ = check_cast(model, X, torch.randn(3, 4).bfloat16())
    assert computes_in(after)["softmax"] is computes_in(after)["index_add"] is torch.bfloat16


def _write_into_an_input(m: Model, x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    y = m.l(x)
    u = s.add_(y)
    r = u.relu()  # reads before the next write, and must not be cast after it
    z = m.l(s.exp())
    s.add_(100.0)
    return r + z, u.relu()


def _write_behind_a_view(m: Model, x: Tensor, s: Tensor) -> Tensor:
    view = s.add_(m.l(x))[:2]
    s.add_(100.0)
    return view.relu()  # reads what was written last


def _fill_a_buffer(m: Model, x: Tensor, s: Tensor) -> Tensor:
    y = torch.zeros(3, 4)
    y[0] = m.l(x)[0]
    y[1] = m.l(s)[1]
    return y * 2.0


@pytest.mark.parametrize("frontend", ["trace", "export"])
@pytest.mark.parametrize("function", [_write_into_an_input, _write_behind_a_view, _fill_a_buffer])
def test_writes_in_place_stay_in_float_and_in_order(function: Callable, frontend: str) -> None:
    model, s = Model(function, l=nn.Linear(4, 4)).eval(), torch.randn(3, 4)
    program = captured(model, X, s, frontend=frontend)
    after, log = rewritten(cast_half, program, X, s)
    assert relative_error(outputs_of(program, X, s), outputs_of(after, X, s)) <= WITHIN["bfloat16"]
    assert log.refusals and all("in place" in refused.reason for refused in log.refusals)
    written = [node for node in after.calls if short_name(node.target).endswith("_")]
    assert written and all(facts.dtype(node) is torch.float32 for node in written)


def test_state_stays_float() -> None:
    def function(m: Model, x: Tensor) -> Tensor:
        m.count.add_(1)
        return m.l(x) * m.count

    after, _ = check_cast(Model(function, l=nn.Linear(4, 4), count=torch.zeros(1)), X)
    assert after.constants["count"].dtype is torch.float32 and after.state == {"count"}


def test_ops_in_no_table_stay_float_and_are_listed() -> None:
    after, log = check_cast(Model(lambda m, x: torch.special.bessel_j0(m.l(x)), l=nn.Linear(4, 4)), X)
    assert [r.reason for r in log.refusals] == ["cast_half has no entry for special_bessel_j0"]
    assert ops(after) == ["to", "linear", "to", "special_bessel_j0"]


def test_what_meets_another_half_dtype_or_complex_numbers_stays() -> None:
    """Their promotion would give float32, or complex numbers, whatever is cast."""
    mixed = Model(lambda m, x, h: m.l(m.l(x) * h), l=nn.Linear(4, 4))
    after, log = check_cast(mixed, X, torch.randn(3, 4).half())
    assert ops(after) == ["to", "linear", "to", "mul", "to", "linear", "to"]
    assert reasons.HAS_OTHERS in [r.reason for r in log.refusals]
    turned = Model(lambda m, x: m.l((m.l(x) * m.turn).real), l=nn.Linear(4, 4), turn=torch.randn(4, dtype=torch.complex64))
    after, log = check_cast(turned, X)
    assert reasons.HAS_OTHERS in [r.reason for r in log.refusals]


def test_complex_numbers_stay() -> None:
    after, log = check_cast(Model(lambda m, x: m.l(torch.fft.fft(m.l(x)).abs()), l=nn.Linear(4, 4)), X)
    assert {r.module for r in log.refusals} == {"fft_fft", "abs_1"}
    assert ops(after) == ["to", "linear", "to", "fft_fft", "abs", "to", "linear", "to"]


@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
@pytest.mark.parametrize("dtype", HALVES)
def test_ops_without_a_kernel_for_half_stay_float(dtype: str, level: str) -> None:
    def function(m: Model, x: Tensor) -> Tensor:
        pooled = F.avg_pool3d(m.c(x), 2)
        return torch.cdist(pooled.flatten(1), pooled.flatten(1) + 1)

    _, log = check_cast(Model(function, c=nn.Conv3d(2, 3, 1)), torch.randn(2, 2, 4, 4, 4), dtype=dtype, level=level)
    said = [r.reason for r in log.refusals]
    assert said.count("torch has no kernel for it in half precision on the CPU") == 2


# -- sites and teeth ---------------------------------------------------------------------------------------------------


def test_an_exponential_in_half_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(lambda m, x: (m.l(x) * 0 + 12.0).exp().log() * x, l=nn.Linear(4, 4))
    check_cast(model, X, dtype="float16")
    monkeypatch.setattr(constraints, "INSIDE", constraints.INSIDE - {"exp", "log"})
    with pytest.raises(AssertionError, match="relative error"):
        check_cast(model, X, dtype="float16")


class Timestep(nn.Module):
    """Positions, frequencies, sine and cosine: half precision has no digits left for the phase of a large position."""

    def __init__(self, autocast_off: bool = False):
        super().__init__()
        self.register_buffer("frequencies", torch.exp(-torch.arange(16) / 4.0))
        self.linear = nn.Linear(32, 8)
        self.autocast_off = autocast_off

    def phase(self, t):
        return t[:, None] @ self.frequencies[None] if self.autocast_off else t[:, None] * self.frequencies[None]

    def forward(self, t):
        if self.autocast_off:
            with torch.autocast("cpu", enabled=False):
                phase = self.phase(t)
                features = torch.cat([phase.sin(), phase.cos()], 1)
        else:
            phase = self.phase(t)
            features = torch.cat([phase.sin(), phase.cos()], 1)
        return self.linear(features)


@pytest.mark.parametrize("autocast_off", [False, True])
def test_phases_stay_in_float(autocast_off):
    from passes import optimize

    model = Timestep(autocast_off).eval()
    fast = optimize(model, ["cast_half"], example_inputs=torch.tensor([3.0]), frontend="export")
    far = torch.tensor([999.0])
    error = (fast(far) - model(far)).square().sum()
    assert 10 * torch.log10(model(far).square().sum() / error) > 35


# -- small numbers -----------------------------------------------------------------------------------------------------

SILENT: dict[str, Callable] = {
    "truncated": lambda m, x: (m.l(x), (x * 999).long() % 7 + 0.0),
    "truncated behind a product": lambda m, x: (m.l(x), (m.l(x) * 99).to(torch.int32) % 7 + 0.0),
    "made bytes": lambda m, x: (m.l(x), (x.abs() * 60 + 0.5).to(torch.uint8) + 0.0),
    "made double": lambda m, x: (m.l(x), (x * 3.1 + 0.7).double()),
    "searched": lambda m, x: (lambda y: (m.l(x), m.l(y), y.argsort(-1) + 0.0))(x * 0.7),
    "compared": lambda m, x: (lambda y: (m.l(x), m.l(y), (y > 0.7) + 0.0))(x * 0.7),
    "varied": lambda m, x: (lambda y: (m.l(x), m.l(y) * 1e-2, y.var(-1)))(x * 0.7 + 100),
}


@pytest.mark.parametrize("level", ["O1", "O2"])
@pytest.mark.parametrize("case", SILENT)
def test_no_float_value_is_rounded_for_what_decides_by_it(case: str, level: str) -> None:
    """A cast is never saved by computing in half what a cast to integers, a search or a variance reads."""
    model = Model(SILENT[case], l=nn.Linear(4, 4)).eval()
    x = torch.randn(64, 4)
    program = captured(model, x)
    after, _ = rewritten(cast_half.with_options(level=level), program, x)
    expected, got = outputs_of(program, x)[-1], outputs_of(after, x)[-1]
    assert torch.equal(expected, got)


def test_integers_beside_halves_are_counted_in_float() -> None:
    model = Model(lambda m, x, p: m.l(m.l(x) * 1e-4 * p[:, None]), l=nn.Linear(4, 4)).eval()
    _, log = check_cast(model, X, torch.tensor([0, 70000, 90000]), dtype="float16")
    assert reasons.READS_INTEGERS in [r.reason for r in log.refusals]
    small = Model(lambda m, x: m.l(m.l(x) * m.steps), l=nn.Linear(4, 4), steps=torch.arange(4))
    assert reasons.READS_INTEGERS not in [r.reason for r in check_cast(small, X)[1].refusals], "half holds 0 to 3"


def test_an_op_with_another_dtype_argument_than_floats_stays() -> None:
    model = Model(lambda m, x: torch.quantize_per_tensor(m.l(x), 0.1, 0, torch.qint8).dequantize(), l=nn.Linear(4, 4)).eval()
    program = captured(model, X)
    after = cast_half(program)
    assert outputs_of(after, X)[0].shape == (3, 4)
