"""The source of a capture: the model, its example calls with the model's own outputs, and their signature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ir_tools.errors import CaptureError, DynamicShapesError, SignatureError, first_line
from ir_tools.frontends.dynamic_shapes import declared_sizes, specified
from ir_tools.frontends.exported import in_exported_order, refuse_training, sizes_of_exported
from ir_tools.frontends.reference import Reference
from ir_tools.frontends.user_model import forward_parameters
from ir_tools.ir import InputSpec, Signature
from ir_tools.ir.signature import DynamicSize, binder, flatten_result, leaf_names, split_leaves
from ir_tools.torch_compat import pytree

Model = nn.Module | torch.export.ExportedProgram


@dataclass
class Example:
    """One call of the model: its bound arguments, the tensors in it, and the outputs of the user's model."""

    arguments: dict[str, Any]
    tensors: list[torch.Tensor]
    outputs: list[torch.Tensor]


@dataclass
class Source:
    """A model ready for capture: how it is called, and example calls with the outputs of the user's model."""

    model: nn.Module
    exported: torch.export.ExportedProgram | None
    signature: Signature
    examples: list[Example]
    dynamic: list[dict[int, DynamicSize]] = field(default_factory=list)  # per input: its dynamic axes
    reference: Reference | None = None

    def answer(self, arguments: dict[str, Any]) -> Any:
        """What the user's model gives on one call."""
        return (self.reference or Reference(self.model)).answer(arguments)

    @property
    def tensors(self) -> list[torch.Tensor]:
        return self.examples[0].tensors

    @property
    def is_dynamic(self) -> bool:
        return any(self.dynamic)


def prepare(model: Model, calls: Sequence[tuple[tuple, dict[str, Any]]], dynamic_shapes: Any = None) -> Source:
    """Bind the example calls, run the user's model on them, and write down its signature.

    Raises `CaptureError` when the model itself fails on an example, or the examples disagree in structure;
    `DynamicShapesError` when `dynamic_shapes` does not fit them.
    """
    exported = model if isinstance(model, torch.export.ExportedProgram) else None
    module = model.module() if isinstance(model, torch.export.ExportedProgram) else model
    if exported is not None:
        refuse_training(exported)
    bind = binder(forward_parameters(module))
    examples: list[Example] = []
    reference = Reference(module)
    signature: Signature | None = None
    dynamic: list[dict[int, DynamicSize]] = []
    for args, kwargs in calls:
        arguments = bind(*args, **kwargs)
        if exported is not None:
            arguments = in_exported_order(exported, arguments)
        leaves, in_tree = pytree.tree_flatten(arguments)
        in_leaves, tensors = split_leaves(leaves)
        try:
            result = reference.answer(arguments)
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(
                f"the model itself fails on the example inputs: {type(error).__name__}: {first_line(error)}"
            ) from error
        leaves, out_tree = flatten_result(result)
        out_leaves, outputs = split_leaves(leaves)
        if not outputs:
            raise CaptureError("the model returns no tensor on the example inputs; there is nothing to compute")
        names = [n for n, leaf in zip(leaf_names(in_tree), in_leaves, strict=True) if isinstance(leaf, int)]
        if signature is None:
            dynamic = (
                declared_sizes(dynamic_shapes, arguments) if exported is None else sizes_of_exported(exported, dynamic_shapes)
            )
        specs = tuple(InputSpec(n, tuple(t.shape), t.dtype) for n, t in zip(names, tensors, strict=True))
        if [len(s.shape) for s in specs] == [len(s.shape) for s in (signature.inputs if signature else specs)]:
            specs = specified(specs, dynamic)
        this = Signature(
            bind, tuple(arguments), specs, in_tree, in_leaves, out_tree, out_leaves
        )
        if signature is None:
            signature = this
        elif (this.inputs, this.in_tree, this.in_leaves, this.out_tree) != (
            signature.inputs, signature.in_tree, signature.in_leaves, signature.out_tree,
        ):  # fmt: skip
            raise CaptureError(
                "the example inputs differ in structure, shape or dtype: "
                f"first {signature.describe()}; another {this.describe()}"
            )
        try:
            signature.check(tensors)
        except SignatureError as error:
            raise DynamicShapesError(f"an example does not fit dynamic_shapes: {error}") from None
        examples.append(Example(arguments, [t.detach().clone() for t in tensors], [t.detach().clone() for t in outputs]))
    if signature is None:
        raise CaptureError("no example inputs were given")
    return Source(module, exported, signature, examples, dynamic, reference)
