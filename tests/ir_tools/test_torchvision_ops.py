"""Skipped as a whole without torchvision. What is said of missing operators is skipped where they are not missing."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ir_tools import torchvision_ops
from ir_tools.torch_compat.operators import schema_of
from ir_tools.torchvision_ops import import_torchvision

if find_spec("torchvision") is None:
    pytest.skip("torchvision is not installed", allow_module_level=True)

BOXES, SCORES = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([0.5])


@pytest.fixture
def without_operators() -> ModuleType:
    torchvision = import_torchvision()
    if torchvision.extension._has_ops():
        pytest.skip("this torchvision loads its compiled operators: nothing has to be defined")
    return torchvision


def test_resnet18_builds_and_runs():
    model = import_torchvision().models.resnet18(weights=None).eval()
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1000)


def test_a_second_call_changes_nothing():
    first = import_torchvision()
    library, modules = torchvision_ops._library, dict(sys.modules)
    assert import_torchvision() is first
    assert torchvision_ops._library is library
    assert dict(sys.modules) == modules


def test_calling_a_missing_operator_says_why(without_operators):
    with pytest.raises(RuntimeError, match="torchvision::nms is not available: this torchvision was built for CUDA"):
        without_operators.ops.nms(BOXES, SCORES, 0.5)


@pytest.mark.parametrize("name", torchvision_ops._SCHEMAS)
def test_every_operator_is_defined_under_its_name(without_operators, name):
    schema = schema_of(getattr(torch.ops.torchvision, name).default)
    values = {"Tensor": torch.zeros(1, 5), "float": 1.0, "int": 1, "SymInt": 1, "bool": False}
    arguments = [values[str(argument.type)] for argument in schema.arguments]
    with pytest.raises(RuntimeError, match=f"torchvision::{name} is not available"):
        getattr(torch.ops.torchvision, name)(*arguments)


def test_a_missing_operator_can_be_scripted(without_operators):
    def suppress(boxes: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return without_operators.ops.nms(boxes, scores, 0.5)

    with pytest.raises(RuntimeError, match="torchvision::nms is not available"):
        torch.jit.script(suppress)(BOXES, SCORES)


def test_works_after_a_failed_import_and_from_many_threads():
    script = """
from concurrent.futures import ThreadPoolExecutor
try:
    import torchvision
except RuntimeError:
    pass
from ir_tools.torchvision_ops import import_torchvision
with ThreadPoolExecutor(8) as pool:
    assert len({id(module) for module in pool.map(lambda _: import_torchvision(), range(8))}) == 1
import timm
assert timm.create_model("resnet10t", pretrained=False)
"""
    root = Path(torchvision_ops.__file__).parents[1]
    subprocess.run([sys.executable, "-c", script], cwd=root, check=True, timeout=300)


def test_defines_nothing_where_the_plain_import_works(monkeypatch):
    healthy = ModuleType("torchvision")
    monkeypatch.setitem(sys.modules, "torchvision", healthy)
    monkeypatch.setattr(torchvision_ops, "_define_missing_operators", lambda: pytest.fail("defined operators"))
    assert import_torchvision() is healthy


def test_other_errors_of_the_import_are_passed_on(monkeypatch, tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('the disk is on fire')")
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torchvision_ops, "_define_missing_operators", lambda: pytest.fail("defined operators"))
    with pytest.raises(RuntimeError, match="the disk is on fire"):
        import_torchvision()
