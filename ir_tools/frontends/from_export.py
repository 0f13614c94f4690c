"""`torch.export` -> Program: placeholders of parameters become constants, wrapped bodies are inlined."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import fx
from torch.export import Dim
from torch.export.graph_signature import InputKind, OutputKind

from ir_tools.errors import CaptureError
from ir_tools.frontends.capture_draft import finish, start_draft
from ir_tools.frontends.exported import sources_in_guards
from ir_tools.frontends.exported_sizes import enlarged, exported_conditions
from ir_tools.frontends.fx_graph import copy_graph
from ir_tools.frontends.normalizer import Normalizer
from ir_tools.frontends.source import Source
from ir_tools.frontends.symbols import size_oblivious
from ir_tools.frontends.undisturbed import undisturbed
from ir_tools.frontends.user_model import FlatModel, forward_parameters
from ir_tools.ir import Program
from ir_tools.ir.signature import Condition

aten = torch.ops.aten


def from_export(source: Source) -> Program:
    """Export the model (or take the ExportedProgram given) with the sizes of the first example."""
    with size_oblivious() if source.is_dynamic else contextlib.nullcontext():
        return _from_export(source)


def _from_export(source: Source) -> Program:
    conditions: list[Condition] = []
    if source.exported is not None:
        exported, prefix = source.exported, ""
        if source.is_dynamic:
            sources = sources_in_guards(exported, [p.name for p in forward_parameters(source.model)])
            conditions = exported_conditions(exported, source.signature.inputs, sources)
    else:
        flat = FlatModel(source.model, source.signature).eval()
        with undisturbed(source.model):  # exporting computes on tensors that are no buffers, and may move them
            exported, prefix = _export(flat, source), "model."
        if source.is_dynamic:
            sources = [[f"L['tensors'][{i}]"] for i in range(len(source.tensors))]
            conditions = exported_conditions(exported, source.signature.inputs, sources)
    draft, inputs = start_draft(source, "export")
    values: dict[fx.Node, Any] = {}
    feed = iter(inputs)
    constant_nodes: dict[str, fx.Node] = {}
    placeholders = exported.graph.find_nodes(op="placeholder")
    for node, spec in zip(placeholders, exported.graph_signature.input_specs, strict=True):
        if spec.kind is InputKind.USER_INPUT:
            # Inputs that are not tensors were baked in; only tensors have a placeholder of ours.
            values[node] = next(feed) if isinstance(node.meta.get("val"), torch.Tensor) else node.meta.get("val")
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            tensor = _constant(exported, spec)
            values[node] = draft.constant(str(spec.target).removeprefix(prefix), tensor)
            constant_nodes[str(spec.target)] = values[node]
        else:
            raise CaptureError(f"torch.export gives an input of kind {spec.kind.name} ({node.name}), which is not supported")
    normalizer = Normalizer(draft)
    results = copy_graph(normalizer, exported.graph_module, values, prefix)
    outputs = []
    for spec, value in zip(exported.graph_signature.output_specs, results, strict=True):
        if spec.kind is OutputKind.BUFFER_MUTATION:
            draft.call(aten.copy_.default, constant_nodes[str(spec.target)], value)
        elif spec.kind is OutputKind.USER_OUTPUT:
            if isinstance(value, (fx.Node, torch.Tensor)):
                outputs.append(value)
        else:
            raise CaptureError(f"torch.export gives an output of kind {spec.kind.name}, which is not supported")
    return finish(draft, outputs, conditions)


def _export(flat: FlatModel, source: Source) -> torch.export.ExportedProgram:
    """Export with the sizes of the first example; torch finds the relations between dynamic ones, and we read its guards."""
    if not source.is_dynamic:
        return torch.export.export(flat, tuple(source.tensors), strict=False)
    tensors = tuple(enlarged(t, sizes) for t, sizes in zip(source.tensors, source.dynamic, strict=True))
    shapes = tuple({axis: Dim.AUTO for axis in sizes} or None for sizes in source.dynamic)
    return torch.export.export(flat, tensors, dynamic_shapes={"tensors": shapes}, strict=False)


def _constant(exported: torch.export.ExportedProgram, spec: Any) -> torch.Tensor:
    if spec.target in exported.state_dict:
        return exported.state_dict[spec.target]
    return exported.constants[spec.target]
