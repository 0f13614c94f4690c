"""torch-passes: a graph compiler for PyTorch inference.

>>> import torch
>>> from passes import optimize
>>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU()).eval()
>>> fast = optimize(model, example_inputs=torch.randn(2, 4))
>>> fast(torch.randn(2, 4)).shape
torch.Size([2, 8])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ir_tools.rewrite import Pass, Rule, Value, graph_pass, rule_pass, table_pass
from passes.api import optimize
from passes.catalogue import CATALOGUE, GROUPS
from passes.errors import (
    CaptureError,
    DynamicShapesError,
    EmitError,
    InputError,
    ModelFileError,
    ModelInTrainingError,
    NumericsError,
    OptionError,
    PassesError,
    PassOrderError,
    SignatureError,
    UnknownPassError,
)
from passes.optimized import LoadedModel, OptimizedModel, load
from passes.pipeline import DEFAULT
from passes.report import Report, StepReport
from passes.speed import SlowerWarning, Speed

__all__ = [
    "CATALOGUE", "DEFAULT", "GROUPS", "CaptureError", "DynamicShapesError", "EmitError", "InputError", "LoadedModel",
    "ModelFileError", "ModelInTrainingError", "NumericsError", "OptimizedModel", "OptionError", "Pass", "PassOrderError",
    "PassesError", "Report", "Rule", "SignatureError", "SlowerWarning", "Speed", "StepReport", "UnknownPassError", "Value",
    "check_pass", "graph_pass", "load", "optimize", "rule_pass", "table_pass",
]  # fmt: skip

if TYPE_CHECKING:
    from passes.testing.pass_check import check_pass


def __getattr__(name: str) -> Any:
    """`check_pass` brings hypothesis, which compiling a model has no use for: it is imported when it is asked for."""
    if name == "check_pass":
        from passes.testing.pass_check import check_pass

        return check_pass
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
