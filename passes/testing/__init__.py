"""Testing passes: random models, the invariants, and checking a pass in one line. Needs hypothesis, imported only from here.

Each name is imported when it is asked for: `import passes.testing` alone brings neither torch nor hypothesis.

>>> from passes import check_pass
>>> check_pass("remove_dropout", examples=30).models
30
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from passes.testing.invariants import (
        InvariantBroken,
        Oracle,
        assert_facts_are_true,
        check_invariants,
        fingerprint,
        rewritten,
    )
    from passes.testing.model_strategy import random_models
    from passes.testing.model_text import RandomModel, build, make_inputs
    from passes.testing.pass_check import CheckFailed, CheckReport, NeverFired, check_pass
    from passes.testing.pipeline_strategy import pipelines
    from passes.testing.trial import CaptureIsWrong, CaptureRefused, Trial, hold

__all__ = [
    "CaptureIsWrong", "CaptureRefused", "CheckFailed", "CheckReport", "InvariantBroken", "NeverFired", "Oracle", "RandomModel",
    "Trial", "assert_facts_are_true", "build", "check_invariants", "check_pass", "fingerprint", "hold", "make_inputs",
    "pipelines", "random_models", "rewritten",
]  # fmt: skip

# No file here is named like what it exports: an imported file becomes an attribute of this package, and would hide it.
HOMES = {
    "invariants": "InvariantBroken Oracle assert_facts_are_true check_invariants fingerprint rewritten",
    "model_strategy": "random_models",
    "model_text": "RandomModel build make_inputs",
    "pass_check": "CheckFailed CheckReport NeverFired check_pass",
    "pipeline_strategy": "pipelines",
    "trial": "CaptureIsWrong CaptureRefused Trial hold",
}
"""The file that defines each name."""

RENAMED = {"LawBroken": "InvariantBroken", "hold_to_laws": "check_invariants"}
"""Names of earlier releases."""


def __getattr__(name: str) -> Any:
    if name in RENAMED:
        warnings.warn(f"passes.testing.{name} is now {RENAMED[name]}", DeprecationWarning, stacklevel=2)
        name = RENAMED[name]
    for home, names in HOMES.items():
        if name in names.split():
            return getattr(importlib.import_module(f"passes.testing.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
