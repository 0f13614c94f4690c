"""Drawings and listings: what a reader must find in them, and that big graphs and missing tools do no harm."""

import inspect
import re
import shutil
import stat
import time

import pytest
import torch
from torch import fx
from torch.export import Dim

from ir_tools.frontends.capture import capture
from ir_tools.frontends.source import prepare
from ir_tools.ir import Draft, InputSpec, Origin, Packing, Program, Signature
from ir_tools.ir.dialect import short_name
from ir_tools.ir.regions import region_if
from ir_tools.ir.signature import binder, split_leaves
from ir_tools.torch_compat import pytree
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


# -- control flow and dynamic sizes -----------------------------------------------------------------------------------


def captured(model: torch.nn.Module, *args: torch.Tensor, sizes=None) -> Program:
    return capture(prepare(model.eval(), [(args, {})], sizes), "script").program


class Branches(torch.nn.Module):
    """An if in a loop, a list that the loop fills, and a result that one branch gives as a literal."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        factor = 1.0
        while len(seen) < 3 and bool(x.sum() > 0):
            if bool(x.mean() > 1):
                x = self.conv(x)
                factor = float(x.max())
            else:
                x = x - 1
                factor = 0.25
            seen.append(x)
        return x * factor + len(seen)


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


def test_listing_indents_what_a_loop_and_its_ifs_run():
    text = to_text(captured(Branches(), torch.rand(1, 2, 3, 3)))
    shape = r"f32\[1,2,3,3\]"
    loop = re.search(rf"^loop while \w+:  # region_loop\n((?:    .*\n)+)result (\w+) = (\w+) : {shape}$", text, re.MULTILINE)
    carried = re.search(rf"^    carried {loop[3]} = x : {shape}$", loop[1], re.MULTILINE)
    assert carried and re.search(rf"^    next {loop[3]} = \w+$", loop[1], re.MULTILINE)
    assert re.search(r"^    again while \w+$", loop[1], re.MULTILINE)
    inside = r"((?: {12}.*\n)+)"
    branch = re.search(rf"^    if \w+:  # \w+\n        then:\n{inside}        else:\n{inside}", loop[1], re.MULTILINE)
    assert "constant conv.weight : f32[2,2,1,1]" in branch[1] and "conv2d(" in branch[1]
    assert re.search(r"result \w+ = 0.25 : float", branch[2]) and "sub(" in branch[2]
    assert text.count("conv2d(") == 1


def test_listing_gives_host_values_by_their_type():
    text = to_text(captured(Branches(), torch.rand(1, 2, 3, 3)))
    assert re.search(r"^make_list = make_list\(\) : List\[f32\[1,2,3,3\]\]$", text, re.MULTILINE)
    assert re.search(r"= len\(a=\w+\) : int$", text, re.MULTILINE)
    assert re.search(r"= Bool\(a=\w+\) : bool$", text, re.MULTILINE)


class Sizes(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        doubled = torch.nn.functional.max_pool2d(torch.cat([x, x]), 2, 1)
        chosen = x[x > 0]
        return doubled.sum() * (chosen.sum() + x.size(0))


def test_sizes_go_by_the_names_that_the_user_gave():
    sizes = {"x": {0: Dim("batch"), 2: Dim("height", min=4, max=64)}}
    program = captured(Sizes(), torch.rand(3, 2, 5, 6), sizes=sizes)
    text = to_text(program)
    assert "# size batch: 1 or more\n# size height: 4 or more, 64 at most\n" in text
    assert "input x : f32[batch,2,height,6]" in text
    assert "f32[2*batch,2,height - 1,5]" in text
    assert "size = size(self=x, dim=0) : int = batch" in text
    assert re.search(r"= index\(.*\) : f32\[\?\]", text)  # as many as the data say
    for drawn in (text, to_dot(program)):
        assert "f32[2*batch,2,height - 1,5]" in drawn
        assert not re.search(r"\b[su]\d+\b", drawn)


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


def test_new_nodes_stand_out_in_bodies(tmp_path):
    before = captured(Branches(), torch.rand(1, 2, 3, 3))

    def negate_for_sub(block):
        draft = Draft.of(block)
        for node in draft.program.calls:
            if node.target is aten.sub.Tensor or node.target is aten.sub.Scalar:
                with draft.before(node, "a_pass"):
                    new = draft.call(aten.neg.default, node.args[0])
                draft.redirect(node, new)
        draft.change_bodies(negate_for_sub)
        return draft.finish()

    after = negate_for_sub(before)
    dot = write_dump(after, tmp_path, 1, "a_pass", before)[0].read_text()
    (new,) = (n for n in after.all_calls if n.target is aten.neg.default)
    assert "1 new)" in dot
    assert [line.split()[0] for line in dot.splitlines() if "penwidth=3" in line] == [new.name]


def test_a_region_that_lacks_its_bodies_is_drawn_as_a_box():
    draft = start(torch.randn(3))
    (x,) = draft.program.placeholders
    node = draft.graph.call_function(region_if, (x, x))
    draft.output([node])
    program = draft.finish()
    assert "region_if = region_if(" in to_text(program)
    assert box(to_dot(program), "region_if")


@needs_dot
def test_nested_regions_are_drawn(tmp_path):
    assert draw_svg(to_dot(captured(Branches(), torch.rand(1, 2, 3, 3))), tmp_path / "graph.svg") is None
    text = (tmp_path / "graph.svg").read_text()
    assert "each round" in text and text.count(">then<") >= 2
