"""Trace validation: a finding for each tracer warning, and "auto" takes a trace only where reads are proven harmless."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import nn

from ir_tools.frontends.capture import capture
from ir_tools.frontends.perturbed_inputs import PERTURBATIONS, perturbed
from ir_tools.frontends.read_dependence import dependence_of_reads
from ir_tools.frontends.source import prepare
from ir_tools.frontends.trace_validation import validate_trace
from ir_tools.frontends.value_reads import run_eagerly
from passes import CaptureError, optimize


class EarlyExit(nn.Module):
    """Branches on its data: a trace holds one side only."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) if x.sum() > 0 else x


class HarmlessCheck(nn.Module):
    """Reads a value in Python, but computes the same whatever it is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool((x > 0).all()):
            self.unused = 1
        return torch.relu(x)


class NeverAnother(nn.Module):
    """Reads a value that is the same for all inputs tried."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not bool(x.isnan().any())
        return torch.relu(x)


class ReadsEqual(nn.Module):
    """Compares tensors by a function that the tracer does not warn about."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y if torch.equal(x, y) else x * y


class ReadsThroughNumpy(nn.Module):
    """Leaves torch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * float(x.detach().numpy().max())


class ReadsAList(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * max(x.flatten().tolist())


KEPT_BY_SCRIPT = (EarlyExit, ReadsEqual)
"""Models whose branches the next front end keeps."""


def row() -> torch.Tensor:
    return torch.rand(2, 4)


def notes(model: nn.Module, *inputs: torch.Tensor) -> list[str]:
    """What the report says about a trace that was asked for."""
    return optimize(model.eval(), example_inputs=inputs, frontend="trace").report.notes


# -- refused by auto ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model, inputs, read",
    [
        (EarlyExit(), 1, "item"),
        (HarmlessCheck(), 1, "item"),
        (ReadsEqual(), 2, "equal"),
        (ReadsThroughNumpy(), 1, "numpy"),
        (ReadsAList(), 1, "tolist"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_auto_refuses_a_trace_of_a_model_that_reads_values(model, inputs, read):
    source = prepare(model.eval(), [(tuple(row() for _ in range(inputs)), {})])
    says = rf"forward reads tensor values in Python \({read} at test_trace_.*py:\d"
    if isinstance(model, KEPT_BY_SCRIPT):
        captured = capture(source)
        assert captured.frontend == "script"
        assert re.search(says, captured.refusals["trace"])
    else:
        with pytest.raises(CaptureError, match=rf"trace: .*{says}"):
            capture(source)


def test_auto_refuses_where_torch_saw_memory_read_and_nothing_was_recorded():
    """Such as by numpy deep inside torch's own Python: the tracer's warning is all there is."""
    source = prepare(nn.Tanh(), [((row(),), {})])
    program = capture(source, "trace").program
    for text, refusal in (("to a NumPy array", "numpy at a.py:3"), ("to a Python list", "numpy at a.py:3"), ("to a size", "")):
        heard = warnings.WarningMessage(f"Converting a tensor {text} might", torch.jit.TracerWarning, "a.py", 3)
        assert refusal in (validation := validate_trace(program, source, [heard], proof_needed=True)).refusal
        assert bool(validation.refusal) == bool(refusal)


# -- one finding for each warning ------------------------------------------------------------------------------------------


def test_a_clean_trace_has_nothing_to_say():
    assert notes(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), torch.rand(1, 3, 8, 8)) == []


def test_a_branch_on_data_mattered():
    (note,) = notes(EarlyExit(), row())
    assert "Converting a tensor to a Python boolean: mattered: with negated inputs the trace differs (SQNR" in note
    assert note.startswith("test_trace_validation.py:")


def test_another_value_with_the_same_output_did_not_matter():
    (note,) = notes(HarmlessCheck(), row())
    assert note.endswith("did not matter on 5 perturbed inputs, though the value is another one with negated inputs")


def test_a_value_that_is_always_the_same_did_not_matter():
    (note,) = notes(NeverAnother(), row())
    assert note.endswith("did not matter on 5 perturbed inputs: the value was the same")


def test_a_read_without_a_warning_gets_a_finding_too():
    x = row()
    (note,) = notes(ReadsEqual(), x, x.clone())
    assert "equal reads a value in Python: mattered: with shuffled inputs the trace differs" in note
    (note,) = notes(ReadsEqual(), x, torch.zeros(2, 4))
    assert "equal reads a value in Python: did not matter on 5 perturbed inputs, though" in note  # 0 + 0 and 0 * 0


@pytest.mark.parametrize("model", [ReadsThroughNumpy(), ReadsAList()])
def test_a_read_past_dispatch_mattered(model):
    (note,) = notes(model, row())
    assert "mattered: with negated inputs the trace differs (SQNR" in note


class Several(nn.Module):
    """Three warnings: a size, a harmless read, and one that matters."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.reshape(int(x.shape[0]), -1)
        if bool(y.isnan().any()):
            return y
        if y[0, 0] > 0:
            y = y * 2
        return y


def test_several_warnings_are_distinguished():
    size, harmless, mattered = notes(Several(), row())
    assert "Python integer: cannot matter: it comes from sizes" in size
    assert "Python boolean: did not matter on 5 perturbed inputs: the value was the same" in harmless
    assert "Python boolean: mattered: with" in mattered
    lines = [int(note.split(":")[1]) for note in (size, harmless, mattered)]
    assert [line - lines[0] for line in lines] == [0, 1, 3]


def test_warnings_about_sizes_alone_do_not_keep_auto_from_a_trace():
    class Sized(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):  # which export keeps as a subgraph
                return x.reshape(int(x.shape[0]), -1) @ x.T

    report = optimize(Sized().eval(), example_inputs=row()).report
    assert (report.frontend, report.frontend_reason) == ("trace", "after export refused")
    assert len(report.notes) == 1 and "cannot matter: it comes from sizes" in report.notes[0]


class OnlyInTracing(nn.Module):
    """Reads a value where an ordinary run does not go; `factor` says how much hangs on it."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_tracing():
            return x * (1 + self.factor * int(x.abs().max() * 100))
        return x * (1 + self.factor * (x.abs().max() * 100).long())


def test_a_read_that_only_tracing_does_is_not_taken_for_a_size():
    (note,) = notes(OnlyInTracing(0), row())
    assert note.endswith("Converting a tensor to a Python integer: did not matter on 5 perturbed inputs")
    (note,) = notes(OnlyInTracing(1), row())
    assert "Python integer: may have mattered: with positive inputs the trace differs (SQNR" in note
    source = prepare(OnlyInTracing(1).eval(), [((row(),), {})])
    with pytest.raises(CaptureError, match=r"trace: .*the trace is wrong for other inputs: with \w+ inputs it differs"):
        capture(source, "auto", accept=refuse_all_but_trace)


def refuse_all_but_trace(program) -> None:
    if program.frontend != "trace":
        raise CaptureError("not this one")


class Picky(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if float(x.sum()) != 3.0:
            raise ValueError("only threes")
        return x * 2


def test_where_the_model_takes_no_other_input_nothing_is_known():
    assert notes(Picky(), torch.tensor([[3.0]]))[0].endswith("unknown: the model takes none of the perturbed inputs")


def test_another_example_is_tried_like_a_perturbed_input():
    class Threshold(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if abs(float(x.flatten()[0]) - 0.123) < 1e-4 else x

    other = torch.full((2, 4), 0.123)
    source = prepare(Threshold().eval(), [((row(),), {}), ((other,), {})])
    (note,) = capture(source, "trace").warnings
    assert "mattered: with another example's inputs the trace differs" in note


def test_a_wrong_trace_that_no_read_explains_is_said_to_be_wrong():
    """The comparison does not hang on the reads: here the Program validated is that of another model."""
    source = prepare(nn.Tanh(), [((torch.zeros(2, 4),), {})])
    program = capture(prepare(nn.Identity(), [((torch.zeros(2, 4),), {})]), "trace").program
    validation = validate_trace(program, source, [])
    assert validation.refusal.startswith("the trace is wrong for other inputs: with positive inputs it differs")
    assert validation.lines == [f"{validation.refusal}, and no value that was read explains it"]


# -- perturbed inputs ---------------------------------------------------------------------------------------------------


def test_integers_stay_in_range_and_booleans_flip():
    tokens, mask, x = torch.tensor([[3, 9, 5]]), torch.tensor([True, False, True]), torch.randn(4)
    tried = dict(perturbed([tokens, mask, x]))
    assert list(tried) == list(PERTURBATIONS)
    for changed, _, _ in tried.values():
        assert changed.dtype is torch.int64 and changed.min() >= 0 and changed.max() <= 9
    assert torch.equal(tried["negated"][0], torch.tensor([[6, 0, 4]]))
    assert torch.equal(tried["negated"][1], ~mask) and torch.equal(tried["negated"][2], -x)
    assert not tried["zero"][2].any() and (tried["positive"][2] > 0).all()
    assert tried["large"][2].abs().max() > 50 * x.abs().max()


def test_a_mask_of_ones_is_perturbed_and_negative_integers_keep_their_range():
    (_, (mask,)), *_ = perturbed([torch.ones(3, dtype=torch.int64)])
    assert torch.equal(mask, torch.zeros(3, dtype=torch.int64))
    for _, (changed,) in perturbed([torch.tensor([-7, -2], dtype=torch.int32)]):
        assert changed.dtype is torch.int32 and changed.min() >= -7 and changed.max() <= -2


def test_a_perturbation_that_changes_nothing_is_left_out():
    assert list(perturbed([torch.tensor([True])])) == [("negated", [torch.tensor([False])])]
    assert list(perturbed([torch.tensor(0)])) == []


# -- reads that do not depend on the inputs -------------------------------------------------------------------------------


class ReadsConstants(nn.Module):
    """What export refuses because of its reads, and trace may take: they are of parameters, sizes and constants only."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([2.0, 3.0]))
        self.register_buffer("sizes", torch.tensor([2, 2]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):  # which export keeps as a subgraph
            x = x @ x.T
        if self.scale.max() > 2.5:
            x = x * 3
        length = int(torch.ones_like(x).sum())
        counts = torch.zeros(3)
        counts[0] = self.scale.detach()[0]
        rows, columns = self.sizes.tolist()
        return x.reshape(rows, columns) * length * float(counts.sum()) + max(torch.arange(3).tolist())


def test_auto_takes_a_trace_whose_reads_do_not_depend_on_the_inputs():
    model, x = ReadsConstants().eval(), row()
    fast = optimize(model, example_inputs=x)
    assert fast.report.frontend == "trace"
    assert fast.report.frontend_reason == "after export refused; what forward reads in Python does not depend on the inputs"
    assert len(fast.report.notes) >= 4
    assert all("cannot matter: the value does not depend on the inputs" in note for note in fast.report.notes)
    other = row()
    assert torch.allclose(fast(other), model(other), rtol=1e-2)


class Reads(nn.Module):
    """Reads one number, made by `function(model, x)`."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * float(self.function(self, x))


def written_through_a_view(model: Reads, x: torch.Tensor) -> torch.Tensor:
    canvas = torch.zeros(4, 4)
    canvas[1].mul_(2).add_(x[0])
    return canvas.sum()


def written_before_a_view(model: Reads, x: torch.Tensor) -> torch.Tensor:
    canvas = torch.zeros(4)
    view = canvas[1:]
    canvas.copy_(x[0])
    return view.sum()


def written_without_a_result(model: Reads, x: torch.Tensor) -> torch.Tensor:
    canvas = torch.zeros(4)
    torch._foreach_add_([canvas], [x[0]])
    return canvas.sum()


def given_other_data(model: Reads, x: torch.Tensor) -> torch.Tensor:
    flag = torch.zeros(())
    flag.data = (x > 100).float().sum()  # zero for the example
    return flag


def parameter_given_other_data(model: Reads, x: torch.Tensor) -> torch.Tensor:
    model.weight.data = x[0]
    return model.weight.sum()


def counted(model: Reads, x: torch.Tensor) -> torch.Tensor:
    model.count.add_(1)
    return model.count


def counted_through_a_view(model: Reads, x: torch.Tensor) -> torch.Tensor:
    model.count.view(1).add_(1)
    return model.count


def in_a_list(model: Reads, x: torch.Tensor) -> float:
    return (model.weight + x[0]).tolist()[0]


def in_numpy(model: Reads, x: torch.Tensor) -> float:
    return (model.weight + x[0]).detach().numpy()[0]


DEPENDENT = {
    "an op": ("item", lambda model, x: (model.weight + x[0]).sum()),
    "an index": ("item", lambda model, x: model.weight[x.argmax() % 4]),
    "a view": ("item", lambda model, x: x.T[0, 0]),
    "a mask": ("item", lambda model, x: torch.full_like(model.weight, 1).masked_fill(x[0] > 0, 2).sum()),
    "a fill value": ("item", lambda model, x: torch.full((3,), x[0, 0])[0]),
    "written through a view": ("item", written_through_a_view),
    "written before a view": ("item", written_before_a_view),
    "written without a result": ("item", written_without_a_result),
    "the number of nonzeros": ("nonzero", lambda model, x: x.nonzero().shape[0]),
    "the size of a selection": ("index", lambda model, x: x[x > 0].shape[0]),
    "a random number": ("item", lambda model, x: torch.rand(())),
    "a number made from a read": ("item", lambda model, x: torch.tensor(x[0, 0].item())),
    "what wrapper tensors do not read": ("reads other values", lambda model, x: x.max() if type(x) is torch.Tensor else 1.0),
    "a value that wrapper tensors replace": (
        "reads other values",
        lambda model, x: x.max() if type(x) is torch.Tensor else model.weight.max(),
    ),
    "given other data": ("AttributeError", given_other_data),
    "a parameter given other data": ("assigns .data", parameter_given_other_data),
    "split at": ("not allocated", lambda model, x: len(torch.tensor_split(torch.arange(8.0), x[0].long())[1])),
    "a counter": ("writes into a tensor of the model", counted),
    "a counter through a view": ("writes into a tensor of the model", counted_through_a_view),
    "a list": ("tolist", in_a_list),
    "an array": ("numpy", in_numpy),
}
INDEPENDENT = {
    "a parameter": lambda model, x: model.weight.sum(),
    "a literal": lambda model, x: torch.tensor([1.0, 2.0]).max(),
    "a literal that is written": lambda model, x: torch.tensor([1.0, 2.0]).mul_(2).max(),
    "of the size of an input": lambda model, x: torch.ones_like(x).sum(),
    "filled": lambda model, x: x.new_full((3,), 2.0).sum(),
    "nonzeros of a parameter": lambda model, x: model.weight.nonzero().shape[0] + model.weight.sum(),
    "a list of a parameter": lambda model, x: (model.weight * 2).tolist()[0],
}


def dependence(function):
    source = prepare(Reads(function).eval(), [((row(),), {})])
    return dependence_of_reads(source, run_eagerly(source, source.tensors).reads)


@pytest.mark.parametrize("what", DEPENDENT)
def test_a_read_that_depends_on_more_than_constants_is_found_out(what):
    why, function = DEPENDENT[what]
    found = dependence(function)
    assert not found.independent
    assert why in found.unknown or [read.how for read in found.dependent][:1] == [why]


@pytest.mark.parametrize("what", INDEPENDENT)
def test_a_read_of_constants_is_proven_to_be_one(what):
    found = dependence(INDEPENDENT[what])
    assert found.independent, found


def test_the_run_on_wrapper_tensors_leaves_the_model_as_it_was():
    model = Reads(counted).eval()
    source = prepare(model, [((row(),), {})])
    dependence_of_reads(source, [])
    assert model.count == 0


# -- quiet --------------------------------------------------------------------------------------------------------------


def test_capturing_prints_nothing(capfd: pytest.CaptureFixture[str]):
    with pytest.raises(CaptureError):  # numpy: no front end can
        optimize(ReadsThroughNumpy().eval(), example_inputs=row())
    out, err = capfd.readouterr()
    assert out == ""
    assert err == ""


def test_validating_a_trace_warns_nobody():
    class Warns(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not torch.jit.is_tracing() and float(x.min()) < 0:
                warnings.warn("negative", stacklevel=1)
            return x * 2

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        optimize(Warns().eval(), example_inputs=row(), frontend="trace")
    assert not [w for w in heard if "negative" in str(w.message)]
