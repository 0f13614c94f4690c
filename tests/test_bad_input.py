"""Bad input gets one clear error of ours, saying what was given and what to do, and leaves nothing half-written."""

from __future__ import annotations

import os
import pickle
import re
import stat
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ir_tools.torch_compat import pytree
from passes import (
    CATALOGUE,
    CaptureError,
    InputError,
    ModelFileError,
    ModelInTrainingError,
    NumericsError,
    OptionError,
    PassesError,
    PassOrderError,
    SignatureError,
    UnknownPassError,
    load,
    optimize,
)
from tests import models
from tests.models import Case, Linear, image, row, seeded


def small() -> Case:
    return Case(Linear(), (row(),))


class Runs(Linear):
    def forward(self, x):
        return self.linear(x)


def model() -> nn.Module:
    return Runs().eval()


def says(*parts: str) -> str:
    """A pattern for a message that holds all of the parts, in this order."""
    return "(?s)" + ".*".join(re.escape(part) for part in parts)


def test_every_error_is_one_of_ours_and_of_a_kind_that_python_knows():
    assert all(issubclass(e, PassesError) for e in (CaptureError, InputError, ModelFileError, OptionError, NumericsError))
    for error in (UnknownPassError, PassOrderError, InputError, OptionError, ModelInTrainingError):
        assert issubclass(error, ValueError)
    assert issubclass(SignatureError, TypeError) and issubclass(ModelFileError, RuntimeError)


# -- passes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "passes, error, message",
    [
        ("fuse_conv_nb", UnknownPassError, says("there is no pass 'fuse_conv_nb'; did you mean", "fuse_conv_bn")),
        (["remove_dropot"], UnknownPassError, says("there is no pass 'remove_dropot'; did you mean remove_dropout")),
        ("zzz", UnknownPassError, says("there is no pass 'zzz'; there are: ", *CATALOGUE, "fuse_conv_bn_relu")),
        ([3], UnknownPassError, says("a pass is a name or a Pass object, got int: 3")),
        (
            ["cast_half", "fuse_conv_bn"],
            PassOrderError,
            says("fuse_conv_bn must come before cast_half: weights are folded in full precision", "An order that works:",
                 "fuse_conv_bn, cast_half"),
        ),
        (["lower_aten", "fuse_conv_bn"], PassOrderError, says("fuse_conv_bn must come before lower_aten: ")),
        ("cast_half:dtype=float31", OptionError, says("cast_half: dtype must be one of 'bfloat16', 'float16', got 'float31'")),
        ("cast_half:level=O9", OptionError, says("cast_half: level must be one of 'O1', 'O2', 'O3', got 'O9'")),
        ("cast_half:colour=red", OptionError, says("cast_half", "colour", "dtype", "level")),
        ("cast_half:O1", OptionError, says("an option is written name=value, got 'O1' in 'cast_half:O1'")),
        ("fuse_conv_bn:x=1", OptionError, says("fuse_conv_bn", "x")),
        ("fuse_conv_bn_relu:x=1", OptionError, says("the group 'fuse_conv_bn_relu' has no options", "fold_constants")),
    ],
)  # fmt: skip
def test_passes_that_are_not(passes, error, message):
    with pytest.raises(error, match=message):
        optimize(model(), passes, example_inputs=row())


def test_the_order_offered_is_one_that_works():
    with pytest.raises(PassOrderError) as error:
        optimize(model(), ["cast_half", "fuse_conv_relu", "fuse_conv_bn", "remove_dropout"], example_inputs=row())
    offered = str(error.value).rsplit("An order that works: ", 1)[1].split(", ")
    assert sorted(offered) == sorted(["cast_half", "fuse_conv_relu", "fuse_conv_bn", "remove_dropout"])
    optimize(model(), offered, example_inputs=row())


# -- options of optimize ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("engine", "cuda", says("engine must be one of 'auto', 'aten', 'onednn_ops'", "got 'cuda'")),
        ("verify", "always", says("verify must be one of 'each', 'ends', 'off', got 'always'")),
        ("verify", True, says("verify must be one of", "got True")),
        ("frontend", "dynamo", says("frontend must be one of 'auto', 'export', 'trace', 'script', 'fx', got 'dynamo'")),
        ("tolerance", "60", says("tolerance", "dB", "got '60'")),
        ("tolerance", float("nan"), says("tolerance", "got nan")),
        ("tolerance", float("inf"), says("tolerance", "finite", "got inf")),
        ("tolerance", -float("inf"), says("tolerance", "finite", "got -inf")),
        ("tolerance", True, says("tolerance", "got True")),
        ("on_failure", "rollback", says("on_failure must be 'raise'", "got 'rollback'")),
    ],
)
def test_options_that_are_not(option, value, message):
    with pytest.raises(OptionError, match=message):
        optimize(model(), example_inputs=row(), **{option: value})


def test_an_engine_and_a_lowering_that_disagree():
    with pytest.raises(OptionError, match=says("the pass lower_aten stands for engine='aten'", "'onednn_ops' was given")):
        optimize(model(), ["lower_aten"], example_inputs=row(), engine="onednn_ops")


def test_autocast_is_refused_before_any_work():
    with torch.autocast("cpu"), pytest.raises(InputError, match=says("torch.autocast is enabled for cpu", "cast_half")):
        optimize(model(), example_inputs=row())
    with torch.autocast("cpu", enabled=False):
        optimize(model(), example_inputs=row())


def test_a_tolerance_that_is_not_reached_is_a_failure_with_the_figures():
    case = seeded(models.conv_net)
    with pytest.raises(NumericsError, match=says("cast_half", "SQNR", "dB, allowed 200 dB", "Set tolerance=")):
        optimize(case.model, "cast_half", example_inputs=case.args, tolerance=200)


# -- models -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [3, None, lambda x: x, Runs, {"weight": row()}], ids=lambda given: type(given).__name__)
def test_a_model_that_is_none(given):
    with pytest.raises(InputError, match=says("model must be an nn.Module", f"got {type(given).__name__}")):
        optimize(given, example_inputs=row())


def test_a_model_in_training_mode_names_the_modules():
    training = seeded(models.conv_net).model
    training[1].train()
    training[3].train()
    message = says("the model is in training mode (1, 3); call model.eval() before optimize")
    with pytest.raises(ModelInTrainingError, match=message):
        optimize(training, example_inputs=image(2, 3, 12, 12))
    with pytest.raises(ModelInTrainingError, match=says("(the model itself, 0, 1, 2, 3 and 6 more)")):
        optimize(training.train(), example_inputs=image(2, 3, 12, 12))
    assert training.training


class NobodyCaptures(Linear):
    """Leaves torch in the middle, and goes on with what it found there."""

    def forward(self, x):
        values = x.detach().numpy()
        return self.linear(x) * (1.0 if values.sum() > 0 else -1.0)


def test_a_model_that_no_front_end_captures_gives_each_reason():
    with pytest.raises(CaptureError) as error:
        optimize(NobodyCaptures().eval(), example_inputs=row())
    lines = str(error.value).splitlines()
    assert lines[0] == "no front end can capture this model:"
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["export", "trace", "script", "fx"]
    assert all(len(line.split(":", 2)[2].strip()) > 10 for line in lines[1:])


@pytest.mark.parametrize("frontend", ["export", "script", "fx"])
def test_a_front_end_asked_for_that_cannot_says_why(frontend):
    with pytest.raises(CaptureError, match=f"the front end '{frontend}' cannot capture this model: .{{10}}"):
        optimize(NobodyCaptures().eval(), example_inputs=row(), frontend=frontend)


class NoTensors(Linear):
    def forward(self, x):
        return 3


def test_a_model_that_returns_no_tensor():
    with pytest.raises(CaptureError, match="the model returns no tensor on the example inputs"):
        optimize(NoTensors().eval(), example_inputs=row())


# -- example inputs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, error, message",
    [
        (None, InputError, says("example_inputs are missing", "Give a tensor, a tuple of arguments, or a list of such tuples")),
        ([], InputError, says("example_inputs is an empty list; give at least one")),
        ("x", InputError, says("example_inputs must be a tensor, a tuple", "got str")),
        ([[row()]], InputError, says("example_inputs must be a tensor, a tuple", "got list")),
        ((), SignatureError, says("the call does not fit forward(x): missing a required argument: 'x'")),
        ((row(), row()), SignatureError, says("the call does not fit forward(x): too many positional arguments")),
        (row(2, 5), CaptureError, says("the model itself fails on the example inputs: RuntimeError: ", "2x5 and 4x4")),
        (row().double(), CaptureError, says("the model itself fails on the example inputs: RuntimeError: ", "dtype")),
        ([(row(),), (row(3, 4),)], CaptureError, says("the example inputs differ", "x: float32[2, 4]", "x: float32[3, 4]")),
        ([(row(),), (None,)], CaptureError, says("the model itself fails on the example inputs: TypeError")),
    ],
)
@pytest.mark.parametrize("verify", ["each", "off"])
def test_example_inputs_that_do_not_fit(given, error, message, verify):
    with pytest.raises(error, match=message):
        optimize(model(), example_inputs=given, verify=verify)


@pytest.mark.parametrize(
    "given, message",
    [
        (3, says("calibration_data must be a list, or another iterable, of calls", "got int")),
        ("x.pt", says("calibration_data must be a list", "got str")),
        (row(), says("calibration_data must be a list", "got Tensor")),
        ((row(),), says("calibration_data must be a list", "got tuple")),
        ({"x": row()}, says("calibration_data must be a list", "got dict")),
        ([], says("calibration_data is empty; give at least one call")),
        (iter(()), says("calibration_data is empty")),
        ([row(), [row(), row()]], says("calibration_data[1] does not fit", "too many positional arguments")),
        ([row(), {"y": row()}], says("calibration_data[1] does not fit the example inputs", "'x'")),
        ([row(), row(), None], says("calibration_data[2] must be a tensor, a tuple or list of arguments, or", "got NoneType")),
        ([row(), ()], says("calibration_data[1] does not fit the example inputs", "missing a required argument: 'x'")),
        ([(row(), row())], says("calibration_data[0] does not fit the example inputs", "too many positional arguments")),
        ([row(), (3,)], says("calibration_data[1] does not fit", "input 'x' must be a tensor, got int")),
        ([row(), row(3, 4)], says("calibration_data[1] does not fit", "must have shape [2, 4]", "got [3, 4]")),
        ([row().double()], says("calibration_data[0] does not fit", "must have dtype torch.float32, got torch.float64")),
    ],
)
@pytest.mark.parametrize("passes", ["cast_half", "remove_dropout"])
def test_calibration_data_that_does_not_fit(given, message, passes):
    with pytest.raises(InputError, match=message):
        optimize(model(), passes, example_inputs=row(), calibration_data=given, verify="off")


def test_examples_that_agree_in_shape_and_not_in_structure():
    case = seeded(models.SIGNATURES["none_in"])
    with pytest.raises(CaptureError, match=says("the example inputs differ in structure")):
        optimize(case.model, example_inputs=[(row(), None, row()), (row(), row(), row())])


# -- later calls --------------------------------------------------------------------------------------------------------


class TwoInputs(nn.Module):
    """Takes an image and a mask; with the sizes baked in, another batch size could give numbers that are wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, image, mask):
        y = self.conv(image) * mask
        return y.reshape(2, -1) if image.shape[0] == 2 else y


@pytest.fixture(scope="module", params=["aten", "onednn_ops"])
def ways_to_call(request, tmp_path_factory) -> dict[str, Any]:
    """The optimised model, its scripted module, and the saved file as torch and as we load it."""
    case = seeded(lambda: Case(TwoInputs(), (image(2, 3, 6, 6), image(2, 1, 6, 6))))
    fast = optimize(case.model, example_inputs=case.args, engine=request.param)
    path = tmp_path_factory.mktemp("files") / "two.pt"
    fast.save(path)
    ways = {"fast": fast, "scripted": fast.scripted, "file": torch.jit.load(path), "loaded": load(path)}
    for way in ways.values():
        torch.testing.assert_close(way(*case.args), case())
    return ways


IMAGE, MASK = torch.zeros(2, 3, 6, 6), torch.zeros(2, 1, 6, 6)
WRONG_CALLS = {
    "batch 4 on a file captured at batch 2": (
        (torch.zeros(4, 3, 6, 6), torch.zeros(4, 1, 6, 6)), ("'image'", "[2, 3, 6, 6]", "[4, 3, 6, 6]"),
    ),
    "batch 1, which would broadcast": ((torch.zeros(1, 3, 6, 6), MASK), ("'image'", "[2, 3, 6, 6]", "[1, 3, 6, 6]")),
    "a mask that would broadcast": ((IMAGE, torch.zeros(1, 1, 6, 6)), ("'mask'", "[2, 1, 6, 6]", "[1, 1, 6, 6]")),
    "another height": ((torch.zeros(2, 3, 8, 6), MASK), ("'image'", "[2, 3, 6, 6]", "[2, 3, 8, 6]")),
    "another rank": ((IMAGE, torch.zeros(6, 6)), ("'mask'", "[2, 1, 6, 6]", "[6, 6]")),
    "no batch": ((torch.zeros(3, 6, 6), MASK), ("'image'", "[2, 3, 6, 6]", "[3, 6, 6]")),
    "float64": ((IMAGE.double(), MASK), ("'image'", "float32", "float64")),
    "a mask of bool": ((IMAGE, MASK.bool()), ("'mask'", "float32", "bool")),
    "the inputs swapped": ((MASK, IMAGE), ("'image'", "[2, 3, 6, 6]", "[2, 1, 6, 6]")),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
@pytest.mark.parametrize("way", ["fast", "scripted", "file", "loaded"])
def test_wrong_sizes_and_dtypes_raise_at_every_later_call(ways_to_call, way, name):
    inputs, (input_name, expected, given) = WRONG_CALLS[name]
    with pytest.raises((SignatureError, torch.jit.Error, RuntimeError)) as error:
        ways_to_call[way](*inputs)
    assert isinstance(error.value, SignatureError) == (way == "fast")
    # TorchScript puts the message at the end of its own traceback.
    assert re.search(says(f"input {input_name} must have", expected, given), str(error.value))


@pytest.mark.parametrize(
    "inputs", [(), (IMAGE,), (IMAGE, MASK, MASK), (IMAGE, 3), (IMAGE, None), ([IMAGE], MASK)],
    ids=["none", "one", "three", "a number", "None", "a list"],
)  # fmt: skip
@pytest.mark.parametrize("way", ["fast", "scripted", "file", "loaded"])
def test_a_wrong_number_or_kind_of_inputs_raises_at_every_later_call(ways_to_call, way, inputs):
    named = "mask" if len(inputs) == 2 and inputs[0] is IMAGE else "image" if len(inputs) != 3 else "argument"
    with pytest.raises((SignatureError, torch.jit.Error, RuntimeError, TypeError), match=named) as error:
        ways_to_call[way](*inputs)
    assert isinstance(error.value, SignatureError) == (way == "fast")


@pytest.mark.parametrize("way", ["fast", "scripted", "file", "loaded"])
def test_a_right_call_still_works_after_wrong_ones(ways_to_call, way):
    assert ways_to_call[way](IMAGE, MASK).shape == (2, 144)
    assert ways_to_call[way](image=IMAGE, mask=MASK).shape == (2, 144)


@pytest.mark.parametrize("frontend", ["export", "trace", "script", "fx"])
def test_sizes_are_checked_whatever_the_front_end(frontend):
    case = small()
    case.model = model()
    fast = optimize(case.model, example_inputs=case.args, frontend=frontend)
    for way in (fast, fast.scripted):
        with pytest.raises((SignatureError, torch.jit.Error), match=says("input 'x' must have shape [2, 4]", "[4, 4]")):
            way(row(4, 4))


# -- files that are read ------------------------------------------------------------------------------------------------


class LeavesATrace:
    """Unpickling this writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def a_file(kind: str, path: Path, trace: Path) -> None:
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("model: resnet50\n")
    elif kind == "torch.save":
        torch.save({"payload": LeavesATrace(trace), "model": model()}, path)
    elif kind == "old torch.save":
        torch.save(LeavesATrace(trace), path, _use_new_zipfile_serialization=False)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(LeavesATrace(trace)))
    elif kind == "torch.export.save":
        torch.export.save(torch.export.export(model(), (row(),)), path)
    elif kind == "truncated":
        whole = path.with_suffix(".whole")
        optimize(model(), example_inputs=row()).save(whole)
        path.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * 0.7)])
    elif kind == "damaged":
        whole = path.with_suffix(".whole")
        optimize(model(), example_inputs=row()).save(whole)
        with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w") as new:
            for entry in old.infolist():
                data = old.read(entry)
                new.writestr(entry, data.replace(b"def forward", b"def (orward") if entry.filename.endswith(".py") else data)
    elif kind == "directory":
        path.mkdir()


FILES = {
    "missing": says("there is no file"),
    "empty": says("is empty"),
    "text": says("is not a TorchScript file"),
    "torch.save": says("was pickled by torch.save", "not opened, because unpickling can run any code", "pass the model"),
    "old torch.save": says("is a Python pickle (an old torch.save file?), not TorchScript", "not opened"),
    "pickle": says("is a Python pickle", "not opened"),
    "torch.export.save": says("was saved by torch.export", "torch.export.load and pass the result"),
    "truncated": says("is cut short or damaged", "copy or save it again"),
    "directory": says("is a directory"),
    "damaged": says("torch cannot read"),
}


def optimize_file(path: Any) -> Any:
    return optimize(path, example_inputs=row())


@pytest.mark.parametrize("read", [optimize_file, lambda path: optimize_file(str(path)), load], ids=["path", "text", "load"])
@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_no_model(kind, read, tmp_path):
    path, trace = tmp_path / "given.pt", tmp_path / "trace"
    a_file(kind, path, trace)
    with pytest.raises(ModelFileError, match=FILES[kind]) as error:
        read(path)
    assert str(path) in str(error.value)
    assert not trace.exists(), "the file was unpickled"


def test_the_payload_would_leave_a_trace(tmp_path):
    """The check above has teeth: unpickling these files does write the trace."""
    for kind in ("torch.save", "old torch.save", "pickle"):
        path, trace = tmp_path / f"{kind}.pt", tmp_path / f"{kind}.trace"
        a_file(kind, path, trace)
        if kind == "pickle":
            pickle.loads(path.read_bytes())
        else:
            torch.load(path, weights_only=False)
        assert trace.exists()


@pytest.mark.parametrize("cut", [0.02, 0.3, 0.5, 0.9, 0.99, -1])
def test_a_file_cut_anywhere_is_said_to_be_cut(cut, tmp_path):
    whole, path = tmp_path / "whole.pt", tmp_path / "cut.pt"
    optimize(model(), example_inputs=row()).save(whole)
    size = whole.stat().st_size
    path.write_bytes(whole.read_bytes()[: int(size * cut) if cut > 0 else size - 1])
    for read in (load, optimize_file):
        with pytest.raises(ModelFileError, match="cut short or damaged"):
            read(path)


def test_somebody_elses_torchscript_is_a_model_and_not_a_result(tmp_path):
    path = tmp_path / "theirs.pt"
    torch.jit.script(model()).save(path)
    with pytest.raises(ModelFileError, match=says("was not saved by torch-passes", "torch.jit.load reads it")):
        load(path)
    assert optimize(path, example_inputs=row())(row()).shape == (2, 4)


def test_a_file_whose_numbers_are_not_its_golden_ones(tmp_path):
    path = tmp_path / "model.pt"
    fast = optimize(model(), example_inputs=row())
    inputs, outputs = fast._golden
    fast._golden = inputs, [t + 1 for t in outputs]
    fast.save(path)
    message = says("does not give its golden outputs on this machine: SQNR", "expected at least 60 dB")
    with pytest.raises(NumericsError, match=message):
        load(path)


def test_a_half_precision_file_is_held_to_its_own_outputs(tmp_path):
    path = tmp_path / "model.pt"
    fast = optimize(model(), "cast_half", example_inputs=row())
    inputs, outputs = fast._golden
    fast.save(path)
    load(path)
    fast._golden = inputs, [t * 1.2 for t in outputs]  # 16 dB
    fast.save(path)
    with pytest.raises(NumericsError, match="expected at least 20 dB"):
        load(path)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("format", 99, says("has format 99, and this version reads 1")),
        ("format", None, says("has format None")),
        ("golden_sqnr_db", "80", says("damaged manifest: golden_sqnr_db must be int or float, got '80'")),
        ("golden_sqnr_db", float("nan"), says("damaged manifest: golden_sqnr_db is nan")),
        ("typed_outputs", "yes", says("damaged manifest: typed_outputs must be bool, got 'yes'")),
        ("out_tree", 3, says("damaged manifest: out_tree must be str or NoneType, got 3")),
        ("out_leaves", None, says("damaged manifest: out_leaves must be list, got None")),
        ("out_leaves", ["tensor", {}], says("damaged manifest: out_leaves are")),
        ("out_leaves", ["tensor", "tensor"], says("damaged manifest: out_leaves do not fit")),
        ("out_leaves", ["tensor", {"baked": 1}], says("damaged manifest: out_leaves do not fit")),
    ],
)
def test_a_manifest_that_was_changed(key, value, message, tmp_path):
    path = tmp_path / "model.pt"
    fast = optimize(model(), example_inputs=row())
    fast.manifest[key] = value
    fast.save(path)
    with pytest.raises(ModelFileError, match=message):
        load(path)
    del fast.manifest[key]
    fast.save(path)
    with pytest.raises(ModelFileError):
        load(path)


def test_a_manifest_that_is_no_manifest(tmp_path):
    path = tmp_path / "model.pt"
    fast = optimize(model(), example_inputs=row())
    fast.manifest = None
    fast.save(path)
    with pytest.raises(ModelFileError, match="has no torch-passes manifest"):
        load(path)


class TellsDtype(Linear):
    def forward(self, x):
        y = self.linear(x)
        return {"y": y, "dtype": y.dtype}


def test_a_file_that_cannot_tell_the_structure_gives_flat_tensors(tmp_path):
    path = tmp_path / "model.pt"
    given = TellsDtype().eval()
    fast = optimize(given, example_inputs=row(), frontend="trace")
    assert fast(row())["dtype"] is torch.float32
    fast.save(path)
    loaded, x = load(path), row()
    assert loaded.manifest["out_tree"] is None
    torch.testing.assert_close(pytree.tree_leaves(loaded(x)), [given(x)["y"]])


def test_a_result_is_no_model_to_optimise_again(tmp_path):
    """oneDNN's kernels are past rewriting."""
    path = tmp_path / "fast.pt"
    optimize(model(), ["lower_onednn:choose=fused"], example_inputs=row()).save(path)
    with pytest.raises(CaptureError, match=says("it was optimised already; give the model it was made")):
        optimize(path, example_inputs=row())
    optimize(model(), example_inputs=row(), engine="aten").save(path)
    assert optimize(path, example_inputs=row())(row()).shape == (2, 4)


# -- files that are written ---------------------------------------------------------------------------------------------

as_root = os.geteuid() == 0


@pytest.fixture(scope="module")
def fast():
    return optimize(model(), example_inputs=row())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "name, message",
    [
        ("missing/model.pt", says("cannot write", "the directory", "does not exist; make it first")),
        ("folder", says("cannot write", "it is a directory; give the name of a file")),
        ("old.pt/model.pt", says("cannot write")),
        ("n" * 300 + ".pt", says("cannot write")),
    ],
)
def test_a_path_that_cannot_be_written_leaves_everything_as_it_was(fast, name, message, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "old.pt").write_bytes(b"old")
    before = contents(tmp_path)
    with pytest.raises(ModelFileError, match=message):
        fast.save(tmp_path / name)
    assert contents(tmp_path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "old.pt"]


def test_a_failure_in_the_middle_of_writing_leaves_the_old_file(fast, tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    path.write_bytes(b"old")
    from ir_tools.emit import package

    def half(scripted: Any, target: str, extra: Any) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(package, "to_file", half)
    with pytest.raises(ModelFileError, match=says("cannot write", "No space left on device")):
        fast.save(path)
    assert contents(tmp_path) == {"model.pt": b"old"} and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(as_root, reason="root may write anywhere; the file system cannot refuse it")
def test_a_folder_without_permission(fast, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(ModelFileError, match=says("cannot write", "Permission denied")):
        fast.save(locked / "model.pt")
    with pytest.raises(OptionError, match=says("dump_dir", "cannot be written")):
        optimize(model(), example_inputs=row(), dump_dir=locked)


def test_a_save_over_an_old_file_replaces_it_whole(fast, tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(b"old")
    fast.save(path)
    assert load(path)(row()).shape == (2, 4)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_dump_dir_that_cannot_be_written_is_said_before_any_work(name, tmp_path):
    (tmp_path / "file").write_text("a file")
    ran = []

    class Watched(Runs):
        def forward(self, x):
            ran.append(x)
            return super().forward(x)

    with pytest.raises(OptionError, match=says("dump_dir", str(tmp_path / name), "cannot be written: ")):
        optimize(Watched().eval(), example_inputs=row(), dump_dir=tmp_path / name)
    assert not ran
    assert contents(tmp_path) == {"file": b"a file"}


def test_the_result_cannot_be_trained(fast):
    with pytest.raises(PassesError, match="an optimised model is for inference: train the model you gave"):
        fast.train()
    assert not fast.training and fast.eval() is fast
