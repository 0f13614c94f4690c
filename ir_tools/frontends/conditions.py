"""Conditions on dynamic sizes: from sympy or a guard's text to integer arithmetic that is valid Python and TorchScript."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable
from typing import Any

from ir_tools.errors import CaptureError
from ir_tools.ir.signature import Condition
from ir_tools.torch_compat.symbols import PythonPrinter


def condition_of(expression: Any) -> Condition:
    """A condition from sympy, with the names of sizes for symbols."""
    return condition_from_text(PythonPrinter().doprint(expression))  # type: ignore[no-untyped-call]


SizeOf = Callable[[str, int], str | int | None]
"""What a guard calls the size of an axis -> its name, its number where it is baked in, None for what is no input."""


def condition_from_text(text: str, size_of: SizeOf = lambda source, axis: None) -> Condition:
    """A condition as Python text, integer arithmetic only, which TorchScript parses too.

    `size_of` names the size `L['x'].size()[0]`, from `L['x']` and 0. Raises `CaptureError` for anything else.
    """
    try:
        written = _ConditionPrinter(size_of).visit(ast.parse(text, mode="eval")).body
    except (_NoCondition, SyntaxError):
        raise CaptureError(f"the dynamic sizes must meet {text}, which cannot be checked when the file runs") from None
    names = dict.fromkeys(n.id for n in ast.walk(written) if isinstance(n, ast.Name) and n.id not in ("max", "min"))
    return Condition(ast.unparse(written), tuple(names))


class _NoCondition(Exception):
    """An expression that is more than integer arithmetic."""


class _ConditionPrinter(ast.NodeTransformer):
    """Checks that an expression is integer arithmetic, and rewrites what TorchScript would parse differently."""

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
            ast.Compare(left, [self.visit(op)], [right]) for left, op, right in zip(sides, node.ops, sides[1:], strict=False)
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
        """`L['x'].size()[0]`, as torch.export writes a size in its guards."""
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

    Conditions that only exclude size 1 are left out too: the Program is run at size 1 and compared with the model.
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
