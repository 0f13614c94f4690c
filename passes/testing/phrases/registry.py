"""Every phrase, in the order in which hypothesis draws from them, and those that are drawn more often."""

from __future__ import annotations

from passes.testing.phrases.affine_maps import (
    affine_after,
    affine_before,
    divided_by_zero,
    turned_after,
    turned_before,
)
from passes.testing.phrases.attention import attention
from passes.testing.phrases.in_place_writes import written, written_input
from passes.testing.phrases.layers_in_a_row import (
    conv_pointwise,
    dropouts,
    layer_activation,
    linear_linear,
    linear_residual,
    pointwise_conv,
    pooled,
    query_key_value,
    shared_conv,
    shared_linear,
    two_layers_summed,
)
from passes.testing.phrases.neutral_ops import neutral, neutral_complex, neutral_discrete
from passes.testing.phrases.norms import (
    conv_norm,
    frozen_norm,
    linear_norm,
    moved_linear_norm,
    norm_conv,
    norm_linear,
    norm_of_norm,
    unbatched_conv_norm,
)
from passes.testing.phrases.redundant_code import (
    computed_constant,
    dead_code,
    same_twice,
    same_twice_swapped,
)
from passes.testing.phrases.unstable_forms import fragile
from passes.testing.phrases.unusual_weights import (
    integer_weights,
    narrow_part,
    parametrized,
    weights_as_buffers,
    weights_of_the_run,
)
from passes.testing.phrases.views import layout_chain, pieces, stepped
from passes.testing.writer import Phrase

ALL: tuple[Phrase, ...] = (
    conv_norm, norm_of_norm, linear_norm, moved_linear_norm, unbatched_conv_norm, norm_conv, norm_linear, frozen_norm,
    parametrized, affine_after, affine_before, turned_after, turned_before, divided_by_zero, linear_linear, conv_pointwise,
    pointwise_conv, layer_activation, linear_residual, two_layers_summed, shared_conv, shared_linear, query_key_value,
    same_twice, same_twice_swapped, neutral, neutral_discrete, neutral_complex, layout_chain, attention, fragile,
    computed_constant, dead_code, written, written_input, pieces, dropouts, stepped, narrow_part, weights_of_the_run,
    integer_weights, pooled, weights_as_buffers,
)  # fmt: skip
"""In a fixed order: the same seed draws the same models only as long as it stays. New ones go to the end."""

PHRASES: dict[str, Phrase] = {phrase.__name__: phrase for phrase in ALL}
"""Every phrase by name."""

OFTEN = (
    "conv_norm", "layer_activation", "linear_norm", "norm_conv", "norm_linear", "pointwise_conv", "conv_pointwise",
    "linear_residual", "moved_linear_norm", "moved_linear_norm", "turned_after", "turned_before", "turned_before",
    "neutral", "neutral", "neutral_discrete", "fragile", "fragile", "fragile", "attention", "attention",
)  # fmt: skip
"""Phrases drawn twice as often as others, or more often: what most models are made of, and those that serve many rules."""
