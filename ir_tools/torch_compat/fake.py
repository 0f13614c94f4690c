"""Fake tensors: sizes, strides and dtypes without numbers."""

from __future__ import annotations

from torch._subclasses import fake_tensor

FakeTensor = fake_tensor.FakeTensor
"""A tensor without memory, of the device that it claims."""

FakeTensorMode = fake_tensor.FakeTensorMode
"""A context in which operators compute fake tensors."""

DataDependentOutputException = fake_tensor.DataDependentOutputException
"""Raised by an operator whose number depends on data that a fake tensor does not have."""

DynamicOutputShapeException = fake_tensor.DynamicOutputShapeException
"""Raised by an operator whose sizes depend on data that a fake tensor does not have."""

UnsupportedOperatorException = fake_tensor.UnsupportedOperatorException
"""Raised by an operator that has no fake kernel."""
