"""`python -m benchmarks.half` measures what it says: casts are counted right, noise is noise, and a broken peer is a row."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import half
from benchmarks.half import AUTOCAST, EAGER, TRACE, Mode, Result, Row, claims, measure, our_mode, quiet, torchs_modes
from benchmarks.half_models import Case
from passes import optimize

BF16 = torch.bfloat16


class Standardized(nn.Module):
    """Two linears, the second with a weight that is computed; a softmax between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.first(x).float().softmax(-1)
        return {"y": nn.functional.linear(hidden, self.second.weight - self.second.weight.mean(), self.second.bias)}


@pytest.fixture
def case() -> Case:
    torch.manual_seed(0)
    return Case("standardized", Standardized().eval(), [((torch.randn(4, 16),), {}) for _ in range(4)])


def measured(case: Case) -> Result:
    with quiet():
        modes = torchs_modes(case, BF16, with_times=False, with_compile=False)
        return measure(case, modes | {level: our_mode(case, level, "bfloat16") for level in half.LEVELS}, seconds=None)


def test_casts_are_counted(case: Case) -> None:
    rows = measured(case).rows
    # Traced: input, 2 of the first layer, the model's own, softmax's result, 2 of the second layer.
    assert (rows[TRACE].mode.casts, rows[TRACE].mode.casts_of_activations) == (7, 3)
    # Ours: the input and the output; a softmax in half computes in float.
    assert rows["O1"].mode.casts == rows["O2"].mode.casts == 2


def test_every_mode_has_its_noise(case: Case) -> None:
    rows = measured(case).rows
    assert [name for name, row in rows.items() if not row.finite] == []
    assert rows[EAGER].sqnr_db == math.inf
    assert all(30 < row.sqnr_db < 70 for name, row in rows.items() if name != EAGER and row.sqnr_db is not None)
    assert rows["O1"].mode.verified and rows["O2"].mode.verified


def test_noise_is_summed_over_the_calls() -> None:
    quarter = Mode(lambda x: x * torch.where(x.abs() > 1, 0.5, 1.0))
    one, two = ((torch.full((1,), value),) for value in (1.0, 2.0))
    result = measure(Case("x", nn.Identity(), [(one, {}), (two, {})]), {EAGER: Mode(nn.Identity()), "halved": quarter}, None)
    assert result.rows["halved"].sqnr_db == pytest.approx(10 * math.log10((1 + 4) / 1))


def test_an_infinity_is_not_finite() -> None:
    modes = {EAGER: Mode(nn.Identity()), "overflows": Mode(lambda x: x * math.inf)}
    row = measure(Case("x", nn.Identity(), [((torch.ones(1),), {})]), modes, None).rows["overflows"]
    assert row.finite is False and row.sqnr_db == -math.inf and not row.mode.error


def test_a_mode_that_fails_is_a_row_that_says_so(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no kernel\nand more")

    monkeypatch.setattr(half, "trace", fails)
    monkeypatch.setattr(half, "optimize", fails_with_numerics)
    result = measured(case)
    assert result.rows[TRACE].mode.error == "RuntimeError: no kernel"
    assert result.rows["O2"].mode.error == "NumericsError: SQNR too low"
    table = half.in_markdown([result], "here")
    assert "RuntimeError: no kernel" in table and "NOT MET: O2 is finite and verified (NumericsError" in table
    assert table.count("no figures: O1 has fewer casts") == 2


def fails_with_numerics(*args: object, **kwargs: object) -> None:
    from passes import NumericsError

    raise NumericsError("SQNR too low")


def test_claims_are_decided_by_the_figures() -> None:
    def row(sqnr: float, casts: int | None = None, of_activations: int | None = None, finite: bool = True) -> Row:
        of_activations = casts if of_activations is None else of_activations
        return Row(Mode(casts=casts, casts_of_activations=of_activations, verified=True), sqnr_db=sqnr, finite=finite)

    ours = {"O1": row(39.1, 5), "O2": row(39.4, 4)}
    rows = {AUTOCAST: row(40), TRACE: row(40, 9, 5), "model.bfloat16()": row(40), **ours}
    made = claims(Result("x", rows))
    # For O1 and then O2: finite, SQNR, fewer casts than the trace has, fewer than it has of values that follow from an input.
    assert [claim.met for claim in made] == [True, True, True, False, True, False, True, True]
    assert [claim.figures for claim in made if "casts" in claim.text] == ["5 and 9", "5 and 5", "4 and 9", "4 and 5"]
    rows["O1"] = row(-math.inf, 4, finite=False)
    assert [claim.met for claim in claims(Result("x", rows))][:4] == [False, False, True, True]
    rows[TRACE] = Row(Mode(error="it fails"))
    assert [claim.met for claim in claims(Result("x", rows))][2:4] == [None, None]


def test_casts_in_branches_are_counted() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4).bfloat16()

        def forward(self, x: Tensor) -> Tensor:
            if bool(x.sum() > 0):
                x = self.linear(x.to(torch.bfloat16)).float()
            return x

    fast = optimize(torch.jit.script(Branch().eval()), [], example_inputs=torch.ones(2, 4))
    assert half.casts_of_program(fast.program) == 2 and half.traffic(fast.program).count == 0


def test_the_table_goes_to_a_file(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half, "SEED_CASES", {"small": lambda: case})
    options = {"model": ["small"], "dtype": "bfloat16", "compile": False, "sqnr_only": False, "zoo": False}
    half.main(**options, seconds=0.1, out=tmp_path / "half.md")
    text = (tmp_path / "half.md").read_text()
    assert "| mode | median ms |" in text and "geometric mean of 1 models" in text
