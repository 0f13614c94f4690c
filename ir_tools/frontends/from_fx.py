"""`torch.fx.symbolic_trace` -> Program: the traced module is traced again to ATen, parameter paths by tensor identity."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import fx, nn

from ir_tools.errors import CaptureError
from ir_tools.frontends.capture_draft import finish, start_draft
from ir_tools.frontends.fx_graph import copy_graph
from ir_tools.frontends.normalizer import Normalizer
from ir_tools.frontends.source import Source
from ir_tools.frontends.symbols import Symbols, size_oblivious
from ir_tools.frontends.undisturbed import undisturbed
from ir_tools.frontends.user_model import FlatModel
from ir_tools.ir import Program
from ir_tools.ir.signature import Condition
from ir_tools.torch_compat.fake import FakeTensorMode
from ir_tools.torch_compat.fx import trace_to_aten
from ir_tools.torch_compat.symbols import ShapeEnv
from ir_tools.torch_compat.tensors import version_of


class Tracer(fx.Tracer):
    """fx's own tracer, except that writes of `forward` into a buffer are recorded; fx would run them at once and lose them."""

    proxy_buffer_attributes = True


def from_fx(source: Source) -> Program:
    """Trace symbolically (a GraphModule is taken as it is), then to pre-dispatch ATen under the first example's sizes.

    Dynamic sizes are symbols.
    """
    with size_oblivious() if source.is_dynamic else contextlib.nullcontext():
        return _from_fx(source)


def _from_fx(source: Source) -> Program:
    with undisturbed(source.model):  # make_fx computes small tensors, which may move the model's state
        traced = source.model if isinstance(source.model, fx.GraphModule) else symbolic_trace(source.model)
        flat = FlatModel(traced, source.signature).eval()
        graph_module, conditions = _to_aten(flat, source)

    model, paths = source.model, dict[int, str]()
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        paths.setdefault(id(tensor), name)
    draft, inputs = start_draft(source, "fx")
    values: dict[fx.Node, Any] = dict(zip(graph_module.graph.find_nodes(op="placeholder"), inputs, strict=True))
    for node in graph_module.graph.find_nodes(op="get_attr"):
        value: Any = graph_module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if isinstance(value, torch.Tensor):
            values[node] = draft.constant(paths.get(id(value), "constant"), value)
    outputs = copy_graph(Normalizer(draft), graph_module, values, prefix="model.")
    return finish(draft, outputs, conditions)


def _to_aten(flat: FlatModel, source: Source) -> tuple[fx.GraphModule, tuple[Condition, ...]]:
    """The ATen graph, and the conditions on dynamic sizes met while tracing: a module that fx does not enter may read them."""
    if not source.is_dynamic:
        return trace_to_aten(flat, "fake")(*source.tensors), ()
    # A mode of its own: it takes the model's real parameters.
    symbols = Symbols(FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()))
    inputs = [symbols.fake(spec, tensor) for spec, tensor in zip(source.signature.inputs, source.tensors, strict=True)]
    # The selection of a convolution library must not leave a guard.
    with torch.backends.mkldnn.flags(enabled=False), torch.backends.nnpack.flags(enabled=False):
        graph_module = trace_to_aten(flat, "symbolic")(*inputs)
    return graph_module, symbols.conditions()


def symbolic_trace(model: nn.Module) -> fx.GraphModule:
    """The model's own operations as an fx graph. Refuses a model that writes into a tensor which is no buffer."""
    attributes = {f"{path}.{name}".lstrip("."): t for path, m in model.named_modules() for name, t in vars(m).items()
                  if isinstance(t, torch.Tensor)}  # fmt: skip
    versions = {name: version_of(t) for name, t in attributes.items()}
    graph = Tracer().trace(model)
    for name, tensor in attributes.items():
        if version_of(tensor) != versions[name]:
            raise CaptureError(f"forward writes into self.{name}, which fx does not record; make it a buffer")
    return fx.GraphModule(model, graph)
