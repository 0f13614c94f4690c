"""Emission: a Program as a ScriptModule.

    _chunk_0 ... _chunk_n   the calls, `chunk_size` of them in each (one huge function compiles in quadratic time)
    forward                 checks the inputs, detaches them, runs the chunks, builds the outputs
    <user's paths>          the constants, as parameters and buffers
    packed                  weights laid out for oneDNN, packed again whenever the file is loaded
    prepared                what other prepack ops make of constants, beside these; likewise

The text names ops without their overloads, so after compiling every call is compared with the Program's overload.

The module is for inference: oneDNN's ops have no gradients and would give wrong ones silently, so results never require
them, whatever the inputs do.
"""

from __future__ import annotations

import torch
from torch.jit import ScriptModule

from ir_tools.emit.constants import build_tree, free_name, place_constants
from ir_tools.emit.emitted_text import UNREAD, EmittedText
from ir_tools.emit.forward import write_methods
from ir_tools.emit.hoisting import hoisted_in, plain_constants, prepacks
from ir_tools.emit.overload_check import check_overloads
from ir_tools.emit.packed_weights import add_boxes, attach_packing
from ir_tools.emit.refusals import refuse_what_libtorch_lacks, refuse_writes_into_lists
from ir_tools.emit.torch_jit import define, script_tree
from ir_tools.errors import EmitError
from ir_tools.ir.program import Program


def emit(program: Program, chunk_size: int = 250) -> ScriptModule:
    """A ScriptModule in eval mode that computes `program`.

    Parameters and buffers are the Program's own tensors until the module is saved or `round_trip`ped; state is a copy.
    Raises EmitError, naming the node, for what TorchScript cannot hold or reads differently.
    """
    text = written(program, chunk_size)
    root = build_tree(program, text.paths)
    for name, value in text.floats.items():
        setattr(root, name, torch.jit.Attribute(value, float))
    if text.unread:
        setattr(root, UNREAD, torch.jit.Attribute(torch.empty(0), torch.Tensor))
    add_boxes(root, text.hoisted)
    scripted = script_tree(root)
    attach_packing(scripted, program, text.hoisted, chunk_size)
    for name, method in text.methods.items():
        _compile(scripted, name, method)
    for name, statements in text.chunks.items():
        check_overloads(scripted, name, statements)
    return scripted


def written(program: Program, chunk_size: int) -> EmittedText:
    """The text of all methods, before TorchScript sees it. Raises EmitError for what stock libtorch could not run."""
    if chunk_size < 1:
        raise EmitError(f"chunk_size must be at least 1, got {chunk_size}")
    refuse_what_libtorch_lacks(program)
    refuse_writes_into_lists(program.graph)
    hoisted = prepacks(program)
    paths = place_constants(plain_constants(program, hoisted))
    names = free_name("packed", paths.values()), free_name("prepared", paths.values())
    text = EmittedText(paths, hoisted_in(hoisted, *names))
    write_methods(program, text, chunk_size)
    return text


def _compile(scripted: ScriptModule, name: str, text: str) -> None:
    try:
        define(scripted, text)
    except RuntimeError as error:
        raise EmitError(f"TorchScript does not accept the text of {name}:\n{str(error).strip()}") from error
