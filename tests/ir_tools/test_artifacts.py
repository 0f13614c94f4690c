"""Artifacts of passes: taken by class from the signature, shared by the blocks of a Program, added up, checked."""

from __future__ import annotations

import functools
import typing
from dataclasses import dataclass
from typing import Any, Optional

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


Result = tuple[Block, Count]


def by_tuple_of_typing(program: Block, log: RewriteLog) -> typing.Tuple[Block, Count]:  # noqa: UP006
    return program, Count()


def by_an_alias(program: Block, log: RewriteLog) -> Result:
    return program, Count()


def by_optional(program: Block, log: RewriteLog, start: Optional[Count]) -> tuple[Block, Optional["Count"]]:  # noqa: UP037, UP045
    return program, start


def by_annotated(program: Block, log: RewriteLog, start: typing.Annotated[Count, "first"]) -> typing.Annotated[Result, "it"]:
    return program, start


class Called:
    def __call__(self, program: Block, log: RewriteLog, start: Count) -> Result:
        return program, start


def with_more(more: int, program: Block, log: RewriteLog) -> Result:
    return program, Count(more)


@functools.wraps(with_more)
def wrapped(*arguments: Any) -> Any:
    return with_more(*arguments)


PARTIAL = functools.partial(with_more, 1)


@pytest.mark.parametrize(
    "function, needs",
    [
        (by_tuple_of_typing, set()), (by_an_alias, set()), (by_optional, {Count}), (by_annotated, {Count}),
        (Called(), {Count}), (Called().__call__, {Count}), (PARTIAL, set()), (functools.partial(wrapped, 2), set()),
    ],
    ids="tuple_of_typing alias optional annotated object bound_method partial partial_of_wrapped".split(),
)  # fmt: skip
def test_a_signature_is_read_however_it_is_written(function: Any, needs: set[type]) -> None:
    pass_ = Pass("any", function, frozenset())
    assert pass_.needs == needs and pass_.gives == {Count}


def test_the_pass_gives_what_its_alias_says() -> None:
    for function in (by_tuple_of_typing, by_an_alias, by_optional, by_annotated, Called(), PARTIAL):
        artifacts = Artifacts()
        Pass("any", function, frozenset())(with_branches(), artifacts=artifacts)
        assert type(artifacts[Count]) is Count


def test_a_local_class_is_found_where_the_pass_uses_it_and_is_else_an_error() -> None:
    class Local:
        def __add__(self, other: Local) -> Local:
            return self

    def uses(program: Block, log: RewriteLog) -> tuple[Block, Local]:
        return program, Local()

    assert Pass("uses", uses, frozenset()).gives == {Local}

    @graph_pass(effects=())
    def uses_what_follows(program: Block, log: RewriteLog) -> tuple[Block, Local]:
        return program, Local() if later else None

    later: list[int] = []
    assert uses_what_follows.gives == {Local}

    def only_names(program: Block, log: RewriteLog, local: Local) -> Block:
        return program

    def gives_one(program: Block, log: RewriteLog) -> tuple[Block, Elsewhere]:  # type: ignore[name-defined]  # noqa: F821
        return program, None

    for function, what in ((only_names, "parameter local"), (gives_one, "result")):
        with pytest.raises(PassSignatureError, match=rf"the {what} of the pass \w+ is annotated '.*', which cannot be read"):
            graph_pass(effects=())(function)


def test_a_program_that_is_imported_for_type_checkers_alone_is_no_artifact() -> None:
    def plain(program: Unknown, log: RewriteLog) -> Unknown:  # type: ignore[name-defined]  # noqa: F821
        return program

    program = with_branches()
    assert graph_pass(effects=())(plain)(program) is program


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
