"""Trials of a captured Program on inputs that are not the examples: other sizes where sizes are dynamic, other values where
the graph branches on values. The Program must then agree with the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from ir_tools.errors import CaptureError, SignatureError, first_line
from ir_tools.frontends.perturbed_inputs import perturbed
from ir_tools.frontends.source import Source
from ir_tools.frontends.undisturbed import seeded
from ir_tools.ir import Program
from ir_tools.ir.program import all_nodes
from ir_tools.ir.regions import is_region
from ir_tools.ir.signature import DynamicSize, Signature, result_leaves
from ir_tools.verify.numerics import compare

Sizes = dict[str, int]

SMALLEST_SQNR_OF_A_TRACE = 60.0
"""In dB, below which two float computations of one function are taken to be of different functions."""


def tried(program: Program, source: Source) -> tuple[Program, list[str]]:
    """The Program, held to the sizes at which it was not found wrong, and lines for the report.

    Raises `CaptureError` when it differs from the model on other sizes or values.
    """
    lines: list[str] = []
    for example in source.examples:
        try:
            program.signature.check(example.tensors)
        except SignatureError as error:
            raise CaptureError(f"the captured graph does not take the example inputs: {error}") from None
    if any(is_region(node) for node in all_nodes(program.graph)):
        lines.append(_on_other_values(program, source))
    if program.signature.dynamic_sizes:
        lines.append(_on_other_sizes(program, source))
        program, at_one = _at_size_one(program, source)
        lines += at_one
    return program, lines


def _on_other_values(program: Program, source: Source) -> str:
    count = 0
    for kind, tensors in perturbed(source.tensors):
        problem = difference(program, source, tensors)
        if problem is None:
            continue
        if problem:
            raise CaptureError(f"the captured graph differs from the model on {kind} inputs: {problem}")
        count += 1
    return f"the graph branches on values; it agrees with the model on {count} sets of perturbed inputs too"


def _on_other_sizes(program: Program, source: Source) -> str:
    """Raises `CaptureError` for a size declared dynamic of which no other one that was tried is allowed."""
    agreed: list[str] = []
    for sizes in _other_sizes(program.signature, source):
        problem = difference(program, source, resized(program.signature, source.tensors, sizes))
        if problem is None:
            continue
        tried = ", ".join(f"{name}={size}" for name, size in sizes.items())
        if problem:
            raise CaptureError(f"the captured graph differs from the model at other sizes ({tried}): {problem}")
        agreed.append(tried)
    return f"dynamic sizes: agrees with the model at {'; '.join(agreed) or 'no other sizes: it takes none that were tried'}"


def _at_size_one(program: Program, source: Source) -> tuple[Program, list[str]]:
    """Sizes that may not be 1, where the Program then differs from the model, are 2 or more."""
    signature, lines = program.signature, []
    given = _example_sizes(signature, source)
    for name, (size, _) in signature.dynamic_sizes.items():
        sizes = {**given, name: 1}
        if size.least > 1 or not _allowed(signature, sizes):
            continue
        problem = difference(program, source, resized(signature, source.tensors, sizes))
        if problem:
            lines.append(f"{name} = 1 is another graph ({problem}); the file takes 2 and more")
            signature = _at_least_two(signature, name)
    return (replace(program, signature=signature) if lines else program), lines


def _at_least_two(signature: Signature, name: str) -> Signature:
    inputs = tuple(
        replace(spec, shape=tuple(_raised(size, name) for size in spec.shape)) for spec in signature.inputs
    )
    return replace(signature, inputs=inputs)


def _raised(size: int | DynamicSize, name: str) -> int | DynamicSize:
    return replace(size, least=2) if isinstance(size, DynamicSize) and size.name == name else size


def difference(program: Program, source: Source, tensors: Sequence[torch.Tensor]) -> str | None:
    """How the Program differs from the model on these inputs; "" when it does not, None when the model rejects them."""
    try:
        leaves = result_leaves(source.answer(source.signature.arguments(tensors)))
    except Exception:  # the model itself rejects them: no finding
        return None
    return how_it_differs(program, tensors, [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)])


def how_it_differs(program: Program, tensors: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> str:
    """How the Program's outputs on `tensors` differ from `expected`, in words; "" when they do not."""
    try:
        with seeded():
            got = program.run(*(t.clone() for t in tensors))
    except Exception as error:
        return f"it raises {type(error).__name__}: {first_line(error)}"
    result = compare(expected, got)
    if result.problem:
        return result.problem
    return f"SQNR {result.sqnr_db:.0f} dB" if result.sqnr_db < SMALLEST_SQNR_OF_A_TRACE else ""


# -- sizes --------------------------------------------------------------------------------------------------------------


def _example_sizes(signature: Signature, source: Source) -> Sizes:
    found = {name: locations[0] for name, (_, locations) in signature.dynamic_sizes.items()}
    return {name: source.tensors[number].shape[axis] for name, (number, axis) in found.items()}


def _other_sizes(signature: Signature, source: Source) -> Iterator[Sizes]:
    """Sizes to try: all of them larger, then each alone, as near to the example's as the conditions allow."""
    given = _example_sizes(signature, source)
    together = [{name: size * 2 for name, size in given.items()}, {name: size + 1 for name, size in given.items()}]
    yield from (sizes for sizes in together if _allowed(signature, sizes))
    for name, size in given.items():
        near = (size + 1, size + 2, size + 4, size * 2, size * 3, size - 1, size - 2, size // 2)
        fits = [sizes for n in near if n > 1 and n != size and _allowed(signature, sizes := {**given, name: n})]
        alone = [condition.text for condition in signature.conditions if condition.names == (name,)]
        if not fits and alone:
            raise CaptureError(
                f"the size {name!r} is declared dynamic, but the model as captured takes hardly any but {size}: it must meet "
                f"{' and '.join(alone)}"
            )
        yield from fits[:1]


def _allowed(signature: Signature, sizes: Sizes) -> bool:
    in_range = all(
        size.least <= sizes[name] <= (size.most or sizes[name]) for name, (size, _) in signature.dynamic_sizes.items()
    )
    return in_range and all(condition.holds(sizes) for condition in signature.conditions)


def resized(signature: Signature, tensors: Sequence[torch.Tensor], sizes: Sizes) -> list[torch.Tensor]:
    """The inputs with dynamic axes cut or repeated to `sizes`; values are those of the examples."""
    out = []
    for spec, tensor in zip(signature.inputs, tensors, strict=True):
        for axis, size in enumerate(spec.shape):
            if isinstance(size, DynamicSize):
                tensor = _with_size(tensor, axis, sizes[size.name])
        out.append(tensor)
    return out


def _with_size(tensor: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    have = max(tensor.shape[axis], 1)
    repeats: list[Any] = [1] * tensor.dim()
    repeats[axis] = -(-size // have)
    return tensor.repeat(repeats).narrow(axis, 0, size).contiguous()
