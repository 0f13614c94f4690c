"""How long `optimize` itself takes against the number of nodes, step by step.

    python -m benchmarks.compile_time --frontend trace --nodes 300 --nodes 1000 --nodes 3000 --nodes 10000

Each row is one `optimize` with verification on, of a chain of residual blocks (convolution, batch norm, relu, sum,
tanh), small in arithmetic so that the compiler's own work shows. "torch" is the time inside torch's own capture;
everything else is ours. The last column is our own time per node: level means linear.

    python -m benchmarks.compile_time --only-script-capture

A second table is about the capture of TorchScript alone, without scripting it: of that chain, and of one in which an if on
data stands around every block.

    python -m benchmarks.compile_time --only-scaling

A third table holds what was quadratic once, and should be linear: each row is one question at doubling sizes, and the
exponent p in seconds ~ size^p between the first and the last of them.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import fx, nn

from ir_tools.frontends.from_script import from_script
from ir_tools.frontends.from_trace import from_trace
from ir_tools.frontends.source import prepare
from ir_tools.ir import Block as IRBlock
from ir_tools.ir import Draft, Program
from ir_tools.rewrite.nearest import near_misses
from passes import CATALOGUE, Report, optimize

PASSES = ("fuse_conv_bn_relu", "cast_half")
CAPTURES = {"export": (torch.export, "export"), "trace": (torch.jit, "trace"), "script": (torch.jit, "script")}


class Block(nn.Module):
    """x -> tanh(x + relu(bn(conv(x)))): five nodes."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x + torch.relu(self.bn(self.conv(x))))


class Gate(nn.Module):
    """Applies a block where the mean is positive, and scales otherwise: twelve nodes with those of the if."""

    def __init__(self, channels: int):
        super().__init__()
        self.block = Block(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool(x.mean() > 0):
            x = self.block(x)
        else:
            x = x * 0.5
        return x


def chain(nodes: int, channels: int = 8, part: type[nn.Module] = Block, nodes_per_part: int = 5) -> nn.Module:
    """A model of about `nodes` ops, in eval mode, with random batch-norm statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(*[part(channels) for _ in range(nodes // nodes_per_part)]).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


@contextlib.contextmanager
def clocked(owner: Any, name: str) -> Iterator[list[float]]:
    """Seconds spent inside `owner.name` while the context lasts."""
    original = getattr(owner, name)
    seconds: list[float] = []

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - start)

    setattr(owner, name, wrapper)
    try:
        yield seconds
    finally:
        setattr(owner, name, original)


def measure(nodes: int, frontend: str) -> tuple[Report, float]:
    """The report of one run, and the seconds inside torch's own capture."""
    x = torch.randn(1, 8, 4, 4)
    with clocked(*CAPTURES[frontend]) as seconds:
        report = optimize(chain(nodes), PASSES, example_inputs=x, frontend=frontend).report
    return report, sum(seconds)


def script_capture(model: nn.Module, times: int = 3) -> tuple[int, float]:
    """Nodes of the Program, and the seconds of capturing the scripted model, scripting not counted: the best of `times`."""
    source = prepare(torch.jit.script(model), [((torch.randn(1, 8, 4, 4),), {})])
    best, program = float("inf"), None
    for _ in range(times):
        program = None
        gc.collect()
        start = time.perf_counter()
        program = from_script(source)
        best = min(best, time.perf_counter() - start)
    assert program is not None
    return len(program), best


def print_script_capture(nodes: list[int]) -> None:
    table = Table(title="capture of TorchScript without scripting, one thread, best of three")
    for column in ("model", "nodes", "seconds", "ms per node", "of the first row's"):
        table.add_column(column, justify="right")
    for name, part, nodes_per_part in (("chain", Block, 5), ("ifs on data", Gate, 12)):
        script_capture(chain(100, part=part, nodes_per_part=nodes_per_part))  # first-time costs
        first = None
        for size in nodes:
            count, seconds = script_capture(chain(size, part=part, nodes_per_part=nodes_per_part))
            each = 1e3 * seconds / count
            first = first or each
            table.add_row(name, str(count), f"{seconds:.2f}", f"{each:.3f}", f"{each / first:.2f}")
    Console().print(table)


def traced(model: nn.Module) -> Program:
    return from_trace(prepare(model, [((torch.randn(1, 8, 4, 4),), {})]))


def best_of_three(run: Callable[[], Any]) -> float:
    """Seconds of the processor, which other processes do not change much."""
    best = math.inf
    for _ in range(3):
        gc.collect()
        start = time.process_time()
        run()
        best = min(best, time.process_time() - start)
    return best


class Views(nn.Module):
    """Many views in a row: of slices, which stay, or of reshapes, which become one."""

    def __init__(self, count: int, view: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.count, self.view = count, view

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.count):
            x = self.view(x)
        return x * 2


def reshaped(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, 8).reshape(1, 8, 4, 4)


def enter_equal_names(count: int) -> float:
    """Seconds for constants that all want one name."""
    tensors = [torch.full((1,), float(i)) for i in range(count)]

    def enter() -> None:
        draft = Draft(IRBlock(fx.Graph()))
        for tensor in tensors:
            draft.constant("weight", tensor)

    return best_of_three(enter)


def explain_everything(nodes: int) -> float:
    """Seconds of `explain_at` at a module that holds all ops, for five passes."""
    program = traced(nn.Sequential(chain(nodes)).eval())
    names = ("fuse_conv_bn", "fuse_bn_conv", "remove_neutral_ops", "fuse_conv_relu", "use_stable_forms")
    return best_of_three(lambda: [near_misses(CATALOGUE[name], program, "0") for name in names])


@lru_cache
def with_ifs(count: int) -> Program:
    model = chain(12 * count, part=Gate, nodes_per_part=12)
    return from_script(prepare(torch.jit.script(model), [((torch.randn(1, 8, 4, 4),), {})]))


def over_ifs(name: str) -> Callable[[int], float]:
    def seconds(ifs: int) -> float:
        return best_of_three(lambda: CATALOGUE[name](with_ifs(ifs)))

    return seconds


def simplify_chain(count: int) -> float:
    program = traced(Views(count // 2, reshaped).eval())
    return best_of_three(lambda: CATALOGUE["simplify_views"](program))


def capture_slices(count: int) -> float:
    return best_of_three(lambda: traced(Views(count, lambda x: x[:, 0:8]).eval()))


SCALING: tuple[tuple[str, Callable[[int], float], tuple[int, ...]], ...] = (
    ("fuse_conv_bn over ifs", over_ifs("fuse_conv_bn"), (40, 80, 160, 320)),
    ("lower_onednn over ifs", over_ifs("lower_onednn"), (40, 80, 160, 320)),
    ("cast_half over ifs", over_ifs("cast_half"), (40, 80, 160, 320)),
    ("constants of one name", enter_equal_names, (1000, 2000, 4000, 8000)),
    ("near misses of five passes, ops", explain_everything, (150, 300, 600, 1200)),
    ("simplify_views, views in a row", simplify_chain, (50, 100, 200, 400)),
    ("capture of slices in a row", capture_slices, (50, 100, 200, 400)),
)


def print_scaling() -> None:
    table = Table(title="what was quadratic: CPU seconds at doubling sizes, one thread, best of three")
    for column in ("what", "sizes", "seconds", "exponent"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for what, measured, sizes in SCALING:
        measured(sizes[0])  # first-time costs
        seconds = [measured(size) for size in sizes]
        exponent = math.log(seconds[-1] / seconds[0]) / math.log(sizes[-1] / sizes[0])
        columns = ["/".join(map(str, sizes)), "/".join(f"{s:.3f}" for s in seconds), f"{exponent:.2f}"]
        table.add_row(what, *columns)
    Console(width=110).print(table)


def main(
    nodes: Annotated[list[int], typer.Option(help="sizes to measure")] = [300, 1000, 3000, 10000],  # noqa: B006
    frontend: Annotated[str, typer.Option(help="export, trace or script")] = "trace",
    only_script_capture: Annotated[bool, typer.Option(help="the second table alone")] = False,
    only_scaling: Annotated[bool, typer.Option(help="the third table alone")] = False,
) -> None:
    """Print seconds by step for each size."""
    torch.set_num_threads(1)
    if not only_script_capture and not only_scaling:
        print_steps(nodes, frontend)
    if not only_scaling:
        print_script_capture(nodes)
    if not only_script_capture:
        print_scaling()


def print_steps(nodes: list[int], frontend: str) -> None:
    measure(100, frontend)  # imports and first-time costs
    table = Table(title=f"optimize({', '.join(PASSES)}), front end {frontend}, verification on, one thread, seconds")
    for column in ("nodes", "torch's capture", "our capture", "passes", "emission", "verifying, rest", "ours", "ours per node"):
        table.add_column(column, justify="right")
    for size in nodes:
        report, torch_seconds = measure(size, frontend)
        ours_capture = report.capture_seconds - torch_seconds
        passes = sum(step.seconds for step in report.steps)
        ours = report.seconds - torch_seconds
        rest = ours - ours_capture - passes - report.emit_seconds
        row = (torch_seconds, ours_capture, passes, report.emit_seconds, rest, ours)
        table.add_row(str(report.captured_nodes), *[f"{s:.2f}" for s in row], f"{1e3 * ours / report.captured_nodes:.2f} ms")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
