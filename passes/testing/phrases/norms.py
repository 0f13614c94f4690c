"""Phrases of batch norms before, behind and without a layer, the frozen ones written out among them."""

from __future__ import annotations

from passes.testing.phrases.layers import activation, conv, image, linear, norm
from passes.testing.phrases.operands import affine, twisted
from passes.testing.writer import Writer


def conv_norm(w: Writer) -> None:
    """conv -> batch norm (-> batch norm) (-> activation), transposed convolutions too."""
    x, dims = image(w)
    y = norm(w, twisted(w, conv(w, x, dims, transposed=w.pick(False, False, True))))
    if w.rarely():
        y = norm(w, y)
    w.give(activation(w, y) if w.flip() else y)


def norm_of_norm(w: Writer) -> None:
    """batch norm -> batch norm, with nothing before it."""
    x, _ = image(w, 2, 1, 0)
    w.give(norm(w, twisted(w, norm(w, x))))


def linear_norm(w: Writer) -> None:
    """linear -> batch norm, of rank 2 (features last), 3 and 4 (another axis), and transposed to features first."""
    x = w.value(2, 2, 3, 4)
    y = twisted(w, linear(w, x))
    if w.rank(y) == 3 and w.flip():
        y = w.let(f"{y}.transpose(1, 2)")
    w.give(norm(w, y))


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


def unbatched_conv_norm(w: Writer) -> None:
    """A convolution without a batch axis: the norm after it is one of another axis."""
    x, dims = image(w, 2, 1, unbatched=True)
    y = conv(w, x, dims, transposed=w.rarely())
    w.give(norm(w, y) if w.flip() and w.rank(y) > 1 else affine(w, y, 0) if w.flip() else activation(w, y))


def norm_conv(w: Writer) -> None:
    """batch norm -> conv: padded, unpadded, padded by other values, grouped, transposed."""
    x, dims = image(w)
    y = twisted(w, norm(w, x))
    if w.rarely():
        y = activation(w, y)
    w.give(conv(w, y, dims, transposed=w.pick(False, False, True)))


def norm_linear(w: Writer) -> None:
    """batch norm -> linear: of the same axis (rank 2), of another (rank 3), transposed in between."""
    x = w.value(2, 2, 3)
    y = twisted(w, norm(w, x))
    if w.rank(y) == 3 and w.flip():
        y = w.let(f"{y}.transpose(1, 2)")
    w.give(linear(w, y))


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
