"""Programs for people: a text listing, DOT text, and SVG drawings."""

from ir_tools.visualize.dump import write_dump
from ir_tools.visualize.svg import draw_svg
from ir_tools.visualize.to_dot import to_dot
from ir_tools.visualize.to_text import to_text

__all__ = ["draw_svg", "to_dot", "to_text", "write_dump"]
