"""Stubs around quantisable subgraphs: where they are inserted, and that they are the identity."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ir_tools.ir.dialect import argument, short_name
from passes import CATALOGUE
from tests.check import assert_bitwise_equal, captured, ops, outputs_of, rewritten

insert_quant_stubs = CATALOGUE["insert_quant_stubs"]
X = torch.randn(2, 3, 8, 8)


class Model(nn.Module):
    def __init__(self, function: Callable[..., Tensor], **layers: nn.Module):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def check_stubs(model: nn.Module, *inputs: Tensor):
    program = captured(model.eval(), *inputs)
    after, log = rewritten(insert_quant_stubs, program, *inputs)
    assert_bitwise_equal(outputs_of(program, *inputs), outputs_of(after, *inputs))
    assert [op for op in ops(after) if op != "quant_stub"] == ops(program)
    return after, log


def stubs(program) -> dict[str, tuple[str, list[str]]]:
    """site -> (what the stub reads, who reads the stub)."""
    return {
        argument(node, "site"): (argument(node, "x").name, sorted(user.name for user in node.users))
        for node in program.calls
        if short_name(node.target) == "quant_stub"
    }


def test_a_subgraph_gets_a_stub_at_each_end() -> None:
    after, log = check_stubs(Model(lambda m, x: F.relu(m.conv(x)) + 1.0, conv=nn.Conv2d(3, 4, 3)), X)
    assert ops(after) == ["quant_stub", "conv2d", "relu", "add", "quant_stub"]
    assert stubs(after) == {"region0.in0": ("inputs_0_", ["conv2d"]), "region0.out0": ("add", ["output"])}
    assert [r.site for r in log.rewrites] == ["insert_quant_stubs@inputs_0_.in.conv2d", "insert_quant_stubs@add.out"]


def test_an_op_that_is_not_quantisable_separates_two_subgraphs() -> None:
    after, _ = check_stubs(Model(lambda m, x: m.b(m.a(x).softmax(1)), a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(4, 4, 3)), X)
    assert ops(after) == ["quant_stub", "conv2d", "quant_stub", "softmax", "quant_stub", "conv2d", "quant_stub"]
    assert list(stubs(after)) == ["region0.in0", "region0.out0", "region1.in0", "region1.out0"]


def test_users_inside_and_outside_a_subgraph_read_apart() -> None:
    """The float user of an input keeps the input."""
    after, _ = check_stubs(Model(lambda m, x: m.a(x).relu() + x.exp().sum(), a=nn.Conv2d(3, 4, 3)), X)
    assert stubs(after)["region0.in0"] == ("inputs_0_", ["conv2d"])


def test_a_value_that_leaves_and_stays_keeps_its_inner_users() -> None:
    after, _ = check_stubs(
        Model(lambda m, x: (lambda y: m.b(y) + y.exp().sum())(m.a(x)), a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(4, 4, 3)), X
    )
    assert ("conv2d", ["exp"]) in stubs(after).values(), "the second convolution must read the first one, not the stub"


def test_integers_get_no_stub() -> None:
    after, _ = check_stubs(Model(lambda m, x, i: m.a(x) * i, a=nn.Conv2d(3, 4, 3)), X, torch.ones(6, dtype=torch.int64))
    assert [value for value, _ in stubs(after).values()] == ["inputs_0_", "mul"]


def test_constants_get_no_stub() -> None:
    after, _ = check_stubs(nn.Sequential(nn.Conv2d(3, 4, 3)), X)
    assert all("weight" not in value and "bias" not in value for value, _ in stubs(after).values())


@pytest.mark.parametrize(
    "model, inputs",
    [
        (Model(lambda m, x: F.relu(x) + x), (X,)),  # nothing that int8 makes faster
        (Model(lambda m, x: x.exp()), (X,)),
        (nn.Sequential(nn.Conv2d(3, 4, 3)).double(), (X.double(),)),  # not float32
        (nn.Sequential(nn.Conv2d(3, 4, 3)).bfloat16(), (X.bfloat16(),)),
        (Model(lambda m, i: i @ i.t() + i.sum()), (torch.randint(9, (3, 4)),)),
    ],
    ids=["no product", "no quantisable op", "float64", "bfloat16", "integers"],
)
def test_it_leaves_alone(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    program = captured(model.eval(), *inputs)
    after, log = rewritten(insert_quant_stubs, program, *inputs)
    assert after is program and not log.rewrites


def _input_written(m: nn.Module, x: Tensor) -> Tensor:
    x[0].add_(1.0)
    return m.a(x)


def _result_written(m: nn.Module, x: Tensor) -> Tensor:
    y = m.a(x)
    y[0].add_(1.0)
    return m.b(y)


@pytest.mark.parametrize("function", [_input_written, _result_written])
def test_values_written_in_place_get_no_stub(function: Callable) -> None:
    """A stub copies: put before the write, it would show its users the old value."""
    program = captured(Model(function, a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(4, 4, 3)).eval(), X)
    after, _ = rewritten(insert_quant_stubs, program, X)
    assert after is program


def test_each_site_can_be_skipped() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softmax(1), nn.Conv2d(4, 4, 3)).eval()
    program = captured(model, X)
    _, log = rewritten(insert_quant_stubs, program, X)
    sites = [r.site for r in log.rewrites]
    assert len(sites) == 4
    assert [r.site for r in rewritten(insert_quant_stubs, captured(model, X), X)[1].rewrites] == sites
    for site in sites:
        _, log = rewritten(insert_quant_stubs, program, X, skip={site})
        assert [r.site for r in log.rewrites] == [s for s in sites if s != site]


def test_a_stub_that_is_no_identity_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    import passes.quantize.insert_quant_stubs as source

    not_identity = torch.library.custom_op("checks::not_identity", lambda x, site: x * 1.001, mutates_args=(),
                                         schema="(Tensor x, str site) -> Tensor")  # fmt: skip
    not_identity.register_fake(lambda x, site: torch.empty_like(x))
    monkeypatch.setattr(source, "quant_stub", torch.ops.checks.not_identity.default)
    program = captured(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), X)
    after = insert_quant_stubs(program)
    assert ops(after) == ["not_identity", "conv2d", "not_identity"]
    with pytest.raises(AssertionError, match="moved by"):
        assert_bitwise_equal(outputs_of(program, X), outputs_of(after, X))


def test_two_subgraphs_that_read_one_value_have_sites_of_their_own() -> None:
    conv = nn.Conv2d(3, 3, 3)
    _, log = check_stubs(Model(lambda m, x: m.conv(x).exp() + m.conv(x).sin(), conv=conv), X)
    entries = [r.site for r in log.rewrites if ".in" in r.site]
    assert entries[:2] == ["insert_quant_stubs@inputs_0_.in.conv2d", "insert_quant_stubs@inputs_0_.in.conv2d_1"]


def test_a_value_whose_elements_share_memory_gets_no_stub() -> None:
    """A stub is a copy in the reference: it would lie otherwise in memory, and the linear might add in another order."""
    _, log = check_stubs(Model(lambda m, x: m.linear((x + 1)[:1].exp().expand(2, -1, -1, -1)), linear=nn.Linear(8, 4)), X)
    assert [r.reason for r in log.refusals] == ["a stub would change its memory layout"]
