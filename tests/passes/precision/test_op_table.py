"""The table of half precision says what torch's kernels do: every entry is measured, and every op of the zoo has one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from benchmarks.zoo_models import read_list
from benchmarks.zoo_ops import float_ops, ops_of, read_ops
from ir_tools.frontends.capture import capture
from ir_tools.frontends.source import prepare
from ir_tools.torch_compat import pytree
from ir_tools.torchvision_ops import import_torchvision
from passes.precision import op_table
from passes.testing.model_strategy import random_models
from passes.testing.model_text import RandomModel
from tests.passes.precision.half_samples import SAMPLES, Call, operator_of

HALVES = (torch.bfloat16, torch.float16)
STAYS_FLOAT = frozenset().union(*op_table.STAYS_FLOAT.values())
KINDS = {
    name: getattr(op_table, name)
    for name in "MATRIX MOVES FOLLOWS DECIDES INSIDE FRAGILE CONSTRUCTORS PERIODIC CASTS NO_FLOATS".split()
} | {"STAYS_FLOAT": STAYS_FLOAT}
MEASURED = sorted(set().union(*KINDS.values()) - STAYS_FLOAT - op_table.CASTS - op_table.NO_FLOATS)

ONE_ROUNDING = 1.5
"""In ulp. Half an ulp is one rounding; the rest is for kernels that round a number of the result's size before it."""
POINTWISE = 1.5
"""In ulp of the largest number: what a few roundings of its operands' size leave of a pointwise op or a product."""
PRODUCT = 1.0
"""In ulp of the largest result: attention has rounded weights."""
ADDED_IN_HALF = 10.0
"""The same of transposed convolutions in float16, where oneDNN has no kernel: overlapping products are added in half."""


# -- what kernels do ----------------------------------------------------------------------------------------------------


def cast(values: Any, dtype: torch.dtype) -> Any:
    """Floating point tensors in `dtype`; so is what is asked for by dtype."""

    def one(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.to(dtype)
        return dtype if value is torch.float32 else value

    return pytree.tree_map(one, values)


def run(name: str, sample: Call, dtype: torch.dtype) -> list[Any]:
    """What the op gives, computed in `dtype`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ops that are deprecated, or in beta
        return pytree.tree_leaves(operator_of(name)(*cast(sample.args, dtype), **cast(sample.kwargs, dtype)))


def samples(name: str) -> list[Call]:
    assert name in SAMPLES, f"{name} is in the table, and has no sample call in tests/passes/precision/half_samples.py"
    return SAMPLES[name]


def runnable(name: str, half: torch.dtype) -> list[Call]:
    """The sample calls of an op that has a kernel in `half`."""
    return [] if name in op_table.NO_KERNEL[half] else samples(name)


def has_kernel(name: str, half: torch.dtype) -> bool:
    for sample in samples(name):
        run(name, sample, torch.float32)  # the sample is right
        try:
            run(name, sample, half)
        except RuntimeError as error:
            assert "not implemented for" in str(error)
            return False
    return True


def commutes(name: str, sample: Call, half: torch.dtype) -> bool:
    """Rounding before the op gives exactly what rounding behind it gives."""
    rounded_before, rounded_behind = run(name, sample, half), cast(run(name, sample, torch.float32), half)
    return all(same(a, b) for a, b in zip(rounded_before, rounded_behind, strict=True))


def same(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor):
        return a == b
    return a.dtype == b.dtype and a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def distances(name: str, sample: Call, half: torch.dtype) -> Iterator[tuple[float, float]]:
    """How far an op in half is from the exact result of the same operands: in ulp, and in ulp of the largest result.

    Of the difference, what the float32 kernel is off by is taken away four times. A number beyond the range of the dtype
    must be infinite; one that should be finite, and is not, is infinitely far off.
    """
    rounded = Call(cast(sample.args, half), cast(sample.kwargs, half))
    for y, exact, single in zip(run(name, rounded, half), run(name, rounded, torch.float64), run(name, rounded, torch.float32)):
        if not (isinstance(y, torch.Tensor) and y.is_floating_point()):
            continue
        assert y.dtype == half and y.shape == exact.shape
        finite = exact.to(half).isfinite()
        if not same(y[~finite], exact.to(half)[~finite]) or not y[finite].isfinite().all():
            yield float("inf"), float("inf")
        elif finite.any():
            y, exact, single = y[finite].double(), exact[finite], single[finite].double()
            off = (y - exact).abs() - 4 * (single - exact).abs().max()
            ulp = spacing(exact, half)
            yield float((off / ulp).max()), float(off.max() / ulp.max())


def spacing(x: torch.Tensor, half: torch.dtype) -> torch.Tensor:
    """The distance of x, float64, to the next number of `half`."""
    info = torch.finfo(half)
    return torch.ldexp(torch.full_like(x, info.eps), torch.frexp(x).exponent - 1).clamp(min=info.eps * info.smallest_normal)


def worst(name: str, half: torch.dtype) -> tuple[float, float]:
    """The largest of `distances` over the op's samples."""
    found = [(0.0, 0.0), *(d for sample in runnable(name, half) for d in distances(name, sample, half))]
    return max(d for d, _ in found), max(d for _, d in found)


def each(kind: str) -> Any:
    """The ops of a kind, in both dtypes."""
    ops = pytest.mark.parametrize("name", MEASURED if kind == "MEASURED" else sorted(KINDS[kind]))
    halves = pytest.mark.parametrize("half", HALVES, ids=("bfloat16", "float16"))
    return lambda test: ops(halves(test))


# -- the claims ---------------------------------------------------------------------------------------------------------


@each("MEASURED")
def test_the_ops_without_a_kernel_are_those_listed(name: str, half: torch.dtype) -> None:
    assert has_kernel(name, half) == (name not in op_table.NO_KERNEL[half])


@each("MOVES")
def test_moving_commutes_with_rounding(name: str, half: torch.dtype) -> None:
    assert all(commutes(name, sample, half) for sample in runnable(name, half))


@each("INSIDE")
def test_a_kernel_that_is_fragile_inside_rounds_once(name: str, half: torch.dtype) -> None:
    assert worst(name, half)[0] <= ONE_ROUNDING


@pytest.mark.parametrize("name", sorted(op_table.FRAGILE))
def test_a_fragile_kernel_rounds_in_between(name: str) -> None:
    """In one of the dtypes, or it has no kernel; one that does not is better placed in INSIDE."""
    assert any(name in op_table.NO_KERNEL[half] or worst(name, half)[0] > ONE_ROUNDING for half in HALVES)


@each("FOLLOWS")
def test_what_follows_is_as_precise_as_its_operands(name: str, half: torch.dtype) -> None:
    assert worst(name, half)[1] <= POINTWISE


WRITES_NUMBERS = "hardtanh clamp clip clamp_min clamp_max where masked_fill index_fill fill scatter pad constant_pad_nd".split()


@pytest.mark.parametrize("name", WRITES_NUMBERS)
def test_what_writes_a_number_moves_exactly_too(name: str) -> None:
    assert name in op_table.FOLLOWS
    assert all(commutes(name, sample, half) for half in HALVES for sample in samples(name))


@each("MATRIX")
def test_products_are_summed_in_float(name: str, half: torch.dtype) -> None:
    added_in_half = name.startswith("conv_transpose") and half == torch.float16
    assert worst(name, half)[1] <= (ADDED_IN_HALF if added_in_half else PRODUCT)


EXACT = {"isnan", "isreal", "signbit"}
"""Rounding leaves NaN and the sign as they are."""


@pytest.mark.parametrize("name", sorted(op_table.DECIDES))
def test_what_decides_may_decide_otherwise_after_rounding(name: str) -> None:
    kept = all(commutes(name, sample, half) for half in HALVES for sample in samples(name))
    assert kept == (name in EXACT)


@each("CONSTRUCTORS")
def test_what_is_made_in_half_equals_what_is_rounded(name: str, half: torch.dtype) -> None:
    if "empty" not in name:
        assert all(commutes(name, sample, half) for sample in samples(name))


# -- the claims have teeth ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("sigmoid", "add", "sum", "avg_pool2d", "floor", "upsample_bilinear2d"))
def test_what_computes_does_not_move(name: str) -> None:
    assert not all(commutes(name, sample, torch.bfloat16) for sample in samples(name))


@pytest.mark.parametrize("name", ("prod", "instance_norm", "adaptive_avg_pool3d", "index_add", "index_put", "col2im"))
def test_a_kernel_that_sums_in_half_is_not_inside(name: str) -> None:
    with pytest.raises(AssertionError):
        test_a_kernel_that_is_fragile_inside_rounds_once(name, torch.bfloat16)


@pytest.mark.parametrize("name", ("prod", "index_add", "adaptive_avg_pool3d"))
def test_a_kernel_that_sums_in_half_is_no_product(name: str) -> None:
    with pytest.raises(AssertionError):
        test_products_are_summed_in_float(name, torch.bfloat16)
    with pytest.raises(AssertionError):
        test_what_follows_is_as_precise_as_its_operands(name, torch.bfloat16)


@pytest.mark.parametrize("name", ("softmax", "layer_norm", "cumsum"))
def test_a_kernel_that_rounds_once_is_not_fragile(name: str) -> None:
    with pytest.raises(AssertionError):
        test_a_fragile_kernel_rounds_in_between(name)


def test_an_entry_without_a_sample_fails() -> None:
    with pytest.raises(AssertionError, match="has no sample call"):
        test_moving_commutes_with_rounding("svd", torch.bfloat16)


def test_every_sample_belongs_to_an_entry() -> None:
    assert sorted(SAMPLES.keys() - set(MEASURED)) == []


def test_positions_made_in_half_differ_from_rounded_ones() -> None:
    """Which is why arange and linspace are in STAYS_FLOAT, not in CONSTRUCTORS."""
    for half in HALVES:
        assert not torch.equal(torch.arange(0.1, 300, 0.3, dtype=half), torch.arange(0.1, 300, 0.3).to(half))
        assert not torch.equal(torch.linspace(-1, 3, 700, dtype=half), torch.linspace(-1, 3, 700).to(half))


# -- the table and the operators that exist -----------------------------------------------------------------------------


def exists(name: str) -> bool:
    try:
        operator_of(name)
    except AttributeError:
        return hasattr(torch.ops.torchvision, name)
    return True


def test_every_name_is_an_operator() -> None:
    import_torchvision()
    assert [name for kind in KINDS.values() for name in sorted(kind) if not exists(name)] == []
    assert not exists("normalize")  # a function in Python: torch.nn.functional.normalize


def test_no_name_is_in_two_kinds() -> None:
    names = [name for kind in KINDS.values() for name in kind] + [n for ops in op_table.STAYS_FLOAT.values() for n in ops]
    twice = {name for name in names if names.count(name) > 1 + (name in STAYS_FLOAT)}
    assert twice == set()


# -- the table and the ops of models ------------------------------------------------------------------------------------


def without_entry(ops: set[str]) -> list[str]:
    """The ops that have no entry; one that writes in place needs none, and stays in float."""
    return sorted(name for name in ops.difference(*KINDS.values()) if not name.endswith("_"))


def test_every_op_of_the_zoo_has_an_entry() -> None:
    assert without_entry(set(read_ops())) == []
    assert len(read_ops()) > 100


@pytest.mark.parametrize("title", ("torchvision:shufflenet_v2_x0_5", "timm:lcnet_050", "transformers:BertModel"))
def test_every_op_of_a_model_has_an_entry(title: str) -> None:
    """Captured now, so that an op which is new with a release of torch or of the model's package is noticed."""
    ops = ops_of(next(entry for entry in read_list() if entry.title == title))
    assert without_entry(ops) == [] and len(ops) > 5


NO_NUMBERS = {"one_hot", "has_torch_function"}
"""Functions of torch.nn.functional that take no floating point numbers."""


def test_every_op_of_torch_nn_functional_has_an_entry() -> None:
    functions = {name for name in dir(F) if callable(getattr(F, name)) and hasattr(torch.ops.aten, name)}
    assert without_entry(functions - NO_NUMBERS) == [] and len(functions) > 60


@settings(max_examples=8)
@given(random_models(dtypes=[torch.float32]))
def test_every_op_of_random_models_has_an_entry(model: RandomModel) -> None:
    assert without_entry(float_ops(capture(prepare(model.module(), [(model.inputs(), {})])).program)) == []


def test_an_op_without_entry_is_noticed() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(x.add(1))

    ops = float_ops(capture(prepare(Model(), [((torch.ones(3),), {})])).program)
    assert ops == {"add", "special_bessel_j0"} and without_entry(ops) == ["special_bessel_j0"]
    assert without_entry({"relu", "relu_"}) == []
