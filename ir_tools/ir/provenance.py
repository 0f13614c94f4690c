"""Provenance: where each op came from, as records that refer to the records that they were made from.

    captured    conv2d `conv2d` at conv1          batch_norm `bn` at bn1          relu `relu` at relu
                        |                              |                              |
    fuse_conv_bn        +------------- conv2d ---------+                              |
    fuse_conv_relu                       +------------------- conv_act ---------------+
                                                                 |
    lower_onednn                                      _convolution_pointwise                at conv1

A record is made with its node and never changes, and a node's record goes where the node is copied. The table of a Program
(`Program.provenance`) is what its nodes, those in bodies included, reach; records that none of them reaches are forgotten
with the nodes. So a discarded draft leaves nothing, and no record of an earlier graph can be missing.

One op has one location, from capture to lowering: that of the captured op that it stands for. Of several, that is the one of
the same kind, else the matrix product or convolution, else the one at which it was built.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from torch import fx

from ir_tools.ir.dialect import short_name
from ir_tools.ir.regions import all_nodes

MATRIX_OPS = frozenset(
    "addbmm addmm addmv baddbmm bilinear bmm conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d dot "
    "einsum linear matmul mm mv scaled_dot_product_attention tensordot".split()
)
"""The ops that give an op that they were fused into its location: that is where the weights are."""

INPUT, CONSTANT = "an input", "a constant"
"""The `op` of records of what is no op."""


@dataclass(frozen=True, eq=False)
class Record:
    """Where one op came from. A captured op was made from nothing.

    - `name`, `op`: the node's name and its op when the record was made.
    - `module`: the dotted path in the user's model ("" is the root); of an op that a pass made, that of the op it was built at.
    - `source`: "file.py:12" or "". `keep_float`: the model switched autocast off there.
    - `index`: the op's number in the captured graph, in order of execution. `call`: 2 for the second op of its kind that the
      module computes, and so on.
    - `made_by`, `rewrite`: the pass that made it, and the id of the site. `made_from`: the records of the ops that it replaces,
      that at which it was built first.
    """

    module: str = ""
    source: str = ""
    keep_float: bool = False
    name: str = ""
    op: str = ""
    index: int = -1
    call: int = 1
    made_by: str = ""
    rewrite: str = ""
    made_from: tuple[Record, ...] = ()
    _stands_for: dict[str, Record] = field(init=False, repr=False)
    """Of each kind of captured op the first."""

    def __post_init__(self) -> None:
        found: dict[str, Record] = {} if self.made_from else {self.op: self}
        for record in self.made_from:
            for op, captured in record._stands_for.items():
                found.setdefault(op, captured)
        object.__setattr__(self, "_stands_for", found)

    def __repr__(self) -> str:
        return f"<{self.op} {self.name}{f' made by {self.made_by}' if self.made_by else ''}, {self.location}>"

    def at(self, name: str, op: str) -> Record:
        """The record of a node of this origin."""
        return replace(self, name=name, op=op)

    def derived(self, made_by: str, others: Iterable[Record] = (), rewrite: str = "") -> Record:
        """The record of what a pass makes at this one, from `others` too."""
        made_from = tuple(dict.fromkeys((self, *others)))
        return replace(self, made_by=made_by, rewrite=rewrite, made_from=made_from, index=-1, call=1)

    @property
    def captured(self) -> Record:
        """The captured op whose location is that of this one."""
        if self.op in self._stands_for:
            return self._stands_for[self.op]
        return next((r for op, r in self._stands_for.items() if op in MATRIX_OPS), next(iter(self._stands_for.values())))

    @property
    def location(self) -> str:
        """A name for people: `layer1.0.conv1`, `layer1.0.relu:2` for the second relu there, the node's name outside modules."""
        record = self.captured
        if not record.module:
            return record.name
        return record.module if record.call == 1 else f"{record.module}:{record.call}"

    @property
    def passes(self) -> tuple[str, ...]:
        """The passes that made the op and those that it was built at, earliest first."""
        names: list[str] = []
        record = self
        while record.made_from:
            names.append(record.made_by)
            record = record.made_from[0]
        return tuple(name for name in reversed(names) if name)

    def history(self) -> list[Record]:
        """This record and all that it goes back to, each behind those that it was made from."""
        found: dict[Record, None] = {}
        waiting = [(self, iter(self.made_from))]
        while waiting:
            record, sources = waiting[-1]
            source = next((s for s in sources if s not in found), None)
            if source is None:
                found[record] = None
                waiting.pop()
            else:
                waiting.append((source, iter(source.made_from)))
        return list(found)


UNKNOWN = Record()


class Provenance:
    """The provenance of a graph and the bodies in it, for questions about its nodes.

    >>> program.provenance.location(node)             # doctest: +SKIP
    'layer1.0.conv1'
    >>> program.provenance.modules(node)              # every module that computed a part of it
    ('layer1.0.conv1', 'layer1.0.bn1', 'layer1.0.relu')
    >>> program.provenance.made_by(node, "fuse_conv_relu")
    True
    """

    def __init__(self, graph: fx.Graph):
        self._graph = graph

    @property
    def records(self) -> list[Record]:
        """The table: every record that a node has or goes back to, each behind those that it was made from."""
        found: dict[Record, None] = {}
        for node in all_nodes(self._graph):
            if node.op in ("call_function", "get_attr") and record(node) not in found:
                found.update(dict.fromkeys(record(node).history()))
        return list(found)

    def location(self, node: fx.Node) -> str:
        """The one location of the node, the same from capture to lowering."""
        return location(node)

    def modules(self, node: fx.Node) -> tuple[str, ...]:
        """The paths of the modules that compute what the node does, in order of execution."""
        captured = sorted((r for r in record(node).history() if not r.made_from), key=lambda r: r.index)
        return tuple(dict.fromkeys(r.module for r in captured if r.module))

    def history(self, node: fx.Node) -> list[Record]:
        """The captured ops that the node comes from and the rewrites between, each behind what it was made from."""
        return record(node).history()

    def made_by(self, node: fx.Node, name: str) -> bool:
        """A pass of this name made the node, or the op that it was built at."""
        return name in record(node).passes


def record(node: fx.Node) -> Record:
    """The record of a node; an input's says nothing."""
    return node.meta.get("provenance", UNKNOWN)


def set_record(node: fx.Node, value: Record) -> None:
    node.meta["provenance"] = value


def stand_for(node: fx.Node, old: Iterable[fx.Node], made_by: str, rewrite: str = "") -> None:
    """From now on `node` stands for the ops `old` too; one that this rewrite has just made was made from them."""
    here = record(node)
    others = [record(n) for n in old if n.op == "call_function"]
    if here.made_by == made_by and here.made_from:
        set_record(node, replace(here, rewrite=rewrite, made_from=tuple(dict.fromkeys((*here.made_from, *others)))))
    else:
        set_record(node, here.derived(made_by, others, rewrite))


def location(node: fx.Node) -> str:
    """A name for people: where in the user's model the node comes from, or its own name."""
    return record(node).location or node.name


def locations(node: fx.Node) -> Iterator[str]:
    """What users may call an op: its name, the modules that it comes from, those around them, and what was fused into it."""
    yield node.name
    here = record(node)
    paths = [location(node)]
    for each in here.history():
        paths.append(each.location)
        if not each.made_from:
            paths.append(each.module)
        if each.op not in (here.op, INPUT, CONSTANT):
            paths.append(each.op)
    for path in filter(None, paths):
        yield from (".".join(path.split(".")[:n]) for n in range(1, path.count(".") + 2))


def number_calls(graph: fx.Graph) -> None:
    """Number the captured ops, and those of one module and kind; for a front end that has finished a graph."""
    counts: dict[tuple[str, str], int] = {}
    for index, node in enumerate(all_nodes(graph)):
        if node.op == "call_function":
            here = record(node)
            key = here.module, short_name(node.target)
            counts[key] = counts.get(key, 0) + 1
            set_record(node, replace(here, name=node.name, op=key[1], index=index, call=counts[key] if here.module else 1))
