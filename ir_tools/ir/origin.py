"""Where a node came from: the module that computes it, the source line, and the rules that made it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import fx

from ir_tools.ir.dialect import short_name


@dataclass(frozen=True)
class Origin:
    """`module` is the dotted path in the user's model ("" is the root), `source` is "file.py:12" or "".

    `keep_float`: the model switched autocast off there. `others`: modules and ops that the node stands for besides, having been
    fused with them, or found to be the same.
    """

    module: str = ""
    source: str = ""
    rules: tuple[str, ...] = ()
    keep_float: bool = False
    others: tuple[str, ...] = ()

    def made_by(self, rule: str) -> Origin:
        return replace(self, rules=(*self.rules, rule))


    def standing_for(self, names: Iterable[str]) -> Origin:
        return replace(self, others=tuple(sorted({*self.others, *names} - {"", self.module})))


def origin(node: fx.Node) -> Origin:
    return node.meta.get("origin", Origin())


def set_origin(node: fx.Node, value: Origin) -> None:
    node.meta["origin"] = value


def stand_for(node: fx.Node, old: Iterable[fx.Node]) -> None:
    """From now on `node` answers to the names of the ops `old`, too."""
    calls = [n for n in old if n.op == "call_function"]
    names = {name for n in calls for name in (origin(n).module, short_name(n.target), *origin(n).others)}
    set_origin(node, origin(node).standing_for(names))


def location(node: fx.Node) -> str:
    """A name for people: the module path when known, else the node's own name."""
    return origin(node).module or node.name
