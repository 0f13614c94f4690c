"""`check_pass`: the invariants of a pass checked on many random models, in one line."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from rich.console import Console, ConsoleOptions, Group, RenderResult
from torch import Tensor, nn

from ir_tools.errors import PassesError
from ir_tools.rewrite import Pass
from passes.driver.catalogue import CATALOGUE, find_passes
from passes.testing.invariants import InvariantBroken
from passes.testing.model_strategy import random_models
from passes.testing.model_text import RandomModel
from passes.testing.search import Failure, search
from passes.testing.tally import Tally
from passes.testing.trial import CaptureIsWrong, CaptureRefused, Trial, held

Models = Iterable[tuple[nn.Module, Any]] | st.SearchStrategy[RandomModel] | None


class CheckFailed(InvariantBroken):
    """A pass broke an invariant on a model; the message ends with that model, minimized, as a test to paste."""


class NeverFired(PassesError, ValueError):
    """A pass did nothing on any model: the invariants hold for whatever does nothing, so that proves nothing."""


@dataclass
class CheckReport:
    """What a pass did on the models it was checked on; prints as tables."""

    name: str
    tally: Tally

    @property
    def models(self) -> int:
        return self.tally.models

    @property
    def rewrites(self) -> dict[str, int]:
        """How often each rule fired; 0 for one that never did."""
        return dict(self.tally.rewrites)

    @property
    def refusals(self) -> dict[str, int]:
        """How often a rule was refused, by reason; 0 for a requirement that every match met."""
        return dict(self.tally.refusals)

    @property
    def share_untouched(self) -> float:
        """The share of models on which nothing fired."""
        return self.tally.share_untouched

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Group(*self.tally.tables(f"{self.name} keeps the invariants"))

    def __str__(self) -> str:
        console = Console(width=120, color_system=None)
        with console.capture() as text:
            console.print(self)
        return "\n".join(line.rstrip() for line in text.get().strip().splitlines())


def check_pass(
    my_pass: str | Pass,
    *,
    examples: int = 100,
    seed: int = 0,
    models: Models = None,
    before: str | Pass | Iterable[str | Pass] = (),
    frontends: Sequence[str] = ("trace",),
) -> CheckReport:
    """Check the invariants of a pass (`passes.testing.invariants`) on random models, and on models of your own.

    Args:
        my_pass: a `Pass`, or the name of one.
        examples: how many random models; the same `seed` gives the same ones.
        models: `(module, inputs)` pairs to check besides the random ones (inputs: a tensor or a tuple), or a hypothesis
            strategy of `RandomModel`s to take in place of them.
        before: passes that run first.
        frontends: each random model is captured by one of them.

    Raises:
        CheckFailed: an invariant is broken, or the pass raised; the message holds a small model as a test to paste.
        NeverFired: the pass never did anything.

    >>> from passes import Rule, Value, check_pass, rule_pass
    >>> def twice(op, x: Value):
    ...     return op.relu(op.relu(x))
    >>> def once(op, x):
    ...     return op.relu(x)
    >>> relu_once = rule_pass(
    ...     "relu_once", [Rule("relu(relu(x)) -> relu(x)", match=twice, replace=once)], effects=(),
    ...     doc="Drop a relu of a relu.\\n\\n    relu(relu(x))  ->  relu(x)\\n",
    ... )
    >>> report = check_pass(relu_once, models=[(nn.Sequential(nn.ReLU(), nn.ReLU()), torch.randn(2, 3))], examples=20)
    >>> report.models, report.rewrites["relu_once: relu(relu(x)) -> relu(x)"] > 0
    (21, True)
    """
    (pass_,) = find_passes(my_pass)
    earlier = tuple(find_passes(before))
    tally = Tally.of([pass_])
    start = time.perf_counter()
    if isinstance(models, st.SearchStrategy):
        strategy: st.SearchStrategy[RandomModel] = models
    else:
        strategy = random_models(dtypes=(torch.float64, torch.float64, torch.float32))
        for model, inputs in models or ():
            tally.add(_check_given(pass_, model, inputs, earlier, frontends))
    trials = st.builds(Trial, strategy, st.just((pass_,)), st.sampled_from(list(frontends)), before=st.just(earlier))
    if examples:
        found, failure = search(trials, Trial.run, examples=examples, seed=seed, expected=_is_no_fault_of_the_pass)
        tally.add(found)
        if failure is not None:
            raise CheckFailed(_message(failure, pass_, earlier)) from failure.error
    tally.seconds = time.perf_counter() - start
    if not tally.rewrites.total():
        refused = "; ".join(f"{reason} ({times})" for reason, times in tally.refusals.most_common(3) if times)
        raise NeverFired(
            f"{pass_} did nothing on any of {tally.models} models, so the invariants prove nothing of it. Give models that it "
            f"rewrites: check_pass({pass_.name}, models=[(module, inputs)])."
            + (f" It was refused: {refused}" if refused else "")
        )
    return CheckReport(str(pass_), tally)


def _check_given(pass_: Pass, model: nn.Module, inputs: Any, before: Sequence[Pass], frontends: Sequence[str]) -> Tally:
    """Check the invariants on one model of the user's, through every front end."""
    arguments: tuple[Tensor, ...] = inputs if isinstance(inputs, tuple) else (inputs,)
    tally = Tally()
    for frontend in frontends:
        try:
            tally.add(held(model.eval(), arguments, [pass_], before, frontend))
        except (CaptureRefused, CaptureIsWrong):
            raise
        except Exception as error:
            raise CheckFailed(f"{type(error).__name__}: {error}\nThe model:\n{model}") from error
    return tally


def _is_no_fault_of_the_pass(failure: Failure) -> bool:
    return isinstance(failure.error, (CaptureRefused, CaptureIsWrong))


def _message(failure: Failure, pass_: Pass, before: Sequence[Pass]) -> str:
    own = [p for p in (*before, pass_) if CATALOGUE.get(p.name) is not p]
    imports = "".join(_import_of(p) for p in own)
    return f"{failure.why}\n\nPaste this into a test:\n\n{failure.trial.as_test(failure.why, imports)}"


def _import_of(pass_: Pass) -> str:
    """The line that imports a pass from where it was made; a comment when no module has it."""
    for name, module in list(sys.modules.items()):
        for variable, value in list(vars(module).items()) if module is not None and name != "__main__" else ():
            if value is pass_:
                renamed = "" if variable == pass_.name else f" as {pass_.name}"
                return f"from {name} import {variable}{renamed}\n"
    return f"# from your_module import {pass_.name}\n"
