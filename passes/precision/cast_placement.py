"""Placement of casts: a minimum cut of the graph into half and float ops, under the precision constraint of each op.

    cost  =  number of casts, then bytes that they read and write

A value is cast once for all its users in the other dtype. Constants are cast ahead of time, and cost nothing.
"""

from collections.abc import Set
from functools import partial
from typing import Any

import torch

from ir_tools.ir.dialect import nodes_in, short_name
from ir_tools.ir.facts import dtype as dtype_of
from ir_tools.rewrite.cast import Traffic, bytes_of_cast, state_nodes, traffic, users, whole
from ir_tools.rewrite.cut import Freedom, cheapest
from passes.precision.constraints import AS_IT_COMES, BETWEEN, EITHER, HALF, WITH_OPERANDS, WITH_USERS, Policy
from passes.precision.op_table import NO_FLOATS

STAYS_FLOAT = Freedom(first=False)


def placed(policy: Policy) -> Set[Any]:
    """The ops that are computed in half: of all sets that the constraints allow, the one of the least cost."""
    if HALF not in policy.constraints.values():
        return set()
    block, half = policy.block, policy.hazards.half
    freedoms = dict.fromkeys((*block.placeholders, *state_nodes(block), block.output), STAYS_FLOAT)
    freedoms |= {node: freedom_of(node, policy) for node in policy.constraints}
    read = {value: [user for user in users_of_numbers(value) if takes_float(policy, user)] for value in castable(policy)}
    return cheapest(freedoms, read, partial(cost_of_cast, half=half)) & policy.constraints.keys()


def freedom_of(node: Any, policy: Policy) -> Freedom:
    """A precision constraint, as what it leaves open to the cut."""
    constraint, container = policy.constraints[node], whole(node)
    first = constraint is HALF if constraint.side in ("half", "float", "as it comes") else None
    if container is not None:
        return Freedom(first, together_with=[container])
    floats = policy.hazards.floats(node) if constraint in (BETWEEN, WITH_OPERANDS) else []
    if constraint is WITH_OPERANDS:
        return Freedom(first, together_with=floats)
    return Freedom(first, [*users_of_numbers(node), *floats] if constraint in (WITH_USERS, BETWEEN) else [])


def cost_of_cast(value: Any, half: torch.dtype) -> tuple[int, int]:
    """One cast, and the bytes that it reads and writes."""
    return 1, bytes_of_cast(value, torch.float32, half)


def castable(policy: Policy) -> list[Any]:
    """The float32 values that a user may take in half."""
    values = (*policy.block.placeholders, *state_nodes(policy.block), *policy.constraints)
    return [v for v in values if dtype_of(v) is torch.float32 and not policy.hazards.is_free(v)]


def users_of_numbers(value: Any) -> list[Any]:
    return [user for user in users(value) if short_name(user.target) not in NO_FLOATS]


def takes_float(policy: Policy, user: Any) -> bool:
    """The user needs its operands in the dtype that it is computed in."""
    return policy.constraints.get(user) is not AS_IT_COMES


def casts_one_by_one(policy: Policy) -> Traffic:
    """The casts of per-op autocast: each op casts its own operands, weights at run time; no cast is shared or moved."""
    found = traffic(policy.block)
    in_half = {node for node, constraint in policy.constraints.items()
               if constraint is HALF or (constraint in (EITHER, WITH_OPERANDS) and policy.natural[node])}  # fmt: skip
    for user in (*policy.constraints, policy.block.output):
        if not takes_float(policy, user):
            continue
        for value in nodes_in(user.args):
            if dtype_of(value) is torch.float32 and (value in in_half) != (user in in_half):
                found += Traffic(1, bytes_of_cast(value, torch.float32, policy.hazards.half))
    return found
