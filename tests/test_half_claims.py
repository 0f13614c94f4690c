"""What half precision promises, on models of the zoo, in bfloat16: figures and claims are those of `benchmarks.half`.

O1 and O2 are finite and verified; O1 is within 1 dB of eager autocast, O2 within 0.5 dB of model.bfloat16(), or better; both
cast less often than the trace under autocast does.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from benchmarks import half
from benchmarks.half import ALL_CASTS, CASTS_OF_ACTIVATIONS, EAGER, TRACE, Result
from benchmarks.half_models import zoo_sample

LEVELS = ("O1", "O2")
MODELS = ("torchvision:squeezenet1_1", "transformers:BertModel", "transformers:ViTModel")
FEWER_OF_ACTIVATIONS = {("transformers:BertModel", "O2"), ("transformers:ViTModel", "O2")}
"""Where casts are fewer than those that freezing leaves to the trace, too. Elsewhere O1 takes what autocast takes; and a net of
convolutions alone is cast where it begins, and where it ends, which a trace leaves out: its outputs are half."""


@cache
def measured(name: str) -> Result:
    with half.quiet(), torch.random.fork_rng(devices=()):
        case = zoo_sample()[name]()
        modes = half.torchs_modes(case, torch.bfloat16, with_times=False, with_compile=False)
        modes |= {level: half.our_mode(case, level, "bfloat16") for level in LEVELS}
        result = half.measure(case, modes, seconds=None)
    for row in result.rows.values():
        row.mode.call = None  # figures are kept, not weights
    return result


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", MODELS)
def test_what_was_promised_holds(name: str, level: str) -> None:
    made = [claim for claim in half.claims(measured(name)) if level in claim.text and CASTS_OF_ACTIVATIONS not in claim.text]
    assert len(made) == 3 and any(ALL_CASTS in claim.text for claim in made)
    assert not [str(claim) for claim in made if not claim.met]


@pytest.mark.parametrize("name, level", sorted(FEWER_OF_ACTIVATIONS))
def test_casts_are_fewer_than_those_of_values_alone(name: str, level: str) -> None:
    (claim,) = (c for c in half.claims(measured(name)) if level in c.text and CASTS_OF_ACTIVATIONS in c.text)
    assert claim.met, str(claim)


@pytest.mark.parametrize("name", MODELS)
def test_the_figures_are_those_of_half_precision(name: str) -> None:
    """Nothing is met because nothing was measured: every mode ran, in half, and the trace casts its weights."""
    rows = measured(name).rows
    assert not [row.mode.error for row in rows.values() if row.mode.error]
    assert all(20 < row.sqnr_db < 80 for mode, row in rows.items() if mode != EAGER and row.sqnr_db is not None)
    assert (rows[TRACE].mode.casts or 0) > (rows[TRACE].mode.casts_of_activations or 0) > 0
    assert all((rows[level].mode.casts or 0) >= 2 for level in LEVELS)
