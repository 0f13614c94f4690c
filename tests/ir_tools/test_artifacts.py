"""Artifacts of passes: taken by class from the signature, shared by the blocks of a Program, added up, checked."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from ir_tools.ir import Block, Program
from ir_tools.rewrite import Artifacts, Pass, RewriteLog, graph_pass
from ir_tools.rewrite.artifacts import PassSignatureError
from tests.check import captured


@dataclass(frozen=True)
class Count:
    ops: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.ops + other.ops)


class Table(dict[str, int]):
    """Filled by a pass."""


class Branches(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if bool(x.sum() > 0):
            y = x.relu().exp()
        else:
            y = x.neg()
        return y.tanh()


def with_branches() -> Program:
    return captured(torch.jit.script(Branches()), torch.ones(2), frontend="script")


@graph_pass(effects=())
def counts(program: Block, log: RewriteLog, table: Table, start: Count, *, by: int = 1) -> tuple[Block, Count, Table | None]:
    table[f"block {len(table)}"] = len(program.calls)
    return program, Count(by * len(program.calls) + start.ops), table if by == 1 else None


def test_a_pass_says_in_its_signature_what_it_needs_and_gives() -> None:
    assert counts.needs == {Table, Count} and counts.gives == {Count, Table}
    assert list(counts.options) == ["by"] and counts.with_options(by=2).needs == counts.needs


def test_called_alone_it_gets_empty_ones_that_all_blocks_share() -> None:
    program, artifacts = with_branches(), Artifacts()
    assert counts(program) is program
    counts(program, artifacts=artifacts)
    assert len(artifacts[Table]) == 3, "the two branches and the Program"
    assert artifacts[Count].ops == sum(artifacts[Table].values()) == len(program.all_calls)


def test_what_is_given_is_used_in_all_blocks() -> None:
    program, mine, artifacts = with_branches(), Table(), Artifacts(Count(100))
    artifacts.put(mine)
    counts(program, artifacts=artifacts)
    assert artifacts[Table] is mine and len(mine) == 3, "the same object is not added to itself"
    assert artifacts[Count].ops == 100 + 3 * 100 + len(program.all_calls)


def test_none_gives_nothing() -> None:
    artifacts = Artifacts()
    counts.with_options(by=2)(with_branches(), artifacts=artifacts)
    assert Table not in artifacts and artifacts.get(Table) is None and [type(a) for a in artifacts] == [Count]
    with pytest.raises(KeyError, match="there is no artifact Table; there are: Count"):
        artifacts[Table]


def test_a_parameter_without_a_class_is_an_error() -> None:
    with pytest.raises(PassSignatureError, match=r"parameter ranges of the pass looks .* got None: a pass is"):

        @graph_pass(effects=())
        def looks(program: Block, log: RewriteLog, ranges) -> Block:  # type: ignore[no-untyped-def]
            return program

    with pytest.raises(PassSignatureError, match=r"the result of the pass gives .* got int \| str"):

        @graph_pass(effects=())
        def gives(program: Block, log: RewriteLog) -> tuple[Block, int | str]:
            return program, 1


def test_giving_what_the_signature_does_not_say_is_an_error() -> None:
    def silent(program: Block, log: RewriteLog) -> Block:
        return program, Count()  # type: ignore[return-value]

    def forgets(program: Block, log: RewriteLog) -> tuple[Block, Count]:
        return program  # type: ignore[return-value]

    program = with_branches()
    with pytest.raises(PassSignatureError, match=r"the pass silent gives Count, .* it returns tuple\[Block, Count\]"):
        Pass("silent", silent, frozenset())(program)
    with pytest.raises(PassSignatureError, match=r"the pass forgets returns 0 artifacts beside the Program, where .* Count"):
        Pass("forgets", forgets, frozenset())(program)
