"""Whether a pass that is there for speed brings any here: the model with it against the model without it, both as emitted.

    without, with = seconds per call, called in turn on the first example
    slower  <=>  with > 1.05 without, in the median and in the fastest call, in two looks out of two

A pass asks for this verdict by having an option `on_slower`, which it does not read itself: a pass is a function of the graph,
and what a machine was busy with must not change what it gives. `optimize` reads it when both models are emitted:

    warn      give the model with the pass, and raise a `SlowerWarning`
    keep      give it, and say so in the report
    revert    give the model without the pass

One pass is judged: the first that asks and changed something. A later one that asks stays in both models, whatever the verdict
on the first; its own `on_slower` is not read, and the report says so.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ir_tools.frontends.undisturbed import seeded
from ir_tools.ir import Program
from ir_tools.rewrite import Pass
from passes.tune.timing import WARM_UP, interleaved_seconds, milliseconds

SLOWER = 1.05
"""A model is slower when it takes more than this part of the other one's time."""

WARM_UP_SECONDS, SECONDS, MOST_ROUNDS = 0.2, 0.8, 40
"""Of one look: a slow model gets a single round of each, and a fast one is done in milliseconds."""

ON_SLOWER = "on_slower"


def asks_for_verdict(pass_: Pass) -> bool:
    return ON_SLOWER in pass_.options


@dataclass(frozen=True)
class Speed:
    """The verdict on one pass: median seconds per call of the models without and with it, over `rounds` rounds.

    - `dtype`: the pass's option of this name, "" of a pass that has none.
    - `reference`: "float32" where the model without such a pass computes in that alone, "" otherwise.
    - `decision`: "faster" or "even"; or what was done with a slower model: "warned", "kept", "reverted"; or "unknown".
    - `reason`: why it is unknown. `seconds`: what the verdict took, with the emission of the model without the pass.
    """

    pass_name: str
    dtype: str
    reference: str
    decision: str
    without: float = 0.0
    with_pass: float = 0.0
    rounds: int = 0
    reason: str = ""
    seconds: float = 0.0

    @property
    def ratio(self) -> float | None:
        """How many times as fast the model with the pass is, None when that is unknown."""
        return self.without / self.with_pass if self.with_pass else None

    @property
    def slower(self) -> bool:
        return self.decision in ("warned", "kept", "reverted")

    @property
    def names(self) -> tuple[str, str]:
        """What to call the models with and without the pass."""
        return self.dtype or f"the model with {self.pass_name}", self.reference or f"the model without {self.pass_name}"

    @property
    def times(self) -> str:
        """`5.1 → 2.7 ms`, without the pass and with it."""
        return f"{milliseconds(self.without)} → {milliseconds(self.with_pass)} ms"

    def __str__(self) -> str:
        """A line for the report."""
        mine, other = self.names
        if self.decision == "unknown":
            return f"{mine} was not timed against {other}: {self.reason}"
        if self.slower:
            done = {"reverted": f"{other} is given (on_slower='revert')", "kept": "it is kept (on_slower='keep')"}
            verdict = f"{mine} is SLOWER than {other} on this machine: {self.times}, {self.ratio:.2f}x as fast"
            return f"{verdict}; {done.get(self.decision, 'it is given all the same')}"
        noise = "; no more than noise" if self.decision == "even" else ""
        return f"{mine}: {self.times}, {self.ratio:.2f}x as fast as {other} on this machine{noise}"

    @property
    def advice(self) -> str:
        """What a `SlowerWarning` says."""
        mine, other = self.names
        return (
            f"{self.pass_name} makes the model slower on this machine: {milliseconds(self.without)} ms per call in {other}, "
            f"{milliseconds(self.with_pass)} ms in {mine}. {self.pass_name}:on_slower=revert gives the faster one; another "
            "dtype may be faster, and so may fewer casts; on_slower=keep says that this is meant (a file for another machine)"
        )

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio, "slower": self.slower}


def decide(pass_: Pass, dtype: str, reference: str, without: Contestant, with_pass: Contestant) -> Speed:
    """Time both models and say what to do."""
    contestants = {"without": without, "with": with_pass}
    times = measure(contestants, WARM_UP)
    slower = is_slower(times) and is_slower(times := measure(contestants))  # others may have kept the machine busy
    medians = {name: statistics.median(values) for name, values in times.items()}
    wins = medians["without"] > SLOWER * medians["with"]
    policy = pass_.given.get(ON_SLOWER, pass_.options[ON_SLOWER])
    decision = {"warn": "warned", "keep": "kept", "revert": "reverted"}[policy] if slower else "faster" if wins else "even"
    return Speed(pass_.name, dtype, reference, decision, medians["without"], medians["with"], len(times["with"]))


def is_slower(times: Mapping[str, Sequence[float]]) -> bool:
    """Slower by the margin, in the median and in the fastest call: that of a busy machine is as fast as any.

    >>> is_slower({"without": [1.0, 1.0, 1.1], "with": [1.2, 1.2, 1.3]})
    True
    >>> is_slower({"without": [1.0, 1.0, 1.1], "with": [1.04, 1.04, 1.04]})      # within the margin
    False
    >>> is_slower({"without": [1.0, 1.0, 1.1], "with": [1.0, 9.0, 9.0]})         # others kept the machine busy
    False
    """
    return all(of(times["with"]) > SLOWER * of(times["without"]) for of in (statistics.median, min))


def measure(contestants: Mapping[str, Contestant], warm_up: int = 0) -> dict[str, list[float]]:
    """Seconds of calls of each model, in interleaved rounds: about a second, of fast models less, of slow ones one round.

    Up to `warm_up` rounds go before those that count. State, written inputs and random generators are as before afterwards.
    """

    def rounds(seconds: float, most: int) -> dict[str, list[float]]:
        return interleaved_seconds(
            contestants, seconds=seconds, least_rounds=1, most_rounds=most, warm_up=0, ready=lambda n: contestants[n].reset()
        )

    with seeded():
        try:
            if warm_up:
                rounds(WARM_UP_SECONDS, warm_up)
            return rounds(SECONDS, MOST_ROUNDS)
        finally:
            for contestant in contestants.values():
                contestant.reset()


class Contestant:
    """Calls of an emitted module on arguments of its own; before each, what a call writes into can be put back."""

    def __init__(self, program: Program, scripted: Any, arguments: Sequence[Any]):
        self.scripted = scripted
        self.arguments = pytree.tree_map_only(torch.Tensor, torch.clone, list(arguments))
        tensors = [leaf for leaf in pytree.tree_leaves(self.arguments) if isinstance(leaf, torch.Tensor)]
        written = list(scripted.buffers()) if program.state else []
        if not program.mutated_values.isdisjoint(program.placeholders):
            written += tensors
        self.kept = [(tensor, tensor.clone()) for tensor in written]
        self.on_gpu = any(tensor.is_cuda for tensor in tensors)

    def __call__(self) -> None:
        self.scripted(*self.arguments)
        if self.on_gpu:
            torch.cuda.synchronize()

    @torch.no_grad()
    def reset(self) -> None:
        for tensor, value in self.kept:
            tensor.copy_(value)
