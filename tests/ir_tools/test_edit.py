"""Drafts: what is added, what is redirected, what is swept, and that the Program they started from stays as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from ir_tools.ir import Draft, FactError, IllFormedError, Program, alias_analysis, check_wellformed, facts
from ir_tools.ir.dialect import aten, numbers_in
from ir_tools.ir.effects import written_nodes
from ir_tools.ir.provenance import record
from passes.testing import fingerprint
from tests.check import assert_bitwise_equal, captured, ops, outputs_of

X = torch.randn(2, 4)


def program_of(*layers: nn.Module) -> Program:
    return captured(nn.Sequential(*layers).eval(), X)


def node_called(program: Program, name: str) -> fx.Node:
    (node,) = (n for n in program.nodes if n.name == name)
    return node


# -- drafts and the Programs they start from ----------------------------------------------------------------------------


def test_a_draft_without_edits_gives_the_very_program_back() -> None:
    program = program_of(nn.Linear(4, 4), nn.ReLU())
    assert Draft.of(program).finish() is program


def test_an_edited_draft_leaves_its_program_as_it_was() -> None:
    program = program_of(nn.Linear(4, 4), nn.ReLU())
    before, expected = fingerprint(program), outputs_of(program, X)
    draft = Draft.of(program)
    relu = node_called(draft.program, "relu")
    with draft.before(relu, "test"):
        new = draft.call(aten.tanh.default, relu.args[0])
        draft.constant("unread", torch.ones(3))
    draft.redirect(relu, new)
    after = draft.finish()
    assert ops(after) == ["linear", "tanh"] and "unread" not in after.constants
    assert fingerprint(program) == before
    assert_bitwise_equal(expected, outputs_of(program, X))


def test_names_survive_copying() -> None:
    program = program_of(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
    assert [n.name for n in program.copy().nodes] == [n.name for n in program.nodes]


# -- adding -------------------------------------------------------------------------------------------------------------


def test_a_call_is_canonicalized_and_knows_its_shape_and_origin() -> None:
    draft = Draft.of(program_of(nn.Linear(4, 3)))
    linear = node_called(draft.program, "linear")
    with draft.before(linear, "test"):
        new = draft.call(aten.softmax.int, linear.args[0], dim=1)
    assert new.args == (linear.args[0], 1, None) and new.kwargs == {}
    assert (facts.shape(new), facts.dtype(new)) == ((2, 4), torch.float32)
    assert record(new).module == record(linear).module == "0" and record(new).passes == ("test",)
    check_wellformed(draft.program)


def test_calls_that_an_op_rejects_raise() -> None:
    draft = Draft.of(program_of(nn.Linear(4, 3)))
    (x,) = draft.program.placeholders
    with draft.before(draft.program.output):
        with pytest.raises(TypeError, match=r"aten::relu takes 1 positional arguments, got 2"):
            draft.call(aten.relu.default, x, 1)
        with pytest.raises(TypeError, match=r"aten::softmax.int needs the argument 'dim'"):
            draft.call(aten.softmax.int, x)
        with pytest.raises(TypeError, match="has no argument 'dims'"):
            draft.call(aten.softmax.int, x, 1, dims=2)
        with pytest.raises(FactError, match=r"aten::matmul\(float32\[2, 4\], float32\[2, 4\]\) fails"):
            draft.call(aten.matmul.default, x, x)


def test_constants_are_detached_and_stored_once() -> None:
    draft = Draft.of(program_of(nn.ReLU()))
    weight = nn.Parameter(torch.randn(3))
    first = draft.constant("w", weight)
    assert draft.constant("other", weight) is first and draft.constant("w", weight) is first
    other = draft.constant("w", torch.randn(3))
    assert other is not first and str(other.target) == "w@2"
    assert not draft.program.constants["w"].requires_grad and type(draft.program.constants["w"]) is Tensor
    assert draft.program.constants["w"].data_ptr() == weight.data_ptr()


def test_views_of_one_storage_are_constants_of_their_own() -> None:
    draft = Draft.of(program_of(nn.ReLU()))
    whole = torch.randn(4, 4)
    views = [whole, whole.t(), whole[:2], whole.view(torch.int32)]
    assert len({draft.constant("w", view) for view in views}) == len(views)
    complex_ = torch.randn(4, dtype=torch.complex64)
    views = [complex_, complex_.conj(), complex_.imag, complex_.conj().imag]  # the last one holds a negative bit
    assert len({draft.constant("c", view) for view in views}) == len(views)


def test_what_is_inserted_behind_an_input_may_read_every_constant() -> None:
    draft = Draft.of(program_of(nn.Linear(4, 4)))
    (x,) = draft.program.placeholders
    new = draft.insert_after(x, [node_called(draft.program, "linear")], "test", aten.neg.default)
    after = draft.finish()
    check_wellformed(after)
    assert ops(after) == ["neg", "linear"] and record(new).passes == ("test",)


# -- redirecting, replacing, sweeping -----------------------------------------------------------------------------------


def test_redirecting_spares_the_new_value_itself() -> None:
    draft = Draft.of(program_of(nn.ReLU()))
    relu = node_called(draft.program, "relu")
    with draft.before(draft.program.output):
        new = draft.call(aten.exp.default, relu)
    draft.redirect(relu, new)
    after = draft.finish()
    assert ops(after) == ["relu", "exp"]
    assert_bitwise_equal([X.relu().exp()], outputs_of(after, X))


def test_a_replaced_node_hands_on_its_name() -> None:
    draft = Draft.of(program_of(nn.ReLU(), nn.ReLU()))
    old = node_called(draft.program, "relu_1")
    with draft.before(old):
        new = draft.call(aten.relu.default, draft.program.placeholders[0])
    draft.replace(old, new)
    after = draft.finish()
    assert [n.name for n in after.calls] == ["relu_1"] and [n.name for n in after.copy().calls] == ["relu_1"]


def test_sweeping_keeps_effects_and_returns_what_went() -> None:
    draft = Draft.of(program_of(nn.ReLU()))
    (x,) = draft.program.placeholders
    with draft.before(draft.program.output):
        dead = draft.call(aten.exp.default, draft.call(aten.neg.default, x))
        draft.call(aten.mul_.Scalar, x, 2.0)
    assert dead.name == "exp"
    assert draft.sweep() == [("exp", "exp"), ("neg", "neg")]
    assert ops(draft.program) == ["relu", "mul_"]


def test_sweeping_forgets_unread_constants_and_state() -> None:
    draft = Draft.of(program_of(nn.ReLU()))
    draft.constant("state", torch.ones(2), state=True)
    assert draft.program.state == {"state"}
    draft.sweep()
    assert not draft.program.constants and not draft.program.state


# -- facts about memory -------------------------------------------------------------------------------------------------


def dies(function, *inputs: Tensor) -> bool:
    """The last op reads its second operand for the last time, and may write into its memory."""

    class Model(nn.Module):
        def forward(self, *inputs: Tensor):
            return function(*inputs)

    program = captured(Model(), *inputs)
    user = next(n for n in program.calls if n.target is aten.maximum.default)
    return alias_analysis.dies_at(user.args[1], user)


@pytest.mark.parametrize(
    "expected, function",
    [
        (True, lambda x: x.relu().maximum(x.exp())),
        (True, lambda x: x.relu().maximum(x.exp().t().t())),
        (True, lambda x: x.relu().maximum(x.exp().reshape(4, 2).reshape(2, 4))),
        (False, lambda x: x.relu().maximum(x)),  # the caller's
        (False, lambda x: x.relu().maximum(x.t().t())),
        (False, lambda x: (lambda e: x.relu().maximum(e) + e)(x.exp())),
        (False, lambda x: (lambda e: (x.relu().maximum(e), e))(x.exp())),
        (False, lambda x: (lambda e: e.maximum(e))(x.exp())),
        (False, lambda x: (lambda e: x.relu().maximum(e.t().t()) + e)(x.exp())),
        (False, lambda x: (lambda e, v: x.relu().maximum(e) + v.sum())(*(lambda e: (e, e[:, 1]))(x.exp()))),
        (False, lambda x: (lambda a, b: x[:, :2].maximum(a) + b)(*x.exp().chunk(2, 1))),
        (False, lambda x: (lambda e, n: x.relu().maximum(torch.broadcast_tensors(e, n)[1]) + n)(x.exp(), x[:1].neg())),
    ],
)
def test_when_a_value_dies(expected: bool, function) -> None:
    assert dies(function, X) is expected


def test_a_constant_never_dies() -> None:
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("c", torch.randn(2, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x.maximum(self.c)

    (user,) = captured(Model(), X).calls
    assert alias_analysis.dies_at(user.args[1], user) is False


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm", [torch.batch_norm, torch.instance_norm], ids=["batch", "instance"])
def test_norms_write_statistics_though_no_schema_says_so(norm, training: bool) -> None:
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(4))
            self.register_buffer("var", torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return norm(x, None, None, self.mean, self.var, training, 0.1, 1e-5, True)

    model, x = Norm(), torch.randn(3, 4, 5)
    program = captured(model, x)
    (node,) = program.calls
    moved = {"mean", "var"} if training else set()
    assert {n.target for n in written_nodes(node)} == moved and program.state == moved
    program.run(x)
    assert torch.equal(model.mean, torch.zeros(4)) and torch.equal(model.var, torch.ones(4))


def test_the_numbers_that_an_op_computes_with() -> None:
    class Numbers(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.clamp(-1e9, 7).masked_fill(x > 0.5, 3)[:, :2].softmax(-1).sub(2, alpha=0.5)

    found = {node.name: numbers_in(node) for node in captured(Numbers(), X).calls}
    assert found == {
        "clamp": [-1e9, 7], "gt": [0.5], "masked_fill": [3], "slice_1": [], "softmax": [], "sub": [2, 0.5],
    }  # fmt: skip


# -- the contract -------------------------------------------------------------------------------------------------------


def test_breaches_of_the_contract_are_listed() -> None:
    program = program_of(nn.Linear(4, 4), nn.ReLU()).copy()
    check_wellformed(program)
    relu = node_called(program, "relu")
    relu.args = (*relu.args, 1)
    program.constants["0.weight"] = nn.Parameter(torch.randn(4, 4))
    program.state = frozenset({"ghost"})
    program.output.args = ([relu],)
    with pytest.raises(IllFormedError) as error:
        check_wellformed(program)
    for breach in (
        "relu: the arguments of aten::relu are not in canonical form",
        "constant 0.weight must be a detached alias",
        "ghost is not in the table of constants",
        "the output must hold a flat tuple",
    ):
        assert breach in str(error.value)
