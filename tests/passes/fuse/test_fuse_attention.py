"""Fusing attention that is written out by hand: it rewrites, it refuses, the numbers agree, the numbers have teeth."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passes import CATALOGUE, DEFAULT, load, optimize, rule_pass
from tests.check import (
    assert_numbers_agree,
    assert_same_graph,
    assert_sites_can_be_skipped,
    captured,
    ops,
    relative_error,
    rewritten,
)

fuse_attention = CATALOGUE["fuse_attention"]
source = importlib.import_module("passes.fuse.fuse_attention")

EXACT = 1e-10
INF = math.inf


class ByHand(nn.Module):
    """`function(self, q, k, v)` with constants at hand."""

    def __init__(self, function: Callable, **constants: Tensor):
        super().__init__()
        self.function = function
        for name, tensor in constants.items():
            self.register_buffer(name, tensor)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        return self.function(self, q, k, v, *more)


def operands(*leading: int, queries: int = 5, keys: int = 6, width: int = 4, dtype=torch.float64) -> tuple[Tensor, ...]:
    q, k, v = ((*leading, n, width) for n in (queries, keys, keys))
    return tuple(torch.randn(size, dtype=dtype) for size in (q, k, v))


HEADS = (2, 3)
CONSTANTS = {
    "root": torch.tensor(2.0, dtype=torch.float64),
    "ones": torch.full((1, 1), 0.25, dtype=torch.float64),
    "bias": torch.randn(5, 6, dtype=torch.float64),
    "by_head": torch.randn(3, 1, 6, dtype=torch.float64),
    "by_key": torch.tensor([0.0, -INF, 0.5, -INF, 1.0, 2.0], dtype=torch.float64),
    "later": torch.ones(5, 6, dtype=torch.bool).triu(1),
    "one_key": torch.tensor([[False], [False], [False], [False], [False]]),
}


def attend(scores: Tensor, v: Tensor) -> Tensor:
    return scores.softmax(-1) @ v


WRITTEN: dict[str, tuple[Callable, Callable]] = {
    "plain": (lambda m, q, k, v: attend(q @ k.mT, v), lambda m: dict(scale=1.0)),
    "scores / 2": (lambda m, q, k, v: attend(q @ k.transpose(-2, -1) / 2, v), lambda m: dict(scale=0.5)),
    "scores * 3": (lambda m, q, k, v: attend(3 * (q @ k.transpose(3, 2)), v), lambda m: dict(scale=3.0)),
    "q / 2": (lambda m, q, k, v: attend((q / 2) @ k.mT, v), lambda m: dict(scale=0.5)),
    "k * 3": (lambda m, q, k, v: attend(q @ (k * 3).mT, v), lambda m: dict(scale=3.0)),
    "k / 2 after": (lambda m, q, k, v: attend(q @ (k.mT / 2), v), lambda m: dict(scale=0.5)),
    "all three": (lambda m, q, k, v: attend((q * 3) @ (k / 4).mT * 5, v), lambda m: dict(scale=3.75)),
    "constants": (lambda m, q, k, v: attend((q / m.root) @ k.mT * m.ones, v), lambda m: dict(scale=0.125)),
    "negative": (lambda m, q, k, v: attend(q @ k.mT * -0.5, v), lambda m: dict(scale=-0.5)),
    "permuted": (lambda m, q, k, v: attend(q @ k.permute(0, 1, 3, 2), v), lambda m: dict(scale=1.0)),
    "mask": (lambda m, q, k, v: attend(q @ k.mT / 2 + m.bias, v), lambda m: dict(attn_mask=m.bias, scale=0.5)),
    "mask first": (lambda m, q, k, v: attend(m.bias + q @ k.mT, v), lambda m: dict(attn_mask=m.bias, scale=1.0)),
    "mask by head": (lambda m, q, k, v: attend(q @ k.mT + m.by_head, v), lambda m: dict(attn_mask=m.by_head, scale=1.0)),
    "mask by key": (lambda m, q, k, v: attend(q @ k.mT + m.by_key, v), lambda m: dict(attn_mask=m.by_key[None], scale=1.0)),
    "causal": (
        lambda m, q, k, v: attend((q @ k.mT / 2).masked_fill(m.later, -INF), v),
        lambda m: dict(attn_mask=torch.zeros(5, 6, dtype=torch.float64).masked_fill(m.later, -INF), scale=0.5),
    ),
    "softmax in its own dtype": (
        lambda m, q, k, v: (q @ k.mT).softmax(3, dtype=torch.float64) @ v, lambda m: dict(scale=1.0)
    ),
}  # fmt: skip
"""Attention by hand, and the arguments of the fused op."""


def check_fused(function: Callable, inputs: tuple[Tensor, ...], pass_=fuse_attention) -> None:
    model = ByHand(function, **CONSTANTS).eval()
    after, log = rewritten(pass_, captured(model, *inputs), *inputs)
    assert "softmax" not in ops(after) and len(log.rewrites) == 1 and not log.refusals
    assert [name for name in ops(after) if name not in ("mT", "transpose")] == ["scaled_dot_product_attention"]
    assert_numbers_agree(model, after, *inputs, within=EXACT)


# -- it rewrites, and the numbers agree ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITTEN)
def test_it_fuses(name: str) -> None:
    check_fused(WRITTEN[name][0], operands(*HEADS))


@pytest.mark.parametrize("frontend", ["trace", "export"])
@pytest.mark.parametrize("name", [name for name in WRITTEN if name not in ("causal", "mask by key")])
def test_the_graph_is_the_fused_op(name: str, frontend: str) -> None:
    inputs = operands(*HEADS)
    by_hand, arguments = WRITTEN[name]
    after, _ = rewritten(fuse_attention, captured(ByHand(by_hand, **CONSTANTS), *inputs, frontend=frontend), *inputs)
    fused = ByHand(lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, **arguments(m)), **CONSTANTS)
    assert_same_graph(after, fused, *inputs, frontend=frontend)


@pytest.mark.parametrize("leading", [(2,), (2, 3), (2, 1, 3)])
def test_any_number_of_leading_axes(leading: tuple[int, ...]) -> None:
    check_fused(lambda m, q, k, v: attend(q @ k.mT / 2 + m.bias, v), operands(*leading))


def test_batched_products() -> None:
    check_fused(lambda m, q, k, v: torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v), operands(3))


def test_keys_that_are_transposed_already() -> None:
    q, k, v = operands(*HEADS)
    check_fused(lambda m, q, kt, v: attend(q @ kt, v), (q, k.mT.contiguous(), v))
    k = k.permute(0, 2, 1, 3).contiguous()  # batch, keys, heads, width
    program = captured(ByHand(lambda m, q, k, v: attend(q @ k.permute(0, 2, 3, 1), v)), q, k, v)
    after, _ = rewritten(fuse_attention, program, q, k, v)
    assert ops(after) == ["permute", "transpose", "scaled_dot_product_attention"]
    assert ops(CATALOGUE["simplify_views"](after)) == ["permute", "scaled_dot_product_attention"]
    assert relative_error(program.run(q, k, v), after.run(q, k, v)) <= EXACT


def square(n: int = 6) -> tuple[Tensor, Tensor]:
    return torch.ones(n, n, dtype=torch.bool).triu(1), torch.zeros(n, n, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(6, 6), (1, 1, 6, 6), (3, 6, 6)])
def test_a_causal_mask_is_no_tensor(shape: tuple[int, ...]) -> None:
    later, zeros = (t.expand(shape) for t in square())
    inputs = operands(*HEADS, queries=6)
    for model in (
        ByHand(lambda m, q, k, v: attend((q @ k.mT).masked_fill(m.later, -INF), v), later=later),
        ByHand(lambda m, q, k, v: attend(q @ k.mT + m.mask, v), mask=zeros.masked_fill(later, -INF)),
    ):
        after, _ = rewritten(fuse_attention, captured(model, *inputs), *inputs)
        causal = ByHand(lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0))
        assert_same_graph(after, causal, *inputs)
        assert_numbers_agree(model, after, *inputs, within=EXACT)


@pytest.mark.parametrize("diagonal", [0, 2, -1])
def test_other_triangles_are_masks(diagonal: int) -> None:
    hidden = square()[0].new_ones(6, 6).triu(diagonal) if diagonal else square()[0].flip(0)
    model = ByHand(lambda m, q, k, v: attend((q @ k.mT).masked_fill(m.hidden, -INF), v), hidden=hidden)
    inputs = operands(*HEADS, queries=6)
    after, log = rewritten(fuse_attention, captured(model, *inputs), *inputs)
    if diagonal < 0:  # nobody sees anything
        assert [refused.reason for refused in log.refusals] == [ROWS]
    else:
        assert [*after.constants] and ops(after)[-1] == "scaled_dot_product_attention"
        assert_numbers_agree(model, after, *inputs, within=EXACT)


def test_a_mask_of_zeros_hides_nothing() -> None:
    model = ByHand(lambda m, q, k, v: attend(q @ k.mT + m.zeros, v), zeros=torch.zeros(1, 1, 5, 6).double())
    inputs = operands(*HEADS)
    after, _ = rewritten(fuse_attention, captured(model, *inputs), *inputs)
    assert_same_graph(after, ByHand(lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, scale=1.0)), *inputs)
    assert_numbers_agree(model, after, *inputs, within=EXACT)


def test_another_width_of_the_values() -> None:
    q, k, _ = operands(*HEADS)
    check_fused(lambda m, q, k, v: attend(q @ k.mT, v), (q, k, torch.randn(*HEADS, 6, 7, dtype=torch.float64)))


class Block(nn.Module):
    """Self-attention of four heads, by hand, with a causal mask and a dropout."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj, self.drop = nn.Linear(16, 48), nn.Linear(16, 16), nn.Dropout(0.1)
        self.register_buffer("seen", torch.ones(7, 7).tril())

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).view(2, 7, 3, 4, 4).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        weights = self.drop(F.softmax(scores.masked_fill(self.seen == 0, float("-inf")), dim=-1))
        return self.proj((weights @ v).transpose(1, 2).contiguous().view(2, 7, 16))


@pytest.mark.parametrize("frontend", ["trace", "export", "script"])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("engine", ["aten", "onednn_ops"])
def test_a_model_runs_and_is_saved(engine: str, half: bool, frontend: str, tmp_path: Path) -> None:
    if engine == "onednn_ops" and not torch.backends.mkldnn.is_available():
        pytest.skip("no oneDNN")
    model, x = Block().eval(), torch.randn(2, 7, 16)
    given = torch.jit.script(model) if frontend == "script" else model
    passes = [*DEFAULT, "fuse_attention", *(["cast_half"] if half else [])]
    fast = optimize(given, passes, example_inputs=x, engine=engine, frontend=frontend)
    assert fast.report.ops_left["scaled_dot_product_attention"] == 1 and "softmax" not in fast.report.ops_left
    torch.testing.assert_close(fast(x), model(x), **(dict(atol=0.05, rtol=0.05) if half else {}))
    fast.save(tmp_path / "model.pt")
    torch.testing.assert_close(load(tmp_path / "model.pt")(x), fast(x))


# -- it refuses ---------------------------------------------------------------------------------------------------------

LAST = "requirement not met: The softmax goes over the last axis, that of the keys."
CASTS = "requirement not met: The softmax computes in the dtype of the query."
ALIKE = (
    "requirement not met: Query, key and value have one floating dtype, 3 to 5 axes, "
    "and the same leading sizes (nothing broadcasts)."
)
KNOWN = (
    "requirement not met: The mask is a constant (a runtime mask might hide a whole row: NaN by hand, 0 in the fused op)."
)
FINITE = "requirement not met: Hidden scores become -inf (a finite number replaces a score, where a mask is added to it)."
DTYPE = "requirement not met: The mask has the dtype of the query."
ROWS = "requirement not met: No row of the mask is -inf throughout, and none holds NaN or +inf."

SQUARE = operands(*HEADS, queries=6, keys=6, width=6)
FLOATS = tuple(t.float() for t in operands(*HEADS))
SEES_NOTHING = torch.zeros(5, 6, dtype=torch.float64)
SEES_NOTHING[2] = -INF

REFUSED: dict[str, tuple[Callable, tuple[Tensor, ...], dict[str, Tensor], str]] = {
    "over the queries": (lambda m, q, k, v: (q @ k.mT).softmax(-2) @ v, SQUARE, {}, LAST),
    "casts": (lambda m, q, k, v: (q @ k.mT).softmax(-1, dtype=torch.float64).to(q.dtype) @ v, FLOATS, {}, CASTS),
    "keys of one head": (
        lambda m, q, k, v: attend(q @ k.mT, v), (SQUARE[0], SQUARE[1][:, :1], SQUARE[2]), {}, ALIKE
    ),
    "no batch": (lambda m, q, k, v: attend(q @ k.mT, v), tuple(t[0, 0] for t in SQUARE), {}, ALIKE),
    "mask makes queries": (
        lambda m, q, k, v: attend(q @ k.mT + m.c, v), (SQUARE[0][:, :, :1], *SQUARE[1:]), {"c": torch.randn(5, 6).double()},
        ALIKE,
    ),
    "runtime mask": (
        lambda m, q, k, v, mask: attend(q @ k.mT + mask, v), (*SQUARE, torch.randn(6, 6, dtype=torch.float64)), {}, KNOWN
    ),
    "hidden by a runtime mask": (
        lambda m, q, k, v, hidden: attend((q @ k.mT).masked_fill(hidden, -INF), v),
        (*SQUARE, torch.ones(6, 6).triu(1).bool()), {}, KNOWN,
    ),
    "hidden by a number": (
        lambda m, q, k, v: attend((q @ k.mT).masked_fill(m.c, -1e9), v), SQUARE, {"c": torch.ones(6, 6).triu(1).bool()}, FINITE
    ),
    "narrow mask": (lambda m, q, k, v: attend(q @ k.mT + m.c, v), SQUARE, {"c": torch.randn(6, 6)}, DTYPE),
    "a row sees nothing": (
        lambda m, q, k, v: attend(q @ k.mT + m.c, v), operands(*HEADS), {"c": SEES_NOTHING}, ROWS
    ),
    "a row is hidden": (
        lambda m, q, k, v: attend((q @ k.mT).masked_fill(m.c, -INF), v), operands(*HEADS), {"c": SEES_NOTHING < 0}, ROWS
    ),
    "infinite mask": (lambda m, q, k, v: attend(q @ k.mT + m.c, v), SQUARE, {"c": torch.full((6, 6), INF).double()}, ROWS),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_it_refuses(name: str) -> None:
    function, inputs, constants, reason = REFUSED[name]
    program = captured(ByHand(function, **constants), *inputs)
    after, log = rewritten(fuse_attention, program, *inputs)
    assert after is program and [refused.reason for refused in log.refusals] == [reason]
    left = [r for r in fuse_attention.rules[0].requires if f"requirement not met: {source_reason(r)}" != reason]
    careless = rule_pass("careless", [replace(fuse_attention.rules[0], requires=left)], effects={"rounds"}, doc="")
    assert not any(refused.reason.startswith("requirement not met") for refused in _tried(careless, program))


def source_reason(requirement: Callable) -> str:
    return (requirement.__doc__ or "").splitlines()[0]


def _tried(pass_, program) -> list:
    """The refusals of a pass that may fail for want of a requirement."""
    from ir_tools.ir import FactError
    from ir_tools.rewrite import RewriteLog

    log = RewriteLog()
    try:
        pass_(program, log=log)
    except (FactError, AttributeError, TypeError):  # the op itself rejects what the requirement keeps from it
        return []
    return log.refusals


@pytest.mark.parametrize(
    "function",
    [
        lambda m, q, k, v: attend(q @ k.flip(-1).mT * m.by_head, v),  # not one factor
        lambda m, q, k, v: attend(q @ k.mT * 0.0, v),
        lambda m, q, k, v: (q @ k.mT).sigmoid() @ v,
    ],
)
def test_what_is_no_attention_does_not_fit(function: Callable) -> None:
    inputs = operands(*HEADS)
    program = captured(ByHand(function, **CONSTANTS), *inputs)
    after, log = rewritten(fuse_attention, program, *inputs)
    assert after is program and not log.refusals


def test_weights_that_are_read_again_are_refused() -> None:
    def function(m, q, k, v):
        weights = (q @ k.mT).softmax(-1)
        return weights @ v, weights

    inputs = operands(*HEADS)
    program = captured(ByHand(function), *inputs)
    after, log = rewritten(fuse_attention, program, *inputs)
    assert after is program and "has another user (the model's output)" in log.refusals[0].reason


def test_a_scaled_query_that_is_read_again_is_the_query() -> None:
    def function(m, q, k, v):
        q = q * 3
        return attend(q @ k.mT, v) + q.sum()

    inputs = operands(*HEADS)
    after, log = rewritten(fuse_attention, captured(ByHand(function), *inputs), *inputs)
    assert ops(after) == ["mul", "scaled_dot_product_attention", "sum", "add"] and len(log.rewrites) == 1


def test_each_site_can_be_skipped() -> None:
    inputs = operands(*HEADS, queries=6)
    model = ByHand(lambda m, q, k, v: attend(attend(q @ k.mT, v) @ k.mT, v))
    assert_sites_can_be_skipped(fuse_attention, lambda: captured(model, *inputs), *inputs)


# -- the numbers have teeth ---------------------------------------------------------------------------------------------


def _by_product(a, b, c, q_by, k_by, by):
    return math.prod(source.number(f) for f in (a, b, c) if f is not None)


@pytest.mark.parametrize(
    "name, wrong",
    [("scores / 2", _by_product), ("all three", _by_product), ("scores * 3", lambda *_, **__: 1.0), ("plain", lambda *_: None)],
)
def test_a_wrong_scale_is_noticed(name: str, wrong: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "scale_of", wrong)
    with pytest.raises(AssertionError, match="relative error"):
        check_fused(WRITTEN[name][0], operands(*HEADS))


@pytest.mark.parametrize("name", ["over the queries", "hidden by a number"])
def test_a_missing_requirement_is_noticed(name: str) -> None:
    function, inputs, constants, reason = REFUSED[name]
    rule = fuse_attention.rules[0]
    careless = replace(rule, requires=[r for r in rule.requires if f"requirement not met: {source_reason(r)}" != reason])
    model = ByHand(function, **constants)
    after, _ = rewritten(rule_pass("careless", [careless], effects={"rounds"}, doc=""), captured(model, *inputs), *inputs)
    assert "softmax" not in ops(after)
    if name == "hidden by a number":  # there is one query that sees every key: the others hide theirs from nobody
        inputs = (100 * inputs[0], -1e9 * inputs[1].abs(), inputs[2])
    with pytest.raises(AssertionError, match="relative error"):
        assert_numbers_agree(model, after, *inputs, within=EXACT)


def test_a_row_that_sees_nothing_is_nan_by_hand_alone() -> None:
    function, inputs, constants, _ = REFUSED["a row sees nothing"]
    rule = replace(fuse_attention.rules[0], requires=())
    program = captured(ByHand(function, **constants), *inputs)
    after = rule_pass("careless", [rule], effects={"rounds"}, doc="")(program)
    assert program.run(*inputs)[0].isnan().any() and not after.run(*inputs)[0].isnan().any()
