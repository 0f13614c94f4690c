"""Programs that have no file: they hold ops that libtorch lacks, or writes that torch's optimiser of TorchScript drops."""

from __future__ import annotations

from torch import fx

from ir_tools.emit.hoisting import prepacks
from ir_tools.errors import EmitError
from ir_tools.ir.alias_analysis import storage_classes
from ir_tools.ir.dialect import DIALECT_ONLY, overload_name, short_name
from ir_tools.ir.effects import written_nodes
from ir_tools.ir.host import is_container_type, value_type
from ir_tools.ir.program import Program
from ir_tools.ir.provenance import location
from ir_tools.ir.regions import bodies, is_region

# Namespaces whose ops stock libtorch does not know: they have to be lowered first.
_NOT_IN_LIBTORCH = frozenset({"torch_passes", "quantized_decomposed"})


def refuse_what_libtorch_lacks(program: Program) -> None:
    """Raise EmitError for ops of the dialect, and of libraries that are not there when a file is loaded."""
    hoisted = set(prepacks(program))  # a file calls other ops in their place
    calls = [n for n in program.all_calls if n not in hoisted]
    left = [n for n in calls if n.target in DIALECT_ONLY or getattr(n.target, "namespace", "") in _NOT_IN_LIBTORCH]
    if left:
        ops = ", ".join(sorted({overload_name(n.target) for n in left}))
        raise EmitError(
            f"the Program still holds {ops} (first at {location(left[0])}), which stock torch does not know; "
            "run a lowering pass such as lower_aten first"
        )


def refuse_writes_into_lists(graph: fx.Graph) -> None:
    """Raise EmitError for a write into a tensor that a list or dict holds.

    torch 2.13's optimiser of TorchScript takes such a write for unread, and drops it from the second call on.
    """
    writers = [node for node in graph.nodes if node.op == "call_function" and written_nodes(node)]
    if writers:
        classes = storage_classes(graph.nodes)
        containers = [n for n in graph.nodes if n.op != "output" and not is_region(n) and is_container_type(value_type(n))]
        for writer in writers:
            written = {classes[target] for target in written_nodes(writer)}
            if any(classes[c] in written and _is_read_after(c, writer) for c in containers):
                raise EmitError(
                    f"{short_name(writer.target)} at {location(writer)} writes into a tensor that a list or dict holds; "
                    "torch's optimiser of TorchScript drops such writes. Put a new tensor into the list: xs[i] = f(xs[i])"
                )
    for node in graph.nodes:
        if is_region(node):
            for body in bodies(node):
                refuse_writes_into_lists(body.graph)


def _is_read_after(container: fx.Node, writer: fx.Node) -> bool:
    """Also when it came from outside, where it may be read later."""
    return container.op == "placeholder" or any(user > writer for user in container.users)
