"""Ops on numbers and containers: their Python meanings give what TorchScript's interpreter gives."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import fx

from ir_tools.emit.torch_jit import define, new_box, script_tree
from ir_tools.frontends.torchscript.nodes import overload_of
from ir_tools.ir.dialect import overload_name
from ir_tools.ir.effects import changed_containers
from ir_tools.ir.facts import holds_always
from ir_tools.ir.host import (
    MEANINGS,
    TENSOR_READS,
    fail,
    inner_types,
    is_container_type,
    is_host,
    make_dict,
    make_list,
    make_tuple,
    meaning,
)
from ir_tools.ir.inference_mode import InferenceMode
from ir_tools.torch_compat.operators import schema_of

INTS = ("int, int", [(7, 2), (-7, 2), (7, -2), (-7, -2), (0, 3), (2**40, 3), (-(2**40) - 1, 1000)])
FLOATS = ("float, float", [(7.5, 2.0), (-7.5, 2.0), (7.5, -2.0), (-7.5, -2.0), (0.0, 0.7), (1e300, 3.0)])
MIXED = ("int, float", [(7, 2.5), (-7, 2.5), (7, -2.5), (0, 0.5)])
MIXED_BACK = ("float, int", [(7.5, 2), (-7.5, 2), (7.5, -2)])
NUMBERS = [INTS, FLOATS, MIXED, MIXED_BACK]
EQUAL = ("int, int", [(3, 3), (3, -3)])
BOOLS = ("bool, bool", [(True, True), (True, False), (False, False)])
STRINGS = ("str, str", [("ab", "b"), ("b", "ab"), ("ab", "ab"), ("", "a")])
LISTS = ("List[int], List[int]", [([1, 2], [1, 2]), ([1, 2], [1]), ([], [3])])
LIST = [4, -1, 7]
DICT = {"b": 1, "a": 2}
X = torch.tensor([[1.5, -2.5, 0.0], [3.0, 4.0, 5.0]])

# op -> what is called ("" for torch.ops.<op>(a, b, ...)), and for each set of types the values to try.
CASES: dict[str, tuple[str, list[tuple[str, list[tuple]]]]] = {
    "aten::__getitem__": ("a[b]", [
        ("List[int], int", [(LIST, 0), (LIST, -1)]), ("Dict[str, int], str", [(DICT, "a")]), ("str, int", [("abc", -2)]),
    ]),
    "aten::_set_item": ("", [
        ("List[int], int, int", [(LIST, -1, 9)]),
        ("Dict[str, int], str, int", [(DICT, "c", 9), (DICT, "b", 9)]),
    ]),
    "aten::Delete": ("", [("List[int], int", [(LIST, 0), (LIST, -1)]), ("Dict[str, int], str", [(DICT, "b")])]),
    "aten::append": ("", [("List[int], int", [(LIST, 5), ([], 5)])]),
    "aten::extend": ("", [("List[int], List[int]", [(LIST, [5, 6]), (LIST, [])])]),
    "aten::insert": ("", [("List[int], int, int", [(LIST, 0, 5), (LIST, -1, 5), (LIST, 3, 5)])]),
    "aten::reverse": ("", [("List[int]", [(LIST,), ([],)])]),
    "aten::clear": ("", [("List[int]", [(LIST,)]), ("Dict[str, int]", [(DICT,)])]),
    "aten::update": ("", [("Dict[str, int], Dict[str, int]", [(DICT, {"a": 5, "z": 6})])]),
    "aten::pop": ("", [
        ("List[int], int", [(LIST, -1), (LIST, 0)]),
        ("Dict[str, int], str, int", [(DICT, "b", 3), (DICT, "z", 3)]),
    ]),
    "aten::remove": ("", [("List[int], int", [(LIST, 4), ([1, 2, 1], 1)])]),
    "aten::sort": ("", [("List[int], bool", [(LIST, False), (LIST, True)])]),
    "aten::setdefault": ("", [("Dict[str, int], str, int", [(DICT, "b", 3), (DICT, "z", 3)])]),
    "aten::popitem": ("", [("Dict[str, int]", [(DICT,), ({"only": 1},)])]),
    "aten::mul_": ("", [("List[int], int", [(LIST, 2), (LIST, 0)])]),
    "aten::add_": ("", [("List[int], List[int]", [(LIST, [5]), (LIST, [])])]),
    "aten::copy": ("", [("List[int]", [(LIST,)]), ("Dict[str, int]", [(DICT,)])]),
    "aten::list": ("", [("List[int]", [(LIST,)]), ("str", [("abc",), ("",)])]),
    "aten::keys": ("", [("Dict[str, int]", [(DICT,), ({},)])]),
    "aten::values": ("", [("Dict[str, int]", [(DICT,), ({},)])]),
    "aten::items": ("", [("Dict[str, int]", [(DICT,)])]),
    "aten::get": ("", [("Dict[str, int], str", [(DICT, "a"), (DICT, "z")]), ("Dict[str, int], str, int", [(DICT, "z", 7)])]),
    "aten::slice": ("", [
        ("List[int], Optional[int], Optional[int], int", [(LIST, 1, None, 1), (LIST, -2, 9, 1),
            (LIST, None, -1, 2), (LIST, 2, 1, 1)]),
        ("str, Optional[int], Optional[int], int", [("abcd", 1, None, 2)]),
    ]),
    "aten::__contains__": ("", [
        ("List[int], int", [(LIST, 7), (LIST, 8)]),
        ("Dict[str, int], str", [(DICT, "a"), (DICT, "z")]),
        ("List[str], str", [(["x"], "x")]),
    ]),
    "aten::join": ("", [("str, List[str]", [(", ", ["a", "b"]), ("-", [])])]),
    "aten::len": ("", [
        ("List[int]", [(LIST,), ([],)]),
        ("Dict[str, int]", [(DICT,)]),
        ("str", [("abc",)]),
        ("Tensor", [(X,)]),
    ]),
    "aten::_unwrap_optional": ("", [("Optional[int]", [(3,)]), ("Optional[List[int]]", [(LIST,)])]),
    "aten::__is__": ("a is None", [("Optional[int]", [(3,), (None,)])]),
    "aten::__isnot__": ("a is not None", [("Optional[int]", [(3,), (None,)])]),
    "aten::Int": ("int(a)", [
        ("float", [(2.9,), (-2.9,)]), ("bool", [(True,)]), ("str", [("-12",)]),
        ("Tensor", [(torch.tensor(-2.7),), (torch.tensor(5),), (torch.tensor(True),)]),
    ]),
    "aten::Float": ("float(a)", [
        ("int", [(-3,), (2**60,)]),
        ("bool", [(True,)]),
        ("str", [("1.5",)]),
        ("Tensor", [(torch.tensor(3),), (torch.tensor(0.1),)]),
    ]),
    "aten::Bool": ("bool(a)", [
        ("int", [(0,), (-2,)]),
        ("float", [(0.0,), (0.1,)]),
        ("Tensor", [(torch.tensor(0.5),), (torch.tensor([0]),), (torch.tensor(False),)]),
    ]),
    "aten::add": ("a + b", [*NUMBERS, STRINGS, LISTS]),
    "aten::sub": ("a - b", NUMBERS),
    "aten::mul": ("a * b", [*NUMBERS, ("List[int], int", [(LIST, 2), (LIST, 0)])]),
    "aten::div": ("a / b", NUMBERS),
    "aten::floordiv": ("a // b", NUMBERS),
    "aten::remainder": ("a % b", NUMBERS),
    "aten::neg": ("-a", [("int", [(3,), (-3,)]), ("float", [(0.0,), (-2.5,)])]),
    "aten::ceil": ("torch.ops.aten.ceil(a)", [("float", [(0.5,), (-2.5,), (3.0,)])]),
    "aten::floor": ("torch.ops.aten.floor(a)", [("float", [(0.5,), (-2.5,), (3.0,)])]),
    "aten::eq": ("a == b", [*NUMBERS, EQUAL, BOOLS, STRINGS, LISTS]),
    "aten::ne": ("a != b", [*NUMBERS, EQUAL, BOOLS, STRINGS, LISTS]),
    "aten::lt": ("a < b", [*NUMBERS, EQUAL, STRINGS]),
    "aten::le": ("a <= b", [*NUMBERS, EQUAL, STRINGS]),
    "aten::gt": ("a > b", [*NUMBERS, EQUAL, STRINGS]),
    "aten::ge": ("a >= b", [*NUMBERS, EQUAL, STRINGS]),
    "aten::__not__": ("not a", [("bool", [(True,), (False,)])]),
    "aten::__and__": ("a & b", [INTS, BOOLS]),
    "aten::__or__": ("a | b", [INTS, BOOLS]),
    "aten::__xor__": ("a ^ b", [INTS, BOOLS]),
    "aten::__range_length": ("", [
        ("int, int, int", [(0, 5, 1), (0, -5, 1), (5, -4, -2), (5, 5, -1), (-3, 8, 4), (2**31, 2**31 + 7, 3), (0, 5, -1)]),
    ]),
    "aten::__derive_index": ("", [("int, int, int", [(0, 5, 1), (3, 5, -2), (4, -7, 3)])]),
    "prim::max": ("max(a, b)", [*NUMBERS, EQUAL]),
    "prim::min": ("min(a, b)", [*NUMBERS, EQUAL]),
    "aten::size": ("", [("Tensor", [(X,), (torch.tensor(1),)]), ("Tensor, int", [(X, 0), (X, -1)])]),
    "aten::dim": ("", [("Tensor", [(X,), (torch.tensor(1),)])]),
    "aten::numel": ("", [("Tensor", [(X,), (torch.empty(0, 3),)])]),
    "aten::is_floating_point": ("", [("Tensor", [(X,), (X.int(),)])]),
    "aten::is_complex": ("", [("Tensor", [(X,), (X.to(torch.complex64),)])]),
    "prim::device": ("a.device", [("Tensor", [(X,)])]),
    "aten::item": ("", [("Tensor", [(torch.tensor(-2.5),), (torch.tensor(3),), (torch.tensor(True),)])]),
    "aten::IntImplicit": ("", [("Tensor", [(torch.tensor(-3),)])]),
    "aten::FloatImplicit": ("", [("Tensor", [(torch.tensor(-2.5),)])]),
    "aten::ScalarImplicit": ("", [("Tensor", [(torch.tensor(-2.5),), (torch.tensor(3),)])]),
}  # fmt: skip


def compiled(op: str, text: str, types: str) -> tuple[Any, Any]:
    """A TorchScript function that gives (result, first argument) of one op, and the overload that it calls."""
    annotations = _split(types)
    names = "abcd"[: len(annotations)]
    call = text or f"torch.ops.{op.replace('::', '.')}({', '.join(names)})"
    parameters = ", ".join(f"{name}: {t}" for name, t in zip(names, annotations))
    holder = script_tree(new_box("Holder"))
    define(holder, f"def run(self, {parameters}):\n    r = {call}\n    return r, a\n")
    (node,) = [n for n in holder.run.graph.nodes() if n.kind() == op]
    return holder.run, overload_of(node.schema(), node.kind(), "")


def _split(types: str) -> list[str]:
    return inner_types(f"[{types}]")


@pytest.mark.parametrize("op", CASES)
def test_a_host_op_gives_what_torchscript_gives(op: str) -> None:
    text, tries = CASES[op]
    for types, values in tries:
        run, overload = compiled(op, text, types)
        function = meaning(overload)
        assert is_host(overload) and function is not None
        for given in values:
            wanted, wanted_first = run(*copy.deepcopy(given))
            arguments = list(copy.deepcopy(given))
            if "None" in text:
                arguments.append(None)
            result = function(*arguments)
            if schema_of(overload).returns:
                assert type(result) is type(wanted) and _same(result, wanted), (overload_name(overload), given, result, wanted)
            assert _same(arguments[0], wanted_first), f"{overload_name(overload)} leaves {arguments[0]}, not {wanted_first}"


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return one == other and (not isinstance(one, float) or math.copysign(1, one) == math.copysign(1, other))


def test_every_meaning_is_tried() -> None:
    assert {*MEANINGS, *TENSOR_READS} == set(CASES)


def test_every_op_that_changes_a_container_has_a_meaning() -> None:
    """torch would call it on a copy, so that the change is lost."""
    left = set()
    for schema in torch._C._jit_get_all_schemas():
        types = [str(a.type) for a in (*schema.arguments, *schema.returns)]
        writes = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        if not any("Tensor" in t for t in types) and any(str(a.type).startswith(("Dict", "List", "t[]")) for a in writes):
            left |= {schema.name} - MEANINGS.keys()
    assert not left


def test_tensor_ops_and_strangers_are_no_host_ops() -> None:
    aten = torch.ops.aten
    assert not any(map(is_host, (aten.relu.default, aten.add.Tensor, aten.zeros.default, len, "len", None)))
    assert all(map(is_host, (make_list, make_tuple, make_dict, fail, aten.sqrt.int, aten.append.t, aten.size.int)))


def test_constructors_and_fail() -> None:
    assert (make_list(1, 2), make_tuple(1, "a"), make_dict(["k"], [3])) == ([1, 2], (1, "a"), {"k": 3})
    with pytest.raises(RuntimeError, match="out of range"):
        fail("out of range")


@pytest.mark.parametrize("type_, inner", [
    ("List[Tensor]", ["Tensor"]), ("Dict[str, List[Tensor]]", ["str", "List[Tensor]"]), ("Tuple[]", []),
    ("Tuple[int, Tuple[Tensor, str], Optional[float]]", ["int", "Tuple[Tensor, str]", "Optional[float]"]),
])  # fmt: skip
def test_types_are_taken_apart(type_: str, inner: list[str]) -> None:
    assert inner_types(type_) == inner
    assert is_container_type(type_) and not is_container_type("Tensor") and not is_container_type("Optional[Tensor]")


# -- symbols ------------------------------------------------------------------------------------------------------------


def test_symbolic_numbers_stay_symbolic() -> None:
    n = InferenceMode().unknown_number("int").symbol
    add, eq, is_true = (meaning(op) for op in (torch.ops.aten.add.int, torch.ops.aten.eq.int, torch.ops.aten.Bool.int))
    assert isinstance(add(n, 1), torch.SymInt) and isinstance(is_true(n), torch.SymBool)
    assert holds_always(eq(add(n, 1), add(n, 1))) is True
    assert holds_always(eq(n, 1)) is None
    assert holds_always(eq(add(n, 1), n)) is False


@pytest.mark.parametrize("op, others", [
    (torch.ops.aten.eq.bool, (True,)), (torch.ops.aten.ne.bool, (True,)),
    (torch.ops.aten.Int.bool, ()), (torch.ops.aten.Float.bool, ()),
])  # fmt: skip
def test_a_symbolic_condition_is_no_number(op: Any, others: tuple) -> None:
    """torch fails later on what sympy makes of it: the fact must be a new symbol in its place."""
    condition = InferenceMode().unknown_number("int").symbol == 3
    with pytest.raises(TypeError, match="no number"):
        meaning(op)(condition, *others)


def test_no_op_on_numbers_changes_a_container() -> None:
    graph = fx.Graph()
    values = graph.placeholder("values")
    changes = graph.call_function(torch.ops.aten.append.t, (values, 1))
    reads = graph.call_function(torch.ops.aten.len.t, (values,))
    assert changed_containers(changes) == [values] and changed_containers(reads) == []
