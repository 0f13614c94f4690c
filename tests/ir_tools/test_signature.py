"""Signatures: any legal call of the model is one call; an error about what does not fit names the input."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from torch import nn

from ir_tools.errors import PassesError, SignatureError
from ir_tools.frontends.source import prepare
from ir_tools.ir.signature import binder, flatten_result, result_tensors
from passes import load, optimize


class Model(nn.Module):
    def forward(self, x, mask=None, *, scale: float = 0.5, batch=None):
        return x * scale


def signature_of(*args, **kwargs):
    return prepare(Model().eval(), [(args, kwargs)]).signature


X, M = torch.zeros(2, 3), torch.zeros(3, dtype=torch.bool)


def assert_tensors(got, *expected):
    assert len(got) == len(expected) and all(a is b for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(
    "args, kwargs",
    [((X, M), {}), ((X,), {"mask": M}), ((), {"mask": M, "x": X}), ((X, M), {"scale": 0.5})],
)
def test_one_call_however_it_is_written(args, kwargs):
    signature = signature_of(X, M)
    assert [str(i) for i in signature.inputs] == ["x: float32[2, 3]", "mask: bool[3]"]
    assert_tensors(signature.flatten(args, kwargs), X, M)


def test_defaults_given_explicitly_are_the_same_call():
    explicit, implicit = signature_of(X, None, scale=float("0.5")), signature_of(X)
    assert explicit.in_tree == implicit.in_tree
    assert_tensors(explicit.flatten((X,), {}), X)
    assert_tensors(implicit.flatten((X, None), {"scale": 0.5}), X)


def test_a_default_equal_in_value_but_not_in_type_is_not_the_default():
    bind = binder([inspect.Parameter("n", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=1)])
    assert bind(1) == {} and bind() == {}
    assert bind(True) == {"n": True} and bind(1.0) == {"n": 1.0}


def test_the_order_of_keys_does_not_matter():
    signature = signature_of(X, batch={"a": X, "b": [M]})
    assert [i.name for i in signature.inputs] == ["x", "batch['a']", "batch['b'][0]"]
    other = torch.ones(2, 3)
    assert_tensors(signature.flatten((X,), {"batch": {"b": [M], "a": other}}), X, other, M)


def test_arguments_are_the_inverse_of_flatten():
    signature = signature_of(X, batch={"a": X, "b": [M, None]}, scale=2.0)
    bound = signature.arguments(signature.flatten((X,), {"batch": {"a": X, "b": [M, None]}, "scale": 2.0}))
    assert bound == {"x": X, "scale": 2.0, "batch": {"a": X, "b": [M, None]}}


@pytest.mark.parametrize(
    "args, kwargs, message",
    [
        ((), {}, "the call does not fit forward(x, mask=None, *, scale=0.5, batch=None): missing a required"),
        ((X, M, M), {}, "too many positional arguments"),
        ((X, M), {"maks": M}, "got an unexpected keyword argument 'maks'"),
        ((X,), {}, "the call has another structure than the one captured: expected x: float32[2, 3], mask: bool[3], got x"),
        ((X, M), {"batch": {"a": X}}, "got x: float32[2, 3], mask: bool[3], batch['a']: float32[2, 3]"),
        ((X, 3), {}, "input 'mask' must be a tensor, got int"),
        ((X, [M]), {}, "input 'mask' must be a tensor, got list"),
        (([X], M), {}, "input 'x' must be a tensor, got list"),
        ((X, M), {"scale": 2.0}, "another structure"),
    ],
)
def test_calls_that_do_not_fit(args, kwargs, message):
    with pytest.raises(SignatureError, match=re.escape(message)):
        signature_of(X, M).flatten(args, kwargs)


@pytest.mark.parametrize(
    "value, message",
    [
        (3.0, "input 'scale' was 2.0 when the model was captured and is baked in; got 3.0. Capture again"),
        (torch.tensor(2.0), "input 'scale' was 2.0 when the model was captured and is baked in; got a tensor"),
        (None, "got None"),
    ],
)
def test_a_baked_value_must_stay(value, message):
    signature = signature_of(X, scale=2.0)
    assert_tensors(signature.flatten((X,), {"scale": 2.0}), X)
    with pytest.raises(SignatureError, match=re.escape(message)):
        signature.flatten((X,), {"scale": value})


class Scaled(nn.Module):
    def forward(self, x, factor):
        return x * factor


def test_a_baked_number_is_another_number_when_its_type_is():
    fast = optimize(Scaled().eval(), example_inputs=(torch.arange(3), 1))
    assert torch.equal(fast(torch.arange(3), 1), torch.arange(3))
    for other in (1.0, True):
        with pytest.raises(SignatureError, match="input 'factor' was 1 when the model was captured"):
            fast(torch.arange(3), other)


@pytest.mark.parametrize(
    "tensor, message",
    [
        (torch.zeros(4, 3), "input 'x' must have shape [2, 3] (sizes were baked in at capture), got [4, 3]"),
        (torch.zeros(2, 3, 1), "input 'x' must have shape [2, 3] (sizes were baked in at capture), got [2, 3, 1]"),
        (torch.zeros(2, 3).half(), "input 'x' must have dtype torch.float32, got torch.float16"),
    ],
)
def test_sizes_and_dtypes_are_checked_by_name(tensor, message):
    signature = signature_of(X, M)
    signature.check([X, M])
    with pytest.raises(SignatureError, match=re.escape(message)):
        signature.check([tensor, M])


def test_the_error_is_one_of_ours_and_a_type_error():
    assert issubclass(SignatureError, PassesError) and issubclass(SignatureError, TypeError)


# -- objects in results -----------------------------------------------------------------------------------------------------


class Layer:
    def __init__(self, keys):
        self.keys, self.filled = keys, True


class Cache:
    """What decoders return: tensors inside of objects inside of a list, beside plain attributes."""

    def __init__(self, *keys):
        self.layers, self.name = [Layer(k) for k in keys], "cache"


class Caching(nn.Module):
    def forward(self, x):
        return {"y": x + 1, "cache": Cache(x * 2, x * 3)}


class Ring:
    def __init__(self, x):
        self.x, self.me = x, self


class Slotted:
    __slots__ = ("__dict__", "more")

    def __init__(self, x):
        self.x, self.more = x, x


class Listed(list):
    def __init__(self, x):
        super().__init__([x])
        self.x = x


class Copied:
    def __init__(self, x):
        self.x = x

    def __getstate__(self):
        return {"x": None}


@pytest.mark.parametrize("frontend", ["auto", "export", "trace"])
def test_tensors_in_the_attributes_of_a_result_follow_the_input(frontend):
    fast = optimize(Caching().eval(), example_inputs=torch.zeros(2, 3), frontend=frontend)
    x = torch.rand(2, 3)
    got = fast(x)
    assert type(got["cache"]) is Cache and got["cache"].name == "cache"
    assert [type(layer) for layer in got["cache"].layers] == [Layer, Layer] and got["cache"].layers[0].filled is True
    torch.testing.assert_close([layer.keys for layer in got["cache"].layers], [x * 2, x * 3])
    assert fast(x)["cache"].layers is not got["cache"].layers


def test_a_saved_file_gives_the_tensors_of_an_object_flat(tmp_path):
    x = torch.rand(2, 3)
    fast = optimize(Caching().eval(), example_inputs=x)
    fast.save(tmp_path / "model.pt")
    torch.testing.assert_close(list(load(tmp_path / "model.pt")(x)), result_tensors(fast(x)))


@pytest.mark.parametrize("kind", [Ring, Slotted, Listed, Copied])
def test_an_object_that_cannot_be_made_anew_is_refused(kind):
    with pytest.raises(SignatureError, match=f"the model returns a {kind.__name__}, which holds tensors and cannot be"):
        flatten_result((X, kind(X)))


def test_what_holds_no_tensor_stays_the_very_object():
    ring = Ring(3)
    leaves, _ = flatten_result((X, ring, nn.Linear(2, 2)))
    assert leaves[1] is ring and isinstance(leaves[2], nn.Linear)
