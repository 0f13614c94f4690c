"""Listings: what must be found in them."""

import re

import torch
from torch.export import Dim

from ir_tools.ir import facts
from ir_tools.visualize import to_dot, to_text
from tests.ir_tools.drawing import Branches, aten, captured, small, start


def test_listing_names_arguments_facts_and_modules():
    lines = to_text(small()).splitlines()
    assert lines[0] == "# 4 ops, 6 constants, captured by export"
    assert "input x : f32[1,4,8,8]" in lines
    assert "constant block.0.conv.weight : f32[4,4,1,1]" in lines
    assert "constant head.weight@fuse_conv_bn : f32[4,4,1,1]" in lines
    assert any(line.startswith("prepack_conv = prepack_conv(w=head.weight@fuse_conv_bn, ") for line in lines)
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
    facts.set_fact(node, facts.UNKNOWN)
    draft.output([node])
    assert "relu = relu(self=x) : ?" in to_text(draft.finish())


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
