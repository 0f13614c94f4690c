"""Artifacts of a compilation: what one pass gives, later passes that need its class are given."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from ir_tools.ir import Block, Draft, Program
from ir_tools.ir.dialect import aten
from ir_tools.rewrite import RewriteLog
from ir_tools.rewrite.artifacts import PassSignatureError
from ir_tools.rewrite.notes import Notes
from ir_tools.verify.ranges import Ranges
from passes import Pass, PassOrderError, graph_pass, optimize
from tests.check import captured

X = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Stats:
    """Ops by pass, in the order of the passes."""

    lines: tuple[str, ...] = ()

    def __add__(self, other: Stats) -> Stats:
        return Stats((*self.lines, *other.lines))


@dataclass
class Seen:
    """Written into."""

    by: list[str] = field(default_factory=list)


class OnlyWithAPath:
    def __init__(self, path: str):
        self.path = path


def gives(*lines: str, given: bool = True) -> Pass:
    def giver(program: Block, log: RewriteLog) -> tuple[Block, Stats | None]:
        return program, Stats(lines) if given else None

    return Pass("giver", giver, frozenset())


@graph_pass(effects=())
def adds(program: Block, log: RewriteLog, stats: Stats) -> tuple[Block, Stats]:
    return program, Stats(("added",))


def reads(into: list[Stats]) -> Pass:
    def user(program: Block, log: RewriteLog, stats: Stats) -> Block:
        into.append(stats)
        return program

    return Pass("user", user, frozenset())


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4)).eval()


def read_behind(*passes: Pass | str) -> list[Stats]:
    read: list[Stats] = []
    optimize(model(), [*passes, reads(read)], example_inputs=X, engine="aten", dry_run=True)
    return read


def test_a_later_pass_reads_what_an_earlier_one_gave() -> None:
    assert read_behind(gives("a"), "fold_constants") == [Stats(("a",))]


def test_the_last_one_counts_and_a_pass_that_needs_it_adds() -> None:
    assert read_behind(gives("a"), gives("b")) == [Stats(("b",))]
    assert read_behind(gives("a"), gives("b", given=False)) == [Stats(("a",))]
    assert read_behind(gives("a"), adds, adds) == [Stats(("a", "added", "added"))]
    assert read_behind(gives("a"), reads([]), gives("b"), adds) == [Stats(("b", "added"))]


def test_a_need_that_no_pass_before_gives_is_an_error_before_any_work() -> None:
    with pytest.raises(
        PassOrderError, match="user needs Stats, which no pass before it gives: no pass of the pipeline gives it"
    ):
        read_behind()
    with pytest.raises(PassOrderError, match="user needs Stats, which no pass before it gives: put giver before it"):
        optimize(None, [reads([]), gives("a")], example_inputs=X)
    with pytest.raises(PassOrderError, match=r"adds needs Stats, .*: no pass of the pipeline gives it"):
        optimize(None, [adds], example_inputs=X)


def test_a_pass_that_had_none_to_give_is_noted() -> None:
    read: list[Stats] = []
    passes = [gives("a", given=False), reads(read)]
    report = optimize(model(), passes, example_inputs=X, engine="aten", dry_run=True)
    assert read == [Stats()]
    assert "user needs Stats, and the passes before it gave none: it got an empty one" in report.notes


def test_a_pass_called_alone_gets_an_empty_one() -> None:
    read: list[Stats] = []
    reads(read)(captured(model(), X))
    assert read == [Stats()]


def test_a_class_without_an_empty_artifact_needs_one_that_was_given() -> None:
    seen: list[str] = []

    def opens(program: Block, log: RewriteLog, where: OnlyWithAPath) -> Block:
        seen.append(where.path)
        return program

    def finds(program: Block, log: RewriteLog) -> tuple[Block, OnlyWithAPath]:
        return program, OnlyWithAPath("here")

    pass_ = Pass("opens", opens, frozenset())
    with pytest.raises(PassSignatureError, match=r"the pass opens needs OnlyWithAPath, it was given none, .*argument: 'path'"):
        pass_(captured(model(), X))
    optimize(model(), [Pass("finds", finds, frozenset()), pass_], example_inputs=X, engine="aten", dry_run=True)
    assert seen == ["here"]


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if bool(x.sum() > 0):
            y = x.relu()
        else:
            y = x.neg()
        return y.tanh()


def test_artifacts_of_blocks_that_have_no_sum_are_an_error() -> None:
    def finds(program: Block, log: RewriteLog) -> tuple[Block, OnlyWithAPath]:
        return program, OnlyWithAPath("here")

    program = captured(torch.jit.script(Branches()), torch.ones(2), frontend="script")
    with pytest.raises(PassSignatureError, match=r"two artifacts OnlyWithAPath, .*: give OnlyWithAPath a method __add__"):
        Pass("finds", finds, frozenset())(program)


def test_ranges_are_those_of_the_graph_a_pass_is_given_whoever_gave_others() -> None:
    found: list[set[str]] = []

    @graph_pass(effects=())
    def invents(program: Block, log: RewriteLog) -> tuple[Block, Ranges]:
        return program, Ranges()

    @graph_pass(effects=())
    def looks(program: Block, log: RewriteLog, ranges: Ranges) -> Block:
        found.append(set(ranges))
        return program

    optimize(
        nn.Sequential(model(), nn.Dropout()).eval(), [looks, invents, "remove_dropout", looks], example_inputs=X, dry_run=True
    )
    assert found[0] - found[1] == {"dropout"} and found[1]


def test_a_note_is_printed_once() -> None:
    class AddsZeros(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.zeros(3)

    report = optimize(AddsZeros().eval(), ["follow_inputs", "follow_inputs"], example_inputs=X, engine="aten", dry_run=True)
    notes = [note for note in report.notes if "zeros makes a tensor on cpu" in note]
    assert len([s for s in report.steps if s.name == "follow_inputs"]) == 2 and len(notes) == 1


@graph_pass(effects=())
def flips(program: Program, log: RewriteLog, *, on_slower: str = "revert") -> Program:
    """There and back, forty times: slower."""
    draft = Draft.of(program)
    last = draft.program.calls[-1]
    for _ in range(80):
        last = draft.insert_after(last, list(last.users), "flips", aten.flip.default, [1])
    log.rewrote("flips@x", "flips", "x")
    return draft.finish()


def test_the_two_models_of_a_speed_comparison_share_nothing_that_is_written_into() -> None:
    kept: list[Seen] = []

    def first(program: Block, log: RewriteLog) -> tuple[Block, Seen, Notes]:
        return program, Seen(["first"]), Notes(("said once",))

    def writes(program: Block, log: RewriteLog, seen: Seen) -> Block:
        seen.by.append("written")
        kept.append(seen)
        return program

    passes = [Pass("first", first, frozenset()), flips, Pass("writes", writes, frozenset())]
    fast = optimize(model(), passes, example_inputs=X, engine="aten")
    assert fast.report.speed is not None and fast.report.speed.decision != "unknown", fast.report.speed
    assert [seen.by for seen in kept] == [["first", "written"]] * 2 and kept[0] is not kept[1]
    assert fast.report.notes.count("said once") == 1, "whichever of the two is kept"


def test_what_cannot_be_copied_costs_the_comparison_alone() -> None:
    class Stream(Seen):
        def __deepcopy__(self, memo: object) -> object:
            raise TypeError("a stream is one")

    def first(program, log):  # type: ignore[no-untyped-def]
        return program, Stream()

    first.__annotations__["return"] = tuple[Block, Stream]
    fast = optimize(model(), [Pass("first", first, frozenset()), flips], example_inputs=X, engine="aten")
    assert fast.report.speed.decision == "unknown" and "TypeError: a stream is one" in fast.report.speed.reason
    assert torch.equal(fast(X), model()(X))


def test_a_copied_artifact_speaks_of_the_same_nodes() -> None:
    nodes: list[object] = []

    def first(program: Block, log: RewriteLog) -> tuple[Block, Seen]:
        nodes.append(program.calls[0])
        return program, Seen([program.calls[0]])  # type: ignore[list-item]

    def looks(program: Block, log: RewriteLog, seen: Seen) -> Block:
        nodes.append(seen.by[0])
        return program

    passes = [Pass("first", first, frozenset()), flips, Pass("looks", looks, frozenset())]
    fast = optimize(model(), passes, example_inputs=X, engine="aten")
    assert fast.report.speed.decision != "unknown" and len(nodes) == 3 and nodes[0] is nodes[1] is nodes[2]
