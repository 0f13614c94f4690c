"""Phrases of weights that are no plain parameters of the model's dtype: computed, buffers, narrow, integers."""

from __future__ import annotations

from passes.testing.phrases.layers import activation, call, conv, conv_module, image, norm
from passes.testing.phrases.operands import affine, at_home
from passes.testing.writer import Writer


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


def integer_weights(w: Writer) -> None:
    """A linear of integers, scaled."""
    x = w.let(f"{w.new_input(w.pick(2, 1, 4), 3)}.mul(3).to(torch.int64)")
    y = w.let(f"F.linear({x}, {w.buffer('torch.arange(12).reshape(4, 3)')})")
    w.give(at_home(w, w.let(w.pick(f"{y} * 2", f"{y} + 3", f"-{y}"))))


def weights_as_buffers(w: Writer) -> None:
    """F.conv2d and F.linear with buffers for weights, one of them computed from another."""
    x = w.value(2, 3)
    weight = w.buffer(f"torch.randn(4, {w.shape(x)[-1]})")
    # Its memory may have gaps, or be one number; it may be a runtime value; one that broadcasts is a sum.
    lies = w.pick("torch.randn(4)", "torch.randn(8)[::2]", "torch.randn(1).expand(4)", "torch.randn(1)")
    bias = w.new_input(4) if w.rarely() else w.buffer(lies)
    scaled = w.let(f"{weight} * 0.5") if w.flip() else weight
    y = w.let(f"F.linear({x}, {scaled}, {w.pick(bias, 'None', f'{bias} * 2')})")
    w.give(norm(w, y) if w.flip() and w.rank(y) == 2 else activation(w, y))
