"""One model per guard of `cast_half`: what it keeps in float, and the nearest model that it does not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ir_tools.ir import Draft, Program, facts
from ir_tools.ir.dialect import argument, aten, short_name
from ir_tools.rewrite import RewriteLog
from passes.precision.constraints import Policy, PrecisionOptions
from passes.precision.op_table import PERIODIC
from passes.precision.rescaling import LARGEST_SHIFT
from tests.check import captured, outputs_of, relative_error, rewritten
from tests.passes.precision.half_casts import HALVES, LEVELS, Model, X, cast_half, check_cast, reasons, seen_on

FLOAT16_MAX = torch.finfo(torch.float16).max


def marked(program: Program) -> list[str]:
    """The ops without casts and without the parts of several results, those whose result is half marked."""
    nodes = [n for n in program.calls if short_name(n.target) not in ("to", "getitem")]
    return [short_name(n.target) + "*" * (facts.dtype(n) in HALVES.values()) for n in nodes]


def cast_half_of(model: nn.Module, *inputs: Tensor) -> tuple[Program, RewriteLog]:
    return rewritten(cast_half.with_options(dtype="float16", level="O3"), captured(model.eval(), *inputs), *inputs)


def cast(model: nn.Module, *inputs: Tensor, dtype: str = "float16", level: str = "O3") -> tuple[list[str], set[str]]:
    """The marked ops, and the reasons why some stay float, without data. At O3 what nothing keeps in float is half."""
    after, log = rewritten(cast_half.with_options(dtype=dtype, level=level), captured(model.eval(), *inputs), *inputs)
    return marked(after), {r.reason for r in log.refusals}


def identity() -> nn.Linear:
    linear = nn.Linear(4, 4, bias=False)
    nn.init.eye_(linear.weight)
    return linear


# -- what was seen on data ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share, expected", [(0.5, "mul"), (0.3, "mul"), (0.2, "mul*")])
def test_what_comes_near_the_end_of_the_range_stays_float(share: float, expected: str) -> None:
    """Other data may be a few times as large as what was seen."""
    model = Model(lambda m, x: m.l(x) * (share * FLOAT16_MAX), l=identity()).eval()
    x = torch.tensor([[1.0, 0.5, -0.25, 0.75]])
    after, log = seen_on(captured(model, x), x)
    assert marked(after) == ["linear*", expected]
    assert (reasons.OVERFLOWS in {r.reason for r in log.refusals}) == (expected == "mul")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("moved", [False, True], ids=["at once", "moved"])
def test_a_divisor_of_which_one_number_would_become_zero_stays_float(moved: bool, level: str) -> None:
    """The sums of squares do not see one small number among large ones; 0 / 0 does."""

    def divide(m: Model, x: Tensor, d: Tensor) -> Tensor:
        divisor = m.l(d)
        return m.l(x) * m.mask / (divisor.reshape(4, 1).t() if moved else divisor)

    model = Model(divide, l=identity(), mask=torch.tensor([1.0, 1.0, 1.0, 0.0])).eval()
    d = torch.tensor([[1.0, 2.0, 3.0, 1e-9]])
    program = captured(model, X, d)
    after, log = seen_on(program, X, d, level=level)
    assert relative_error(outputs_of(program, X, d), outputs_of(after, X, d)) <= 5e-3
    assert reasons.LOSES in {r.reason for r in log.refusals}
    model.function = lambda m, x, d: m.l(x) * m.l(d)  # a factor may become zero
    _, log = seen_on(captured(model, X, d), X, d, level=level)
    assert reasons.LOSES not in {r.reason for r in log.refusals}


@pytest.mark.parametrize("magnitudes, expected", [((1, 1), "abs"), ((1, 2), "abs*"), ((0.5, 0.5), "abs")])
def test_values_that_lose_one_bit_stay_float(magnitudes: tuple[float, float], expected: str) -> None:
    """Below 2^-14 float16 has one bit less for each halving: 6 dB. Half of the values there cost 2 dB."""
    x = torch.tensor(magnitudes * 2)[None] * (1.5 * 2.0**-15)
    after, log = seen_on(captured(Model(lambda m, x: m.l(x).abs(), l=identity()).eval(), x), x)
    assert marked(after)[-1] == expected
    assert ({reasons.LOSES, reasons.READS_UNFIT} <= {r.reason for r in log.refusals}) == (expected == "abs")


@pytest.mark.parametrize("shift, found", [(20, True), (LARGEST_SHIFT + 8, False)])
def test_products_are_scaled_by_so_much_and_no_more(shift: int, found: bool) -> None:
    x = X.clamp(-3, 3).sign() * 2.0 ** (13 + shift)
    program = captured(Model(lambda m, x: m.l(x), l=identity()).eval(), x)
    after, log = seen_on(program, x)
    assert any("->" in r.rule for r in log.rewrites) == found
    assert ("linear*" in marked(after)) == found
    assert relative_error(outputs_of(program, x), outputs_of(after, x)) == 0


# -- what stays float whatever the level ----------------------------------------------------------------------------------


def test_a_dropout_that_is_on_draws_in_float() -> None:
    model = Model(lambda m, x: m.l(F.dropout(m.l(x), training=True)), l=nn.Linear(4, 4)).eval()
    after = cast_half.with_options(level="O3")(captured(model, X))
    assert marked(after) == ["linear*", "dropout", "linear*"]
    off = Model(lambda m, x: m.l(F.dropout(m.l(x), training=False)), l=nn.Linear(4, 4)).eval()
    assert marked(cast_half.with_options(level="O3")(captured(off, X))) == ["linear*", "dropout*", "linear*"]


def test_a_scatter_that_adds_is_float() -> None:
    index = torch.zeros(3, 4, dtype=torch.int64)

    adds = Model(lambda m, x: m.l(torch.scatter(m.l(x), 1, index, m.l(x), reduce="add")), l=nn.Linear(4, 4))
    assert cast(adds, X)[0] == ["linear*", "linear*", "scatter", "linear*"]
    one = Model(lambda m, x: m.l(torch.scatter(m.l(x), 1, index[:, :1], m.l(x))), l=nn.Linear(4, 4))
    assert cast(one, X)[0] == ["linear*", "linear*", "scatter*", "linear*"]


@pytest.mark.parametrize("mode", ["floor", "trunc"])
def test_a_quotient_that_is_rounded_is_float(mode: str) -> None:
    def divide(mode: str | None) -> Model:
        return Model(lambda m, x: m.l(torch.div(m.l(x), m.l(x) + 9, rounding_mode=mode)), l=nn.Linear(4, 4))

    after = cast_half.with_options(level="O3")(captured(divide(mode).eval(), X))
    assert "div" in marked(after)
    assert "div*" in cast(divide(None), X, dtype="bfloat16")[0]


PHASES = {
    **dict.fromkeys(sorted(PERIODIC - {"remainder", "fmod", "floor_divide"}), ()),
    **dict.fromkeys(("remainder", "fmod", "floor_divide"), (0.25,)),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", PHASES)
def test_what_is_periodic_is_float_and_so_is_its_phase(name: str, level: str) -> None:
    function = getattr(torch.special, name.removeprefix("special_")) if "special" in name else getattr(torch, name)
    model = Model(lambda m, x: m.l(function(x * 30.0, *PHASES[name])), l=nn.Linear(4, 4)).eval()
    program = captured(model, X)
    after, log = rewritten(cast_half.with_options(level=level), program, X)
    found = marked(after)
    assert found[0] == "mul" and found[1] in PERIODIC and found[-1] == "linear*", found
    assert all(r.expected for r in log.refusals), "as ops in no table would not be"
    assert relative_error(outputs_of(program, X), outputs_of(after, X)) <= 4e-2


class WithoutAutocast(nn.Module):
    """Two layers, one of which the model keeps out of autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        with torch.autocast("cpu", enabled=False):
            x = self.b(x).relu()
        return self.a(x)


@pytest.mark.parametrize("level", LEVELS)
def test_what_the_model_keeps_out_of_autocast_is_float(level: str) -> None:
    program = captured(WithoutAutocast().eval(), X, frontend="export")
    after, _ = rewritten(cast_half.with_options(level=level), program, X)
    assert marked(after) == ["linear*", "linear", "relu", "linear*"]


# -- numbers and constants ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_a_small_factor_is_float_and_what_reads_it_is_free(level: str) -> None:
    model = Model(lambda m, x: m.l(x) * 1e-12 + m.l(x), l=nn.Linear(4, 4))
    found, said = cast(model, X, level=level)
    assert found[:3] == ["linear*", "mul", "linear*"] and reasons.IS_TINY in said
    if level == "O3":
        assert found[3] == "add*"
    model = Model(lambda m, x: (m.l(x) + 1e-12) + m.l(x), l=nn.Linear(4, 4))
    assert cast(model, X, level=level)[0] == ["linear*", "add", "linear*", "add"]


TINY = {
    "unary ops": (lambda m, t, y: t.abs().sqrt() * 2.0, "add abs sqrt mul"),
    "moves": (lambda m, t, y: torch.cat([t.t().reshape(3, 4), y]).relu(), "add t reshape cat relu"),
    "not behind a product": (lambda m, t, y: m.l(t).relu(), "add linear* relu*"),
    "not behind a sum of two": (lambda m, t, y: (t + y).relu(), "add add relu*"),
    "not behind a quotient": (lambda m, t, y: (y / t).relu(), "add div relu*"),
}


@pytest.mark.parametrize("case", TINY)
def test_how_far_an_epsilon_keeps_its_users_in_float(case: str) -> None:
    function, expected = TINY[case]
    model = Model(lambda m, x, y: function(m, m.l(x) + 1e-12, y), l=nn.Linear(4, 4))
    found, _ = cast(model, X, torch.randn(3, 4))
    assert " ".join(found[found.index("add") :]) == expected


LARGE = torch.tensor([0.0, -1e9, 1.0, 2.0])
MASKED = {
    "add": lambda y, k: y + k,
    "sub": lambda y, k: y - k,
    "rsub": lambda y, k: torch.rsub(y, k),
    "where": lambda y, k: torch.where(y > 0, y, k),
    "masked_fill": lambda y, k: k.masked_fill(y > 0, 0.0),
    "maximum": torch.maximum,
    "minimum": torch.minimum,
}
SCALED = {"mul": lambda y, k: y * k, "div": lambda y, k: y / k, "atan2": torch.atan2, "lerp": lambda y, k: y.lerp(k, y)}


@pytest.mark.parametrize("name", [*MASKED, *SCALED])
def test_constants_beyond_the_range_are_clamped_where_they_are_added_alone(name: str) -> None:
    function = {**MASKED, **SCALED}[name]
    constant = LARGE if name in MASKED else LARGE - 1e9
    after, log = cast_half_of(Model(lambda m, x: m.l(function(m.l(x), m.k)), l=nn.Linear(4, 4), k=constant), X)
    said = {r.reason for r in log.refusals}
    if name in MASKED:
        assert f"{name}*" in marked(after) and reasons.CLAMPED in said and reasons.IS_WIDE not in said
    else:
        assert name in marked(after) and reasons.IS_WIDE in said and reasons.CLAMPED not in said


def test_a_constant_mask_of_attention_is_clamped() -> None:
    mask = torch.zeros(3, 3)
    mask[0, 1:] = -1e9

    def attend(m: Model, x: Tensor) -> Tensor:
        y = m.l(x)[None]
        return F.scaled_dot_product_attention(y, y, y, attn_mask=m.mask)

    after, log = cast_half_of(Model(attend, l=nn.Linear(4, 4), mask=mask), X)
    assert marked(after)[-1] == "scaled_dot_product_attention*" and reasons.CLAMPED in {r.reason for r in log.refusals}


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_parameters_of_a_batch_norm_stay_float_and_keep_nothing_there(name: str) -> None:
    """Also those that half precision could not hold."""
    norm = nn.BatchNorm1d(4)
    with torch.no_grad():
        getattr(norm, name).fill_(1e6 if name == "running_var" else 1e-9)
    after, log = cast_half_of(Model(lambda m, x: m.l(m.n(m.l(x))), l=nn.Linear(4, 4), n=norm), X)
    assert marked(after) == ["linear*", "batch_norm*", "linear*"] and not log.refusals
    (node,) = (n for n in after.calls if short_name(n.target) == "batch_norm")
    assert facts.dtype(argument(node, name)) is torch.float32


# -- where casts may stand ------------------------------------------------------------------------------------------------


def _added_up(m: Model, x: Tensor, *floats: Tensor) -> Tensor:
    """Half by nature at O2, and in float all the same: it has one half operand, and four float ones."""
    a, b, c, d = floats
    return torch.addcmul(torch.addcmul(m.l(x), a, b), c, d)


FLOATS = tuple(torch.randn(3, 4) for _ in range(4))
BEHIND = {
    "softmax": lambda m, s: (s, m.l(s) + m.l(s.softmax(-1))),
    "topk": lambda m, s: (s, m.l(s) + m.l(s.topk(4)[0])),
}


@pytest.mark.parametrize("name", BEHIND)
def test_no_float_is_rounded_for_a_softmax_or_a_search(name: str) -> None:
    """A cast of the sum is there, for the linear. To read it would save the cast of the result."""
    model = Model(lambda m, x, *floats: BEHIND[name](m, _added_up(m, x, *floats)), l=nn.Linear(4, 4))
    after, _ = check_cast(model, X, *FLOATS)
    (node,) = (n for n in after.calls if short_name(n.target) == name)
    assert short_name(argument(node, "self").target) == "addcmul" and facts.dtype(argument(node, "self")) is torch.float32
    alone = Model(lambda m, x: (m.l(x), BEHIND[name](m, m.l(x)))[1], l=nn.Linear(4, 4))
    (node,) = (n for n in check_cast(alone, X)[0].calls if short_name(n.target) == name)
    assert facts.dtype(argument(node, "self")) is torch.bfloat16


def test_what_moves_floats_is_half_only_where_all_its_users_are() -> None:
    """One cast behind the cat would be fewer than three before the linears, and the exponential would read rounded floats."""

    def function(m: Model, x: Tensor) -> tuple[Tensor, ...]:
        moved = [F.relu(x), x.abs(), -x]
        return *map(m.l, moved), torch.cat(moved).exp()

    after, _ = check_cast(Model(function, l=nn.Linear(4, 4)), X, level="O1")
    assert marked(after) == ["relu", "abs", "neg", *["linear*"] * 3, "cat", "exp"]


# -- what the front ends seldom give --------------------------------------------------------------------------------------


def test_results_that_somebody_reads_as_one_list_stay_float() -> None:
    model = Model(lambda m, x: torch.cat(m.l(x).split(2, 1), 1).relu(), l=nn.Linear(4, 4)).eval()
    draft = Draft.of(captured(model, X))
    split, joined = (next(n for n in draft.program.calls if short_name(n.target) == name) for name in ("split", "cat"))
    with draft.before(joined):
        draft.replace(joined, draft.call(aten.cat.default, split, 1))
    after, log = rewritten(cast_half, draft.finish(), X)
    assert marked(after)[:2] == ["linear*", "split"] and reasons.IS_READ_WHOLE in {r.reason for r in log.refusals}


def test_what_reads_a_value_of_unknown_dtype_stays_as_it_is() -> None:
    program = captured(Model(lambda m, x: m.l(m.l(x).relu()), l=nn.Linear(4, 4)).eval(), X)
    next(n for n in program.calls if short_name(n.target) == "relu").meta.pop("fact")
    constraints = Policy.of(program, PrecisionOptions(torch.bfloat16, "O3")).constraints
    assert [(short_name(n.target), s.reason) for n, s in constraints.items()] == [
        ("linear", ""), ("relu", reasons.IS_UNKNOWN), ("linear", reasons.IS_UNKNOWN)
    ]  # fmt: skip
