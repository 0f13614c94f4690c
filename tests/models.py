"""The models that tests run on, each with example inputs: real networks, nets that others get wrong, odd signatures.

Everything is made from a fixed seed. Batch norms have random statistics and affine parameters: with mean 0, variance 1,
scale 1 and shift 0 they do nothing, and a wrong fold would go unseen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from ir_tools.torch_compat.modules import BatchNorm

SEED = 20


@dataclass
class Case:
    """A model in eval mode and one call of it."""

    model: nn.Module
    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __call__(self) -> Any:
        with torch.no_grad():
            return self.model(*self.args, **self.kwargs)


def seeded(build: Callable[[], Case]) -> Case:
    """What `build` makes from the seed, in eval mode with random batch norms; the global random state is left alone."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(SEED)
        case = build()
        randomize_batch_norm(case.model)
    case.model.eval()
    return case


def randomize_batch_norm(model: nn.Module) -> int:
    """Give every batch norm random mean, variance, scale and shift, none of them 0 or 1; return how many there are."""
    norms = [m for m in model.modules() if isinstance(m, BatchNorm)]
    with torch.no_grad():
        for norm in norms:
            norm.running_mean.uniform_(0.05, 0.3).mul_(random_sign(norm.running_mean))
            norm.running_var.uniform_(0.5, 0.9)
            if norm.affine:
                norm.weight.uniform_(0.6, 0.95)
                norm.bias.uniform_(0.05, 0.3).mul_(random_sign(norm.bias))
    return len(norms)


def random_sign(like: torch.Tensor) -> torch.Tensor:
    return torch.randint_like(like, 2) * 2 - 1


def image(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (1, 3, 64, 64)))


# -- real networks ------------------------------------------------------------------------------------------------------


def torchvision_model(name: str) -> Case:
    from ir_tools.torchvision_ops import import_torchvision

    return Case(import_torchvision().models.get_model(name, weights=None), (image(),))


def efficientnet_b4() -> Case:
    from ir_tools.torchvision_ops import import_torchvision

    import_torchvision()  # timm imports torchvision, which may need its missing operators
    import timm

    return Case(timm.create_model("efficientnet_b4", pretrained=False), (image(),))


def bert_base(**smaller: Any) -> Case:
    """BERT with the base configuration (12 layers of 768), or with a part of it made smaller."""
    from ir_tools.torchvision_ops import import_torchvision

    import_torchvision()  # transformers imports it where it is installed
    from transformers import BertConfig, BertModel

    config = BertConfig(**smaller)
    tokens = torch.randint(0, config.vocab_size, (1, 24))
    mask = torch.ones_like(tokens)
    mask[:, 17:] = 0
    return Case(BertModel(config), (tokens,), {"attention_mask": mask})


ZOO: dict[str, Callable[[], Case]] = {
    "resnet18": lambda: torchvision_model("resnet18"),
    "resnet50": lambda: torchvision_model("resnet50"),
    "mobilenet_v3_large": lambda: torchvision_model("mobilenet_v3_large"),
    "efficientnet_b4": efficientnet_b4,
    "bert_base": bert_base,
}


# -- what torch's own fusion gets wrong ---------------------------------------------------------------------------------


class ConvCalledTwice(nn.Module):
    """One convolution called twice, each call followed by its own batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.first(self.conv(x)) + self.second(self.conv(x * 2))


class ConvAlsoReadBare(nn.Module):
    """One convolution, normalised for one input and bare for another (pytorch issues 197539 and 104593)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x, y):
        return self.norm(self.conv(x)), self.conv(y)


class SameModulesTwice(nn.Module):
    """The same convolution and batch norm, applied twice in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(self.norm(self.conv(x))))


class LinearThenNormOverSequence(nn.Module):
    """A linear on (batch, sequence, features), then a batch norm of the sequence axis, which has the features' size."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x):
        return self.norm(self.linear(x))


class UnbatchedConv(nn.Module):
    """A convolution without batch axis, whose height equals its channels; the batch norm takes the height for channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm1d(6)

    def forward(self, x):
        n = self.norm
        return F.batch_norm(self.conv(x), n.running_mean, n.running_var, n.weight, n.bias, False, 0.1, n.eps)


OTHERS_GET_WRONG: dict[str, Callable[[], Case]] = {
    "conv_called_twice": lambda: Case(ConvCalledTwice(), (image(2, 4, 9, 9),)),
    "conv_also_read_bare": lambda: Case(ConvAlsoReadBare(), (image(2, 4, 9, 9), image(2, 4, 9, 9))),
    "same_modules_twice": lambda: Case(SameModulesTwice(), (image(2, 4, 9, 9),)),
    "linear_then_norm_over_sequence": lambda: Case(LinearThenNormOverSequence(), (image(4, 8, 8),)),
    "unbatched_conv": lambda: Case(UnbatchedConv(), (image(4, 6, 7),)),
}


# -- signatures ---------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class Linear(nn.Module):
    """The layer that the models below share."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)


class TupleOut(Linear):
    def forward(self, x):
        y = self.linear(x)
        return y, y.relu()


class ListOut(Linear):
    def forward(self, x):
        y = self.linear(x)
        return [y, y.relu(), y.tanh()]


class DictOut(Linear):
    def forward(self, x):
        y = self.linear(x)
        return {"raw": y, "activated": y.relu()}


class NestedOut(Linear):
    def forward(self, x):
        y = self.linear(x)
        return {"pair": (y, [y.relu(), y.tanh()]), "alone": [y.sigmoid()]}


class NoneAndNumberOut(Linear):
    def forward(self, x):
        y = self.linear(x)
        return y, None, 3, {"size": x.shape[0], "value": y.relu()}


class NamedTupleOut(Linear):
    def forward(self, x):
        y = self.linear(x)
        return Pair(y, y.relu())


class NestedIn(Linear):
    def forward(self, batch, pair):
        return self.linear(batch["x"]) * batch["more"][0] + pair[0] - pair[1]


class NoneIn(Linear):
    def forward(self, x, mask=None, scale=None):
        y = self.linear(x)
        y = y if mask is None else y * mask
        return y if scale is None else y * scale


class NumberIn(Linear):
    def forward(self, x, times: int, shift: float = 0.5, negate: bool = False):
        for _ in range(times):
            x = self.linear(x) + shift
        return -x if negate else x


class KeywordOnly(Linear):
    def forward(self, x, *, mask, bias=None):
        y = self.linear(x) * mask
        return y if bias is None else y + bias


class VarArgs(Linear):
    def forward(self, x, *more):
        for other in more:
            x = self.linear(x) + other
        return x


class VarKeywords(Linear):
    def forward(self, x, **more):
        for name in sorted(more):
            x = self.linear(x) * more[name]
        return x


class InputReturned(Linear):
    def forward(self, x, y):
        return x, self.linear(y), y


class ConstantReturned(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(3))

    def forward(self, x):
        return self.linear(x), self.table


class OneValueTwice(Linear):
    def forward(self, x):
        y = self.linear(x)
        return y, y


def model_output() -> Case:
    """A transformers model, which returns a `BaseModelOutputWithPoolingAndCrossAttentions`."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    return bert_base(vocab_size=100, max_position_embeddings=32, **small)


def row(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (2, 4)))


SIGNATURES: dict[str, Callable[[], Case]] = {
    "tuple_out": lambda: Case(TupleOut(), (row(),)),
    "list_out": lambda: Case(ListOut(), (row(),)),
    "dict_out": lambda: Case(DictOut(), (row(),)),
    "nested_out": lambda: Case(NestedOut(), (row(),)),
    "none_and_number_out": lambda: Case(NoneAndNumberOut(), (row(),)),
    "named_tuple_out": lambda: Case(NamedTupleOut(), (row(),)),
    "model_output": model_output,
    "nested_in": lambda: Case(NestedIn(), ({"x": row(), "more": [row()]}, (row(), row()))),
    "none_in": lambda: Case(NoneIn(), (row(), None, row())),
    "number_in": lambda: Case(NumberIn(), (row(), 2), {"negate": True}),
    "keyword_only": lambda: Case(KeywordOnly(), (row(),), {"mask": row()}),
    "var_args": lambda: Case(VarArgs(), (row(), row(), row())),
    "var_keywords": lambda: Case(VarKeywords(), (row(),), {"b": row(), "a": row()}),
    "input_returned": lambda: Case(InputReturned(), (row(), row())),
    "constant_returned": lambda: Case(ConstantReturned(), (row(),)),
    "one_value_twice": lambda: Case(OneValueTwice(), (row(),)),
}


# -- memory -------------------------------------------------------------------------------------------------------------


class Counter(nn.Module):
    """Counts its calls in a buffer, and answers with the count."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.register_buffer("calls", torch.tensor(5.0))

    def forward(self, x):
        self.calls.add_(1)
        return self.norm(self.conv(x)).relu() * self.calls


class TiedWeights(nn.Module):
    """An embedding whose weight is also the last linear's (one Parameter under two names)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.hidden(self.embedding(tokens)).relu())


class WritesIntoViews(nn.Module):
    """Writes through views, and reads the base and an older view afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        y = self.linear(x)
        first = y[:, :2]
        first.mul_(2)
        y[:, 2:].relu_().add_(1)
        whole = y.view(-1)
        whole[0] = 7.0
        return y + 1, first


class WritesIntoInput(nn.Module):
    """Changes what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        x.mul_(2)
        return self.linear(x)


class ParametersOnViews(nn.Module):
    """Two weights that are halves of one storage, transposed and offset, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        both = torch.randn(4, 8)
        self.left = nn.Parameter(both[:, :4].t())
        self.right = nn.Parameter(both[:, 4:])
        self.register_buffer("shift", torch.randn(4), persistent=False)

    def forward(self, x):
        return F.linear(x, self.left) + F.linear(x, self.right, self.shift)


MEMORY: dict[str, Callable[[], Case]] = {
    "counter": lambda: Case(Counter(), (image(2, 3, 8, 8),)),
    "tied_weights": lambda: Case(TiedWeights(), (torch.randint(0, 20, (2, 5)),)),
    "writes_into_views": lambda: Case(WritesIntoViews(), (row(),)),
    "writes_into_input": lambda: Case(WritesIntoInput(), (row(),)),
    "parameters_on_views": lambda: Case(ParametersOnViews(), (row(),)),
}


# -- small nets ---------------------------------------------------------------------------------------------------------


def conv_net() -> Case:
    """Two convolutions with batch norm, activation and dropout, and a linear: every default pass has work to do."""
    return Case(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2),
            nn.Conv2d(8, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
        ),
        (image(2, 3, 12, 12),),
    )  # fmt: skip
