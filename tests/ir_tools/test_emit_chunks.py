"""Emitted chunks: what goes from one to the next, and how long they get."""

import time

import pytest
import torch

from ir_tools.emit.package import round_trip
from ir_tools.emit.to_torchscript import emit
from ir_tools.errors import EmitError
from ir_tools.ir.dialect import getitem
from tests.ir_tools.emitting import assert_same, aten, build, torchscript_source


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
        row = graph.call_function(aten.full.default, ([size], 1.5), dict.fromkeys(("dtype", "layout", "device", "pin_memory")))
        shifted = graph.call_function(aten.add.Scalar, (row, number, 1))
    program.output.args = ((row, shifted),)
    graph.erase_node(old)
    for module in (emit(program, 1), round_trip(emit(program, 2))):
        a, b = module(x)
        assert torch.equal(a, torch.full([2], 1.5)) and torch.equal(b, torch.full([2], 4.5))
    source = torchscript_source(program, 1)
    assert ": number" in source and "-> int" in source


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
            x = d.call(aten.add.Tensor, d.call(aten.sin.default, x), d.constant(f"layer{i // 10}.w{i % 10}", torch.randn(4)))
        return x

    program = build({"x": x}, body)
    start = time.perf_counter()
    scripted = emit(program)
    print(f"\n10,000 calls and 5,000 constants emitted in {time.perf_counter() - start:.1f} s")
    assert torch.equal(scripted(x), program(x))
    assert len([n for n in scripted._c._method_names() if n.startswith("_chunk_")]) == 40
