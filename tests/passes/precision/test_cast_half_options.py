"""What the user asks of `cast_half`: options, modules and ops kept in float, and sites that are skipped."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ir_tools.ir import facts
from ir_tools.ir.dialect import short_name
from passes import CATALOGUE, OptionError
from tests.check import captured, ops, rewritten
from tests.passes.precision.half_casts import IMAGE, Model, X, assert_casts_are_lean, cast_half, every_kind, reasons

# -- the table of levels -----------------------------------------------------------------------------------------------


def test_the_default_is_bfloat16_at_o2() -> None:
    model = Model(every_kind, linear=nn.Linear(4, 4), norm=nn.LayerNorm(4)).eval()
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


# -- sites and teeth ---------------------------------------------------------------------------------------------------


def test_a_skipped_site_stays_float_and_only_that_one() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).eval()
    program = captured(model, X)
    _, log = rewritten(cast_half, program, X)
    sites = [r.site for r in log.rewrites]
    assert sites == [f"cast_half@{name}" for name in ("linear", "silu", "linear_1", "tanh", "linear_2")]
    for i, site in enumerate(sites):
        after, log = rewritten(cast_half, program, X, skip={site})
        assert [r.site for r in log.rewrites] == [s for s in sites if s != site]
        found = [facts.dtype(node) for node in after.calls if short_name(node.target) != "to"]
        assert found == [torch.float32 if j == i else torch.bfloat16 for j in range(5)]
        assert_casts_are_lean(after)
    assert cast_half(program, skip=sites) is program


def test_sites_are_the_same_from_run_to_run() -> None:
    model = Model(every_kind, linear=nn.Linear(4, 4), norm=nn.LayerNorm(4)).eval()
    first, second = (rewritten(cast_half, captured(model, X), X)[1].rewrites for _ in range(2))
    assert first == second and len(first) == 3


# -- small numbers -----------------------------------------------------------------------------------------------------


def test_every_site_can_be_skipped_and_is_reported_once() -> None:
    def parts(m: Model, x: Tensor) -> Tensor:
        a, b = m.l(x).split(2, -1)
        return m.l(torch.cat([b.sort(-1)[0], a.max(-1, keepdim=True)[0].expand(3, 2)], -1))

    program = captured(Model(parts, l=nn.Linear(4, 4)).eval(), X)
    _, log = rewritten(cast_half, program, X)
    sites = [r.site for r in log.rewrites]
    assert len(set(sites)) == len(sites) and not any("getitem" in r.rule for r in log.rewrites)
    for site in sites:
        _, left = rewritten(cast_half, program, X, skip={site})
        assert site not in [r.site for r in left.rewrites]


def test_a_module_decides_before_a_kind_of_op() -> None:
    program = captured(Nested().eval(), X)
    after, _ = rewritten(cast_half.with_options(keep_float=["head"], overrides={"linear": "O2"}), program, X)
    assert [facts.dtype(n) for n in after.calls if short_name(n.target) == "linear"][-1] is torch.float32


# -- what the user says ------------------------------------------------------------------------------------------------


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
    after, log = rewritten(cast_half.with_options(**options), program, X)
    found = [(short_name(n.target), facts.dtype(n)) for n in after.calls if short_name(n.target) != "to"]
    assert " ".join(name + "*" * (dtype is torch.bfloat16) for name, dtype in found) == expected
    kept = [r for r in log.refusals if r.reason == reasons.IS_KEPT]
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
