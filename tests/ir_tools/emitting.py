"""Programs made by hand, and whether the modules that are emitted for them compute the same."""

import inspect
import re

import torch
from torch import fx

from ir_tools.emit.calling import arguments_for, flat_outputs
from ir_tools.emit.constants import path_text
from ir_tools.emit.package import round_trip
from ir_tools.emit.packed_weights import packing_text
from ir_tools.emit.to_torchscript import emit, written
from ir_tools.ir import Draft, InputSpec, Program, Signature, check_wellformed
from ir_tools.ir.prepack import prepack_conv, prepack_linear
from ir_tools.ir.signature import binder, leaf_names, split_leaves
from ir_tools.torch_compat import pytree

aten = torch.ops.aten
mkldnn = torch.ops.mkldnn


def build(inputs, body):
    """A Program for a model called with `inputs` ({name: value}). `body(draft, *nodes)` gives the output structure."""
    parameters = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in inputs]
    bind = binder(parameters)
    leaves, in_tree = pytree.tree_flatten(bind(**inputs))
    in_leaves, tensors = split_leaves(leaves)
    specs = tuple(
        InputSpec(name, tuple(leaf.shape), leaf.dtype)
        for name, leaf in zip(leaf_names(in_tree), leaves, strict=True)
        if isinstance(leaf, torch.Tensor)
    )
    draft = Draft(Program(fx.Graph(), signature=Signature(bind, tuple(inputs), specs, in_tree, in_leaves, in_tree, ())))
    nodes = [draft.placeholder(re.sub(r"\W+", "_", s.name), t) for s, t in zip(specs, tensors, strict=True)]
    values, out_tree = pytree.tree_flatten(body(draft, *nodes))
    out_leaves, _ = split_leaves([torch.empty(0) if isinstance(v, fx.Node) else v for v in values])
    draft.output([v for v in values if isinstance(v, fx.Node)])
    draft.program.signature = Signature(bind, tuple(inputs), specs, in_tree, in_leaves, out_tree, out_leaves)
    program = draft.finish()
    check_wellformed(program)
    return program


def unary(op, *args, x=None, **kwargs):
    """A Program of one call on one tensor."""
    return build({"x": torch.randn(2, 3) if x is None else x}, lambda d, x: d.call(op, x, *args, **kwargs))


def assert_same(program, *args, chunk_size=250, **kwargs):
    """The emitted module, before and after a save and load, gives bitwise what the Program gives."""
    expected = pytree.tree_leaves(program(*args, **kwargs))
    tensors = program.signature.flatten(args, kwargs)
    scripted = emit(program, chunk_size)
    for module in (scripted, round_trip(scripted)):
        result = module(*arguments_for(program.signature, tensors))
        got = pytree.tree_leaves(program.signature.unflatten_outputs(flat_outputs(program.signature, result)))
        assert len(got) == len(expected)
        for g, e in zip(got, expected, strict=True):
            if isinstance(e, torch.Tensor):
                assert g.dtype == e.dtype and torch.equal(g.nan_to_num(), e.nan_to_num()), (g, e)
                assert torch.equal(g.isnan(), e.isnan())
            else:
                assert g == e
    return scripted


def packed_for_conv(weight, groups, size):
    return prepack_conv(weight, (1, 1), (2, 2), (1, 1), groups, size)


def packed_program(dtype, groups=2):
    x = torch.randn(1, 8, 9, 9, dtype=dtype)
    conv, matrix = torch.randn(12, 8 // groups, 3, 3, dtype=dtype), torch.randn(5, 12, dtype=dtype)

    def body(d, x):
        plain = d.constant("conv.weight", conv), d.constant("packed.weight", matrix)
        w = d.call(prepack_conv, plain[0], [1, 1], [2, 2], [1, 1], groups, [1, 8, 9, 9])
        v = d.call(prepack_linear, plain[1], 25)
        b = d.constant("packed.bias", torch.randn(12, dtype=dtype))
        scale = ([1, 1], [2, 2], [1, 1], groups)
        y = d.call(mkldnn._convolution_pointwise.default, x, w, b, *scale, "hardtanh", [0.0, 6.0], "")
        rows = d.call(aten.permute.default, y, [0, 2, 3, 1])
        return d.call(mkldnn._linear_pointwise.default, rows, v, None, "relu", [], "")

    # Fake tensors do not run these ops on opaque weights; the facts are of no use to emission.
    return build({"x": x}, body), x, conv, matrix


def torchscript_source(program: Program, chunk_size: int = 250) -> str:
    """The TorchScript text of `program`, for people to read: the constants as comments, then the methods."""
    text = written(program, chunk_size)
    lines = [f"# {path_text(path)}: {described(program.constants[name])}" for name, path in text.paths.items()]
    lines += [f"# self.{name}: {value!r}" for name, value in text.floats.items()]
    lines += [
        f"# self.{text.hoisted.packed_name}.weights[{i}]: {described(program.constants[name])} of {name}, packed"
        for i, name in enumerate(str(node.all_input_nodes[0].target) for node in text.hoisted.packed)
    ]
    methods = list(text.methods.values())
    if text.hoisted.packed:
        packing = packing_text(program, text.hoisted.packed, chunk_size)
        methods.insert(0, f"# methods of self.{text.hoisted.packed_name}\n" + packing)
    return "\n".join(["\n".join(lines) + "\n", *methods])


def described(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
