"""Compute in half precision where it pays and is safe, with as few casts as possible; inputs and outputs keep their dtypes.

    level   matrix ops   pointwise, shape and pool ops        norms, softmax, exp, long sums     ops in no table
    O1      half         half when all float operands are     float                              float
    O2      half         where casts are fewer                float                              float
    O3      half         half                                 half                               float

Levels are named after NVIDIA Apex's. The table `op_table` classifies ops; `constraints` and `hazards` derive a precision
constraint for each op of the graph; `cast_placement` decides by a minimum cut where casts go: all constraints hold, with the
fewest casts, and among those with the fewest bytes moved. "Float" means the arithmetic: where everything around a norm or
softmax is half, its half kernel, which computes in float inside, equals casting to float and back.

Constants (weights, biases) are cast once, ahead of time; a value is cast once per dtype; a cast that would undo another one
reads its source instead. An op with a float64 operand, an op that writes in place, an explicit cast in the model, and an op in
half already stay as they are. So do an op with a number beyond the range of half (a mask of -1e9), or below its smallest normal
number (an epsilon of 1e-12 in float16), and the users of its result; a mask is clamped to the range where it is cast.

Options: `keep_float` names modules and ops, `overrides` gives a module or op a level of its own, or "float"; a module takes
precedence over a kind of op, the longest path over others. Ranges of values observed on example or calibration data keep in
float the ops that would overflow or underflow. `optimize` reads `on_slower`: what to do where the half model is slower on this
machine.
"""

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import torch

from ir_tools.errors import OptionError
from ir_tools.ir import Block, Draft, Program
from ir_tools.ir.dialect import argument, nodes_in, short_name
from ir_tools.ir.facts import dtype as dtype_of
from ir_tools.ir.provenance import location
from ir_tools.rewrite import RewriteLog, graph_pass
from ir_tools.rewrite.cast import Caster, Casts, traffic, whole
from ir_tools.rewrite.nearest import locations_of
from ir_tools.verify.ranges import Ranges
from passes.precision.cast_placement import casts_one_by_one, placed
from passes.precision.constraints import AS_IT_COMES, Policy, PrecisionOptions, site_of
from passes.precision.op_table import FLOAT_PARAMETERS, NAMED
from passes.precision.reasons import CLAMPED, EXPECTED, IS_WIDE, OVERFLOWS, VALUE_CLAMPED
from passes.precision.rescaling import rescale, rescalings
from passes.precision.residuals import float_residuals, take_residuals_out

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@graph_pass(effects={"rounds", "lowers_precision"})
def cast_half(
    program: Block,
    log: RewriteLog,
    ranges: Ranges,
    *,
    dtype: Literal["bfloat16", "float16"] = "bfloat16",
    level: Literal["O1", "O2", "O3"] = "O2",
    keep_float: tuple[str, ...] = (),
    overrides: Mapping[str, Literal["O1", "O2", "O3", "float"]] = MappingProxyType({}),
    on_slower: Literal["warn", "keep", "revert"] = "warn",
) -> tuple[Block, Casts]:
    overrides = {**overrides, **dict.fromkeys(keep_float, "float")}
    check_names(program, overrides)
    half, draft, rewrites_before = DTYPES[dtype], Draft.of(program), len(log.rewrites)
    options = PrecisionOptions(half, level, overrides, log.skip)
    policy = Policy.of(draft.program, options, ranges)
    shifts = rescalings(policy)
    residuals = float_residuals(policy, shifts)
    if shifts or residuals:  # the ops that these put into the graph need constraints of their own
        rescale(draft, shifts, log)
        take_residuals_out(draft, residuals, log)
        policy = Policy.of(draft.program, options, ranges)
    hazards, prepared = policy.hazards, {rewrite.site for rewrite in log.rewrites[rewrites_before:]}
    in_half = placed(policy)
    one_by_one = casts_one_by_one(policy)
    outputs = [dtype_of(value) for value in nodes_in(draft.program.output.args)]
    caster = Caster(draft, "cast_half")
    caster.wide |= hazards.clamped_inputs
    original = {node: dtype_of(node) for node in draft.program.nodes}

    def in_its_dtype(node):
        if node not in in_half:
            return caster.recompute(node, torch.float32, was_cast)
        stay = set(nodes_in([argument(node, name) for name in FLOAT_PARAMETERS.get(short_name(node.target), ())]))
        if any(draft.program.constant(parameter) is None for parameter in stay) or (stay and argument(node, "training")):
            stay = set()  # the kernels take no mixture of half and float ones
        return caster.recompute(node, half, lambda operand: dtype_of(operand) is torch.float32 and operand not in stay)

    def was_cast(operand):
        return dtype_of(operand) is half and original.get(operand) is not half

    for node in draft.program.calls:
        constraint, site, is_part = policy.constraints[node], site_of(node), whole(node) is not None
        if constraint is not AS_IT_COMES:
            clamped = len(caster.clamped)
            new = in_its_dtype(node)
            original[new] = original[node]
            if hazards.is_clamped(node):
                caster.wide.add(new)
            if len(caster.clamped) > clamped:
                log.refused(site, "cast_half", location(node), CLAMPED)
            if node in in_half and new is not node and not is_part and site not in prepared:
                log.rewrote(site, short_name(node.target), location(node))
        if constraint.reason and not is_part:
            log.refused(site, "cast_half", location(node), constraint.reason, expected=constraint.reason in EXPECTED)
    caster.restore_outputs(outputs)
    caster.skip_idle()
    said = {node.name for node, constraint in policy.constraints.items() if constraint.reason in (IS_WIDE, OVERFLOWS)}
    for value in caster.clamped_values:
        if value.name not in said:
            log.refused(site_of(value), "cast_half", location(value), VALUE_CLAMPED)
    after = draft.finish()
    return after, Casts(traffic(program), one_by_one, traffic(after))


def check_names(program, names):
    """Raise `OptionError` for a name in the options that no module path and no op of the graph has."""
    if not isinstance(program, Program):  # a body: the names are checked on the whole Program
        return
    known = {name for node in program.all_calls for name in (short_name(node.target), *locations_of(node))}
    for name in names:
        if name not in known and name not in NAMED:  # an op of the table need not occur in this model
            near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            what = "no module path and no op of this graph (mistyped, or removed by an earlier pass)"
            raise OptionError(f"cast_half: {name!r} is {what}{hint}")
