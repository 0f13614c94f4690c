"""One op on a value `y` and a constant `c` as `scale * y + shift`: the table of both folds of constants.

    written    scale     shift
    y * c      c
    y / c      1 / c
    y + c                alpha * c
    y - c               -alpha * c
    c - y     -alpha     c
    -y        -1

`c` comes as float64, one number per channel; None stands for a scale of 1, or a shift of 0.
"""

from collections.abc import Callable
from typing import Any

from passes.fold.arithmetic import per_channel

AFFINE: dict[str, Callable[..., tuple[Any, Any]]] = {
    "y * c": lambda step, c: (c, None),
    "y / c": lambda step, c: (1 / c, None),
    "y + c": lambda step, c: (None, step.alpha * c),
    "y - c": lambda step, c: (None, -step.alpha * c),
    "c - y": lambda step, c: (-step.alpha, c),
    "-y": lambda step, c: (-1.0, None),
}
"""By what is written: from the op, which may have an alpha, and the constant, to scale and shift."""


def right_side(fold, channels, written):
    """The right side of a rule: the layer with the op `written` folded in, by `fold(op, layer, x, w, b, scale, shift)`.

    `channels(layer, w)`: how many there are on the side of the layer where the op is.
    """

    def with_constant(op, layer, step, x, w, b, c):
        return fold(op, layer, x, w, b, *AFFINE[written](step, per_channel(c, channels(layer, w), w)))

    def without(op, layer, x, w, b):
        return fold(op, layer, x, w, b, *AFFINE[written](None, None))

    return with_constant if "c" in written else without
