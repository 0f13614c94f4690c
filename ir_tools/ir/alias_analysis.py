"""Alias analysis: which values of a graph may share storage, what is written into it, and what leaves the graph.

`effects` says what a single node may alias and write; here that is followed through a graph and its regions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from networkx.utils import UnionFind
from torch import fx

from ir_tools.ir.dialect import getitem, nodes_in
from ir_tools.ir.effects import PLAIN_TYPES, acts, aliased_nodes, changed_containers, is_random, written_nodes
from ir_tools.ir.host import is_container_type, value_type
from ir_tools.ir.regions import NOBODY, Effects, Outside, bodies, inputs_of, is_region, region_loop


def storage_classes(nodes: Iterable[fx.Node]) -> UnionFind:
    """Values grouped by "may share storage", with the names of constants whose memory they may have."""
    classes = UnionFind()
    for node in nodes:
        classes[node]
        for other in aliased_nodes(node):
            classes.union(node, other)
        for name in constants_seen(node, "escaping_constants"):
            classes.union(node, name)
    return classes


def constants_seen(node: fx.Node, which: str) -> frozenset[str]:
    """Names of constants: the one that a `get_attr` reads, those that a region's effects name under `which`."""
    if node.op == "get_attr":
        return frozenset({str(node.target)})
    if not is_region(node):
        return frozenset()
    return frozenset().union(*(getattr(body.effects, which) for body in bodies(node)))


class Memory:
    """Which values of a graph share storage, and which of that storage is written into, here or by `outside`.

    `written`, `changed`: the classes (roots in `classes`) of tensors written into, and of containers changed.
    """

    def __init__(self, graph: fx.Graph, outside: Outside = NOBODY):
        self.classes = storage_classes(graph.nodes)
        inputs = graph.find_nodes(op="placeholder")
        results: list[Any] = [v for n in graph.find_nodes(op="output") for v in n.args[0]]
        for placeholder, result in zip(inputs[1 : 1 + outside.carried], results[1:]):
            if isinstance(result, fx.Node):
                self.classes.union(placeholder, result)
        self.written = {self.classes[n] for n in _numbered(inputs, results, outside.written)}
        self.changed = {self.classes[n] for n in _numbered(inputs, results, outside.changed)}
        for node in graph.nodes:
            self.written |= {self.classes[n] for n in written_nodes(node)}
            self.changed |= {self.classes[n] for n in changed_containers(node)}
            if is_region(node):
                self.written |= {self.classes[name] for name in constants_seen(node, "written_constants")}

    def is_written(self, value: Any) -> bool:
        return self.classes[value] in self.written

    def is_changed(self, node: fx.Node) -> bool:
        return is_container_type(value_type(node)) and self.classes[node] in self.changed

    def reachable(self, graph: fx.Graph) -> frozenset[fx.Node]:
        """The values that can be reached when the graph is over: its results, and what it put into containers given to it."""
        held = [n for n in graph.find_nodes(op="placeholder") if self.is_changed(n)]
        roots = {self.classes[n] for output in graph.find_nodes(op="output") for n in (*nodes_in(output.args), *held)}
        return frozenset(n for n in graph.nodes if self.classes[n] in roots)

    def written_constants(self, graph: fx.Graph) -> frozenset[str]:
        """Names of the constants that are written into, by their own name or through an alias."""
        names: set[str] = set()
        for node in graph.nodes:
            names |= constants_seen(node, "written_constants") | constants_seen(node, "escaping_constants")
        return frozenset(name for name in names if self.is_written(name))


def _numbered(inputs: Sequence[fx.Node], results: Sequence[Any], numbers: frozenset[tuple[str, int]]) -> list[fx.Node]:
    given = {"input": inputs, "result": results}
    return [value for kind, i in numbers if isinstance(value := given[kind][i], fx.Node)]


def mutated_values(graph: fx.Graph, outside: Outside = NOBODY) -> frozenset[fx.Node]:
    """Every value that some node of the graph, or `outside` of it, may change: passes leave these alone."""
    if outside is NOBODY and not any(n.op == "call_function" and _writes(n) for n in graph.nodes):
        return frozenset()
    memory = Memory(graph, outside)
    return frozenset(n for n in graph.nodes if memory.is_written(n) or memory.is_changed(n))


def _writes(node: fx.Node) -> bool:
    return bool(written_nodes(node) or changed_containers(node) or constants_seen(node, "written_constants"))


def outside_of(node: fx.Node, memory: Memory) -> Outside:
    """What the graph around writes into the inputs and results of the bodies of the region `node`; `memory` is that graph's."""
    first = 1 if node.target is region_loop else 0  # a loop's result number 0 says whether it goes on
    reached: list[tuple[str, Any, fx.Node]] = []
    reached += [("input", i, n) for i, given in enumerate(inputs_of(node)) for n in nodes_in(given)]
    reached += [("result", first + user.args[1], user) for user in node.users if user.target is getitem]  # type: ignore[operator]
    carried = len(node.args[3]) if node.target is region_loop else 0  # type: ignore[arg-type]
    return Outside(
        written=frozenset((kind, i) for kind, i, n in reached if memory.is_written(n) and holds_memory(n)),
        changed=frozenset((kind, i) for kind, i, n in reached if memory.is_changed(n)),
        carried=carried,
    )


def effects_of(graph: fx.Graph, carried: int = 0) -> Effects:
    """What a body does to its inputs and to constants. A loop passes its last `carried` results to its next round."""
    memory = Memory(graph, Outside(carried=carried))
    placeholders = graph.find_nodes(op="placeholder")
    calls = [n for n in graph.nodes if n.op == "call_function"]
    changed = frozenset(i for i, p in enumerate(placeholders) if memory.is_changed(p))
    reachable = memory.reachable(graph)
    names = {name for n in reachable for name in constants_seen(n, "escaping_constants")}
    written_names = memory.written_constants(graph)
    return Effects(
        written=frozenset(i for i, p in enumerate(placeholders) if memory.is_written(p)),
        changed=changed,
        escaping=frozenset(i for i, p in enumerate(placeholders) if p in reachable and holds_memory(p)),
        written_constants=written_names,
        escaping_constants=frozenset(names),
        acts=bool(written_names) or any(acts(n) for n in calls),
        random=any(is_random(n) for n in calls),
    )


def holds_memory(value: fx.Node) -> bool:
    """The value is a tensor or may hold one; numbers and strings share nothing."""
    return value_type(value) not in PLAIN_TYPES


def dies_at(node: fx.Node, user: fx.Node) -> bool:
    """`user` reads `node` once and last, and no other value that is read from here on shares its memory."""
    if sum(n is node for n in nodes_in([*user.args, *user.kwargs.values()])) != 1:
        return False
    last = user
    while node.op == "call_function" and not constants_seen(node, "escaping_constants"):
        if any(user is not last and (user > last or node in aliased_nodes(user)) for user in node.users):
            return False
        sources = aliased_nodes(node)
        if not sources:
            return True
        if len(sources) > 1:
            return False
        # The memory is that of an earlier value (written in place, or viewed): that one must be dead by now too.
        last, node = node, sources[0]
    return False


def sharing(node: fx.Node) -> set[fx.Node]:
    """`node` and the values that may share storage with it, found from here: no other part of the graph is looked at."""
    found, waiting = {node}, [node]
    while waiting:
        here = waiting.pop()
        for other in (*aliased_nodes(here), *(user for user in here.users if here in aliased_nodes(user))):
            if other not in found:
                found.add(other)
                waiting.append(other)
    return found


def derived(node: fx.Node) -> set[fx.Node]:
    """`node` and the values that may get its memory from it: views of it, what holds it, and views of these."""
    found, waiting = {node}, [node]
    while waiting:
        here = waiting.pop()
        for user in here.users:
            if here in aliased_nodes(user):
                new = {user, *changed_containers(user)} - found
                found |= new
                waiting += new
    return found


def is_handed_out(values: Iterable[fx.Node]) -> bool:
    """The caller of the graph can see one of `values`: as an output, or in a container that it passed in."""
    return any(
        any(user.op == "output" for user in value.users)
        or (value.op == "placeholder" and is_container_type(value_type(value)))
        for value in values
    )


def is_own(values: Iterable[fx.Node]) -> bool:
    """None of `values` is an input or a constant, nor what a region may have taken from the table."""
    return all(value.op == "call_function" and not constants_seen(value, "escaping_constants") for value in values)


def can_stand_for(new: fx.Node, old: fx.Node) -> bool:
    """Where `new` is read in place of `old`, no two outputs share memory that did not, and no output that of an input.

    Whether either is written into is not checked here.
    """
    if not aliased_nodes(new) and new.op == "call_function" and not new.users:
        return True
    if _have_one_source(new, old) or not is_handed_out(derived(old)):
        return True
    group = sharing(new)
    return old in group or (is_own(group) and not is_handed_out(group))


def _have_one_source(one: fx.Node, other: fx.Node) -> bool:
    """Both may have the memory of some value. Usually that is near: both are followed by turns, and no farther than needed."""
    found: tuple[set[fx.Node], set[fx.Node]] = ({one}, {other})
    waiting = (deque([one]), deque([other]))
    if one is other:
        return True
    while waiting[0] or waiting[1]:
        for mine, theirs, queue in ((*found, waiting[0]), (*found[::-1], waiting[1])):
            for source in aliased_nodes(queue.popleft()) if queue else ():
                if source in theirs:
                    return True
                if source not in mine:
                    mine.add(source)
                    queue.append(source)
    return False
