"""What half precision does to each op, as data: the table that `cast_half` reads.

    MATRIX     products: fast in half, and their kernels sum in float
    MOVES      hands values on, or picks some: rounding before it or behind it gives the same
    FOLLOWS    pointwise ops: as precise as their operands
    DECIDES    comparisons and searches: a rounded operand may decide otherwise, so none is rounded for them
    INSIDE     fragile ops whose half kernel computes in float and rounds its result once: norms, softmax, exp, sums
    FRAGILE    fragile ops whose half kernel rounds on the way

An op in none of these stays in float, and is reported. `NO_KERNEL`: torch 2.13 cannot run these in a half dtype on the CPU.
"""

import torch

MATRIX = frozenset(
    """conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d conv_act linear linear_act matmul mm bmm
    addmm baddbmm addbmm mv einsum scaled_dot_product_attention""".split()
)
MOVES = frozenset(
    """relu neg abs max_pool1d max_pool2d max_pool3d adaptive_max_pool2d embedding upsample_nearest2d
    reshape view flatten unflatten transpose permute t numpy_T mT squeeze unsqueeze expand slice select narrow index
    gather cat stack split split_with_sizes chunk unbind roll flip repeat tile contiguous clone movedim reflection_pad2d
    replication_pad2d pixel_shuffle pixel_unshuffle channel_shuffle dropout feature_dropout alpha_dropout quant_stub
    getitem maximum minimum""".split()
)
FOLLOWS = frozenset(
    """add sub mul div rsub relu6 hardtanh leaky_relu hardswish hardsigmoid silu sigmoid tanh gelu elu mish prelu
    clamp clamp_min clamp_max where masked_fill avg_pool1d avg_pool2d upsample_bilinear2d pad constant_pad_nd""".split()
)
DECIDES = frozenset("gt ge lt le eq ne argmax argmin topk sort argsort isnan isinf isfinite".split())
INSIDE = frozenset(
    """softmax log_softmax layer_norm batch_norm group_norm instance_norm exp expm1 log log1p log2 log10 pow rsqrt sqrt
    reciprocal sum mean softplus erf adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d""".split()
)
FRAGILE = frozenset(
    """rms_norm var std norm linalg_vector_norm cumsum cumprod prod logsumexp cosine_similarity normalize""".split()
)
NO_KERNEL: dict[torch.dtype, frozenset[str]] = {
    torch.bfloat16: frozenset("avg_pool3d cdist".split()),
    torch.float16: frozenset("avg_pool3d cdist".split()),
}
PERIODIC = frozenset("sin cos tan floor ceil round trunc frac remainder fmod".split())
