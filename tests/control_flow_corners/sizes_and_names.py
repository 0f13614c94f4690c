"""Sizes and dtypes at run time; names that hide each other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.control_flow_corners.corner import Corner

# -- sizes and dtypes at run time ---------------------------------------------------------------------------------------


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


# -- names -------------------------------------------------------------------------------------------------------------


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
