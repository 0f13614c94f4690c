"""Lists, dicts and tuples."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.control_flow_corners.corner import Corner


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
