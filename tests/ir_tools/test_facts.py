"""Facts: what is asked of them."""

from __future__ import annotations

from ir_tools.ir.facts import ScalarFact, holds_always
from ir_tools.ir.inference_mode import InferenceMode


def test_conditions_on_symbols_hold_always_never_or_it_depends():
    mode = InferenceMode()
    n = mode.unknown_number("int").symbol
    assert holds_always(n == n) is True and holds_always(n + 1 == n) is False
    assert holds_always(ScalarFact.of(n == n)) is True and holds_always(ScalarFact.of(n > 3)) is None
    assert holds_always(n > 3) is None and holds_always(mode.unknown_number("bool")) is None
    assert holds_always(True) is True and holds_always(0) is False and holds_always("text") is None
