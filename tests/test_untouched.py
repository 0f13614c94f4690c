"""The user's model, random generators and process are left exactly as found, and the result is independent of the model."""

from __future__ import annotations

import contextlib
import copy
import pickle
import random
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from ir_tools.frontends.capture import FRONTENDS
from ir_tools.frontends.undisturbed import undisturbed
from ir_tools.torch_compat import pytree
from ir_tools.torch_compat.tensors import version_of
from passes import PassesError, load, optimize
from tests import models
from tests.models import Case, Linear, row, seeded

BERT = models.SIGNATURES["model_output"]
CASES = {
    "conv_net": models.conv_net,
    "resnet18": models.ZOO["resnet18"],
    "bert": BERT,
    "counter": models.MEMORY["counter"],
    "tied_weights": models.MEMORY["tied_weights"],
    "parameters_on_views": models.MEMORY["parameters_on_views"],
    "nested_out": models.SIGNATURES["nested_out"],
}


class Snapshot:
    """Everything of a model that can be seen: tensors bit by bit, their memory and version, attributes, its answer."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.tensors = {n: t for n, t in (*model.named_parameters(), *model.named_buffers())}
        self.values = {n: t.detach().clone() for n, t in self.tensors.items()}
        self.facts = {n: self._facts(t) for n, t in self.tensors.items()}
        self.attributes = {path: self._attributes(m) for path, m in model.named_modules()}

    @staticmethod
    def _facts(t: torch.Tensor) -> tuple:
        return (id(t), t.data_ptr(), t.stride(), t.requires_grad, t.grad is None, type(t), t.dtype)

    @staticmethod
    def _attributes(module: nn.Module) -> dict[str, Any]:
        """Attribute -> identity of its value; of containers the identities in them."""

        def identity(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: id(part) for key, part in value.items()}
            return [id(part) for part in value] if isinstance(value, (list, set)) else id(value)

        return {name: identity(value) for name, value in vars(module).items()} | {"training": module.training}

    def check(self) -> None:
        now = {n: t for n, t in (*self.model.named_parameters(), *self.model.named_buffers())}
        assert list(now) == list(self.tensors)
        for name, tensor in now.items():
            assert self._facts(tensor) == self.facts[name], name
            assert bits(tensor.detach()) == bits(self.values[name]), name
        assert {path: self._attributes(m) for path, m in self.model.named_modules()} == self.attributes


def bits(value: Any) -> list[bytes]:
    """The bytes of every tensor in a structure, in order."""
    tensors = [t for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]
    return [t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors]


def random_state() -> tuple:
    return torch.get_rng_state().numpy().tobytes(), random.getstate()


def switches() -> dict[str, Any]:
    """Every process-wide setting that a compiler might be tempted to change."""
    c = torch._C
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "mha fast path": torch.backends.mha.get_fastpath_enabled(),
        "threads": torch.get_num_threads(),
        "interop threads": torch.get_num_interop_threads(),
        "texpr fuser": c._jit_texpr_fuser_enabled(),
        "cpu fusion": c._jit_can_fuse_on_cpu(),
        "gpu fusion": c._jit_can_fuse_on_gpu(),
        "llga": c._jit_llga_enabled(),
        "profiling executor": c._get_graph_executor_optimize(),
        "bailout depth": c._jit_get_num_profiled_runs(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "deterministic warn": torch.is_deterministic_algorithms_warn_only_enabled(),
        "default dtype": torch.get_default_dtype(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast dtype": torch.get_autocast_dtype("cpu"),
        "mkldnn": torch.backends.mkldnn.enabled,
        "tf32": torch.get_float32_matmul_precision(),
        "cudnn benchmark": torch.backends.cudnn.benchmark,
        "flush denormal": (torch.tensor([1e-40]) * 1).item(),
        "warning filters": list(warnings.filters),
        "show warning": warnings.showwarning,
        "default device": torch.get_default_device(),
        "printing": copy.copy(vars(torch._tensor_str.PRINT_OPTS)),
        "torch function": torch._C._is_torch_function_enabled(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
    }


# The calls a user makes, one after the other; each must leave the model alone.


BEYOND = {("bert", "script"), ("bert", "fx")}  # the front ends cannot capture it (tests/test_frontends_agree.py)
PAIRS = [(name, frontend) for name in CASES for frontend in FRONTENDS if (name, frontend) not in BEYOND]


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def used(request):
    """(case, snapshot taken before, eager answers before, the optimised model after every use of it)"""
    name, frontend = request.param
    case = seeded(CASES[name])
    inputs_before = bits((case.args, case.kwargs))
    with saved_buffers(case.model):
        before = bits(case())
    snapshot, state, settings = Snapshot(case.model), random_state(), switches()
    fast = optimize(case.model, example_inputs=case.args, example_kwargs=case.kwargs, frontend=frontend)
    assert random_state() == state and switches() == settings
    snapshot.check()
    fast(*case.args, **case.kwargs)
    fast.program.run(*fast.program.signature.flatten(case.args, case.kwargs))
    fast.graph_module(*fast.program.signature.flatten(case.args, case.kwargs))
    assert random_state() == state and switches() == settings
    assert bits((case.args, case.kwargs)) == inputs_before
    return case, snapshot, before, fast


@contextlib.contextmanager
def saved_buffers(model: nn.Module) -> Iterator[None]:
    saved = [(b, b.clone()) for b in model.buffers()]
    yield
    for buffer, value in saved:
        buffer.copy_(value)


def test_the_model_is_bitwise_as_it_was_after_optimize_and_calls(used):
    case, snapshot, before, _ = used
    snapshot.check()
    with saved_buffers(case.model):
        assert bits(case()) == before
    assert not any(m.training for m in case.model.modules())


def test_the_model_is_bitwise_as_it_was_after_its_result_is_cast(used):
    case, snapshot, before, fast = used
    def tensors() -> dict[str, torch.Tensor]:
        return dict((*fast.scripted.named_parameters(), *fast.scripted.named_buffers()))

    values = {n: t.detach().clone() for n, t in tensors().items()}
    fast.scripted.to(torch.float64)
    assert all(t.dtype is torch.float64 for n, t in tensors().items() if values[n].is_floating_point())
    with torch.no_grad():
        for tensor in tensors().values():
            tensor.zero_()
    snapshot.check()
    with saved_buffers(case.model):
        assert bits(case()) == before
    fast.scripted.to(torch.float32)
    with torch.no_grad():
        for name, tensor in tensors().items():
            tensor.copy_(values[name])


def test_the_graph_module_is_independent_of_the_model(used):
    case, snapshot, before, fast = used
    with torch.no_grad():
        for tensor in fast.graph_module.buffers():
            if not tensor.is_mkldnn:  # packed weights are opaque
                tensor.zero_()
    snapshot.check()
    with saved_buffers(case.model):
        assert bits(case()) == before


def test_training_the_model_afterwards_does_not_change_the_result(used):
    case, _, _, fast = used
    model = copy.deepcopy(case.model)  # the other tests want it as it was
    case = Case(case.model, case.args, case.kwargs)
    tensors = fast.program.signature.flatten(case.args, case.kwargs)
    with saved_buffers(fast.scripted):
        scripted = bits(fast(*case.args, **case.kwargs))
    program = bits(fast.program.run(*tensors))
    try:
        with torch.no_grad():
            for tensor in (*case.model.parameters(), *case.model.buffers()):
                tensor.add_(1) if tensor.is_floating_point() else tensor.fill_(0)
        with saved_buffers(fast.scripted):
            assert bits(fast(*case.args, **case.kwargs)) == scripted
        assert bits(fast.program.run(*tensors)) == program
    finally:
        with torch.no_grad():
            for tensor, value in zip(
                (*case.model.parameters(), *case.model.buffers()), (*model.parameters(), *model.buffers()), strict=True
            ):
                tensor.copy_(value)


def test_a_step_of_an_optimiser_works_and_does_not_change_the_result():
    case = seeded(models.conv_net)
    fast = optimize(case.model, example_inputs=case.args)
    answer, tensors = bits(fast(*case.args)), bits(fast.program.run(*case.args))
    eager = bits(case())
    case.model.train()
    optimiser = torch.optim.SGD(case.model.parameters(), lr=0.5)
    case.model(*case.args).square().sum().backward()
    assert all(p.grad is not None for p in case.model.parameters())
    optimiser.step()
    case.model.eval()
    assert bits(case()) != eager
    assert bits(fast(*case.args)) == answer and bits(fast.program.run(*case.args)) == tensors


# -- state --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_a_counter_has_not_moved_and_then_counts_in_the_result_alone(frontend, tmp_path):
    case = seeded(models.MEMORY["counter"])
    fast = optimize(case.model, example_inputs=case.args, frontend=frontend)
    assert case.model.calls == 5
    path = tmp_path / "counter.pt"
    fast.save(path)
    expected = []
    with saved_buffers(case.model):
        for _ in range(3):
            expected.append(case())
    for callable_ in (fast, load(path), torch.jit.load(path)):
        for answer in expected:
            torch.testing.assert_close(callable_(*case.args), answer)
    assert case.model.calls == 5
    # A Program is a value: it starts from the captured state every time.
    for _ in range(2):
        torch.testing.assert_close(fast.program.run(*case.args)[0], expected[0])


def test_a_file_saved_after_calls_holds_the_state_of_then(tmp_path):
    case = seeded(models.MEMORY["counter"])
    fast = optimize(case.model, example_inputs=case.args)
    for _ in range(2):
        fast(*case.args)
    fast.save(tmp_path / "later.pt")
    with saved_buffers(case.model):
        expected = [case() for _ in range(3)][2]
    torch.testing.assert_close(torch.jit.load(tmp_path / "later.pt")(*case.args), expected)
    load(tmp_path / "later.pt")  # its golden outputs are those of its own state


def test_writing_into_views_does_not_reach_the_callers_tensors():
    case = seeded(models.MEMORY["writes_into_views"])
    inputs = bits(case.args)
    fast = optimize(case.model, example_inputs=case.args)
    for _ in range(2):
        assert [torch.allclose(a, b) for a, b in zip(fast(*case.args), case(), strict=True)] == [True, True]
    assert bits(case.args) == inputs


def test_a_model_that_writes_into_its_input_does_so_when_called_and_never_at_optimize():
    case = seeded(models.MEMORY["writes_into_input"])
    before = bits(case.args)
    fast = optimize(case.model, example_inputs=case.args)
    assert bits(case.args) == before
    for callable_ in (case.model, fast):
        x = case.args[0].clone()
        callable_(x)
        assert torch.equal(x, case.args[0] * 2)


def test_changing_the_example_inputs_afterwards_does_not_change_the_golden_ones(tmp_path):
    case = seeded(models.conv_net)
    fast = optimize(case.model, example_inputs=case.args)
    case.args[0].add_(1)
    fast.save(tmp_path / "m.pt")
    load(tmp_path / "m.pt")


class MutableAttributes(Linear):
    """Attributes of kinds that a shallow copy shares: a list, a dict, a tensor in a list, a plain number, a plain tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.history: list = []
        self.memo: dict = {}
        self.states = [torch.zeros(3)]
        self.plain = torch.ones(4)
        self.last = None

    def forward(self, x):
        self.history.append(x.shape[0])
        if "table" not in self.memo:
            self.memo["table"] = torch.arange(4.0)
        self.states[0].add_(1)
        self.last = x
        return self.linear(x) + self.memo["table"] + self.plain


@pytest.mark.parametrize("frontend", ["export", "trace"])
def test_attributes_of_every_kind_are_put_back(frontend):
    model = MutableAttributes().eval()
    snapshot = Snapshot(model)
    fast = optimize(model, example_inputs=row(), frontend=frontend)
    snapshot.check()
    assert (model.history, model.memo, model.last) == ([], {}, None)
    assert model.states[0].tolist() == [0, 0, 0] and model.plain.tolist() == [1, 1, 1, 1]
    x = row()
    answer = bits(fast.program.run(x))
    model.plain.add_(1)  # neither parameter nor buffer, and still not shared
    assert bits(fast.program.run(x)) == answer
    assert isinstance(model(x), torch.Tensor)  # no fake tensors of the capture were left in its memo


class WritesParameters(Linear):
    """Writes a parameter through `.data`, another by giving it other memory, and one that holds NaN not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(4))
        self.moved = nn.Parameter(torch.ones(4))
        self.nan = nn.Parameter(torch.tensor([torch.nan, 0.0]))

    def forward(self, x):
        self.w.data.mul_(2)
        self.moved.data = self.moved.data + 1
        return self.linear(x) * 1.5


class Renormed(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4, max_norm=0.5)

    def forward(self, x):
        return self.linear(self.table(x.argmax(-1)))


@pytest.mark.parametrize("frontend", ["auto", *FRONTENDS])
@pytest.mark.parametrize("model", [WritesParameters, Renormed])
def test_parameters_that_forward_writes_are_put_back(model, frontend):
    model = model().eval()
    snapshot = Snapshot(model)
    versions = [version_of(p) for p in model.parameters()] if isinstance(model, WritesParameters) else []
    with contextlib.suppress(PassesError):  # capturing may fail; the model must be as it was in both cases
        optimize(model, example_inputs=row(), frontend=frontend)
    for name, value in snapshot.values.items():
        assert snapshot.tensors[name].detach().numpy().tobytes() == value.numpy().tobytes(), name
    assert {n: snapshot._facts(t) for n, t in snapshot.tensors.items()} == snapshot.facts
    assert versions == [version_of(p) for p in model.parameters()][: len(versions)]


def test_putting_back_changes_only_what_moved():
    class Changes(Linear):
        def forward(self, x):
            del self.a
            self.a, self.b = 3, 4
            self.seen.add(1)
            self.rows[0] = 2
            return self.linear(x)

    model = Changes().eval()
    model.a, model.c, model.seen, model.rows = 1, 2, {0}, [1]
    before, order = dict(vars(model)), list(vars(model))
    with undisturbed(model):
        model(row())
    assert list(vars(model)) == order and all(vars(model)[k] is v for k, v in before.items())
    assert (model.a, model.seen, model.rows) == (1, {0}, [1])


@pytest.mark.parametrize("name", ["conv_net", "counter"])
def test_two_threads_may_optimise_one_model(name):
    case = seeded(CASES[name])
    with saved_buffers(case.model):
        expected = case()
    snapshot, state, settings = Snapshot(case.model), random_state(), switches()
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: optimize(case.model, example_inputs=case.args), range(8)))
    snapshot.check()
    assert random_state() == state and switches() == settings
    for fast in results:
        torch.testing.assert_close(fast(*case.args), expected)


# -- random generators --------------------------------------------------------------------------------------------------


class Random(Linear):
    def forward(self, x):
        return self.linear(x) + torch.rand(4) + random.random() * 0


class RandomOfNumpy(Linear):
    def forward(self, x):
        return self.linear(x) + numpy.random.rand() * 0


def test_the_generator_of_numpy_does_not_move():
    numpy.random.seed(5)
    before = pickle.dumps(numpy.random.get_state())
    optimize(RandomOfNumpy().eval(), example_inputs=row(), frontend="trace")
    assert pickle.dumps(numpy.random.get_state()) == before


@pytest.mark.parametrize("verify", ["each", "ends", "off"])
def test_a_model_that_draws_numbers_does_not_move_the_generators(verify, tmp_path):
    model, x = Random().eval(), row()
    state = random_state()
    fast = optimize(model, example_inputs=x, verify=verify, frontend="trace")
    fast.save(tmp_path / "m.pt")
    loaded = load(tmp_path / "m.pt")
    assert random_state() == state
    torch.manual_seed(1)
    expected = model(x)
    for callable_ in (fast, loaded):
        torch.manual_seed(1)
        torch.testing.assert_close(callable_(x), expected)


# -- process-wide settings ----------------------------------------------------------------------------------------------


class Fails(Linear):
    def forward(self, x):
        raise ValueError("as it does")


FAILURES = {
    "the model fails": lambda: dict(model=Fails().eval(), example_inputs=row()),
    "no front end captures": lambda: dict(model=Random().eval(), example_inputs=row(), frontend="fx"),
    "the numbers are wrong": lambda: dict(
        model=seeded(models.conv_net).model, example_inputs=seeded(models.conv_net).args, passes="cast_half", tolerance=200.0
    ),
    "an unknown pass": lambda: dict(model=Linear().eval(), passes="nonsense", example_inputs=row()),
}


@pytest.mark.parametrize("failure", [None, *FAILURES])
@pytest.mark.parametrize("changed", [False, True])
def test_settings_of_the_process_are_as_before(failure, changed):
    case = seeded(models.conv_net)
    arguments = FAILURES[failure]() if failure else dict(model=case.model, example_inputs=case.args, passes="fuse_conv_bn_relu")
    with unusual_settings() if changed else contextlib.nullcontext():
        before, state = switches(), random_state()
        if failure:
            with pytest.raises(PassesError):
                optimize(**arguments)
        else:
            fast = optimize(**arguments)
            fast(*case.args)
        assert switches() == before
        assert random_state() == state


@contextlib.contextmanager
def unusual_settings() -> Iterator[None]:
    """Settings that are not the defaults, so that putting defaults back would be noticed."""
    c = torch._C
    fuser, fast_path = c._jit_texpr_fuser_enabled(), torch.backends.mha.get_fastpath_enabled()
    llga, runs = c._jit_llga_enabled(), c._jit_get_num_profiled_runs()
    with torch.no_grad(), warnings.catch_warnings():
        try:
            warnings.simplefilter("ignore", ImportWarning)
            c._jit_set_texpr_fuser_enabled(not fuser)
            c._jit_set_num_profiled_runs(runs + 1)
            torch.backends.mha.set_fastpath_enabled(not fast_path)
            torch.use_deterministic_algorithms(True, warn_only=True)
            yield
        finally:
            c._jit_set_texpr_fuser_enabled(fuser)
            c._jit_set_llga_enabled(llga)
            c._jit_set_num_profiled_runs(runs)
            torch.backends.mha.set_fastpath_enabled(fast_path)
            torch.use_deterministic_algorithms(False)


def test_no_warning_of_torch_is_shown():
    case = seeded(models.conv_net)
    for frontend in FRONTENDS:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            optimize(case.model, example_inputs=case.args, frontend=frontend)
        assert not heard, [str(w.message) for w in heard]


def test_it_works_with_gradients_on_and_the_result_needs_none():
    case = seeded(models.conv_net)
    assert torch.is_grad_enabled() and all(p.requires_grad for p in case.model.parameters())
    x = case.args[0].clone().requires_grad_()
    fast = optimize(case.model, example_inputs=x)
    assert not fast(case.args[0]).requires_grad
    assert x.grad is None and all(p.grad is None for p in case.model.parameters())


def test_optimize_works_in_inference_mode():
    case = seeded(models.MEMORY["counter"])
    with torch.inference_mode():
        fast = optimize(case.model, example_inputs=case.args)
        assert case.model.calls == 5
        expected = case()
    torch.testing.assert_close(fast(*case.args), expected)


def test_a_default_dtype_of_the_user_is_used_and_kept():
    torch.set_default_dtype(torch.float64)
    try:
        case = seeded(models.conv_net)
        fast = optimize(case.model, example_inputs=case.args)
        assert torch.get_default_dtype() is torch.float64
        torch.testing.assert_close(fast(*case.args), case())
    finally:
        torch.set_default_dtype(torch.float32)

