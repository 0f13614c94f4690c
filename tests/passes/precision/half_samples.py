"""Small calls of every op in the table of half precision, by name, for the tests of the table.

Tensors of numbers are float32 here; a test casts them. Reductions run over 4096 numbers or more, and rows have 2048,
so that a kernel that sums in half precision shows; both along the memory and across it, and in both layouts of images,
because torch has different kernels for these.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch

from ir_tools.ir import dialect


@dataclass(frozen=True)
class Call:
    """The arguments of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def call(*args: Any, **kwargs: Any) -> Call:
    return Call(args, kwargs)


def operator_of(name: str) -> Any:
    """The operator of an entry. Raises AttributeError when there is none."""
    if name == "getitem":
        return operator.getitem
    return getattr(dialect, name) if name in ("conv_act", "linear_act", "quant_stub") else getattr(torch.ops.aten, name)


_random = torch.Generator().manual_seed(0)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=_random)


def uniform(*shape: int) -> torch.Tensor:
    """Between 0.05 and 0.95: within the domain of every function here but acosh."""
    return torch.rand(shape, generator=_random) * 0.9 + 0.05


def integers(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=_random)


X, Y = normal(6, 40), normal(6, 40)
NEAR, NEARER = 1 + 1e-5 * normal(6, 40), 1 + 1e-4 * normal(6, 40)  # all of which round to 1,
SMALL, LARGE = 1e-9 * normal(6, 40), 1e5 * normal(6, 40)  # to 0 and to infinity in float16
U, V = uniform(6, 40), uniform(6, 40)
MASK = normal(6, 40) > 0
A, B = normal(2, 5, 7), normal(2, 7, 3)
DEEP, DEEPER = uniform(2, 6, 4200), uniform(2, 4200, 5)
ROWS, ROW, ROW2 = normal(3, 2500), normal(2500), uniform(2500)
ACROSS = normal(2500, 9)
LONG, TALL = uniform(2, 4200), uniform(4200, 9)
FEW, FEW2 = normal(30, 3), normal(30, 3)  # where the roundings of single steps do not average out
NEAR_ONE = 1 + 0.01 * normal(2, 4200)
LINE, IMAGE, VOLUME = normal(2, 4, 12), normal(2, 4, 10, 12), normal(1, 4, 6, 8, 6)
LAST = IMAGE.contiguous(memory_format=torch.channels_last)
BIG = uniform(1, 8, 70, 70)
BIG_LAST = BIG.contiguous(memory_format=torch.channels_last)
C, D, E, F = normal(8), uniform(8), normal(8), uniform(8)  # one number per channel of BIG
PICKS = integers(6, 9)
INDEX = integers(6, 6, 40)
MANY, MANY_CLASSES = 10 * uniform(50000, 3) ** 3, integers(3, 50000)
STATE = normal(1, 3, 16)
SEQUENCE = normal(200, 3, 8)
HEADS = normal(1, 2, 300, 16)


def gates(count: int) -> list[torch.Tensor]:
    """Weights and biases of a recurrent layer, from 8 numbers to 16."""
    return [0.3 * normal(*shape) for shape in ((count * 16, 8), (count * 16, 16), (count * 16,), (count * 16,))]


def cell(count: int) -> list[torch.Tensor]:
    return [3 * normal(60, 8), normal(60, 16), *gates(count)]


def recurrent(count: int) -> Call:
    return call(SEQUENCE, STATE, gates(count), True, 1, 0.0, False, False, False)


POOL1, POOL2, POOL3 = ([3], [2], [1]), ([3, 3], [2, 2], [1, 1]), ([3, 3, 3], [2, 2, 2], [1, 1, 1])

# Ops that are called alike, then those that are called differently.
ALIKE: list[tuple[str, list[Call]]] = [
    (
        """relu relu6 neg negative abs absolute positive hardtanh leaky_relu hardswish hardsigmoid silu sigmoid tanh gelu elu
        celu selu mish atan arctan asinh arcsinh deg2rad rad2deg nan_to_num softshrink square exp exp2 expm1 erf erfc sinh
        cosh softplus log_sigmoid
        special_expit special_exp2 special_expm1 special_erf special_erfc special_ndtr special_erfcx special_log_ndtr i0
        special_i0 special_i0e special_i1 special_i1e sin cos tan sinc floor ceil round trunc fix frac special_sinc
        special_round rrelu""",
        [call(X), call(5 * X)],
    ),
    (
        """sqrt rsqrt reciprocal log log2 log10 log1p asin arcsin acos arccos atanh arctanh logit erfinv lgamma digamma
        special_gammaln special_digamma special_psi special_log1p special_logit special_erfinv special_entr special_ndtri""",
        [call(U)],
    ),
    ("sign sgn logical_not isnan isinf isfinite isposinf isneginf signbit isreal", [call(X), call(SMALL), call(LARGE)]),
    ("any all nonzero argwhere count_nonzero", [call(X), call(SMALL)]),
    ("acosh arccosh", [call(1 + U)]),
    ("polygamma special_polygamma", [call(1, U)]),
    ("mvlgamma special_multigammaln", [call(2 + U, 2)]),
    (
        """add sub subtract mul multiply div divide true_divide rsub remainder fmod floor_divide""",
        [call(X, V), call(X, 0.3)],
    ),
    ("maximum minimum fmax fmin copysign hypot atan2 arctan2 logaddexp logaddexp2", [call(X, Y)]),
    ("gt ge lt le eq ne greater greater_equal less less_equal not_equal", [call(X, 0.3), call(NEAR, NEARER)]),
    ("isclose allclose equal", [call(X, Y), call(NEAR, NEARER)]),
    ("heaviside logical_and logical_or logical_xor", [call(SMALL, X), call(SMALL, 0 * X)]),
    ("pow", [call(U, V), call(X, 2), call(X, 3), call(U, 0.3)]),
    ("ldexp", [call(X, PICKS[:1])]),
    ("xlogy special_xlogy special_xlog1py igamma igammac special_gammainc special_gammaincc", [call(U, V)]),
    ("addcmul addcdiv", [call(X, Y, V, value=0.3)]),
    ("clamp clip", [call(X, -0.3, 0.7), call(X, -V, V)]),
    ("clamp_min clamp_max fill", [call(X, 0.3)]),
    # -- moves ----------------------------------------------------------------------------------------------------------
    (
        """flatten ravel numpy_T mT mH matrix_H adjoint contiguous clone alias detach lift_fresh t squeeze fliplr flipud rot90
        tril triu msort diag diagonal diagflat diag_embed
        conj_physical""",
        [call(X)],
    ),
    ("reshape view _unsafe_view", [call(X, [12, 20])]),
    ("view_as reshape_as expand_as copy", [call(X, Y)]),
    ("transpose swapaxes swapdims moveaxis movedim", [call(X, 0, 1)]),
    ("cat concat concatenate stack", [call([X, Y], 1)]),
    ("hstack vstack dstack column_stack row_stack", [call([X, Y])]),
    ("atleast_1d atleast_2d atleast_3d", [call(X)]),
    ("block_diag cartesian_prod", [call([ROW[:5], C])]),
    ("meshgrid", [call([ROW[:5], C], indexing="ij")]),
    ("broadcast_tensors", [call([X, X[:1]])]),
    ("chunk unsafe_chunk hsplit tensor_split", [call(X, 2)]),
    ("split unsafe_split", [call(X, 3, 1)]),
    ("split_with_sizes unsafe_split_with_sizes", [call(X, [10, 30], 1)]),
    ("dropout feature_dropout alpha_dropout feature_alpha_dropout", [call(X, 0.5, False)]),
    ("pixel_shuffle channel_shuffle native_channel_shuffle", [call(IMAGE, 2), call(LAST, 2)]),
    ("reflection_pad1d replication_pad1d", [call(LINE, [1, 2])]),
    ("reflection_pad2d replication_pad2d", [call(IMAGE, [1, 2, 3, 1]), call(LAST, [1, 2, 3, 1])]),
    ("reflection_pad3d replication_pad3d", [call(VOLUME, [1, 2, 3, 1, 2, 0])]),
    ("pad", [call(IMAGE, [1, 2]), call(LAST, [1, 2, 1, 0], "constant", 0.3), call(LINE, [1, 2], "reflect")]),
    ("constant_pad_nd", [call(IMAGE, [1, 2]), call(LAST, [1, 2, 1, 0], 0.3)]),
    ("upsample_nearest1d _upsample_nearest_exact1d", [call(LINE, [30])]),
    ("upsample_nearest2d _upsample_nearest_exact2d", [call(IMAGE, [17, 30]), call(LAST, [17, 30])]),
    ("upsample_nearest3d _upsample_nearest_exact3d", [call(VOLUME, [7, 9, 13])]),
    ("upsample_linear1d", [call(LINE, [30], False), call(LINE, [30], True)]),
    (
        "upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa",
        [call(x, size, corners) for x in (IMAGE, LAST) for size in ([17, 30], [7, 5]) for corners in (False, True)],
    ),
    ("upsample_trilinear3d", [call(VOLUME, [7, 9, 13], False), call(VOLUME, [7, 9, 13], True)]),
    ("masked_scatter", [call(X, MASK, Y)]),
    # -- pools ----------------------------------------------------------------------------------------------------------
    ("max_pool1d max_pool1d_with_indices", [call(LINE, *POOL1), call(NEAR[:, None], *POOL1)]),
    ("max_pool2d max_pool2d_with_indices", [call(IMAGE, *POOL2), call(LAST, *POOL2), call(NEAR[None], *POOL2)]),
    ("max_pool3d max_pool3d_with_indices", [call(VOLUME, *POOL3), call(1 + 1e-5 * VOLUME, *POOL3)]),
    ("avg_pool1d", [call(LINE, *POOL1), call(BIG.reshape(1, 8, 4900), [4900])]),
    ("avg_pool2d", [call(IMAGE, *POOL2), call(LAST, *POOL2), call(BIG, [70, 70]), call(BIG_LAST, [70, 70])]),
    ("avg_pool3d", [call(VOLUME, *POOL3)]),
    ("adaptive_max_pool1d", [call(LINE, [5]), call(NEAR, [5])]),
    ("adaptive_max_pool2d", [call(IMAGE, [5, 7]), call(LAST, [5, 7]), call(NEAR[None], [5, 7])]),
    ("adaptive_max_pool3d", [call(VOLUME, [2, 3, 4]), call(1 + 1e-5 * VOLUME, [2, 3, 4])]),
    ("adaptive_avg_pool1d", [call(BIG.reshape(1, 8, 4900), [1]), call(LINE, [5])]),
    ("adaptive_avg_pool2d", [call(x, size) for x in (BIG, BIG_LAST) for size in ([1, 1], [2, 1], [3, 7])]),
    ("adaptive_avg_pool3d", [call(uniform(1, 2, 17, 16, 16), size) for size in ([1, 1, 1], [2, 3, 1])]),
    # -- sums and norms -------------------------------------------------------------------------------------------------
    (
        "sum mean nansum nanmean",
        [
            *(call(x, [1]) for x in (LONG, ROWS, FEW, 100 * LONG)),
            *(call(LONG), call(TALL, [0]), call(BIG, [2, 3]), call(BIG_LAST, [2, 3])),
        ],
    ),
    (
        "var std var_mean std_mean",
        [*(call(x, [1]) for x in (LONG, FEW, LONG + 20, 100 * LONG)), call(TALL, [0]), call(BIG_LAST, [2, 3])],
    ),
    ("amax amin", [call(LONG, [1]), call(TALL, [0]), call(X)]),
    ("aminmax", [call(X), call(X, dim=1)]),
    ("max min", [call(X), call(NEAR, 1), call(X, Y)]),
    ("median nanmedian mode cummax cummin", [call(X, 1), call(NEAR, 1)]),
    ("argmax argmin argsort sort", [call(X, 1), call(NEAR, 1)]),
    ("kthvalue topk", [call(X, 3, 1), call(NEAR, 3, 1)]),
    ("cumsum logcumsumexp", [call(LONG, 1), call(TALL, 0), call(FEW, 1)]),
    ("prod", [call(FEW, 1), call(NEAR_ONE), call(NEAR_ONE, 1), call(NEAR_ONE.mT.contiguous(), 0)]),
    ("cumprod", [call(NEAR_ONE, 1), call(NEAR_ONE.mT.contiguous(), 0)]),
    ("logsumexp special_logsumexp", [call(LONG, [1]), call(TALL, [0]), call(FEW.log_softmax(1), [1])]),
    (
        "norm linalg_vector_norm",
        [call(x, p, [axis]) for x, axis in ((LONG, 1), (TALL, 0), (FEW, 1), (100 * LONG, 1)) for p in (2, 1, 3, float("inf"))],
    ),
    ("linalg_norm", [call(LONG, dim=[1])]),
    ("frobenius_norm", [call(LONG, [1])]),
    (
        "softmax log_softmax special_softmax special_log_softmax",
        [call(ROWS, 1), call(5 * ROWS, 1), call(FEW, 1), call(ACROSS, 0)],
    ),
    ("_safe_softmax", [call(ROWS, 1), call(ACROSS, 0)]),
    ("layer_norm", [call(ROWS, [2500], ROW, ROW2), call(ROWS + 20, [2500]), call(500 * ROWS, [2500], ROW), call(FEW, [3])]),
    ("rms_norm", [call(ROWS, [2500], ROW), call(500 * ROWS, [2500]), call(FEW, [3])]),
    (
        "group_norm",
        [call(BIG, 2, C, D), call(BIG_LAST, 2, C, D), call(BIG + 20, 2), call(BIG_LAST + 20, 2), call(BIG, 8, C)],
    ),
    ("batch_norm", [call(x, *ws, E, F, False, 0.1, 1e-5, True) for x in (BIG, BIG_LAST) for ws in ((C, D), (None, None))]),
    (
        "instance_norm",
        [call(x, *ws, None, None, True, 0.1, 1e-5, True) for x in (BIG, BIG_LAST, BIG + 20) for ws in ((C, D), (None, None))],
    ),
    ("mse_loss l1_loss huber_loss smooth_l1_loss", [call(LONG, LONG.flip(1)), call(torch.tensor([300.0, 0, 0]), FEW[0])]),
    ("nll_loss nll_loss_nd", [call(MANY, MANY_CLASSES)]),
    (
        "binary_cross_entropy binary_cross_entropy_with_logits",
        [call(LONG, LONG.flip(1)), *(call(u, v) for u, v in zip(U[:, :2], V[:, :2]))],
    ),
    ("kl_div", [call(LONG, LONG.flip(1)), call(U.log(), U)]),
    ("pairwise_distance cosine_similarity dist cdist", [call(ROWS, ROWS.flip(1)), call(LONG, LONG.flip(1)), call(FEW, FEW2)]),
    # -- products -------------------------------------------------------------------------------------------------------
    ("matmul bmm linalg_matmul", [call(A, B), call(DEEP, DEEPER)]),
    ("mm", [call(DEEP[0], DEEPER[0])]),
    ("mv", [call(LONG, LONG[0])]),
    ("dot vdot", [call(LONG[0], LONG[1])]),
    ("inner linalg_vecdot", [call(LONG, LONG[:1].expand(2, -1))]),
    ("outer ger", [call(C, D)]),
    ("gru", [recurrent(3)]),
    ("rnn_tanh rnn_relu", [recurrent(1)]),
    ("gru_cell", [call(*cell(3))]),
    ("rnn_tanh_cell rnn_relu_cell", [call(*cell(1))]),
]

ALONE: dict[str, list[Call]] = {
    # -- products -------------------------------------------------------------------------------------------------------
    "conv1d": [call(LINE, normal(6, 4, 3), normal(6)), call(uniform(1, 512, 12), uniform(3, 512, 9))],
    "conv2d": [
        *(call(x, normal(6, 4, 3, 3), normal(6), [2, 2], [1, 1]) for x in (IMAGE, LAST)),
        call(IMAGE, normal(4, 1, 3, 3), None, [1, 1], [1, 1], [1, 1], 4),
        call(uniform(1, 512, 4, 4), uniform(3, 512, 3, 3)),
    ],
    "conv3d": [call(VOLUME, normal(6, 4, 2, 3, 3), normal(6)), call(uniform(1, 256, 3, 3, 3), uniform(2, 256, 3, 3, 3))],
    "conv_transpose1d": [call(LINE, normal(4, 5, 3)), call(uniform(1, 2048, 4), uniform(2048, 2, 3))],
    "conv_transpose2d": [call(IMAGE, normal(4, 5, 3, 3)), call(uniform(1, 1024, 3, 3), uniform(1024, 2, 3, 3))],
    "conv_transpose3d": [call(VOLUME, normal(4, 5, 2, 3, 3)), call(uniform(1, 512, 3, 3, 3), uniform(512, 2, 2, 2, 2))],
    "conv_tbc": [call(normal(9, 2, 300), normal(3, 300, 5), normal(5))],
    "conv_act": [call(IMAGE, normal(6, 4, 3, 3), normal(6), [1, 1], [1, 1], [1, 1], 1, None, "relu", [])],
    "linear": [call(A, normal(4, 7), normal(4)), call(LONG, uniform(3, 4200)), call(DEEP, uniform(3, 4200), C[:3])],
    "linear_act": [call(LONG, uniform(3, 4200), C[:3], None, "silu", [])],
    "addmm": [call(C[:5], DEEP[0], DEEPER[0])],
    "addbmm": [call(normal(6, 5), DEEP[:1], DEEPER[:1])],
    "baddbmm": [call(normal(2, 6, 5), DEEP, DEEPER)],
    "addmv": [call(C[:2], LONG, LONG[0])],
    "einsum": [call("bij,bjk->bik", [DEEP, DEEPER]), call("ij,ij->i", [LONG, LONG])],
    "tensordot": [call(DEEP[0], DEEPER[0], [1], [0])],
    "scaled_dot_product_attention": [call(HEADS, HEADS.flip(2), HEADS.flip(3)), call(HEADS, HEADS, HEADS, is_causal=True)],
    "addr": [call(normal(8, 8), C, D)],
    # -- moves ----------------------------------------------------------------------------------------------------------
    "getitem": [call([X, Y], 1)],
    "quant_stub": [call(X, "site")],
    "embedding": [call(X, PICKS)],
    "unflatten": [call(X, 1, [5, 8])],
    "permute": [call(A, [2, 0, 1])],
    "unsqueeze": [call(X, 1)],
    "expand": [call(X[:1], [4, 40])],
    "broadcast_to": [call(X[:1], [4, 40])],
    "slice": [call(X, 1, 3, 30, 2)],
    "select": [call(X, 1, 3)],
    "narrow": [call(X, 1, 3, 9)],
    "vsplit": [call(X, 2)],
    "dsplit": [call(DEEP[:, :, :8], 2)],
    "unbind": [call(X, 0)],
    "index": [call(X, [PICKS]), call(X, [None, PICKS]), call(X, [MASK])],
    "index_select": [call(X, 0, PICKS)],
    "gather": [call(X, 0, INDEX)],
    "take": [call(X, PICKS)],
    "take_along_dim": [call(X, INDEX, 0)],
    "masked_select": [call(X, MASK)],
    "roll": [call(X, [3], [1])],
    "flip": [call(X, [0, 1])],
    "repeat": [call(X, [2, 3])],
    "tile": [call(X, [2, 3])],
    "repeat_interleave": [call(X, 3, 1)],
    "pixel_unshuffle": [call(IMAGE, 2), call(LAST, 2)],
    "unfold": [call(X, 1, 5, 2)],
    "im2col": [call(IMAGE, [3, 3], [1, 1], [1, 1], [2, 2])],
    "select_scatter": [call(X, Y[0], 0, 2)],
    "slice_scatter": [call(X, Y[:2], 0, 1, 3)],
    "diagonal_scatter": [call(X, Y[0, :6])],
    "max_unpool2d": [call(IMAGE[:, :, ::2, ::2].contiguous(), 2 * torch.arange(30).reshape(5, 6).expand(2, 4, 5, 6), [10, 12])],
    "max_unpool3d": [
        call(VOLUME[:, :, ::2, ::2, ::2].contiguous(), 2 * torch.arange(36).reshape(3, 4, 3).expand(1, 4, 3, 4, 3), [6, 8, 6],
             [2, 2, 2], [0, 0, 0])
    ],
    "index_copy": [call(X, 0, torch.tensor([3, 1]), Y[:2])],
    "combinations": [call(C)],
    # -- pointwise, and what writes numbers into a copy -----------------------------------------------------------------
    "prelu": [call(X, uniform(40))],
    "glu": [call(X, 1)],
    "threshold": [call(X, 0.1, 0.3), call(NEAR, 1.0, 0.3)],
    "hardshrink": [call(X), call(NEAR, 1.0)],
    "lerp": [call(X, Y, V), call(X, Y, 0.3)],
    "where": [call(MASK, X, Y), call(MASK, X, 0.3), call(MASK, -torch.inf, X)],
    "masked_fill": [call(X, MASK, 0.3), call(X, MASK, -torch.inf)],
    "index_fill": [call(X, 0, PICKS, 0.3)],
    "scatter": [call(X, 0, INDEX, Y), call(X, 0, INDEX, 0.3)],
    "diff": [call(X)],
    "kron": [call(X, C)],
    "pad_sequence": [call([ROW[:3], ROW], True, 0.3)],
    # -- comparisons and searches ---------------------------------------------------------------------------------------
    **{name: [call(X[0, 0]), call(SMALL[0, 0])] for name in "item is_nonzero Bool Float".split()},
    "Int": [call(X[0, 0]), call(torch.tensor(2.9999))],
    "isin": [call(X, Y)],
    "searchsorted": [call(ROW.sort().values, X)],
    "bucketize": [call(X, ROW.sort().values)],
    "unique_consecutive": [call(ROW), call(NEAR[0])],
    "unique_dim": [call(X, 0), call(NEAR, 0)],
    "histc": [call(X)],
    "fractional_max_pool3d": [call(1 + 1e-5 * VOLUME, [2, 2, 2], [3, 3, 3], uniform(1, 4, 3))],
    "fractional_max_pool2d": [call(1 + 1e-5 * IMAGE, [3, 3], [5, 5], uniform(2, 4, 2))],
    # -- sums -----------------------------------------------------------------------------------------------------------
    "sum_to_size": [call(LONG, [2, 1]), call(TALL, [9])],
    "trace": [call(uniform(1500, 1500))],
    "col2im": [call(uniform(1, 2 * 49, 64), [14, 14], [7, 7], [1, 1], [0, 0], [1, 1])],
    "index_add": [call(TALL[:3], 0, integers(3, 4200), TALL), call(LONG[0, :3], 0, integers(3, 4200), LONG[1])],
    "index_put": [call(TALL[:3], [integers(3, 4200)], TALL, accumulate) for accumulate in (True, False)],
    "index_reduce": [call(TALL[:3], 0, integers(3, 4200), TALL, "mean")],
    "scatter_add": [
        *(call(TALL[:3], 0, rows, TALL) for rows in (integers(3, 4200, 9), integers(3, 4200, 1).expand(-1, 9))),
        call(LONG[0, :3], 0, integers(3, 4200), LONG[1]),
    ],
    "scatter_reduce": [
        *(call(TALL[:12], 0, integers(12, 4200, 9), TALL, mode) for mode in ("sum", "mean", "mean", "mean", "amax")),
        call(NEAR_ONE[1, :3], 0, integers(3, 4200), NEAR_ONE[0], "prod"),
    ],
    "put": [call(X, integers(3, 4200), LONG[0], True)],
    "renorm": [call(LONG, 2, 0, 1.0), call(FEW, 2, 0, 1.0)],
    "cross": [call(normal(900, 3), normal(900, 3), 1)],
    "linalg_cross": [call(normal(900, 3), normal(900, 3))],
    "trapezoid": [call(LONG), call(FEW)],
    "cov": [call(LONG), call(LONG + 20)],
    "corrcoef": [call(LONG), call(LONG + 20)],
    "cross_entropy_loss": [
        *(call(3 * row[None], number[None]) for row, number in zip(FEW, integers(3, 30))),
        call(normal(4200, 40), integers(40, 4200)),
    ],
    "pdist": [call(LONG)],
    "_weight_norm": [call(LONG, uniform(2, 1)), call(uniform(3, 40, 60), uniform(3, 1, 1))],
    "bilinear": [call(normal(40, 70), normal(40, 70), normal(4, 70, 70), C[:4])],
    # -- recurrences ----------------------------------------------------------------------------------------------------
    "lstm": [call(SEQUENCE, [STATE, STATE], gates(4), True, 1, 0.0, False, False, False)],
    "lstm_cell": [call(normal(3, 8), [normal(3, 16), normal(3, 16)], *gates(4))],
    # -- made from nothing ----------------------------------------------------------------------------------------------
    **{name: [call([3, 4], dtype=torch.float32)] for name in "zeros ones empty".split()},
    **{name: [call(X)] for name in "zeros_like ones_like empty_like".split()},
    **{name: [call(X, [3, 4])] for name in "new_zeros new_ones new_empty".split()},
    "full": [call([3, 4], 0.3, dtype=torch.float32)],
    "full_like": [call(X, 0.3)],
    "new_full": [call(X, [3, 4], 0.3)],
    "scalar_tensor": [call(0.3, dtype=torch.float32)],
    "eye": [call(5, dtype=torch.float32), call(5, 7, dtype=torch.float32)],
}

SAMPLES: dict[str, list[Call]] = {name: calls for names, calls in ALIKE for name in names.split()} | ALONE
