"""The layers that phrases are made of: convolutions, linears, batch norms, activations, dropouts."""

from __future__ import annotations

import math
from typing import Any

from passes.testing.writer import Writer

ACTIVATIONS = (
    "torch.relu({})", "F.relu6({})", "F.leaky_relu({}, 0.2)", "F.hardtanh({}, -0.5, 0.75)", "F.hardswish({})",
    "F.hardsigmoid({})", "F.silu({})", "torch.sigmoid({})", "torch.tanh({})", "F.gelu({})",
    'F.gelu({}, approximate="tanh")', "F.elu({})",
)  # fmt: skip


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


def plain_layer(w: Writer, x: str, *, linear_: bool) -> str:
    """A linear or an unpadded convolution of `x`, with nothing unusual about it."""
    if linear_:
        return linear(w, x)
    name = f"nn.Conv{w.rank(x) - 2}d"
    return w.let(f"{w.make('conv', call(name, w.shape(x)[1], w.pick(4, 2), w.pick(2, 1, 3), bias=w.pick(None, False)))}({x})")


def conv_or_linear(w: Writer, *, unbatched: bool = True) -> tuple[str, str, int]:
    """A layer on a value: its input, its result, and the axis of its channels."""
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


def dropped(w: Writer, x: str) -> str:
    """A dropout, which does nothing in eval mode."""
    kind = w.pick("module", "function", "module", "function", "alpha", "feature alpha", "none dropped")
    if kind == "function":
        return w.let(f"F.dropout({x}, 0.4, training=False)")
    if kind == "none dropped":
        return w.let(f"F.dropout({x}, 0.0, training=True)")
    made = {"alpha": "nn.AlphaDropout(0.3)", "feature alpha": "nn.FeatureAlphaDropout(0.3)"}.get(kind, "nn.Dropout(0.3)")
    return w.let(f"{w.make('dropout', made)}({x})")
