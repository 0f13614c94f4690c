"""The strides of results on the CPU, where torch's fake kernels say others: each entry of the table against the op itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ir_tools.ir import facts
from ir_tools.ir.facts import TensorFact, as_meta
from ir_tools.ir.inference_mode import InferenceMode
from ir_tools.ir.layouts_on_cpu import ON_CPU
from ir_tools.ir.shape_inference import compute_fact
from ir_tools.torch_compat.tensors import likely_memory_format
from passes.testing.true_facts import untrue_facts
from tests.check import captured

aten, mkldnn = torch.ops.aten, torch.ops.mkldnn


def layouts(*shape: int) -> list[Tensor]:
    """A tensor of that shape in each layout that ops give."""
    axes = len(shape)
    x = torch.rand(shape) + 0.5
    back = list(range(axes))[::-1]
    found = [x, x.permute(back).contiguous().permute(back)]
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return [*found, torch.empty_like(x, memory_format=formats[axes]).copy_(x)] if axes in formats else found


def batch_norm(x: Tensor) -> tuple:
    ones = torch.ones(x.shape[1])
    return aten.batch_norm.default, (x, ones, ones, ones, ones, False, 0.1, 1e-5, False)


def convolution(x: Tensor, *residual: Tensor) -> tuple:
    plain = torch.randn(x.shape[1], x.shape[1], 3, 3)
    weight = mkldnn._reorder_convolution_weight(plain, [1, 1], [1, 1], [1, 1], 1, list(x.shape))
    sizes = (weight, None, [1, 1], [1, 1], [1, 1], 1)
    if not residual:
        return mkldnn._convolution_pointwise.default, (x, *sizes, "none", [], None)
    return mkldnn._convolution_pointwise.binary, (x, *residual, *sizes, "add", None, None, [], None)


def unpool(x: Tensor) -> tuple:
    indices = torch.arange(x[0, 0].numel()).reshape(x.shape[2:]).expand(x.shape).contiguous()
    return aten.max_unpool2d.default, (x, indices, list(x.shape[2:]))


def linear(x: Tensor) -> tuple:
    weight = mkldnn._reorder_linear_weight(torch.randn(5, x.shape[-1]), x.numel() // x.shape[-1])
    return mkldnn._linear_pointwise.default, (x, weight, None, "none", [], "")


IMAGES = [(2, 4, 6, 5), (1, 4, 6, 5), (2, 4, 1, 1), (1, 1, 6, 5)]
CASES: dict[str, tuple[Any, list[tuple[int, ...]]]] = {
    "aten::batch_norm": (batch_norm, [*IMAGES, (3, 4, 5), (2, 4, 3, 3, 3)]),
    "aten::reshape": (lambda x: (aten.reshape.default, (x, list(x.shape))), [(2, 4, 1, 1), (1, 4, 6, 5)]),
    "aten::view": (lambda x: (aten.view.default, (x, list(x.shape))), [(2, 4, 1, 1), (1, 4, 6, 5)]),
    "aten::constant_pad_nd": (lambda x: (aten.constant_pad_nd.default, (x, [1, 1], 0.0)), [*IMAGES, (3, 4, 5)]),
    "aten::pad": (lambda x: (aten.pad.default, (x, [1, 1], "constant", None)), IMAGES),
    "aten::channel_shuffle": (lambda x: (aten.channel_shuffle.default, (x, 2)), [(2, 4, 6, 5), (1, 4, 3, 3)]),
    "aten::max_unpool2d": (unpool, IMAGES[:2]),
    "aten::binary_cross_entropy": (lambda x: (aten.binary_cross_entropy.default, (x / 2, x / 2, None, 0)), [(4, 5), IMAGES[0]]),
    "aten::div.Tensor_mode": (lambda x: (aten.div.Tensor_mode, (x, x + 1), {"rounding_mode": "floor"}), [(4, 5), *IMAGES]),
    "aten::floor_divide": (lambda x: (aten.floor_divide.default, (x, torch.rand(x.shape) + 1)), [(4, 5), *IMAGES]),
    "aten::copysign": (lambda x: (aten.copysign.Tensor, (x, torch.rand(x.shape))), [(4, 5), *IMAGES]),
    "aten::xlogy": (lambda x: (aten.xlogy.Tensor, (x, torch.rand(x.shape) + 1)), [(4, 5), *IMAGES]),
    "aten::special_xlog1py": (lambda x: (aten.special_xlog1py.default, (x, torch.rand(x.shape))), [(4, 5), *IMAGES]),
    "aten::roll": (lambda x: (aten.roll.default, (x, [1], [1])), [(4, 5), *IMAGES]),
    "aten::group_norm": (lambda x: (aten.group_norm.default, (x, 1, None, None, 1e-5, False)), IMAGES),
    "aten::pow.Scalar": (lambda x: (aten.pow.Scalar, (2, x)), [(4, 5), *IMAGES]),
    "aten::rrelu": (lambda x: (aten.rrelu.default, (x,)), [(4, 5), *IMAGES]),
    "aten::log_sigmoid": (lambda x: (aten.log_sigmoid.default, (x,)), [(4, 5), *IMAGES]),
    "aten::max_pool1d": (lambda x: (aten.max_pool1d.default, (x, [2])), [(3, 4, 6), (1, 2, 4)]),
    "mkldnn::_convolution_pointwise": (convolution, IMAGES),
    "mkldnn::_linear_pointwise": (linear, [(3, 8), (2, 3, 8), (2, 4, 6, 8)]),
}
MORE = {
    **{f"pad {mode}": (lambda x, m=mode: (aten.pad.default, (x, [1, 1, 1, 1], m, None)), IMAGES[:2])
       for mode in ("reflect", "replicate", "circular")},
    **{f"pad 3-d {mode}": (lambda x, m=mode: (aten.pad.default, (x, [1, 1, 1, 1, 1, 1], m, None)), [(2, 4, 3, 4, 5)])
       for mode in ("constant", "reflect", "replicate", "circular")},
    "pad by nothing": (lambda x: (aten.pad.default, (x, [0, 0], "constant", None)), [(2, 4), *IMAGES]),
    "convolution with a residual": (lambda x: convolution(x, torch.randn(x.shape)), IMAGES[:2]),
}  # fmt: skip


def test_every_entry_of_the_table_is_tried() -> None:
    assert CASES.keys() == ON_CPU.keys()


@pytest.mark.parametrize("name", [*CASES, *MORE])
def test_the_fact_has_the_strides_of_the_kernel(name: str) -> None:
    case, shapes = (CASES | MORE)[name]
    tried = 0
    for shape in shapes:
        for x in layouts(*shape):
            target, args, *rest = case(x)
            kwargs = rest[0] if rest else {}
            with torch.no_grad():
                try:
                    result = target(*args, **kwargs)
                except RuntimeError:  # a view that this layout does not allow
                    continue
            plain = tuple(TensorFact.of(a) if isinstance(a, Tensor) and not a.is_mkldnn else a for a in args)
            known = compute_fact(InferenceMode(), target, tuple(map(unpacked, plain)), kwargs)
            assert isinstance(known, TensorFact) and known.shape == result.shape
            if known.strides is None:
                continue
            tried += 1
            of_one = [a for a, n, s in zip(known.strides, result.shape, result.stride(), strict=True) if n != 1 and a != s]
            assert not of_one, f"{x.shape} at {x.stride()}: the fact says {known.strides}, the kernel gives {result.stride()}"
            assert likely_memory_format(as_meta(known)) == likely_memory_format(result), (x.shape, x.stride(), known.strides)
    assert tried >= 2


def unpacked(argument: Any) -> Any:
    """Of a packed weight, the fact of a plain one."""
    if isinstance(argument, Tensor) and argument.is_mkldnn:
        return TensorFact.of(argument.to_dense())
    return argument


ELEMENTWISE: list[tuple[Any, Any]] = [
    *((getattr(aten, name).default, lambda x: (x,)) for name in
      ("relu tanh sigmoid hardswish hardsigmoid gelu silu elu leaky_relu sqrt softplus mish neg abs exp clone hardtanh "
       "relu6").split()),
    *((getattr(aten, name).Tensor, lambda x: (x, x)) for name in ("add", "sub", "mul", "div")),
    *((getattr(aten, name).Tensor, lambda x: (x, 2.0)) for name in ("add", "mul", "sub")),
    *((getattr(aten, name).Scalar, lambda x: (x, 2.0)) for name in ("add", "mul", "sub", "div", "rsub")),
    (aten.maximum.default, lambda x: (x, x)),
    (aten.clamp.default, lambda x: (x, 0.0, 6.0)),
    (aten.pow.Tensor_Scalar, lambda x: (x, 2)),
    (aten.to.dtype, lambda x: (x, torch.float64)),
    (aten.where.self, lambda x: (x > 0, x, x)),
]  # fmt: skip


@pytest.mark.parametrize("op, arguments", ELEMENTWISE, ids=[str(op) for op, _ in ELEMENTWISE])
@pytest.mark.parametrize("shape, strides", [
    ((2, 8, 1, 1), (8, 1, 8, 8)), ((2, 8, 1, 1), (8, 1, 1, 1)), ((2, 1, 3, 4), (12, 1, 4, 1)), ((2, 1, 3, 4), (12, 12, 4, 1)),
    ((2, 3, 4, 5), (60, 1, 15, 3)),
])  # fmt: skip
def test_elementwise_ops_on_layouts_that_are_ambiguous(op: Any, arguments: Any, shape: Any, strides: Any) -> None:
    x = torch.rand(shape).as_strided(shape, strides) if 1 in shape else torch.empty_strided(shape, strides).fill_(1.0)
    args = arguments(x)
    known = compute_fact(InferenceMode(), op, tuple(TensorFact.of(a) if isinstance(a, Tensor) else a for a in args), {})
    assert isinstance(known, TensorFact)
    assert known.strides == op(*args).stride()


ODD = {
    "a turned row and a column": (((1, 1, 4), (1, 1, 1)), ((3, 1), (1, 1))),
    "a sliced pixel": (((1, 2, 1, 1), (60, 1, 10, 2)), ((1, 2, 1, 1), (60, 1, 10, 2))),
    "a new axis on a turned image": (((1, 2, 2, 2), (2, 1, 4, 2)), ((2, 1, 1), (1, 1, 1))),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("op", [aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.maximum.default], ids=str)
def test_strides_that_say_nothing_are_never_wrong(op: Any, name: str) -> None:
    """They may be unknown."""
    x, y = (torch.rand(200).as_strided(*view) for view in ODD[name])
    for args in ((x, y), (y, x)):
        known = compute_fact(InferenceMode(), op, tuple(map(TensorFact.of, args)), {})
        assert isinstance(known, TensorFact)
        result = op(*args)
        wrong = [] if known.strides is None else [
            n for n, a, b in zip(result.shape, known.strides, result.stride(), strict=True) if n != 1 and a != b]  # fmt: skip
        assert not wrong


def scripted(post: Any) -> Any:
    """A value that is channels-last on one side of an if and contiguous on the other, and an op on it."""

    class Sides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.post = post

        def forward(self, x: Tensor) -> Tensor:
            if bool(x.sum() > 0):
                y = x.contiguous(memory_format=torch.channels_last)
            else:
                y = x * 2
            return self.post(y)

    return torch.jit.script(Sides().eval())


POSTS = [
    nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2), nn.AdaptiveMaxPool2d(2), nn.LPPool2d(2, 2),
    nn.Upsample(scale_factor=2), nn.UpsamplingBilinear2d(scale_factor=2), nn.Conv2d(4, 3, 3), nn.Conv2d(4, 4, 3, groups=4),
    nn.ConvTranspose2d(4, 3, 3), nn.GroupNorm(2, 4), nn.PixelShuffle(2), nn.ReflectionPad2d(1), nn.ReplicationPad2d(1),
    nn.ZeroPad2d(1), nn.ChannelShuffle(2), nn.BatchNorm2d(4), nn.ReLU(), nn.Softmax(1), nn.Linear(8, 3), nn.Flatten(),
]  # fmt: skip


@pytest.mark.parametrize("post", POSTS, ids=lambda m: type(m).__name__)
def test_what_is_computed_from_unknown_strides_is_unknown_or_true(post: nn.Module) -> None:
    x = torch.rand(2, 4, 8, 8)
    program = captured(scripted(post), x, frontend="script")
    assert untrue_facts(program, x) == [] and untrue_facts(program, -x) == []


class Function(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


IMAGE = torch.rand(2, 4, 6, 5).contiguous(memory_format=torch.channels_last)
MODULES: dict[str, tuple[Any, Tensor]] = {
    **{f"{kind.__name__} {first} {both}": (kind(3, 5, 2, batch_first=first, bidirectional=both), torch.rand(2, 6, 3))
       for kind in (nn.LSTM, nn.GRU, nn.RNN) for first in (True, False) for both in (True, False)},
    "roll": (lambda x: (x.roll(1, 1), x.roll((1, 2), (1, 2)), x.roll(1)), IMAGE),
    "powers": (lambda x: (2**x, x**2, x**0.5, x**x), IMAGE),
    "rrelu": (lambda x: F.rrelu(x), IMAGE),
    "group norm": (lambda x: F.group_norm(x, 2), IMAGE),
    "group norm of one": (lambda x: F.group_norm(x, 2), IMAGE[:1]),
    "a turned axis of one": (lambda x: x[..., :1].transpose(1, 2) / 2, torch.rand(1, 4, 8, 3)),
    "column of nonzero": (lambda x: (x.nonzero()[0] * 2, x.nonzero().t()[:, 0]), torch.tensor([[0.0, 1.0], [2.0, 3.0]])),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_facts_of_captured_models_are_true(name: str) -> None:
    model, x = MODULES[name]
    model = model if isinstance(model, nn.Module) else Function(model)
    program = captured(model.eval(), x)
    assert untrue_facts(program, x) == []


def test_a_value_that_out_gives_another_shape_changes_no_other_value() -> None:
    """`out=` resizes the empty tensor; another empty one stays empty."""

    def model(x: Tensor) -> tuple[Tensor, Tensor]:
        z, w = torch.empty(0), torch.empty(0)
        torch.add(x, x, out=z)
        return z * 2, torch.cat([w, w]).neg()

    x = torch.rand(4, 3)
    program = captured(Function(model).eval(), x)
    assert [tensor.shape for tensor in program.run(x)] == [(4, 3), (0,)]
    assert [facts.shape(node) for node in program.output.args[0]] == [(4, 3), (0,)]
