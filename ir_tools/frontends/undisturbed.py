"""Leaving things as found: the user's model, the random generators and torch's switches, whatever is run in between.

Whatever runs the user's model runs it inside `undisturbed`.
"""

from __future__ import annotations

import contextlib
import random
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

one_at_a_time = threading.RLock()
"""Held wherever the user's model runs or random generators are set: two threads would put back each other's changes."""


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run something on the user's model and put tensors, attributes, random generators and switches back afterwards."""
    with one_at_a_time:
        containers, tensors = _state_of(model)
        fast_path = torch.backends.mha.get_fastpath_enabled()
        try:
            # Another seed than that of the runs compared: a random tensor that a front end bakes in must not go unseen.
            with seeded(1), torch.no_grad():
                torch.backends.mha.set_fastpath_enabled(False)
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            for container, content in containers:
                _put_back(container, content)
            with torch.no_grad():
                for tensor, memory, value in tensors:
                    if not _same_memory(tensor, memory):
                        tensor.data = memory
                    if not _same_bits(memory, value):
                        memory.copy_(value)


def _put_back(container: Any, content: Any) -> None:
    """Undo what changed and touch nothing else: another thread may be reading the container."""
    if isinstance(container, set):
        container.intersection_update(content)
        container.update(content)
    elif isinstance(container, list):
        if [id(part) for part in container] != [id(part) for part in content]:
            container[:] = content
    else:
        for key in container.keys() - content.keys():
            del container[key]
        for key, value in content.items():
            if key not in container or container[key] is not value:
                container[key] = value
        if list(container) != list(content):  # what was deleted came back at the end
            for key in content:
                container[key] = container.pop(key)


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.layout is not torch.strided or b.layout is not torch.strided:
        return a.layout is b.layout
    return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Unlike `torch.equal`: NaN is equal to itself, and 0.0 is not -0.0."""
    if a.is_meta:
        return True
    if a.is_quantized:
        a, b = a.int_repr(), b.int_repr()
    if a.layout is not torch.strided:
        a, b = a.to_dense(), b.to_dense()
    return torch.equal(*(t.resolve_conj().resolve_neg().contiguous().flatten().view(torch.uint8) for t in (a, b)))


Kept = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _state_of(model: nn.Module) -> tuple[list[tuple[Any, Any]], list[Kept]]:
    """What a run of the model may change: attributes and containers in them, each with a copy, and every tensor.

    A tensor comes with its memory (`.data`, so that writing it back is no new `_version`) and a copy of its values.
    """
    containers: dict[int, tuple[Any, Any]] = {}
    tensors: dict[int, Kept] = {}

    def visit(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            tensors[id(value)] = (value, value.data, value.data.clone())
        elif isinstance(value, (list, dict, set, tuple)) and id(value) not in containers:
            if not isinstance(value, tuple):
                containers[id(value)] = (value, dict(value) if isinstance(value, dict) else list(value))
            for part in value.values() if isinstance(value, dict) else value:
                visit(part)

    if isinstance(model, torch.jit.ScriptModule):
        visit([*model.parameters(), *model.buffers()])
    else:
        for module in model.modules():
            visit(vars(module))
    return list(containers.values()), list(tensors.values())


@contextlib.contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Run something with the random numbers of every other such run; the generators are put back afterwards."""
    numpy_random = sys.modules.get("numpy.random")  # a model that draws from it has imported it
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with one_at_a_time:
        python_state = random.getstate()
        numpy_state = numpy_random.get_state() if numpy_random else None
        try:
            with torch.random.fork_rng(devices=devices):
                random.seed(seed)
                torch.manual_seed(seed)
                if numpy_random:
                    numpy_random.seed(seed)
                yield
        finally:
            random.setstate(python_state)
            if numpy_random:
                numpy_random.set_state(numpy_state)
