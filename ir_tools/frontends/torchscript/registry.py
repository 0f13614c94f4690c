"""What each kind of TorchScript node means: the files in `handlers` register themselves here, and the walk looks them up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ir_tools.frontends.torchscript.environment import Environment

Handler = Callable[[Environment, Any, list[Any]], Any]
"""Takes the environment, the TorchScript node and its arguments, and gives the result; `NotImplemented` leaves the node to the
operator of its schema, which becomes an op of the Program."""
HANDLERS: dict[str, Handler] = {}

BlockHandler = Callable[[Environment, Any], None]
"""Takes the environment and a node with blocks, walks what runs of them, and binds the node's outputs itself."""
BLOCK_HANDLERS: dict[str, BlockHandler] = {}

TAKES_TEXT = frozenset({"prim::RaiseException", "prim::Print", "aten::warn", "aten::format", "aten::add", "aten::join"})
"""The kinds that may be given a string with runtime values in it."""


def handles(*kinds: str) -> Callable[[Handler], Handler]:
    def register(function: Handler) -> Handler:
        for kind in kinds:
            HANDLERS[kind] = function
        return function

    return register


def handles_blocks(kind: str) -> Callable[[BlockHandler], BlockHandler]:
    def register(function: BlockHandler) -> BlockHandler:
        BLOCK_HANDLERS[kind] = function
        return function

    return register
