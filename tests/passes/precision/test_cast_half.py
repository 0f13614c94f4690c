"""The levels of `cast_half`: which ops compute in half, on ops of every shape."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.check import assert_bitwise_equal, assert_numbers_agree, assert_same_graph, captured, ops, outputs_of, rewritten
from tests.passes.precision.half_casts import (
    HALVES,
    IMAGE,
    LEVELS,
    WITHIN,
    H,
    Model,
    X,
    assert_casts_are_lean,
    cast_half,
    check_cast,
    computes_in,
    every_kind,
)

# -- the table of levels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("level", LEVELS)
def test_levels(level: str, dtype: str) -> None:
    model = Model(every_kind, linear=nn.Linear(4, 4), norm=nn.LayerNorm(4))
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
    after, log = check_cast(model, X, dtype=dtype)
    assert_same_graph(after, written_out.eval(), X)
    assert [r.rule for r in log.rewrites] == ["linear", "relu"]
    assert set(after.constants) == {"linear.weight@cast_half", "linear.bias@cast_half"}


# -- ops of every shape ------------------------------------------------------------------------------------------------

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
        # Positions of the largest values may change; facts, dtypes and leanness are still held to account.
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


# -- sites and teeth ---------------------------------------------------------------------------------------------------


def test_numbers_of_a_deep_net_stay_near() -> None:
    layers = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(6)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    after, _ = rewritten(cast_half.with_options(dtype="float16"), captured(model, IMAGE), IMAGE)
    assert_numbers_agree(model, after, IMAGE, within=WITHIN["float16"])
    with pytest.raises(AssertionError, match="moved by"):
        assert_bitwise_equal([model(IMAGE)], outputs_of(after, IMAGE))
