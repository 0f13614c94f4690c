"""Bad input gets one clear error of ours, saying what was given and what to do, and leaves nothing half-written."""

from __future__ import annotations

import pytest
import torch

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
    optimize,
)
from tests import models
from tests.models import Linear, image, row, seeded
from tests.passes.driver.bad_input import Runs, model, says


def test_every_error_is_one_of_ours_and_of_a_kind_that_python_knows():
    assert all(issubclass(e, PassesError) for e in (CaptureError, InputError, ModelFileError, OptionError, NumericsError))
    for error in (UnknownPassError, PassOrderError, InputError, OptionError, ModelInTrainingError):
        assert issubclass(error, ValueError)
    assert issubclass(SignatureError, TypeError) and issubclass(ModelFileError, RuntimeError)


# -- passes ------------------------------------------------------------------------------------------------------------


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


# -- options of optimize -----------------------------------------------------------------------------------------------


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


# -- models ------------------------------------------------------------------------------------------------------------


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


# -- example inputs ----------------------------------------------------------------------------------------------------


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
