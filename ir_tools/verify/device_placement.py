"""Where the factory ops of a model put their tensors, as `ir_tools.frontends.portability` finds by a run of the model.

    zeros(4, device=x.device)              follows the inputs
    zeros(4).to(x.device)                  follows them: it is moved in each of its uses
    zeros(4), zeros(4, device="cpu")       fixed
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import fx

from ir_tools.ir.dialect import argument_names, bound_arguments
from ir_tools.torch_compat.operators import OpOverload

aten = torch.ops.aten

ELSEWHERE = torch.device("meta")
"""The device that wrapper tensors claim. Any but the inputs' would do; torch has no lazy start or missing guard here."""


class DevicePlacement(Enum):
    """Where a factory op puts its tensor."""

    FOLLOWS = "on the inputs' device"
    FIXED = "on a device that the source names, or the default one"
    UNKNOWN = "not known"


@dataclass(eq=False)
class Made:
    """One factory op of a run, in the order of execution. `location` is "file.py:12"."""

    location: str
    op: str
    device: torch.device
    moved: bool = False
    stayed: bool = False

    @property
    def placement(self) -> DevicePlacement:
        """A tensor made on a fixed device, all uses of which move it to the inputs', follows as well."""
        follows = self.device == ELSEWHERE or (self.moved and not self.stayed)
        return DevicePlacement.FOLLOWS if follows else DevicePlacement.FIXED


@dataclass
class Factories:
    """The factory ops of a model; `unknown` says why they could not be found."""

    made: list[Made] = field(default_factory=list)
    unknown: str = ""

    def placement(self, location: str, op: str) -> DevicePlacement:
        """The placement of a node of the captured graph, by its source line and the op's short name.

        Where no factory was seen at the line (the lines of an ExportedProgram's code are not those of its source), the op alone
        decides. If several factories match, they must agree.
        """
        at_line = [m for m in self.made if m.location == location]
        candidates = [m for m in at_line if m.op == op] or at_line or [m for m in self.made if m.op == op]
        placements = {m.placement for m in candidates}
        return placements.pop() if len(placements) == 1 else DevicePlacement.UNKNOWN


def names_a_device(node: fx.Node) -> bool:
    """The op puts its result on a device of its own, a constant or the default one, and there it stays."""
    if not isinstance(node.target, OpOverload) or "device" not in sum(argument_names(node.target), ()):
        return False
    if all(user.target is aten.to.other for user in node.users):
        return False
    return bound_arguments(node)["device"] is not None or not node.all_input_nodes
