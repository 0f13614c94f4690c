"""Programs for people: a text listing, DOT text, and SVG drawings."""

from ir_tools.visualize.to_dot import draw_svg, to_dot, write_dump
from ir_tools.visualize.to_text import to_text

__all__ = ["draw_svg", "to_dot", "to_text", "write_dump"]
