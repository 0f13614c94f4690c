"""Every pass by name, the groups, and finding them from what a user writes.

    "fuse_conv_bn"                          a pass
    "fuse_conv_bn_relu"                     a group, expanded in its order
    "cast_half:dtype=float16:level=O1"      a pass with options
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from ir_tools.errors import OptionError
from ir_tools.rewrite import Pass
from passes.cleanup.eliminate_common_subexpressions import eliminate_common_subexpressions
from passes.cleanup.fold_constants import fold_constants
from passes.cleanup.remove_dead_code import remove_dead_code
from passes.cleanup.remove_dropout import remove_dropout
from passes.cleanup.remove_neutral_ops import remove_neutral_ops
from passes.cleanup.simplify_views import simplify_views
from passes.errors import UnknownPassError
from passes.fold.fold_affine import fold_affine
from passes.fold.fold_input_affine import fold_input_affine
from passes.fold.fuse_bn_conv import fuse_bn_conv
from passes.fold.fuse_conv_bn import fuse_conv_bn
from passes.fold.merge_linear_chains import merge_linear_chains
from passes.fuse.fuse_attention import fuse_attention
from passes.fuse.fuse_conv_relu import fuse_conv_relu
from passes.fuse.merge_parallel_linears import merge_parallel_linears
from passes.fuse.use_stable_forms import use_stable_forms
from passes.lower.follow_inputs import follow_inputs
from passes.lower.lower_aten import lower_aten
from passes.lower.lower_onednn import lower_onednn
from passes.lower.lowering import lowering_pass
from passes.lower.target import Target
from passes.lower.targets import registered_targets
from passes.precision.cast_half import cast_half
from passes.quantize.insert_quant_stubs import insert_quant_stubs

CATALOGUE: dict[str, Pass] = {
    p.name: p
    for p in (
        fold_constants,
        remove_dropout,
        remove_neutral_ops,
        simplify_views,
        eliminate_common_subexpressions,
        use_stable_forms,
        fuse_conv_bn,
        fold_affine,
        fuse_bn_conv,
        fold_input_affine,
        merge_linear_chains,
        fuse_conv_relu,
        merge_parallel_linears,
        fuse_attention,
        cast_half,
        insert_quant_stubs,
        remove_dead_code,
        lower_aten,
        lower_onednn,
        follow_inputs,
    )
}

GROUPS: dict[str, tuple[str, ...]] = {
    # All that it takes from conv-bn-relu to one fused op: weights that are computed, dropouts in between, and scales go first.
    "fuse_conv_bn_relu": ("fold_constants", "remove_dropout", "fuse_conv_bn", "fold_affine", "fuse_conv_relu"),
}


def find_passes(wanted: str | Pass | Iterable[str | Pass]) -> list[Pass]:
    """The passes meant by names, groups and pass objects, in order.

    A group leaves out the passes that are there already; what the user repeats runs again.

    Raises `UnknownPassError` listing the nearest names, `OptionError` for options that a pass does not have.
    """
    if isinstance(wanted, (str, Pass)):
        wanted = [wanted]
    found: list[Pass] = []
    for item in wanted:
        group = isinstance(item, str) and item.strip() in GROUPS
        found += [pass_ for pass_ in _expand(item) if not (group and pass_ in found)]
    return found


def _expand(item: str | Pass) -> Sequence[Pass]:
    if isinstance(item, Pass):
        return [item]
    if not isinstance(item, str):
        raise UnknownPassError(f"a pass is a name or a Pass object, got {type(item).__name__}: {item!r}")
    name, *options = item.strip().split(":")
    if name in GROUPS:
        if options:
            raise OptionError(f"the group {name!r} has no options; give them to one of its passes: {', '.join(GROUPS[name])}")
        return [CATALOGUE[n] for n in GROUPS[name]]
    pass_ = pass_named(name)
    if pass_ is None:
        known = [*CATALOGUE, *GROUPS]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(known)}"
        raise UnknownPassError(f"there is no pass {name!r}; {hint}")
    if not options:
        return [pass_]
    given = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise OptionError(f"an option is written name=value, got {option!r} in {item!r}")
        given[key] = value
    return [pass_.with_options(**given)]


def pass_named(name: str) -> Pass | None:
    """The pass of that name: of the catalogue, or the lowering of a registered target."""
    target = next((target for target in registered_targets() if target.lowering == name), None)
    return CATALOGUE.get(name) if target is None else lowering_to(target)


def lowering_to(target: Target) -> Pass:
    """The lowering of a target: of the catalogue where it stands there, else made. Raises `OptionError` for a name taken."""
    known = CATALOGUE.get(target.lowering)
    if known is not None and known.target is None:
        where = f"the lowering of the target {target.name!r}"
        raise OptionError(f"{where} bears the name of the pass {known.name!r}; set lowering=")
    return known if known is not None and known.target is target else lowering_pass(target)
