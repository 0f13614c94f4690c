"""Each front end on odd models: structures, state, memory, random numbers; and what is refused rather than got wrong."""

from __future__ import annotations

from typing import NamedTuple, Optional

import pytest
import torch
from torch import nn

from ir_tools.errors import CaptureError
from ir_tools.frontends.capture import FRONTENDS, capture
from ir_tools.frontends.source import prepare
from ir_tools.frontends.user_model import call_model, forward_parameters
from ir_tools.ir import Program, check_wellformed
from ir_tools.ir.dialect import short_name
from ir_tools.ir.signature import binder
from ir_tools.torch_compat import pytree
from tests import models
from tests.models import Case, Linear, image, row, seeded

ALL = {"export", "trace", "script", "fx"}
CASES = {**models.SIGNATURES, **models.MEMORY}
CAPTURED_BY = {
    **dict.fromkeys(CASES, ALL),
    "model_output": {"export", "trace"},  # transformers' Python is beyond torch.jit.script and fx
    "nested_in": {"export", "trace", "fx"},  # without annotations, scripted arguments are tensors
    "none_in": {"export", "trace"},  # likewise None; fx takes every argument for a tensor
    "number_in": {"export", "trace", "script"},
    "keyword_only": {"export", "trace"},
    "var_args": {"export", "trace"},
    "var_keywords": {"export", "trace"},
    "writes_into_views": {"export", "trace", "script"},  # fx has no item assignment
}


def source_of(case: Case):
    return prepare(case.model, [(case.args, case.kwargs)])


def copies(value):
    return pytree.tree_map_only(torch.Tensor, torch.clone, value)


def assert_same(expected, got) -> None:
    """The same structure, and leaf by leaf bitwise the same value."""
    (one, tree), (two, other) = pytree.tree_flatten(expected), pytree.tree_flatten(got)
    assert tree == other
    for a, b in zip(one, two, strict=True):
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype and torch.equal(a, b)
        else:
            assert type(a) is type(b) and a == b


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("name", CASES)
def test_structure_and_numbers_are_those_of_the_model(name, frontend):
    case = seeded(CASES[name])
    source = source_of(case)
    if frontend not in CAPTURED_BY[name]:
        with pytest.raises(CaptureError, match=f"the front end '{frontend}' cannot capture this model: ."):
            capture(source, frontend)
        return
    program = capture(source, frontend).program
    check_wellformed(program)
    got = program(*copies(case.args), **copies(case.kwargs))
    case.args, case.kwargs = copies(case.args), copies(case.kwargs)
    expected = case()
    assert type(got) is type(expected)
    assert_same(expected, got)


# -- state --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_a_buffer_written_in_place_is_state_with_the_value_it_had_before_capture(frontend):
    case = seeded(models.MEMORY["counter"])
    program = capture(source_of(case), frontend).program
    assert program.state == {"calls"}
    assert program.constants["calls"] == 5 and case.model.calls == 5
    assert program.constants["calls"].data_ptr() != case.model.calls.data_ptr()
    case.model.calls.fill_(9)
    assert program.constants["calls"] == 5


class PlainTensorCounter(Linear):
    """Counts in a tensor that is no buffer."""

    def __init__(self):
        super().__init__()
        self.n = torch.tensor(5.0)

    def forward(self, x):
        self.n += 1
        return self.linear(x) * self.n


@pytest.mark.parametrize("frontend", ["export", "script"])
def test_a_plain_tensor_written_in_place_is_state_too(frontend):
    model = PlainTensorCounter().eval()
    program = capture(prepare(model, [((row(),), {})]), frontend).program
    assert len(program.state) == 1
    assert [program.constants[n].item() for n in program.state] == [5] and model.n == 5


@pytest.mark.parametrize("frontend, reason", [("trace", "no buffer"), ("fx", "make it a buffer")])
def test_a_plain_tensor_is_refused_where_the_write_would_be_lost(frontend, reason):
    model = PlainTensorCounter().eval()
    with pytest.raises(CaptureError, match=reason):
        capture(prepare(model, [((row(),), {})]), frontend)
    assert model.n == 5


class NumberCounter(Linear):
    n = 0

    def forward(self, x):
        self.n = self.n + 1
        return self.linear(x) * self.n


class ReboundBuffer(Linear):
    def __init__(self):
        super().__init__()
        self.register_buffer("cache", torch.zeros(2, 4))

    def forward(self, x):
        y = self.linear(x) + self.cache
        self.cache = y
        return y


@pytest.mark.parametrize("model, name", [(NumberCounter(), "n"), (ReboundBuffer(), "cache")])
def test_state_in_attributes_is_refused_and_left_as_it_was(model, name):
    before = getattr(model, name)
    with pytest.raises(CaptureError, match=rf"forward .* self\.{name}.*: keep such state in a buffer and write"):
        prepare(model.eval(), [((row(),), {})])
    assert getattr(model, name) is before


class Remembers(Linear):
    """Leaves what it saw in attributes that it never reads."""

    def __init__(self):
        super().__init__()
        self.seen: list[torch.Tensor] = []
        self.table: dict[int, torch.Tensor] = {}
        self.last = None

    def forward(self, x):
        self.seen.append(x)
        self.table[len(self.table)] = x
        self.last = x
        return self.linear(x)


@pytest.mark.parametrize("frontend", ["export", "trace"])
def test_attributes_that_are_only_written_are_no_state_and_are_put_back(frontend):
    model, x = Remembers().eval(), row()
    program = capture(prepare(model, [((x,), {})]), frontend).program
    assert model.seen == [] and model.table == {} and model.last is None
    assert not program.state
    assert torch.equal(program(x), model(x))


# -- constants ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_tied_weights_are_one_constant_that_aliases_the_users(frontend):
    case = seeded(models.MEMORY["tied_weights"])
    program = capture(source_of(case), frontend).program
    pointers = [t.data_ptr() for t in program.constants.values()]
    assert len(pointers) == len(set(pointers)) == 3
    shared = case.model.head.weight
    (name,) = (n for n, t in program.constants.items() if t.data_ptr() == shared.data_ptr())
    assert name in ("embedding.weight", "head.weight")
    assert not program.constants[name].requires_grad and not isinstance(program.constants[name], nn.Parameter)


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_views_of_one_storage_are_different_constants(frontend):
    case = seeded(models.MEMORY["parameters_on_views"])
    program = capture(source_of(case), frontend).program
    assert set(program.constants) == {"left", "right", "shift"}
    assert program.constants["left"].stride() == (1, 8)
    assert program.constants["right"].storage_offset() == 4


# -- numbers that depend on data ----------------------------------------------------------------------------------------


class ReturnsItem(Linear):
    def forward(self, x):
        y = self.linear(x)
        return y, y.sum().item()


class ReturnsSize(Linear):
    def forward(self, x):
        return self.linear(x), x.shape[0], x.dim() > 1


def test_a_number_read_out_of_a_tensor_cannot_be_an_output():
    with pytest.raises(CaptureError, match="a number cannot follow the data in a compiled model; return a tensor"):
        prepare(ReturnsItem().eval(), [((row(),), {})])


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_a_size_can_be_an_output(frontend):
    program = capture(prepare(ReturnsSize().eval(), [((row(),), {})]), frontend).program
    got = program(row())
    assert got[1:] == (2, True) and type(got[1]) is int and type(got[2]) is bool


class BranchesOnData(Linear):
    def forward(self, x):
        return self.linear(x) if bool(x.sum() > 0) else x


@pytest.mark.parametrize("frontend", ["export", "fx"])
def test_a_branch_on_data_is_refused(frontend):
    with pytest.raises(CaptureError):
        capture(prepare(BranchesOnData().eval(), [((row(),), {})]), frontend)


def test_a_branch_on_data_is_kept_by_script():
    model = BranchesOnData().eval()
    program = capture(prepare(model, [((row(),), {})]), "script").program
    for x in (row().abs(), -row().abs()):
        assert torch.equal(program(x), model(x))


def test_tracing_a_branch_on_data_warns():
    captured = capture(prepare(BranchesOnData().eval(), [((row(),), {})]), "trace")
    assert any("Python boolean" in line for line in captured.warnings)


class DrawsNumbers(Linear):
    def forward(self, x):
        return self.linear(x) + torch.rand(4)


@pytest.mark.parametrize("frontend", ["export", "trace", "script"])
def test_random_numbers_are_drawn_at_every_run(frontend):
    model, x = DrawsNumbers().eval(), row()
    program = capture(prepare(model, [((x,), {})]), frontend).program
    assert [short_name(n.target) for n in program.calls].count("rand") == 1
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    assert torch.equal(program(x), expected)
    assert not torch.equal(program(x), expected)


# -- calls --------------------------------------------------------------------------------------------------------------


class EveryKind(nn.Module):
    def forward(self, a, /, b, c=3, *rest, k=1, needed, **more):
        return a, b, c, rest, k, needed, more


CALLS = [
    ((1, 2), {"needed": 5}),
    ((1,), {"b": 2, "needed": 5, "z": 1}),
    ((1, 2, 3, 4, 5), {"needed": 5, "k": 2, "z": 1, "y": 2}),
    ((1, 2, 7), {"needed": 5, "k": 1}),
    ((1, 2, 3, 4), {"needed": 0}),
]


@pytest.mark.parametrize("args, kwargs", CALLS)
def test_a_bound_call_reaches_the_model_as_it_was_made(args, kwargs):
    model = EveryKind()
    bound = binder(forward_parameters(model))(*args, **kwargs)
    assert call_model(model, bound) == model(*args, **kwargs)


class PositionalAndRest(Linear):
    def forward(self, x, /, y, *rest, k=1, **more):
        return self.linear(x) + y * 2 + sum(r * 3 for r in rest) + k + sum(v * 4 for v in more.values())


@pytest.mark.parametrize("frontend", ["export", "trace"])
def test_arguments_of_every_kind_reach_the_graph(frontend):
    model = PositionalAndRest().eval()
    args, kwargs = (row(), row(), row()), {"k": 2, "z": row(4)}
    program = capture(prepare(model, [(args, kwargs)]), frontend).program
    other = tuple(row() for _ in args), {"k": 2, "z": row(4)}
    assert torch.equal(program(*other[0], **other[1]), model(*other[0], **other[1]))


# -- dtypes, sizes, modes -----------------------------------------------------------------------------------------------


def conv_net_in(dtype: torch.dtype) -> Case:
    case = seeded(models.conv_net)
    return Case(case.model.to(dtype), (case.args[0].to(dtype),))


class Spectrum(Linear):
    def forward(self, x):
        return torch.fft.rfft(self.linear(x)) * (1 + 2j)


ODD = {
    "float64": lambda: conv_net_in(torch.float64),
    "bfloat16": lambda: conv_net_in(torch.bfloat16),
    "float16": lambda: conv_net_in(torch.float16),
    "complex_out": lambda: Case(Spectrum(), (row(),)),
    "complex_in": lambda: Case(nn.Tanh(), (torch.randn(2, 3, dtype=torch.complex64),)),
    "no_parameters": lambda: Case(nn.ReLU(), (row(),)),
    "nothing_at_all": lambda: Case(nn.Identity(), (row(),)),
    "empty_batch": lambda: Case(seeded(models.conv_net).model, (image(0, 3, 12, 12),)),
    "scalar": lambda: Case(nn.ReLU(), (torch.tensor(3.0),)),
    "bool_and_int": lambda: Case(nn.Embedding(9, 4), (torch.tensor([[1, 8]]),)),
    "not_contiguous": lambda: Case(nn.Linear(4, 4), (torch.randn(4, 3).t(),)),
    "channels_last": lambda: Case(
        seeded(models.conv_net).model.to(memory_format=torch.channels_last),
        (image(2, 3, 12, 12).to(memory_format=torch.channels_last),),
    ),
}


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("name", ODD)
def test_odd_dtypes_and_sizes(name, frontend):
    case = seeded(ODD[name])
    program = capture(source_of(case), frontend).program
    assert_same(case(), program(*case.args))


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_capture_inside_inference_mode(frontend):
    with torch.inference_mode():
        case = seeded(models.MEMORY["counter"])
        program = capture(source_of(case), frontend).program
        assert case.model.calls == 5
        expected = case()
    assert torch.equal(program(*case.args), expected)


def test_auto_tries_the_front_ends_in_order_and_keeps_the_reasons():
    class OnlyTrace(Linear):
        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):  # export keeps it as a region, which is refused
                return self.linear(x)

    captured = capture(prepare(OnlyTrace().eval(), [((row(),), {})]))
    assert captured.frontend == "trace" and list(captured.refusals) == ["export"]
    assert captured.reason == "after export refused"


def test_a_graph_module_and_a_script_module_are_models_like_any_other():
    case = seeded(models.conv_net)
    for model in (torch.fx.symbolic_trace(case.model), torch.jit.script(case.model), torch.jit.trace(case.model, case.args)):
        captured = capture(prepare(model.eval(), [(case.args, {})]))
        assert isinstance(captured.program, Program)
        assert torch.equal(captured.program(*case.args), case())


def test_an_exported_program_is_a_model_like_any_other():
    case = seeded(models.conv_net)
    exported = torch.export.export(case.model, case.args)
    captured = capture(prepare(exported, [(case.args, {})]))
    assert captured.frontend == "export"
    assert {"0.weight", "1.running_var", "9.bias"} <= set(captured.program.constants)
    assert torch.equal(captured.program(*case.args), case())


# -- attention ----------------------------------------------------------------------------------------------------------


class Attends(nn.Module):
    """Its fast path is one op, which gives other numbers than the ops that stand for it elsewhere."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


ATTENTION = {
    "attention": (Attends, ALL),
    "encoder_layer": (lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), ALL - {"fx"}),
    "encoder": (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2), ALL - {"fx"}),
}


def ops_of(module: torch.jit.ScriptModule) -> str:
    return str(module.inlined_graph)


@pytest.mark.parametrize("name", ATTENTION)
def test_no_front_end_takes_the_fast_path_of_attention(name):
    build, frontends = ATTENTION[name]
    source = source_of(seeded(lambda: Case(build(), (torch.randn(2, 5, 16),))))
    programs = {frontend: capture(source, frontend).program for frontend in sorted(frontends)}
    outputs = {frontend: program.run(*source.tensors)[0] for frontend, program in programs.items()}
    for frontend, program in programs.items():
        assert torch.equal(outputs[frontend], outputs["export"]), frontend
        names = [short_name(n.target) for n in program.calls]
        assert names.count("scaled_dot_product_attention") == (2 if name == "encoder" else 1), frontend


def test_the_users_own_scripting_keeps_its_fast_path():
    """Capture compiles attention differently, and its compilation is not what the user's `torch.jit.script` finds."""
    case = seeded(lambda: Case(Attends(), (torch.randn(2, 5, 16),)))
    for _ in range(2):  # compiled before by the user, then by capture; and in the other order
        capture(source_of(case), "script")
        assert "aten::_native_multi_head_attention" in ops_of(torch.jit.script(case.model))
        case.model.attention.extra = 1  # another class to torch.jit.script


class Named(NamedTuple):
    answer: torch.Tensor
    other: Optional[torch.Tensor]  # noqa: UP045  # as TorchScript reads it


class NamedWhenScripted(Linear):
    """Like torchvision's GoogLeNet: eager gives a tensor, TorchScript a named tuple."""

    def forward(self, x):
        y = self.linear(x)
        if torch.jit.is_scripting():
            return Named(y, None)
        return y


class NamesItsDevice(Linear):
    def forward(self, x):
        return self.linear(x) + len(str(x.device))


@pytest.mark.parametrize("model", [NamedWhenScripted(), NamesItsDevice()], ids=lambda m: type(m).__name__)
def test_script_takes_what_only_torchscript_says_otherwise(model):
    x = row()
    program = capture(prepare(model.eval(), [((x,), {})]), "script").program
    assert torch.equal(program(x), model(x))
