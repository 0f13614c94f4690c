"""Where the command line gets models from, and what it says when there are none."""

import importlib.util
import sys

import pytest
import torch
from torch import nn

from passes.cli.sources import SourceError, load_source, randomize_batch_norms

# Not importorskip: importing timm needs torchvision's operators declared first, which is load_source's business.
needs_zoo = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")

MODULE = """
import torch
from torch import nn

class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
    def forward(self, x):
        return self.linear(x)

instance = Small().eval()
in_training = Small()

def build():
    return Small()

def needs_an_argument(width):
    return Small()

def gives_a_number():
    return 3

class Zoo:
    model = Small

constant = 3
"""


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """A module `own_zoo` in the working directory, which is not on the path."""
    (tmp_path / "own_zoo.py").write_text(MODULE)
    (tmp_path / "broken_zoo.py").write_text("import a_package_that_does_not_exist\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield tmp_path
    sys.modules.pop("own_zoo", None)


# -- the user's own code ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["build", "Small", "Zoo.model", "in_training"])
def test_a_callable_in_the_working_directory_gives_a_model_in_eval_mode(zoo, name):
    notes: list[str] = []
    model = load_source(f"own_zoo:{name}", note=notes.append)
    assert type(model).__name__ == "Small" and not model.training
    assert notes == [f"own_zoo:{name} was in training mode; .eval() was called"]


def test_a_module_in_eval_mode_is_taken_as_it_is(zoo):
    notes: list[str] = []
    model = load_source("own_zoo:instance", note=notes.append)
    assert model is sys.modules["own_zoo"].instance
    assert not notes


def test_built_models_are_the_same_on_every_run_and_the_random_state_is_left_alone(zoo):
    before = torch.random.get_rng_state()
    first, second = load_source("own_zoo:build"), load_source("own_zoo:build")
    assert torch.equal(first.linear.weight, second.linear.weight)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_name_near_the_wrong_one_is_offered(zoo):
    with pytest.raises(SourceError, match="own_zoo has no 'buildd'; did you mean build"):
        load_source("own_zoo:buildd")


@pytest.mark.parametrize(
    "text, message",
    [
        ("own_zoo:needs_an_argument", "cannot be called without arguments"),
        ("own_zoo:gives_a_number", "gives a int; expected a torch.nn.Module"),
        ("own_zoo:constant", "is a int; expected a torch.nn.Module, or a callable that gives one"),
        ("no_such_zoo:build", "there is no Python module 'no_such_zoo'"),
        ("own_zoo.inner:build", "there is no Python module 'own_zoo.inner'"),
        ("resnet50", "'resnet50' is not a model; expected a TorchScript file"),
        ("own_zoo:", "'own_zoo:' is not a model"),
        (":build", "':build' is not a model"),
        ("own zoo:build", "'own zoo:build' is not a model"),
        ("", "'' is not a model"),
    ],
)
def test_what_is_no_model_is_reported(zoo, text, message):
    with pytest.raises(SourceError) as error:
        load_source(text)
    assert message in str(error.value)


def test_an_import_that_fails_inside_the_users_module_is_not_hidden(zoo):
    with pytest.raises(ModuleNotFoundError, match="a_package_that_does_not_exist"):
        load_source("broken_zoo:build")


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_file_is_handed_on_by_its_path(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(b"anything")
    assert load_source(str(path)) == str(path)


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(SourceError, match=r"there is no file .*missing\.pt"):
        load_source(str(tmp_path / "missing.pt"))


# -- zoos -------------------------------------------------------------------------------------------------------------


@needs_zoo
def test_torchvision_models_have_random_weights_and_statistics():
    notes: list[str] = []
    model = load_source("torchvision:resnet18", note=notes.append)
    assert notes == ["torchvision:resnet18 has random weights (seed 0) and random statistics in its 20 batch norms"]
    assert not model.training
    assert not torch.allclose(model.bn1.running_mean, torch.zeros(64))
    again = load_source("torchvision:resnet18")
    assert torch.equal(model.bn1.running_var, again.bn1.running_var)
    assert torch.equal(model.conv1.weight, again.conv1.weight)


@needs_zoo
def test_timm_models():
    notes: list[str] = []
    model = load_source("timm:resnet10t", note=notes.append)
    assert isinstance(model, nn.Module) and not model.training
    assert "timm:resnet10t has random weights" in notes[0]


@needs_zoo
@pytest.mark.parametrize("zoo_name", ["torchvision", "timm"])
def test_a_zoo_model_near_the_wrong_name_is_offered(zoo_name):
    with pytest.raises(SourceError, match=rf"{zoo_name} has no model 'resnet5O'; did you mean .*resnet50"):
        load_source(f"{zoo_name}:resnet5O")


@pytest.mark.parametrize("zoo_name", ["torchvision", "timm"])
def test_a_zoo_that_is_not_installed_is_reported(zoo_name, monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == zoo_name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, zoo_name, None)  # makes the import fail as if it were not there
    with pytest.raises(SourceError, match=r"pip install 'torch-passes\[zoo\]'"):
        load_source(f"{zoo_name}:resnet18")


def test_randomized_batch_norms_do_something():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, affine=False)).eval()
    assert randomize_batch_norms(model) == 2
    assert (model[0].running_var > 0.4).all() and (model[0].running_var < 1.6).all()
    for tensor in (model[0].weight, model[0].bias, model[0].running_mean, model[2].running_mean, model[2].running_var):
        assert tensor.unique().numel() == 3
