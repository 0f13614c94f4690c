"""`.pt` files that stock torch wrote, optimised from the path alone, in a process without the model's class or library."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ir_tools.torch_compat import pytree
from tests import models
from tests.models import Case, seeded
from tests.test_recurrent import Recurrent

CHILD = """
import json, sys, traceback
from pathlib import Path

BLOCKED = ("torchvision", "timm", "transformers", "tests", "benchmarks")

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ImportError(name + " must not be needed to optimise a TorchScript file")

root, folder = sys.argv[1:]
sys.path.insert(0, root)
sys.meta_path.insert(0, Blocked())
import torch
from torch.utils import _pytree as pytree
from passes import load, optimize

def result_of(file):
    data = torch.load(file.with_suffix(".data"), weights_only=True)
    fast = optimize(file, "fuse_conv_bn_relu", example_inputs=tuple(data["args"]))
    fast.save(file.with_suffix(".fast"))
    errors = []
    for model in (fast, load(file.with_suffix(".fast"))):
        for args, expected in ((data["args"], data["outputs"]), (data["other_args"], data["other_outputs"])):
            got = pytree.tree_leaves(model(*args))
            assert [(g.shape, g.dtype) for g in got] == [(e.shape, e.dtype) for e in expected]
            errors += [((g - e).abs().max() / e.abs().max()).item() for g, e in zip(got, expected)]
    folds = sum(len(step.rewrites) for step in fast.report.steps if step.name == "fuse_conv_bn")
    return {"folds": folds, "left": fast.report.ops_left.get("batch_norm", 0), "error": max(errors),
            "frontend": fast.report.frontend, "ops": sum(fast.report.ops_left.values())}

results = {}
for file in sorted(Path(folder).glob("*.pt")):
    try:
        results[file.stem] = result_of(file)
    except Exception:
        results[file.stem] = traceback.format_exc()
assert not set(BLOCKED) & set(sys.modules)
print(json.dumps(results))
"""


class Blocks(nn.Module):
    """What scripting keeps and tracing loses: methods, a loop over sizes, an optional argument, a dict as result."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)) for _ in range(2)])
        self.bias = nn.Parameter(torch.randn(3))

    def scaled(self, x: Tensor, factor: float) -> Tensor:
        return x * factor + self.bias.view(1, -1, 1, 1)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> dict[str, Tensor]:
        for block in self.blocks:
            x = F.relu(block(x)) + x
        total = torch.zeros_like(x)
        for i in range(x.size(2)):
            total = total + x[:, :, i : i + 1] * i
        if skip is not None:
            total = total + skip
        return {"x": x, "total": self.scaled(total, 0.5)}


class Segmentation(nn.Module):
    """An OrderedDict as result, as torchvision's segmentation models give."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        result = OrderedDict()
        result["out"] = F.interpolate(self.block(x), size=x.shape[-2:], mode="bilinear", align_corners=False)
        return result


def blocks() -> Case:
    return Case(Blocks(), (models.image(1, 3, 4, 4), models.image(1, 3, 4, 4)))


def bert() -> Case:
    case = models.model_output()
    return Case(case.model, (*case.args, torch.ones_like(case.args[0])))


def recurrent() -> Case:
    return Case(Recurrent(nn.LSTM, num_layers=2, bidirectional=True), (torch.randn(3, 5, 6),))


def scripted(case: Case) -> torch.jit.ScriptModule:
    return torch.jit.script(case.model)


def traced(case: Case) -> torch.jit.ScriptModule:
    return torch.jit.trace(case.model, case.args, strict=False)  # not strict: a dict may be returned


def frozen(make: Callable[[Case], torch.jit.ScriptModule]) -> Callable[[Case], torch.jit.ScriptModule]:
    return lambda case: torch.jit.freeze(make(case))


# name -> the model, how stock torch makes a file of it, batch norms in the file that must fold
FILES: dict[str, tuple[Callable[[], Case], Callable[[Case], torch.jit.ScriptModule], int]] = {
    "scripted_resnet18": (lambda: models.torchvision_model("resnet18"), scripted, 20),
    "traced_bert": (bert, traced, 0),
    "frozen_scripted_mobilenet_v2": (lambda: models.torchvision_model("mobilenet_v2"), frozen(scripted), 0),
    "frozen_traced_mobilenet_v3": (lambda: models.torchvision_model("mobilenet_v3_small"), frozen(traced), 0),
    "scripted_blocks": (blocks, scripted, 2),
    "frozen_scripted_blocks": (blocks, frozen(scripted), 0),
    "scripted_segmentation": (lambda: Case(Segmentation(), (models.image(1, 3, 8, 8),)), scripted, 1),
    "traced_lstm": (recurrent, traced, 1),
    "frozen_traced_lstm": (recurrent, frozen(traced), 0),
}


def tensors(result: object) -> list[Tensor]:
    return [t.detach().clone() for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, Any]:
    """File name -> what a process made of it that can import torch and this project, and nothing that knows the models."""
    folder = tmp_path_factory.mktemp("stock")
    for name, (build, write, _) in FILES.items():
        case = seeded(build)
        torch.jit.save(write(case), str(folder / f"{name}.pt"))
        other = Case(case.model, tuple(t.flip(-1) for t in case.args))
        calls = {"args": list(case.args), "other_args": list(other.args)}
        torch.save({**calls, "outputs": tensors(case()), "other_outputs": tensors(other())}, folder / f"{name}.data")
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-I", "-W", "ignore", "-c", CHILD, str(root), str(folder)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", FILES)
def test_a_stock_file_is_optimised_from_its_path(name, results):
    result = results[name]
    assert isinstance(result, dict), result
    assert result["frontend"] == "script"
    assert (result["folds"], result["left"]) == (FILES[name][2], 0)
    assert result["error"] <= 1e-4
    assert result["ops"] >= 3


@pytest.mark.parametrize("name", ["scripted_resnet18", "scripted_blocks", "traced_lstm"])
def test_the_files_hold_the_batch_norms_that_must_fold(name):
    """And freezing folds its own, so that there is nothing left to find in a frozen file."""
    build, write, folds = FILES[name]
    module = write(seeded(build))
    assert str(module.inlined_graph).count("aten::batch_norm(") == folds
    assert "aten::batch_norm(" not in str(torch.jit.freeze(module).graph)
