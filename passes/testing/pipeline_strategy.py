"""Random subsets of passes in random orders that the order rules allow (hypothesis)."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from passes.driver.catalogue import CATALOGUE
from passes.driver.pipeline import legal_order, order_rules


@st.composite
def pipelines(draw: st.DrawFn, names: Sequence[str], at_least: Sequence[str] = ()) -> list[str]:
    """A random subset of `names`, most of them, in a random order that breaks no order rule; one of `at_least` is in it.

    >>> from hypothesis import find
    >>> find(pipelines(["remove_dropout", "fuse_conv_bn"]), lambda names: len(names) == 2)
    ['remove_dropout', 'fuse_conv_bn']
    """
    needed = draw(st.sampled_from(list(at_least))) if at_least else None
    left_out = draw(st.sets(st.sampled_from(list(names)), max_size=len(names) // 2))
    chosen = [name for name in draw(st.permutations(list(names))) if name == needed or name not in left_out]
    return legal_order(chosen, order_rules(CATALOGUE[name] for name in chosen if name in CATALOGUE))
