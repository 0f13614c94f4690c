"""Constants and state in emitted modules: the user's paths, awkward names, the Program's own tensors."""

import torch

from ir_tools.emit.constants import place_constants
from ir_tools.emit.package import round_trip
from ir_tools.emit.to_torchscript import emit
from tests.ir_tools.emitting import assert_same, aten, build, unary


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
