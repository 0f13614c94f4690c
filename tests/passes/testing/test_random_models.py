"""Random models: valid, the same every time, found by TorchScript, varied; and every phrase yields them."""

from __future__ import annotations

import gc
import inspect
import linecache

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from torch import Tensor, nn

from passes.testing import RandomModel, build, make_inputs, random_models
from passes.testing.model_text import HEADER
from passes.testing.phrases.registry import PHRASES
from passes.testing.writer import Writer

few = settings(max_examples=12, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck),
               phases=[Phase.generate])  # fmt: skip


RANDOM = ("rand_like", "torch.rand(", "F.dropout")
"""What a model with numbers of its own is known by."""


def outputs_of(model: RandomModel) -> list[Tensor]:
    with torch.no_grad():
        given = model.module()(*model.inputs())
    return list(given) if isinstance(given, tuple) else [given]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PHRASES)
def test_every_phrase_yields_valid_models(name: str) -> None:
    """And mostly: a phrase that gives up whenever it is drawn would go unseen."""
    tried, original, made = [], PHRASES[name], []

    def counted(writer: Writer) -> None:
        tried.append(writer)
        original(writer)

    @few
    @given(random_models([name], dtypes=(torch.float64, torch.float32), most=1))
    def valid(model: RandomModel) -> None:
        first, second = outputs_of(model), outputs_of(model)
        assert model.phrases == (name,) and all(t.isfinite().all() for t in first)
        assert any(text in model.source for text in RANDOM) or all(torch.equal(a, b) for a, b in zip(first, second))
        made.append(model)

    PHRASES[name] = counted
    try:
        valid()
    finally:
        PHRASES[name] = original
    assert len({model.source for model in made}) >= 6, "hardly any variety"
    assert len(made) >= len(tried) * 0.6, "it gives up too often"


def sources(count: int = 900) -> list[RandomModel]:
    found: list[RandomModel] = []

    @seed(7)
    @settings(few, max_examples=count, derandomize=False)
    @given(random_models())
    def collect(model: RandomModel) -> None:
        found.append(model)

    collect()
    return found


@pytest.fixture(scope="module")
def many() -> list[RandomModel]:
    return sources()


def test_the_same_seed_draws_the_same_models() -> None:
    assert [model.source for model in sources(20)] == [model.source for model in sources(20)]


@pytest.mark.parametrize(
    "text",
    """nn.Conv1d nn.Conv2d nn.Conv3d nn.ConvTranspose nn.Linear nn.BatchNorm1d nn.BatchNorm2d F.batch_norm training=True
    track_running_stats=False affine=False bias=False stride= dilation= groups= padding_mode= output_padding= 'same' alpha=
    torch.bfloat16 torch.float16 torch.float32 weight_norm spectral_norm softmax masked_fill .permute( channels_last .expand(
    [..., .flatten( .chunk( .split( relu_ mul_ inplace=True F.dropout nn.Dropout randn(0, F.linear F.conv2d
    rand_like torch.cat""".split(),
)
def test_what_rules_meet_is_among_them(text: str, many: list[RandomModel]) -> None:
    assert any(text in model.source for model in many)


def test_phrases_are_glued(many: list[RandomModel]) -> None:
    """Later phrases read what earlier ones gave, and several results are returned or put together."""
    several = [model for model in many if len(model.phrases) > 1]
    one_input = [model for model in several if len(model.inputs()) == 1]
    assert len(several) > 0.5 * len(many) and len(one_input) > 0.2 * len(several)
    assert any(len(outputs_of(model)) > 1 for model in several) and any(len(outputs_of(model)) == 1 for model in several)


SMALL = RandomModel(
    HEADER
    + """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(3)

    def forward(self, x1):
        return self.norm1(x1)

def example_inputs():
    return (torch.randn(2, 3, 4, 4),)
"""
)


def test_inspect_and_torchscript_find_the_source() -> None:
    model = SMALL.module()
    assert "return self.norm1(x1)" in inspect.getsource(type(model).forward)
    scripted = torch.jit.script(model)
    assert torch.equal(scripted(*SMALL.inputs()), model(*SMALL.inputs()))


def test_a_model_that_is_gone_leaves_no_source_behind() -> None:
    def registered() -> int:
        return sum(name.startswith("<random model") for name in linecache.cache)

    gc.collect()
    before = registered()
    model = SMALL.module()
    assert registered() == before + 1
    del model
    gc.collect()
    assert registered() == before


def test_statistics_are_random_and_the_dtype_is_the_one_asked_for() -> None:
    norm = SMALL.module().norm1
    assert not norm.training and norm.running_mean.dtype == torch.float64
    assert all(bool((t != 0).all() and (t != 1).all()) for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias))
    assert build(nn.Sequential, dtype=torch.float32) is not None
    assert make_inputs(lambda: (torch.randn(1),), dtype=torch.float32)[0].dtype == torch.float32


def test_random_numbers_and_the_default_dtype_are_left_alone() -> None:
    state = torch.get_rng_state()
    SMALL.module(), SMALL.inputs()
    assert torch.equal(torch.get_rng_state(), state) and torch.get_default_dtype() == torch.float32


def test_an_unknown_phrase_is_named() -> None:
    with pytest.raises(ValueError, match="there is no phrase 'conv_nrom'; there are: conv_norm"):
        random_models(["conv_nrom"])
