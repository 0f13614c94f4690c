"""How emitted modules are called: the containers of arguments and outputs, and their names."""

import collections

import pytest
import torch

from ir_tools.emit.calling import arguments_for, emitted_arguments, flat_outputs, typed_outputs
from ir_tools.torch_compat import pytree
from tests.ir_tools.emitting import assert_same, aten, build

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
