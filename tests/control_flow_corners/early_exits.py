"""Early returns, breaks, raises, inlined functions, and what is carried past them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.control_flow_corners.corner import Corner


class EarlyReturnNested(Corner):
    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i in range(3):
            for j in range(3):
                y = self.linear(y) + i
                if bool(y.sum() > 1.0 + j):
                    return y * 2 + j
            if bool(y.sum() < -3):
                return -y
        return y


class BreakContinue(Corner):
    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i in range(4):
            count = 0
            while bool(y.abs().sum() < 4.0 + i):
                count += 1
                y = y * 1.7 + 0.1
                if count > 2:
                    break
            if count == 0:
                y = y - 1
                continue
            y = self.linear(y)
        return y


class WhileTrueBreak(Corner):
    def forward(self, x: Tensor) -> Tensor:
        y = x
        n = 0
        while True:
            y = self.linear(y) + 0.5
            n += 1
            if bool(y.sum() > 1) or n > 6:
                break
        return y * n


def several_returns(x: Tensor, k: int) -> Tensor:
    if bool(x.sum() > 1):
        return x + k
    if bool(x.sum() < -1):
        for i in range(k):
            if bool(x.sum() > -20):
                return x - i
            x = x * 0.5
    return x * 2


class Inlined(Corner):
    def inner(self, x: Tensor) -> Tensor:
        if bool(x.mean() > 0.2):
            return self.linear(x)
        return several_returns(x, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(several_returns(self.inner(x), 2)) + self.inner(-x)


class NestedFunctionTuples(Corner):
    def f(self, x: Tensor, n: int) -> tuple[Tensor, Tensor | None, int]:
        if n > 3:
            return x, None, 1
        if bool(x.sum() > 0):
            return self.linear(x), x, n
        return -x, None, n + 1

    def forward(self, x: Tensor) -> Tensor:
        a, m, n = self.f(x, 1)
        b, k, n = self.f(a, n + 1)
        if m is not None and k is not None:
            b = b + m * k
        elif m is not None:
            b = b - m
        return a + b * n


class InnerReturnNone(Corner):
    def maybe(self, x: Tensor) -> Tensor | None:
        for i in range(3):
            if bool(x.sum() > 2.0 * i):
                return self.linear(x) + i
            x = x + 1
        return None

    def forward(self, x: Tensor) -> Tensor:
        y = self.maybe(x)
        z = self.maybe(x - 5)
        if y is None:
            return x
        if z is not None:
            y = y * z
        return y


class OneBranchVar(Corner):
    def forward(self, x: Tensor) -> Tensor:
        c = bool(x.sum() > 0)
        z: Tensor | None = None
        if c:
            z = self.linear(x)
        y = x * 2
        if z is not None:
            y = y + z
        return y


class OptionalCarried(Corner):
    def forward(self, x: Tensor) -> Tensor:
        prev: Tensor | None = None
        y = x
        for i in range(int(x.abs().sum().clamp(max=4.0)) + 1):
            if prev is not None:
                y = y + prev
            if i % 2 == 0:
                prev = self.linear(y)
            else:
                prev = None
        if prev is None:
            return y
        return y - prev


class MultiTuple(Corner):
    def pair(self, x: Tensor) -> tuple[Tensor, int]:
        if bool(x.sum() > 0):
            return self.linear(x), 3
        return x, -1

    def forward(self, x: Tensor) -> Tensor:
        y, n = self.pair(x)
        z, m = self.pair(-y)
        return y * n + z * m


class SubBoth(Corner):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.sum() > 0):
            y = self.bn(self.linear(x))
        else:
            y = self.linear(self.bn(self.linear(x))).relu()
        return y


class RaisesInLoop(Corner):
    def forward(self, x: Tensor) -> Tensor:
        y = x
        for _ in range(int(x.abs().sum().clamp(max=3.0))):
            if bool(y.abs().sum() > 1e6):
                raise RuntimeError("too big")
            y = self.linear(y)
        assert bool((y == y).all()), "nan"
        return y


class IfInLoopWithState(Corner):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros([2, 3])
        outs: list[Tensor] = []
        for _ in range(4):
            h = self.bn(self.linear(h + x))
            if bool(h.sum() > 0):
                outs.append(h)
            else:
                outs.insert(0, -h)
            if len(outs) > 2:
                outs[1] = outs[0] + 1
                outs[2].mul_(0.5)
        return torch.stack(outs).sum(0)


class DropoutLayer(Corner):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.BatchNorm1d(3))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        while bool(y.abs().sum() < 20):
            d = F.dropout(y, 0.5, self.training)
            y.add_(1.0)
            y = self.net(d) + y + 0.7
        return y


class CondExprWhile(Corner):
    def forward(self, x: Tensor) -> Tensor:
        i = 0
        y = x
        while (i < 3 and bool(y.sum() < 10)) or i == 0:
            z = y
            y = self.linear(z) + 1
            i += 1 if bool(y.sum() > 0) else 2
        return y + i
