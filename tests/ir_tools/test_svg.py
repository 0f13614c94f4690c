"""SVG drawings: that they are made, and that missing tools, big graphs and unwritable files do no harm."""

import stat
import time

import pytest
import torch

from ir_tools.visualize import draw_svg, to_dot
from tests.ir_tools.drawing import Branches, captured, chain, needs_dot, small


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
def test_a_graph_of_thousands_of_nodes_is_drawn_or_given_up_within_the_bound(tmp_path):
    started = time.perf_counter()
    reason = draw_svg(to_dot(chain(3000)), tmp_path / "big.svg", timeout=20)
    assert time.perf_counter() - started < 25
    assert (reason is None) == (tmp_path / "big.svg").exists()


@needs_dot
def test_nested_regions_are_drawn(tmp_path):
    assert draw_svg(to_dot(captured(Branches(), torch.rand(1, 2, 3, 3))), tmp_path / "graph.svg") is None
    text = (tmp_path / "graph.svg").read_text()
    assert "each round" in text and text.count(">then<") >= 2
