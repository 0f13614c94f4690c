"""The saved file on its own: a process with torch and nothing else, against eager float32, in one run.

    python -m benchmarks.saved_file

The child process cannot import `passes`, `ir_tools` or `torchvision` and sets no switch; it loads the file with
`torch.jit.load`. Both processes take turns, call by call, so that they meet the same machine.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from passes import optimize
from passes.cli.sources import load_source

LOAD_ALONE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("passes", "ir_tools", "torchvision", "timm"):
            raise ImportError(name + " must not be needed to run a saved file")

sys.meta_path.insert(0, Blocked())
import torch

model = torch.jit.load(sys.argv[1])
data = torch.load(sys.argv[2], weights_only=True)
"""
"""The start of a child process: torch and nothing of ours; argv holds the model's file and a file of tensors."""

CHILD = LOAD_ALONE + """
import time

torch.set_num_threads(int(sys.argv[3]))
with torch.no_grad():
    for _ in range(5):
        out = model(data["x"])
    error = (out - data["y"]).abs().max().item()
    print(error, flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        model(data["x"])
        print(time.perf_counter() - start, flush=True)
"""


def main(
    source: Annotated[str, typer.Argument(help="torchvision:NAME or timm:NAME")] = "torchvision:resnet50",
    rounds: Annotated[int, typer.Option(help="calls of each")] = 40,
) -> None:
    """Print the median of both, and their ratio."""
    model = load_source(source)
    assert isinstance(model, torch.nn.Module)
    x = torch.randn(1, 3, 224, 224)
    fast = optimize(model, ["fuse_conv_bn_relu", "cast_half"], example_inputs=x)
    with tempfile.TemporaryDirectory() as folder:
        file, data = Path(folder) / "model.pt", Path(folder) / "data.pt"
        fast.save(file)
        torch.save({"x": x, "y": fast(x)}, data)
        del fast
        command = [sys.executable, "-I", "-W", "ignore", "-c", CHILD, str(file), str(data), str(torch.get_num_threads())]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdin is not None and child.stdout is not None
            error = float(child.stdout.readline())
            eager, saved = [], []
            with torch.no_grad():
                for _ in range(3):
                    model(x)
                for _ in range(rounds):
                    start = time.perf_counter()
                    model(x)
                    eager.append(time.perf_counter() - start)
                    child.stdin.write("go\n")
                    child.stdin.flush()
                    saved.append(float(child.stdout.readline()))
            child.stdin.close()
    before, after = statistics.median(eager), statistics.median(saved)
    print(f"{source}, {rounds} interleaved rounds, {torch.get_num_threads()} threads")
    print(f"eager float32              {before * 1e3:8.2f} ms")
    print(f"saved file, fresh process  {after * 1e3:8.2f} ms")
    print(f"ratio                      {before / after:8.2f} x      max difference from the writer's outputs {error:g}")


if __name__ == "__main__":
    typer.run(main)
