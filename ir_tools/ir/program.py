"""`Program`: a `torch.fx` graph held to the dialect, its table of constants, and the model's call signature.

A Program is the outermost `Block`. The body of a region is seen as a Block too (`Block.of_body`), over the same table, so
that whatever works on a graph works on a branch or a loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ir_tools.ir.alias_analysis import effects_of, mutated_values
from ir_tools.ir.constant_table import ConstantTable
from ir_tools.ir.dialect import map_argument
from ir_tools.ir.effects import is_random, live_nodes
from ir_tools.ir.host import meaning
from ir_tools.ir.inference_mode import InferenceMode
from ir_tools.ir.prepack import is_prepack, take_prepacks_out
from ir_tools.ir.provenance import Provenance
from ir_tools.ir.regions import NOBODY, Body, Outside, all_nodes, is_region, region_if, region_loop
from ir_tools.ir.signature import Signature


@dataclass
class Block:
    """A graph and the table that it reads.

    - `graph`: `placeholder`, `get_attr` into `constants`, `call_function`, one `output` with a tuple of values.
    - `constants`: name -> tensor, one table for all blocks of a Program. Names are the user's parameter paths; a constant that
      a pass made is named `<path>@<pass>`. Tensors are detached aliases of the user's, and shared storage is one entry.
    - `name`: what the names of nodes in a body begin with, so that they are unique in the whole Program.
    - `outside`: for a body, what is done to its inputs and results around it.
    """

    graph: fx.Graph
    constants: ConstantTable = field(default_factory=ConstantTable)
    mode: InferenceMode = field(default_factory=InferenceMode)
    name: str = ""
    outside: Outside = NOBODY

    # -- reading ------------------------------------------------------------------------------------------------------

    @property
    def state(self) -> frozenset[str]:
        """Names of constants that the model itself writes into (a counter buffer)."""
        return self.constants.state

    @state.setter
    def state(self, names: frozenset[str]) -> None:
        self.constants.state = names

    @property
    def nodes(self) -> list[fx.Node]:
        return list(self.graph.nodes)

    @property
    def placeholders(self) -> list[fx.Node]:
        return self.graph.find_nodes(op="placeholder")

    @property
    def output(self) -> fx.Node:
        return self.graph.output_node()

    @property
    def calls(self) -> list[fx.Node]:
        """The nodes that compute, in order of execution; a region is one of them."""
        return [n for n in self.graph.nodes if n.op == "call_function"]

    @property
    def mutated_values(self) -> frozenset[fx.Node]:
        """Every value that may be written into or changed: passes leave these alone."""
        return mutated_values(self.graph, self.outside)

    @property
    def all_calls(self) -> list[fx.Node]:
        """`calls`, and those in the bodies of regions, each region before what is in it."""
        return [n for n in all_nodes(self.graph) if n.op == "call_function"]

    def __len__(self) -> int:
        """How many ops run in a call: prepack ops do not."""
        return sum(not is_prepack(node) for node in self.all_calls)

    @property
    def provenance(self) -> Provenance:
        """Where the ops came from, those in bodies included."""
        return Provenance(self.graph)

    @property
    def layout_is_observable(self) -> bool:
        """Memory layouts affect the numbers: something is written in place, which views of it see, or random numbers are drawn,
        which fill memory in its order."""
        return bool(self.mutated_values) or any(is_random(node) for node in self.calls)

    def constant(self, value: Any) -> torch.Tensor | None:
        """The tensor behind a `get_attr` node, None for anything that is known only at run time (state included)."""
        if isinstance(value, fx.Node) and value.op == "get_attr" and value.target not in self.state:
            return self.constants[str(value.target)]
        return None

    def __str__(self) -> str:
        return str(self.graph)

    # -- running ------------------------------------------------------------------------------------------------------

    def run(self, *inputs: Any, watch: Watch | None = None) -> list[Any]:
        """Run the graph node by node, without gradients. State is copied first, so a run leaves no trace.

        `watch(node, value)` sees each live value as it is computed, those in the bodies of regions once per round.
        """
        return run_graph(self.graph, inputs, self._loader(), watch)

    def trace_values(self, *inputs: Any) -> Iterator[tuple[fx.Node, Any]]:
        """Run the graph and yield (node, value) for each live node; values are dropped after their last user.

        Raises `TypeError` when the number of inputs is another.
        """
        return trace_graph(self.graph, inputs, self._loader())

    def _loader(self) -> Callable[[str], torch.Tensor]:
        """What `get_attr` reads during one run: the constants, and one copy of each state."""
        state: dict[str, torch.Tensor] = {}

        def load(name: str) -> torch.Tensor:
            tensor = self.constants[name]
            if name in self.state:
                return state.setdefault(name, tensor.clone())
            return tensor

        return load

    # -- bodies of regions --------------------------------------------------------------------------------------------

    def of_body(self, body: Body, outside: Outside = NOBODY) -> Block:
        """The body of a region as a Block over the table of this one."""
        return Block(body.graph, self.constants, self.mode, body.name, outside)

    # -- copying ------------------------------------------------------------------------------------------------------

    def copy(self) -> Block:
        """A Block with its own graph, which adds constants to a table of its own; tensors and bodies are shared. Names stay."""
        return Block(self._copied_graph(), self.constants.child(), self.mode, self.name, self.outside)

    def _copied_graph(self) -> fx.Graph:
        graph = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            mapping[node] = graph.node_copy(node, mapping.__getitem__)
        return graph

    def used_constants(self) -> list[str]:
        """Names of the constants that the graph or a body in it reads, in order of first appearance."""
        names = (str(n.target) for n in all_nodes(self.graph) if n.op == "get_attr" and n.users)
        return list(dict.fromkeys(names))


@dataclass
class Program(Block):
    """One model: a Block with the call signature, which says how the model is called and which sizes are baked in."""

    signature: Signature = field(kw_only=True)
    frontend: str = field(default="", kw_only=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the Program as the user calls the model."""
        inputs = self.signature.flatten(args, kwargs)
        self.signature.check(inputs)
        return self.signature.unflatten_outputs(self.run(*inputs))

    def graph_module(self) -> fx.GraphModule:
        """An ordinary GraphModule over flat tensors, for the ecosystem's tools; the graph and constants are copies.

        A region calls its bodies, which are submodules.
        """
        return _graph_module(self.copy(), self._loader())

    def copy(self) -> Program:
        return Program(
            self._copied_graph(), self.constants.copy(), self.mode, signature=self.signature, frontend=self.frontend
        )


Load = Callable[[str], torch.Tensor]
Watch = Callable[[fx.Node, Any], None]


def run_graph(graph: fx.Graph, inputs: Sequence[Any], load: Load, watch: Watch | None = None) -> list[Any]:
    """The results of a graph on `inputs`, one per placeholder; `load(name)` gives the constants, `watch` sees all values."""
    results: list[Any] = []
    for node, value in trace_graph(graph, inputs, load, watch):
        if watch is not None:
            watch(node, value)
        if node.op == "output":
            results = value
    return results


def trace_graph(
    graph: fx.Graph, inputs: Sequence[Any], load: Load, watch: Watch | None = None
) -> Iterator[tuple[fx.Node, Any]]:
    """Run `graph` and yield (node, value) for each live node; values are dropped after their last user.

    `watch` sees the values in the bodies of regions, which are not yielded.
    """
    placeholders = len(graph.find_nodes(op="placeholder"))
    if len(inputs) != placeholders:
        raise TypeError(f"the graph takes {placeholders} inputs, got {len(inputs)}")
    live = live_nodes(graph)
    last_user: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node in live:
            for n in node.all_input_nodes:
                last_user[n] = node
    dying: dict[fx.Node, list[fx.Node]] = {}
    for n, user in last_user.items():
        dying.setdefault(user, []).append(n)

    values: dict[fx.Node, Any] = {}
    feed = iter(inputs)

    def look_up(leaf: Any) -> Any:
        return values[leaf] if isinstance(leaf, fx.Node) else leaf

    def run_body(body: Body, given: list[Any]) -> list[Any]:
        return run_graph(body.graph, given, load, watch)

    with torch.no_grad():
        for node in graph.nodes:
            if node.op == "placeholder":
                values[node] = next(feed)
            elif node not in live:
                continue
            elif node.op == "get_attr":
                values[node] = load(str(node.target))
            elif node.op == "call_function":
                args = [map_argument(a, look_up) for a in node.args]
                kwargs = {k: map_argument(v, look_up) for k, v in node.kwargs.items()}
                if is_region(node):
                    kwargs["run"] = run_body
                function: Any = meaning(node.target) or node.target
                values[node] = function(*args, **kwargs)
            else:
                values[node] = [look_up(leaf) for leaf in node.args[0]]  # type: ignore[union-attr]
            yield node, values[node]
            for n in dying.get(node, ()):
                del values[n]


def _graph_module(block: Block, load: Load) -> fx.GraphModule:
    """A GraphModule of a copied block; constants, and what is prepacked, become buffers, bodies submodules."""
    root = torch.nn.Module()
    targets: dict[str, str] = {}
    prepacked = take_prepacks_out(block.graph, load)
    for node in list(block.graph.nodes):
        if node.op == "get_attr":
            name = str(node.target)
            if name not in targets:
                targets[name] = f"constant_{len(targets)}"
                root.register_buffer(targets[name], prepacked[name] if name in prepacked else load(name))
            node.target = targets[name]
        elif is_region(node):
            _take_bodies_out(block, node, root, load)
        elif meaning(node.target) is not None:
            node.target = meaning(node.target)
    return fx.GraphModule(root, block.graph)


def _take_bodies_out(block: Block, node: fx.Node, root: torch.nn.Module, load: Load) -> None:
    arguments: list[Any] = []
    with block.graph.inserting_before(node):
        for argument in node.args:
            if isinstance(argument, Body):
                name = f"body_{sum(1 for _ in root.children())}"
                root.add_module(name, _graph_module(block.of_body(argument).copy(), load))
                argument = block.graph.get_attr(name)
            arguments.append(argument)
    node.args = tuple(arguments)
    node.target = _OVER_MODULES[node.target]  # type: ignore[index]  # fx writes no function as an argument


def if_over_modules(condition: Any, then: fx.GraphModule, orelse: fx.GraphModule, operands: Sequence[Any]) -> list[Any]:
    """`region_if` in a `graph_module`."""
    return region_if(condition, then, orelse, operands, run=_run_module)  # type: ignore[arg-type]


def loop_over_modules(
    trips: Any, condition: Any, body: fx.GraphModule, carried: Sequence[Any], operands: Sequence[Any]
) -> list[Any]:
    """`region_loop` in a `graph_module`."""
    return region_loop(trips, condition, body, carried, operands, run=_run_module)  # type: ignore[arg-type]


_OVER_MODULES: dict[Any, Any] = {region_if: if_over_modules, region_loop: loop_over_modules}


def _run_module(module: Any, inputs: list[Any]) -> list[Any]:
    return list(module(*inputs))


def public_name(constant: str) -> str:
    """The user's parameter path behind a constant that passes may have rewritten."""
    return constant.split("@", 1)[0]


def body_of(block: Block, carried: int = 0) -> Body:
    """A finished block as the body of a region; `carried` is the number of values that a loop passes from round to round."""
    return Body(block.graph, effects_of(block.graph, carried), block.name)
