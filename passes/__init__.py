"""torch-passes: a graph compiler for PyTorch inference.

>>> import torch
>>> from passes import optimize
>>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU()).eval()
>>> fast = optimize(model, example_inputs=torch.randn(2, 4))
>>> fast(torch.randn(2, 4)).shape
torch.Size([2, 8])

Names are imported when they are asked for: `import passes` needs no torch, and `check_pass` alone brings hypothesis.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ir_tools.rewrite import Pass, Rule, Value, graph_pass, rule_pass, table_pass
    from passes.driver.catalogue import CATALOGUE, GROUPS
    from passes.driver.compiled_model import LoadedModel, OptimizedModel, load
    from passes.driver.optimize import optimize
    from passes.driver.pipeline import DEFAULT
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
        SlowerWarning,
        UnknownPassError,
    )
    from passes.lower.kernel_provider import KernelProvider
    from passes.lower.target import Target
    from passes.lower.targets import forget_target, register_target
    from passes.report.data import StepReport
    from passes.report.report import Report
    from passes.testing.pass_check import check_pass
    from passes.tune.speed_comparison import Speed

HOMES = {
    "ir_tools.rewrite": "Pass Rule Value graph_pass rule_pass table_pass",
    "passes.driver.catalogue": "CATALOGUE GROUPS",
    "passes.driver.compiled_model": "LoadedModel OptimizedModel load",
    "passes.driver.optimize": "optimize",
    "passes.driver.pipeline": "DEFAULT",
    "passes.errors": "CaptureError DynamicShapesError EmitError InputError ModelFileError ModelInTrainingError NumericsError "
    "OptionError PassesError PassOrderError SignatureError SlowerWarning UnknownPassError",
    "passes.lower.kernel_provider": "KernelProvider",
    "passes.lower.target": "Target",
    "passes.lower.targets": "forget_target register_target",
    "passes.report.data": "StepReport",
    "passes.report.report": "Report",
    "passes.testing.pass_check": "check_pass",
    "passes.tune.speed_comparison": "Speed",
}
"""The module that defines each name."""

_HOME_OF = {name: module for module, names in HOMES.items() for name in names.split()}

__all__ = [
    "CATALOGUE", "DEFAULT", "GROUPS", "CaptureError", "DynamicShapesError", "EmitError", "InputError", "KernelProvider",
    "LoadedModel", "ModelFileError", "ModelInTrainingError", "NumericsError", "OptimizedModel", "OptionError", "Pass",
    "PassOrderError", "PassesError", "Report", "Rule", "SignatureError", "SlowerWarning", "Speed", "StepReport", "Target",
    "UnknownPassError", "Value", "check_pass", "forget_target", "graph_pass", "load", "optimize", "register_target",
    "rule_pass", "table_pass",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
