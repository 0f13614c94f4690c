"""Drawings in DOT text: what must be found in them, in bodies of ifs and loops too."""

import re
import shutil
import time

import torch
from torch import fx

from ir_tools.ir import Program, Record
from ir_tools.ir.dialect import short_name
from ir_tools.ir.regions import region_if
from ir_tools.visualize import draw_svg, to_dot, to_text
from tests.ir_tools.drawing import Branches, aten, box, captured, chain, small, start


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
        with draft.origin(Record(module)):
            value = draft.call(aten.relu.default, value)
    draft.output([value])
    assert re.findall(r"label=(lonely|pair)\b", to_dot(draft.finish())) == ["pair"]


def test_a_module_that_is_called_again_gets_a_second_frame():
    draft = start(torch.randn(3))
    (value,) = draft.program.placeholders
    for module in ("a", "b", "a"):
        for inner in ("first", "last"):
            with draft.origin(Record(f"{module}.{inner}")):
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


def edges(dot: str) -> dict[tuple[str, str], str]:
    return {(a, b): rest for a, b, rest in re.findall(r"^\s*(\w+) -> (\w+)(.*)$", dot, re.MULTILINE)}


def within(dot: str, label: str) -> list[str]:
    """The text of each frame that bears a label, frames inside it included."""
    lines, found = dot.splitlines(), []
    for i, line in enumerate(lines):
        if re.search(rf'label="?{label}"?[ \]]', line) and "subgraph" in lines[i - 1]:
            depth, end = 1, i
            while depth:
                end += 1
                depth += lines[end].strip().endswith("{") - (lines[end].strip() == "}")
            found.append("\n".join(lines[i:end]))
    return found


def region(program: Program, name: str) -> fx.Node:
    return next(n for n in program.all_calls if short_name(n.target) == name)


def test_bodies_are_frames_and_arrows_lead_in_and_out():
    program = captured(Branches(), torch.rand(1, 2, 3, 3))
    dot = to_dot(program)
    (loop_frame,) = within(dot, "each round")
    assert [len(within(loop_frame, label)) for label in ("then", "else")] == [2, 2]  # the if, and the `and` of the loop
    found = edges(dot)
    loop = region(program, "region_loop")
    body = loop.args[2]
    for placeholder, given, following in zip(body.placeholders[1:], loop.args[3], body.results[1:]):
        if placeholder.users and isinstance(given, fx.Node):
            assert (given.name, placeholder.name) in found
        if placeholder.users and following is not placeholder:
            assert "dashed" in found[following.name, placeholder.name]
    assert 'label="again?"' in found[body.results[0].name, loop.name]
    conv = next(n for n in program.all_calls if n.target is aten.conv2d.default)
    (then,) = [frame for frame in within(dot, "then") if "conv.weight f32[2,2,1,1]" in frame]
    assert f"\t{conv.name} [" in then
    (result,) = {b for (a, b), style in found.items() if a == conv.name and "label=then" in style}
    assert f"{result} [" not in then
    assert "else: 0.25" in dot


def test_who_reads_a_list_after_a_loop_filled_it_is_drawn_behind_it():
    program = captured(Branches(), torch.rand(1, 2, 3, 3))
    append = next(n for n in program.all_calls if short_name(n.target) == "append")
    users = {b for (a, b), style in edges(to_dot(program)).items() if a == append.name and "dotted" in style}
    assert users & {n.name for n in program.calls if short_name(n.target) == "len"}


def test_a_region_that_lacks_its_bodies_is_drawn_as_a_box():
    draft = start(torch.randn(3))
    (x,) = draft.program.placeholders
    node = draft.graph.call_function(region_if, (x, x))
    draft.output([node])
    program = draft.finish()
    assert "region_if = region_if(" in to_text(program)
    assert box(to_dot(program), "region_if")
