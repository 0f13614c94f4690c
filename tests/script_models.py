"""Scriptable models whose control flow depends on tensor data, each a class; `script_cases` has their inputs.

Every model runs eagerly and under `torch.jit.script`, and has batch norms with random statistics behind convolutions or
linears inside its branches and loop bodies. `branches_taken.outcomes_missed` is the proof, by the lines that Python
executes, that the inputs of a model take both outcomes of each of its ifs and whiles.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv_block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU())


def linear_block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs))


# -- loops that data ends ----------------------------------------------------------------------------------------------


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


# -- branches ----------------------------------------------------------------------------------------------------------


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
        largest = int(x.mean((0, 2, 3)).argmax())
        if largest == 0:
            y = F.relu(self.norm(self.shared(x * 0.5)))
        elif largest == 1:
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
    """Four paths through two levels of ifs; one value is defined in every branch, one only outside."""

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


# -- None, errors and memory -------------------------------------------------------------------------------------------


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


# -- state carried through loops ---------------------------------------------------------------------------------------


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
