"""Where casts stand: the cheapest choice that the stances of `half_policy` allow, by a minimum cut.

    cost  =  number of casts, then bytes that they read and write

A value is cast once for all its readers in the other dtype. Constants are cast ahead of time, and cost nothing.
"""

from typing import Any

import torch

from ir_tools.ir.dialect import nodes_in, short_name
from ir_tools.rewrite.cast import bytes_of_cast, readers, state_nodes, traffic, whole
from ir_tools.rewrite.cut import Split
from ir_tools.rewrite.rewrite_log import Traffic
from passes.precision.constraints import AS_IT_COMES, BETWEEN, EITHER, HALF, WITH_OPERANDS, WITH_READERS, Policy
from passes.precision.op_table import NO_FLOATS


def placed(policy: Policy) -> set[Any]:
    """The ops that are computed in half."""
    if HALF not in policy.stances.values():
        return set()
    split, block = Split(), policy.block
    for node in (*block.placeholders, *state_nodes(block), block.output):
        split.fix(node, first=False)
    for node, stance in policy.stances.items():
        if stance.side in ("half", "float", "as it comes"):
            split.fix(node, first=stance is HALF)
    for node, stance in policy.stances.items():
        if (container := whole(node)) is not None:
            split.together(node, container)
        elif stance in (WITH_READERS, BETWEEN):
            split.follow(node, readers_of_numbers(node))
        if stance is BETWEEN and container is None:
            split.follow(node, policy.floats(node))
        if stance is WITH_OPERANDS and container is None:
            for operand in policy.floats(node):
                split.together(node, operand)
    costs = {value: bytes_of_cast(value, torch.float32, policy.half) for value in castable(policy)}
    one_cast = 1 + sum(costs.values())
    for value, cost in costs.items():
        split.charge(value, [r for r in readers_of_numbers(value) if takes_float(policy, r)], one_cast + cost)
    return split.first_side() & policy.stances.keys()


def castable(policy: Policy) -> list[Any]:
    """The float32 values that a reader may want in half."""
    values = (*policy.block.placeholders, *state_nodes(policy.block), *policy.stances)
    return [v for v in values if policy.original[v] is torch.float32 and not policy.is_free(v)]


def readers_of_numbers(value: Any) -> list[Any]:
    return [r for r in readers(value) if short_name(r.target) not in NO_FLOATS]


def takes_float(policy: Policy, reader: Any) -> bool:
    """The reader wants its operands in one dtype or the other."""
    return policy.stances.get(reader) is not AS_IT_COMES


def casts_one_by_one(policy: Policy) -> Traffic:
    """What it would be had each op cast its operands for itself: weights at run time, no cast shared, none moved."""
    found = traffic(policy.block)
    in_half = {node for node, stance in policy.stances.items()
               if stance is HALF or (stance in (EITHER, WITH_OPERANDS) and node in policy.natural)}  # fmt: skip
    for reader in (*policy.stances, policy.block.output):
        if not takes_float(policy, reader):
            continue
        for value in nodes_in(reader.args):
            if policy.original[value] is torch.float32 and (value in in_half) != (reader in in_half):
                found += Traffic(1, bytes_of_cast(value, torch.float32, policy.half))
    return found
