"""torch.export: what it declares about sizes, what it asks of them, and how its programs are called."""

from __future__ import annotations

from typing import Any

import torch
from torch._dynamo import source
from torch.export import dynamic_shapes

DimHint = dynamic_shapes._DimHint
"""The class of `Dim.AUTO`, `Dim.DYNAMIC` and `Dim.STATIC`."""

DimHintKind = dynamic_shapes._DimHintType
"""Which of the three a hint is."""

NamedSource = source.ConstantSource
"""Where a symbol comes from, when that is only a name."""


def guards_of(exported: torch.export.ExportedProgram) -> list[str]:
    """What torch.export asks of the inputs, in Python."""
    return exported._guards_code


def call_spec_of(module: Any) -> Any:
    """How `ExportedProgram.module()` is called, as the spec of (args, kwargs); None for other modules."""
    return getattr(module, "_in_spec", None)
