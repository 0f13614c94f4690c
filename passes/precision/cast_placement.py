"""Placement of casts: a minimum cut of the graph into half and float ops, under the precision constraint of each op.

    cost  =  number of casts, then bytes that they read and write

A value is cast once for all its users in the other dtype. Constants are cast ahead of time, and cost nothing.
"""

from typing import Any

import torch

from ir_tools.ir.dialect import nodes_in, short_name
from ir_tools.rewrite.cast import Traffic, bytes_of_cast, state_nodes, traffic, users, whole
from ir_tools.rewrite.cut import Split
from passes.precision.constraints import AS_IT_COMES, BETWEEN, EITHER, HALF, WITH_OPERANDS, WITH_USERS, Policy
from passes.precision.op_table import NO_FLOATS


def placed(policy: Policy) -> set[Any]:
    """The ops that are computed in half: of all sets that the constraints allow, the one of the least cost."""
    if HALF not in policy.constraints.values():
        return set()
    split, block = Split(), policy.block
    for node in (*block.placeholders, *state_nodes(block), block.output):
        split.fix(node, first=False)
    for node, constraint in policy.constraints.items():
        if constraint.side in ("half", "float", "as it comes"):
            split.fix(node, first=constraint is HALF)
    for node, constraint in policy.constraints.items():
        if (container := whole(node)) is not None:
            split.together(node, container)
        elif constraint in (WITH_USERS, BETWEEN):
            split.follow(node, users_of_numbers(node))
        if constraint is BETWEEN and container is None:
            split.follow(node, policy.floats(node))
        if constraint is WITH_OPERANDS and container is None:
            for operand in policy.floats(node):
                split.together(node, operand)
    costs = {value: bytes_of_cast(value, torch.float32, policy.half) for value in castable(policy)}
    one_cast = 1 + sum(costs.values())
    for value, cost in costs.items():
        split.charge(value, [user for user in users_of_numbers(value) if takes_float(policy, user)], one_cast + cost)
    return split.first_side() & policy.constraints.keys()


def castable(policy: Policy) -> list[Any]:
    """The float32 values that a user may take in half."""
    values = (*policy.block.placeholders, *state_nodes(policy.block), *policy.constraints)
    return [v for v in values if policy.original[v] is torch.float32 and not policy.is_free(v)]


def users_of_numbers(value: Any) -> list[Any]:
    return [user for user in users(value) if short_name(user.target) not in NO_FLOATS]


def takes_float(policy: Policy, user: Any) -> bool:
    """The user needs its operands in the dtype that it is computed in."""
    return policy.constraints.get(user) is not AS_IT_COMES


def casts_one_by_one(policy: Policy) -> Traffic:
    """The casts of per-op autocast: each op casts its own operands, weights at run time; no cast is shared or moved."""
    found = traffic(policy.block)
    in_half = {node for node, constraint in policy.constraints.items()
               if constraint is HALF or (constraint in (EITHER, WITH_OPERANDS) and node in policy.natural)}  # fmt: skip
    for user in (*policy.constraints, policy.block.output):
        if not takes_float(policy, user):
            continue
        for value in nodes_in(user.args):
            if policy.original[value] is torch.float32 and (value in in_half) != (user in in_half):
                found += Traffic(1, bytes_of_cast(value, torch.float32, policy.half))
    return found
