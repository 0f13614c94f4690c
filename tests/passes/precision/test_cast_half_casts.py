"""Where `cast_half` places casts: each value is cast once, and no op is cast for nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ir_tools.ir import facts
from ir_tools.ir.dialect import argument, short_name
from tests.check import assert_bitwise_equal, captured, ops, outputs_of, rewritten
from tests.passes.precision.half_casts import HALVES, IMAGE, LEVELS, Model, X, cast_half, check_cast, computes_in, source

# -- where casts stand -------------------------------------------------------------------------------------------------


def _three_users(m: Model, x: Tensor) -> Tensor:
    return m.a(x) + m.b(x) + F.relu(x)


def _half_and_float_users(m: Model, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(y) + y.softmax(-1) + y.exp()


def _there_and_back(m: Model, x: Tensor) -> Tensor:
    return m.a(m.a(x).softmax(-1))


def _shared_weight(m: Model, x: Tensor) -> Tensor:
    return F.linear(F.linear(x, m.w), m.w)


def _weight_read_in_float_too(m: Model, x: Tensor) -> Tensor:
    return F.linear(x, m.w) + m.w.exp().sum(0)


CASTS: dict[str, tuple[Callable, int]] = {
    "three users of one input": (_three_users, 2),
    "half and float users": (_half_and_float_users, 2),
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


# -- sites and teeth ---------------------------------------------------------------------------------------------------


def test_a_cast_that_forgets_the_outputs_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source.Caster, "restore_outputs", lambda self, dtypes: None)
    with pytest.raises(AssertionError, match="outputs keep their dtypes"):
        check_cast(nn.Sequential(nn.Linear(4, 4)), X)


# -- what follows from the kinds of ops --------------------------------------------------------------------------------


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


# -- small numbers -----------------------------------------------------------------------------------------------------


def test_two_outputs_do_not_come_to_share_memory() -> None:
    model = Model(lambda m, x: (lambda y: (y.half(), y.flatten().half(), y.half()))(m.l(x)), l=nn.Linear(4, 4)).eval()
    program = captured(model, X)
    after, _ = rewritten(cast_half.with_options(dtype="float16"), program, X)
    assert len({t.untyped_storage().data_ptr() for t in outputs_of(after, X)}) == 3


def test_a_cast_of_the_model_that_has_become_none_goes() -> None:
    model = Model(lambda m, x: m.l(m.l(x).bfloat16().float() + 1), l=nn.Linear(4, 4)).eval()
    after, _ = check_cast(model, X)
    assert ops(after) == ["to", "linear", "add", "linear", "to"]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("level", LEVELS)
def test_a_batch_norm_with_computed_parameters_takes_them_in_half(level: str, training: bool) -> None:
    def norm(m: Model, x: Tensor) -> Tensor:
        w, b = m.l(x)[0], m.k
        return m.l(F.batch_norm(m.l(x), None if training else m.m, None if training else m.v, w, b, training))

    check_cast(Model(norm, l=nn.Linear(4, 4), k=torch.randn(4), m=torch.randn(4), v=torch.rand(4) + 0.5), X, level=level)
