"""Phrases of affine maps (x * c, x + c, -x, ...) before and behind a layer."""

from __future__ import annotations

import torch

from passes.testing.phrases.layers import conv, conv_or_linear, image, linear, plain_layer
from passes.testing.phrases.operands import affine, at_home, channel_values, twisted
from passes.testing.writer import Writer


def affine_after(w: Writer) -> None:
    """conv or linear -> x * c, x + c, x - c, c - x, x / c, one to three of them."""
    _, y, axis = conv_or_linear(w)
    for _ in range(w.pick(1, 2, 3)):
        y = at_home(w, affine(w, twisted(w, y), axis))
    w.give(y)


def affine_before(w: Writer) -> None:
    """x * c, x + c, ... -> conv (padded or not) or linear."""
    is_linear = w.flip()
    if is_linear:
        x = w.value(2, 3, 4, 1)
        axis = w.rank(x) - 1
    else:
        x, dims = image(w)
        axis = 1
    shape = w.shape(x)
    for _ in range(w.pick(1, 2)):
        x = at_home(w, affine(w, twisted(w, x) if x.startswith("v") else x, axis))
    x = w.let(f"{x} - {w.pick(600.0, 1e-3)}") if w.rarely() else x  # one of them costs float32 digits
    w.need(w.shape(x) == shape)
    w.give(linear(w, x) if is_linear else conv(w, x, dims, transposed=w.rarely()))


def turned_after(w: Writer) -> None:
    """conv or linear -> -y, c - y, y / c, y - c: what only few models do to a layer's result."""
    is_linear = w.flip()
    x = w.value(2, 3, 4) if is_linear else image(w, 2, 1)[0]
    y = plain_layer(w, x, linear_=is_linear)
    c = channel_values(w, y, w.rank(y) - 1 if is_linear else 1)
    w.give(w.let(w.pick(f"-{y}", f"{c} - {y}", f"{y} / {c}", f"{y} - {c}", f"{c} - {y}", f"{y} / {c}", f"{y}.neg()")))


def turned_before(w: Writer) -> None:
    """c - x, x / c, -x, x - c, x + c -> conv that pads nothing, or linear; an input that the constant widens now and then."""
    is_linear = w.flip()
    x = w.value(2, 3, 4) if is_linear else image(w, 2, 1)[0]
    axis = w.rank(x) - 1 if is_linear else 1
    c = channel_values(w, x, axis)
    if w.rarely() and w.dtype == torch.float64:
        x = w.let(f"{x}.to(torch.float32)")  # the product with a constant is float64 again
        c = w.buffer("torch.rand(1) + 0.5")
    elif w.rarely():
        x = w.new_input(*(1 if i == axis else size for i, size in enumerate(w.shape(x))))
        c = w.buffer(f"torch.rand(3{', 1' * (w.rank(x) - 1 - axis)}) + 0.5")
    y = w.let(w.pick(f"{c} - {x}", f"{x} / {c}", f"-{x}", f"{x} - {c}", f"{x} + {c}", f"{x} * {c}", f"{c} - {x}", f"{x} / {c}",
                     f"{x}.neg()"))  # fmt: skip
    w.give(plain_layer(w, at_home(w, y), linear_=is_linear))


def divided_by_zero(w: Writer) -> None:
    """conv / c or conv * c with zeros in c: infinite where it divides, and finite again through a sigmoid."""
    x, dims = image(w, 2, 1)
    y = conv(w, x, dims)
    c = w.buffer(f"(torch.arange({w.shape(y)[1]}) % 2).to({w.dtype}).reshape(1, -1{', 1' * dims})")
    w.give(w.let(w.pick(f"torch.sigmoid({y} / {c})", f"torch.tanh({y} / {c})", f"{y} * {c}", f"torch.sigmoid({c} / {y})")))
