"""Numbers and strings."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.control_flow_corners.corner import Corner


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
