"""Half precision: which ops compute in it, where casts stand, what stays float, and that numbers survive."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ir_tools.ir import Program, facts
from ir_tools.ir.dialect import argument, short_name
from ir_tools.rewrite import Journal
from ir_tools.verify.ranges import observe
from passes import CATALOGUE, OptionError
from tests.check import (
    assert_bitwise_equal,
    assert_numbers_agree,
    assert_same_graph,
    captured,
    ops,
    outputs_of,
    relative_error,
    rewritten,
)

cast_half = CATALOGUE["cast_half"]
source = importlib.import_module("passes.precision.cast_half")
policy = importlib.import_module("passes.precision.constraints")
numbers = importlib.import_module("passes.precision.hazards")

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
WITHIN = {"bfloat16": 4e-2, "float16": 5e-3}
"""Relative error allowed to a net of a few layers: some ten times the last bit."""


class Model(nn.Module):
    """`function(self, *inputs)` over layers and buffers given by name."""

    def __init__(self, function: Callable, **parts: nn.Module | Tensor):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, *inputs: Tensor):
        return self.function(self, *inputs)


def check_cast(model: nn.Module, *inputs: Tensor, dtype: str = "bfloat16", level: str = "O2"):
    """Cast, and hold the result to what holds for every model: dtypes at the border, lean casts, near numbers."""
    program = captured(model.eval(), *inputs)
    after, journal = rewritten(cast_half.with_options(dtype=dtype, level=level), program, *inputs)
    expected, got = outputs_of(program, *inputs), outputs_of(after, *inputs)
    assert [t.dtype for t in got] == [t.dtype for t in expected], "outputs keep their dtypes"
    assert [facts.dtype(p) for p in after.placeholders] == [t.dtype for t in inputs], "inputs keep their dtypes"
    assert_casts_are_lean(after)
    error = relative_error(expected, got)
    assert error <= WITHIN[dtype], f"relative error {error:.3g}, allowed {WITHIN[dtype]:g}"
    return after, journal


def assert_casts_are_lean(program: Program) -> None:
    """No cast of a constant, no value cast twice to one dtype, no cast of a lossless cast, no cast to the same dtype."""
    seen = set()
    for node in program.calls:
        if short_name(node.target) != "to":
            continue
        read, dtype = argument(node, "self"), facts.dtype(node)
        assert read.op != "get_attr", f"{node.name} casts a constant at run time"
        assert (read, dtype) not in seen, f"{read.name} is cast to {dtype} twice"
        assert facts.dtype(read) is not dtype, f"{node.name} casts {dtype} to itself"
        if short_name(read.target) == "to":
            before = facts.dtype(argument(read, "self"))
            widens = torch.promote_types(before, facts.dtype(read)) is facts.dtype(read)
            assert not widens, f"{node.name} casts what was cast from {before} without loss"
        seen.add((read, dtype))


def computes_in(program: Program) -> dict[str, torch.dtype | None]:
    """name of the op -> dtype of its result (the last one of that name)."""
    return {short_name(node.target): facts.dtype(node) for node in program.calls}


X = torch.randn(3, 4)
IMAGE = torch.randn(2, 3, 8, 8)


# -- the table of levels ------------------------------------------------------------------------------------------------


def _every_kind(m: Model, x: Tensor) -> Tensor:
    y = m.linear(x)  # matrix
    z = F.silu(y)  # pointwise, all operands half
    s = z + x  # pointwise, one operand a float input
    return m.norm(s).softmax(-1).cumsum(-1)


H, S = "half", torch.float32
LEVELS = {
    "O1": {"linear": H, "silu": H, "add": S, "layer_norm": S, "softmax": S, "cumsum": S},
    "O2": {"linear": H, "silu": H, "add": H, "layer_norm": S, "softmax": S, "cumsum": S},
    "O3": {"linear": H, "silu": H, "add": H, "layer_norm": H, "softmax": H, "cumsum": H},
}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("level", LEVELS)
def test_levels(level: str, dtype: str) -> None:
    model = Model(_every_kind, linear=nn.Linear(4, 4), norm=nn.LayerNorm(4))
    after, _ = check_cast(model, X, dtype=dtype, level=level)
    found = computes_in(after)
    assert {op: found[op] for op in LEVELS[level]} == {
        op: HALVES[dtype] if where is H else where for op, where in LEVELS[level].items()
    }


@pytest.mark.parametrize("dtype", HALVES)
def test_the_graph_is_the_module_with_casts_written_out(dtype: str) -> None:
    half = HALVES[dtype]
    model = Model(lambda m, x: F.relu(m.linear(x)).softmax(-1), linear=nn.Linear(4, 4))
    written_out = Model(lambda m, x: F.relu(m.linear(x.to(half))).float().softmax(-1), linear=nn.Linear(4, 4).to(half))
    after, journal = check_cast(model, X, dtype=dtype)
    assert_same_graph(after, written_out.eval(), X)
    assert [r.rule for r in journal.rewrites] == ["linear", "relu"]
    assert set(after.constants) == {"linear.weight@cast_half", "linear.bias@cast_half"}


def test_the_default_is_bfloat16_at_o2() -> None:
    model = Model(_every_kind, linear=nn.Linear(4, 4), norm=nn.LayerNorm(4)).eval()
    program = captured(model, X)
    explicit = cast_half.with_options(dtype="bfloat16", level="O2")
    assert str(cast_half(program)) == str(explicit(program))


def test_wrong_options_are_refused() -> None:
    with pytest.raises(OptionError, match="dtype must be one of 'bfloat16', 'float16', got 'float8'"):
        cast_half.with_options(dtype="float8")
    with pytest.raises(OptionError, match="level must be one of 'O1', 'O2', 'O3', got 'O0'"):
        cast_half.with_options(level="O0")
    with pytest.raises(OptionError, match="no option 'precision'; it has: dtype, level"):
        cast_half.with_options(precision=16)


# -- where casts stand --------------------------------------------------------------------------------------------------


def _three_readers(m: Model, x: Tensor) -> Tensor:
    return m.a(x) + m.b(x) + F.relu(x)


def _half_and_float_readers(m: Model, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(y) + y.softmax(-1) + y.exp()


def _there_and_back(m: Model, x: Tensor) -> Tensor:
    return m.a(m.a(x).softmax(-1))


def _shared_weight(m: Model, x: Tensor) -> Tensor:
    return F.linear(F.linear(x, m.w), m.w)


def _weight_read_in_float_too(m: Model, x: Tensor) -> Tensor:
    return F.linear(x, m.w) + m.w.exp().sum(0)


CASTS: dict[str, tuple[Callable, int]] = {
    "three readers of one input": (_three_readers, 2),
    "half and float readers": (_half_and_float_readers, 2),
    "there and back": (_there_and_back, 2),
    "a weight shared by two ops": (_shared_weight, 2),
    "a weight read in float too": (_weight_read_in_float_too, 2),
}


@pytest.mark.parametrize("case", CASTS)
def test_each_value_is_cast_once(case: str) -> None:
    function, casts = CASTS[case]
    model = Model(function, a=nn.Linear(4, 4), b=nn.Linear(4, 4), w=torch.randn(4, 4))
    after, _ = check_cast(model, X)
    assert ops(after).count("to") == casts


def test_a_weight_is_stored_once_per_dtype() -> None:
    after, _ = check_cast(Model(_shared_weight, w=torch.randn(4, 4)), X)
    assert list(after.constants) == ["w@cast_half"]
    after, _ = check_cast(Model(_weight_read_in_float_too, w=torch.randn(4, 4)), X)
    assert sorted(after.constants) == ["w", "w@cast_half"]


def test_outputs_read_twice_and_inputs_given_back_keep_their_dtypes() -> None:
    check_cast(Model(lambda m, x: (lambda y: (y, F.relu(y), y, x))(m.a(x)), a=nn.Linear(4, 4)), X)


# -- ops of every shape -------------------------------------------------------------------------------------------------

SHAPES: dict[str, Callable] = {
    "split": lambda m, x: torch.cat([F.relu(t) for t in m.c(x).split(2, 1)], 1),
    "split by sizes": lambda m, x: torch.cat([F.relu(t) for t in m.c(x).split([1, 3], 1)], 1),
    "chunk": lambda m, x: (lambda a, b: a * torch.sigmoid(b))(*m.c(x).chunk(2, 1)),
    "unbind": lambda m, x: torch.stack([t.softmax(0) for t in m.c(x).unbind(0)]),
    "chunk of an input": lambda m, x: m.c(torch.cat(x.chunk(3, 1), 1)),
    "max with indices": lambda m, x: m.c(x).max(1)[0] + 1.0,
    "indices only": lambda m, x: m.c(x).flatten(1).topk(3)[1] + 1,
    "advanced index": lambda m, x: m.c(x)[:, torch.tensor([1, 0]), 1:],
    "integers beside": lambda m, x: m.c(x) * torch.arange(6),
    "comparison": lambda m, x: (lambda y: torch.where(y > 0, y, -y))(m.c(x)),
    "pool and flatten": lambda m, x: F.adaptive_avg_pool2d(F.max_pool2d(m.c(x), 2), 1).flatten(1),
    "interpolate": lambda m, x: F.interpolate(m.c(x), scale_factor=2, mode="bilinear"),
    "norms": lambda m, x: F.instance_norm(F.group_norm(m.c(x), 2)),
    "einsum": lambda m, x: torch.einsum("nchw,ncij->nhwij", m.c(x), m.c(x)),
    "dtype stated": lambda m, x: m.c(x).softmax(1, dtype=torch.float32) @ m.c(x),
    "float64 stated": lambda m, x: m.c(x).sum(1, dtype=torch.float64) * 2,
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("case", SHAPES)
def test_ops_of_many_shapes(case: str, level: str) -> None:
    model = Model(SHAPES[case], c=nn.Conv2d(3, 4, 3))
    if case == "indices only":
        # Positions of the largest values may change places; facts, dtypes and leanness are still held to account.
        program = captured(model.eval(), IMAGE)
        after, _ = rewritten(cast_half.with_options(level=level), program, IMAGE)
        assert_casts_are_lean(after)
        assert outputs_of(after, IMAGE)[0].dtype is torch.int64
        return
    check_cast(model, IMAGE, level=level)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("level", LEVELS)
def test_a_transformer_layer(level: str, dtype: str) -> None:
    check_cast(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(2, 5, 8), dtype=dtype, level=level)


def test_integer_inputs_stay_and_their_embedding_is_half() -> None:
    model = Model(lambda m, i: m.l(m.e(i)), e=nn.Embedding(9, 4), l=nn.Linear(4, 4))
    after, _ = check_cast(model, torch.randint(9, (2, 3)))
    assert ops(after) == ["embedding", "linear", "to"]


def test_integers_that_the_model_makes_float_are_cast_once() -> None:
    after, _ = check_cast(Model(lambda m, i: m.l(i.float()), l=nn.Linear(3, 4)), torch.randint(9, (2, 3)))
    assert ops(after) == ["to", "linear", "to"]


# -- what stays as it is ------------------------------------------------------------------------------------------------


def test_a_float64_island_stays_float64() -> None:
    model = Model(lambda m, x: m.l((m.l(x).double() * 2.5).exp().float()), l=nn.Linear(4, 4))
    after, _ = check_cast(model, X)
    found = [facts.dtype(node) for node in after.calls if short_name(node.target) in ("mul", "exp")]
    assert found == [torch.float64, torch.float64]


def test_promotion_by_a_float64_constant_stays() -> None:
    after, journal = check_cast(Model(lambda m, x: m.l(x) * m.k, l=nn.Linear(4, 4), k=torch.randn(4).double()), X)
    assert computes_in(after)["mul"] is torch.float64
    assert [r.reason for r in journal.refusals] == ["an operand or the result is float64"]


def test_a_sum_that_is_stated_in_float64_reads_float_at_every_level() -> None:
    model = Model(lambda m, x: m.l(x).sum(-1, dtype=torch.float64), l=nn.Linear(4, 4))
    for level in LEVELS:
        after, journal = check_cast(model, X, level=level)
        (total,) = (node for node in after.calls if short_name(node.target) == "sum")
        assert facts.dtype(argument(total, "self")) is torch.float32
        assert [r.reason for r in journal.refusals] == ["an operand or the result is float64"]


def test_a_product_with_a_float64_number_stays_float() -> None:
    """A tensor without axes promotes nothing: the product is float32, and as exact as the model wanted it."""
    after, journal = check_cast(Model(lambda m, x: m.l(x) * m.k, l=nn.Linear(4, 4), k=torch.randn(()).double()), X)
    assert computes_in(after)["mul"] is torch.float32 and after.constants["k"].dtype is torch.float64
    assert [r.reason for r in journal.refusals] == ["an operand or the result is float64"]


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
    after, journal = rewritten(cast_half.with_options(level="O1"), program, X)
    assert ops(after) == ["to", "linear", "to", "add", "relu"]
    assert [r.rule for r in journal.rewrites] == ["linear_act(x, r) -> linear(x) + r", "linear"]
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
    after, journal = rewritten(cast_half, program, X, s)
    assert relative_error(outputs_of(program, X, s), outputs_of(after, X, s)) <= WITHIN["bfloat16"]
    assert journal.refusals and all("in place" in refused.reason for refused in journal.refusals)
    written = [node for node in after.calls if short_name(node.target).endswith("_")]
    assert written and all(facts.dtype(node) is torch.float32 for node in written)


def test_state_stays_float() -> None:
    def function(m: Model, x: Tensor) -> Tensor:
        m.count.add_(1)
        return m.l(x) * m.count

    after, _ = check_cast(Model(function, l=nn.Linear(4, 4), count=torch.zeros(1)), X)
    assert after.constants["count"].dtype is torch.float32 and after.state == {"count"}


def test_ops_in_no_table_stay_float_and_are_listed() -> None:
    after, journal = check_cast(Model(lambda m, x: torch.special.bessel_j0(m.l(x)), l=nn.Linear(4, 4)), X)
    assert [r.reason for r in journal.refusals] == ["special_bessel_j0 is in no table of cast_half"]
    assert ops(after) == ["to", "linear", "to", "special_bessel_j0"]


def test_what_meets_another_half_dtype_or_complex_numbers_stays() -> None:
    """Their promotion would give float32, or complex numbers, whatever is cast."""
    mixed = Model(lambda m, x, h: m.l(m.l(x) * h), l=nn.Linear(4, 4))
    after, journal = check_cast(mixed, X, torch.randn(3, 4).half())
    assert ops(after) == ["to", "linear", "to", "mul", "to", "linear", "to"]
    assert policy.HAS_OTHERS in [r.reason for r in journal.refusals]
    turned = Model(lambda m, x: m.l((m.l(x) * m.turn).real), l=nn.Linear(4, 4), turn=torch.randn(4, dtype=torch.complex64))
    after, journal = check_cast(turned, X)
    assert policy.HAS_OTHERS in [r.reason for r in journal.refusals]


def test_complex_numbers_stay() -> None:
    after, journal = check_cast(Model(lambda m, x: m.l(torch.fft.fft(m.l(x)).abs()), l=nn.Linear(4, 4)), X)
    assert {r.module for r in journal.refusals} == {"fft_fft", "abs_1"}
    assert ops(after) == ["to", "linear", "to", "fft_fft", "abs", "to", "linear", "to"]


@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
@pytest.mark.parametrize("dtype", HALVES)
def test_ops_without_a_kernel_for_half_stay_float(dtype: str, level: str) -> None:
    def function(m: Model, x: Tensor) -> Tensor:
        pooled = F.avg_pool3d(m.c(x), 2)
        return torch.cdist(pooled.flatten(1), pooled.flatten(1) + 1)

    _, journal = check_cast(Model(function, c=nn.Conv3d(2, 3, 1)), torch.randn(2, 2, 4, 4, 4), dtype=dtype, level=level)
    reasons = [r.reason for r in journal.refusals]
    assert reasons.count("torch has no kernel for it in half precision on the CPU") == 2


# -- masks and other large numbers --------------------------------------------------------------------------------------

LOWEST = torch.finfo(torch.float32).min


def _attention(score: Callable[[Tensor, Tensor], Tensor]) -> Callable:
    return lambda m, x, keep: score(m.l(x), keep).softmax(-1) @ m.l(x).t()


MASKS: dict[str, Callable[[float], Callable]] = {
    "masked_fill": lambda low: _attention(lambda s, keep: s.masked_fill(keep == 0, low)),
    "where a scalar": lambda low: _attention(lambda s, keep: torch.where(keep > 0, s, low)),
    "where a tensor": lambda low: _attention(lambda s, keep: torch.where(keep > 0, s, torch.full((), low))),
    "added": lambda low: _attention(lambda s, keep: s + (1.0 - keep) * low),
    "added, reshaped": lambda low: _attention(lambda s, keep: s + ((1.0 - keep) * low)[None].squeeze(0)),
    "scaled dot product": lambda low: (
        lambda m, x, keep: F.scaled_dot_product_attention(
            m.l(x)[None], x[None], x[None], attn_mask=((1.0 - keep) * low)[:, :3]
        )[:, ::2]
    ),  # where everything is masked, the kernel's float sums tell -65504 + 1 from -65504
    "clamped": lambda low: _attention(lambda s, keep: (s * keep).clamp(min=low, max=-low)),
}
# The second row masks everything: attention is then uniform, and NaN where the mask became an infinity.
KEEP = torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("low", [-1e9, LOWEST], ids=["-1e9", "finfo.min"])
@pytest.mark.parametrize("mask", MASKS)
def test_masks_stay_finite(mask: str, low: float, dtype: str, level: str) -> None:
    """apex#1052, fairseq#3575: a mask that overflows raises, or makes NaN of a row that is masked as a whole."""
    model = Model(MASKS[mask](low), l=nn.Linear(4, 4))
    _, journal = check_cast(model, X, KEEP, dtype=dtype, level=level)
    if abs(low) > torch.finfo(HALVES[dtype]).max:
        assert numbers.IS_WIDE in [r.reason for r in journal.refusals], "that a number was out of range is said"
    else:
        assert numbers.IS_WIDE not in [r.reason for r in journal.refusals]


def test_two_masks_may_be_added() -> None:
    """Each one clamped by itself, their sum would overflow again."""
    twice = _attention(lambda s, keep: s.masked_fill(keep == 0, -1e9) + (1.0 - keep) * -1e9)
    check_cast(Model(twice, l=nn.Linear(4, 4)), X, KEEP, dtype="float16")


@pytest.mark.parametrize("dtype", HALVES)
def test_a_constant_mask_is_clamped_ahead_of_time(dtype: str) -> None:
    mask = torch.tensor([0.0, -1e9, LOWEST, float("-inf"), 1.0])
    model = Model(lambda m, x: (m.l(x) + m.mask).softmax(-1), l=nn.Linear(4, 5), mask=mask)
    after, _ = check_cast(model, X, dtype=dtype)
    clamped = after.constants["mask@cast_half"]
    assert clamped.isinf().tolist() == [False, False, False, True, False], "only the user's infinity is infinite"


def test_what_may_be_out_of_range_stays_float_until_something_reads_it_in_half() -> None:
    def function(m: Model, x: Tensor) -> Tensor:
        y = (m.l(x) + 1e9 * x).clamp(-3.0, 3.0).reshape(4, 3)
        return m.k(y)

    after, _ = check_cast(Model(function, l=nn.Linear(4, 4), k=nn.Linear(3, 2)), X, dtype="float16")
    assert ops(after) == ["to", "linear", "to", "mul", "add", "clamp", "reshape", "clamp", "to", "linear", "to"]


def test_infinite_masks_stay_half() -> None:
    model = Model(lambda m, x: m.l(x).masked_fill(x > 9, float("-inf")), l=nn.Linear(4, 4))
    after, journal = check_cast(model, X, dtype="float16")
    assert computes_in(after)["masked_fill"] is torch.float16 and not any(r.reason == numbers.IS_WIDE for r in journal.refusals)


# -- sites and teeth ----------------------------------------------------------------------------------------------------


def test_a_skipped_site_stays_float_and_only_that_one() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).eval()
    program = captured(model, X)
    _, journal = rewritten(cast_half, program, X)
    sites = [r.site for r in journal.rewrites]
    assert sites == [f"cast_half@{name}" for name in ("linear", "silu", "linear_1", "tanh", "linear_2")]
    for i, site in enumerate(sites):
        after, journal = rewritten(cast_half, program, X, skip={site})
        assert [r.site for r in journal.rewrites] == [s for s in sites if s != site]
        found = [facts.dtype(node) for node in after.calls if short_name(node.target) != "to"]
        assert found == [torch.float32 if j == i else torch.bfloat16 for j in range(5)]
        assert_casts_are_lean(after)
    assert cast_half(program, skip=sites) is program


def test_sites_are_the_same_from_run_to_run() -> None:
    model = Model(_every_kind, linear=nn.Linear(4, 4), norm=nn.LayerNorm(4)).eval()
    first, second = (rewritten(cast_half, captured(model, X), X)[1].rewrites for _ in range(2))
    assert first == second and len(first) == 3


def test_an_exponential_in_half_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(lambda m, x: (m.l(x) * 0 + 12.0).exp().log() * x, l=nn.Linear(4, 4))
    check_cast(model, X, dtype="float16")
    monkeypatch.setattr(policy, "FOLLOWS", policy.FOLLOWS | {"exp", "log"})
    monkeypatch.setattr(policy, "INSIDE", policy.INSIDE - {"exp", "log"})
    with pytest.raises(AssertionError, match="relative error"):
        check_cast(model, X, dtype="float16")


@pytest.mark.parametrize("mask", ["masked_fill", "added", "where a tensor"])
def test_an_overflowing_mask_is_noticed(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbers, "numbers_in", lambda node: [])
    with pytest.raises((AssertionError, RuntimeError), match=r"relative error inf|without overflow"):
        check_cast(Model(MASKS[mask](LOWEST), l=nn.Linear(4, 4)), X, KEEP, dtype="float16")


def test_a_wide_result_that_is_not_clamped_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful(source.Caster):
        def _new_cast(self, node, dtype):
            self.wide.clear()
            return super()._new_cast(node, dtype)

    monkeypatch.setattr(source, "Caster", Forgetful)
    with pytest.raises(AssertionError, match="relative error inf"):
        check_cast(Model(MASKS["added"](LOWEST), l=nn.Linear(4, 4)), X, KEEP, dtype="float16", level="O3")


def test_a_cast_that_forgets_the_outputs_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source.Caster, "restore_outputs", lambda self, dtypes: None)
    with pytest.raises(AssertionError, match="outputs keep their dtypes"):
        check_cast(nn.Sequential(nn.Linear(4, 4)), X)


def test_numbers_of_a_deep_net_stay_near() -> None:
    layers = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(6)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    after, _ = rewritten(cast_half.with_options(dtype="float16"), captured(model, IMAGE), IMAGE)
    assert_numbers_agree(model, after, IMAGE, within=WITHIN["float16"])
    with pytest.raises(AssertionError, match="moved by"):
        assert_bitwise_equal([model(IMAGE)], outputs_of(after, IMAGE))


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


# -- what follows from the kinds of ops ----------------------------------------------------------------------------------


def cast_ops(model: nn.Module, *inputs: Tensor, **options: object) -> list[str]:
    """The ops after the cast, without the casts themselves, those in half marked."""
    after, _ = check_cast(model, *inputs, **options)
    names = [(short_name(n.target), facts.dtype(n)) for n in after.calls if short_name(n.target) != "to"]
    return [f"{name}*" if dtype in HALVES.values() else name for name, dtype in names]


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_a_softmax_between_products_needs_no_casts(level: str) -> None:
    """Its half kernel computes in float and rounds once: what casting there and back would give, too."""
    model = Model(lambda m, x: m.l(x) @ m.l(x).t().softmax(-1) @ m.l(x), l=nn.Linear(4, 4)).eval()
    after, _ = check_cast(model, X, level=level)
    assert ops(after).count("to") == 2
    there_and_back = Model(
        lambda m, x: (m.l(x.bfloat16()) @ m.l(x.bfloat16()).t().float().softmax(-1).bfloat16() @ m.l(x.bfloat16())).float(),
        l=nn.Linear(4, 4).bfloat16(),
    ).eval()
    there_and_back.l.load_state_dict(model.l.state_dict())
    assert_bitwise_equal([there_and_back(X)], outputs_of(after, X))


def test_a_softmax_that_somebody_reads_in_float_is_float() -> None:
    model = Model(lambda m, x: (lambda y: (y, m.l(y)))(m.l(x).softmax(-1)), l=nn.Linear(4, 4))
    assert cast_ops(model, X) == ["linear*", "softmax", "linear*"]


def test_a_norm_of_a_float_stream_is_float_at_o1_and_its_stream_too() -> None:
    """As autocast has it: what was added up in float is not rounded for the sake of fewer casts."""

    def block(m: Model, i: Tensor) -> Tensor:
        x = m.embed(i)
        x = x + m.linear(m.norm(x))
        return m.norm(x + m.linear(F.gelu(m.linear(m.norm(x)))))

    model = Model(block, embed=nn.Embedding(9, 4), linear=nn.Linear(4, 4), norm=nn.LayerNorm(4))
    tokens = torch.randint(9, (2, 3))
    stream = ["embedding", "layer_norm", "linear*", "add", "layer_norm", "linear*", "gelu*", "linear*", "add", "layer_norm"]
    assert cast_ops(model, tokens, level="O1") == stream
    everything_but_the_last = [name if name.endswith("*") else f"{name}*" for name in stream[:-1]] + ["layer_norm"]
    assert cast_ops(model, tokens, level="O2") == everything_but_the_last


def test_what_only_moves_floats_is_cast_on_either_side_at_o1() -> None:
    """A transposed input is rounded before or behind: the same numbers; an input that is added to is not."""
    moved = Model(lambda m, x: m.l(F.relu(x.t().reshape(3, 4))), l=nn.Linear(4, 4))
    assert cast_ops(moved, X, level="O1") == ["t*", "reshape*", "relu*", "linear*"]
    assert cast_ops(Model(lambda m, x: m.l(x + 1), l=nn.Linear(4, 4)), X, level="O1") == ["add", "linear*"]
    kept = Model(lambda m, x: (lambda y: (m.l(y), y))(F.relu(x)), l=nn.Linear(4, 4))
    assert cast_ops(kept, X, level="O1") == ["relu", "linear*"]


def test_two_fragile_ops_in_a_row_are_float() -> None:
    """A mean of squares in float, and its root: rounded in between, a norm written by hand would lose digits."""
    norm = Model(lambda m, x: m.l(m.l(x) * (m.l(x).pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()), l=nn.Linear(4, 4))
    for level in ("O1", "O2"):
        found = cast_ops(norm, X, level=level)
        assert {"pow", "mean", "rsqrt"} <= set(found), found


@pytest.mark.parametrize("level", LEVELS)
def test_a_batch_norm_in_half_keeps_float_statistics(level: str) -> None:
    norm = nn.BatchNorm2d(4)
    nn.init.uniform_(norm.running_var, 0.3, 3.0)
    after, _ = check_cast(Model(lambda m, x: m.c(m.n(m.c0(x))), c0=nn.Conv2d(3, 4, 1), n=norm, c=nn.Conv2d(4, 4, 1)), IMAGE,
                          level=level)  # fmt: skip
    assert computes_in(after)["batch_norm"] is torch.bfloat16 and after.constants["n.running_var"].dtype is torch.float32


def test_nothing_is_rounded_for_a_comparison() -> None:
    exact = Model(lambda m, x: torch.where(x > 0.5, m.l(x), 0.0), l=nn.Linear(4, 4))
    after, _ = check_cast(exact, X)
    (compared,) = (argument(n, "self") for n in after.calls if short_name(n.target) == "gt")
    assert compared.op == "placeholder"
    rounded = Model(lambda m, x: m.l(torch.where(m.l(x) > 0.3, m.l(x), 0.0)), l=nn.Linear(4, 4))
    (compared,) = (argument(n, "self") for n in check_cast(rounded, X)[0].calls if short_name(n.target) == "gt")
    assert facts.dtype(compared) is torch.float32, "bfloat16 has no 0.3: it would be compared with 0.30078"
    searched = Model(lambda m, x: m.l(m.l(x).topk(4)[0]), l=nn.Linear(4, 4))
    assert cast_ops(searched, X) == ["linear*", "topk", "getitem*", "linear*"]


def test_a_tensor_filled_with_a_number_is_made_in_half() -> None:
    model = Model(lambda m, x: m.l(x) + torch.ones(4, dtype=torch.float32), l=nn.Linear(4, 4))
    for level in ("O1", "O2"):
        after, _ = check_cast(model, X, level=level)
        assert ops(after) == ["to", "linear", "ones", "add", "to"]
        assert computes_in(after)["ones"] is torch.bfloat16


def test_a_dtype_that_the_model_states_is_kept() -> None:
    model = Model(lambda m, x: m.l(m.l(x).softmax(-1, dtype=torch.float32)), l=nn.Linear(4, 4))
    after, _ = check_cast(model, X, level="O3")
    assert computes_in(after)["softmax"] is torch.float32 and ops(after).count("to") == 3


# -- small numbers --------------------------------------------------------------------------------------------------------

GUARDED: dict[str, Callable] = {
    "norm plus epsilon": lambda m, x: m.l(m.l(x) / (m.l(x).norm(dim=-1, keepdim=True) + 1e-12)),
    "clamped norm": lambda m, x: m.l(m.l(x) / m.l(x).norm(dim=-1, keepdim=True).clamp_min(1e-12).expand(3, 4)),
    "normalize": lambda m, x: m.l(F.normalize(m.l(x), eps=1e-12)),
    "root": lambda m, x: m.l(m.l(x) / (m.l(x).var(-1, keepdim=True, unbiased=False) + 1e-12).sqrt()),
    "inverse root": lambda m, x: m.l(m.l(x) * (m.l(x).var(-1, keepdim=True, unbiased=False) + 1e-12).rsqrt()),
    "constant": lambda m, x: m.l(m.l(x) / (m.l(x).norm(dim=-1, keepdim=True) + m.eps)),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("case", GUARDED)
def test_epsilons_below_half_precision_still_guard(case: str, level: str) -> None:
    """A row of zeros: float16 turns 1e-12 into 0, and 0 / 0 into NaN."""
    linear = nn.Linear(4, 4, bias=False)
    model = Model(GUARDED[case], l=linear, eps=torch.tensor(1e-12)).eval()
    x = torch.cat([torch.zeros(1, 4), torch.randn(2, 4)])
    _, journal = check_cast(model, x, dtype="float16", level=level)
    assert numbers.IS_TINY in [r.reason for r in journal.refusals]
    _, journal = check_cast(model, x, dtype="bfloat16", level=level)
    assert numbers.IS_TINY not in [r.reason for r in journal.refusals], "bfloat16 has the exponents of float32"


def test_an_epsilon_that_is_lost_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(GUARDED["norm plus epsilon"], l=nn.Linear(4, 4, bias=False))
    x = torch.cat([torch.zeros(1, 4), torch.randn(2, 4)])
    monkeypatch.setattr(numbers.Numbers, "numbers_of", lambda self, node: [])
    with pytest.raises(AssertionError, match="relative error inf"):
        check_cast(model, x, dtype="float16", level="O3")


def test_clamped_constants_are_reported() -> None:
    model = Model(lambda m, x: m.l(x) + m.mask, l=nn.Linear(4, 4), mask=torch.tensor([0.0, -1e9, 1.0, 2.0]))
    _, journal = rewritten(cast_half.with_options(dtype="float16"), captured(model.eval(), X), X)
    assert [r.reason for r in journal.refusals] == [numbers.CLAMPED]
    _, journal = rewritten(cast_half, captured(model, X), X)
    assert not journal.refusals


CONSTANTS: dict[str, tuple[Callable, float]] = {
    "tiny weights": (lambda m, x: F.linear(x, m.w) * 1e8, 1e-8),
    "huge weights": (lambda m, x: F.linear(x, m.w) * 1e-6, 1e6),
    "a huge factor": (lambda m, x: m.l(m.l(x) * m.w[:3] * 1e-6), 1e6),
    "a small divisor": (lambda m, x: m.l(m.l(x) / m.w[:3].abs().clamp(min=1e-9) * 1e-8), 1e-8),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("case", CONSTANTS)
def test_constants_that_do_not_fit_keep_their_op_in_float(case: str, level: str) -> None:
    function, scale = CONSTANTS[case]
    model = Model(function, l=nn.Linear(4, 4), w=torch.randn(4, 4) * scale)
    program = CATALOGUE["fold_constants"](captured(model.eval(), X))
    after, journal = rewritten(cast_half.with_options(dtype="float16", level=level), program, X)
    assert relative_error(outputs_of(program, X), outputs_of(after, X)) <= WITHIN["float16"]
    assert {numbers.CONSTANT_LOST, numbers.IS_WIDE} & {r.reason for r in journal.refusals}


def test_small_biases_keep_nothing_in_float() -> None:
    linear, norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
    with torch.no_grad():
        linear.bias.mul_(1e-8), norm.running_mean.add_(1e-8)
    model = Model(lambda m, x: m.l(m.n(m.l(x))), l=linear, n=norm)
    after, _ = check_cast(model, X, dtype="float16")
    assert ops(after) == ["to", "linear", "batch_norm", "linear", "to"]


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


def test_two_outputs_do_not_come_to_share_memory() -> None:
    model = Model(lambda m, x: (lambda y: (y.half(), y.flatten().half(), y.half()))(m.l(x)), l=nn.Linear(4, 4)).eval()
    program = captured(model, X)
    after, _ = rewritten(cast_half.with_options(dtype="float16"), program, X)
    assert len({t.untyped_storage().data_ptr() for t in outputs_of(after, X)}) == 3


def test_a_cast_of_the_model_that_has_become_none_goes() -> None:
    model = Model(lambda m, x: m.l(m.l(x).bfloat16().float() + 1), l=nn.Linear(4, 4)).eval()
    after, _ = check_cast(model, X)
    assert ops(after) == ["to", "linear", "add", "linear", "to"]


def test_a_mask_that_the_model_casts_is_clamped() -> None:
    def attend(m: Model, x: Tensor, keep: Tensor) -> Tensor:
        q = m.l(x)[None]
        return F.scaled_dot_product_attention(q, m.l(q), q, attn_mask=keep.to(torch.float32)[None])

    mask = torch.zeros(3, 3, dtype=torch.int64)
    mask[1] = -(10**9)
    model = Model(attend, l=nn.Linear(4, 4)).eval()
    program = captured(model, X, mask)
    after, _ = rewritten(cast_half.with_options(dtype="float16"), program, X, mask)
    assert ops(after).count("clamp") == 1 and outputs_of(after, X, mask)[0].abs().min() > 0, "a row of zeros was all -inf"


GUARDED_ONES: dict[str, Callable] = {
    "cross entropy": lambda m, x: m.l(torch.log(1 - (m.l(x) * 20).sigmoid().clamp(1e-7, 1 - 1e-7))),
    "atanh": lambda m, x: m.l(torch.atanh((m.l(x) * 9).tanh().clamp(-1 + 1e-4, 1 - 1e-4))),
    "odds": lambda m, x: m.l((lambda p: p / (1 - p))((m.l(x) * 9).sigmoid().clamp(1e-4, 1 - 1e-4)).log()),
}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("level", ["O1", "O2"])
@pytest.mark.parametrize("case", GUARDED_ONES)
def test_bounds_near_one_still_guard(case: str, level: str, dtype: str) -> None:
    """1 - 1e-7 is 1 in half precision, and log(1 - 1) is not finite."""
    model = Model(GUARDED_ONES[case], l=nn.Linear(4, 4)).eval()
    x = torch.cat([X, 8 * X])
    program = captured(model, x)
    after, _ = rewritten(cast_half.with_options(dtype=dtype, level=level), program, x)
    assert relative_error(outputs_of(program, x), outputs_of(after, x)) <= 10 * WITHIN[dtype]


def test_a_small_difference_that_is_divided_by_is_float_where_data_shows_it() -> None:
    model = Model(lambda m, x: m.l(torch.log(1 - m.l(x * 5).sigmoid())), l=nn.Linear(4, 4)).eval()
    x = X * 12
    program = captured(model, x)
    after, journal = seen_on(program, x, dtype="bfloat16")
    assert computes_in(after)["sigmoid"] is torch.float32 and numbers.CANCELS in [r.reason for r in journal.refusals]
    assert cast_half(program) is not program and computes_in(cast_half(program))["sigmoid"] is torch.bfloat16


def test_a_part_that_does_not_fit_keeps_what_it_is_a_part_of_in_float() -> None:
    linear = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        linear.weight[:2] *= 1e-8
    model = Model(lambda m, x: (lambda u, v: u * 1e8 + v)(*m.l(x).chunk(2, -1)), l=linear).eval()
    program = captured(model, X)
    after, _ = seen_on(program, X)
    assert relative_error(outputs_of(program, X), outputs_of(after, X)) <= WITHIN["float16"]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("level", LEVELS)
def test_a_batch_norm_with_computed_parameters_takes_them_in_half(level: str, training: bool) -> None:
    def norm(m: Model, x: Tensor) -> Tensor:
        w, b = m.l(x)[0], m.k
        return m.l(F.batch_norm(m.l(x), None if training else m.m, None if training else m.v, w, b, training))

    check_cast(Model(norm, l=nn.Linear(4, 4), k=torch.randn(4), m=torch.randn(4), v=torch.rand(4) + 0.5), X, level=level)


def test_integers_beside_halves_are_counted_in_float() -> None:
    model = Model(lambda m, x, p: m.l(m.l(x) * 1e-4 * p[:, None]), l=nn.Linear(4, 4)).eval()
    _, journal = check_cast(model, X, torch.tensor([0, 70000, 90000]), dtype="float16")
    assert policy.READS_INTEGERS in [r.reason for r in journal.refusals]
    small = Model(lambda m, x: m.l(m.l(x) * m.steps), l=nn.Linear(4, 4), steps=torch.arange(4))
    assert policy.READS_INTEGERS not in [r.reason for r in check_cast(small, X)[1].refusals], "half holds 0 to 3"


def test_an_op_that_is_told_another_dtype_than_floats_stays() -> None:
    model = Model(lambda m, x: torch.quantize_per_tensor(m.l(x), 0.1, 0, torch.qint8).dequantize(), l=nn.Linear(4, 4)).eval()
    program = captured(model, X)
    after = cast_half(program)
    assert outputs_of(after, X)[0].shape == (3, 4)


def test_every_site_can_be_skipped_and_is_told_once() -> None:
    def parts(m: Model, x: Tensor) -> Tensor:
        a, b = m.l(x).split(2, -1)
        return m.l(torch.cat([b.sort(-1)[0], a.max(-1, keepdim=True)[0].expand(3, 2)], -1))

    program = captured(Model(parts, l=nn.Linear(4, 4)).eval(), X)
    _, journal = rewritten(cast_half, program, X)
    sites = [r.site for r in journal.rewrites]
    assert len(set(sites)) == len(sites) and not any("getitem" in r.rule for r in journal.rewrites)
    for site in sites:
        _, left = rewritten(cast_half, program, X, skip={site})
        assert site not in [r.site for r in left.rewrites]


def test_a_module_decides_before_a_kind_of_op() -> None:
    program = captured(Nested().eval(), X)
    after, _ = rewritten(cast_half.with_options(keep_float=["head"], overrides={"linear": "O2"}), program, X)
    assert [facts.dtype(n) for n in after.calls if short_name(n.target) == "linear"][-1] is torch.float32


def test_a_single_small_number_of_a_layer_keeps_nothing_in_float() -> None:
    linear = nn.Linear(4, 1)
    nn.init.constant_(linear.bias, 3e-5)
    after, _ = check_cast(Model(lambda m, x: m.l(x), l=linear), X, dtype="float16")
    assert computes_in(after)["linear"] is torch.float16


# -- what was seen on data ------------------------------------------------------------------------------------------------


def seen_on(program: Program, *inputs: Tensor, dtype: str = "float16", level: str = "O2") -> tuple[Program, Journal]:
    """Cast with the ranges that the values of `program` take on `inputs`."""
    journal = Journal(ranges=observe(program, [inputs]))
    return cast_half.with_options(dtype=dtype, level=level)(program, journal=journal), journal


OUT_OF_RANGE: dict[str, tuple[Callable, str]] = {
    "a product": (lambda m, x: m.l(m.l(x * 200) * 2000) * 1e-6, "OVERFLOWS"),
    "an exponential": (lambda m, x: m.l((m.l(x).relu() + 15).exp()) * 1e-6, "OVERFLOWS"),
    "a quotient": (lambda m, x: m.l(m.l(x) / (m.l(x).relu() * 1e-3 + 1e-4) * 10) * 1e-3, "OVERFLOWS"),
    "small values": (lambda m, x: m.l(m.l(x) * 0.001 * 0.001 * 0.01) * 1e8, "LOSES"),
    "a small divisor": (lambda m, x: m.l(x) / ((m.l(x) * 0.001).relu() * 0.001 * 0.01 + 0.0).clamp(min=1e-4), ""),
}


@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
@pytest.mark.parametrize("case", OUT_OF_RANGE)
def test_values_that_do_not_fit_stay_float(case: str, level: str) -> None:
    function, why = OUT_OF_RANGE[case]
    model = Model(function, l=nn.Linear(4, 4, bias=False)).eval()
    program = captured(model, X)
    after, journal = seen_on(program, X, level=level)
    expected, got = outputs_of(program, X), outputs_of(after, X)
    assert got[0].isfinite().all() and relative_error(expected, got) <= 2e-2
    reasons = {r.reason for r in journal.refusals}
    assert getattr(numbers, why, None) in reasons or not why
    after, journal = seen_on(program, X, dtype="bfloat16", level=level)
    assert not {numbers.OVERFLOWS, numbers.LOSES, numbers.READS_UNFIT} & {r.reason for r in journal.refusals}


@pytest.mark.parametrize("case", ["a product", "an exponential", "small values"])
def test_without_data_the_same_values_are_lost(case: str) -> None:
    """What the ranges are for: the cast that was not told is not finite, or far off."""
    program = captured(Model(OUT_OF_RANGE[case][0], l=nn.Linear(4, 4, bias=False)).eval(), X)
    got = outputs_of(cast_half.with_options(dtype="float16")(program), X)
    assert not got[0].isfinite().all() or relative_error(outputs_of(program, X), got) > 2e-2


RESCALED: dict[str, Callable] = {
    "a product that is too large": lambda m, x: (x * 300) @ (x * 300).t() * 1e-6,
    "a layer of too large values": lambda m, x: m.b((x * 300) * 300) * 1e-5,
    "a layer of too small values": lambda m, x: m.l(x * 1e-8) * 1e8,
    "a convolution": lambda m, x: m.c(x[None] * 1e6) * 1e-6,
    "a layer and its relu": lambda m, x: fused(x * 1e5, m.b.weight, m.b.bias, None, "relu", []) * 1e-5,
}
fused = torch.ops.torch_passes.linear_act


def with_large_bias() -> nn.Linear:
    linear = nn.Linear(4, 4)
    with torch.no_grad():
        linear.bias.mul_(1e5)
    return linear


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("case", RESCALED)
def test_products_out_of_range_are_scaled_by_a_power_of_two(case: str, level: str) -> None:
    parts = {"l": nn.Linear(4, 4, bias=False), "b": with_large_bias(), "c": nn.Conv1d(3, 2, 3)}
    program = captured(Model(RESCALED[case], **parts).eval(), X)
    after, journal = seen_on(program, X, level=level)
    (rewrite,) = [r for r in journal.rewrites if "->" in r.rule]
    products = [n for n in after.calls if short_name(n.target) in policy.MATRIX]
    assert [facts.dtype(n) for n in products] == [torch.float16], rewrite.rule
    assert relative_error(outputs_of(program, X), outputs_of(after, X)) <= WITHIN["float16"]
    left_alone, journal = cast_half.with_options(dtype="float16", level=level), Journal.skipping({rewrite.site})
    journal.ranges = observe(program, [[X]])
    products = [n for n in left_alone(program, journal=journal).calls if short_name(n.target) in policy.MATRIX]
    assert [facts.dtype(n) for n in products] == [torch.float32]


def test_a_product_that_the_user_keeps_in_float_is_not_scaled() -> None:
    program = captured(Model(RESCALED["a layer of too large values"], b=with_large_bias()).eval(), X)
    journal = Journal(ranges=observe(program, [[X]]))
    after = cast_half.with_options(dtype="float16", keep_float=["linear"])(program, journal=journal)
    assert after is program and not journal.rewrites


def test_a_product_that_cannot_be_scaled_stays_float() -> None:
    """A sigmoid does not scale along, nor does what is multiplied with itself."""
    itself = captured(Model(lambda m, x: (lambda y: y @ y.t() @ y @ y.t())(x * 300) * 1e-9).eval(), X)
    act = lambda m, x: fused(x * 1e5, m.b.weight, m.b.bias, None, "sigmoid", [])  # noqa: E731
    for program in (itself, captured(Model(act, b=nn.Linear(4, 4)).eval(), X)):
        after, journal = seen_on(program, X)
        assert relative_error(outputs_of(program, X), outputs_of(after, X)) <= WITHIN["float16"]


def test_a_scale_that_is_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    rescaling = importlib.import_module("passes.precision.rescaling")
    monkeypatch.setattr(rescaling, "LINEAR_IN", {"linear": ("input", "")})  # forgets the bias
    program = captured(Model(RESCALED["a layer of too large values"], b=with_large_bias()).eval(), X)
    after, _ = seen_on(program, X)
    assert relative_error(outputs_of(program, X), outputs_of(after, X)) > 0.1


MASKED: dict[str, Callable] = {
    "scores, by hand": lambda m, x, mask: (m.l(x) @ m.l(x).t() + mask).softmax(-1) @ m.l(x),
    "moved first": lambda m, x, mask: (m.l(x) @ m.l(x).t() + mask[None].expand(1, 3, 3).squeeze(0)).softmax(-1) @ m.l(x),
    "where": lambda m, x, mask: torch.where(x[:, :3] < 9, mask, m.l(x)[:, :3]).softmax(-1) @ m.l(x),
    "fused": lambda m, x, mask: F.scaled_dot_product_attention(m.l(x)[None], m.l(x)[None], m.l(x)[None], attn_mask=mask[None]),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("low", [-1e9, LOWEST], ids=["-1e9", "finfo.min"])
@pytest.mark.parametrize("case", MASKED)
@pytest.mark.parametrize("seen", [True, False], ids=["seen", "unseen"])
def test_a_mask_among_the_inputs_gives_no_nan(case: str, low: float, dtype: str, level: str, seen: bool) -> None:
    """Also where the example masked nothing, and a call masks a whole row."""
    nothing, a_row = torch.zeros(3, 3), torch.zeros(3, 3)
    a_row[1] = low
    model = Model(MASKED[case], l=nn.Linear(4, 4)).eval()
    program = captured(model, X, nothing)
    after, journal = seen_on(program, X, a_row if seen else nothing, dtype=dtype, level=level)
    (got,) = outputs_of(after, X, a_row)
    (expected,) = outputs_of(program, X, a_row)
    assert got.isfinite().all()
    rows = [0, 2]  # the masked one is uniform in float32 only because -1e9 swallows its scores
    assert relative_error([expected[..., rows, :]], [got[..., rows, :]]) <= WITHIN[dtype]
    clamps = [n for n in after.calls if short_name(n.target) == "clamp"]
    said = {numbers.VALUE_CLAMPED, numbers.OVERFLOWS, numbers.IS_WIDE} & {r.reason for r in journal.refusals}
    assert said or not clamps


@pytest.mark.parametrize("low", [-1e9, LOWEST])
def test_a_mask_among_the_inputs_is_clamped_where_attention_reads_it(low: float) -> None:
    def attend(m: Model, x: Tensor, mask: Tensor) -> Tensor:
        q = m.l(x)[None]
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask.reshape(1, 3, 3).contiguous())[:, ::2]

    # Where everything is masked, the kernel's float sums tell -65504 + 1 from -65504: finite, and no number to compare.
    mask = torch.tensor([[0.0, low, low], [low, low, low], [0.0, 0.0, 0.0]])
    model = Model(attend, l=nn.Linear(4, 4)).eval()
    program = captured(model, X, mask)
    after, _ = seen_on(program, X, mask)
    assert computes_in(after)["scaled_dot_product_attention"] is torch.float16
    assert relative_error(outputs_of(program, X, mask), outputs_of(after, X, mask)) <= WITHIN["float16"]


# -- what the user says ---------------------------------------------------------------------------------------------------


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"keep_float": ["head"]}, "linear* silu* linear* tanh* linear"),
        ({"keep_float": ["body.2"]}, "linear* silu* linear tanh linear*"),
        ({"keep_float": ["body"]}, "linear silu linear tanh linear*"),
        ({"keep_float": ["silu", "head"]}, "linear* silu linear* tanh* linear"),
        ({"keep_float": ["linear"]}, "linear silu linear tanh linear"),
        ({"overrides": {"body": "float", "body.2": "O2"}}, "linear silu linear* tanh* linear*"),
        ({"level": "O1", "overrides": {"head": "float", "body": "O3"}}, "linear* silu* linear* tanh* linear"),
    ],
    ids=str,
)
def test_modules_and_ops_that_the_user_keeps_in_float(options: dict, expected: str) -> None:
    program = captured(Nested().eval(), X)
    after, journal = rewritten(cast_half.with_options(**options), program, X)
    found = [(short_name(n.target), facts.dtype(n)) for n in after.calls if short_name(n.target) != "to"]
    assert " ".join(name + "*" * (dtype is torch.bfloat16) for name, dtype in found) == expected
    kept = [r for r in journal.refusals if r.reason == policy.IS_KEPT]
    assert bool(kept) and all(r.rule == "cast_half" for r in kept)


FUSED = (
    ("fuse_conv_bn", "fuse_conv_relu"),
    ("merge_linear_chains",),
    ("merge_parallel_linears",),
    ("eliminate_common_subexpressions",),
)


@pytest.mark.parametrize("name", ["first", "first.0", "first.1", "act", "batch_norm", "a", "b", "q", "k", "conv2d", "relu"])
def test_what_was_fused_answers_to_the_names_of_all_that_it_stands_for(name: str) -> None:
    """keep_float behind the passes that fuse: any part of an op that is named keeps the op in float."""

    class Fusing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
            self.act = nn.ReLU()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 4)
            self.q, self.k, self.same = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(self.a(self.act(self.first(x))))
            return self.q(y) * self.k(y)

    model = Fusing().eval()
    program = captured(model, IMAGE)
    for pass_ in (name for group in FUSED for name in group):
        program = CATALOGUE[pass_](program)
    assert ops(program) == ["conv_act", "linear", "linear", "split_with_sizes", "getitem", "getitem", "mul"]
    everything = {n.name for n in cast_half(program).calls if facts.dtype(n) is torch.bfloat16 and short_name(n.target) != "to"}
    after = cast_half.with_options(keep_float=[name])(program)
    in_float = everything - {n.name for n in after.calls if facts.dtype(n) is torch.bfloat16}
    kept = {"first": "conv_act", "act": "conv_act", "batch_norm": "conv_act", "conv2d": "conv_act", "relu": "conv_act"}
    expected = kept.get(name.split(".")[0], "linear")
    assert any(n.startswith(expected) for n in in_float), (name, in_float)


def test_overrides_set_levels_of_modules() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Sequential(nn.Linear(4, 4), nn.LogSoftmax(-1)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    after, _ = rewritten(cast_half.with_options(overrides={"b": "O3"}), captured(Two().eval(), X), X)
    dtypes = [facts.dtype(n) for n in after.calls if short_name(n.target) == "log_softmax"]
    assert dtypes == [torch.float32, torch.bfloat16]


def test_names_that_are_not_there_are_refused_with_the_nearest() -> None:
    program = captured(Nested().eval(), X)
    with pytest.raises(OptionError, match=r"'body\.3' is no module path and no op of this graph .*; did you mean body"):
        cast_half.with_options(keep_float=["body.3"])(program)
    with pytest.raises(OptionError, match="'softmacks' is no module path and no op"):
        cast_half.with_options(overrides={"softmacks": "O3"})(program)
    assert ops(cast_half.with_options(keep_float=["softmax"])(program)), "an op that this model has none of"
    assert ops(cast_half.with_options(keep_float=["head"])(program))


def test_options_are_read_from_text_and_written_as_it() -> None:
    pass_ = CATALOGUE["cast_half"].with_options(keep_float="a.b+softmax", overrides="c=O1+d=float")
    assert pass_.given == {"keep_float": ("a.b", "softmax"), "overrides": {"c": "O1", "d": "float"}}
    assert str(pass_) == "cast_half:keep_float=a.b+softmax:overrides=c=O1+d=float"
    for wrong, message in (
        ({"keep_float": 3}, "keep_float must be a list of names, or names joined by '\\+', got 3"),
        ({"keep_float": [""]}, "keep_float must be a list of names"),
        ({"overrides": "a"}, r"overrides\['a'\] must be one of 'O1', 'O2', 'O3', 'float', got ''"),
        ({"overrides": ["a"]}, "overrides must be a dict from names"),
        ({"on_slower": "cry"}, "on_slower must be one of 'warn', 'keep', 'revert', got 'cry'"),
    ):
        with pytest.raises(OptionError, match=message):
            cast_half.with_options(**wrong)
