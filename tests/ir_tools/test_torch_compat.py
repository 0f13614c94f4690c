"""A canary for each door in `ir_tools/torch_compat`. Under another torch, the test that fails names what moved or changed."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import logging
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parents[2] / "ir_tools" / "torch_compat"
CANARIES: dict[str, tuple[str, Callable[[Any], None]]] = {}


def canary(door: str, torchs: str) -> Callable[[Callable[[Any], None]], None]:
    """The decorated function gets the door `file.name`, and asserts what it gives. `torchs`: what it stands before."""

    def add(check: Callable[[Any], None]) -> None:
        assert door not in CANARIES, f"two canaries for {door}"
        CANARIES[door] = torchs, check

    return add


def doors() -> list[str]:
    """The public names that the files of the folder define (not those that they import)."""
    return [f"{path.stem}.{name}" for path in sorted(FOLDER.glob("*.py")) for name in defined(path)]


def defined(path: Path) -> dict[str, str]:
    """The public names of a file, with the sentences about them."""
    found: dict[str, str] = {}
    body = ast.parse(path.read_text()).body
    for node, after in zip(body, [*body[1:], None]):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = ast.get_docstring(node) or ""
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and not is_type_variable(node.value):
            said = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and after.value.value
            found[node.targets[0].id] = str(said or "")
    return {name: sentence for name, sentence in found.items() if not name.startswith("_")}


def is_type_variable(value: ast.expr) -> bool:
    return isinstance(value, ast.Call) and ast.unparse(value.func) == "TypeVar"


def file(name: str) -> Any:
    """A file of doors; when it cannot be imported, the reason is the failure."""
    try:
        return importlib.import_module(f"ir_tools.torch_compat.{name}")
    except (ImportError, AttributeError) as error:
        raise pytest.fail.Exception(f"ir_tools/torch_compat/{name}.py does not import: {error}", pytrace=False) from None


def test_every_door_has_a_canary_and_a_sentence() -> None:
    assert len(doors()) > 50
    assert set(doors()) == set(CANARIES)
    for path in FOLDER.glob("*.py"):
        assert all(sentence.rstrip().endswith(".") or ":" in sentence for sentence in defined(path).values()), path.name


def test_the_doors_import_nothing_of_ours() -> None:
    for path in FOLDER.glob("*.py"):
        assert not re.search(r"^\s*(from|import) (ir_tools|passes)\b", path.read_text(), re.M), path.name


# -- operators ----------------------------------------------------------------------------------------------------------

aten = torch.ops.aten


@canary("operators.OpOverload", "torch._ops.OpOverload")
def _(door: Any) -> None:
    assert isinstance(aten.add.Tensor, door) and not isinstance(aten.add, door)
    assert aten.add.Tensor.namespace == "aten" and aten.add.Tensor.overloadpacket is aten.add
    assert torch.Tag.nondeterministic_seeded in aten.rand.default.tags


@canary("operators.OpOverloadPacket", "torch._ops.OpOverloadPacket")
def _(door: Any) -> None:
    assert isinstance(aten.add, door) and not isinstance(aten.add.Tensor, door)
    assert {"Tensor", "Scalar"} <= set(aten.add.overloads())


@canary("operators.HigherOrderOperator", "torch._ops.HigherOrderOperator")
def _(door: Any) -> None:
    assert isinstance(torch.ops.higher_order.cond, door) and not isinstance(aten.add.Tensor, door)


@canary("operators.schema_of", "torch._ops.OpOverload._schema")
def _(door: Any) -> None:
    schema = door(aten.add_.Tensor)
    assert (schema.name, schema.overload_name) == ("aten::add_", "Tensor")
    assert [(a.name, str(a.type), a.kwarg_only) for a in schema.arguments] == [
        *[("self", "Tensor", False), ("other", "Tensor", False)],
        ("alpha", "number", True),
    ]
    assert schema.arguments[0].alias_info.is_write and schema.arguments[1].alias_info is None
    assert schema.arguments[2].has_default_value() and schema.arguments[2].default_value == 1
    assert str(schema.returns[0].type) == "Tensor" and schema.returns[0].alias_info is not None


@canary("operators.schema_or", "torch._ops.OpOverload._schema")
def _(door: Any) -> None:
    assert door(aten.relu.default, None).name == "aten::relu" and door(len, "none") == "none"


@canary("operators.symbolic_sqrt", "torch._sym_sqrt")
def _(door: Any) -> None:
    assert door(9) == 3.0


@canary("operators.set_grad_enabled", "torch._C._set_grad_enabled")
def _(door: Any) -> None:
    with torch.enable_grad():
        door(False)
        assert not torch.is_grad_enabled()


@canary("operators.UNDERSCORED_OPERATORS", "torch.ops.aten._softmax and its like")
def _(door: Any) -> None:
    missing = []
    for name in sorted(door):
        namespace, short = name.split("::")
        packet = getattr(getattr(torch.ops, namespace), short, None)
        if packet is None or not packet.overloads():
            missing.append(name)
    assert not missing


# -- dispatch -----------------------------------------------------------------------------------------------------------


@canary("dispatch.TorchDispatchMode", "torch.utils._python_dispatch.TorchDispatchMode")
def _(door: Any) -> None:
    seen = recorder(door)
    with seen:
        torch.ones(2).relu()
    torch.ones(2).exp()
    assert [str(f) for f in seen.calls] == ["aten.ones.default", "aten.relu.default"]


def recorder(mode: Any) -> Any:
    class Recorder(mode):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[Any] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls.append(func)
            return func(*args, **(kwargs or {}))

    return Recorder()


@canary("dispatch.python_kernels", "torch._dispatch.python.enable_python_dispatcher")
def _(door: Any) -> None:
    def enabled() -> bool:
        return bool(torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PythonDispatcher))

    assert not enabled()
    with door():
        assert enabled()
    assert not enabled()
    fake, symbols = file("fake"), file("symbols")
    mode = fake.FakeTensorMode(shape_env=symbols.ShapeEnv(allow_scalar_outputs=True, allow_dynamic_output_shape_ops=True))
    rows = mode.shape_env.create_unbacked_symint()
    with mode, door():
        assert torch.empty([rows, 4]).permute(1, 0).reshape(-1).dim() == 1


@canary("dispatch.without_modes", "torch.utils._mode_utils.no_dispatch")
def _(door: Any) -> None:
    mode = file("fake").FakeTensorMode()
    with mode:
        assert isinstance(torch.ones(1), file("fake").FakeTensor)
        with door():
            assert type(torch.ones(1)) is Tensor
            assert torch.empty_strided((2, 3), (3, 1), device="meta").reshape(3, 2).stride() == (2, 1)


@canary("dispatch.no_torch_function", "torch._C._disabled_torch_function_impl")
def _(door: Any) -> None:
    class Plain(Tensor):
        __torch_function__ = door

    assert type(torch.ones(2).as_subclass(Plain) + 1) is Tensor  # with torch's own it would be a Plain


@canary("dispatch.wrapper_tensor", "torch.Tensor._make_wrapper_subclass")
def _(door: Any) -> None:
    class Wrapper(Tensor):
        __torch_function__ = file("dispatch").no_torch_function

        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(args[0].inside)

    like = torch.ones(3, 4, dtype=torch.float64).t()[1:]
    made = door(Wrapper, like, torch.device("cuda:0"))
    assert type(made) is Wrapper and made.device == torch.device("cuda:0") and made.dtype == torch.float64
    assert (made.shape, made.stride(), made.storage_offset()) == (like.shape, like.stride(), like.storage_offset())
    made.inside = like
    assert torch.equal(torch.neg(made), -like) and not made.requires_grad


@canary("dispatch.FILES_OF_TRACERS", "the files torch/jit/, torch/_export/ and so on")
def _(door: Any) -> None:
    root = Path(torch.__file__).parents[1]
    assert [f for f in door if not (root / f).exists()] == []
    with pytest.raises(Exception) as error:
        torch.fx.symbolic_trace(Branches())
    files = [Path(frame.path).as_posix() for frame in error.traceback]
    assert any(tracer in file_ for file_ in files for tracer in door)


class Branches(nn.Module):
    """No symbolic tracer follows it."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@canary("dispatch.FILES_AROUND_MODES", "the files torch/overrides.py, torch/_compile.py and so on")
def _(door: Any) -> None:
    root = Path(torch.__file__).parents[1]
    assert [f for f in door if not (root / f).exists()] == []

    class Seen(file("dispatch").TorchDispatchMode):  # type: ignore[misc, name-defined]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            frame: Any = sys._getframe(1)
            while frame.f_code.co_filename.replace("\\", "/").endswith(door):
                frame = frame.f_back
            callers.append(frame.f_code.co_name)
            return func(*args, **(kwargs or {}))

    callers: list[str] = []
    with Seen():
        torch.ones(1)
    assert callers == ["_"], "a frame of torch between an operator and a mode is not in the table"


# -- fake tensors -------------------------------------------------------------------------------------------------------


@canary("fake.FakeTensor", "torch._subclasses.fake_tensor.FakeTensor")
def _(door: Any) -> None:
    with file("fake").FakeTensorMode():
        made = torch.ones(2, 3)
    assert type(made) is door and made.device.type == "cpu" and made.fake_mode is not None


@canary("fake.FakeTensorMode", "torch._subclasses.fake_tensor.FakeTensorMode")
def _(door: Any) -> None:
    environment = file("symbols").ShapeEnv()
    mode = door(allow_non_fake_inputs=False, shape_env=environment)
    assert mode.shape_env is environment
    fake = mode.from_tensor(torch.ones(2, 3).t(), static_shapes=True)
    with mode:
        assert (fake @ torch.empty(2, 5)).shape == (3, 5) and fake.stride() == (1, 3)
        with pytest.raises(Exception, match="allow_non_fake_inputs"):
            fake + torch.nn.Parameter(NUMBERS)
    with door(allow_non_fake_inputs=True):
        assert (torch.empty(2) + NUMBERS).shape == (2,)


NUMBERS = torch.ones(2)


@canary("fake.DataDependentOutputException", "torch._subclasses.fake_tensor.DataDependentOutputException")
def _(door: Any) -> None:
    with file("fake").FakeTensorMode(), pytest.raises(door):
        torch.ones(1).item()


@canary("fake.DynamicOutputShapeException", "torch._subclasses.fake_tensor.DynamicOutputShapeException")
def _(door: Any) -> None:
    with file("fake").FakeTensorMode(), pytest.raises(door):
        torch.ones(3).nonzero()


@canary("fake.UnsupportedOperatorException", "torch._subclasses.fake_tensor.UnsupportedOperatorException")
def _(door: Any) -> None:
    with torch.library._scoped_library("canary", "FRAGMENT") as library:
        library.define("no_fake_kernel(Tensor x) -> Tensor")
        library.impl("no_fake_kernel", lambda x: x.clone(), "CPU")
        with file("fake").FakeTensorMode(), pytest.raises(door):
            torch.ops.canary.no_fake_kernel(torch.ones(1))


# -- symbols ------------------------------------------------------------------------------------------------------------


@canary("symbols.ShapeEnv", "torch.fx.experimental.symbolic_shapes.ShapeEnv")
def _(door: Any) -> None:
    env, size = an_input_size("batch")
    assert not env.guards and bool(size == 5)
    assert [str(g.expr) for g in env.guards] == [f"Eq({size.node._expr}, 5)"] and env.replacements
    free = door(allow_scalar_outputs=True, allow_dynamic_output_shape_ops=True)
    unknown = free.create_unbacked_symint(), free.create_unbacked_symfloat(), free.create_unbacked_symbool()
    assert [type(u) for u in unknown] == [torch.SymInt, torch.SymFloat, torch.SymBool]
    assert not unknown[0].node.has_hint() and size.node.has_hint() and size.node.hint == 5


def an_input_size(name: str) -> tuple[Any, torch.SymInt]:
    """A symbol that is 5 in the example, made as front ends make it."""
    symbols, source = file("symbols"), file("export").NamedSource(name)
    env = symbols.ShapeEnv()
    dynamic = symbols.DimDynamic.DYNAMIC
    symbol = env.create_symbol(5, source, dynamic_dim=dynamic, constraint_dim=None, do_not_specialize_zero_one=True)
    env.constrain_symbol_range(symbol, compiler_min=2, compiler_max=2**62)
    return env, env.create_symintnode(symbol, hint=5, source=source)


@canary("symbols.DimDynamic", "torch.fx.experimental.symbolic_shapes.DimDynamic")
def _(door: Any) -> None:
    assert isinstance(door.DYNAMIC, door)
    assert an_input_size("height")[1].node.expr.is_Symbol


@canary("symbols.GuardOnDataDependentSymNode", "torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode")
def _(door: Any) -> None:
    with pytest.raises(door):
        bool(file("symbols").ShapeEnv().create_unbacked_symint() == 3)


@canary("symbols.PythonPrinter", "torch.utils._sympy.printers.PythonPrinter")
def _(door: Any) -> None:
    _, size = an_input_size("width")
    text = door().doprint(((size // 2) * 3 > 7).node.expr)
    assert eval(text.replace(str(size.node.expr), "9")) is True and "//" in text


@canary("symbols.ValueRanges", "torch.utils._sympy.value_ranges.ValueRanges")
def _(door: Any) -> None:
    common = door(1, 8) & door(3, 20)
    assert (common.lower, common.upper) == (3, 8)


@canary("symbols.bounds_of", "torch.utils._sympy.value_ranges.bound_sympy")
def _(door: Any) -> None:
    _, size = an_input_size("width")
    symbol = size.node.expr
    bounds = door(2 * symbol + 1, {symbol: file("symbols").ValueRanges(3, 10)})
    assert (bounds.lower, bounds.upper) == (7, 21)


@canary("symbols.SYMBOLIC_SHAPES_LOGGER", "the logger torch.fx.experimental.symbolic_shapes")
def _(door: Any) -> None:
    assert door in logging.root.manager.loggerDict
    assert importlib.import_module(door).log.name == door


@canary("symbols.backed_size_oblivious", "torch.fx.experimental._config.backed_size_oblivious")
def _(door: Any) -> None:
    """Elementwise operators ask whether a size is 1, because it would broadcast; the answer is a guard."""
    assert guards_of_relu(contextlib.nullcontext) == ["Ne"] and guards_of_relu(door) == []


def guards_of_relu(context: Any) -> list[str]:
    env, size = an_input_size("batch")
    with context(), file("fake").FakeTensorMode(shape_env=env):
        torch.empty([size // 2, 3]).relu()
    return [str(guard.expr).partition("(")[0] for guard in env.guards]


@canary("symbols.expression_as_made", "torch.SymInt.node._expr")
def _(door: Any) -> None:
    _, size = an_input_size("batch")
    symbol = size.node.expr
    assert bool(size == 5) and size.node.expr == 5 and door(size) == symbol


@canary("symbols.value_for_all", "torch.fx.experimental.symbolic_shapes.ShapeEnv._maybe_evaluate_static")
def _(door: Any) -> None:
    env, size = an_input_size("batch")
    assert bool(door(size >= 2)) and door(size == 1) is not None and not door(size == 1)
    assert door(size > 4) is None and not env.guards


@canary("symbols.replaced", "torch.fx.experimental.symbolic_shapes.ShapeEnv.replace")
def _(door: Any) -> None:
    env, size = an_input_size("batch")
    made = size.node._expr
    assert door(env, made + 1) == made + 1 and bool(size == 5) and door(env, made + 1) == 6


@canary("symbols.declare_size", "torch._check")
def _(door: Any) -> None:
    env = file("symbols").ShapeEnv()
    size = env.create_unbacked_symint()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        door(size)
    known = file("symbols").value_for_all
    assert bool(known(size >= 0)) and known(size >= 1) is None
    door(3)
    with pytest.raises(RuntimeError):
        door(-1)


# -- tensors and modules ------------------------------------------------------------------------------------------------


@canary("tensors.storage_id", "torch.UntypedStorage._cdata")
def _(door: Any) -> None:
    for mode in (contextlib.nullcontext(), file("fake").FakeTensorMode()):
        with mode:
            x = torch.ones(4)
            assert door(x) == door(x[1:]) == door(x.view(2, 2)) != door(x.clone())


@canary("tensors.version_of", "torch.Tensor._version")
def _(door: Any) -> None:
    x = torch.ones(4)
    before = door(x)
    x[1:].add_(1)
    assert door(x) == before + 1


@canary("tensors.likely_memory_format", "torch._prims_common.suggest_memory_format")
def _(door: Any) -> None:
    x = torch.ones(2, 3, 4, 4)
    assert door(x) == torch.contiguous_format
    assert door(x.contiguous(memory_format=torch.channels_last)) == torch.channels_last


@canary("modules.BatchNorm", "torch.nn.modules.batchnorm._BatchNorm")
def _(door: Any) -> None:
    assert all(isinstance(m, door) for m in (nn.BatchNorm1d(2), nn.BatchNorm3d(2), nn.SyncBatchNorm(2)))
    assert not isinstance(nn.LayerNorm(2), door)


@canary("modules.own_buffers", "torch.nn.Module._buffers")
def _(door: Any) -> None:
    module = nn.Sequential(nn.BatchNorm1d(2))
    module.register_buffer("none", None)
    assert door(module) == {"none": None}
    assert list(door(module[0])) == ["running_mean", "running_var", "num_batches_tracked"]


# -- pytrees ------------------------------------------------------------------------------------------------------------

NESTED = {"a": [1, (2, None)], "b": 3}


@canary("pytree.TreeSpec", "torch.utils._pytree.TreeSpec")
def _(door: Any) -> None:
    spec = file("pytree").tree_structure(((1, 2), {"k": 3}))
    assert isinstance(spec, door) and spec.num_leaves == 3 and spec.num_children == 2
    args, kwargs = spec.children()
    assert (args.num_children, kwargs.context) == (2, ["k"])
    assert spec.flatten_up_to(((1, [2]), {"k": 4})) == [1, [2], 4]
    with pytest.raises(ValueError):
        spec.flatten_up_to(((1,), {"k": 4}))


@canary("pytree.SequenceKey", "torch.utils._pytree.SequenceKey")
def _(door: Any) -> None:
    paths, _ = file("pytree").tree_flatten_with_path([7, {"k": 8}])
    assert paths[1][0][0] == door(1) and paths[1][0][0].idx == 1 and paths[1][0][1].key == "k"


@canary("pytree.keystr", "torch.utils._pytree.keystr")
def _(door: Any) -> None:
    paths, _ = file("pytree").tree_flatten_with_path(NESTED)
    assert [door(path) for path, _ in paths] == ["['a'][0]", "['a'][1][0]", "['a'][1][1]", "['b']"]


@canary("pytree.register_pytree_node", "torch.utils._pytree.register_pytree_node")
def _(door: Any) -> None:
    class Pair:
        def __init__(self, one: Any, other: Any):
            self.both = [one, other]

    tree_leaves = file("pytree").tree_leaves
    pair = Pair(1, 2)
    assert tree_leaves(pair) == [pair]
    door(Pair, lambda p: (p.both, None), lambda both, _: Pair(*both))
    assert tree_leaves(pair) == [1, 2]


@canary("pytree.REGISTRATION", "torch.utils._pytree.register_pytree_node")
def _(door: Any) -> None:
    module, _, name = door.rpartition(".")
    assert getattr(importlib.import_module(module), name) is file("pytree").register_pytree_node


@canary("pytree.tree_flatten", "torch.utils._pytree.tree_flatten")
def _(door: Any) -> None:
    leaves, spec = door(NESTED)
    assert leaves == [1, 2, None, 3] and file("pytree").tree_unflatten(leaves, spec) == NESTED


@canary("pytree.tree_flatten_with_path", "torch.utils._pytree.tree_flatten_with_path")
def _(door: Any) -> None:
    pairs, spec = door(NESTED)
    assert [leaf for _, leaf in pairs] == [1, 2, None, 3] and spec == file("pytree").tree_structure(NESTED)


@canary("pytree.tree_leaves", "torch.utils._pytree.tree_leaves")
def _(door: Any) -> None:
    assert door(NESTED) == [1, 2, None, 3] and door(5) == [5] and door({"b": 1, "a": 2}) == [1, 2]


@canary("pytree.tree_map", "torch.utils._pytree.tree_map")
def _(door: Any) -> None:
    assert door(str, NESTED) == {"a": ["1", ("2", "None")], "b": "3"}


@canary("pytree.tree_map_only", "torch.utils._pytree.tree_map_only")
def _(door: Any) -> None:
    assert door(int, lambda n: n + 1, NESTED) == {"a": [2, (3, None)], "b": 4}


@canary("pytree.tree_structure", "torch.utils._pytree.tree_structure")
def _(door: Any) -> None:
    assert door(NESTED) == door({"a": [5, (6, 7)], "b": 8}) != door({"a": [5, [6, 7]], "b": 8})


@canary("pytree.tree_unflatten", "torch.utils._pytree.tree_unflatten")
def _(door: Any) -> None:
    assert door(iter([4, 5, 6, 7]), file("pytree").tree_structure(NESTED)) == {"a": [4, (5, 6)], "b": 7}


@canary("pytree.treespec_dumps", "torch.utils._pytree.treespec_dumps")
def _(door: Any) -> None:
    assert isinstance(door(file("pytree").tree_structure(NESTED)), str)


@canary("pytree.treespec_loads", "torch.utils._pytree.treespec_loads")
def _(door: Any) -> None:
    spec = file("pytree").tree_structure(NESTED)
    assert door(file("pytree").treespec_dumps(spec)) == spec


# -- torch.export and fx ------------------------------------------------------------------------------------------------


class Rows(nn.Module):
    def forward(self, x: Tensor, *, y: Tensor) -> Tensor:
        return x[:, : y.shape[0]] + y


def exported() -> Any:
    rows = torch.export.Dim("rows")
    sizes: Any = {"x": {0: rows}, "y": {}}
    return torch.export.export(Rows(), (torch.ones(4, 5),), {"y": torch.ones(5)}, dynamic_shapes=sizes)


@canary("export.DimHint", "torch.export.dynamic_shapes._DimHint")
def _(door: Any) -> None:
    from torch.export import Dim

    assert all(isinstance(hint, door) for hint in (Dim.AUTO, Dim.DYNAMIC, Dim.STATIC)) and not isinstance(Dim("a"), door)
    bounded = Dim.AUTO(min=3, max=8)  # type: ignore[operator]
    assert (bounded.min, bounded.max, Dim.AUTO.min) == (3, 8, None)  # type: ignore[attr-defined]


@canary("export.DimHintKind", "torch.export.dynamic_shapes._DimHintType")
def _(door: Any) -> None:
    from torch.export import Dim

    assert Dim.STATIC.type is door.STATIC and Dim.AUTO.type is not door.STATIC  # type: ignore[attr-defined]


@canary("export.NamedSource", "torch._dynamo.source.ConstantSource")
def _(door: Any) -> None:
    assert "batch" in str(getattr(door("batch"), "source_name", door("batch")))


@canary("export.guards_of", "torch.export.ExportedProgram._guards_code")
def _(door: Any) -> None:
    class Even(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(-1, 2)

    hint: Any = torch.export.Dim.AUTO
    program = torch.export.export(Even(), (torch.ones(6, 3),), dynamic_shapes={"x": {0: hint}})
    guards = door(program)
    assert any(re.fullmatch(r".*L\['x'\]\.size\(\)\[0\].* % 2.*== 0.*", guard) for guard in guards), guards


@canary("export.call_spec_of", "the attribute _in_spec of torch.export.ExportedProgram.module()")
def _(door: Any) -> None:
    spec = door(exported().module())
    assert isinstance(spec, file("pytree").TreeSpec) and door(Rows()) is None
    args, kwargs = spec.children()
    assert (args.num_children, kwargs.context) == (1, ["y"])


@canary("fx.trace_to_aten", "torch.fx.experimental.proxy_tensor.make_fx(_allow_non_fake_inputs)")
def _(door: Any) -> None:
    linear = nn.Linear(3, 3).eval()
    graph = door(nn.Sequential(linear), "fake")(torch.ones(2, 3))
    calls = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
    assert calls == ["aten.linear.default"]  # pre-dispatch: later it would be t and addmm
    held = [getattr(graph, str(n.target)) for n in graph.graph.nodes if n.op == "get_attr"]
    assert any(value is linear.weight for value in held)
    env, size = an_input_size("batch")
    mode = file("fake").FakeTensorMode(allow_non_fake_inputs=True, shape_env=env)
    with mode:
        x = torch.empty([size, 3])
    symbolic = door(linear, "symbolic")(x)
    assert any(n.target is aten.linear.default for n in symbolic.graph.nodes)


# -- torch.compile ------------------------------------------------------------------------------------------------------


@canary("compiler.forget_compiled_code", "torch._dynamo.reset")
def _(door: Any) -> None:
    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    def double(x: Tensor) -> Tensor:
        return x * 2

    call = torch.compile(double, backend=backend)
    door()
    call(torch.ones(2)), call(torch.ones(2))
    assert len(compiled) == 1
    door()
    call(torch.ones(2))
    assert len(compiled) == 2
    door()


@canary("compiler.freezing", "torch._inductor.config.patch(freezing)")
def _(door: Any) -> None:
    config = importlib.import_module("torch._inductor.config")
    before = config.freezing
    with door():
        assert config.freezing is True
    assert config.freezing is before


# -- TorchScript --------------------------------------------------------------------------------------------------------


class Held(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.inner = nn.BatchNorm1d(3)


def held() -> nn.Module:
    """A module of a class of its own, as methods belong to the class."""
    return type("Held", (Held,), {})().eval()


def doubling() -> Any:
    scripted = file("jit").script_without_methods(held())
    scripted.define("def forward(self, x, factor: float = 2.0):\n    return x * self.weight * factor\n")
    return scripted


@canary("jit.script_without_methods", "torch.jit._recursive.create_script_module")
def _(door: Any) -> None:
    root = held()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scripted = door(root)
    assert isinstance(scripted, torch.jit.ScriptModule)
    assert scripted.weight is root.weight and scripted.inner.running_mean is root.inner.running_mean
    scripted.define("def forward(self, x):\n    return x + self.inner.running_mean\n")
    assert torch.equal(scripted(torch.ones(3)), torch.ones(3))


@canary("jit.module_to_bytes", "torch.jit.ScriptModule._c.save_to_buffer")
def _(door: Any) -> None:
    scripted, x = doubling(), torch.randn(3)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        data = door(scripted)
    assert not heard and torch.equal(torch.jit.load(io.BytesIO(data))(x), scripted(x))


@canary("jit.module_from_bytes", "torch._C.import_ir_module_from_buffer and torch.jit._recursive.wrap_cpp_module")
def _(door: Any) -> None:
    scripted, x = doubling(), torch.randn(3)
    data = file("jit").module_to_bytes(scripted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = door(data)
    assert isinstance(again, torch.jit.ScriptModule) and torch.equal(again(x), scripted(x))


@canary("jit.module_to_file", "torch.jit.ScriptModule._c.save(_extra_files)")
def _(door: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.pt")
        door(doubling(), path, {"note.txt": "hello"})
        extra = {"note.txt": ""}
        torch.jit.load(path, _extra_files=extra)
    assert extra["note.txt"] in (b"hello", "hello")


@canary("jit.module_from_file", "torch._C.import_ir_module and torch.jit._recursive.wrap_cpp_module")
def _(door: Any) -> None:
    scripted, x = doubling(), torch.randn(3)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.pt")
        file("jit").module_to_file(scripted, path, {})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = door(path)
    assert isinstance(again, torch.jit.ScriptModule) and torch.equal(again(x), scripted(x))


@canary("jit.forward_schema", "torch.jit.ScriptModule._c._get_method")
def _(door: Any) -> None:
    itself, x, factor = door(doubling()).arguments
    assert (itself.name, x.name, factor.name, factor.default_value) == ("self", "x", "factor", 2.0)
    assert not x.has_default_value() and not factor.kwarg_only


@canary("jit.wraps_script_object", "torch.jit.ScriptModule._c")
def _(door: Any) -> None:
    scripted = doubling()
    assert door(scripted) and door(scripted.inner) and not door(Held()) and not door(torch.ones(1))


@canary("jit.SLOTS", "the slots _c, _concrete_type, ... of torch.jit.RecursiveScriptModule")
def _(door: Any) -> None:
    assert door - {"_actual_script_module"} <= set(vars(doubling()))
    assert "_actual_script_module" in Path(importlib.import_module("torch.jit._script").__file__).read_text()


@canary("jit.watch_compiled_methods", "torch._C.ScriptModule._define")
def _(door: Any) -> None:
    define, seen = torch._C.ScriptModule._define, []
    try:
        door(seen.append)
        doubling()
    finally:
        torch._C.ScriptModule._define = define
    assert any("x * self.weight * factor" in text for text in seen)


@canary("jit.own_class_table", "torch.jit._recursive.concrete_type_store")
def _(door: Any) -> None:
    class Small(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    def type_name() -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return str(torch.jit.script(Small())._c._type().qualified_name())

    table = importlib.import_module("torch.jit._recursive")
    before, outside = table.concrete_type_store, type_name()
    with door():
        inside = type_name()
        assert table.concrete_type_store is not before
    assert table.concrete_type_store is before and type_name() == outside != inside


# -- all of them --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", CANARIES, ids=lambda door: f"{door} <- {CANARIES[door][0]}")
def test_canary(door: str) -> None:
    torchs, check = CANARIES[door]
    name, attribute = door.split(".")
    assert hasattr(file(name), attribute), f"{door} is gone"
    try:
        check(getattr(file(name), attribute))
    except Exception as error:
        error.args = (f"{torchs} moved or changed (the door {door}): {error}",)
        raise


def test_torch_compile_is_not_imported_before_it_is_asked_for() -> None:
    code = "import ir_tools.ir, sys; assert not [m for m in sys.modules if m.startswith(('torch._dynamo', 'torch._inductor'))]"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=FOLDER.parents[1])
