"""Corners of control flow: small scripted models, each with one thing that is easy to get wrong, on inputs for all paths.

Every model is captured on each input, optimised, and called several times on all of them in turn (TorchScript's optimiser comes
in with the second call), against the eager model called in the same order.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ir_tools.frontends.capture import capture
from ir_tools.frontends.source import prepare
from ir_tools.torch_compat import pytree
from passes import optimize
from passes.errors import EmitError
from tests.check import with_random_statistics

CORNERS: dict[str, Callable[[], nn.Module]] = {}


class Corner(nn.Module):
    """A model with a linear layer, entered into `CORNERS`."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def __init_subclass__(cls) -> None:
        CORNERS[cls.__name__] = cls


# -- memory: who sees a write -----------------------------------------------------------------------------------------


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


# -- buffers and constants --------------------------------------------------------------------------------------------


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


# -- lists, dicts and tuples ------------------------------------------------------------------------------------------


class NestedAppend(Corner):
    def forward(self, x: Tensor) -> Tensor:
        ys: list[Tensor] = [x]
        n = int(x.abs().sum().clamp(max=3.0))
        total = torch.zeros([2, 3])
        for i in range(n):
            for j in range(i + 1):
                ys.append(self.linear(ys[-1]) + j)
                total = total + ys[len(ys) // 2]
            if len(ys) > 3:
                total = total + torch.stack(ys).sum(0)
        return total + len(ys)


class DictOfLists(Corner):
    def forward(self, x: Tensor) -> Tensor:
        d: dict[str, list[Tensor]] = {"a": [x], "b": []}
        n = int(x.abs().sum().clamp(max=5.0))
        for i in range(n):
            key = "a" if i % 2 == 0 else "b"
            d[key].append(self.linear(x) * i)
        out = x * 0.0
        for t in d["a"]:
            out = out + t
        for t in d["b"]:
            out = out - 2 * t
        return out


class TupleOfLists(Corner):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        t = ([x], [x * 2])
        n = int(x.abs().sum().clamp(max=4.0))
        for i in range(n):
            a, b = t
            a.append(self.linear(b[-1]))
            b.append(a[-1] + 1)
            if i == 1:
                t = (b, a)
        return torch.cat(t[0]).sum(0), torch.cat(t[1]).sum(0)


class ListAlias(Corner):
    def forward(self, x: Tensor) -> Tensor:
        a = [x, x * 2]
        b = a
        if bool(x.sum() > 0):
            b.append(self.linear(x))
        c = a.copy()
        if len(b) > 2:
            c[0] = c[0] * 5
        return torch.stack(a).sum(0) + torch.stack(c).sum(0)


class ListRebind(Corner):
    def forward(self, x: Tensor) -> Tensor:
        a = [x]
        b = [x * 2, x]
        if bool(x.sum() > 0):
            c = a
        else:
            c = b
        c.append(self.linear(x))
        return torch.stack(a).sum(0) + 3 * torch.stack(b).sum(0)


class InsertPop(Corner):
    def forward(self, x: Tensor) -> Tensor:
        a = [x, x + 1, x + 2]
        y = x
        while len(a) > 0 and bool(y.sum() < 40):
            y = y + a.pop(0) + self.linear(y)
            if len(a) == 1 and bool(y.sum() > 0):
                a.insert(0, y * 0.5)
            y = y + 3.0
        return y + len(a)


class ListTakesTensor(Corner):
    def forward(self, x: Tensor) -> Tensor:
        ys: list[Tensor] = []
        a = self.linear(x)
        b = a * 3
        if bool(x.sum() > 0):
            ys.append(a)
        for y in ys:
            y.mul_(2)
        return a + b


class ListTakesTensorLoop(Corner):
    def forward(self, x: Tensor) -> Tensor:
        ys: list[Tensor] = []
        a = self.linear(x)
        for i in range(int(x.abs().sum().clamp(max=3.0))):
            ys.append(a[i % 2])
        b = a * 3
        if len(ys) > 1:
            ys[0].add_(5.0)
            ys[1].fill_(1.0)
        return a + b


class DictTakesTensor(Corner):
    def forward(self, x: Tensor) -> Tensor:
        d: dict[str, Tensor] = {"k": x * 2}
        a = self.linear(x)
        if bool(x.sum() > 0):
            d["k"] = a
        d["k"].add_(1.0)
        return a + d["k"]


class FoldedIntoList(Corner):
    def forward(self, x: Tensor) -> Tensor:
        ys = [x * 2]
        if bool(x.sum() > 0):
            ys.append(torch.zeros([2, 3]))
        for y in ys:
            y.add_(1)
        return torch.stack(ys).sum(0)


class LiteralIntoList(Corner):
    def forward(self, x: Tensor) -> Tensor:
        ys = [x[0] * 2]
        if bool(x.sum() > 0):
            ys.append(torch.tensor([1.0, 2.0, 3.0]))
        for y in ys:
            y.add_(1)
        return torch.stack(ys).sum(0)


class EmptyListBranch(Corner):
    def forward(self, x: Tensor) -> Tensor:
        ys: list[Tensor] = []
        if bool(x.sum() > 0):
            ys = [x, self.linear(x)]
        else:
            ys += [x]
        out = x
        for i in range(len(ys)):
            out = out + ys[i] * (i + 1)
        return out + len(ys)


class DictGet(Corner):
    def forward(self, x: Tensor) -> Tensor:
        d: dict[int, Tensor] = {}
        n = int(x.abs().sum().clamp(max=6.0))
        for i in range(n):
            k = i % 3
            if k in d:
                d[k] = d[k] + self.linear(x)
            else:
                d[k] = x * k
        out = x
        for k in d:
            out = out + d[k] * (k + 1)
        for k, v in d.items():
            out = out - v * k
        if 2 in d:
            out = out * 2
        return out + len(d)


class SetDefault(Corner):
    def forward(self, x: Tensor) -> Tensor:
        d: dict[str, Tensor] = {}
        if bool(x.sum() > 0):
            d["a"] = x
        y = d.setdefault("a", self.linear(x))
        d.update({"b": y * 2})
        d.pop("a")
        e: dict[int, int] = {}
        for i in range(int(x.abs().sum().clamp(max=3.0))):
            e[i] = i * i
        k = e.setdefault(1, 100) + len(e)
        return d["b"] + k


class ListOfPairs(Corner):
    def forward(self, x: Tensor) -> Tensor:
        ps: list[tuple[Tensor, int]] = []
        for i in range(int(x.abs().sum().clamp(max=4.0))):
            ps.append((self.linear(x) * i, i))
        out = x
        for t, k in ps:
            out = out + t * k
        return out


class IntList(Corner):
    def forward(self, x: Tensor) -> Tensor:
        sizes: list[int] = []
        for i in range(int(x.abs().sum().clamp(max=5.0))):
            sizes.append(i * 2 - 1)
            if i == 2:
                sizes[0] = 17
        total = 0
        for s in sizes:
            total += s
        if 17 in sizes:
            total = -total
        return self.linear(x) * total + len(sizes)


class StaticSort(Corner):
    def forward(self, x: Tensor) -> Tensor:
        a = [3, 1, 2]
        a.sort()
        b = [3, 1, 2, 1]
        b.remove(1)
        return self.linear(x) * a[0] + b[1]


class ContainsNode(Corner):
    def forward(self, x: Tensor) -> Tensor:
        n = int(x.abs().sum().clamp(max=3.0))
        a = [n, 5]
        y = self.linear(x)
        if 3 in a:
            y = y + 1
        if n in [1, 2]:
            y = y * 3
        a.sort()
        return y + a[0] + max(a) + a.index(5) + a.count(n)


class SymmetricLists(Corner):
    def forward(self, x: Tensor) -> Tensor:
        a = [1, 2, 3]
        if bool(x.sum() > 0):
            a = [3, 4]
        a.reverse()
        a.extend([5])
        b = a + [len(a)]
        b.sort()
        s = 0
        for v in b[1:]:
            s = s * 10 + v
        c = a == [4, 3, 5]
        return self.linear(x) * (2 if c else 1) + s


class DictResult(Corner):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        out["a"] = self.linear(x)
        if bool(x.sum() > 0):
            out["b"] = x
        else:
            out["b"] = -out["a"]
        return out


# -- ways out ---------------------------------------------------------------------------------------------------------


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


# -- numbers and strings ----------------------------------------------------------------------------------------------


class NegativeStep(Corner):
    def forward(self, x: Tensor) -> Tensor:
        n = int(x.abs().sum())
        y = x
        for i in range(n, -3, -2):
            y = self.linear(y) + i * 0.1
        for i in range(-n, n, 3):
            y = y + i
        return y


class FloatCounter(Corner):
    def forward(self, x: Tensor) -> Tensor:
        t = 0.0
        limit = float(x.abs().mean())
        y = x
        while t < limit:
            y = torch.tanh(self.linear(y)) + t
            t += 0.3
        return y * t


class BigRange(Corner):
    def forward(self, x: Tensor) -> Tensor:
        y = x
        total = 0
        for i in range(2147483640, 2147483660, int(x.abs().sum()) + 3):
            total += i
            y = self.linear(y)
        return y + total % 1001


class BoolOps(Corner):
    def forward(self, x: Tensor) -> Tensor:
        a = bool(x.sum() > 0)
        b = bool(x.abs().sum() > 5)
        c = a and not b
        d = a or b
        k = int(c) + 2 * int(d) + 4 * int(a != b)
        y = self.linear(x)
        if c == d:
            y = y * 2
        return y + k


class FloatMath(Corner):
    def forward(self, x: Tensor) -> Tensor:
        a = float(x.sum())
        b = a // 0.7
        c = a % 0.7
        d = min(a, 3.0) + max(b, -2.0) + abs(a) + round(a) + a ** 2.0
        n = int(a)
        e = n // 2 + n % 3 + (-n) // 4 + (-n) % 4 + n / 2 + (n & 5) + (n | 2) + (n ^ 3) + abs(n)
        return self.linear(x) + b + c + d + e


class FloorCeil(Corner):
    def forward(self, x: Tensor) -> Tensor:
        a = float(x.sum())
        n = math.floor(a) + math.ceil(a * 2)
        return self.linear(x) * n + math.sqrt(abs(a))


class PowMod(Corner):
    def forward(self, x: Tensor) -> Tensor:
        n = int(x.sum())
        m = n * n * n
        k = m % 7 - m // 5 + (-m) % -7 + m // -3
        f = float(n) % -1.3 + float(-n) // 0.7
        h = 2.0 ** abs(n) if abs(n) < 40 else 3.0
        return self.linear(x) + k + f + h


class TensorNumbers(Corner):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n = int(x.sum())
        f = float(x.sum())
        b = n > 0
        return torch.tensor(n) + torch.full([2], n), torch.tensor([f, 1.0]) + self.linear(x)[0, 0], torch.tensor(b)


class NumberOutOfLoop(Corner):
    def forward(self, x: Tensor) -> Tensor:
        best = -1
        value = -1e9
        for i in range(2):
            for j in range(3):
                v = float(x[i, j])
                if v > value:
                    value = v
                    best = i * 3 + j
        return self.linear(x) * value + best


class BoolTensorFlow(Corner):
    def forward(self, x: Tensor) -> Tensor:
        flags = [bool(x[0, 0] > 0), bool(x.sum() > 5), False]
        k = 0
        for f in flags:
            if f:
                k += 1
            else:
                k -= 2
        y = self.linear(x)
        if any(flags):
            y = y + 1
        if all(flags):
            y = y + 100
        return y * k


class Strings(Corner):
    def forward(self, x: Tensor) -> Tensor:
        mode = "plus"
        if bool(x.sum() < 0):
            mode = "minus"
        y = self.linear(x)
        if mode == "plus":
            y = y + 1
        elif mode == "minus" and bool(y.sum() > 0):
            y = y - 1
        if mode + "!" == "minus!":
            y = y * 3
        return y


class StringBuild(Corner):
    def forward(self, x: Tensor) -> Tensor:
        s = ""
        for _ in range(int(x.abs().sum().clamp(max=4.0))):
            s = s + "ab"
        y = self.linear(x)
        if "ba" in s:
            y = y + 1
        if s.startswith("ab"):
            y = y * 2
        return y + len(s)


# -- sizes and dtypes of the run --------------------------------------------------------------------------------------


class DtypeChange(Corner):
    def forward(self, x: Tensor) -> Tensor:
        y = x
        if bool(x.sum() > 0):
            y = (x * 10).to(torch.int64)
        return self.linear(y.to(torch.float32)) + y.sum()


class RankChange(Corner):
    def forward(self, x: Tensor) -> Tensor:
        y = x
        if bool(x.sum() > 0):
            y = x[0]
        y = self.linear(y)
        if y.dim() == 1:
            y = y.unsqueeze(0)
        return y


class DynSlice(Corner):
    def forward(self, x: Tensor) -> Tensor:
        k = int(x.abs().sum().clamp(max=3.0))
        y = x[:, :k]
        z = torch.zeros([2, k + 1])
        z[:, 1:] = y
        m = x[x > 0.5]
        if m.numel() == 0:
            return z.sum(1)
        return z.sum(1) * m.mean()


class CatGrow(Corner):
    def forward(self, x: Tensor) -> Tensor:
        y = x
        for _ in range(int(x.abs().sum().clamp(max=4.0))):
            y = torch.cat([y, self.linear(y[-2:])], 0)
        return y.mean(0) + y.size(0)


class SplitDynamic(Corner):
    def forward(self, x: Tensor) -> Tensor:
        k = int(x.abs().sum().clamp(max=2.0)) + 1
        parts = self.linear(x).split(k, 1)
        out = torch.zeros([2])
        for p in parts:
            out = out * 0.5 + p.sum(1)
        return out


class NonzeroLoop(Corner):
    def forward(self, x: Tensor) -> Tensor:
        idx = (self.linear(x) > 0).nonzero()
        out = x.clone()
        for i in range(idx.size(0)):
            r, c = int(idx[i, 0]), int(idx[i, 1])
            out[r, c] = out[r, c] * 2 + i
        return out


# -- names ------------------------------------------------------------------------------------------------------------


class Shadowing(Corner):
    def forward(self, self_1: Tensor) -> Tensor:
        count = self_1
        goes_on = self.linear(count)
        round_ = 0
        region_if = count * 2
        while bool(goes_on.sum() < 3) and round_ < 3:
            goes_on = goes_on + 1
            round_ += 1
            if bool(goes_on.sum() > 0):
                region_if = region_if + goes_on
        return region_if + count


class LinearNames(Corner):
    def __init__(self) -> None:
        super().__init__()
        self.region_if = nn.Linear(3, 3)
        self.round = nn.Linear(3, 3)
        self.forward_ = nn.Linear(3, 3)
        self._unread = nn.Linear(3, 3)

    def forward(self, goes_on: Tensor) -> Tensor:
        count = self.region_if(goes_on)
        if bool(count.sum() > 0):
            z = self.round(count)
            q = self._unread(z)
        else:
            q = count
        return self.forward_(q)


# -- the tests ----------------------------------------------------------------------------------------------------------

VALUES = torch.tensor([[0.2, 0.9, 0.4], [0.7, 0.1, 0.6]])
INPUTS = [VALUES, -VALUES, VALUES * 10]
IMAGES = [s * torch.linspace(-0.4, 1.2, 50).view(1, 2, 5, 5) for s in (1.0, -1.0, 3.0)]


def inputs_of(name: str) -> list[Tensor]:
    return IMAGES if name == "ConvWeight" else INPUTS


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """What the model returns for a copy of `x`, which it may write into; copies, because it may return that."""
    with torch.no_grad():
        return [t.clone() for t in pytree.tree_leaves(model(x.clone()))]


def assert_agrees(model: nn.Module, fast: nn.Module, inputs: list[Tensor], within: float) -> None:
    eager = copy.deepcopy(model)
    for call in range(3):
        for i, x in enumerate(inputs):
            for expected, got in zip(outputs(eager, x), outputs(fast, x), strict=True):
                atol = within * expected.float().abs().amax().item()
                torch.testing.assert_close(got, expected, rtol=within, atol=atol, msg=lambda m: f"call {call}, input {i}: {m}")  # noqa: B023


def test_there_are_corners() -> None:
    assert len(CORNERS) > 50


NOT_EMITTED = frozenset(
    "ListTakesTensor ListTakesTensorLoop DictTakesTensor FoldedIntoList LiteralIntoList IfInLoopWithState".split()
)
"""They write into a tensor that a list or dict of the run holds: torch's optimiser of TorchScript may drop such writes."""
EMITTED = [name for name in CORNERS if name not in NOT_EMITTED]


@pytest.mark.parametrize("name", sorted(NOT_EMITTED))
def test_what_torchscript_may_lose_is_captured_and_not_emitted(name: str) -> None:
    model, inputs = with_random_statistics(CORNERS[name]()), inputs_of(name)
    program = capture(prepare(torch.jit.script(copy.deepcopy(model)), [((inputs[0],), {})]), "script").program
    eager = copy.deepcopy(model)
    for x in inputs:
        expected = outputs(copy.deepcopy(eager), x)  # a Program starts each run from the state that was captured
        for e, got in zip(expected, program.run(x.clone()), strict=True):
            torch.testing.assert_close(got, e, rtol=1e-5, atol=1e-5)
    with pytest.raises(EmitError, match="writes into a tensor that a list or dict holds"):
        optimize(torch.jit.script(copy.deepcopy(model)), example_inputs=inputs[0], engine="aten")


@pytest.mark.parametrize("name", EMITTED)
@pytest.mark.parametrize("example, engine", [(0, "aten"), (1, "onednn_ops")])
def test_every_path_agrees(name: str, example: int, engine: str) -> None:
    model, inputs = with_random_statistics(CORNERS[name]()), inputs_of(name)
    fast = optimize(torch.jit.script(copy.deepcopy(model)), example_inputs=inputs[example], engine=engine)
    assert_agrees(model, fast, inputs, 1e-5)


ILL_CONDITIONED = frozenset({"NegativeStep", "FloatMath"})
"""They cancel large numbers, or take steps by the value of a sum: half precision moves them far, as it should."""


@pytest.mark.parametrize("name", [name for name in EMITTED if name not in ILL_CONDITIONED])
def test_every_path_agrees_in_half_precision(name: str) -> None:
    """Casts inside of branches and loops must not cut what shares memory with the outside."""
    model, inputs = with_random_statistics(CORNERS[name]()), inputs_of(name)
    scripted = torch.jit.script(copy.deepcopy(model))
    fast = optimize(scripted, ["fuse_conv_bn_relu", "cast_half"], example_inputs=inputs[0], engine="aten", verify="off")
    assert_agrees(model, fast, inputs, 5e-2)
