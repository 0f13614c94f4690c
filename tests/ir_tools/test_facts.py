"""Facts: what is asked of them."""

from __future__ import annotations

from ir_tools.ir.facts import holds_always, new_mode, unknown_number


def test_conditions_on_symbols_hold_always_never_or_it_depends():
    mode = new_mode()
    n = unknown_number(mode, "int")
    assert holds_always(n == n) is True and holds_always(n + 1 == n) is False
    assert holds_always(n > 3) is None and holds_always(unknown_number(mode, "bool")) is None
    assert holds_always(True) is True and holds_always(0) is False and holds_always("text") is None
