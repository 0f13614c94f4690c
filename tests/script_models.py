"""Scriptable models whose control flow depends on tensor data, each with inputs that together take every branch.

Every model runs eagerly and under `torch.jit.script`, and has batch norms with random statistics behind convolutions or
linears inside its branches and loop bodies. `outcomes_missed` is the proof, by the lines that Python executes, that the
inputs of a model go both ways at each of its ifs and whiles.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models import SEED, randomize_batch_norm


def conv_block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU())


def linear_block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs))


# -- loops that data ends -----------------------------------------------------------------------------------------------


class GreedyDecoder(nn.Module):
    """An encoder, then a recurrent decoder that emits its most likely token until all rows have said EOS (token 0)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = conv_block(3, 8)
        self.cell = linear_block(8 + 8, 8)
        self.vocabulary = linear_block(8, 6)
        self.embedding = nn.Embedding(6, 8)
        with torch.no_grad():
            self.cell[0].weight.mul_(3)
            self.vocabulary[0].weight.mul_(4)

    def forward(self, x: Tensor, haste: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.encoder(x).mean((2, 3))
        token = torch.ones([x.size(0)], dtype=torch.long)
        tokens: list[Tensor] = []
        scores: list[Tensor] = []
        finished = torch.zeros([x.size(0)], dtype=torch.bool)
        while len(tokens) < 6 and not bool(finished.all()):
            hidden = torch.tanh(self.cell(torch.cat([hidden, self.embedding(token)], 1)))
            logits = self.vocabulary(hidden)
            logits = torch.cat([logits[:, :1] + haste * (len(tokens) + 1), logits[:, 1:]], 1)
            score, token = logits.log_softmax(1).max(1)
            token = token.masked_fill(finished, 0)
            tokens.append(token)
            scores.append(score)
            finished = finished | (token == 0)
        return torch.stack(tokens, 1), torch.stack(scores, 1)


class AdaptiveDepth(nn.Module):
    """Repeats one block until it changes little, or four times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_block(3, 6)
        self.block = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6))

    def forward(self, x: Tensor, tolerance: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        residual = torch.ones([])
        steps = 0
        while steps < 4 and bool(residual > tolerance):
            change = torch.tanh(self.block(x)) * 0.3
            residual = change.square().mean().sqrt() / (steps + 1)
            x = F.relu(x + change)
            steps += 1
        return x, residual


class BeamSearch(nn.Module):
    """Keeps the three best prefixes per row until all have ended, then reads the best one back through the parents."""

    def __init__(self) -> None:
        super().__init__()
        self.start = linear_block(5, 8)
        self.step = linear_block(8 + 8, 8)
        self.vocabulary = nn.Linear(8, 7)
        self.embedding = nn.Embedding(7, 8)
        with torch.no_grad():
            self.step[0].weight.mul_(3)
            self.vocabulary.weight.mul_(4)

    def forward(self, x: Tensor, haste: Tensor) -> tuple[Tensor, Tensor]:
        batch, width = x.size(0), 3
        hidden = torch.tanh(self.start(x)).unsqueeze(1).repeat(1, width, 1)
        scores = torch.tensor([0.0, -20.0, -20.0]).repeat(batch, 1)
        token = torch.ones([batch, width], dtype=torch.long)
        ended = torch.zeros([batch, width], dtype=torch.bool)
        parents: list[Tensor] = []
        tokens: list[Tensor] = []
        for position in range(5):
            if bool(ended.all()):
                break
            both = torch.cat([hidden, self.embedding(token)], 2).flatten(0, 1)
            hidden = torch.tanh(self.step(both)).view(batch, width, 8)
            new = self.vocabulary(hidden) - 3.0 * F.one_hot(token, 7)
            new = torch.cat([new[:, :, :1] + haste * (position + 1), new[:, :, 1:]], 2).log_softmax(2)
            only_end = torch.full_like(new, -50.0)
            only_end[:, :, 0] = 0.0
            new = torch.where(ended.unsqueeze(2), only_end, new)
            scores, chosen = (scores.unsqueeze(2) + new).flatten(1).topk(width, 1)
            parent = torch.div(chosen, 7, rounding_mode="floor")
            token = chosen % 7
            hidden = hidden.gather(1, parent.unsqueeze(2).expand(-1, -1, 8))
            ended = ended.gather(1, parent) | (token == 0)
            parents.append(parent)
            tokens.append(token)
        best = torch.zeros([batch, 1], dtype=torch.long)
        read: list[Tensor] = []
        for position in range(len(tokens) - 1, -1, -1):
            read.append(tokens[position].gather(1, best))
            best = parents[position].gather(1, best)
        return torch.cat(read, 1).flip(1), scores


class BreakAndContinue(nn.Module):
    """Up to six rounds: stops when the signal has died out, halves what is too loud instead of convolving it."""

    def __init__(self) -> None:
        super().__init__()
        self.block = conv_block(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        rounds = torch.zeros([1])
        for i in range(6):
            if bool(x.abs().max() < 0.4):
                break
            rounds = rounds + 1
            if bool(x.abs().max() > 2.0):
                x = x * 0.5
                continue
            x = self.block(x) * 0.6 - 0.05 * i
        return x + rounds


class DataTripCount(nn.Module):
    """The input says how often the block is applied, and how many columns are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.last = conv_block(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        times = int(x[:, 0].abs().max().clamp(0, 3))
        for i in range(times):
            x = torch.tanh(self.block(x)) + 0.1 * i
        columns = 2 + int((x.mean((0, 1, 2)) > 0).sum())
        return self.last(x[:, :, :, :columns])


# -- branches -----------------------------------------------------------------------------------------------------------


class EarlyExit(nn.Module):
    """A classifier that answers from the first head that is sure enough."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle, self.top = conv_block(3, 6), conv_block(6, 8, 2), conv_block(8, 8, 2)
        self.heads = nn.ModuleList([nn.Linear(6, 4), nn.Linear(8, 4), nn.Linear(8, 4)])

    def forward(self, x: Tensor, threshold: Tensor) -> Tensor:
        x = self.stem(x)
        first = self.heads[0](x.mean((2, 3))).softmax(1)
        if bool(first.amax(1).min() > threshold[0]):
            return first
        x = self.middle(x)
        second = self.heads[1](x.mean((2, 3))).softmax(1)
        if bool(second.amax(1).min() > threshold[1]):
            return (first + second) / 2
        return self.heads[2](self.top(x).mean((2, 3))).softmax(1)


class Router(nn.Module):
    """A gate sends the batch to one of three experts; one of them normalises what the shared convolution gives."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.wide = conv_block(4, 4)
        self.depthwise = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4), nn.Hardswish())

    def forward(self, x: Tensor) -> Tensor:
        always = self.shared(x)
        choice = int(x.mean((0, 2, 3)).argmax())
        if choice == 0:
            y = F.relu(self.norm(self.shared(x * 0.5)))
        elif choice == 1:
            y = self.wide(x)
        else:
            y = self.depthwise(x) + x
        return y + always


class IfInFor(nn.Module):
    """Three rounds, in each of which the sum decides."""

    def __init__(self) -> None:
        super().__init__()
        self.block = conv_block(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(3):
            if bool(x.sum() > 0):
                x = self.block(x) - 1.0 - i
            else:
                x = x * -0.7 + 0.2
        return x


class IfPerBlock(nn.Module):
    """A ModuleList: each of its blocks is skipped where the signal is weak."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([conv_block(4, 4), conv_block(4, 4), conv_block(4, 4)])

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        for block in self.blocks:
            if bool(x.abs().mean() > level):
                x = block(x) - 0.5
        return x + level


class NestedIfs(nn.Module):
    """Four ways through two levels of ifs; one value is defined in every branch, one only outside."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv_block(4, 4), conv_block(4, 4), conv_block(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if bool(x.mean() > 0):
            scale = 2.0
            if bool(y.mean() > 0):
                z = self.a(x)
            else:
                scale = 0.5
                z = self.b(x + y)
        else:
            scale = float(y.max())
            if bool(y.mean() > 0):
                z, x = x, self.c(y)
            else:
                z = x - y
        return z * scale, x


class SharedWeight(nn.Module):
    """One convolution, normalised in a branch and bare outside of it: the fold must leave the bare one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if bool(y.sum() > 0):
            y = y + F.relu(self.norm(self.conv(x + 1)))
        return y + self.conv(y)


# -- None, errors and memory --------------------------------------------------------------------------------------------


class OptionalMemory(nn.Module):
    """Carries a memory from frame to frame that data makes, changes and forgets; the mask may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.write = conv_block(3, 4)
        self.update = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, frames: Tensor, mask: Tensor | None = None) -> Tensor:
        memory: Tensor | None = None
        for t in range(frames.size(0)):
            frame = frames[t]
            if mask is not None:
                frame = frame * mask
            if bool(frame.mean() < -1):
                memory = None
            elif memory is None:
                memory = self.write(frame)
            else:
                memory = torch.tanh(self.update(memory)) + frame.mean()
        if memory is None:
            return torch.zeros([1, 4, 6, 6])
        return memory


class Checked(nn.Module):
    """Raises on NaN; warms up inputs that are all negative."""

    def __init__(self) -> None:
        super().__init__()
        self.block = conv_block(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if bool((x != x).any()):
            raise ValueError("the input holds NaN")
        if bool((x < 0).all()):
            x = self.block(-x)
        return x.clamp(min=-1.0) * 2


class CountingGate(nn.Module):
    """Counts in a buffer how often the gate was open, and answers with the count."""

    def __init__(self) -> None:
        super().__init__()
        self.block = conv_block(4, 4)
        self.register_buffer("hits", torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.sum() > 0):
            self.hits.add_(1)
            x = self.block(x)
        return x * self.hits


# -- state carried through loops ----------------------------------------------------------------------------------------


class LSTMLoop(nn.Module):
    """An LSTM cell with a batch norm, stepped over `x.size(0)`; a frame of zeros leaves the List[Tensor] state as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = linear_block(5 + 6, 24)

    def forward(self, x: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        outputs: list[Tensor] = []
        h, c = state[0], state[1]
        state = [h, c]
        for t in range(x.size(0)):
            if bool((x[t] != 0).any()):
                i, f, g, o = self.gates(torch.cat([x[t], state[0]], 1)).chunk(4, 1)
                state[1] = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
                state[0] = torch.sigmoid(o) * torch.tanh(state[1])
            outputs.append(state[0])
        return torch.stack(outputs), state


class DictAndTuple(nn.Module):
    """A dict and a tuple as loop state, until the smaller of the two norms is small."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = linear_block(6, 6), linear_block(6, 6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {"left": x, "right": -x}
        best = (x, 100.0)
        turn = 0
        while turn < 5 and best[1] > 0.8:
            name = "left" if turn % 2 == 0 else "right"
            if turn % 2 == 0:
                new = torch.tanh(self.left(state[name]))
            else:
                new = torch.tanh(self.right(state[name] * 3))
            state[name] = new
            norm = float(new.square().mean().sqrt())
            if norm < best[1]:
                best = (new, norm)
            turn += 1
        return {"best": best[0], "left": state["left"], "right": state["right"]}


# -- the table ----------------------------------------------------------------------------------------------------------


@dataclass
class ScriptCase:
    """A model in eval mode, inputs by the path they take, and what the graph compiler must make of it.

    - `folds`: the layers that a batch norm folds into, with the number of such places in the source.
    - `unrolled`: the same where loops of a known length are unrolled.
    - `ifs`, `loops`: how many ifs and loops depend on data, so that no capture from one input may resolve them. A loop
      with a known bound and a break may become ifs.
    - `raises`: input name -> the message of the error that it causes.
    """

    model: nn.Module
    inputs: dict[str, tuple]
    folds: dict[str, int]
    ifs: int = 0
    loops: int = 0
    unrolled: dict[str, int] = field(default_factory=dict)
    raises: dict[str, str] = field(default_factory=dict)

    @property
    def working(self) -> dict[str, tuple]:
        return {name: args for name, args in self.inputs.items() if name not in self.raises}


def case(build: Callable[[], ScriptCase]) -> ScriptCase:
    """What `build` makes from the seed, in eval mode with random batch norms; the global random state is left alone."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(SEED)
        made = build()
        randomize_batch_norm(made.model)
    made.model.eval()
    return made


def number(value: float) -> Tensor:
    return torch.tensor(value)


def greedy_decoder() -> ScriptCase:
    x = torch.randn(2, 3, 6, 6)
    inputs = {"to_the_end": (x, number(-9.0)), "in_between": (x, number(0.15)), "at_once": (x, number(9.0))}
    return ScriptCase(GreedyDecoder(), inputs, {"encoder.0": 1, "cell.0": 1, "vocabulary.0": 1}, loops=1)


def adaptive_depth() -> ScriptCase:
    x = torch.randn(2, 3, 6, 6)
    inputs = {"two_steps": (x, number(0.05)), "all_steps": (x, number(0.0)), "no_step": (x, number(2.0))}
    return ScriptCase(AdaptiveDepth(), inputs, {"stem.0": 1, "block.0": 1}, loops=1)


def beam_search() -> ScriptCase:
    x = torch.randn(2, 5)
    inputs = {"all_positions": (x, number(-3.0)), "ends_early": (x, number(9.0))}
    unrolled = {"start.0": 1, "step.0": 5}
    return ScriptCase(BeamSearch(), inputs, {"start.0": 1, "step.0": 1}, ifs=1, loops=1, unrolled=unrolled)


def break_and_continue() -> ScriptCase:
    x = torch.randn(1, 4, 6, 6).clamp(-1.9, 1.9)
    inputs = {"convolves": (x,), "breaks_at_once": (x * 0.1,), "halves_first": (x * 4,), "only_halves": (x * 1e4,)}
    return ScriptCase(BreakAndContinue(), inputs, {"block.0": 1}, ifs=2, unrolled={"block.0": 6})


def data_trip_count() -> ScriptCase:
    x = torch.randn(1, 4, 5, 6)
    inputs = {f"{n}_times": (x * (n + 0.5) / x[:, 0].abs().max(),) for n in (2, 0, 1, 3)}
    return ScriptCase(DataTripCount(), inputs, {"block.0": 1, "last.0": 1}, loops=1)


def early_exit() -> ScriptCase:
    x = torch.randn(2, 3, 12, 12)
    limits = {"last": [1.0, 1.0], "first": [0.0, 0.0], "second": [1.0, 0.0]}
    inputs = {name: (x, torch.tensor(values)) for name, values in limits.items()}
    return ScriptCase(EarlyExit(), inputs, {"stem.0": 1, "middle.0": 1, "top.0": 1}, ifs=2)


def router() -> ScriptCase:
    x = torch.randn(2, 4, 6, 6)
    inputs = {f"expert_{n}": (x + F.one_hot(torch.tensor(n), 4).view(1, 4, 1, 1),) for n in (1, 0, 2)}
    return ScriptCase(Router(), inputs, {"shared": 1, "wide.0": 1, "depthwise.0": 1}, ifs=2)


def if_in_for() -> ScriptCase:
    x = torch.randn(1, 4, 6, 6)
    inputs = {"mixed": (x + 0.5,), "starts_negative": (x - 0.5,), "very_positive": (x + 30,)}
    return ScriptCase(IfInFor(), inputs, {"block.0": 1}, ifs=1, unrolled={"block.0": 3})


def if_per_block() -> ScriptCase:
    x = torch.randn(1, 4, 6, 6)
    inputs = {"all": (x, number(0.0)), "none": (x, number(3.0)), "some": (x, number(0.5))}
    return ScriptCase(IfPerBlock(), inputs, {f"blocks.{i}.0": 1 for i in range(3)}, ifs=3)


def nested_ifs() -> ScriptCase:
    x, y = torch.rand(1, 4, 6, 6), torch.rand(1, 4, 6, 6) + 0.2
    signs = {"plus_plus": (1, 1), "plus_minus": (1, -1), "minus_plus": (-1, 1), "minus_minus": (-1, -1)}
    inputs = {name: (x * a, y * b) for name, (a, b) in signs.items()}
    return ScriptCase(NestedIfs(), inputs, {"a.0": 1, "b.0": 1, "c.0": 1}, ifs=3)


def shared_weight() -> ScriptCase:
    x = torch.randn(1, 4, 6, 6)
    return ScriptCase(SharedWeight(), {"skipped": (x,), "taken": (-x,)}, {"conv": 1}, ifs=1)


def optional_memory() -> ScriptCase:
    frame, reset = torch.randn(1, 3, 6, 6), torch.full((1, 3, 6, 6), -2.0)
    mask = (torch.randn(1, 3, 6, 6) > -1).float()
    inputs = {
        "updated": (torch.stack([frame, frame + 1, frame * 2]), None),
        "forgotten": (torch.stack([frame, frame, reset]), None),
        "written_again": (torch.stack([frame, reset, frame * 2]), None),
        "with_mask": (torch.stack([frame, frame + 1, frame * 2]), mask),
        "with_mask_forgotten": (torch.stack([frame, reset, reset]), mask),
    }
    unrolled = {"write.0": 3, "update.0": 2}  # in the first round there is nothing to update
    return ScriptCase(OptionalMemory(), inputs, {"write.0": 1, "update.0": 1}, ifs=2, unrolled=unrolled)


def checked() -> ScriptCase:
    x = torch.rand(1, 4, 6, 6)
    inputs = {"positive": (x,), "negative": (-x - 0.1,), "nan": (x * float("nan"),)}
    return ScriptCase(Checked(), inputs, {"block.0": 1}, ifs=1, raises={"nan": "the input holds NaN"})


def counting_gate() -> ScriptCase:
    x = torch.randn(1, 4, 6, 6).abs()
    inputs = {"open": (x,), "closed": (-x,)}
    return ScriptCase(CountingGate(), inputs, {"block.0": 1}, ifs=1)


def lstm_loop() -> ScriptCase:
    x, state = torch.randn(4, 2, 5), [torch.randn(2, 6), torch.randn(2, 6)]
    gap = x * torch.tensor([1.0, 0, 0, 1]).view(4, 1, 1)
    inputs = {"all_frames": (x, state), "gap": (gap, state), "silence": (x * 0, state)}
    return ScriptCase(LSTMLoop(), inputs, {"gates.0": 1}, ifs=1, unrolled={"gates.0": 4})


def dict_and_tuple() -> ScriptCase:
    x = torch.randn(2, 6)
    inputs = {"all_turns": (x * 20,), "one_turn": (x * 0.2,)}
    return ScriptCase(DictAndTuple(), inputs, {"left.0": 1, "right.0": 1}, ifs=1, loops=1)


SCRIPT_MODELS: dict[str, Callable[[], ScriptCase]] = {
    build.__name__: build
    for build in (
        greedy_decoder, adaptive_depth, beam_search, break_and_continue, data_trip_count, early_exit, router, if_in_for,
        if_per_block, nested_ifs, shared_weight, optional_memory, checked, counting_gate, lstm_loop, dict_and_tuple,
    )
}  # fmt: skip


# -- which branches a run takes -----------------------------------------------------------------------------------------


class Watch:
    """The steps from line to line that Python takes in the functions of one file, recorded while it is entered."""

    def __init__(self, filename: str) -> None:
        self.filename = filename
        self.steps: list[tuple[int, int]] = []

    def __enter__(self) -> Watch:
        self._before = sys.gettrace()
        sys.settrace(self._on_call)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(self._before)

    def _on_call(self, frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename != self.filename:
            return None
        last = 0

        def on_line(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal last
            line = frame.f_lineno if event == "line" else -1
            if event in ("line", "return"):
                self.steps.append((last, line))
                last = line
            return on_line

        return on_line


def outcomes(tree: ast.AST, first_line: int, steps: Iterable[tuple[int, int]]) -> dict[tuple[int, str], tuple[bool, bool]]:
    """(line, "If" or "While") -> whether its condition was ever true, and ever false. Conditions stand on one line each."""
    steps = set(steps)
    seen = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.If, ast.While)):
            line, inside = node.lineno + first_line - 1, node.body[0].lineno + first_line - 1
            after = {to for at, to in steps if at == line}
            seen[line, type(node).__name__] = (inside in after, bool(after - {inside}))
    return seen


def path_taken(model: nn.Module, args: tuple) -> list[tuple[int, int]]:
    """The steps from line to line that `forward` takes on one call, also where that ends in an error of the model's own."""
    with Watch(str(inspect.getsourcefile(type(model)))) as watch, torch.no_grad(), suppress(ValueError):
        model(*args)
    return watch.steps


def outcomes_missed(model: nn.Module, paths: Iterable[list[tuple[int, int]]]) -> list[str]:
    """The outcomes of ifs and whiles in `forward` that none of the paths brings about, by line of this file."""
    source, first_line = inspect.getsourcelines(type(model).forward)
    steps = [step for path in paths for step in path]
    tree = ast.parse(textwrap.dedent("".join(source)))
    return [
        f"{kind} in line {line} is never {outcome}"
        for (line, kind), both in outcomes(tree, first_line, steps).items()
        for outcome, was_seen in zip((True, False), both)
        if not was_seen
    ]
