"""Dropping ops that compute their own operand: it rewrites, it refuses, and every bit stays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ir_tools.ir import Program
from passes import CATALOGUE, rule_pass
from tests.check import assert_bitwise_equal, assert_sites_can_be_skipped, captured, ops, outputs_of, rewritten

remove_neutral_ops = CATALOGUE["remove_neutral_ops"]

FLOATS = torch.tensor([[-0.0, 0.0, 1.5, -2.5], [float("inf"), -float("inf"), 1e-45, float("nan")], [0.5, -0.5, 3.0, -7.0]])
INTS = torch.tensor([[0, 1, -2, 2**62], [5, -(2**63), 3, 4], [7, 8, 9, -1]])
COMPLEX = torch.complex(FLOATS, FLOATS.flip(0))


class Function(nn.Module):
    """`function` of a value of the graph's own, and its result read by another op: nobody sees whose memory it is."""

    def __init__(self, function: Callable, bare: bool = False, **constants: Tensor):
        super().__init__()
        self.function, self.bare = function, bare
        for name, tensor in constants.items():
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        if self.bare:
            return self.function(self, x)
        y = self.function(self, x.flip(0))
        return y.flip(0)


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    """Zeros with their signs too; every NaN is one."""
    return all(
        torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) and torch.equal(x.signbit() | x.isnan(), y.signbit() | y.isnan())
        for x, y in zip(a, b, strict=True)
    )


ONES, ZEROS = torch.ones(4), torch.zeros(3, 4)

GOES: dict[str, tuple[Callable, Tensor]] = {
    "x * 1": (lambda m, x: x * 1, FLOATS),
    "x * 1.0": (lambda m, x: 1.0 * x, FLOATS),
    "ints * 1": (lambda m, x: x * 1, INTS),
    "x * ones": (lambda m, x: x * m.ones, FLOATS),
    "ones * x": (lambda m, x: m.ones * x, FLOATS),
    "x / 1": (lambda m, x: x / 1, FLOATS),
    "x / ones": (lambda m, x: x / m.ones, FLOATS),
    "x ** 1": (lambda m, x: x**1, FLOATS),
    "x - 0": (lambda m, x: x - 0, FLOATS),
    "x - zeros": (lambda m, x: x - m.zeros, FLOATS),
    "x + -0.0": (lambda m, x: x + -0.0, FLOATS),
    "x + -zeros": (lambda m, x: x + m.negative_zeros, FLOATS),
    "ints + 0": (lambda m, x: x + 0, INTS),
    "ints - 0": (lambda m, x: x - 0, INTS),
    "cat of one": (lambda m, x: torch.cat([x], 1), FLOATS),
    "clone": (lambda m, x: x.clone(), FLOATS),
    "contiguous": (lambda m, x: x.contiguous(), FLOATS),
    "slice": (lambda m, x: x[-3:], FLOATS),
    "repeat": (lambda m, x: x.repeat(1, 1), FLOATS),
    "pad": (lambda m, x: F.pad(x, [0, 0, 0, 0]), FLOATS),
    "constant_pad_nd": (lambda m, x: torch.constant_pad_nd(x, [0, 0]), FLOATS),
    "neg": (lambda m, x: x.neg().neg(), FLOATS),
    "neg of ints": (lambda m, x: x.neg().neg(), INTS),
    "logical_not": (lambda m, x: x.logical_not().logical_not(), INTS > 2),
    "bitwise_not": (lambda m, x: x.bitwise_not().bitwise_not(), INTS),
}
"""Functions of which nothing is left."""

TWICE: dict[str, Callable] = {
    **{name: (lambda x, name=name: getattr(x, name)()) for name in "relu abs ceil floor round trunc sign".split()},
    "clamp": lambda x: x.clamp(-0.5, 1.0),
    "clamp below": lambda x: x.clamp(min=0.5),
    "hardtanh": lambda x: F.hardtanh(x, -0.25, 0.5),
    "relu6": F.relu6,
}


def program_of(function: Callable, x: Tensor, frontend: str = "trace", bare: bool = False) -> Program:
    model = Function(function, bare, ones=ONES, zeros=ZEROS, negative_zeros=-ZEROS, column=torch.ones(3, 1))
    return captured(model.eval(), x, frontend=frontend)


@pytest.mark.parametrize("frontend", ["trace", "export"])
@pytest.mark.parametrize("name", GOES)
def test_it_goes(name: str, frontend: str) -> None:
    function, x = GOES[name]
    program = program_of(function, x, frontend)
    after, log = rewritten(remove_neutral_ops, program, x)
    assert ops(after) == ["flip", "flip"]
    assert len(log.rewrites) == (len(ops(program)) > 2) and not log.refusals  # some go as early as capture
    assert same_bits(outputs_of(program, x), outputs_of(after, x))


def test_not_all_of_these_are_gone_at_capture() -> None:
    left = [name for name, (function, x) in GOES.items() if len(ops(program_of(function, x))) > 2]
    assert {*GOES} - {*left} <= {"slice", "contiguous"}


@pytest.mark.parametrize("name", TWICE)
def test_once_is_enough(name: str) -> None:
    once = TWICE[name]
    program = program_of(lambda m, x: once(once(x)), FLOATS)
    after, log = rewritten(remove_neutral_ops, program, FLOATS)
    assert ops(after) == ops(program_of(lambda m, x: once(x), FLOATS)) and len(log.rewrites) == 1
    assert same_bits(outputs_of(program, FLOATS), outputs_of(after, FLOATS))


def test_casts_slices_and_copies_that_earlier_passes_leave() -> None:
    """A front end drops them; a pass that changed what they read brings them back."""
    from ir_tools.ir import Draft
    from ir_tools.ir.dialect import aten

    draft = Draft.of(program_of(lambda m, x: x.exp(), FLOATS))
    (_, exp, last) = draft.program.calls
    with draft.before(last):
        y = draft.call(aten.to.dtype, exp, torch.float32)
        y = draft.call(aten.slice.Tensor, y, 0, 0, 2**63 - 1)
        y = draft.call(aten.expand.default, y, [3, 4])
        y = draft.call(aten.contiguous.default, y)
    draft.redirect_in(last, exp, y)
    after, log = rewritten(remove_neutral_ops, draft.finish(), FLOATS)
    assert ops(after) == ["flip", "exp", "flip"] and len(log.rewrites) == 4


def test_they_all_go_from_a_chain() -> None:
    program = program_of(lambda m, x: (((x * 1).clone() - 0) / 1).neg().neg() * m.ones, FLOATS)
    after, log = rewritten(remove_neutral_ops, program, FLOATS)
    assert ops(after) == ["flip", "flip"] and len(log.rewrites) == 6


# -- it refuses ---------------------------------------------------------------------------------------------------------

SIGNS = "requirement not met: The zeros keep their signs: integers have none, and of floats -0.0 + 0 is 0.0."
REAL = (
    "requirement not met: The operand is real "
    "(a complex product multiplies by the zero beside the one too, which Inf and -0.0 show)."
)
SHARES = "the model's output would share memory with an input, a constant or another output"

REFUSED: dict[str, tuple[Callable, Tensor, str]] = {
    "float + 0": (lambda m, x: x + 0, FLOATS, SIGNS),
    "float + zeros": (lambda m, x: x + m.zeros, FLOATS, SIGNS),
    "float - -0.0": (lambda m, x: x - -0.0, FLOATS, SIGNS),
    "alpha": (lambda m, x: torch.add(x, m.negative_zeros, alpha=-1), FLOATS, SIGNS),
    "complex * 1": (lambda m, x: x * 1, COMPLEX, REAL),
    "complex / 1": (lambda m, x: x / 1, COMPLEX, REAL),
    "complex - 0": (lambda m, x: x - 0, COMPLEX, REAL),
    "int / 1": (lambda m, x: x / 1, INTS, "the result would change dtype from torch.float32 to torch.int64"),
    "int * 1.0": (lambda m, x: x * 1.0, INTS, "the result would change dtype from torch.float32 to torch.int64"),
    "broadcast": (lambda m, x: x[:1] * m.column, FLOATS, "the result would change shape from (3, 4) to (1, 4)"),
    "logical_not of ints": (
        lambda m, x: x.logical_not().logical_not(), INTS, "the result would change dtype from torch.bool to torch.int64"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_it_refuses(name: str) -> None:
    function, x, reason = REFUSED[name]
    program = program_of(function, x)
    after, log = rewritten(remove_neutral_ops, program, x)
    assert after is program and [refused.reason for refused in log.refusals] == [reason]


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x * 2, lambda m, x: x * m.zeros, lambda m, x: x + 1, lambda m, x: x[1:], lambda m, x: x.repeat(1, 2),
        lambda m, x: x.repeat(1, 1, 1), lambda m, x: F.pad(x, [1, -1, 0, 0]), lambda m, x: x.t().contiguous(),
        lambda m, x: torch.div(x, 1, rounding_mode="floor"), lambda m, x: x.sigmoid().sigmoid(), lambda m, x: x.neg().abs(),
        lambda m, x: x.clamp(0, 1).clamp(0, 0.5), lambda m, x: x.round(decimals=1).round(decimals=1), lambda m, x: x**2,
        lambda m, x: x.double(), lambda m, x: torch.cat([x, x]), lambda m, x: torch.cat([x.t()]),
    ],
)  # fmt: skip
def test_what_does_something_does_not_fit(function: Callable) -> None:
    """These are other ops, not neutral ops that were refused: nothing is said."""
    program = program_of(function, FLOATS)
    after, log = rewritten(remove_neutral_ops, program, FLOATS)
    assert after is program and not log.refusals


@pytest.mark.parametrize(
    "function",
    [lambda m, x: x * 1, lambda m, x: x.view(-1).clone(), lambda m, x: m.ones.cos() * 1, lambda m, x: x.clone()[0],
     lambda m, x: (lambda y: (y, y * 1))(x.exp()), lambda m, x: (lambda y: (y[0], y.clone()))(x.exp())],
)  # fmt: skip
def test_outputs_do_not_share_memory_that_they_had_for_themselves(function: Callable) -> None:
    program = program_of(function, FLOATS, bare=True)
    after, log = rewritten(remove_neutral_ops, program, FLOATS)
    if "cos" in ops(program):  # what the constant is made into is the graph's own
        assert "mul" not in ops(after)
        return
    assert after is program and [refused.reason for refused in log.refusals] == [SHARES]


def test_a_value_of_the_graphs_own_may_be_the_output() -> None:
    program = program_of(lambda m, x: x.exp() * 1, FLOATS, bare=True)
    assert ops(rewritten(remove_neutral_ops, program, FLOATS)[0]) == ["exp"]


class InBranch(nn.Module):
    def forward(self, x: Tensor):
        y = x.exp()
        if bool(x.sum() > 0):
            z = y * 1
        else:
            z = y + 1
        return z, y


class InLoop(nn.Module):
    def forward(self, x: Tensor):
        copies: list[Tensor] = []
        for _ in range(int(x.abs().sum()) + 2):
            copies.append(x.clone())
        return copies[0], copies[1]


class ReadInBranch(InBranch):
    def forward(self, x: Tensor):
        y = x.exp()
        if bool(x.sum() > 0):
            z = (y * 1).sin()
        else:
            z = y + 1
        return z, y


@pytest.mark.parametrize("model", [InBranch, InLoop])
def test_what_leaves_a_branch_or_a_loop_keeps_its_memory(model: type[nn.Module]) -> None:
    x = torch.ones(3, 4)
    program = captured(torch.jit.script(model().eval()), x, frontend="script")
    after, log = rewritten(remove_neutral_ops, program, x)
    assert after is program and [refused.reason for refused in log.refusals] == [SHARES]


def test_what_is_read_in_a_branch_goes() -> None:
    program = captured(torch.jit.script(ReadInBranch().eval()), torch.ones(3, 4), frontend="script")
    after, log = rewritten(remove_neutral_ops, program, torch.ones(3, 4))
    assert len(log.rewrites) == 1 and len(after) == len(program) - 1


class WrittenCopy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y[0].mul_(2)
        return x + y


class WrittenSource(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x.exp()
        y = x * 1
        x[0].mul_(2)
        return x + y


@pytest.mark.parametrize("model", [WrittenCopy, WrittenSource])
def test_a_copy_beside_a_write_is_refused(model: type[nn.Module]) -> None:
    x = torch.randn(3, 4)
    program = captured(model(), x)
    after, log = rewritten(remove_neutral_ops, program, x)
    assert after is program and log.refusals[-1].reason.endswith("is written in place")


def test_each_site_can_be_skipped() -> None:
    model = Function(lambda m, x: (x * 1).exp().clone().sin() - 0)
    assert_sites_can_be_skipped(remove_neutral_ops, lambda: captured(model, FLOATS), FLOATS)


# -- the bits have teeth ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["float + 0", "complex * 1"])
def test_a_rule_without_its_requirement_is_noticed(name: str) -> None:
    function, x, _ = REFUSED[name]
    careless = [replace(rule, requires=()) for rule in remove_neutral_ops.rules]
    program = program_of(function, x)
    after, _ = rewritten(rule_pass("careless", careless, effects=(), doc=""), program, x)
    assert after is not program
    before, now = (torch.view_as_real(o).contiguous() if o.is_complex() else o
                   for o in (outputs_of(program, x)[0], outputs_of(after, x)[0]))  # fmt: skip
    assert not same_bits([before], [now])


def test_a_rule_without_its_condition_is_noticed() -> None:
    careless = [replace(rule, when=()) for rule in remove_neutral_ops.rules]
    program = program_of(lambda m, x: x * 2, torch.ones(3, 4))
    after, _ = rewritten(rule_pass("careless", careless, effects=(), doc=""), program, torch.ones(3, 4))
    with pytest.raises(AssertionError, match="moved by"):
        assert_bitwise_equal(outputs_of(program, torch.ones(3, 4)), outputs_of(after, torch.ones(3, 4)))
