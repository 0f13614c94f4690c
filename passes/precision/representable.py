"""Which values, as observed on example data, do not fit into a half dtype.

    near the end    largest magnitude * HEADROOM > largest number of the dtype
    lost            rounding costs LOSS_DB more than it would with unbounded exponents; or a divisor becomes zero

The second compares sums of squared rounding errors (error ~ the last bit, at most the value itself) over the histogram of
exponents that `ir_tools.verify.ranges` observes.
"""

import math

import torch

from ir_tools.verify.ranges import Range

HEADROOM = 4.0
"""A value observed at x may be HEADROOM * x on other data."""

LOSS_DB = 6.0


def fits(seen: Range, half: torch.dtype) -> bool:
    return not is_near_the_end(seen, half) and not is_lost(seen, half, is_divisor=False)


def is_near_the_end(seen: Range, half: torch.dtype) -> bool:
    return seen.largest * HEADROOM > torch.finfo(half).max


def is_lost(seen: Range, half: torch.dtype, *, is_divisor: bool) -> bool:
    smallest = torch.finfo(half).smallest_normal * torch.finfo(half).eps
    if is_divisor and seen.smallest < smallest:
        return True
    return loss_of_range_db(seen, half) > LOSS_DB


def loss_of_range_db(seen: Range, half: torch.dtype) -> float:
    """How many dB more rounding costs than it would with unbounded exponents."""
    limits = torch.finfo(half)
    digits = 1 - round(math.log2(limits.eps))
    last = round(math.log2(limits.smallest_normal * limits.eps))  # the exponent of the smallest subnormal number
    endless = bounded = 0.0
    for exponent, count in seen.exponents.items():
        bit = exponent - digits  # frexp: |x| lies in [2 ** (exponent - 1), 2 ** exponent)
        endless += count * 4.0**bit
        bounded += count * 4.0 ** max(bit, min(last, exponent))
    return 10 * math.log10(bounded / endless) if endless else 0.0
