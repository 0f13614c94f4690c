"""Drawings and listings: what a reader must find in them, and that big graphs and missing tools do no harm."""

import inspect
import re
import shutil
import stat
import time

import pytest
import torch
from torch import fx
from torch.utils import _pytree as pytree

from ir_tools.ir import Draft, InputSpec, Origin, Packing, Program, Signature
from ir_tools.ir.signature import binder, split_leaves
from ir_tools.visualize import draw_svg, to_dot, to_text, write_dump

aten = torch.ops.aten
needs_dot = pytest.mark.skipif(shutil.which("dot") is None, reason="the graphviz program `dot` is not installed")


def start(*examples: torch.Tensor, outputs: int = 1) -> Draft:
    """An empty draft of a model called as `forward(x, y, …)`, with placeholders of the same names."""
    names = "xyz"[: len(examples)]
    bind = binder([inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names])
    leaves, in_tree = pytree.tree_flatten(bind(*examples))
    specs = tuple(InputSpec(n, tuple(t.shape), t.dtype) for n, t in zip(names, examples))
    out_leaves, _tensors = split_leaves([torch.zeros(1)] * outputs)
    out_tree = pytree.tree_structure([0] * outputs)
    signature = Signature(bind, tuple(names), specs, in_tree, split_leaves(leaves)[0], out_tree, out_leaves)
    draft = Draft(Program(fx.Graph(), signature=signature, frontend="export"))
    for name, example in zip(names, examples):
        draft.placeholder(name, example)
    return draft


def small() -> Program:
    """conv -> batch norm -> + x -> conv_act with a residual, in modules block.0.conv, block.0.bn and head."""
    draft = start(torch.randn(1, 4, 8, 8))
    (x,) = draft.program.placeholders
    with draft.origin(Origin("block.0.conv")):
        conv = draft.call(aten.conv2d.default, x, draft.constant("block.0.conv.weight", torch.randn(4, 4, 1, 1)))
    with draft.origin(Origin("block.0.bn")):
        statistics = [draft.constant(f"block.0.bn.{n}", torch.rand(4)) for n in ("weight", "bias", "mean", "var")]
        norm = draft.call(aten.batch_norm.default, conv, *statistics, False, 0.1, 1e-5, False)
    with draft.origin(Origin("block.0")):
        total = draft.call(aten.add.Tensor, norm, x)
    with draft.origin(Origin("head").made_by("fuse_conv_relu")):
        weight = draft.constant("head.weight@fuse_conv_bn", torch.randn(4, 4, 1, 1), packing=Packing("conv"))
        fused = draft.call(
            torch.ops.torch_passes.conv_act.default,
            total, weight, None, [1, 1], [0, 0], [1, 1], 1, x, "relu", [],
        )  # fmt: skip
    draft.output([fused])
    return draft.finish()


def chain(length: int) -> Program:
    draft = start(torch.randn(1, 2, 4, 4))
    (value,) = draft.program.placeholders
    skipped = value
    for i in range(length // 2):
        with draft.origin(Origin(f"blocks.{i // 20}.{i % 20}")):
            value = draft.call(aten.relu.default, value)
            value = draft.call(aten.add.Tensor, value, skipped)
        skipped = value if i % 10 == 0 else skipped
    draft.output([value])
    return draft.finish()


def box(dot: str, node: str) -> str:
    """The statement that writes one node."""
    (line,) = re.findall(rf"^\s*{node} \[.*$", dot, re.MULTILINE)
    return line


# -- text -------------------------------------------------------------------------------------------------------------


def test_listing_names_arguments_facts_and_modules():
    lines = to_text(small()).splitlines()
    assert lines[0] == "# 4 ops, 6 constants, captured by export"
    assert "input x : f32[1,4,8,8]" in lines
    assert "constant block.0.conv.weight : f32[4,4,1,1]" in lines
    assert "constant head.weight@fuse_conv_bn : f32[4,4,1,1]  # packed for oneDNN where it runs" in lines
    assert (
        "conv2d = conv2d(input=x, weight=block.0.conv.weight) : f32[1,4,8,8]  # block.0.conv" in lines
    )  # stride, padding, dilation, groups and bias have their defaults
    assert lines[-1] == "return conv_act"


def test_listing_shows_arguments_that_differ_from_their_default():
    draft = start(torch.randn(1, 4, 8, 8))
    (x,) = draft.program.placeholders
    weight = draft.constant("w", torch.randn(4, 2, 3, 3))
    draft.output([draft.call(aten.conv2d.default, x, weight, None, [2, 2], [1, 1], [1, 1], 2)])
    text = to_text(draft.finish())
    assert "conv2d(input=x, weight=w, stride=[2, 2], padding=[1, 1], groups=2)" in text
    assert "dilation" not in text


def test_listing_says_when_a_fact_is_unknown():
    draft = start(torch.randn(3))
    (x,) = draft.program.placeholders
    node = draft.call(aten.relu.default, x)
    node.meta["val"] = None
    draft.output([node])
    assert "relu = relu(self=x) : ?" in to_text(draft.finish())


# -- DOT --------------------------------------------------------------------------------------------------------------


def test_boxes_hold_op_name_fact_and_constants():
    dot = to_dot(small(), title="a title")
    assert 'label="a title"' in dot
    assert r'label="conv2d\nf32[1,4,8,8]\nblock.0.conv.weight f32[4,4,1,1]\l"' in box(dot, "conv2d")
    assert r"mean f32[4]" in box(dot, "batch_norm")
    fused = box(dot, "conv_act")
    assert "conv_act (+residual, relu)" in fused
    assert r"w: head.weight@fuse_conv_bn f32[4,4,1,1] packed\l" in fused
    assert "made by fuse_conv_relu" in fused  # in the tooltip
    assert r'label="input\nx\nf32[1,4,8,8]"' in dot and "invhouse" in dot
    assert r'label="output\nf32[1,4,8,8]"' in dot


def test_constants_are_not_boxes():
    program = small()
    dot = to_dot(program)
    for node in program.graph.find_nodes(op="get_attr"):
        assert not re.search(rf"^\s*{node.name} ", dot, re.MULTILINE)
    assert set(re.findall(r"^\s*(\w+) -> (\w+)", dot, re.MULTILINE)) == {
        ("x", "conv2d"), ("conv2d", "batch_norm"), ("batch_norm", "add"), ("x", "add"), ("add", "conv_act"),
        ("x", "conv_act"), ("conv_act", "output"),
    }  # fmt: skip


def test_arrows_are_labelled_where_operands_could_be_confused():
    dot = to_dot(small())
    assert re.search(r"x -> conv_act \[label=residual\]", dot)
    assert re.search(r"x -> conv2d$", dot, re.MULTILINE)
    assert re.search(r"x -> add$", dot, re.MULTILINE)


def test_kinds_have_their_colours_and_a_legend_of_those_present():
    dot = to_dot(small())
    colours = {n: re.search(r'fillcolor="(#\w+)"', box(dot, n))[1] for n in ("conv2d", "batch_norm", "add", "conv_act")}
    assert len(set(colours.values())) == 4
    assert "fused: op, residual and activation in one" in dot
    assert "quantisation" not in dot


def test_new_nodes_stand_out():
    program = small()
    dot = to_dot(program, new_nodes={"conv_act"})
    assert "penwidth=3" in box(dot, "conv_act")
    assert "penwidth" not in box(dot, "conv2d")
    assert "made by this pass" in dot
    assert "made by this pass" not in to_dot(program)


def test_modules_are_framed_once_and_only_where_there_is_something_to_frame():
    frames = re.findall(r"label=\"?(block[\w.]*)\"?", to_dot(small()))
    assert frames == ["block.0"]  # not `block` around it, not `block.0.conv` inside it


def test_a_single_box_gets_no_frame():
    draft = start(torch.randn(3))
    (value,) = draft.program.placeholders
    for module in ("lonely.relu", "pair.first", "pair.last"):
        with draft.origin(Origin(module)):
            value = draft.call(aten.relu.default, value)
    draft.output([value])
    assert re.findall(r"label=(lonely|pair)\b", to_dot(draft.finish())) == ["pair"]


def test_a_module_that_is_called_again_gets_a_second_frame():
    draft = start(torch.randn(3))
    (value,) = draft.program.placeholders
    for module in ("a", "b", "a"):
        for inner in ("first", "last"):
            with draft.origin(Origin(f"{module}.{inner}")):
                value = draft.call(aten.relu.default, value)
    draft.output([value])
    dot = to_dot(draft.finish())
    assert re.findall(r"label=(\w)\b", dot) == ["a", "b", "a"]
    names = re.findall(r'subgraph "([^"]+)"', dot)
    assert len(set(names)) == 3  # graphviz merges clusters of one name


def test_text_that_dot_could_misread_is_escaped(tmp_path):
    draft = start(torch.randn(3))
    (x,) = draft.program.placeholders
    weight = draft.constant('a"b\\n<c>', torch.randn(3))
    draft.output([draft.call(aten.mul.Tensor, x, weight)])
    dot = to_dot(draft.finish(), title="<not html>")
    assert 'label="<not html>"' in dot
    assert r"other: a\"b\\n<c> f32[3]" in dot
    if shutil.which("dot"):
        assert draw_svg(dot, tmp_path / "graph.svg") is None
        assert "other: a&quot;b\\n&lt;c&gt; f32[3]" in (tmp_path / "graph.svg").read_text()


def test_several_outputs_are_numbered():
    draft = start(torch.randn(3), outputs=2)
    (x,) = draft.program.placeholders
    draft.output([draft.call(aten.relu.default, x), draft.call(aten.sigmoid.default, x)])
    dot = to_dot(draft.finish())
    assert "relu -> output [label=0]" in dot
    assert "sigmoid -> output [label=1]" in dot


def test_writing_takes_time_linear_in_the_graph():
    def seconds(program: Program) -> float:
        def once() -> float:
            start_time = time.perf_counter()
            text = to_dot(program) + to_text(program)
            assert len(text) < 500 * len(program)
            return time.perf_counter() - start_time

        return min(once() for _ in range(3))

    seconds(chain(100))  # fills the caches of schema look-ups
    assert seconds(chain(4000)) < 8 * 3 * seconds(chain(500))  # a quadratic writer would take 64 times as long


# -- SVG and dumps ----------------------------------------------------------------------------------------------------


@needs_dot
def test_svg_is_drawn(tmp_path):
    path = tmp_path / "graph.svg"
    assert draw_svg(to_dot(small()), path) is None
    text = path.read_text()
    assert text.startswith("<?xml") and "conv_act (+residual, relu)" in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["graph.svg"]


def fake_dot(tmp_path, monkeypatch, script: str) -> None:
    """Put a program called `dot` first on the PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "dot"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_missing_dot_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    reason = draw_svg(to_dot(small()), tmp_path / "graph.svg")
    assert reason == "graphviz program `dot` not found: DOT files are written, no SVG"
    assert not list(tmp_path.iterdir())


def test_slow_dot_is_stopped_and_leaves_nothing(tmp_path, monkeypatch):
    fake_dot(tmp_path, monkeypatch, "echo '<svg'; exec sleep 60")
    started = time.perf_counter()
    reason = draw_svg("digraph {}", tmp_path / "graph.svg", timeout=0.5)
    assert time.perf_counter() - started < 10
    assert reason == "graphviz `dot` needed more than 0.5 s for graph.svg: the DOT file is written, no SVG"
    assert not list(tmp_path.glob("*graph*"))


def test_failing_dot_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    fake_dot(tmp_path, monkeypatch, "echo '<svg'; echo 'no svg plugin' >&2; echo more >&2; exit 3")
    reason = draw_svg("digraph {}", tmp_path / "graph.svg")
    assert reason == "graphviz `dot` failed (no svg plugin): the DOT file is written, no SVG"
    assert not list(tmp_path.glob("*graph*"))


@needs_dot
def test_unwritable_svg_raises_and_leaves_nothing(tmp_path):
    with pytest.raises(OSError):
        draw_svg("digraph {}", tmp_path / "missing" / "graph.svg")
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        draw_svg("digraph {}", tmp_path / "taken")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


@needs_dot
def test_dump_writes_numbered_files_and_marks_what_is_new(tmp_path):
    before = small()
    draft = Draft.of(before)
    old = next(n for n in draft.program.calls if n.name == "add")
    with draft.before(old, "a_pass"):
        new = draft.call(aten.sub.Tensor, *old.args[:2])
    draft.redirect(old, new)
    after = draft.finish()
    paths = write_dump(after, tmp_path / "deep" / "dumps", 3, "a_pass", before)
    assert [p.name for p in paths] == ["03-a_pass.dot", "03-a_pass.svg"]
    dot = paths[0].read_text()
    assert "03-a_pass: 4 ops (4 before, 1 new)" in dot
    assert "penwidth=3" in box(dot, "sub")
    assert "penwidth" not in box(dot, "conv2d")


def test_dump_of_an_unchanged_program_says_so(tmp_path):
    program = small()
    paths = write_dump(program, tmp_path, 1, "a_pass", program)
    assert "01-a_pass: 4 ops (unchanged)" in paths[0].read_text()


def test_dump_without_dot_still_writes_dot_text_and_tells_why(tmp_path, monkeypatch):
    (tmp_path / "00-capture.svg").write_text("an old drawing of another graph")
    monkeypatch.setenv("PATH", str(tmp_path))
    told: list[str] = []
    paths = write_dump(small(), tmp_path, 0, "capture", tell=told.append)
    assert [p.name for p in paths] == ["00-capture.dot"] == [p.name for p in tmp_path.iterdir()]
    assert told == ["graphviz program `dot` not found: DOT files are written, no SVG"]


@needs_dot
def test_a_graph_of_thousands_of_nodes_is_drawn_or_given_up_within_the_bound(tmp_path):
    started = time.perf_counter()
    reason = draw_svg(to_dot(chain(3000)), tmp_path / "big.svg", timeout=20)
    assert time.perf_counter() - started < 25
    assert (reason is None) == (tmp_path / "big.svg").exists()
