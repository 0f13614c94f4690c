"""Buffers, constants and weights that branches pick and loops carry."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.control_flow_corners.corner import Corner


class BufferRead(Corner):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("b", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        before = self.b
        copy = self.b.clone()
        if bool(x.sum() > 0):
            self.b.mul_(2)
        return self.linear(x) + before + 10 * copy


class BranchPicksBuffer(Corner):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("a", torch.zeros(3))
        self.register_buffer("b", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        t = self.a if bool(x.sum() > 0) else self.b
        t.add_(1)
        return self.linear(x) + self.a + 10 * self.b


class LoopPicksBuffer(Corner):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("a", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        t = x[0] * 1.0
        for _ in range(int(x.abs().sum().clamp(max=3.0))):
            t.add_(1)
            t = self.a
        return self.linear(x) + self.a + t


class StateLoop(Corner):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n", torch.zeros(1))
        self.register_buffer("last", torch.zeros(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        before = self.n + 0
        for _ in range(int(x.abs().sum().clamp(max=3.0))):
            self.n.add_(1)
            if bool(self.n > 2):
                self.last.copy_(self.linear(x))
        return before + self.n * 10 + self.last


class BufferPlusAssign(Corner):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("acc", torch.zeros(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.sum() > 0):
            self.acc += self.linear(x)
        return self.acc * 2


class ConstAcross(Corner):
    def forward(self, x: Tensor) -> Tensor:
        k = torch.arange(3).float() * 2
        z = torch.ones([3])
        if bool(x.sum() > 0):
            y = self.linear(x) * k
            for _ in range(int(x.sum().clamp(max=4.0))):
                y = y + z * k
        else:
            y = x + z
        return y - k


class ConstCarried(Corner):
    def forward(self, x: Tensor) -> Tensor:
        k = torch.ones([2, 3])
        r = torch.zeros([2, 3])
        for _ in range(int(x.abs().sum().clamp(max=4.0))):
            k = k * x
            r.add_(k)
        return r


class UnbindLoop(Corner):
    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros([3])
        for row in x:
            if bool(row.sum() > 0):
                out = out + self.linear(row)
            else:
                out = out * 0.5 - row
        return out


class WeightBranch(Corner):
    def __init__(self) -> None:
        super().__init__()
        self.w2 = nn.Parameter(torch.randn(3, 3))
        self.bn = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        w = self.linear.weight if bool(x.sum() > 0) else self.w2
        return self.bn(F.linear(x, w, self.linear.bias))


class ConvWeight(Corner):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, 2, 3, 3))
        self.bn = nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        n = int(x.sum().abs().clamp(max=30.0) / 10)
        w = self.w
        for i in range(n):
            w = w * 0.5 + i
            x = self.bn(F.conv2d(x, w, None, 1, 1)).relu()
        return x


class OptionalAttr(Corner):
    __annotations__ = {"maybe": Tensor | None, "nothing": Tensor | None}  # TorchScript reads no strings here

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.maybe = torch.ones(3) * 3
        self.nothing = None

    def forward(self, x: Tensor) -> Tensor:
        y = x
        m = self.maybe
        n = self.nothing
        if bool(x.sum() > 0):
            if m is not None:
                y = y + m
            if n is not None:
                y = y * n
        return self.linear(y)
