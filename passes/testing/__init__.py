"""Testing passes: random models, the laws, and checking a pass in one line. Needs hypothesis, imported only from here.

>>> from passes import check_pass
>>> check_pass("remove_dropout", examples=30).models
30
"""

from passes.testing.check_pass import CheckFailed, CheckReport, NeverFired, check_pass
from passes.testing.laws import LawBroken, Oracle, assert_facts_are_true, fingerprint, hold_to_laws, rewritten
from passes.testing.pipelines import pipelines
from passes.testing.random_models import RandomModel, build, make_inputs, random_models
from passes.testing.trial import CaptureIsWrong, CaptureRefused, Trial, hold

__all__ = [
    "CaptureIsWrong", "CaptureRefused", "CheckFailed", "CheckReport", "LawBroken", "NeverFired", "Oracle", "RandomModel",
    "Trial", "assert_facts_are_true", "build", "check_pass", "fingerprint", "hold", "hold_to_laws", "make_inputs",
    "pipelines", "random_models", "rewritten",
]  # fmt: skip
