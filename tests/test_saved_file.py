"""A saved file on its own: a process with torch and nothing of ours gives the writer's outputs, bit for bit."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from benchmarks.saved_file import LOAD_ALONE
from ir_tools.torchvision_ops import import_torchvision
from passes import optimize

CHILD = LOAD_ALONE + """torch.set_num_threads(data["threads"])
for call in range(3):
    out = model(data["x"])
    assert out.dtype == data["y"].dtype and torch.equal(out, data["y"]), (out - data["y"]).abs().max()
assert not out.requires_grad
try:
    model(torch.cat([data["x"], data["x"]]))
except torch.jit.Error as error:
    print(str(error).strip().splitlines()[-1])
assert not {"passes", "ir_tools", "torchvision", "timm"} & set(sys.modules)
"""


@pytest.mark.parametrize("engine", ["onednn_ops", "aten"])
def test_resnet18_in_a_process_with_only_torch(engine, tmp_path):
    import_torchvision()
    from torchvision.models import resnet18

    torch.manual_seed(0)
    model = resnet18(weights=None).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    x = torch.randn(1, 3, 64, 64)
    fast = optimize(model, ["fuse_conv_bn_relu", "cast_half"], example_inputs=x, engine=engine)
    file, data = tmp_path / "model.pt", tmp_path / "data.pt"
    fast.save(file)
    torch.save({"x": x, "y": fast(x), "threads": torch.get_num_threads()}, data)

    # -I: no PYTHONPATH, no current folder.
    command = [sys.executable, "-I", "-W", "ignore", "-c", CHILD, str(file), str(data)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (
        "builtins.RuntimeError: input 'x' must have shape [1, 3, 64, 64] (sizes were baked in at capture), got [2, 3, 64, 64]"
    )
