"""Dynamic sizes: what the user declares (torch.export's convention), symbols for them, and the conditions they must meet.

    dynamic_shapes={"x": {0: Dim("batch"), 2: Dim("height", min=32)}}       by the names of forward's arguments
    dynamic_shapes=({0: Dim("batch")}, None)                                or by position

A size is a symbol while a model is captured. What torch asks of it on the way (that two sizes are equal, that a height is
even) is kept as conditions on the sizes; the Program, and the file made from it, hold for those sizes only, and say so.
"""

from __future__ import annotations

import ast
import keyword
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch.export import Dim
from torch.export.graph_signature import InputKind

from ir_tools.errors import PassesError
from ir_tools.frontends.errors import CaptureError
from ir_tools.ir.signature import Condition, DynamicSize, InputSpec
from ir_tools.torch_compat import pytree
from ir_tools.torch_compat.export import DimHint, DimHintKind, NamedSource, guards_of
from ir_tools.torch_compat.fake import FakeTensorMode
from ir_tools.torch_compat.symbols import (
    DimDynamic,
    PythonPrinter,
    ValueRanges,
    backed_size_oblivious,
    bounds_of,
    expression_as_made,
)

LEAST_HINT = 2
"""Sizes 0 and 1 broadcast, so that what holds for them holds for no other: a symbol never starts from one of these."""


UNBOUNDED = 2**62
"""From here on a bound is none: torch has several spellings of infinity."""


class DynamicShapesError(PassesError, ValueError):
    """`dynamic_shapes` does not fit the inputs, or is written in a way that torch.export would not take either."""


# -- what the user declares ---------------------------------------------------------------------------------------------


def declared_sizes(dynamic_shapes: Any, arguments: dict[str, Any]) -> list[dict[int, DynamicSize]]:
    """Per tensor of a bound call, in pytree order: its dynamic axes.

    Raises `DynamicShapesError` naming the argument.
    """
    by_name = _by_name(dynamic_shapes, arguments)
    found: list[dict[int, DynamicSize]] = []
    for name, value in arguments.items():
        found += _of_value(by_name.get(name), value, name)
    if dynamic_shapes is not None and not any(found):
        raise DynamicShapesError("dynamic_shapes declares no size dynamic; leave it out, or give a Dim for an axis")
    _keep_apart(found)
    _check_agreement(found, [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, torch.Tensor)])
    return found


def _keep_apart(found: list[dict[int, DynamicSize]]) -> None:
    """Sizes without a Dim are named by where they stand, `x[0]` and `x_0` alike: each gets a name of its own."""
    taken: set[str] = set()
    for own in found:
        for axis, size in own.items():
            if size.name.endswith("_"):
                while size.name in taken:
                    size = replace(size, name=f"{size.name}_")
                own[axis] = size
                taken.add(size.name)


def _check_agreement(found: list[dict[int, DynamicSize]], tensors: list[torch.Tensor]) -> None:
    """Sizes of one name have one range, and are equal in the example."""
    first: dict[str, tuple[DynamicSize, int]] = {}
    for own, tensor in zip(found, tensors, strict=True):
        for axis, size in own.items():
            other, given = first.setdefault(size.name, (size, tensor.shape[axis]))
            if other != size:
                raise DynamicShapesError(f"two sizes are called {size.name!r} and have different ranges; give one a new name")
            if given != tensor.shape[axis]:
                raise DynamicShapesError(
                    f"sizes of one Dim are equal in every call, but {size.name!r} is {given} and {tensor.shape[axis]} "
                    "in the example; give each axis its own Dim"
                )


def _by_name(dynamic_shapes: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    if dynamic_shapes is None:
        return {}
    names = ", ".join(arguments)
    if isinstance(dynamic_shapes, dict):
        unknown = [name for name in dynamic_shapes if name not in arguments]
        if unknown:
            raise DynamicShapesError(f"dynamic_shapes names {unknown[0]!r}, which is no argument of the call; it has: {names}")
        return dynamic_shapes
    if isinstance(dynamic_shapes, (tuple, list)):
        if len(dynamic_shapes) != len(arguments):
            raise DynamicShapesError(
                f"dynamic_shapes has {len(dynamic_shapes)} entries for {len(arguments)} arguments ({names}); give one for each"
            )
        return dict(zip(arguments, dynamic_shapes, strict=True))
    given = type(dynamic_shapes).__name__
    raise DynamicShapesError(f"dynamic_shapes must be a dict or a tuple, as for torch.export, got {given}")


def _of_value(spec: Any, value: Any, path: str) -> list[dict[int, DynamicSize]]:
    """The dynamic axes of every tensor in an argument."""
    if isinstance(value, torch.Tensor):
        return [_of_tensor(spec, value, path)]
    leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    if spec is None or (not leaves and all(part is None for part in pytree.tree_leaves(spec))):
        return [{} for _ in leaves]
    if isinstance(value, dict) and isinstance(spec, dict) and spec.keys() <= value.keys():
        return [d for key, part in value.items() for d in _of_value(spec.get(key), part, f"{path}[{key!r}]")]
    if isinstance(value, (list, tuple)) and isinstance(spec, (list, tuple)) and len(spec) == len(value):
        pairs = enumerate(zip(value, spec, strict=True))
        return [d for i, (part, own) in pairs for d in _of_value(own, part, f"{path}[{i}]")]
    raise DynamicShapesError(f"dynamic_shapes of '{path}' must have the structure of the argument, got {spec!r}")


def _of_tensor(spec: Any, value: torch.Tensor, path: str) -> dict[int, DynamicSize]:
    if spec is None:
        return {}
    if isinstance(spec, (list, tuple)):
        if len(spec) != value.dim():
            raise DynamicShapesError(f"dynamic_shapes of '{path}' has {len(spec)} entries, the tensor {value.dim()} axes")
        spec = dict(enumerate(spec))
    if not isinstance(spec, dict):
        raise DynamicShapesError(f"dynamic_shapes of '{path}' must be a dict of axes, a tuple or None, got {spec!r}")
    sizes: dict[int, DynamicSize] = {}
    seen: set[int] = set()
    for axis, dim in spec.items():
        if not isinstance(axis, int) or not -value.dim() <= axis < value.dim():
            raise DynamicShapesError(f"dynamic_shapes of '{path}' names axis {axis!r}; the tensor has {value.dim()}")
        if axis % value.dim() in seen:
            raise DynamicShapesError(f"dynamic_shapes of '{path}' names axis {axis} twice")
        seen.add(axis % value.dim())
        size = _size(dim, value.shape[axis], f"{path}_{axis % value.dim()}", path, axis)
        if size is not None:
            sizes[axis % value.dim()] = size
    return sizes


def _size(dim: Any, given: int, name: str, path: str, axis: int) -> DynamicSize | None:
    """The declared size, None for one that is baked in."""
    if dim is None or (isinstance(dim, int) and dim == given):
        return None
    if isinstance(dim, DimHint):
        if dim.type is DimHintKind.STATIC:
            return None
        called = re.sub(r"\W+", "_", name)  # `_named` keeps such names free
        size = DynamicSize(f"{called}_", max(1, dim.min or 1), dim.max)
    elif isinstance(dim, Dim) and not hasattr(dim, "root"):
        size = DynamicSize(_named(dim, path, axis), max(1, int(dim.min)), int(dim.max) if dim.max < UNBOUNDED else None)
    else:
        raise DynamicShapesError(
            f"axis {axis} of '{path}' must be a torch.export.Dim, Dim.AUTO, Dim.DYNAMIC, Dim.STATIC or None, got {dim!r} "
            f"(the example has {given}); a size that is computed from another's, such as 2 * batch, is found by itself: give "
            "each axis its own Dim"
        )
    if not size.holds(given):
        raise DynamicShapesError(f"axis {axis} of '{path}' is {given} in the example, but {size.name} must be {size.allowed}")
    return size


def _named(dim: Any, path: str, axis: int) -> str:
    """The name of a Dim, which stands in conditions and in the file. Names that end in _ are those of sizes without one."""
    name = str(dim.__name__)
    if name in ("max", "min") or keyword.iskeyword(name) or not name.isascii() or name.endswith("_"):
        raise DynamicShapesError(
            f"the Dim of axis {axis} of '{path}' is called {name!r}, which cannot stand in a condition; choose another name, "
            "in plain letters, that is no word of Python and does not end in _"
        )
    return name


def specified(specs: Sequence[InputSpec], sizes: Sequence[dict[int, DynamicSize]]) -> tuple[InputSpec, ...]:
    """Input specs in which the declared axes are dynamic."""
    out = [
        replace(spec, shape=tuple(own.get(axis, size) for axis, size in enumerate(spec.shape)))
        for spec, own in zip(specs, sizes, strict=True)
    ]
    return tuple(out)


# -- symbols ------------------------------------------------------------------------------------------------------------


class Symbols:
    """The symbols of one Program under construction, by the names of the sizes."""

    def __init__(self, mode: FakeTensorMode):
        assert mode.shape_env is not None
        self.mode, self.env = mode, mode.shape_env
        self.by_name: dict[str, torch.SymInt] = {}
        self.sizes: dict[str, DynamicSize] = {}

    def fake(self, spec: InputSpec, example: torch.Tensor) -> torch.Tensor:
        """A fake tensor of the input: symbols for its dynamic sizes; its axes lie in memory as those of the example do."""
        if not spec.is_dynamic:
            return self.mode.from_tensor(example.detach(), static_shapes=True)
        sizes = [self._of(s, n) if isinstance(s, DynamicSize) else s for s, n in zip(spec.shape, example.shape, strict=True)]
        strides: tuple[int, ...] = example.stride()
        order = sorted(range(example.dim()), key=lambda axis: (-strides[axis], axis))
        with self.mode:
            laid_out = torch.empty([sizes[axis] for axis in order], dtype=example.dtype, device=example.device)
            return laid_out if order == sorted(order) else laid_out.permute([order.index(i) for i in range(len(order))])

    def _of(self, size: DynamicSize, example: int) -> torch.SymInt:
        if size.name not in self.by_name:
            source, hint = NamedSource(size.name), max(example, LEAST_HINT)
            symbol = self.env.create_symbol(
                hint, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None, do_not_specialize_zero_one=True
            )
            self.env.constrain_symbol_range(
                symbol, compiler_min=max(size.least, LEAST_HINT), compiler_max=size.most or 2**62
            )  # type: ignore[no-untyped-call]
            self.by_name[size.name] = self.env.create_symintnode(symbol, hint=hint, source=source)  # type: ignore[assignment]
            self.sizes[size.name] = size
        return self.by_name[size.name]

    def conditions(self) -> tuple[Condition, ...]:
        """What the capture asked of the sizes.

        Raises `CaptureError` for a declared size that turned out to have one value only, or a condition without a text.
        """
        names = {next(iter(expression_as_made(symint).free_symbols)): name for name, symint in self.by_name.items()}
        for symbol, name in names.items():
            value = self.env.replacements.get(symbol, symbol)
            if value.is_number:
                raise pinned(name, value)
        found = [g.expr for g in self.env.guards if g.expr.free_symbols and g.expr.free_symbols <= names.keys()]
        return unique(condition_of(e.xreplace({s: sympy.Symbol(n) for s, n in names.items()})) for e in found)


def pinned(name: str, value: Any) -> CaptureError:
    return CaptureError(
        f"the size {name!r} is declared dynamic, but the model as captured works for {name} = {value} only: "
        "it reads the size in Python, or computes with it; bake it in (None), or try another front end"
    )


def condition_of(expression: Any) -> Condition:
    """A condition from sympy, with the names of sizes for symbols."""
    return condition_from_text(PythonPrinter().doprint(expression))  # type: ignore[no-untyped-call]


SizeOf = Callable[[str, int], str | int | None]
"""What a guard calls the size of an axis -> its name, its number where it is baked in, None for what is no input."""


def condition_from_text(text: str, size_of: SizeOf = lambda source, axis: None) -> Condition:
    """A condition written in Python, in whole numbers only, as TorchScript reads it too.

    `size_of` names what stands there as `L['x'].size()[0]`, from `L['x']` and 0. Raises `CaptureError` for anything else.
    """
    try:
        spelled = _Spelling(size_of).visit(ast.parse(text, mode="eval")).body
    except (_NoCondition, SyntaxError):
        raise CaptureError(f"the dynamic sizes must meet {text}, which cannot be checked when the file runs") from None
    names = dict.fromkeys(n.id for n in ast.walk(spelled) if isinstance(n, ast.Name) and n.id not in ("max", "min"))
    return Condition(ast.unparse(spelled), tuple(names))


class _NoCondition(Exception):
    """An expression that is more than arithmetic on whole numbers."""


class _Spelling(ast.NodeTransformer):
    """Checks that an expression is one of whole numbers, and respells what TorchScript would read in another way."""

    PLAIN = (
        *(ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.BinOp, ast.Load),
        *(ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE),
    )

    def __init__(self, size_of: SizeOf):
        self.size_of = size_of

    def generic_visit(self, node: ast.AST) -> ast.AST:
        if not isinstance(node, self.PLAIN):
            raise _NoCondition
        return super().generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if not isinstance(node.value, int):  # True and False are
            raise _NoCondition
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        """TorchScript has no a < b < c."""
        sides = [self.visit(side) for side in (node.left, *node.comparators)]
        pairs: list[ast.expr] = [
            ast.Compare(left, [self.visit(op)], [right])
            for left, op, right in zip(sides, node.ops, sides[1:], strict=False)
        ]
        return pairs[0] if len(pairs) == 1 else ast.BoolOp(ast.And(), pairs)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        called = ast.unparse(node.func)
        if called in ("max", "min") and not node.keywords and len(node.args) > 1:
            return ast.Call(node.func, [self.visit(argument) for argument in node.args], [])
        if called in ("math.ceil", "math.floor") and isinstance(node.args[0], ast.BinOp):
            return self._rounded(node.args[0], up=called == "math.ceil")
        raise _NoCondition

    def _rounded(self, quotient: ast.BinOp, up: bool) -> ast.AST:
        """`math.ceil(a / b)` is `-(-a // b)`: sizes are far below 2**53, from where on a float would differ."""
        if not isinstance(quotient.op, ast.Div):
            raise _NoCondition
        above, below = self.visit(quotient.left), self.visit(quotient.right)
        if not up:
            return ast.BinOp(above, ast.FloorDiv(), below)
        return ast.UnaryOp(ast.USub(), ast.BinOp(ast.UnaryOp(ast.USub(), above), ast.FloorDiv(), below))

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        """`L['x'].size()[0]`, as torch.export spells a size in its guards."""
        call, axis = node.value, node.slice
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "size"):
            raise _NoCondition
        if not (isinstance(axis, ast.Constant) and isinstance(axis.value, int)):
            raise _NoCondition
        size = self.size_of(ast.unparse(call.func.value), axis.value)
        if size is None:
            raise _NoCondition
        return ast.Name(size, ast.Load()) if isinstance(size, str) else ast.Constant(size)


def unique(conditions: Iterable[Condition]) -> tuple[Condition, ...]:
    """Each condition once, without those that always hold.

    Left out are also those that only tell a size from 1: runs at size 1 are compared with the model's.
    """
    asked = (c for c in conditions if not _holds(c) and not re.fullmatch(r"\w+ (!=|>|>=) [01]", c.text))
    return tuple(dict.fromkeys(asked))


def _holds(condition: Condition) -> bool:
    """The condition is true whatever the sizes: two sizes of one name are equal."""
    if not condition.names:
        return condition.holds({})
    parsed = ast.parse(condition.text, mode="eval").body
    equal = isinstance(parsed, ast.Compare) and isinstance(parsed.ops[0], (ast.Eq, ast.LtE, ast.GtE))
    return equal and ast.dump(parsed.left) == ast.dump(parsed.comparators[0])  # type: ignore[attr-defined]


def size_oblivious() -> AbstractContextManager[None]:
    """While sizes are symbols, ops do not ask whether one of them is 1 where the answer only saves work.

    Otherwise each question whether a tensor is contiguous would leave a condition such as `(h // 32) != 1` behind.
    """
    return backed_size_oblivious()


# -- torch.export -------------------------------------------------------------------------------------------------------


def enlarged(tensor: torch.Tensor, sizes: dict[int, DynamicSize]) -> torch.Tensor:
    """The tensor repeated along dynamic axes of size 0 or 1, so that torch.export does not take them for constants."""
    for axis in sizes:
        if tensor.shape[axis] == 1:
            tensor = torch.cat([tensor, tensor], axis)
        elif tensor.shape[axis] == 0:
            tensor = tensor.new_zeros([LEAST_HINT if i == axis else n for i, n in enumerate(tensor.shape)])
    return tensor


def exported_conditions(
    exported: torch.export.ExportedProgram, specs: Sequence[InputSpec], sources: Sequence[Sequence[str]]
) -> list[Condition]:
    """What torch.export asks of the sizes: its guards and ranges, in our names. `sources`: what guards call each input.

    Raises `CaptureError` when it made a constant of a size that is declared dynamic, or guards what is no size.
    """
    places = {source: i for i, names in enumerate(sources) for source in names}

    def size_of(source: str, axis: int) -> str | int | None:
        if source not in places:
            return None
        size = specs[places[source]].shape[axis]
        return size.name if isinstance(size, DynamicSize) else size

    found = []
    for spec, sizes in zip(specs, exported_sizes(exported), strict=True):
        for size, symbol in zip(spec.shape, sizes, strict=True):
            if isinstance(size, DynamicSize):
                if isinstance(symbol, int):
                    raise pinned(size.name, symbol)
                found += _in_range(size, exported_range(exported, symbol))
    for guard in guards_of(exported):
        try:
            condition = condition_from_text(guard, size_of)
        except CaptureError:
            raise CaptureError(f"torch.export guards {guard}, which cannot be checked when the file runs") from None
        if not condition.names and not condition.holds({}):
            raise CaptureError(f"torch.export guards {guard}, which does not hold for the sizes that are baked in")
        found.append(condition)
    return found


def exported_inputs(exported: torch.export.ExportedProgram) -> list[Any]:
    """What stands for each leaf of a call: a fake tensor, or the number or flag that was baked in."""
    placeholders = exported.graph.find_nodes(op="placeholder")
    pairs = zip(placeholders, exported.graph_signature.input_specs, strict=True)
    return [node.meta.get("val") for node, spec in pairs if spec.kind is InputKind.USER_INPUT]


def exported_sizes(exported: torch.export.ExportedProgram) -> list[list[Any]]:
    """Per tensor input: the sizes that torch.export gave it, numbers or symbols."""
    tensors = [value for value in exported_inputs(exported) if isinstance(value, torch.Tensor)]
    return [[int(s) if is_pinned(s) else s for s in tensor.shape] for tensor in tensors]


def is_pinned(size: int | torch.SymInt) -> bool:
    """A number, or a symbol that a guard made equal to one."""
    return isinstance(size, int) or bool(size.node.expr.is_number)


def exported_range(exported: torch.export.ExportedProgram, size: torch.SymInt) -> tuple[int, int | None]:
    """The least and the largest value of a size, None for no bound. torch writes 2 where it only says "not 0 or 1"."""
    ranges = exported.range_constraints
    expression = size.node.expr
    symbols = {s: ranges[s] for s in expression.free_symbols if s in ranges}
    free = {s: ValueRanges(1, r.upper) if r.lower <= LEAST_HINT else r for s, r in symbols.items()}
    given = bounds_of(expression, free)  # type: ignore[arg-type]
    if expression in ranges:
        given &= ranges[expression]
    least = int(given.lower) if given.lower > LEAST_HINT else 1
    return least, int(given.upper) if given.upper < UNBOUNDED else None


def _in_range(size: DynamicSize, bounds: tuple[int, int | None]) -> list[Condition]:
    """The bounds as conditions, where they are narrower than those of the size itself."""
    least, most = bounds
    found = [f"{size.name} >= {least}"] if least > size.least else []
    if most is not None and (size.most is None or most < size.most):
        found.append(f"{size.name} <= {most}")
    return [condition_from_text(text) for text in found]
