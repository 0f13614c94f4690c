"""The phrases that random models are made of: each writes the left side of a rule, or what the rule must refuse.

A phrase is a function of a `Writer`. It reads values, writes statements, and gives its results. What makes rules refuse (a
second reader, an in-place write, a shared module, a broadcast sum) is drawn now and then, the plain case mostly.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from passes.testing.random_models import Phrase, Writer

PHRASES: dict[str, Phrase] = {}
"""Every phrase by name."""


def phrase(function: Phrase) -> Phrase:
    """Add a phrase to `PHRASES`."""
    PHRASES[function.__name__] = function
    return function


ACTIVATIONS = (
    "torch.relu({})", "F.relu6({})", "F.leaky_relu({}, 0.2)", "F.hardtanh({}, -0.5, 0.75)", "F.hardswish({})",
    "F.hardsigmoid({})", "F.silu({})", "torch.sigmoid({})", "torch.tanh({})", "F.gelu({})",
    'F.gelu({}, approximate="tanh")', "F.elu({})",
)  # fmt: skip


# -- parts of phrases ---------------------------------------------------------------------------------------------------


def call(function: str, *positional: Any, **named: Any) -> str:
    """The text of a call; named arguments that are None are left out.

    >>> call("nn.Conv2d", 3, 4, 1, padding=1, bias=None)
    'nn.Conv2d(3, 4, 1, padding=1)'
    """
    given = [str(value) for value in positional]
    given += [f"{name}={value!r}" for name, value in named.items() if value is not None]
    return f"{function}({', '.join(given)})"


def image(w: Writer, *dims: int, at_least: int = 4, unbatched: bool = False) -> tuple[str, int]:
    """A value that a convolution of one of these numbers of dimensions takes, and that number."""
    chosen = w.pick(*(dims or (2, 2, 2, 1, 3)))
    return w.value(chosen + (1 if unbatched else 2), at_least=at_least, empty=not unbatched), chosen


def conv_module(w: Writer, channels: int, dims: int, *, kernel: int | None = None, out: int | None = None,
                keeps_size: bool = False, transposed: bool = False, wrapped: str = "{}") -> str:  # fmt: skip
    """A convolution as a module: odd strides, paddings, dilations and groups now and then.

    `keeps_size`: the result has the spatial sizes of the input. `wrapped`: what to make of the module, `{}` stands for it.
    """
    kernel = kernel or w.pick(3, 1, 2)
    out = out or w.pick(4, 2, channels)
    settings: dict[str, Any] = {}
    if w.rarely():
        settings["groups"] = w.pick(*[g for g in (channels, 2, 1) if channels % g == 0 and out % g == 0])
    if w.rarely():
        settings["dilation"] = 2
    if transposed:
        reach = settings.get("dilation", 1) * (kernel - 1)
        if keeps_size:
            w.need(reach % 2 == 0)
            settings["padding"] = reach // 2 or None
        elif w.flip():
            settings |= {"stride": 2, "padding": w.pick(None, 1) if reach > 1 else None, "output_padding": w.pick(None, 1)}
    else:
        settings["padding"] = "same" if keeps_size or w.rarely() else w.pick(None, 1, None)
        if settings["padding"] == "same":
            if settings.get("dilation", 1) * (kernel - 1) % 2 == 0 and w.flip():
                settings["padding"] = settings.get("dilation", 1) * (kernel - 1) // 2 or None
        elif w.rarely():
            settings["stride"] = w.pick(2, 3)
        if settings["padding"] and w.rarely():
            settings["padding_mode"] = w.pick("reflect", "circular", "replicate")
    settings["bias"] = w.pick(None, False)
    name = f"nn.ConvTranspose{dims}d" if transposed else f"nn.Conv{dims}d"
    return w.make("conv", wrapped.format(call(name, channels, out, kernel, **settings)))


def conv(w: Writer, x: str, dims: int, **settings: Any) -> str:
    """A convolution of `x`, its batch axis left out or not."""
    return w.let(f"{conv_module(w, w.shape(x)[-dims - 1], dims, **settings)}({x})")


def linear(w: Writer, x: str, out: int | None = None, bias: bool | None = None) -> str:
    """A linear layer of the last axis of `x`."""
    has_bias = w.pick(None, False) if bias is None else None if bias else False
    return w.let(f"{w.make('linear', call('nn.Linear', w.shape(x)[-1], out or w.pick(4, 2, 5), bias=has_bias))}({x})")


def conv_or_linear(w: Writer, *, unbatched: bool = True) -> tuple[str, str, int]:
    """A layer on a value: what it read, what it gave, and the axis of its channels."""
    if w.flip():
        x = w.value(2, 3, 4, 1, 5)
        y = linear(w, x)
        return x, y, w.rank(y) - 1
    bare = unbatched and w.rarely()
    x, dims = image(w, unbatched=bare)
    y = conv(w, x, dims, transposed=w.rarely())
    return x, y, 0 if bare else 1


def norm(w: Writer, x: str) -> str:
    """A batch norm of axis 1: a module, or the function with statistics of its own; now and then of the batch."""
    channels, dims = w.shape(x)[1], max(1, w.rank(x) - 2)
    kind = w.pick("module", "module", "module", "module", "function", "no affine", "no statistics", "training")
    if kind == "function":
        mean, var = w.buffer(f"torch.randn({channels})"), w.buffer(f"torch.rand({channels}) + 0.3")
        gamma = w.buffer(f"torch.rand({channels}) + 0.5") if w.flip() else "None"
        beta = w.buffer(f"torch.randn({channels})") if w.flip() else "None"
        return w.let(f"F.batch_norm({x}, {mean}, {var}, {gamma}, {beta}, eps={w.pick(1e-5, 1e-3)})")
    if kind == "training":
        w.need(math.prod(w.shape(x)) > channels)
        return w.let(f"F.batch_norm({x}, None, None, training=True)")
    settings = {"no affine": {"affine": False}, "no statistics": {"track_running_stats": False}}.get(kind, {})
    return w.let(f"{w.make('norm', call(f'nn.BatchNorm{dims}d', channels, **settings))}({x})")


def activation(w: Writer, x: str) -> str:
    """An activation of `x`, in place now and then."""
    if w.rarely():
        w.need(w.draft.values[x].numel() and x.startswith("v"))
        return w.let(w.pick(f"F.relu({x}, inplace=True)", f"{x}.relu_()", f"F.hardtanh({x}, inplace=True)"))
    return w.let(w.pick(*ACTIVATIONS).format(x))


def twisted(w: Writer, x: str) -> str:
    """`x`, now and then with what keeps a rule from moving an op past it: a reader, a write, a dropout, a view."""
    if not w.rarely():
        return x
    twist = w.pick("reader", "write", "dropout", "late write", "view", "clone")
    if twist == "reader":
        w.give(x)
    elif twist == "write":
        w.do(f"{x}.mul_(1.5)")
    elif twist == "late write":
        view = w.let(f"{x}.flatten()")
        w.do(f"{x}[..., :1].add_(1.0)")
        w.give(view)
    elif twist == "dropout":
        return dropped(w, x)
    elif twist == "view":
        return w.let(f"{x}.view({', '.join(map(str, w.shape(x)))})")
    else:
        return w.let(f"{x}.clone()")
    return x


def dropped(w: Writer, x: str) -> str:
    """A dropout, which does nothing in eval mode."""
    kind = w.pick("module", "function", "module", "function", "alpha", "feature alpha", "none dropped")
    if kind == "function":
        return w.let(f"F.dropout({x}, 0.4, training=False)")
    if kind == "none dropped":
        return w.let(f"F.dropout({x}, 0.0, training=True)")
    made = {"alpha": "nn.AlphaDropout(0.3)", "feature alpha": "nn.FeatureAlphaDropout(0.3)"}.get(kind, "nn.Dropout(0.3)")
    return w.let(f"{w.make('dropout', made)}({x})")


def summed(w: Writer, x: str, y: str) -> str:
    """A residual sum of `y`, a layer's result: of `x` where the shapes allow it, else of a mean of it or a new input."""
    same = w.shape(x) == w.shape(y) and w.draft.values[x].dtype == w.draft.values[y].dtype
    other = x if same and not w.rarely() else w.new_input(*w.shape(y))
    if w.rarely() and w.rank(other) > 1:
        other = w.let(f"{other}.mean({w.pick(0, 1, w.rank(other) - 1)}, keepdim=True)")
        w.need(w.shape(y)[0])  # the mean of nothing is NaN
    return w.let(w.pick(f"{y} + {other}", f"{other} + {y}", f"{y} + {other}", f"torch.add({y}, {other}, alpha=0.5)",
                        f"torch.add({other}, {y}, alpha=2)", f"{y}.add_({other})"))  # fmt: skip


def operand(w: Writer, x: str, axis: int) -> str:
    """A constant to scale or shift `x` with: mostly a number or one value per channel (`axis`), never 0."""
    shape = w.shape(x)
    column = [1] * len(shape)
    column[axis] = shape[axis]
    kind = w.pick("channel", "channel", "number", "no batch", "scalar", "full", "other axis", "wide")
    if kind == "number":
        return str(w.number())
    if kind == "scalar":
        return w.buffer("torch.tensor(1.5)")
    if kind == "full":
        column = list(shape)
    elif kind == "other axis":
        column = [1] * len(shape)
        other = w.pick(*range(len(shape)))
        column[other] = shape[other]
    elif kind == "no batch":
        column = column[1:] if axis > 0 and len(column) > 1 else column
    dtype = ", dtype=torch.float64" if kind == "wide" else ""
    return w.buffer(f"torch.rand({', '.join(map(str, column))}{dtype}) + 0.5")


def affine(w: Writer, x: str, axis: int) -> str:
    """A multiplication, sum, difference or quotient of `x` and a constant, either way round."""
    c = operand(w, x, axis)
    return w.let(w.pick(f"{x} * {c}", f"{x} + {c}", f"{c} * {x}", f"{c} + {x}", f"{x} - {c}", f"{c} - {x}", f"{x} / {c}",
                        f"torch.add({x}, {c}, alpha=2)", f"torch.sub({x}, {c}, alpha=0.5)", f"-{x}"))  # fmt: skip


def plain_layer(w: Writer, x: str, *, linear_: bool) -> str:
    """A linear or an unpadded convolution of `x`, with nothing unusual about it."""
    if linear_:
        return linear(w, x)
    name = f"nn.Conv{w.rank(x) - 2}d"
    return w.let(f"{w.make('conv', call(name, w.shape(x)[1], w.pick(4, 2), w.pick(2, 1, 3), bias=w.pick(None, False)))}({x})")


def channel_values(w: Writer, x: str, axis: int) -> str:
    """A number, or a constant with one value for each element of the axis of `x`, never 0."""
    if w.flip():
        return str(w.number())
    return w.buffer(f"torch.rand({w.shape(x)[axis]}{', 1' * (w.rank(x) - 1 - axis)}) + 0.5")


def at_home(w: Writer, x: str) -> str:
    """`x` in the model's dtype, which operands may have promoted it from."""
    return x if w.draft.values[x].dtype == w.dtype else w.let(f"{x}.to({w.dtype})")


# -- norms and layers ---------------------------------------------------------------------------------------------------


@phrase
def conv_norm(w: Writer) -> None:
    """conv -> batch norm (-> batch norm) (-> activation), transposed convolutions too."""
    x, dims = image(w)
    y = norm(w, twisted(w, conv(w, x, dims, transposed=w.pick(False, False, True))))
    if w.rarely():
        y = norm(w, y)
    w.give(activation(w, y) if w.flip() else y)


@phrase
def norm_of_norm(w: Writer) -> None:
    """batch norm -> batch norm, with nothing before it."""
    x, _ = image(w, 2, 1, 0)
    w.give(norm(w, twisted(w, norm(w, x))))


@phrase
def linear_norm(w: Writer) -> None:
    """linear -> batch norm, of rank 2 (features last), 3 and 4 (another axis), and transposed to features first."""
    x = w.value(2, 2, 3, 4)
    y = twisted(w, linear(w, x))
    if w.rank(y) == 3 and w.flip():
        y = w.let(f"{y}.transpose(1, 2)")
    w.give(norm(w, y))


@phrase
def moved_linear_norm(w: Writer) -> None:
    """linear -> features moved to the second axis, or rows flattened -> batch norm; now and then another axis comes there."""
    x = w.value(3, 3, 4)
    y = linear(w, x)
    if w.rarely():
        moved = w.pick("flatten(0, -2)", f"reshape(-1, {w.shape(y)[-1]})", "flatten(1)")
    elif w.rank(y) == 3:
        moved = w.pick("transpose(1, 2)", "permute(0, 2, 1)", "transpose(-1, -2)", "permute(1, 0, 2)", "transpose(0, 1)")
    else:
        moved = w.pick("permute(0, 3, 1, 2)", "transpose(1, 3)", "permute(0, 3, 2, 1)", "transpose(1, 2)")
    w.give(norm(w, w.let(f"{y}.{moved}")))


@phrase
def unbatched_conv_norm(w: Writer) -> None:
    """A convolution without a batch axis: the norm after it is one of another axis."""
    x, dims = image(w, 2, 1, unbatched=True)
    y = conv(w, x, dims, transposed=w.rarely())
    w.give(norm(w, y) if w.flip() and w.rank(y) > 1 else affine(w, y, 0) if w.flip() else activation(w, y))


@phrase
def norm_conv(w: Writer) -> None:
    """batch norm -> conv: padded, unpadded, padded by other values, grouped, transposed."""
    x, dims = image(w)
    y = twisted(w, norm(w, x))
    if w.rarely():
        y = activation(w, y)
    w.give(conv(w, y, dims, transposed=w.pick(False, False, True)))


@phrase
def norm_linear(w: Writer) -> None:
    """batch norm -> linear: of the same axis (rank 2), of another (rank 3), transposed in between."""
    x = w.value(2, 2, 3)
    y = twisted(w, norm(w, x))
    if w.rank(y) == 3 and w.flip():
        y = w.let(f"{y}.transpose(1, 2)")
    w.give(linear(w, y))


@phrase
def frozen_norm(w: Writer) -> None:
    """conv -> FrozenBatchNorm2d written out: scale and shift computed from buffers in every call."""
    x, dims = image(w, 2)
    y = twisted(w, conv(w, x, dims))
    c = w.shape(y)[1]
    weight, bias = w.buffer(f"torch.rand({c}) + 0.5"), w.buffer(f"torch.randn({c})")
    mean, var = w.buffer(f"torch.randn({c})"), w.buffer(f"torch.rand({c}) + 0.5")
    if w.flip():
        weight, bias, mean, var = (w.let(f"{b}.reshape(1, -1, 1, 1)") for b in (weight, bias, mean, var))
        scale = w.let(f"{weight} * ({var} + 1e-5).rsqrt()")
        shift = w.let(f"{bias} - {mean} * {scale}")
    else:
        scale = w.let(f"{weight} * ({var} + 1e-5).rsqrt()")
        shift = w.let(f"({bias} - {mean} * {scale}).reshape(1, -1, 1, 1)")
        scale = w.let(f"{scale}.reshape(1, -1, 1, 1)")
    w.give(w.let(f"{y} * {scale} + {shift}"))


@phrase
def parametrized(w: Writer) -> None:
    """Weights computed in every call: weight_norm and spectral_norm, as hooks and as parametrizations."""
    wrapped = w.pick("torch.nn.utils.weight_norm({})", "torch.nn.utils.parametrizations.weight_norm({})",
                     "torch.nn.utils.spectral_norm({})", "torch.nn.utils.parametrizations.spectral_norm({})")  # fmt: skip
    if w.flip():
        x, dims = image(w, 2, 1)
        y = conv(w, x, dims, wrapped=wrapped)
        w.give(norm(w, y) if w.flip() else activation(w, y))
    else:
        x = w.value(2, 3)
        made = w.make("linear", wrapped.format(call("nn.Linear", w.shape(x)[-1], w.pick(4, 2))))
        w.give(affine(w, w.let(f"{made}({x})"), w.rank(x) - 1))


# -- affine maps around layers ------------------------------------------------------------------------------------------


@phrase
def affine_after(w: Writer) -> None:
    """conv or linear -> x * c, x + c, x - c, c - x, x / c, one to three of them."""
    _, y, axis = conv_or_linear(w)
    for _ in range(w.pick(1, 2, 3)):
        y = at_home(w, affine(w, twisted(w, y), axis))
    w.give(y)


@phrase
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


@phrase
def turned_after(w: Writer) -> None:
    """conv or linear -> -y, c - y, y / c, y - c: what only few models do to a layer's result."""
    is_linear = w.flip()
    x = w.value(2, 3, 4) if is_linear else image(w, 2, 1)[0]
    y = plain_layer(w, x, linear_=is_linear)
    c = channel_values(w, y, w.rank(y) - 1 if is_linear else 1)
    w.give(w.let(w.pick(f"-{y}", f"{c} - {y}", f"{y} / {c}", f"{y} - {c}", f"{c} - {y}", f"{y} / {c}", f"{y}.neg()")))


@phrase
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


@phrase
def divided_by_zero(w: Writer) -> None:
    """conv / c or conv * c with zeros in c: infinite where it divides, and finite again through a sigmoid."""
    x, dims = image(w, 2, 1)
    y = conv(w, x, dims)
    c = w.buffer(f"(torch.arange({w.shape(y)[1]}) % 2).to({w.dtype}).reshape(1, -1{', 1' * dims})")
    w.give(w.let(w.pick(f"torch.sigmoid({y} / {c})", f"torch.tanh({y} / {c})", f"{y} * {c}", f"torch.sigmoid({c} / {y})")))


# -- layers in a row ----------------------------------------------------------------------------------------------------


@phrase
def linear_linear(w: Writer) -> None:
    """linear -> linear, where one instead of two is cheaper (wide in the middle) and where it is not (a bottleneck)."""
    x = w.value(2, 3, 1, 4)
    y = twisted(w, linear(w, x, w.pick(8, 6, 1, 2)))
    if w.rarely():
        y = activation(w, y)
    w.give(linear(w, y))


@phrase
def conv_pointwise(w: Writer) -> None:
    """conv -> 1x1 conv, with a stride or groups now and then."""
    x, dims = image(w)
    y = twisted(w, conv(w, x, dims, transposed=w.rarely()))
    w.give(conv(w, y, dims, kernel=1))


@phrase
def pointwise_conv(w: Writer) -> None:
    """1x1 conv -> conv: padded or not, with a bias (which padding cuts off) or without, strided in between."""
    x, dims = image(w)
    if w.flip():
        wide = w.make("conv", call(f"nn.Conv{dims}d", w.shape(x)[1], 8, 1))
        w.give(plain_layer(w, w.let(f"{wide}({x})"), linear_=False))
        return
    y = twisted(w, conv(w, x, dims, kernel=1, out=w.pick(8, 4, 2)))
    w.give(conv(w, y, dims, kernel=w.pick(3, 2, 1)))


@phrase
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


@phrase
def linear_residual(w: Writer) -> None:
    """linear(x) + x -> activation, a residual block of one linear, with nothing in its way."""
    x = w.value(2, 3, 4)
    y = linear(w, x, w.shape(x)[-1])
    s = w.let(w.pick(f"{y} + {x}", f"{x} + {y}"))
    w.give(w.let(w.pick(*ACTIVATIONS).format(s)))


@phrase
def two_layers_summed(w: Writer) -> None:
    """conv(x) + conv(x): each may take the other as its residual."""
    x, dims = image(w, 2, 1)
    a = conv(w, x, dims, out=4, kernel=3, keeps_size=True)
    b = conv(w, x, dims, out=4, kernel=1, keeps_size=True)
    w.give(activation(w, w.let(f"{a} + {b}")))


@phrase
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


@phrase
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


@phrase
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


# -- expressions --------------------------------------------------------------------------------------------------------


@phrase
def same_twice(w: Writer) -> None:
    """One expression twice, with nothing between, or a write, or of random numbers."""
    x = w.value(2, 3, 4)
    expression = w.pick("torch.exp(-{}.abs())", "{} * 2", "torch.softmax({}, -1)", "{}.transpose(0, 1).contiguous()",
                        "torch.relu({})", "{}.sum(-1, keepdim=True)", "torch.rand_like({})",
                        "F.dropout({}, 0.5, training=True)", "module")  # fmt: skip
    if expression == "module":
        expression = w.make("linear", call("nn.Linear", w.shape(x)[-1], 3)) + "({})"
    between = w.pick("nothing", "nothing", "write", "write to result", "swap")
    x = w.let(f"{x}.clone()") if between == "write" else x
    a = w.let(expression.format(x))
    if between == "write":
        w.do(f"{x}.mul_(0.5)")
    elif between == "write to result":
        w.do(f"{a}.add_(1.0)")
    b = w.let(expression.format(x))
    if w.rarely():
        w.give(a, b)
        return
    w.give(w.let(f"{a} + {b} * 3") if w.flip() else w.let(f"torch.cat([{a}, {b}])"))


@phrase
def same_twice_swapped(w: Writer) -> None:
    """a + b and b + a, a * b and b * a: equal bit by bit, though not always in one memory layout; a - b and b - a are not."""
    x = w.value(2, 3, 4)
    y = w.new_input(*w.shape(x)) if w.flip() else w.let(f"torch.tanh({x})")
    op = w.pick("+", "*", "-")
    a, b = w.let(f"{x} {op} {y}"), w.let(f"{y} {op} {x}")
    w.give(*((a, b) if w.rarely() else [w.let(f"{a} * 2 + {b}")]))


NEUTRAL: dict[str, tuple[str, ...]] = {
    "times one": ("{} * 1", "{} / 1", "1 * {}", "{} * 1.0", "{} / 1.0", "{} * torch.ones_like({})"),
    "power": ("{} ** 1", "{}.pow(1)", "torch.pow({}, 1.0)"),
    "plus zero": ("{} - 0", "{} + -0.0", "-0.0 + {}", "{} - 0.0", "{} + 0", "0 + {}", "{} + torch.zeros_like({})"),
    "copy": ("torch.cat([{}])", "{}[:]", "{}.contiguous()", "{}.to({}.dtype)", "{}.clone()", "{}.expand({}.shape)",
             "{}.repeat({ones})"),
    "padded": ("F.pad({}, (0, 0))", "F.pad({}, (0, 0, 0, 0))", "F.pad({}, [0, 0], value=2.0)"),
    "undone": ("{}.neg().neg()", "-(-{})"),
    "again": ("torch.relu(torch.relu({}))", "{}.abs().abs()", "{}.clamp(-1.0, 1.5).clamp(-1.0, 1.5)",
              "F.hardtanh(F.hardtanh({}, -0.5, 2.0), -0.5, 2.0)", "{}.clamp(min=-0.5).clamp(min=-0.5)",
              "{}.clamp(-1.0, 1.5).clamp(-1.0, 2.0)"),
    "permuted": ("{}.permute({order})", "{}.transpose(0, 0)", "{}.transpose(-1, -1)", "{}.permute({order})"),
    "permuted twice": ("{}.transpose(0, -1).transpose(0, -1)",),
    "reshaped": ("{}.reshape({}.shape)", "{}.flatten().view({}.shape)", "{}.unsqueeze(1).flatten(0, 1)",
                 "{}.unsqueeze(0).squeeze(0)", "{}.reshape(-1, 1).reshape({}.shape)"),
    "near": ("0 - {}", "{}.mul(-1).mul(-1)", "1 / {}.abs().add(1)", "{}.tanh().pow(2)", "F.relu6(torch.relu({}))",
             "torch.stack([{}])[0]", "{}.sigmoid().relu()", "{}.tanh().exp().abs()", "{}.float().double()",
             "{}.clamp(-3.4028234e38, 3.4028234e38)"),
}  # fmt: skip
"""Expressions that give their operand back, or nearly, by what they are."""


def given_back(w: Writer, x: str, template: str) -> str:
    """The value of a template of `NEUTRAL`, whose braces stand for `x`; it has the shape of `x`."""
    order, ones = ", ".join(map(str, range(w.rank(x)))), ", ".join("1" * w.rank(x))
    y = w.let(template.replace("{order}", order).replace("{ones}", ones).replace("{}", x))
    w.need(w.shape(y) == w.shape(x))
    return y


@phrase
def neutral(w: Writer) -> None:
    """x * 1, x + 0, x ** 1, cat of one, transposed twice, ...: and near misses."""
    x = w.value(2, 3, 4, 1)
    for _ in range(w.pick(3, 2, 4, 1)):
        x = given_back(w, x, w.pick(*NEUTRAL[w.pick(*NEUTRAL, "power")]))
        if w.rarely():
            x = w.let(f"torch.sin({x})")  # so that not all of it falls away
    w.give(at_home(w, x))


@phrase
def neutral_discrete(w: Writer) -> None:
    """The same of integers, of truth values and of rounded numbers. Of an input: elsewhere rounding errors would grow to 1."""
    x = w.new_input(2, w.pick(4, 3), *([5] if w.flip() else []))
    kind = w.pick("integers", "truth", "rounded")
    templates: tuple[str, ...]
    if kind == "integers":
        x = w.let(f"{x}.mul(3).to(torch.{w.pick('int64', 'int32')})")
        templates = ("{}.bitwise_not().bitwise_not()", "{} + 0", "0 + {}", "{} - 0", "{} * 1", "{} ** 1", "-(-{})",
                     "{}.clone()", "{}.sign().sign()", "{}.clamp(-2, 2).clamp(-2, 2)", "torch.add({}, 0, alpha=2)")  # fmt: skip
    elif kind == "truth":
        x = w.let(f"{x} > 0.1")
        templates = ("{}.logical_not().logical_not()", "torch.bitwise_not(torch.bitwise_not({}))", "~(~{})", "{}.clone()")
    else:
        templates = ("torch.ceil(torch.ceil({}))", "{}.floor().floor()", "{}.round().round()", "{}.trunc().trunc()",
                     "torch.sign(torch.sign({}))", "{}.round(decimals=1).round(decimals=1)", "{}.ceil().floor()")  # fmt: skip
    for _ in range(w.pick(2, 1, 3)):
        x = given_back(w, x, w.pick(*templates))
    w.give(at_home(w, x))


@phrase
def neutral_complex(w: Writer) -> None:
    """Complex numbers times one, plus zero, to the power of one, negated twice; and real again."""
    x = w.value(2, 3, 4)
    z = w.let(w.pick(f"torch.complex({x}, torch.tanh({x}))", f"torch.view_as_complex(torch.stack([{x}, {x} * 0.5], -1))"))
    for _ in range(w.pick(2, 1, 3)):
        z = given_back(w, z, w.pick("{} * 1", "{} + 0", "{} ** 1", "{} - 0", "{} / 1", "-(-{})", "{}.clone()", "0 + {}"))
    y = w.let(w.pick(f"{z}.real + {z}.imag", f"torch.view_as_real({z}).sum(-1)", f"torch.view_as_real({z}).flatten(-2)"))
    w.give(w.let(f"torch.tanh({y})"))


LAYOUT = ("transpose", "permute", "reshape", "flatten", "unsqueeze", "squeeze", "view_back", "undo")


@phrase
def layout_chain(w: Writer) -> None:
    """transpose, permute, reshape, flatten, unsqueeze and squeeze in a row: some cancel, some compose."""
    # Where all axes have one size, no shape gives away that the wrong ones were exchanged.
    x = w.value(3, 4, 2) if w.flip() else w.new_input(*[w.pick(2, 3)] * w.pick(3, 2, 4))
    start = w.shape(x)
    for _ in range(w.pick(2, 3, 4)):
        rank = w.rank(x)
        kind = w.pick(*LAYOUT)
        if kind == "transpose" and rank > 1:
            a, b = w.pick((0, 1), (-1, -2), (0, -1))
            x = w.let(f"{x}.transpose({a}, {b})")
            if w.flip():
                c, d = w.pick((a, b), (b, a), (a % rank, b % rank), (-1, -2), (0, 1))
                x = w.let(f"{x}.transpose({c}, {d})")
        elif kind == "permute" and rank > 1:
            order = [(axis + 1) % rank for axis in range(rank)]
            back = [(axis - 1) % rank for axis in range(rank)]  # undoes it; `order` once more does so for rank 2
            x = w.let(f"{x}.permute({', '.join(map(str, order))})")
            if w.flip():
                x = w.let(f"{x}.permute({', '.join(map(str, w.pick(tuple(back), tuple(back), tuple(order))))})")
        elif kind == "reshape":
            x = w.let(f"{x}.reshape({', '.join(map(str, sorted(w.shape(x))))})")
        elif kind == "flatten" and rank > 2:
            x = w.let(f"{x}.flatten({w.pick(1, 0)}, {w.pick(-1, 1)})")
        elif kind == "unsqueeze" and rank < 5:
            axis = w.pick(0, 1, -1)
            x = w.let(f"{x}.unsqueeze({axis})")
            x = w.let(f"{x}.squeeze({w.pick(axis, axis, 0)})") if w.flip() else x
        elif kind == "squeeze" and 1 in w.shape(x) and rank > 1:
            x = w.let(f"{x}.squeeze({w.shape(x).index(1)})")
        elif kind == "view_back":
            x = w.let(f"{x}.reshape({', '.join(map(str, start))})")
    w.give(twisted(w, w.let(f"{x} + 1.0")) if w.flip() else x)


@phrase
def attention(w: Writer) -> None:
    """Attention by hand, of rank 3 and 4: scaled before or after, masked by constants or at run time, read twice."""
    x = w.value(3, 3, 4, at_least=2)
    size = w.shape(x)[-1]
    q, k, v = (linear(w, x, size) for _ in range(3)) if w.flip() else (x, x, x)
    scale = w.pick("none", "multiply", "divide", "query", "key")
    factor = round(size**-0.5, 4) * w.pick(1, 1, 1, -1)
    q = w.let(f"{q}[..., :1, :]") if w.rarely() else q  # one query, as in decoding
    if w.rarely():  # keys or values are read by every element of the batch
        w.need(w.shape(x)[0] > 1)
        k, v = (w.let(f"{k}[:1]"), v) if w.flip() else (k, w.let(f"{v}[:1]"))
    q = w.let(f"{q} * {factor}") if scale == "query" else q
    k = w.let(f"{k} * {factor}") if scale == "key" else k
    s = w.let(f"torch.matmul({q}, {k}.transpose({w.pick('-2, -1', '-1, -2')}))" if w.pick(True, True, True, False) else
              f"{q} @ {k}.mT")  # fmt: skip
    s = w.let(f"{s} * {factor}") if scale == "multiply" else w.let(f"{s} / {size**0.5:.4f}") if scale == "divide" else s
    s = masked(w, x, s)
    if w.rarely():
        w.give(w.let(f"{s}.clamp(-9, 9)"))  # the scores have another reader
    dim = w.pick(-1, -1, -1, w.rank(s) - 1, -2)
    other = "torch.float32" if w.dtype == torch.float64 else "torch.float64"
    cast = f", dtype={other}" if w.rarely() else ""
    p = w.let(w.pick(f"torch.softmax({s}, {dim}{cast})", f"F.softmax({s}, dim={dim}{cast})"))
    p = at_home(w, dropped(w, p) if w.rarely() else p)
    y = w.let(w.pick(f"torch.matmul({p}, {v})", f"{p} @ {v}"))
    w.give(w.let(f"torch.nan_to_num({y}, nan=1.0)") if w.draft.values[y].isnan().any() else y)
    if w.rarely():
        w.give(p)


def masked(w: Writer, x: str, s: str) -> str:
    """The scores, masked or not. The diagonal stays, so that no row is masked throughout, but for a kind of its own."""
    n = w.shape(s)[-1]
    upper = f"torch.ones({n}, {n}, dtype=torch.bool).triu(1)"
    kind = w.pick("none", "none", "added", "filled", "filled low", "run time", "added per key", "a row", "added narrow",
                  "one by one")  # fmt: skip
    if kind == "one by one":
        hidden = w.buffer("torch.zeros(1, 1, dtype=torch.bool)")
        return w.let(w.pick(f"{s} + {w.buffer('torch.zeros(1, 1)')}", f'{s}.masked_fill({hidden}, float("-inf"))'))
    if kind == "a row":
        row = f"torch.arange({n}).eq(1).reshape(-1, 1).expand({n}, {n})"
        if w.flip():
            return w.let(f'{s}.masked_fill({w.buffer(f"{row}.clone()")}, float("-inf"))')
        return w.let(f"{s} + {w.buffer(f'torch.zeros({n}, {n}).masked_fill({row}, -torch.inf)')}")
    if kind == "added narrow":
        narrow = "torch.float32" if w.dtype == torch.float64 else "torch.bfloat16"
        return w.let(f"{s} + {w.buffer(f'torch.randn({n}, {n}).to({narrow})')}")
    if kind == "added":
        return w.let(f"{s} + {w.buffer(f'torch.full(({n}, {n}), {w.pick(-1e9, -10.0)}).triu(1)')}")
    if kind == "added per key":
        return w.let(f"{s} + {w.buffer(f'torch.randn({n})')}")
    if kind == "filled":
        return w.let(f'{s}.masked_fill({w.buffer(upper)}, float("-inf"))')
    if kind == "filled low":
        return w.let(f"{s}.masked_fill({w.buffer(upper)}, {w.pick(-1e9, 0.0, -3.4028234e38)})")
    if kind == "run time":
        w.need(w.shape(x)[-2] == n)
        return w.let(f"{s} + {x}[..., :1].transpose(-2, -1)")
    return s


FRAGILE = ("log_softmax", "softmax", "below largest", "logsumexp", "log1p", "expm1", "logsigmoid", "integers")


@phrase
def fragile(w: Writer) -> None:
    """Expressions that lose digits written out: log of softmax, log of a sum of exps, exp(x) - 1, ...; and near misses."""
    x = w.let(f"torch.tanh({w.value(2, 3, 4)})")
    for kind in {w.pick(*FRAGILE): None for _ in range(w.pick(4, 3, 5, 1))}:
        y, last = fragile_form(w, x, kind)
        w.give(*([y] if w.rarely() else []), last)


def fragile_form(w: Writer, x: str, kind: str) -> tuple[str, str]:
    """One of `FRAGILE`: a value inside, and the result. `x` is between -1 and 1."""
    d = w.pick(-1, 1, 0)
    w.need(w.shape(x)[d])
    other = w.pick(d, d, d, d, 0 if d else 1, (0, 1))
    if kind == "log_softmax":
        y = w.let(f"torch.softmax({x}, {d})")
        return y, w.let(f"torch.log({y})")
    if kind == "below largest":
        rest = ", keepdim=True"
        y = w.let(w.pick(f"{x}.amax({other}{rest})", f"{x}.max({d}{rest}).values", f"{x}.max({d}{rest})[0]"))
        return y, w.let(w.pick(f"torch.softmax({x} - {y}, {d})", f"F.softmax({x}.sub({y}), dim={d})"))
    if kind == "logsigmoid":
        y = w.let(f"torch.sigmoid({x})")
        return y, w.let(f"torch.log({y})")
    if kind == "log1p":
        y = w.let(w.pick(f"{x}.abs()", f"torch.exp({x})"))
        return y, w.let(f"torch.log({w.pick(f'1 + {y}', f'{y}.add(1.0)', f'{y} + 1', f'{y} + 1.5')})")
    if kind == "integers":
        n = w.let(f"{w.new_input(2, 3)}.abs().clamp(max=3).to(torch.int64)")
        return x, at_home(w, w.let(w.pick(f"torch.log(1 + {n})", f"torch.exp({n}) - 1", f"torch.log({n}.exp().sum(-1))")))
    y = w.let(f"torch.exp({x})")
    if kind == "expm1":
        return y, w.let(w.pick(f"{y} - 1", f"torch.sub({y}, 1)", f"{y} - 1.0", f"{y}.sub(1)", f"{y} - 2", f"1 - {y}"))
    if kind == "softmax":
        keep = ", keepdim=True" if w.pick(True, True, True, True, False) else ""
        again = y if w.flip() else w.let(f"torch.exp({x})")
        return y, w.let(f"{again} / {y}.sum({w.pick(d, d, d, other, (0, 1))}{keep})")
    axes = w.pick(other, other, other, ())
    return y, w.let(f"torch.log(torch.sum({y}, {axes}{w.pick('', ', keepdim=True')}))")


@phrase
def computed_constant(w: Writer) -> None:
    """A value computed from buffers alone, added to one of the run."""
    x = w.value(2, 3, 4)
    n = w.shape(x)[-1]
    a = w.buffer(f"torch.randn({n})")
    made = w.pick(f"torch.exp({a}.tanh()) + 1", f"torch.arange({n}, dtype={w.dtype}) * 0.5", f"{a}.softmax(0).cumsum(0)",
                  f"torch.ones({n}, dtype={w.dtype}).sqrt()", f"torch.rand({n}, dtype={w.dtype})")  # fmt: skip
    kind = w.pick("plain", "plain", "plain", "plain", "written", "large")
    constant = w.let(f"torch.arange(140000, dtype={w.dtype})[:{n}] * 0.5" if kind == "large" else made)
    if kind == "written":
        w.do(f"{constant}.mul_(0.5)")
    w.give(w.let(f"{x} {w.pick('+', '*', '-')} {constant}"))


@phrase
def dead_code(w: Writer) -> None:
    """Values that nobody reads. (No random ones: torch.jit.trace drops them, and what is random later gets other numbers.)"""
    x = w.value(2, 3, 4)
    w.let(w.pick(f"torch.sin({x}) * 2", f"{x}.exp()", f"{x}.sum(0)"))
    if w.flip():
        dead = w.let(f"{x}.clone()")
        w.do(f"{dead}.zero_()")
    w.give(w.let(w.pick(f"torch.cos({x})", f"{x} + torch.rand_like({x})")))


# -- memory -------------------------------------------------------------------------------------------------------------


@phrase
def written(w: Writer) -> None:
    """In-place ops on a layer's result: on all of it, on a slice, read before through a view."""
    _, y, _ = conv_or_linear(w)
    view = w.let(w.pick(f"{y}.flatten()", f"{y}[..., :1]", f"{y}.unsqueeze(0)", f"{y}.transpose(0, -1)"))
    early = w.let(f"{view} * 2") if w.flip() else None
    w.do(w.pick(f"{y}.add_(1.0)", f"{y}.mul_(0.5)", f"{y}.relu_()", f"{y}[..., 0].mul_(2.0)", f"{y}[..., :1] = 0.5",
                f"{view}.mul_(3.0)", f"{view}.zero_()"))  # fmt: skip
    late = w.let(f"{view} + 1.0")
    z = activation(w, y) if w.flip() else w.let(f"torch.sigmoid({y})")
    w.give(*([early] if early else []), late, z)


@phrase
def written_input(w: Writer) -> None:
    """A write into an input of the model, seen by what reads it later."""
    x = w.new_input(2, w.pick(4, 2), w.pick(4, 5), plain=True)
    before = w.let(f"{x} * 2")
    w.do(w.pick(f"{x}.add_(1.0)", f"{x}[:, 0].mul_(0.5)"))
    w.give(before, linear(w, x))


@phrase
def pieces(w: Writer) -> None:
    """chunk and split of a layer's result, put together again, in order or not."""
    x = w.value(3, 2, 4)
    y = linear(w, x, 4)
    a, b = (w.let(f"{y}.{w.pick('chunk(2, -1)', 'split(2, -1)')}[{i}]") for i in (0, 1))
    w.give(w.let(w.pick(f"torch.cat([{a}, {b}], -1)", f"torch.cat([{b}, {a}], -1)", f"{a} * torch.sigmoid({b})",
                        f"{a} + {b}", f"torch.stack([{a}, {b}])")))  # fmt: skip


@phrase
def dropouts(w: Writer) -> None:
    """Dropouts between layers, and one after another."""
    _, y, axis = conv_or_linear(w)
    y = dropped(w, y)
    y = dropped(w, y) if w.flip() else y
    w.give(w.pick(activation, lambda w, y: at_home(w, affine(w, y, axis)))(w, y))


@phrase
def stepped(w: Writer) -> None:
    """A layer on what strides, slices or expansion left of a value."""
    x = w.value(4, 3, 5, at_least=4)
    y = w.let(w.pick(f"{x}[..., ::2]", f"{x}.flip(-1)", f"{x}[:1].expand(2{', -1' * (w.rank(x) - 1)})",
                     f"{x}.transpose(-1, -2)", f"{x}.narrow(-1, 1, 2)"))  # fmt: skip
    w.give(activation(w, linear(w, y) if w.flip() or w.rank(y) == 5 else conv(w, y, w.rank(y) - 2, kernel=1)))


# -- dtypes and weights of the run --------------------------------------------------------------------------------------


@phrase
def narrow_part(w: Writer) -> None:
    """A part of the model in float32, bfloat16 or float16: a layer with weights of that dtype, a norm, an activation."""
    dtype = w.pick("torch.float32", "torch.bfloat16", "torch.float16")
    if w.flip():
        x, dims = image(w, 2, 1)
        layer = conv_module(w, w.shape(x)[1], dims, wrapped=f"{{}}.to({dtype})")
    else:
        x = w.value(2, 3)
        layer = w.make("linear", call("nn.Linear", w.shape(x)[-1], w.pick(4, 2)) + f".to({dtype})")
    y = w.let(f"{layer}({x}.to({dtype}))")
    kind = w.pick("norm", "activation", "affine", "none", "wide norm")
    if kind == "norm":
        norm_ = w.make("norm", call(f"nn.BatchNorm{max(1, w.rank(y) - 2)}d", w.shape(y)[1]) + f".to({dtype})")
        y = w.let(f"{norm_}({y})")
    elif kind == "wide norm":
        norm_ = w.make("norm", call(f"nn.BatchNorm{max(1, w.rank(y) - 2)}d", w.shape(y)[1]) + ".to(torch.float32)")
        y = w.let(f"{norm_}({y})")
    elif kind == "activation":
        y = activation(w, y)
    elif kind == "affine":
        y = w.let(f"{y} * 1e-6 * 1e4") if w.rarely() and dtype == "torch.float16" else affine(w, y, 1)
    w.give(at_home(w, y))


@phrase
def weights_of_the_run(w: Writer) -> None:
    """F.conv2d and F.linear with a weight computed from the input: no constant to fold into."""
    if w.flip():
        x = w.value(4)
        w.need(w.shape(x)[0])
        y = w.let(f"F.conv2d({x}, torch.tanh({x}[:1, :, :1, :1]))")
        w.give(norm(w, y) if w.flip() else affine(w, y, 1))
    else:
        x = w.value(2)
        w.need(w.shape(x)[0])
        y = w.let(f"F.linear({x}, torch.tanh({x}))")
        w.give(at_home(w, affine(w, y, 1)) if w.flip() else activation(w, y))


@phrase
def integer_weights(w: Writer) -> None:
    """A linear of integers, scaled."""
    x = w.let(f"{w.new_input(w.pick(2, 1, 4), 3)}.mul(3).to(torch.int64)")
    y = w.let(f"F.linear({x}, {w.buffer('torch.arange(12).reshape(4, 3)')})")
    w.give(at_home(w, w.let(w.pick(f"{y} * 2", f"{y} + 3", f"-{y}"))))


@phrase
def pooled(w: Writer) -> None:
    """Pools behind an activation."""
    x, dims = image(w, 3, 2, 3)
    y = w.let(f"F.{w.pick('avg', 'avg', 'max')}_pool{dims}d({activation(w, x)}, {w.pick(1, 2)})")
    w.give(activation(w, y) if w.flip() else w.let(f"{y}.mean(-1)"))


@phrase
def weights_as_buffers(w: Writer) -> None:
    """F.conv2d and F.linear with buffers for weights, one of them computed from another."""
    x = w.value(2, 3)
    weight = w.buffer(f"torch.randn(4, {w.shape(x)[-1]})")
    # Its memory may have gaps, or be one number; it may come from the run; one that broadcasts is a sum.
    lies = w.pick("torch.randn(4)", "torch.randn(8)[::2]", "torch.randn(1).expand(4)", "torch.randn(1)")
    bias = w.new_input(4) if w.rarely() else w.buffer(lies)
    scaled = w.let(f"{weight} * 0.5") if w.flip() else weight
    y = w.let(f"F.linear({x}, {scaled}, {w.pick(bias, 'None', f'{bias} * 2')})")
    w.give(norm(w, y) if w.flip() and w.rank(y) == 2 else activation(w, y))


