"""`Program`: a `torch.fx` graph held to the dialect, its table of constants, and the model's call signature."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from ir_tools.ir.dialect import map_argument
from ir_tools.ir.facts import live_nodes
from ir_tools.ir.signature import Signature


@dataclass(frozen=True)
class Packing:
    """How oneDNN wants a weight laid out in memory. The constant itself stays plain; it is packed where it is run.

    `kind` is "conv" or "linear". `input_size` (conv) and `batch` (linear) are hints for choosing the layout.
    """

    kind: str
    padding: Sequence[int] = ()
    stride: Sequence[int] = ()
    dilation: Sequence[int] = ()
    groups: int = 1
    input_size: tuple[int, ...] | None = None
    batch: int | None = None

    def __post_init__(self) -> None:
        for name in ("padding", "stride", "dilation"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """The packed, opaque copy of a plain `weight`."""
        ops = torch.ops.mkldnn
        if self.kind == "linear":
            return ops._reorder_linear_weight(weight, self.batch)
        return ops._reorder_convolution_weight(
            weight, self.padding, self.stride, self.dilation, self.groups, self.input_size
        )


@dataclass
class Program:
    """One model as one graph.

    - `graph`: `placeholder`, `get_attr` into `constants`, `call_function`, one `output` with a tuple of values.
    - `constants`: name -> tensor. Names are the user's parameter paths; a constant that a pass made is named
      `<path>@<pass>`. Tensors are detached aliases of the user's, and shared storage is one entry.
    - `state`: names of constants that the model itself writes into (a counter buffer).
    - `packings`: constants that are packed for oneDNN where they run.
    - `signature`: how the model is called, and which sizes are baked in.
    """

    graph: fx.Graph
    signature: Signature
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    state: frozenset[str] = frozenset()
    packings: dict[str, Packing] = field(default_factory=dict)
    mode: FakeTensorMode = field(default_factory=lambda: FakeTensorMode(allow_non_fake_inputs=False))
    frontend: str = ""

    # -- reading ------------------------------------------------------------------------------------------------------

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
        """The nodes that compute, in order of execution."""
        return [n for n in self.graph.nodes if n.op == "call_function"]

    def __len__(self) -> int:
        return len(self.calls)

    def constant(self, value: Any) -> torch.Tensor | None:
        """The tensor behind a `get_attr` node, None for anything that is known only at run time (state included)."""
        if isinstance(value, fx.Node) and value.op == "get_attr" and value.target not in self.state:
            return self.constants[str(value.target)]
        return None

    def __str__(self) -> str:
        return str(self.graph)

    # -- running ------------------------------------------------------------------------------------------------------

    def run(self, *inputs: torch.Tensor) -> list[Any]:
        """Run the graph node by node, without gradients. State is copied first, so a run leaves no trace."""
        outputs: list[Any] = []
        for node, value in self.trace_values(*inputs):
            if node.op == "output":
                outputs = value
        return outputs

    def trace_values(self, *inputs: torch.Tensor) -> Iterator[tuple[fx.Node, Any]]:
        """Run the graph and yield (node, value) for each live node; values are dropped after their last reader."""
        if len(inputs) != len(self.placeholders):
            raise TypeError(f"the Program takes {len(self.placeholders)} tensors, got {len(inputs)}")
        live = live_nodes(self.graph)
        last_reader: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            if node in live:
                for n in node.all_input_nodes:
                    last_reader[n] = node
        dying: dict[fx.Node, list[fx.Node]] = {}
        for n, reader in last_reader.items():
            dying.setdefault(reader, []).append(n)

        values: dict[fx.Node, Any] = {}
        feed = iter(inputs)

        def look_up(leaf: Any) -> Any:
            return values[leaf] if isinstance(leaf, fx.Node) else leaf

        with torch.no_grad():
            for node in self.graph.nodes:
                if node.op == "placeholder":
                    values[node] = next(feed)
                elif node not in live:
                    continue
                elif node.op == "get_attr":
                    values[node] = self._load(str(node.target))
                elif node.op == "call_function":
                    args = [map_argument(a, look_up) for a in node.args]
                    values[node] = node.target(*args, **{k: map_argument(v, look_up) for k, v in node.kwargs.items()})  # type: ignore[operator]
                else:
                    values[node] = [look_up(leaf) for leaf in node.args[0]]  # type: ignore[union-attr]
                yield node, values[node]
                for n in dying.get(node, ()):
                    del values[n]

    def _load(self, name: str) -> torch.Tensor:
        tensor = self.constants[name]
        if name in self.state:
            return tensor.clone()
        return self.packings[name].apply(tensor) if name in self.packings else tensor

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the Program as the user calls the model."""
        inputs = self.signature.flatten(args, kwargs)
        self.signature.check(inputs)
        return self.signature.unflatten_outputs(self.run(*inputs))

    def graph_module(self) -> fx.GraphModule:
        """An ordinary GraphModule over flat tensors, for the ecosystem's tools; the graph and constants are copies."""
        copy = self.copy()
        root = torch.nn.Module()
        targets = {name: f"constant_{i}" for i, name in enumerate(copy.constants)}
        for name, attribute in targets.items():
            root.register_buffer(attribute, copy._load(name))
        for node in copy.graph.nodes:
            if node.op == "get_attr":
                node.target = targets[node.target]
        return fx.GraphModule(root, copy.graph)

    # -- copying ------------------------------------------------------------------------------------------------------

    def copy(self) -> Program:
        """A Program with its own graph and tables; tensors are shared. Node names stay."""
        graph = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            mapping[node] = graph.node_copy(node, mapping.__getitem__)
        return Program(
            graph=graph,
            signature=self.signature,
            constants=dict(self.constants),
            state=self.state,
            packings=dict(self.packings),
            mode=self.mode,
            frontend=self.frontend,
        )

    def used_constants(self) -> list[str]:
        """Names of the constants that the graph reads, in order of first appearance."""
        names = (str(n.target) for n in self.graph.nodes if n.op == "get_attr" and n.users)
        return list(dict.fromkeys(names))


def public_name(constant: str) -> str:
    """The user's parameter path behind a constant that passes may have rewritten."""
    return constant.split("@", 1)[0]
