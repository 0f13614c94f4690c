"""Dumps: numbered drawings that mark what is new."""

import torch

from ir_tools.ir import Draft
from ir_tools.visualize import write_dump
from tests.ir_tools.drawing import Branches, aten, box, captured, needs_dot, small


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
    messages: list[str] = []
    paths = write_dump(small(), tmp_path, 0, "capture", tell=messages.append)
    assert [p.name for p in paths] == ["00-capture.dot"] == [p.name for p in tmp_path.iterdir()]
    assert messages == ["graphviz program `dot` not found: DOT files are written, no SVG"]


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
