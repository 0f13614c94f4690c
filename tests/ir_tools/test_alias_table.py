"""What the dialect says about shared memory is true of ATen: ops are run, and storages compared.

Two sweeps look for ops that give back their arguments: the samples of torch's own operator database, and calls of every
composite op with random arguments, many of which ask for nothing to be done (the same size, the same dtype, one tensor).
They run in a process of their own: importing the database switches torch's global flags off, and some ops crash.
"""

from __future__ import annotations

import collections
import json
import random
import subprocess
import sys
import types
import unittest
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ir_tools.frontends.capture import capture
from ir_tools.frontends.source import prepare
from ir_tools.ir import dialect, effects
from ir_tools.ir.dialect import bound_arguments, getitem, op_name, overload_name
from ir_tools.ir.effects import HIDDEN_ALIASES, aliased_arguments
from ir_tools.torch_compat import pytree
from ir_tools.torch_compat.operators import OpOverload, schema_of
from ir_tools.torch_compat.tensors import storage_id
from tests import models

NOT_SWEPT = ("backward", "quantized", "qparams", "native_group_norm")  # not met in inference, or crash on odd arguments
TRIES = 60  # random calls of each composite op
SAMPLES = 2  # samples of each entry of the database
FEWEST_OVERLOADS = 800  # run at least once; fewer means that the sweep has lost its breadth


def storages(values: Any) -> set[int]:
    leaves = [t for t in pytree.tree_leaves(values) if isinstance(t, torch.Tensor)]
    return {storage_id(t) for t in leaves if t.layout is torch.strided and t.numel()}


def sharing_arguments(arguments: dict[str, Any], result: Any) -> list[str]:
    """The names of the arguments that share memory with the result. A sparse tensor shares by being the same object."""
    own, leaves = storages(result), {id(t) for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)}
    return [
        name
        for name, value in arguments.items()
        if storages(value) & own or any(id(t) in leaves for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor))
    ]


# -- the sweeps, in a process of their own ------------------------------------------------------------------------------


class Observed:
    """Which overloads ran, and which arguments their results shared memory with."""

    def __init__(self) -> None:
        self.sharing: dict[str, set[str]] = collections.defaultdict(set)

    def run(self, target: OpOverload, args: tuple, kwargs: dict[str, Any]) -> Any:
        result = target(*args, **kwargs)
        positional, _ = dialect.argument_names(target)
        named = dict(zip(positional, args, strict=False)) | kwargs
        self.sharing[overload_name(target)].update(sharing_arguments(named, result))
        return result


def sweep_database(observed: Observed) -> None:
    """Every ATen op in the pre-dispatch graphs of the database's functions."""
    if "expecttest" not in sys.modules:  # torch.testing imports it for a TestCase that is not used here
        sys.modules["expecttest"] = types.SimpleNamespace(TestCase=unittest.TestCase, assert_expected_inline=None)
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.testing._internal.common_methods_invocations import op_db

    class Interpreter(torch.fx.Interpreter):
        def call_function(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
            if isinstance(target, OpOverload) and target.namespace == "aten":
                return observed.run(target, args, kwargs)
            return super().call_function(target, args, kwargs)

    for entry in op_db:
        if torch.float32 not in entry.dtypes:
            continue
        for _, sample in zip(range(SAMPLES), entry.sample_inputs("cpu", torch.float32), strict=False):
            leaves, tree = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
            at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

            def call(*tensors, leaves=leaves, tree=tree, at=at, function=entry.op):
                filled = list(leaves)
                for i, tensor in zip(at, tensors, strict=True):
                    filled[i] = tensor
                first, args, kwargs = pytree.tree_unflatten(filled, tree)
                return function(first, *args, **kwargs)

            tensors = [leaves[i].detach() for i in at]
            try:
                graph = make_fx(call, pre_dispatch=True)(*tensors)
                Interpreter(graph).run(*tensors)
            except Exception:
                continue


SHAPES = [(3, 3), (3,), (1, 3), (2, 3, 4, 4), (), (2, 3, 4), (1,), (1, 1), (2, 3, 4, 4, 4)]
DTYPES = [*[torch.float32] * 5, torch.int64, torch.bool, torch.complex64]
CASTS = [torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
STRINGS = ["mean", "constant", "i->i", "ij->ij", "ij", "...", "ij,jk->ik", "reflect", "xy", "none", "reduced", "sum", "fro"]


def sweep_composites(observed: Observed) -> None:
    """Random calls of every composite op."""
    for target in composites():
        print(overload_name(target), file=sys.stderr, flush=True)  # the last line names the op that crashed
        chosen = random.Random(0)
        for _ in range(TRIES):
            shape = chosen.choice(SHAPES)
            # `_cast_Half` and its like, and `dequantize`, do nothing only to the dtypes of their own.
            dtype = chosen.choice(CASTS if "_cast_" in op_name(target) else DTYPES)
            given = {a.name: random_value(chosen, a, shape, dtype) for a in schema_of(target).arguments}
            args = tuple(given[a.name] for a in schema_of(target).arguments if not a.kwarg_only)
            kwargs = {a.name: given[a.name] for a in schema_of(target).arguments if a.kwarg_only}
            try:
                observed.run(target, args, kwargs)
            except Exception:
                continue


def composites() -> Iterator[OpOverload]:
    """Ops from tensors to tensors that are made of other ops: a kernel of its own always makes its own memory."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in sorted({s.name.removeprefix("aten::") for s in torch._C._jit_get_all_schemas() if s.name.startswith("aten::")}):
        private = name.startswith("_") and not name.startswith("_cast_") and f"aten::{name}" not in HIDDEN_ALIASES
        if private or any(part in name for part in NOT_SWEPT):
            continue
        packet = getattr(torch.ops.aten, name, None)
        for overload in packet.overloads() if packet is not None else ():
            target = getattr(packet, overload)
            schema = schema_of(target)
            if not torch._C._dispatch_has_kernel(target.name()) or effects.written_arguments(target):
                continue
            if not all(any("Tensor" in str(v.type) for v in side) for side in (schema.arguments, schema.returns)):
                continue
            if any(s in str(a.type) for a in schema.arguments for s in ("Generator", "Storage", "__torch__")):
                continue
            keys = ("CompositeImplicitAutograd", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")
            if any(has_kernel(target.name(), key) for key in keys) or op_name(target) in HIDDEN_ALIASES:
                yield target


def random_value(chosen: random.Random, argument: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    """A value of the argument's type; tensors mostly of one shape and dtype, so that some calls fit together."""
    kind = dialect.argument_kind(argument)
    if argument.has_default_value() and chosen.random() < 0.5:
        return argument.default_value
    if str(argument.real_type).startswith("Optional[") and chosen.random() < 0.4:
        return None
    if kind == "Tensor":
        return random_tensor(chosen, shape, dtype)
    if kind in ("List[Tensor]", "List[Optional[Tensor]]"):
        return [random_tensor(chosen, shape, dtype) for _ in range(chosen.choice([1, 1, 2, 3]))]
    if kind == "List[int]":
        fitting = [list(shape), list(range(len(shape))), []]
        return chosen.choice([*fitting, [chosen.choice([0, 1, -1, 2])] * chosen.choice([1, 2, 3, 4])])
    values = {
        "int": [0, 1, -1, 2, 3],
        "float": [0.0, 1.0, 0.5, 2.0],
        "bool": [False, True],
        "number": [0, 1, 2, 1.0, 0.0],
        "str": STRINGS,
        "ScalarType": [dtype, dtype, torch.float32],
        "Device": [torch.device("cpu")],
        "MemoryFormat": [torch.contiguous_format],
        "Layout": [torch.strided, torch.sparse_coo],
        "List[float]": [[1.0], [1.0, 1.0]],
        "List[bool]": [[True], [False, True]],
        "List[number]": [[1.0], [1, 1]],
    }
    return chosen.choice(values[kind])


def random_tensor(chosen: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    which = chosen.random()
    shape = shape if which < 0.7 else chosen.choice(SHAPES)
    dtype = dtype if which < 0.85 else chosen.choice(DTYPES)
    values = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    values = (values / max(values.numel(), 1) * 2).to(dtype)
    return values.to_sparse() if which > 0.97 else values


@pytest.fixture(scope="module")
def observed() -> dict[str, set[str]]:
    """Overload -> arguments that a result shared memory with."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.ir_tools.test_alias_table"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"the sweep failed; its last words were:\n{done.stderr[-2000:]}"
    return {name: set(shared) for name, shared in json.loads(done.stdout.splitlines()[-1]).items()}


def overload(name: str) -> OpOverload:
    """The overload of a full name such as `aten::add.Tensor`."""
    packet, _, variant = name.removeprefix("aten::").partition(".")
    return getattr(getattr(torch.ops.aten, packet), variant or "default")


# -- tests --------------------------------------------------------------------------------------------------------------


def test_the_sweep_is_broad(observed):
    assert len(observed) >= FEWEST_OVERLOADS
    common = "conv2d linear batch_norm layer_norm relu add.Tensor cat softmax.int scaled_dot_product_attention max_pool2d"
    assert {f"aten::{name}" for name in common.split()} <= set(observed)
    # It sees what the schemas say: views of many kinds were observed as such.
    views = "view transpose.int slice.Tensor expand select.int squeeze unsqueeze chunk split.Tensor reshape contiguous"
    for name in views.split():
        assert observed[f"aten::{name}"] == {"self"}


def test_every_shared_storage_is_known(observed):
    unknown = {
        name: sorted(shared - set(aliased_arguments(overload(name))))
        for name, shared in observed.items()
        if shared - set(aliased_arguments(overload(name)))
    }
    assert not unknown, "these share memory with arguments, and HIDDEN_ALIASES (effects.py) does not say so"


def test_every_entry_of_the_table_is_real(observed):
    sharing = {op_name(overload(name)) for name, shared in observed.items() if shared}
    idle = sorted(set(HIDDEN_ALIASES) - sharing)
    assert not idle, "these were never seen to share memory: take them out of HIDDEN_ALIASES (effects.py)"


def test_no_entry_repeats_what_the_schema_says():
    def says_so(target: OpOverload) -> bool:
        return any(r.alias_info is not None for r in schema_of(target).returns)

    for name in HIDDEN_ALIASES:
        packet = getattr(torch.ops.aten, name.removeprefix("aten::"))
        assert not all(says_so(getattr(packet, o)) for o in packet.overloads()), name


def test_the_table_is_sorted_and_every_entry_has_its_reason():
    assert list(HIDDEN_ALIASES) == sorted(HIDDEN_ALIASES)
    assert all(len(reason.split()) > 3 for reason in HIDDEN_ALIASES.values())


CASES = {**models.OTHERS_GET_WRONG, **models.SIGNATURES, **models.MEMORY, "conv_net": models.conv_net}
CASES |= {name: models.ZOO[name] for name in ("resnet18", "mobilenet_v3_large", "efficientnet_b4")}


@pytest.mark.parametrize("name", CASES)
def test_the_ops_of_the_test_models_share_only_what_is_known(name):
    case = models.seeded(CASES[name])
    program = capture(prepare(case.model, [(case.args, case.kwargs)])).program
    inputs = program.signature.flatten(case.args, case.kwargs)
    values: dict[Any, Any] = {}
    checked = 0
    for node, value in program.trace_values(*(t.clone() for t in inputs)):
        values[node] = value
        if node.op == "call_function":
            given = dialect.map_argument(list(bound_arguments(node).values()), lambda leaf: values.get(leaf, leaf))
            shared = sharing_arguments(dict(zip(bound_arguments(node), given, strict=True)), value)
            assert set(shared) <= set(aliased_arguments(node.target)), f"{node.name}: {overload_name(node.target)}"
            checked += 1
    assert checked == len([n for n in program.calls if n in values]) > 0


def test_reading_an_element_shares_memory_with_the_container():
    assert aliased_arguments(getitem) == ("container",)


def main() -> None:
    """Run both sweeps and print what was observed, as JSON."""
    torch.manual_seed(0)
    observed = Observed()
    with torch.no_grad():
        sweep_database(observed)
        sweep_composites(observed)
    print(json.dumps({name: sorted(shared) for name, shared in observed.sharing.items()}))


if __name__ == "__main__":
    main()
