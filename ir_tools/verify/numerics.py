"""Comparing outputs with a reference: maximum absolute error, and SQNR in decibels.

    SQNR = 10 log10( sum(reference^2) / sum((reference - value)^2) )        per output; the worst one counts

Source of SQNR (signal to quantisation noise ratio): Bennett, "Spectra of Quantized Signals", 1948; 6 dB are one bit.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Comparison:
    """How far outputs are from the reference. `sqnr_db` is infinite when they are equal; `problem` names a hard failure."""

    max_abs_error: float
    sqnr_db: float
    problem: str = ""

    @property
    def equal(self) -> bool:
        return self.max_abs_error == 0 and not self.problem

    def worse(self, other: Comparison) -> Comparison:
        """The worse of two in each figure."""
        return Comparison(
            max(self.max_abs_error, other.max_abs_error), min(self.sqnr_db, other.sqnr_db), self.problem or other.problem
        )


PERFECT = Comparison(0.0, math.inf)


def compare(
    reference: Sequence[torch.Tensor], values: Sequence[torch.Tensor], *, where_finite: bool = False
) -> Comparison:
    """Compare flat outputs. Shapes and dtypes must agree, NaN and Inf must stand where the reference has them.

    `where_finite`: where the reference has NaN or Inf, anything may stand; unless it has nothing else, and nothing is compared.
    """
    if len(reference) != len(values):
        return Comparison(math.inf, -math.inf, f"{len(values)} outputs instead of {len(reference)}")
    result = PERFECT
    for i, (expected, value) in enumerate(zip(reference, values, strict=True)):
        result = result.worse(_compare_one(f"output {i}", expected, value, where_finite))
    return result


def _compare_one(name: str, expected: torch.Tensor, value: torch.Tensor, where_finite: bool) -> Comparison:
    def failed(problem: str) -> Comparison:
        return Comparison(math.inf, -math.inf, f"{name} {problem}")

    if expected.shape != value.shape:
        return failed(f"has shape {list(value.shape)} instead of {list(expected.shape)}")
    if expected.dtype != value.dtype:
        return failed(f"has dtype {value.dtype} instead of {expected.dtype}")
    if expected.is_complex():
        expected, value = torch.view_as_real(expected.resolve_conj()), torch.view_as_real(value.resolve_conj())
    reference, other = expected.detach().double(), value.detach().double()
    finite = reference.isfinite()
    if not torch.equal(reference[~finite], other[~finite]) and not _same_nans(reference[~finite], other[~finite]):
        if not where_finite:
            return failed("differs where the reference is NaN or Inf")
        if not finite.any():
            return failed("cannot be compared: the reference is NaN or Inf throughout")
    if not other[finite].isfinite().all():
        return failed("holds NaN or Inf where the reference is finite")
    error = reference[finite] - other[finite]
    if error.numel() == 0:
        return PERFECT
    noise, signal = error.square().sum().item(), reference[finite].square().sum().item()
    if noise == 0:
        return PERFECT
    sqnr = 10 * math.log10(signal / noise) if signal > 0 else -math.inf
    return Comparison(error.abs().max().item(), sqnr)


def _same_nans(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(torch.equal(a.isnan(), b.isnan()) and torch.equal(a[~a.isnan()], b[~b.isnan()]))


# -- tolerances ---------------------------------------------------------------------------------------------------------

SMALLEST_SQNR_DB: dict[str, dict[torch.dtype, float]] = {
    # Float rounding, summed over the depth of a network: float32 has 24 bits (144 dB), float64 53 bits (319 dB).
    "rounds": {
        torch.float64: 200.0,
        torch.float32: 80.0,
        torch.bfloat16: 20.0,
        torch.float16: 35.0,
    },
    # bfloat16 has 8 bits (48 dB), float16 11 (66 dB). A deep net with random weights loses 20 dB more than a trained one.
    # A float64 model that computes in float32 rounds as any float32 model.
    "lowers_precision": {torch.bfloat16: 8.0, torch.float16: 20.0, torch.float32: 80.0},
    # Int8 steps drown the rounding of any of these dtypes. Weights per channel and activations per tensor, of every convolution
    # and linear: nets trained on digits keep 38 to 45 dB, and torchvision's with random weights 7 (googlenet, resnet101), 12
    # (shufflenet), 25 (resnet18), 30 (convnext). Activations clipped to a quarter of their range, or a zero point off by 16,
    # leave at most 5.5 dB of the latter, and 1 to 12 of the former: set `tolerance=20` for a net that learned something.
    "quantizes": dict.fromkeys((torch.float64, torch.float32, torch.bfloat16, torch.float16), 6.5),
}
"""The smallest SQNR, in dB, that an effect of passes allows (`ir_tools.rewrite.numeric_effects`) where a float dtype occurs.

Effects that have no row move no number that is compared.
"""


SMALLEST_GOLDEN_SQNR_DB: dict[torch.dtype, float] = {
    torch.float64: 150.0,
    torch.float32: 60.0,
    torch.float16: 30.0,
    torch.bfloat16: 20.0,
}
"""The smallest SQNR, in dB, of a file against its own golden outputs, by the narrowest float dtype the graph computes in.

The same file on another machine differs by the order of its sums alone, whatever its passes did to the numbers: half the
bits of float64 and float32 may go in a deep net, and as much of a half dtype as leaves three bits (bfloat16) or five.
"""


def smallest_sqnr(effects: Collection[str], dtypes: Collection[torch.dtype]) -> float:
    """The least figure of the table for these effects and float dtypes, in dB; infinite where no effect moves numbers.

    >>> smallest_sqnr({"rounds"}, {torch.float32, torch.bfloat16}), smallest_sqnr((), {torch.float32})
    (20.0, inf)
    """
    rows = [SMALLEST_SQNR_DB[effect] for effect in effects if effect in SMALLEST_SQNR_DB]
    return min((row[dtype] for row in rows for dtype in dtypes if dtype in row), default=math.inf)
