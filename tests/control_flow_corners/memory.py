"""Memory: who sees a write."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.control_flow_corners.corner import Corner


class AliasAcross(Corner):
    def forward(self, x: Tensor) -> Tensor:
        a = x * 1.0
        b = self.linear(x)
        if bool(x.sum() > 0):
            c = a
        else:
            c = b
        c.mul_(2.0)
        return a + 10 * b + 100 * c


class ViewsInLoop(Corner):
    def forward(self, x: Tensor) -> Tensor:
        a = self.linear(x)
        n = int(x.abs().sum().clamp(max=4.0))
        for i in range(n):
            v = a[i % 2]
            v.add_(1.0)
            a = a * 0.5 if i == 1 else a
        return a


class Swap(Corner):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = x * 1.0
        b = self.linear(x)
        n = int(x.abs().sum().clamp(max=5.0))
        for _ in range(n):
            a.add_(b)
            a, b = b, a
        return a, b


class WrittenThenRead(Corner):
    def forward(self, x: Tensor) -> Tensor:
        a = self.linear(x)
        v = a.view(-1)
        if bool(x.sum() > 0):
            a[0] = 7.0
        else:
            v[1:3].fill_(3.0)
        return a * 2 + v.view(2, 3)


class InplaceResultOfBranch(Corner):
    def forward(self, x: Tensor) -> Tensor:
        a = self.linear(x)
        b = x.clone()
        v = a
        if bool(x.sum() > 0):
            v = a[0]
            w = b
        else:
            w = a
        v.add_(1)
        w.mul_(3)
        return a + b


class CarriedViews(Corner):
    def forward(self, x: Tensor) -> Tensor:
        base = torch.zeros([4, 3])
        cur = base[0]
        for i in range(int(x.abs().sum().clamp(max=3.0))):
            cur.add_(x[0])
            cur = base[i + 1]
        cur.fill_(9.0)
        return base


class BranchGivesView(Corner):
    def forward(self, x: Tensor) -> Tensor:
        a = self.linear(x)
        t = a.t() if bool(x.sum() > 0) else a.clone().t()
        t.mul_(2)
        return a + t.t()


class InputView(Corner):
    def forward(self, x: Tensor) -> Tensor:
        y = x[0] if bool(x.sum() > 0) else x[1]
        y.add_(1)
        return self.linear(x) + y


class WritesInput(Corner):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.linear(x)
        if bool(x.sum() > 0):
            x.add_(1.0)
        z = self.linear(x)
        return y, z


class OuterWrittenInsideRead(Corner):
    def forward(self, x: Tensor) -> Tensor:
        a = self.linear(x)
        v = a[0]
        if bool(x.sum() > 0):
            v = a[1]
        a.add_(5.0)
        return self.linear(x) + v


class ReshapeBranch(Corner):
    def forward(self, x: Tensor) -> Tensor:
        a = self.linear(x)
        r = a.reshape(-1) if bool(x.sum() > 0) else a.t().reshape(-1)
        r.add_(1)
        return a + r.sum()


class AliasedTwice(Corner):
    def forward(self, x: Tensor) -> Tensor:
        a = self.linear(x)
        pair = (a, a)
        if bool(x.sum() > 0):
            pair = (a * 2, a)
        pair[0].add_(1.0)
        return pair[1] + a


class NoneThenWrite(Corner):
    def forward(self, x: Tensor) -> Tensor:
        a: Tensor | None = None
        for _ in range(int(x.abs().sum().clamp(max=4.0)) + 2):
            if a is None:
                a = self.linear(x)
            else:
                a.add_(1.0)
        assert a is not None
        return a


class InplaceRelu(Corner):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        keep = y
        for _ in range(int(x.abs().sum().clamp(max=3.0))):
            y = F.relu(y, inplace=True)
            y -= 0.1
        return keep + y


class WhileDouble(Corner):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x * 1.0, x * 2.0
        i = 0
        while i < 3 and bool(a.sum() < 50):
            j = 0
            while j < 2 and bool(b.sum() < 50):
                b.add_(a)
                b = b[[1, 0]] if bool(b[0, 0] > 1) else b
                j += 1
            a, b = b, a
            a += self.linear(b)
            i += 1
        return a - b


class ReturnedInput(Corner):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x
        if bool(x.sum() > 3):
            y = self.linear(x)
        return x, y


class ReturnsSame(Corner):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.linear(x)
        if bool(x.sum() > 0):
            z = y
        else:
            z = x
        y = y + 1
        return z, y


class SliceAssign(Corner):
    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros([6, 3])
        i = 0
        while i < 6 and bool(x.sum() < 30):
            x = self.linear(x) * 1.5 + 1
            out[i : i + 1] = x[:1]
            i += 2
        return out + i


class IndexPutLoop(Corner):
    def forward(self, x: Tensor) -> Tensor:
        m = torch.zeros([2, 3])
        for i in range(int(x.abs().sum().clamp(max=2.0))):
            m[i][x[i] > 0.3] = 1.0
            m[:, i] += 2
        return self.linear(x) * m


class FoldedThenWritten(Corner):
    def forward(self, x: Tensor) -> Tensor:
        r = torch.zeros([2, 3]) if bool(x.sum() > 0) else self.linear(x)
        r.add_(1)
        return r


class LiteralBranch(Corner):
    def forward(self, x: Tensor) -> Tensor:
        r = torch.tensor([1.0, 2.0, 3.0]).view(1, 3) if bool(x.sum() > 0) else self.linear(x)
        r.add_(1)
        return r


class WriteUnreadThenRaise(Corner):
    def forward(self, x: Tensor) -> Tensor:
        a = self.linear(x)
        if bool(x.sum() > 1e9):
            raise RuntimeError("no")
        else:
            a.add_(3.0)
        return x * 2


class DeadLoop(Corner):
    def forward(self, x: Tensor) -> Tensor:
        a = self.linear(x)
        for _ in range(int(x.abs().sum().clamp(max=3.0))):
            a.add_(1)
        return x * 2
