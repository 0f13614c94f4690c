"""Emission: the text means what the Program means, and keeps meaning it after a save and a load."""

import collections
import inspect
import math
import os
import re
import subprocess
import sys
import time
import warnings

import pytest
import torch
from torch import fx

import passes
from ir_tools.emit import statements
from ir_tools.emit.calling import arguments_for, emitted_arguments, flat_outputs, typed_outputs
from ir_tools.emit.constants import place_constants
from ir_tools.emit.package import round_trip
from ir_tools.emit.to_torchscript import emit, torchscript_source
from ir_tools.errors import EmitError
from ir_tools.ir import Draft, InputSpec, Packing, Program, Signature, check_wellformed
from ir_tools.ir.dialect import getitem
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


# -- literals ----------------------------------------------------------------------------------------------------------

FLOATS = [0.1, -0.0, 1e-5, 5e-324, 1.7976931348623157e308, 1e22, 65504.0, 1e9, 1e10, -1e10, 2.0**53, 1e16, 1e17]


@pytest.mark.parametrize("value", [*FLOATS, math.inf, -math.inf, math.nan])
def test_floats_come_back_exactly(value):
    x = torch.zeros(2, dtype=torch.float64)
    program = build({"x": x}, lambda d, x: d.call(aten.full.default, [1], value, dtype=torch.float64))
    assert_same(program, x)
    got = round_trip(emit(program))(x)
    assert math.copysign(1, got.item()) == math.copysign(1, value) or math.isnan(value)


@pytest.mark.parametrize("value", [1e9, 1e10, 1e16])
def test_a_float_that_decides_the_dtype_stays_a_float(value):
    x = torch.zeros(1)
    assert_same(build({"x": x}, lambda d, x: d.call(aten.full.default, [1], value)), x)


def test_a_float_list_keeps_floats_that_torch_would_save_as_ints():
    x = torch.randn(1, 1, 2, 2)
    program = build({"x": x}, lambda d, x: d.call(aten.upsample_nearest2d.vec, x, None, [2.0, 1.0]))
    assert_same(program, x)
    clamped = build({"x": x}, lambda d, x: d.call(aten.hardtanh.default, x, -1e10, 1e16))
    assert_same(clamped, x)


@pytest.mark.parametrize("value", [0, -5, 2**63 - 1, -(2**63)])
def test_ints(value):
    x = torch.arange(3)
    assert_same(build({"x": x}, lambda d, x: d.call(aten.eq.Scalar, x, value)), x)
    assert_same(build({"x": x}, lambda d, x: d.call(aten.full.default, [1], value)), x)


def test_an_int_for_a_float_argument_and_an_int_beyond_64_bits():
    x = torch.randn(3)
    assert_same(build({"x": x}, lambda d, x: d.call(aten.leaky_relu.default, x, 1)), x)
    program = build({"x": x}, lambda d, x: d.call(aten.leaky_relu.default, x, 1))
    next(n for n in program.calls).args = (program.placeholders[0], 2**64)
    with pytest.raises(EmitError, match=r"leaky_relu.*18446744073709551616 does not fit"):
        emit(program)


@pytest.mark.parametrize(
    "op, args, kwargs",
    [
        (aten.to.dtype, (torch.bfloat16,), {}),
        (aten.to.device, (torch.device("cpu"), torch.float64), {}),
        (aten.clone.default, (), {"memory_format": torch.contiguous_format}),
        (
            aten.full_like.default,
            (2.5,),
            {"dtype": torch.float16, "layout": torch.strided, "device": torch.device("cpu")},
        ),
        (aten.gelu.default, (), {"approximate": "tanh"}),
        (aten.sum.dim_IntList, ([], True), {"dtype": None}),
        (aten.sum.default, (), {"dtype": torch.float64}),
        (aten.clamp.default, (None, 0.5), {}),
        (aten.mul.Scalar, (1 + 2j,), {}),
        (aten.var.correction, ([1],), {"correction": 0, "keepdim": True}),
        (aten.arange.start_step, (), {}),
        (aten.norm.ScalarOpt_dim, (2, [1]), {}),
        (aten.any.dim, (1, True), {}),
    ],
)
def test_other_literals(op, args, kwargs):
    x = torch.randn(2, 3)
    if op is aten.arange.start_step:
        program = build({"x": x}, lambda d, x: d.call(op, 0, 7, 2))
    else:
        program = unary(op, *args, **kwargs)
    assert_same(program, x)


@pytest.mark.parametrize("text", ["", "it's", 'a "b"', "a\nb\t\\", "é☃ {}", "\x01\x7f", "#"])
def test_strings(text):
    # No plain op takes any string at all, so the literal itself is tried.
    from ir_tools.emit.literals import string_literal
    from ir_tools.emit.torch_jit import define, new_box, script_tree

    scripted = script_tree(new_box("Model"))
    define(scripted, f"def forward(self) -> str:\n    return {string_literal(text)}\n")
    assert scripted() == text and round_trip(scripted)() == text


def test_a_string_that_a_file_cannot_hold_is_refused():
    from ir_tools.emit.literals import string_literal

    with pytest.raises(EmitError, match="carriage return"):
        string_literal("a\rb")


def test_lists_are_typed_by_the_schema():
    x, index = torch.randn(2, 3, 4), torch.tensor([1, 0])
    assert_same(build({"x": x, "i": index}, lambda d, x, i: d.call(aten.index.Tensor, x, [None, i])), x, index)
    assert_same(build({"x": x}, lambda d, x: d.call(aten.cat.default, [x, x], 1)), x)
    assert_same(build({"x": x}, lambda d, x: d.call(aten.fft_fftn.default, x, None, [0], None)), x)
    image, weight = torch.randn(1, 3, 5, 5), torch.randn(4, 3, 3, 3)

    def conv(d, x):
        w = d.constant("w", weight)
        same = ([1, 1], [1, 1], [1, 1], 1)
        a = d.call(mkldnn._convolution_pointwise.default, x, w, None, *same, "relu", [], None)
        b = d.call(mkldnn._convolution_pointwise.default, x, w, None, *same, "hardtanh", [0.0, 6.0], "")
        return a, b

    assert_same(build({"x": image}, conv), image)


def test_a_bare_none_that_two_overloads_could_take_is_typed():
    x = torch.randn(1, 1, 3, 3)
    program = build({"x": x}, lambda d, x: d.call(aten.upsample_bilinear2d.vec, x, [4, 4], False, None))
    assert "annotate(Optional[List[float]], None)" in torchscript_source(program)
    assert_same(program, x)


def test_a_bool_given_as_a_number_keeps_the_dtype_or_is_refused():
    x = torch.tensor([True, False])
    assert_same(build({"x": x}, lambda d, x: d.call(aten.full.default, [2], True)), x)
    assert_same(build({"x": x}, lambda d, x: d.call(aten.masked_fill.Scalar, x, x, False)), x)
    with pytest.raises(EmitError, match=r"add.*a bool given as a number.*int64, not torch.bool"):
        emit(build({"x": x}, lambda d, x: d.call(aten.add.Scalar, x, True)))


# -- results -----------------------------------------------------------------------------------------------------------


def test_an_op_with_several_results_across_a_chunk_boundary():
    x = torch.randn(1, 2, 4, 4)

    def body(d, x):
        pair = d.call(aten.max_pool2d_with_indices.default, x, [2, 2], [2, 2], [0, 0], [1, 1], False)
        y = d.call(aten.relu.default, x)
        return d.call(getitem, pair, 0), d.call(getitem, pair, -1), y

    assert_same(build({"x": x}, body), x, chunk_size=1)


def test_a_list_of_tensors_across_a_chunk_boundary():
    x = torch.randn(4, 3)

    def body(d, x):
        parts = d.call(aten.split.Tensor, x, 2, 0)
        y = d.call(aten.relu.default, x)
        z = d.call(aten.cat.default, parts, 1)
        return d.call(getitem, parts, 1), d.call(getitem, parts, -2), y, z

    program = build({"x": x}, body)
    assert_same(program, x, chunk_size=2)
    assert "split: List[Tensor]" in torchscript_source(program, chunk_size=2)


def test_numbers_across_a_chunk_boundary():
    x = torch.tensor([3.0, 4.0])

    # The facts of data-dependent numbers are unknown to fake tensors, so the graph is made by hand.
    program = build({"x": x}, lambda d, x: (d.call(aten.relu.default, x), x))
    graph = program.graph
    old = program.calls[0]
    with graph.inserting_before(old):
        size = graph.call_function(aten.size.int, (program.placeholders[0], 0))
        first = graph.call_function(aten.select.int, (program.placeholders[0], 0, 0))
        number = graph.call_function(aten.item.default, (first,))
        row = graph.call_function(
            aten.full.default, ([size], 1.5), dict.fromkeys(("dtype", "layout", "device", "pin_memory"))
        )
        shifted = graph.call_function(aten.add.Scalar, (row, number, 1))
    program.output.args = ((row, shifted),)
    graph.erase_node(old)
    for module in (emit(program, 1), round_trip(emit(program, 2))):
        a, b = module(x)
        assert torch.equal(a, torch.full([2], 1.5)) and torch.equal(b, torch.full([2], 4.5))
    source = torchscript_source(program, 1)
    assert ": number" in source and "-> int" in source


def test_an_output_that_is_no_tensor_is_refused():
    program = unary(aten.split.Tensor, 1, 0)
    with pytest.raises(EmitError, match=r"output 0 \(split\) is a List\[Tensor\], not a tensor"):
        emit(program)


# -- calling -----------------------------------------------------------------------------------------------------------

Pair = collections.namedtuple("Pair", "left right")


@pytest.mark.parametrize(
    "shape, typed",
    [
        (lambda a, b: a, True),
        (lambda a, b: (a, b), True),
        (lambda a, b: (a,), True),
        (lambda a, b: [b, a], True),
        (lambda a, b: {"first": a, "it's": b}, True),
        (lambda a, b: {"layers": [(a, b), (b, a)], "last": [(a, a)]}, True),
        (lambda a, b: ({"x": a}, [b, b, (a)]), True),
        (lambda a, b: (a, None), False),
        (lambda a, b: Pair(a, b), False),
        (lambda a, b: {"n": 3, "a": a}, False),
        (lambda a, b: [a, (a, b)], False),
        (lambda a, b: {1: a}, False),
        (lambda a, b: (a, []), False),
        (lambda a, b: None, False),
        (lambda a, b: [(a, b), (b,)], False),
    ],
)
def test_output_structures(shape, typed):
    x = torch.randn(3)
    program = build({"x": x}, lambda d, x: shape(d.call(aten.relu.default, x), d.call(aten.neg.default, x)))
    scripted = assert_same(program, x)
    assert typed_outputs(program.signature) is typed
    result = scripted(x)
    if typed:
        assert pytree.tree_structure(result) == program.signature.out_tree
    else:
        assert result is None or (type(result) is tuple and all(isinstance(t, torch.Tensor) for t in result))
    restored = program.signature.unflatten_outputs(flat_outputs(program.signature, result))
    assert pytree.tree_structure(restored) == program.signature.out_tree


def test_inputs_and_constants_may_be_outputs():
    x = torch.randn(3)
    assert_same(build({"x": x}, lambda d, x: (x, d.constant("table", torch.arange(4)), x)), x)


def test_argument_structures_and_names():
    a, b, c, e = (torch.randn(2) for _ in range(4))
    inputs = {
        "input": a,
        "pair": (b, [c, c + 1]),
        "batch": {"ids": e, "mask": None, "it's": a},
        "flag": True,
        "torch": {"y": [a], "x": [b]},
        "self_": [a, b],
    }

    def body(d, *nodes):
        total = nodes[0]
        for i, node in enumerate(nodes[1:]):
            total = d.call(aten.add.Tensor, total, d.call(aten.mul.Scalar, node, i + 2.0))
        return total

    program = build(inputs, body)
    scripted = assert_same(program, **inputs)
    names = [a.name for a in scripted.forward.schema.arguments]
    assert names == ["self", "input", "pair", "batch_ids", "batch_it_s", "torch_", "self_"]
    assert [str(a.type) for a in scripted.forward.schema.arguments][1:] == [
        "Tensor",
        "Tuple[Tensor, List[Tensor]]",
        "Tensor",
        "Tensor",
        "Dict[str, List[Tensor]]",
        "List[Tensor]",
    ]
    assert [a.path for a in emitted_arguments(program.signature)][2:4] == ["batch['ids']", 'batch["it\'s"]']
    call = dict(zip(names[1:], arguments_for(program.signature, program.signature.flatten((), inputs)), strict=True))
    reversed_dict = {**call, "torch_": dict(reversed(call["torch_"].items()))}
    assert torch.equal(scripted(**call), scripted(**reversed_dict))
    with pytest.raises(torch.jit.Error, match=r"input 'self_' must have 2 elements, got 3"):
        scripted(**{**call, "self_": [a, a, a]})
    with pytest.raises(torch.jit.Error, match=r"input 'torch' must have the keys \[x, y\], got \[x\]"):
        scripted(**{**call, "torch_": {"x": [a]}})
    with pytest.raises(torch.jit.Error, match=r"input 'pair\[1\]\[0\]' must have shape \[2\] .*, got \[1\]"):
        scripted(**{**call, "pair": (b, [c[:1], c])})


@pytest.mark.parametrize(
    "given, message",
    [
        (torch.zeros(2, 3, dtype=torch.float64), r"input 'x' must have dtype torch.float32, got torch.float64"),
        (torch.zeros(2, 3, dtype=torch.bool), r"input 'x' must have dtype torch.float32, got torch.bool"),
        (torch.zeros(3), r"input 'x' must have rank 2 \(shape \[2, 3\]\), got rank 1 \(shape \[3\]\)"),
        (torch.zeros(4, 3), r"input 'x' must have shape \[2, 3\] \(sizes were baked in at capture\), got \[4, 3\]"),
    ],
)
def test_the_module_itself_checks_its_inputs(given, message):
    scripted = emit(unary(aten.relu.default))
    for module in (scripted, round_trip(scripted)):
        for _ in range(3):  # the profiling executor gives later calls other code
            module(torch.zeros(2, 3))
            with pytest.raises(torch.jit.Error, match=message):
                module(given)


# -- constants and state -----------------------------------------------------------------------------------------------


def test_constants_keep_the_users_paths_tensors_and_layouts():
    weight = torch.randn(4, 3, 3, 3).contiguous(memory_format=torch.channels_last)
    bias = torch.nn.Parameter(torch.randn(4))
    table = torch.arange(6).reshape(2, 3).t()
    x = torch.randn(1, 3, 5, 5)

    def body(d, x):
        w, b = d.constant("layer1.0.weight@fold", weight), d.constant("layer1.0.bias", bias)
        return d.call(aten.conv2d.default, x, w, b), d.constant("table", table)

    program = build({"x": x}, body)
    scripted = assert_same(program, x)
    assert dict(scripted.named_parameters()).keys() == {"layer1.0.weight", "layer1.0.bias"}
    assert dict(scripted.named_buffers()).keys() == {"table"}
    state = scripted.state_dict()
    assert state["layer1.0.weight"].data_ptr() == weight.data_ptr()
    assert not any(p.requires_grad for p in scripted.parameters()) and bias.requires_grad
    loaded = round_trip(scripted).state_dict()
    assert loaded["layer1.0.weight"].stride() == weight.stride() and loaded["table"].stride() == table.stride()
    assert loaded["layer1.0.weight"].data_ptr() != weight.data_ptr()
    assert not scripted.training and not round_trip(scripted).training


# Reserved by nn.Module, by Python, by TorchScript, by the text that torch writes into a file, or by emission itself.
AWKWARD = [
    *("training", "graph", "code", "forward", "eval", "parameters", "_parameters", "_c", "T_destination", "type.to"),
    *(
        "class",
        "None",
        "in",
        "self",
        "attention.self.key",
        "0",
        "a-b",
        "a_b",
        "ünï",
        'x"y',
        "name",
        "original_name.define",
        "__getstate__",
    ),
    *(
        "float",
        "torch.torch",
        "print.len",
        "annotate",
        "str",
        "bool.sorted",
        "NoneType",
        "ops",
        "inf",
        "CONSTANTS",
        "_0",
    ),
    *("packed", "packed.weights", "_chunk_0", "_float_0", "_check_input..w", "training_", "graph.graph"),
    *("sub", "sub.w", "sub.w.w", "w", "w@one", "w@two"),
]


def test_awkward_names_of_constants():
    x = torch.randn(3)
    values = {name: torch.randn(3) for name in AWKWARD}

    def body(d, x):
        for i, (name, value) in enumerate(values.items()):
            x = d.call(aten.add.Tensor, d.call(aten.mul.Scalar, x, 1.0 + i), d.constant(name, value))
        return d.call(aten.add.Scalar, x, 1e10)

    program = build({"x": x}, body)
    scripted = assert_same(program, x, chunk_size=20)
    names = set(scripted.state_dict())
    assert len(names) == len(AWKWARD)
    assert {"0", "sub.w.w", "graph.graph", "training_", "a_b", "self", "attention.self.key"} <= names
    paths = place_constants(["w@one", "v@one", "u", "u@two", "training", "training_"])
    assert list(paths.values()) == [("w",), ("v",), ("u",), ("u_two",), ("training__2",), ("training_",)]


def test_thousands_of_constants():
    values = [torch.randn(2) for _ in range(3000)]

    def body(d, x):
        return d.call(aten.stack.default, [d.constant(f"layer{i // 10}.w{i % 10}", v) for i, v in enumerate(values)], 0)

    x = torch.randn(1)
    assert_same(build({"x": x}, body), x)


def test_state_starts_from_the_captured_values_and_persists_across_calls():
    count = torch.tensor(7)
    x = torch.randn(2)

    def body(d, x):
        c = d.constant("bn.count", count, state=True)
        d.call(aten.add_.Scalar, c, 1)
        return d.call(aten.mul.Tensor, x, c)

    program = build({"x": x}, body)
    scripted = emit(program, chunk_size=1)
    loaded = round_trip(scripted)
    for module in (scripted, loaded):
        assert torch.equal(module(x), x * 8) and torch.equal(module(x), x * 9)
        assert module.state_dict()["bn.count"] == 9
    assert torch.equal(round_trip(scripted)(x), x * 10)
    assert count == 7 and torch.equal(program(x), x * 8)


def test_two_programs_of_the_same_structure_do_not_share_methods():
    a, b = unary(aten.relu.default), unary(aten.neg.default)
    first, second = emit(a), emit(b)
    x = torch.tensor([[1.0, 2, 3], [-4, 5, 6]])
    assert torch.equal(first(x), x.relu()) and torch.equal(second(x), -x)


# -- packed weights ----------------------------------------------------------------------------------------------------


def conv_packing(weight, groups, size):
    return Packing("conv", padding=(1, 1), stride=(2, 2), dilation=(1, 1), groups=groups, input_size=size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape, groups", [((64, 16, 3, 3), 4), ((33, 1, 3, 3), 33), ((66, 35, 3, 3), 1), ((64, 64, 1, 1), 1)]
)
def test_packed_conv_weights_come_back_bit_for_bit(dtype, shape, groups):
    bits = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[dtype]
    limits = torch.iinfo(bits)
    weight = torch.randint(limits.min, limits.max, shape, dtype=bits).view(dtype)  # NaNs and denormals among them
    for size in (None, (2, shape[1] * groups, 9, 9)):
        packed = conv_packing(weight, groups, size).apply(weight)
        assert torch.equal(packed.to_dense().view(bits), weight.view(bits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 128), (33, 17), (1000, 96)])
def test_packed_linear_weights_come_back_bit_for_bit(dtype, shape):
    bits = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[dtype]
    limits = torch.iinfo(bits)
    weight = torch.randint(limits.min, limits.max, shape, dtype=bits).view(dtype)
    for batch in (None, 1, 128):
        assert torch.equal(Packing("linear", batch=batch).apply(weight).to_dense().view(bits), weight.view(bits))


def packed_program(dtype, groups=2):
    x = torch.randn(1, 8, 9, 9, dtype=dtype)
    conv, matrix = torch.randn(12, 8 // groups, 3, 3, dtype=dtype), torch.randn(5, 12, dtype=dtype)

    def body(d, x):
        w = d.constant("conv.weight", conv, packing=conv_packing(conv, groups, (1, 8, 9, 9)))
        v = d.constant("packed.weight", matrix, packing=Packing("linear", batch=25))
        b = d.constant("packed.bias", torch.randn(12, dtype=dtype))
        scale = ([1, 1], [2, 2], [1, 1], groups)
        y = d.call(mkldnn._convolution_pointwise.default, x, w, b, *scale, "hardtanh", [0.0, 6.0], "")
        rows = d.call(aten.permute.default, y, [0, 2, 3, 1])
        return d.call(mkldnn._linear_pointwise.default, rows, v, None, "relu", [], "")

    # Fake tensors do not run these ops on opaque weights; the facts are of no use to emission.
    return build({"x": x}, body), x, conv, matrix


READ_ELSEWHERE = """
import sys, torch
module = torch.jit.load(sys.argv[1])
x, expected = torch.load(sys.argv[2])
assert "ir_tools" not in sys.modules
with torch.no_grad():
    for _ in range(3):
        assert torch.equal(module(x), expected)
assert all(w.is_mkldnn for w in module.packed_2.weights)
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 4])
def test_packed_weights_in_a_new_process_with_only_torch(dtype, groups, tmp_path):
    program, x, conv, matrix = packed_program(dtype, groups)
    scripted = emit(program, chunk_size=1)
    expected = program(x)
    assert torch.equal(scripted(x), expected)
    loaded = round_trip(round_trip(scripted))
    assert torch.equal(loaded(x), expected)
    assert torch.equal(loaded.packed_2.weights[0].to_dense(), conv)
    assert torch.equal(loaded.packed_2.weights[1].to_dense(), matrix)
    scripted.save(str(tmp_path / "model.pt"))
    torch.save((x, expected), tmp_path / "values.pt")
    command = [sys.executable, "-c", READ_ELSEWHERE, str(tmp_path / "model.pt"), str(tmp_path / "values.pt")]
    done = subprocess.run(command, cwd=tmp_path, env={"PATH": "/usr/bin"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_plain_copies_of_packed_weights_are_not_kept():
    program, *_ = packed_program(torch.float32)
    scripted = emit(program)
    assert set(scripted.state_dict()) == {"packed.bias"}
    assert "weights[0]: " in torchscript_source(program)


NO_AVX512 = """
import sys, torch
from ir_tools.emit.errors import ModelFileError
from ir_tools.emit.package import read_torchscript
if torch.ops.mkldnn._is_mkldnn_bf16_supported():
    sys.exit(77)  # this torch does not heed the variable
for load, error in ((torch.jit.load, torch.jit.Error), (read_torchscript, ModelFileError)):
    try:
        load(sys.argv[1])
    except error as raised:
        print(str(raised).strip().splitlines()[-1])
torch.jit.load(sys.argv[2])
"""


def test_packed_bfloat16_weights_say_why_a_cpu_without_avx512_cannot_load_them(tmp_path):
    half, full = packed_program(torch.bfloat16)[0], packed_program(torch.float32)[0]
    assert "_is_mkldnn_bf16_supported" in torchscript_source(half)
    assert "_is_mkldnn_bf16_supported" not in torchscript_source(full)
    if not mkldnn._is_mkldnn_bf16_supported():
        with pytest.raises(EmitError, match="cannot be packed for oneDNN: this file holds bfloat16 weights"):
            emit(half)
        return
    emit(half).save(str(tmp_path / "half.pt"))
    emit(full).save(str(tmp_path / "full.pt"))
    command = [sys.executable, "-W", "ignore", "-c", NO_AVX512, str(tmp_path / "half.pt"), str(tmp_path / "full.pt")]
    done = subprocess.run(command, env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("oneDNN does not heed ONEDNN_MAX_CPU_ISA here")
    assert done.returncode == 0, done.stderr
    reason = (
        "this file holds bfloat16 weights packed for oneDNN, and this CPU lacks AVX-512, which that needs; "
        "optimise the model with engine='aten' to run it here"
    )
    first, second = done.stdout.splitlines()
    assert first == f"builtins.RuntimeError: {reason}"
    assert second == f"torch cannot read {tmp_path / 'half.pt'}: {reason}"


# -- assertions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "op, message",
    [
        (aten._assert_async.msg, ['not "finite": {}']),
        (aten._assert_async.default, []),
    ],
)
@pytest.mark.parametrize("chunk_size", [1, 250])
def test_an_assertion_raises_its_message(op, message, chunk_size):
    def body(d, x):
        d.call(op, d.call(aten.all.default, d.call(aten.isfinite.default, x)), *message)
        return d.call(aten.relu.default, x)

    x = torch.tensor([1.0, -2.0])
    scripted = assert_same(build({"x": x}, body), x, chunk_size=chunk_size)
    expected = message[0] if message else "an assertion of the model failed"
    for module in (scripted, round_trip(scripted), round_trip(round_trip(scripted))):
        for _ in range(3):
            assert torch.equal(module(x), x.relu())
            with pytest.raises(torch.jit.Error, match=f"RuntimeError: {re.escape(expected)}"):
                module(x / 0)


class RefusesNegative(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)

    def forward(self, x):
        if bool((x < 0).any()):
            raise ValueError("negative")
        return torch.relu(self.conv(x))


class AssertsPositive(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)

    def forward(self, x):
        torch._assert_async((x >= 0).all(), "negative")
        return torch.relu(self.conv(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("engine", ["aten", "onednn_ops"])
@pytest.mark.parametrize("frontend", ["script", "export"])
def test_an_assertion_of_the_model_is_in_its_file(frontend, engine, tmp_path):
    model = torch.jit.script(RefusesNegative().eval()) if frontend == "script" else AssertsPositive().eval()
    x = torch.rand(1, 3, 8, 8)
    fast = passes.optimize(model, example_inputs=x, engine=engine, frontend=frontend)
    fast.save(tmp_path / "model.pt")
    for module in (fast, passes.load(tmp_path / "model.pt"), torch.jit.load(tmp_path / "model.pt")):
        with torch.no_grad():
            torch.testing.assert_close(module(x), model(x))
        with pytest.raises(Exception, match="negative"):
            module(-x)


# -- gradients ---------------------------------------------------------------------------------------------------------


class Residual(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x, more):
        return torch.relu(self.conv(x) + more["skip"]), x, more["skip"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("engine", ["aten", "onednn_ops"])
def test_results_never_require_gradients(engine, tmp_path):
    model, x, skip = Residual().eval(), torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    fast = passes.optimize(model, example_inputs=(x, {"skip": skip}), engine=engine)
    fast.save(tmp_path / "model.pt")
    x.requires_grad_(), skip.requires_grad_()
    expected = model(x, {"skip": skip})
    for module in (fast, passes.load(tmp_path / "model.pt"), torch.jit.load(tmp_path / "model.pt")):
        for _ in range(3):  # the profiling executor gives later calls other code
            results = module(x, {"skip": skip})
            torch.testing.assert_close(results, tuple(e.detach() for e in expected))
            assert not any(r.requires_grad for r in results)
            assert [r.data_ptr() for r in results[1:]] == [x.data_ptr(), skip.data_ptr()]
    assert x.requires_grad and x.grad is None and skip.requires_grad


# -- what is meant is what is read -------------------------------------------------------------------------------------


def test_a_call_that_resolves_to_another_overload_is_refused(monkeypatch):
    program = unary(aten.mean.dim, [1], True)
    emit(program)
    write = statements.call_text

    def sabotaged(node, target, variables):
        return write(node, target, variables).replace("mean(x, [1], True, ", "mean(x, ")

    monkeypatch.setattr(statements, "call_text", sabotaged)
    with pytest.raises(EmitError) as error:
        emit(program)
    message = str(error.value)
    assert "reads mean " in message and "aten::mean.dim(" in message and "read:  aten::mean(" in message


def test_a_call_too_many_and_a_call_too_few_are_refused(monkeypatch):
    program = unary(aten.relu.default)
    write = statements.call_text
    monkeypatch.setattr(statements, "call_text", lambda n, t, v: f"torch.neg({write(n, t, v)})")
    with pytest.raises(EmitError, match="a call that the Program does not have: aten::neg"):
        emit(program)
    monkeypatch.setattr(statements, "call_text", lambda n, t, v: v.read(n.args[0]))
    with pytest.raises(EmitError, match="the call is gone"):
        emit(program)


def test_text_that_does_not_compile_is_an_emit_error(monkeypatch):
    monkeypatch.setattr(statements, "call_text", lambda n, t, v: "torch.no_such_op(x)")
    with pytest.raises(EmitError, match=r"does not accept the text of _chunk_0:[\s\S]*no_such_op"):
        emit(unary(aten.relu.default))


def test_dialect_ops_are_refused_by_name():
    program = build({"x": torch.randn(2)}, lambda d, x: d.call(torch.ops.torch_passes.quant_stub.default, x, "site"))
    with pytest.raises(EmitError, match=r"still holds torch_passes::quant_stub.*run a lowering pass"):
        emit(program)


def test_the_text_is_the_same_every_time_and_reads_well():
    def program():
        torch.manual_seed(1)
        return packed_program(torch.float32)[0]

    first, second = torchscript_source(program()), torchscript_source(program())
    assert first == second
    assert "# self.packed.bias: float32[12]" in first
    assert 'self._check_input(x, "x", torch.float32, [1, 8, 9, 9], "[1, 8, 9, 9]")' in first


def test_no_warning_is_shown_and_the_filters_are_left_alone():
    filters = list(warnings.filters)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        round_trip(emit(unary(aten.relu.default)))
    assert not shown and list(warnings.filters) == filters


def test_chunks_hold_no_more_than_chunk_size_calls():
    x = torch.randn(3)

    def body(d, x):
        for _ in range(7):
            x = d.call(aten.sin.default, x)
        return x

    program = build({"x": x}, body)
    scripted = assert_same(program, x, chunk_size=3)
    calls = [str(getattr(scripted, f"_chunk_{i}").graph).count("aten::sin") for i in range(3)]
    assert calls == [3, 3, 1]
    with pytest.raises(EmitError, match="chunk_size must be at least 1, got 0"):
        emit(program, chunk_size=0)


def test_ten_thousand_calls():
    x = torch.randn(4)

    def body(d, x):
        for i in range(5000):
            x = d.call(
                aten.add.Tensor, d.call(aten.sin.default, x), d.constant(f"layer{i // 10}.w{i % 10}", torch.randn(4))
            )
        return x

    program = build({"x": x}, body)
    start = time.perf_counter()
    scripted = emit(program)
    print(f"\n10,000 calls and 5,000 constants emitted in {time.perf_counter() - start:.1f} s")
    assert torch.equal(scripted(x), program(x))
    assert len([n for n in scripted._c._method_names() if n.startswith("_chunk_")]) == 40


# -- regions -----------------------------------------------------------------------------------------------------------


def region_program(make):
    """A Program over x, with the tools of test_regions."""
    from tests.ir_tools import test_regions as by_hand

    return build({"x": by_hand.X}, lambda d, x: make(by_hand, d, x))


def assert_same_on_both_paths(program, x, chunk_size=250):
    text = torchscript_source(program, chunk_size)
    for value in (x.abs(), -x.abs()):
        assert_same(program, value, chunk_size=chunk_size)
    return text


@pytest.mark.parametrize("chunk_size", [1, 3, 250])
def test_ifs_and_loops_nested_across_chunk_boundaries(chunk_size):
    def make(r, draft, x):
        def step(inner, number, a, b):
            return [True, b, r.branches(inner, r.is_positive(inner, a), [a], r.doubled, r.negated, [a])[0]]

        y = draft.call(aten.sigmoid.default, x)
        (z,) = r.branches(draft, r.is_positive(draft, x), [y], r.doubled, r.negated, [y])
        a, b = r.loop(draft, 3, [z, draft.call(aten.neg.default, y)], [], step)
        return [draft.call(aten.sub.Tensor, a, b), z]

    text = assert_same_on_both_paths(region_program(make), torch.ones(2, 3), chunk_size)
    assert "for count in range(3)" in text and "else:" in text


def test_a_loop_that_a_condition_ends_is_a_while():
    def make(r, draft, x):
        def step(inner, number, a):
            return [r.is_positive(inner, a), inner.call(aten.sub.Scalar, a, number)]

        return r.loop(draft, 9, [x], [], step)[0]

    assert "while goes_on and count < 9" in assert_same_on_both_paths(region_program(make), torch.ones(2, 3))


def test_a_constant_is_an_operand_of_a_region_and_of_one_in_it():
    """Constant folding puts it there."""

    def make(r, draft, x):
        def outer(inner, a, w):
            return r.branches(inner, r.is_positive(inner, a), [a, w], lambda d, a, w: [d.call(aten.mul.Tensor, a, w)],
                              lambda d, a, w: [w], [a])  # fmt: skip

        w = draft.constant("layer.weight", torch.full((2, 3), 3.0))
        return r.branches(draft, r.is_positive(draft, x), [x, w], outer, lambda d, a, w: [w], [x])[0]

    assert "self.layer.weight" in assert_same_on_both_paths(region_program(make), torch.ones(2, 3))


def test_a_dead_write_in_a_region_that_may_raise_is_not_taken_for_a_misreading():
    def make(r, draft, x):
        def write(inner, a):
            inner.call(aten.add_.Scalar, a, 1)
            return []

        a = draft.call(aten.cos.default, x)
        r.branches(draft, r.is_positive(draft, x), [a], write, lambda d, a: d.call(r.fail, "negative") and [], [])
        return draft.call(aten.neg.default, x)

    program = region_program(make)
    x = torch.ones(2, 3)
    assert_same(program, x)
    with pytest.raises(Exception, match="negative"):
        emit(program)(-x)


def test_a_call_in_a_region_that_is_read_differently_is_refused(monkeypatch):
    program = region_program(lambda r, d, x: r.branches(d, r.is_positive(d, x), [x], r.doubled, r.negated, [x])[0])
    original = statements.call_text

    def misread(node, target, variables):
        return original(node, target, variables).replace("aten.mul(", "aten.add(")

    monkeypatch.setattr(statements, "call_text", misread)
    with pytest.raises(EmitError, match=r"aten::add"):
        emit(program)
