"""Dynamic sizes: models captured without specialising run on other sizes, or refuse them with an error that names the size.

Every case runs on at least three other sets of sizes, through the optimised model, its Program, and the file read again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional as F

from ir_tools.emit.calling import arguments_for
from ir_tools.ir.dialect import short_name
from passes import CaptureError, DynamicShapesError, OptimizedModel, PassesError, SignatureError, load, optimize
from tests import models

Call = tuple[Any, ...]


@dataclass
class Case:
    """`call(*sizes)` makes the arguments; the first of `sizes` is captured. `by`: the front ends that can, or whose reason."""

    build: Callable[[], nn.Module]
    call: Callable[..., Call]
    dynamic_shapes: Any
    sizes: list[tuple[int, ...]]
    by: str = "export script trace fx"
    refused: tuple[tuple[int, ...], str] | None = None  # sizes, and what the error says

    def model(self) -> nn.Module:
        return models.seeded(lambda: models.Case(self.build())).model


def images(batch: int, height: int, width: int) -> Call:
    return (torch.randn(batch, 3, height, width),)


def rows(batch: int, width: int = 4) -> Call:
    return (torch.randn(batch, width),)


BATCH, HEIGHT, WIDTH, LENGTH = Dim("batch"), Dim("height"), Dim("width"), Dim("length")
IMAGE = ({0: BATCH, 2: HEIGHT, 3: WIDTH},)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(16, 2, 3, padding=1)

    def forward(self, x):
        skipped = self.down(x)
        up = F.interpolate(self.inner(F.max_pool2d(skipped, 2)), scale_factor=2.0)
        return self.head(torch.cat([skipped, up], 1))


class UNetOfAnySize(UNet):
    def forward(self, x):
        skipped = self.down(x)
        inner = self.inner(F.max_pool2d(skipped, 2))
        up = F.interpolate(inner, size=(skipped.shape[2], skipped.shape[3]), mode="bilinear")
        return self.head(torch.cat([skipped, up], 1))


class PaddedToFour(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        h, w = x.shape[2], x.shape[3]
        return self.conv(F.pad(x, (0, (4 - w % 4) % 4, 0, (4 - h % 4) % 4)))[:, :, :h, :w].mean((2, 3))


class SamePadding(nn.Module):
    """The arithmetic of EfficientNet's padding: what TensorFlow calls "same"."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 5, 2), nn.BatchNorm2d(8)

    def forward(self, x):
        h, w = x.shape[2], x.shape[3]
        tall, wide = max((math.ceil(h / 2) - 1) * 2 + 5 - h, 0), max((math.ceil(w / 2) - 1) * 2 + 5 - w, 0)
        padded = F.pad(x, [wide // 2, wide - wide // 2, tall // 2, tall - tall // 2])
        return F.silu(self.norm(self.conv(padded))).mean((2, 3))


class Patches(nn.Module):
    """A vision transformer: patches flattened, a class token, a transformer layer."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 8, 8)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 17, 16))
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        patches = self.patch(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(patches.shape[0], -1, -1), patches], 1) + self.position
        return self.head(self.layer(tokens)[:, 0])


class Heads(nn.Module):
    """Attention with its own reshapes, and a mask as large as the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 48)

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = self.project(x).reshape(batch, length, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        mask = torch.arange(length).unsqueeze(0) <= torch.arange(length).unsqueeze(1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class SizesInArithmetic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        b, c, h, w = x.shape
        y = self.linear(x.permute(0, 2, 3, 1).reshape(b, h * w, c)).view(b, h * w, c)
        return y + torch.arange(y.shape[1], device=x.device)[None, :, None] / y.shape[1]


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        y = self.linear(x)
        if x.shape[0] > 4:
            y = y * 2
        return y


class Recurrent(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.rnn = kind(8, 6, batch_first=True, bidirectional=True)

    def forward(self, x):
        return self.rnn(x)[0]


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, y):
        return self.linear(x) + y.mean(1, keepdim=True)


def small_bert() -> nn.Module:
    smaller = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    return models.bert_base(vocab_size=100, **smaller).model


def tokens(batch: int, length: int) -> Call:
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[:, length - 2 :] = 0
    return torch.randint(0, 100, (batch, length)), mask


def sequences(batch: int, length: int) -> Call:
    return (torch.randn(batch, length, 8),)


ODD = "the sizes must meet 2 * (height // 2) == height, got height = 15"
CASES = {
    "resnet18": Case(
        lambda: models.torchvision_model("resnet18").model, images, IMAGE,
        [(2, 64, 64), (1, 64, 64), (3, 33, 64), (4, 65, 47)], by="export script trace",
    ),
    "mobilenet": Case(
        lambda: models.torchvision_model("mobilenet_v3_small").model, images, IMAGE,
        [(2, 64, 64), (1, 64, 64), (3, 33, 64), (4, 65, 47)], by="export",
    ),
    "unet": Case(UNet, images, IMAGE, [(2, 16, 16), (1, 16, 16), (3, 32, 8), (4, 6, 4)], refused=((2, 15, 16), ODD)),
    "unet of any size": Case(UNetOfAnySize, images, IMAGE, [(2, 16, 16), (1, 16, 16), (3, 32, 9), (4, 7, 4)]),
    "padded": Case(PaddedToFour, images, IMAGE, [(2, 9, 10), (1, 9, 10), (2, 8, 8), (3, 13, 11)]),
    "same padding": Case(
        SamePadding, images, IMAGE, [(2, 32, 32), (1, 32, 32), (3, 33, 31), (3, 16, 47)], by="export script",
    ),
    "bert": Case(
        small_bert, tokens, ({0: BATCH, 1: LENGTH}, {0: BATCH, 1: LENGTH}),
        [(2, 12), (1, 12), (3, 7), (4, 20)], by="export trace",
    ),
    "patches": Case(Patches, images, ({0: BATCH},), [(2, 32, 32), (1, 32, 32), (3, 32, 32), (5, 32, 32)]),
    "heads": Case(
        Heads, lambda batch, length: (torch.randn(batch, length, 16),), ({0: BATCH, 1: LENGTH},),
        [(2, 5), (1, 5), (3, 1), (3, 9)], by="export script trace",
    ),
    "sizes in arithmetic": Case(
        SizesInArithmetic, lambda *sizes: (torch.randn(sizes[0], 6, *sizes[1:]),), IMAGE,
        [(2, 4, 5), (1, 4, 5), (3, 1, 7), (3, 2, 2)],
    ),
    "two inputs": Case(
        TwoInputs, lambda x, y, length: (torch.randn(x, 4), torch.randn(y, length)), ({0: BATCH}, {0: BATCH, 1: LENGTH}),
        [(3, 3, 7), (1, 1, 7), (5, 5, 1), (2, 2, 9)],
        refused=((2, 3, 7), "size 0 of input 'y' (batch) is 3, but "),
    ),
}  # fmt: skip
RUNS = [(name, frontend) for name, case in CASES.items() for frontend in case.by.split()]


def first(result: Any) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else result[0]


def compiled(case: Case, model: nn.Module, frontend: str, **options: Any) -> OptimizedModel:
    options = {"dynamic_shapes": case.dynamic_shapes, "frontend": frontend} | options
    return optimize(model, example_inputs=case.call(*case.sizes[0]), **options)


def runnable_versions(fast: OptimizedModel, directory: Path) -> dict[str, Callable[..., Any]]:
    """The module, its Program, and the saved file loaded again."""
    fast.save(directory / "model.pt")
    loaded = load(directory / "model.pt")
    signature = fast.program.signature

    def from_file(*args: Any, **kwargs: Any) -> Any:
        return loaded(*arguments_for(signature, signature.flatten(args, kwargs)))

    return {"fast": fast, "program": fast.program, "file": from_file}


def assert_like_eager(run: Callable[..., Any], model: nn.Module, args: Call, what: str = "", **close: float) -> None:
    with torch.no_grad():
        expected, got = first(model(*args)), first(run(*args))
    torch.testing.assert_close(got, expected, **({"atol": 1e-4, "rtol": 1e-4} | close), msg=lambda text: f"{what}: {text}")


def assert_refuses(fast: OptimizedModel, directory: Path, args: Call, *said: str) -> None:
    for name, run in runnable_versions(fast, directory).items():
        with pytest.raises(torch.jit.Error if name == "file" else SignatureError) as error:
            run(*args)
        assert all(part in str(error.value) for part in said), (name, str(error.value))


@pytest.mark.parametrize("name, frontend", RUNS)
def test_runs_on_other_sizes(name, frontend, tmp_path):
    case = CASES[name]
    model = case.model()
    fast = compiled(case, model, frontend)
    assert len(case.sizes) > 3
    for what, run in runnable_versions(fast, tmp_path).items():
        for sizes in case.sizes:
            assert_like_eager(run, model, case.call(*sizes), f"{what} {sizes}")
    if case.refused is not None:
        sizes, message = case.refused
        assert_refuses(fast, tmp_path, case.call(*sizes), message)


@pytest.mark.parametrize("frontend", ["export", "script", "fx"])
def test_a_network_that_shrinks_its_image_to_one_pixel(frontend):
    """No condition separates 32 pixels, which become one, from 64, which become four."""
    case = CASES["resnet18"]
    model = case.model()
    assert_like_eager(compiled(case, model, frontend), model, images(2, 32, 64))


@pytest.mark.parametrize("lowering", ["lower_aten", "lower_onednn:variant=fused"])
@pytest.mark.parametrize("cast", [[], ["cast_half:dtype=bfloat16"]])
def test_passes_rewrite_as_much_as_where_sizes_are_baked_in(cast, lowering, tmp_path):
    case = CASES["unet"]
    model = case.model()
    passes = ["fuse_conv_bn_relu", *cast, lowering]
    dynamic = compiled(case, model, "export", passes=passes)
    static = compiled(case, model, "export", passes=passes, dynamic_shapes=None)

    def rewrites(fast):
        return [(step.name, len(step.rewrites)) for step in fast.report.steps]

    def ops(fast):
        return [short_name(n.target) for n in fast.program.calls]

    assert rewrites(dynamic) == rewrites(static) and sum(count for _, count in rewrites(static)) > 3
    assert ops(dynamic) == ops(static)
    tolerance = {"atol": 0.05, "rtol": 0.05} if cast else {}
    for what, run in runnable_versions(dynamic, tmp_path).items():
        for sizes in case.sizes:
            assert_like_eager(run, model, case.call(*sizes), what, **tolerance)


# -- branches on sizes --------------------------------------------------------------------------------------------------


def test_a_branch_on_a_size_is_guarded_by_export(tmp_path):
    model = Branch().eval()
    fast = optimize(model, example_inputs=rows(6), dynamic_shapes=({0: BATCH},), frontend="export")
    for batch in (5, 7, 9):
        assert_like_eager(fast, model, rows(batch))
    assert_refuses(fast, tmp_path, rows(4), "the sizes must meet batch", "got batch = 4")


def test_a_branch_on_a_size_is_kept_by_script(tmp_path):
    model = Branch().eval()
    fast = optimize(model, example_inputs=rows(6), dynamic_shapes=({0: BATCH},), frontend="script")
    for run in runnable_versions(fast, tmp_path).values():
        for batch in (1, 4, 5, 9):
            assert_like_eager(run, model, rows(batch))


def test_a_branch_on_a_size_is_refused_by_fx():
    with pytest.raises(CaptureError, match="control flow"):
        optimize(Branch().eval(), example_inputs=rows(6), dynamic_shapes=({0: BATCH},), frontend="fx")


class ReadsInside(nn.Module):
    """A module that fx does not enter, which decides by a size."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(Decides())
        Decides.__module__ = "torch.nn.tests"  # fx enters no module of torch's own

    def forward(self, x):
        return self.inner(x)


class Decides(nn.Module):
    def forward(self, x):
        return x + 1 if x.shape[0] > 4 else x


def test_fx_guards_what_a_module_asks_that_it_does_not_enter(tmp_path):
    model = ReadsInside().eval()
    fast = optimize(model, example_inputs=rows(6), dynamic_shapes=({0: BATCH},), frontend="fx")
    assert_like_eager(fast, model, rows(5))
    assert_refuses(fast, tmp_path, rows(4), "the sizes must meet batch > 4, got batch = 4")


# -- what is pinned -----------------------------------------------------------------------------------------------------


class Unrolled(nn.Module):
    def forward(self, x):
        total = x[:, 0]
        for i in range(1, x.shape[1]):
            total = total * 0.5 + x[:, i]
        return total


def test_a_size_that_the_model_pins_is_named():
    with pytest.raises(CaptureError, match=r"the size 'length' is declared dynamic, but the model .* length = 4 only"):
        optimize(Unrolled().eval(), example_inputs=rows(2), dynamic_shapes=({0: BATCH, 1: LENGTH},), frontend="export")


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("frontend", ["export", "script", "trace"])
def test_recurrent_networks_run_on_other_batches(kind, frontend, tmp_path):
    model = Recurrent(kind).eval()
    fast = optimize(model, example_inputs=sequences(2, 6), dynamic_shapes=({0: BATCH},), frontend=frontend)
    for run in runnable_versions(fast, tmp_path).values():
        for batch in (1, 3, 5):
            assert_like_eager(run, model, sequences(batch, 6))
    assert_refuses(fast, tmp_path, sequences(2, 7), "(sizes were baked in at capture)")


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("frontend", ["script", "trace"])
def test_recurrent_networks_run_on_other_lengths(kind, frontend, tmp_path):
    model = Recurrent(kind).eval()
    shapes = ({0: BATCH, 1: LENGTH},)
    fast = optimize(model, example_inputs=sequences(2, 6), dynamic_shapes=shapes, frontend=frontend)
    for run in runnable_versions(fast, tmp_path).values():
        for sizes in ((1, 6), (3, 1), (4, 11)):
            assert_like_eager(run, model, sequences(*sizes))


def test_recurrent_networks_of_dynamic_length_are_refused_by_export():
    """torch's own shape function of an LSTM unrolls it."""
    with pytest.raises(CaptureError, match=r"the size 'length' is declared dynamic.*length = 6 only"):
        optimize(Recurrent(nn.LSTM).eval(), example_inputs=sequences(2, 6), dynamic_shapes=({1: LENGTH},), frontend="export")


# -- how dynamic_shapes may be written ----------------------------------------------------------------------------------


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, batch: dict[str, torch.Tensor], pair: list[torch.Tensor]):
        return self.linear(batch["a"]) + pair[0].sum(1, keepdim=True) - 2 * pair[1] + batch["b"]


def nested(batch: int, length: int) -> Call:
    return {"a": torch.randn(batch, 4), "b": torch.randn(4)}, [torch.randn(batch, length), torch.randn(batch, 1)]


IN_A_DICT, IN_A_LIST = {"a": {0: BATCH}, "b": None}, [{0: BATCH, 1: LENGTH}, {0: BATCH}]


@pytest.mark.parametrize("dynamic_shapes", [{"batch": IN_A_DICT, "pair": IN_A_LIST}, (IN_A_DICT, IN_A_LIST)])
@pytest.mark.parametrize("frontend", ["export", "script", "trace"])
def test_sizes_in_dicts_and_lists(dynamic_shapes, frontend, tmp_path):
    model = Nested().eval()
    fast = optimize(model, example_inputs=nested(3, 5), dynamic_shapes=dynamic_shapes, frontend=frontend)
    for run in runnable_versions(fast, tmp_path).values():
        for sizes in ((1, 5), (4, 1), (2, 9)):
            assert_like_eager(run, model, nested(*sizes))
    batch, pair = nested(3, 5)
    assert_refuses(fast, tmp_path, (batch, [pair[0], torch.randn(2, 1)]), "size 0 of input 'pair[1]' (batch) is 2, but")


UNNAMED = [{0: Dim.AUTO, 1: Dim.STATIC}, (Dim.DYNAMIC, None), [Dim.AUTO, 4], {-2: Dim.AUTO(min=2, max=9)}]


@pytest.mark.parametrize("spec", UNNAMED)
def test_sizes_without_a_name(spec, tmp_path):
    model = Branch().eval()
    fast = optimize(model, example_inputs=rows(6), dynamic_shapes={"x": spec}, frontend="script")
    for batch in (2, 5, 9):
        assert_like_eager(fast, model, rows(batch))
    assert_refuses(fast, tmp_path, rows(6, 5), "(sizes were baked in at capture)")
    if isinstance(spec, dict) and -2 in spec:
        assert_refuses(fast, tmp_path, rows(10), "size 0 of input 'x' (x_0_) must be from 2 to 9, got 10")


@pytest.mark.parametrize("frontend", ["export", "script", "trace", "fx"])
def test_ranges_are_enforced(frontend, tmp_path):
    model = nn.Linear(4, 4).eval()
    shapes = {"input": {0: Dim("batch", min=2, max=8)}}
    fast = optimize(model, example_inputs=rows(4), dynamic_shapes=shapes, frontend=frontend)
    for batch in (2, 5, 8):
        assert_like_eager(fast, model, rows(batch))
    for batch in (1, 9):
        assert_refuses(fast, tmp_path, rows(batch), f"size 0 of input 'input' (batch) must be from 2 to 8, got {batch}")
    assert_refuses(fast, tmp_path, (torch.randn(4, 4, 4),), "must have")


def test_examples_may_differ_in_dynamic_sizes():
    model = Branch().eval()
    fast = optimize(model, example_inputs=[rows(6), rows(9)], dynamic_shapes=({0: BATCH},), frontend="export")
    assert_like_eager(fast, model, rows(7))


def test_an_example_outside_the_conditions_is_refused():
    with pytest.raises(PassesError):
        optimize(Branch().eval(), example_inputs=[rows(6), rows(3)], dynamic_shapes=({0: BATCH},), frontend="export")


def test_every_example_fits_what_is_declared():
    shapes = ({0: Dim("batch", max=8)},)
    with pytest.raises(DynamicShapesError, match=r"does not fit dynamic_shapes: size 0 of input 'x' \(batch\) must be from 1"):
        optimize(Branch().eval(), example_inputs=[rows(6), rows(9)], dynamic_shapes=shapes)
    one, other = (torch.randn(3, 4), torch.randn(3, 7)), (torch.randn(3, 4), torch.randn(1, 7))
    with pytest.raises(DynamicShapesError, match=r"\(batch\) is 1, but batch is 3 elsewhere in the call"):
        optimize(TwoInputs().eval(), example_inputs=[one, other], dynamic_shapes=({0: BATCH}, {0: BATCH}))


def test_the_first_front_end_that_can_is_taken():
    fast = optimize(Branch().eval(), example_inputs=rows(6), dynamic_shapes=({0: BATCH},))
    assert fast.report.frontend == "export" and fast.manifest["inputs"][0]["shape"] == ["batch", 4]


# -- how it may not be written ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dynamic_shapes, message",
    [
        ({"z": {0: BATCH}}, "names 'z', which is no argument of the call; it has: x, y"),
        (({0: BATCH},), "has 1 entries for 2 arguments (x, y)"),
        ("x", "must be a dict or a tuple, as for torch.export, got str"),
        ({"x": {2: BATCH}}, "of 'x' names axis 2; the tensor has 2"),
        ({"x": {"batch": 0}}, "of 'x' names axis 'batch'"),
        ({"x": {0: BATCH, -2: HEIGHT}}, "of 'x' names axis -2 twice"),
        ({"x": (BATCH,)}, "of 'x' has 1 entries, the tensor 2 axes"),
        ({"x": BATCH}, "of 'x' must be a dict of axes, a tuple or None"),
        ({"x": {0: 5}}, "axis 0 of 'x' must be a torch.export.Dim"),
        ({"x": {0: "batch"}}, "axis 0 of 'x' must be a torch.export.Dim"),
        ({"x": {0: 2 * Dim("half")}}, "give each axis its own Dim"),
        ({"x": {0: Dim("batch", max=2)}}, "axis 0 of 'x' is 3 in the example, but batch must be from 1 to 2"),
        ({"x": {0: Dim("batch", min=4)}}, "axis 0 of 'x' is 3 in the example, but batch must be at least 4"),
        ({"x": {0: Dim("n")}, "y": {0: Dim("n"), 1: Dim("n")}}, "but 'n' is 3 and 7 in the example"),
        ({"x": {0: Dim("n", max=5)}, "y": {0: Dim("n", max=6)}}, "two sizes are called 'n' and have different ranges"),
        ({"x": {0: Dim("max")}}, "is called 'max', which cannot stand in a condition"),
        ({"x": None, "y": {0: Dim.STATIC}}, "dynamic_shapes declares no size dynamic"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_dynamic_shapes_is_reported(dynamic_shapes, message):
    call = (torch.randn(3, 4), torch.randn(3, 7))
    with pytest.raises(DynamicShapesError) as error:
        optimize(TwoInputs().eval(), example_inputs=call, dynamic_shapes=dynamic_shapes)
    assert message in str(error.value)
    assert isinstance(error.value, PassesError) and isinstance(error.value, ValueError)


@pytest.mark.parametrize("spec", [{"a": {0: BATCH}, "c": None}, [{0: BATCH}], {0: BATCH}])
def test_a_nested_spec_has_the_structure_of_its_argument(spec):
    with pytest.raises(DynamicShapesError, match="dynamic_shapes of 'batch' must have the structure of the argument"):
        optimize(Nested().eval(), example_inputs=nested(3, 5), dynamic_shapes={"batch": spec})
