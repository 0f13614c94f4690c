"""Phrases of layers in a row or side by side: with residuals, activations, shared weights, dropouts and pools."""

from __future__ import annotations

from passes.testing.phrases.layers import (
    ACTIVATIONS,
    activation,
    call,
    conv,
    conv_module,
    conv_or_linear,
    dropped,
    image,
    linear,
    norm,
    plain_layer,
)
from passes.testing.phrases.operands import affine, at_home, summed, twisted
from passes.testing.writer import Writer


def linear_linear(w: Writer) -> None:
    """linear -> linear, where one instead of two is cheaper (wide in the middle) and where it is not (a bottleneck)."""
    x = w.value(2, 3, 1, 4)
    y = twisted(w, linear(w, x, w.pick(8, 6, 1, 2)))
    if w.rarely():
        y = activation(w, y)
    w.give(linear(w, y))


def conv_pointwise(w: Writer) -> None:
    """conv -> 1x1 conv, with a stride or groups now and then."""
    x, dims = image(w)
    y = twisted(w, conv(w, x, dims, transposed=w.rarely()))
    w.give(conv(w, y, dims, kernel=1))


def pointwise_conv(w: Writer) -> None:
    """1x1 conv -> conv: padded or not, with a bias (which padding cuts off) or without, strided in between."""
    x, dims = image(w)
    if w.flip():
        wide = w.make("conv", call(f"nn.Conv{dims}d", w.shape(x)[1], 8, 1))
        w.give(plain_layer(w, w.let(f"{wide}({x})"), linear_=False))
        return
    y = twisted(w, conv(w, x, dims, kernel=1, out=w.pick(8, 4, 2)))
    w.give(conv(w, y, dims, kernel=w.pick(3, 2, 1)))


def layer_activation(w: Writer) -> None:
    """conv or linear (+ residual) -> activation."""
    if w.flip():
        x = w.value(2, 3, 4, 1, 5)
        y = linear(w, x, w.shape(x)[-1])
    else:
        bare = w.rarely()
        x, dims = image(w, unbatched=bare)
        channels = w.shape(x)[-dims - 1]
        y = conv(w, x, dims, out=channels, kernel=w.pick(3, 1), keeps_size=True, transposed=w.rarely())
    y = twisted(w, y)
    if w.flip():
        y = twisted(w, summed(w, x, y))
    w.give(activation(w, y) if w.pick(True, True, False) else y)


def linear_residual(w: Writer) -> None:
    """linear(x) + x -> activation, a residual block of one linear, with no other op in between."""
    x = w.value(2, 3, 4)
    y = linear(w, x, w.shape(x)[-1])
    s = w.let(w.pick(f"{y} + {x}", f"{x} + {y}"))
    w.give(w.let(w.pick(*ACTIVATIONS).format(s)))


def two_layers_summed(w: Writer) -> None:
    """conv(x) + conv(x): each may take the other as its residual."""
    x, dims = image(w, 2, 1)
    a = conv(w, x, dims, out=4, kernel=3, keeps_size=True)
    b = conv(w, x, dims, out=4, kernel=1, keeps_size=True)
    w.give(activation(w, w.let(f"{a} + {b}")))


def shared_conv(w: Writer) -> None:
    """One convolution called twice, each call followed by a norm of its own, or bare; two modules with one weight."""
    x, dims = image(w, 2, 1)
    c = w.shape(x)[1]
    first = conv_module(w, c, dims, out=c, kernel=3, keeps_size=True)
    second = first
    if w.flip():
        second = w.make("conv", w.draft.constructor[-1].partition(" = ")[2])
        w.construct(f"{second}.weight = {first}.weight")
    a = w.let(f"{first}({x})")
    a = norm(w, a) if w.flip() else activation(w, a)
    b = w.let(f"{second}({w.pick(x, a)})")
    w.give(a, w.pick(norm, norm, activation)(w, b) if w.flip() else b)


def shared_linear(w: Writer) -> None:
    """One linear called twice, or two with one weight (tied), with other ops behind each."""
    x = w.value(2, 3)
    size = w.shape(x)[-1]
    first = w.make("linear", call("nn.Linear", size, size))
    second = first
    if w.flip():
        second = w.make("linear", call("nn.Linear", size, size, bias=w.pick(None, False)))
        w.construct(f"{second}.weight = {first}.weight")
    a = affine(w, w.let(f"{first}({x})"), w.rank(x) - 1)
    w.give(at_home(w, a), w.let(f"{second}({x})"))


def query_key_value(w: Writer) -> None:
    """Three linears of one input: widths and biases alike or not, one of them followed by an activation."""
    x = w.value(3, 2, 4)
    width, biased = w.pick(4, 2), w.pick(True, False)
    each = [linear(w, x, w.pick(width, width, width, 3), w.pick(biased, biased, biased, not biased))
            for _ in range(w.pick(3, 2))]  # fmt: skip
    if w.rarely():
        each[0] = activation(w, each[0])
    if w.flip():
        each.append(w.let(f"F.linear({x}, {w.buffer(f'torch.randn({w.shape(x)[-1]})')})"))  # one number for each row
    w.give(*(each if w.flip() else [w.let(f"torch.sin({y})") for y in each]))  # outputs must not be parts of a larger tensor


def dropouts(w: Writer) -> None:
    """Dropouts between layers, and one after another."""
    _, y, axis = conv_or_linear(w)
    y = dropped(w, y)
    y = dropped(w, y) if w.flip() else y
    w.give(w.pick(activation, lambda w, y: at_home(w, affine(w, y, axis)))(w, y))


def pooled(w: Writer) -> None:
    """Pools behind an activation."""
    x, dims = image(w, 3, 2, 3)
    y = w.let(f"F.{w.pick('avg', 'avg', 'max')}_pool{dims}d({activation(w, x)}, {w.pick(1, 2)})")
    w.give(activation(w, y) if w.flip() else w.let(f"{y}.mean(-1)"))
