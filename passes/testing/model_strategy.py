"""Random models, aimed at what rewrite rules look for and at what makes them refuse (hypothesis).

A model is drawn as text, a class that can be read and pasted into a test:

    class Model(nn.Module):                                  self.conv1 = nn.Conv2d(4, 2, 3, padding=1)
        def __init__(self): ...                              self.norm2 = nn.BatchNorm2d(2)
        def forward(self, x1):                               v2 = self.conv1(x1)
            ...                                              v3 = self.norm2(v2)

It is a few *phrases* (`passes.testing.phrases`), each of which holds the left side of a rule or nearly, in random order. A
phrase uses what an earlier one gave, where the rank fits, or a new input; what has no user is returned. Every statement
is run as soon as it is drawn, so that shapes and dtypes are known and every model is valid.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import nn

from passes.testing.model_text import HEADER, RandomModel, made_from
from passes.testing.phrases.registry import OFTEN, PHRASES
from passes.testing.writer import NotHere, Writer, sampled


def random_models(
    phrases: Sequence[str] = (), *, dtypes: Sequence[torch.dtype] = (torch.float64,), most: int = 5
) -> st.SearchStrategy[RandomModel]:
    """Random valid models of up to `most` phrases each.

    Args:
        phrases: names from `passes.testing.phrases.registry.PHRASES`; all of them when none is given.
        dtypes: the default dtypes to draw from, that of inputs and weights. A phrase may compute in a narrower one.
        most: the largest number of phrases.

    The outputs of every model are finite on its inputs. Raises `ValueError` for a name that is no phrase.

    >>> from hypothesis import given, settings
    >>> @settings(max_examples=2, database=None)
    ... @given(random_models(["linear_norm"]))
    ... def runs(model):
    ...     assert "nn.Linear" in model.source
    ...     model.module()(*model.inputs())
    >>> runs()
    """
    unknown = [name for name in phrases if name not in PHRASES]
    if unknown:
        raise ValueError(f"there is no phrase {unknown[0]!r}; there are: {', '.join(PHRASES)}")
    return _drawn(tuple(phrases or (*PHRASES, *OFTEN)), tuple(dtypes), most)


@st.composite
def _slot(draw: st.DrawFn, writer: Writer, phrases: tuple[str, ...], may_be_empty: bool) -> str:
    """Write one phrase, or none; its name. A strategy of its own, so that hypothesis can shrink it to none by itself."""
    if may_be_empty and not draw(sampled((False, True, True))):
        return ""
    name = draw(sampled(phrases))
    before, writer.draw = writer.draft.copy(), draw
    try:
        PHRASES[name](writer)
    except (NotHere, RuntimeError, ValueError, IndexError):  # such as a kernel larger than its image
        writer.draft = before
        return ""
    return name


@st.composite
def _drawn(draw: st.DrawFn, phrases: tuple[str, ...], dtypes: tuple[torch.dtype, ...], most: int) -> RandomModel:
    seed, dtype = draw(sampled(tuple(range(32)))), draw(sampled(dtypes))
    writer = Writer(draw, dtype)
    with made_from(seed, torch.get_default_dtype()), torch.no_grad():  # as when the model runs
        slots = [draw(_slot(writer, phrases, most > 1)) for _ in range(most)]
    written = [name for name in slots if name]
    assume(written)
    writer.draw = draw
    model = RandomModel(_text(writer), seed, dtype, tuple(written))
    with torch.no_grad():
        given = nn.Module.__call__(model.module(), *model.inputs())
    outputs = given if isinstance(given, tuple) else (given,)
    assume(all(bool(t.isfinite().all()) for t in outputs if t.is_floating_point()))
    return model


def _text(writer: Writer) -> str:
    """The model as text: every statement drawn, and an ending that uses what no statement does."""
    draft = writer.draft
    used = set(re.findall(r"\b[vx]\d+\b", " ; ".join(line.partition(" = ")[2] or line for line in draft.forward)))
    left = [name for name in dict.fromkeys(draft.results) if name not in used]
    left = left or draft.results[-1:]
    first = draft.values[left[0]]
    alike = all(draft.values[n].shape == first.shape and draft.values[n].dtype == first.dtype for n in left)
    if len(left) > 1 and alike and first.dim():
        ending = writer.pick(", ".join(left), " + ".join(left), f"torch.cat([{', '.join(left)}])")
    else:
        ending = ", ".join(left)
    taken = set(re.findall(r"\bx\d+\b", " ".join([*draft.forward, ending])))
    inputs = {name: made for name, made in draft.inputs.items() if name in taken}
    body = "\n".join(f"        {line}" for line in draft.constructor)
    lines = "\n".join(f"        {line}" for line in [*draft.forward, f"return {ending}"])
    return (
        f"{HEADER}\n\nclass Model(nn.Module):\n    def __init__(self):\n        super().__init__()\n{body}\n\n"
        f"    def forward({', '.join(['self', *inputs])}):\n{lines}\n\n\n"
        f"def example_inputs():\n    return ({', '.join(inputs.values())},)\n"
    ).replace("\n\n\n    def forward", "\n\n    def forward")
