"""Where a node came from: the module that computes it, the source line, and the rules that made it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx


@dataclass(frozen=True)
class Origin:
    """`module` is the dotted path in the user's model ("" is the root), `source` is "file.py:12" or "".

    `keep_float`: the model switched autocast off there.
    """

    module: str = ""
    source: str = ""
    rules: tuple[str, ...] = ()
    keep_float: bool = False

    def made_by(self, rule: str) -> Origin:
        return replace(self, rules=(*self.rules, rule))


def origin(node: fx.Node) -> Origin:
    return node.meta.get("origin", Origin())


def set_origin(node: fx.Node, value: Origin) -> None:
    node.meta["origin"] = value


def place(node: fx.Node) -> str:
    """A name for people: the module path when known, else the node's own name."""
    return origin(node).module or node.name
