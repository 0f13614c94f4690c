"""Random TorchScript programs, captured and emitted unchanged, give what the original gives, on any input.

TorchScript runs without its optimiser here, which loses writes in torch 2.13: with `ys = [x, x * 0.5]`, an
`ys[-1].mul_(0.5)` in a branch or loop is gone by the time of `torch.stack(ys)`. The programs do such things.
"""

from __future__ import annotations

import ast
from collections import Counter
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ir_tools.frontends.capture import capture
from ir_tools.frontends.source import prepare
from passes import optimize
from passes.errors import EmitError
from tests.script_programs import RandomProgram, calls, programs, written

slow_start = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
LOOPS = (ast.For, ast.While)


def copies(call: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return [t.clone() for t in call]


def unoptimised(function: Any, call: tuple[torch.Tensor, ...]) -> Any:
    """What a TorchScript function gives on copies of its arguments."""
    with torch.no_grad(), torch.jit.optimized_execution(False):
        return function(*copies(call))


def assert_equal(expected: tuple[torch.Tensor, ...], got: tuple[torch.Tensor, ...]) -> None:
    assert len(expected) == len(got) == 3
    for e, g in zip(expected, got):
        assert (e.shape, e.dtype) == (g.shape, g.dtype)
        torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-6)


outcomes: Counter[str] = Counter()


@slow_start
@given(programs(), st.integers(0, 4))
def captured_and_emitted_unchanged_they_agree(program, example):
    """Emitted text and the interpreted graph alike; the example inputs are one call of five."""
    scripted, call = program.script(), calls(5)[example]
    graph = capture(prepare(scripted, [(call, {})]), "script").program
    try:
        fast = optimize(scripted, [], example_inputs=call, engine="aten", verify="off")
    except EmitError as error:
        # Such a write TorchScript would lose: the graph is right, and is not emitted.
        assert "writes into a tensor that a list or dict holds" in str(error)
        fast = None
    outcomes["refused" if fast is None else "emitted"] += 1
    for call in calls(5):
        expected = unoptimised(scripted, call)
        assert_equal(expected, graph(*copies(call)))
        if fast is not None:
            assert_equal(expected, unoptimised(fast, call))


def test_captured_and_emitted_unchanged_they_agree_on_other_inputs_too():
    captured_and_emitted_unchanged_they_agree()
    assert outcomes["emitted"] > outcomes["refused"]


# -- the generator ------------------------------------------------------------------------------------------------------


@slow_start
@given(programs())
def test_programs_mean_the_same_to_python_and_torchscript(program):
    """They compile, end, leave their inputs alone, and their values stay finite and small."""
    scripted, python = program.script(), program.python()
    for call in calls(3):
        inputs = copies(call)
        expected = python(*inputs)
        assert_equal(expected, unoptimised(scripted, call))
        assert all(torch.equal(before, after) for before, after in zip(call, inputs))
        assert all(t.isfinite().all() and t.abs().max() < 1e3 for t in expected)


def test_programs_have_the_control_flow_that_they_are_there_for():
    """Ifs, loops in loops, breaks, early returns are common, and conditions have both outcomes on different inputs."""
    seen: Counter[str] = Counter()

    @settings(parent=slow_start, max_examples=60, derandomize=True)
    @given(programs())
    def look(program):
        tree = ast.parse(program.text)
        loops = [node for node in ast.walk(tree) if isinstance(node, LOOPS)]
        inside = [node for loop in loops for part in loop.body for node in ast.walk(part)]
        ifs = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
        returns = [node for node in ast.walk(tree) if isinstance(node, ast.Return)][1:]
        seen.update(program.kinds.keys())
        seen["programs"] += 1
        seen["a loop"] += bool(loops)
        seen["a loop in a loop"] += any(isinstance(node, LOOPS) for node in inside)
        seen["an if in a loop"] += any(isinstance(node, ast.If) for node in inside)
        seen["an if in an if"] += any(isinstance(n, ast.If) for node in ifs for part in node.body for n in ast.walk(part))
        seen["break or continue"] += any(isinstance(node, (ast.Break, ast.Continue)) for node in inside)
        seen["two returns"] += bool(returns)
        for (_, kind), (was_true, was_false) in program.outcomes(calls(8)).items():
            seen[kind] += 1
            seen[f"{kind} both outcomes"] += was_true and was_false

    look()
    print(dict(seen))
    least = {
        "a loop": 0.4, "a loop in a loop": 0.2, "an if in a loop": 0.3, "an if in an if": 0.2, "break or continue": 0.2,
        "two returns": 0.15, "assign": 0.4, "new_variable": 0.2, "in_place": 0.15, "on_list": 0.15, "on_container": 0.15,
        "swap": 0.15, "on_optional": 0.15, "if_": 0.4, "define_in_both": 0.3, "for_": 0.2, "while_": 0.2, "leave": 0.2,
    }  # fmt: skip
    rare = {kind: seen[kind] for kind, share in least.items() if seen[kind] < share * seen["programs"]}
    assert not rare
    assert seen["If"] > 2 * seen["programs"] and seen["If both outcomes"] > 0.2 * seen["If"]
    assert seen["While"] > 0.5 * seen["programs"] and seen["While both outcomes"] > 0.2 * seen["While"]


def test_a_program_that_goes_wrong_is_noticed():
    """The comparison can fail: the branch that the example takes, kept as the only one, is found out by the other inputs."""
    body = ["if bool(x1.sum() > 0.0):", "    x1 = x1 * 0.5"]
    program, straight = (RandomProgram(written(lines), Counter()) for lines in (body, ["x1 = x1 * 0.5"]))
    wrong = 0
    for call in calls(5):
        try:
            assert_equal(unoptimised(program.script(), call), unoptimised(straight.script(), call))
        except AssertionError:
            wrong += 1
    assert 0 < wrong < 5
