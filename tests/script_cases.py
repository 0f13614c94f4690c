"""The models of `tests/script_models.py` with their inputs, and what the graph compiler must make of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models import SEED, randomize_batch_norm
from tests.script_models import (
    AdaptiveDepth,
    BeamSearch,
    BreakAndContinue,
    Checked,
    CountingGate,
    DataTripCount,
    DictAndTuple,
    EarlyExit,
    GreedyDecoder,
    IfInFor,
    IfPerBlock,
    LSTMLoop,
    NestedIfs,
    OptionalMemory,
    Router,
    SharedWeight,
)


@dataclass
class ScriptCase:
    """A model in eval mode, inputs by the path they take, and what the graph compiler must make of it.

    - `folds`: the layers that a batch norm folds into, with the number of its calls in the source.
    - `unrolled`: the same where loops of a known length are unrolled.
    - `ifs`, `loops`: how many ifs and loops depend on data, so that no capture from one input may resolve them. A loop
      with a known bound and a break may become ifs.
    - `raises`: input name -> the message of the error that it causes.
    """

    model: nn.Module
    inputs: dict[str, tuple]
    folds: dict[str, int]
    ifs: int = 0
    loops: int = 0
    unrolled: dict[str, int] = field(default_factory=dict)
    raises: dict[str, str] = field(default_factory=dict)

    @property
    def working(self) -> dict[str, tuple]:
        return {name: args for name, args in self.inputs.items() if name not in self.raises}


def case(build: Callable[[], ScriptCase]) -> ScriptCase:
    """What `build` makes from the seed, in eval mode with random batch norms; the global random state is left alone."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(SEED)
        made = build()
        randomize_batch_norm(made.model)
    made.model.eval()
    return made


def number(value: float) -> Tensor:
    return torch.tensor(value)


def greedy_decoder() -> ScriptCase:
    x = torch.randn(2, 3, 6, 6)
    inputs = {"to_the_end": (x, number(-9.0)), "in_between": (x, number(0.15)), "at_once": (x, number(9.0))}
    return ScriptCase(GreedyDecoder(), inputs, {"encoder.0": 1, "cell.0": 1, "vocabulary.0": 1}, loops=1)


def adaptive_depth() -> ScriptCase:
    x = torch.randn(2, 3, 6, 6)
    inputs = {"two_steps": (x, number(0.05)), "all_steps": (x, number(0.0)), "no_step": (x, number(2.0))}
    return ScriptCase(AdaptiveDepth(), inputs, {"stem.0": 1, "block.0": 1}, loops=1)


def beam_search() -> ScriptCase:
    x = torch.randn(2, 5)
    inputs = {"all_positions": (x, number(-3.0)), "ends_early": (x, number(9.0))}
    unrolled = {"start.0": 1, "step.0": 5}
    return ScriptCase(BeamSearch(), inputs, {"start.0": 1, "step.0": 1}, ifs=1, loops=1, unrolled=unrolled)


def break_and_continue() -> ScriptCase:
    x = torch.randn(1, 4, 6, 6).clamp(-1.9, 1.9)
    inputs = {"convolves": (x,), "breaks_at_once": (x * 0.1,), "halves_first": (x * 4,), "only_halves": (x * 1e4,)}
    return ScriptCase(BreakAndContinue(), inputs, {"block.0": 1}, ifs=2, unrolled={"block.0": 6})


def data_trip_count() -> ScriptCase:
    x = torch.randn(1, 4, 5, 6)
    inputs = {f"{n}_times": (x * (n + 0.5) / x[:, 0].abs().max(),) for n in (2, 0, 1, 3)}
    return ScriptCase(DataTripCount(), inputs, {"block.0": 1, "last.0": 1}, loops=1)


def early_exit() -> ScriptCase:
    x = torch.randn(2, 3, 12, 12)
    limits = {"last": [1.0, 1.0], "first": [0.0, 0.0], "second": [1.0, 0.0]}
    inputs = {name: (x, torch.tensor(values)) for name, values in limits.items()}
    return ScriptCase(EarlyExit(), inputs, {"stem.0": 1, "middle.0": 1, "top.0": 1}, ifs=2)


def router() -> ScriptCase:
    x = torch.randn(2, 4, 6, 6)
    inputs = {f"expert_{n}": (x + F.one_hot(torch.tensor(n), 4).view(1, 4, 1, 1),) for n in (1, 0, 2)}
    return ScriptCase(Router(), inputs, {"shared": 1, "wide.0": 1, "depthwise.0": 1}, ifs=2)


def if_in_for() -> ScriptCase:
    x = torch.randn(1, 4, 6, 6)
    inputs = {"mixed": (x + 0.5,), "starts_negative": (x - 0.5,), "very_positive": (x + 30,)}
    return ScriptCase(IfInFor(), inputs, {"block.0": 1}, ifs=1, unrolled={"block.0": 3})


def if_per_block() -> ScriptCase:
    x = torch.randn(1, 4, 6, 6)
    inputs = {"all": (x, number(0.0)), "none": (x, number(3.0)), "some": (x, number(0.5))}
    return ScriptCase(IfPerBlock(), inputs, {f"blocks.{i}.0": 1 for i in range(3)}, ifs=3)


def nested_ifs() -> ScriptCase:
    x, y = torch.rand(1, 4, 6, 6), torch.rand(1, 4, 6, 6) + 0.2
    signs = {"plus_plus": (1, 1), "plus_minus": (1, -1), "minus_plus": (-1, 1), "minus_minus": (-1, -1)}
    inputs = {name: (x * a, y * b) for name, (a, b) in signs.items()}
    return ScriptCase(NestedIfs(), inputs, {"a.0": 1, "b.0": 1, "c.0": 1}, ifs=3)


def shared_weight() -> ScriptCase:
    x = torch.randn(1, 4, 6, 6)
    return ScriptCase(SharedWeight(), {"skipped": (x,), "taken": (-x,)}, {"conv": 1}, ifs=1)


def optional_memory() -> ScriptCase:
    frame, reset = torch.randn(1, 3, 6, 6), torch.full((1, 3, 6, 6), -2.0)
    mask = (torch.randn(1, 3, 6, 6) > -1).float()
    inputs = {
        "updated": (torch.stack([frame, frame + 1, frame * 2]), None),
        "forgotten": (torch.stack([frame, frame, reset]), None),
        "written_again": (torch.stack([frame, reset, frame * 2]), None),
        "with_mask": (torch.stack([frame, frame + 1, frame * 2]), mask),
        "with_mask_forgotten": (torch.stack([frame, reset, reset]), mask),
    }
    unrolled = {"write.0": 3, "update.0": 2}  # in the first round there is nothing to update
    return ScriptCase(OptionalMemory(), inputs, {"write.0": 1, "update.0": 1}, ifs=2, unrolled=unrolled)


def checked() -> ScriptCase:
    x = torch.rand(1, 4, 6, 6)
    inputs = {"positive": (x,), "negative": (-x - 0.1,), "nan": (x * float("nan"),)}
    return ScriptCase(Checked(), inputs, {"block.0": 1}, ifs=1, raises={"nan": "the input holds NaN"})


def counting_gate() -> ScriptCase:
    x = torch.randn(1, 4, 6, 6).abs()
    inputs = {"open": (x,), "closed": (-x,)}
    return ScriptCase(CountingGate(), inputs, {"block.0": 1}, ifs=1)


def lstm_loop() -> ScriptCase:
    x, state = torch.randn(4, 2, 5), [torch.randn(2, 6), torch.randn(2, 6)]
    gap = x * torch.tensor([1.0, 0, 0, 1]).view(4, 1, 1)
    inputs = {"all_frames": (x, state), "gap": (gap, state), "silence": (x * 0, state)}
    return ScriptCase(LSTMLoop(), inputs, {"gates.0": 1}, ifs=1, unrolled={"gates.0": 4})


def dict_and_tuple() -> ScriptCase:
    x = torch.randn(2, 6)
    inputs = {"all_turns": (x * 20,), "one_turn": (x * 0.2,)}
    return ScriptCase(DictAndTuple(), inputs, {"left.0": 1, "right.0": 1}, ifs=1, loops=1)


SCRIPT_MODELS: dict[str, Callable[[], ScriptCase]] = {
    build.__name__: build
    for build in (
        greedy_decoder, adaptive_depth, beam_search, break_and_continue, data_trip_count, early_exit, router, if_in_for,
        if_per_block, nested_ifs, shared_weight, optional_memory, checked, counting_gate, lstm_loop, dict_and_tuple,
    )
}  # fmt: skip
