"""What every front end starts from and ends with: the bound example calls, the signature, the draft, the finished Program.

Whatever runs the user's model runs it inside `undisturbed`.
"""

from __future__ import annotations

import contextlib
import inspect
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from ir_tools.errors import first_line
from ir_tools.frontends.dynamic import DynamicShapesError, Symbols, declared_sizes, specified, unique
from ir_tools.frontends.errors import CaptureError
from ir_tools.frontends.exported import (
    exported_parameters,
    in_exported_order,
    is_exported_module,
    refuse_training,
    sizes_of_exported,
)
from ir_tools.frontends.normalize import purify
from ir_tools.ir import Draft, InputSpec, Program, Signature, check_wellformed
from ir_tools.ir.signature import (
    Condition,
    DynamicSize,
    SignatureError,
    binder,
    flatten_result,
    leaf_names,
    result_leaves,
    split_leaves,
)
from ir_tools.torch_compat import pytree
from ir_tools.torch_compat.dispatch import TorchDispatchMode
from ir_tools.torch_compat.jit import forward_schema, module_from_bytes, module_to_bytes
from ir_tools.torch_compat.modules import own_buffers
from ir_tools.verify.numerics import compare

Model = nn.Module | torch.export.ExportedProgram


@dataclass
class Example:
    """One call of the model: its bound arguments, the tensors in it, and what the user's model answered."""

    arguments: dict[str, Any]
    tensors: list[torch.Tensor]
    outputs: list[torch.Tensor]


@dataclass
class Source:
    """A model ready for capture: how it is called, and example calls with the user's own answers."""

    model: nn.Module
    exported: torch.export.ExportedProgram | None
    signature: Signature
    examples: list[Example]
    dynamic: list[dict[int, DynamicSize]] = field(default_factory=list)  # per input: its dynamic axes
    reference: Reference | None = None

    def answer(self, arguments: dict[str, Any]) -> Any:
        """What the user's model gives on one call."""
        return (self.reference or Reference(self.model)).answer(arguments)

    @property
    def tensors(self) -> list[torch.Tensor]:
        return self.examples[0].tensors

    @property
    def is_dynamic(self) -> bool:
        return any(self.dynamic)


class Reference:
    """Who answers for the user's model: the model itself, or for TorchScript a copy that runs without torch's optimiser.

    That optimiser (torch 2.13) drops writes into tensors that a list holds. It is switched off for a copy because a graph keeps
    the mode that it first ran in.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.unoptimised = False
        if isinstance(model, torch.jit.ScriptModule):
            try:
                self.model = module_from_bytes(module_to_bytes(model)).eval()
                self.unoptimised = True
            except RuntimeError:  # what cannot be saved, such as a call back into Python, answers for itself
                self.model = model

    def answer(self, arguments: dict[str, Any]) -> Any:
        with torch.jit.optimized_execution(False) if self.unoptimised else contextlib.nullcontext():
            return answer(self.model, arguments)


class FlatModel(nn.Module):
    """The user's model as a function from flat tensors to a list of tensors, for front ends that know only those."""

    def __init__(self, model: nn.Module, signature: Signature):
        super().__init__()
        self.model = model
        self.signature = signature

    def forward(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        leaves = result_leaves(call_model(self.model, self.signature.arguments(tensors)))
        # Not every tensor is an output: a size that the model returns is a tensor while torch.jit.trace looks on.
        return [leaf for leaf, kind in zip(leaves, self.signature.out_leaves, strict=True) if isinstance(kind, int)]


def call_model(model: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Call with bound arguments (`binder`), positional-only ones, `*args` and `**kwargs` included."""
    bound = inspect.BoundArguments(inspect.Signature(forward_parameters(model)), {})  # type: ignore[arg-type]
    named = {n: p for n, p in bound.signature.parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}
    bound.arguments.update((n, v) for n, v in arguments.items() if n in named)
    if any(named[n].kind is inspect.Parameter.VAR_POSITIONAL for n in bound.arguments):
        bound.apply_defaults()  # what stands before *args goes by position, so none of it may be left out
    return model(*bound.args, **bound.kwargs, **{n: v for n, v in arguments.items() if n not in named})


def forward_parameters(model: Any) -> list[inspect.Parameter]:
    """The parameters of `forward`, without self."""
    if isinstance(model, torch.jit.ScriptModule):
        parameters = []
        for a in forward_schema(model).arguments[1:]:
            default = a.default_value if a.has_default_value() else inspect.Parameter.empty
            kind = inspect.Parameter.KEYWORD_ONLY if a.kwarg_only else inspect.Parameter.POSITIONAL_OR_KEYWORD
            parameters.append(inspect.Parameter(a.name, kind, default=default))
        return parameters
    if is_exported_module(model):
        return exported_parameters(model)
    return list(inspect.signature(model.forward).parameters.values())


# -- leaving things as found --------------------------------------------------------------------------------------------


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


def answer(model: nn.Module, arguments: dict[str, Any]) -> Any:
    """What the user's model gives on one call, run eagerly, leaving no trace. Inputs written by the model are copies.

    Raises `CaptureError` for what no front end can see: state kept in attributes, numbers read out of tensors.
    """

    def run() -> Any:
        with seeded():
            result = call_model(model, pytree.tree_map_only(torch.Tensor, torch.clone, arguments))
        # A result may be a buffer, which is put back when this is over.
        return pytree.tree_map_only(torch.Tensor, torch.clone, result)

    with undisturbed(model):
        before, plain = _attributes(model), _plain_state(model)
        result = run()
        if (once := _plain_state(model)) != plain:
            again = run()
            # What is merely remembered (the last size) is the same after a second run; a log that grows is read by nobody
            # as long as the answers stay.
            moving = sorted(name for name, value in _plain_state(model).items() if value != once.get(name))
            grows_only = all(isinstance(once.get(name), (list, dict)) for name in moving)
            if moving and not (grows_only and _same_answer(result, again) and _same_answer(result, run())):
                raise CaptureError(
                    f"forward keeps state in self.{', self.'.join(moving)}, which changes from call to call: keep such state "
                    "in a buffer and write into it in place (self.n.add_(1), self.cache.copy_(new))"
                )
        assigned = sorted(name for name, value in _attributes(model).items() if before.get(name) is not value)
        if assigned and not _same_answer(result, run()):
            raise CaptureError(
                f"the model's answer changes from call to call, and forward assigns self.{', self.'.join(assigned)}: "
                "keep such state in a buffer and write into it in place (self.n.add_(1), self.cache.copy_(new))"
            )
    numbers = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, (int, float, complex))]
    if numbers:
        with undisturbed(model), _NumbersRead() as read:
            run()
        if read.count:
            raise CaptureError(
                f"the model returns the number {numbers[0]!r} and reads numbers out of tensors (item(), int(), float()): "
                "a number cannot follow the data in a compiled model; return a tensor in its place"
            )
    return result


class _NumbersRead(TorchDispatchMode):
    """Counts how often a number is read out of a tensor."""

    count = 0

    def __torch_dispatch__(self, target: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.count += target is torch.ops.aten._local_scalar_dense.default
        return target(*args, **(kwargs or {}))


def _attributes(model: nn.Module) -> dict[str, Any]:
    """Every attribute and buffer of the modules by path, but not TorchScript's, which its front end watches."""
    if isinstance(model, torch.jit.ScriptModule):
        return {}
    return {
        f"{path}.{name}".lstrip("."): value
        for path, module in model.named_modules()
        for name, value in (*vars(module).items(), *own_buffers(module).items())
    }


_OF_TORCH = frozenset(vars(nn.Module()))


def _plain_state(model: nn.Module) -> dict[str, Any]:
    """What attributes hold that are no tensors: numbers, strings, and how long containers are and what is in them."""
    if isinstance(model, torch.jit.ScriptModule):
        return {}
    return {
        f"{path}.{name}".lstrip("."): _plain(value)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if name not in _OF_TORCH
    }


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, complex, str)):
        return value
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return len(value) if isinstance(value, (set, frozenset)) else type(value).__name__


def _same_answer(first: Any, second: Any) -> bool:
    (one, tensors), (two, others) = (split_leaves(result_leaves(result)) for result in (first, second))
    return one == two and compare(tensors, others).equal


# -- preparing ----------------------------------------------------------------------------------------------------------


def prepare(model: Model, calls: Sequence[tuple[tuple, dict[str, Any]]], dynamic_shapes: Any = None) -> Source:
    """Bind the example calls, run the user's model on them, and write down its signature.

    Raises `CaptureError` when the model itself fails on an example, or the examples disagree in structure;
    `DynamicShapesError` when `dynamic_shapes` does not fit them.
    """
    exported = model if isinstance(model, torch.export.ExportedProgram) else None
    module = model.module() if isinstance(model, torch.export.ExportedProgram) else model
    if exported is not None:
        refuse_training(exported)
    bind = binder(forward_parameters(module))
    examples: list[Example] = []
    reference = Reference(module)
    signature: Signature | None = None
    dynamic: list[dict[int, DynamicSize]] = []
    for args, kwargs in calls:
        arguments = bind(*args, **kwargs)
        if exported is not None:
            arguments = in_exported_order(exported, arguments)
        leaves, in_tree = pytree.tree_flatten(arguments)
        in_leaves, tensors = split_leaves(leaves)
        try:
            result = reference.answer(arguments)
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(
                f"the model itself fails on the example inputs: {type(error).__name__}: {first_line(error)}"
            ) from error
        leaves, out_tree = flatten_result(result)
        out_leaves, outputs = split_leaves(leaves)
        if not outputs:
            raise CaptureError("the model returns no tensor on the example inputs; there is nothing to compute")
        names = [n for n, leaf in zip(leaf_names(in_tree), in_leaves, strict=True) if isinstance(leaf, int)]
        if signature is None:
            dynamic = (
                declared_sizes(dynamic_shapes, arguments) if exported is None else sizes_of_exported(exported, dynamic_shapes)
            )
        specs = tuple(InputSpec(n, tuple(t.shape), t.dtype) for n, t in zip(names, tensors, strict=True))
        if [len(s.shape) for s in specs] == [len(s.shape) for s in (signature.inputs if signature else specs)]:
            specs = specified(specs, dynamic)
        this = Signature(
            bind, tuple(arguments), specs, in_tree, in_leaves, out_tree, out_leaves
        )
        if signature is None:
            signature = this
        elif (this.inputs, this.in_tree, this.in_leaves, this.out_tree) != (
            signature.inputs, signature.in_tree, signature.in_leaves, signature.out_tree,
        ):  # fmt: skip
            raise CaptureError(
                "the example inputs differ in structure, shape or dtype: "
                f"first {signature.describe()}; another {this.describe()}"
            )
        try:
            signature.check(tensors)
        except SignatureError as error:
            raise DynamicShapesError(f"an example does not fit dynamic_shapes: {error}") from None
        examples.append(Example(arguments, [t.detach().clone() for t in tensors], [t.detach().clone() for t in outputs]))
    if signature is None:
        raise CaptureError("no example inputs were given")
    return Source(module, exported, signature, examples, dynamic, reference)


class Capture(Draft[Program]):
    """A draft that a front end fills, and the symbols that stand for dynamic sizes in it."""

    def __init__(self, program: Program):
        super().__init__(program)
        self.symbols = Symbols(program.mode)


def start_draft(source: Source, frontend: str) -> tuple[Capture, list[fx.Node]]:
    """An empty draft with the placeholders of the source's signature."""
    draft = Capture(Program(fx.Graph(), signature=source.signature, frontend=frontend))
    nodes = [
        draft.placeholder("".join(c if c.isalnum() else "_" for c in spec.name), draft.symbols.fake(spec, tensor))
        for spec, tensor in zip(source.signature.inputs, source.tensors, strict=True)
    ]
    return draft, nodes


def finish(draft: Capture, outputs: Sequence[Any], conditions: Sequence[Condition] = ()) -> Program:
    """Close a draft that a front end filled: outputs, purification, sweeping, the contract.

    `conditions` on dynamic sizes are those that the front end itself found.
    """
    values = [draft.constant("constant", v) if isinstance(v, torch.Tensor) else v for v in outputs]
    if len(values) != draft.program.signature.output_count:
        raise CaptureError(
            f"the captured graph gives {len(values)} tensors, the model {draft.program.signature.output_count}"
        )
    draft.output(values)
    purify(draft)
    program = draft.finish()
    for name in program.state:  # nobody else may move it
        program.constants[name] = program.constants[name].clone()
    found = unique((*conditions, *draft.symbols.conditions()))
    program.signature = replace(program.signature, conditions=found)
    check_wellformed(program)
    return program
