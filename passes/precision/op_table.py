"""What half precision does to each op, as data: the table of `cast_half`, by the op's name.

    MATRIX        products: fast in half, and their kernels sum in float
    MOVES         move or select values: op(round(x)) equals round(op(x)) exactly
    FOLLOWS       pointwise ops: as precise as their operands
    DECIDES       comparisons, searches and steps: a rounded operand may decide otherwise, so none is rounded for them
    INSIDE        fragile ops whose half kernel computes in float and rounds its result: norms, softmax, exp, sums
    FRAGILE       fragile ops whose half kernel rounds intermediate results
    CONSTRUCTORS  tensors of given numbers: made in half they equal those made in float and rounded
    PERIODIC      sines and roundings: the fraction of their operand decides
    STAYS_FLOAT   half is wrong or useless, by reason
    CASTS         the model's own changes of dtype
    NO_FLOATS     read the shape of a tensor alone

An op in none of these stays in float, and is reported; so does one that writes in place. `NO_KERNEL`: torch 2.13 cannot run
these in a half dtype on the CPU. tests/passes/precision/test_op_table.py measures the claims of every entry on the CPU's
kernels, in bfloat16 and float16, and holds the table against the ops of the zoo. In what follows an ulp is the distance to the
next number of the half dtype; a result that is rounded once is within half an ulp.
"""

import torch

# Rounded once, summed in float, but for these. A transposed convolution in float16, on a CPU whose oneDNN has no float16
# (in bfloat16 it has kernels of its own), adds its overlapping products in half: off by 0.9 ulp of the largest result for a
# kernel of 4 x 4 with stride 2, by 5.8 for one of 9 x 9 with stride 1, by 9.7 for one of 200 in 1d. Attention rounds its
# weights: 0.6 ulp of the largest result.
MATRIX = frozenset(
    """conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d conv_act conv_tbc linear linear_act matmul mm bmm
    addmm baddbmm addbmm mv addmv dot vdot inner tensordot einsum linalg_matmul linalg_vecdot
    scaled_dot_product_attention""".split()
)
# The pools that give indices with their values are in DECIDES: of two numbers that round to one, the other may be found.
# A dropout moves because it is off in inference. `relu6` clamps to 0 and 6, which every half dtype has.
MOVES = frozenset(
    """relu relu6 neg negative abs absolute positive copysign maximum minimum fmax fmin amax amin aminmax msort
    max_pool1d max_pool2d max_pool3d max_unpool2d max_unpool3d
    embedding index index_select gather take take_along_dim masked_select select slice narrow getitem
    upsample_nearest1d upsample_nearest2d upsample_nearest3d
    _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
    reshape reshape_as view view_as _unsafe_view flatten ravel unflatten squeeze unsqueeze
    transpose swapaxes swapdims permute movedim moveaxis t numpy_T mT mH matrix_H adjoint
    expand expand_as broadcast_to broadcast_tensors meshgrid atleast_1d atleast_2d atleast_3d
    cat concat concatenate stack hstack vstack dstack column_stack row_stack block_diag cartesian_prod combinations
    split split_with_sizes chunk tensor_split hsplit vsplit dsplit unbind
    unsafe_split unsafe_split_with_sizes unsafe_chunk
    roll flip fliplr flipud rot90 repeat repeat_interleave tile unfold im2col tril triu diag diagonal diag_embed diagflat
    select_scatter slice_scatter diagonal_scatter masked_scatter index_copy copy
    reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d
    pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle
    contiguous clone alias detach lift_fresh conj_physical
    dropout feature_dropout alpha_dropout feature_alpha_dropout quant_stub""".split()
)
# A number that is added or subtracted is rounded to half first: 0.3 becomes 0.30078 in bfloat16, and x + 0.3 is off by up to
# 0.4 ulp of that. A number that multiplies is not rounded. A clamp, and what writes a number into a copy (where, masked_fill,
# pad, ...), round that number and nothing else, and so move numbers exactly, as long as it lies in the range of the dtype.
# Average pools sum in float and round once, over windows of 4900 too. Interpolation rounds once in 2d; linear in 1d and
# 3d, and bicubic, are off by up to 1.1 ulp of the largest number.
FOLLOWS = frozenset(
    """add sub subtract rsub mul multiply div divide true_divide addcmul addcdiv addr outer ger kron lerp diff hypot
    hardtanh leaky_relu rrelu prelu hardswish hardsigmoid silu sigmoid special_expit tanh gelu elu celu selu mish glu softshrink
    atan arctan atan2 arctan2 asinh arcsinh deg2rad rad2deg nan_to_num
    clamp clip clamp_min clamp_max where masked_fill index_fill fill scatter pad constant_pad_nd pad_sequence
    avg_pool1d avg_pool2d avg_pool3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d
    _upsample_bilinear2d_aa _upsample_bicubic2d_aa""".split()
)
# `max`, `min`, `sort`, `topk` and the like give values too, which move exactly; which of two equal ones is found does not.
# `sign` and its kin step at 0, where float16 rounds numbers below 3e-8; those from `item` on return a number to Python.
DECIDES = frozenset(
    """gt ge lt le eq ne greater greater_equal less less_equal not_equal isclose allclose equal isin
    isnan isinf isfinite isposinf isneginf isreal signbit sign sgn heaviside hardshrink threshold
    logical_not logical_and logical_or logical_xor any all nonzero argwhere count_nonzero
    max min argmax argmin topk kthvalue sort argsort median nanmedian mode cummax cummin
    max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices
    adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d fractional_max_pool2d fractional_max_pool3d
    searchsorted bucketize histc unique_consecutive unique_dim item is_nonzero Bool Int Float""".split()
)
# Within half an ulp, but for: softmax over an axis that does not lie last (1.3 ulp: it stores its exponentials); rsqrt and
# pow (1 ulp), the losses and distances (1), xlogy (1.3), renorm (1.2), mvlgamma (1.4): two roundings are within 1.5 ulp.
# (group_norm's float32 kernel for channels_last subtracts squares: where the mean is far from 0 it is itself less exact.)
INSIDE = frozenset(
    """softmax special_softmax _safe_softmax layer_norm batch_norm group_norm rms_norm
    sum sum_to_size mean nansum trace var std var_mean std_mean norm linalg_vector_norm linalg_norm frobenius_norm _weight_norm
    cumsum cumprod logcumsumexp scatter_add renorm dist pairwise_distance
    l1_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits
    adaptive_avg_pool1d adaptive_avg_pool2d
    exp exp2 expm1 log log1p log2 log10 pow square sqrt rsqrt reciprocal ldexp xlogy special_xlogy logaddexp logaddexp2
    special_exp2 special_expm1 special_log1p special_erf special_erfc special_erfinv
    softplus log_sigmoid erf erfc erfinv lgamma mvlgamma digamma polygamma igamma igammac i0 sinh cosh
    special_gammaln special_multigammaln special_digamma special_psi special_polygamma special_gammainc special_gammaincc
    special_i0 special_i1 special_i1e special_entr special_xlog1py
    asin arcsin acos arccos acosh arccosh atanh arctanh""".split()
)
# How far off they were, about, in ulp (bfloat16, float16), and why:
#   prod                   178, 285    multiplies in half
#   index_reduce           164, 17     these four add in half, one row after another; but index_add sums rows of a matrix in
#   index_put, put         120, 11     float, and index_put moves numbers exactly where it does not accumulate
#   index_add              111, 9
#   adaptive_avg_pool3d    103, 16     sums in half; mean over the last three axes is the same for one output, rounded once
#   instance_norm          4, 25       (of the largest result) rounds the mean: the further from 0 it lies, the worse;
#                                      group_norm with a group for each channel is the same, rounded once
#   log_softmax            3.1, 2.7    (0.8, 0.7 of the largest) rounds the logarithm of the sum
#   col2im                 3.7, 3.4    adds overlapping blocks in half
#   scatter_reduce, embedding_bag      1.9, 1.8: round sum, count and quotient of a mean; their sums are rounded once
#   logsumexp, cosine_similarity, cross_entropy_loss, kl_div, logit, cov ...   several ops, each of which rounds: near 0 nothing
#                                      is left; and in float16 the sums of nanmean, nll_loss and cov overflow, and the
#                                      squares of mse_loss
#   lstm, gru, rnn         2.8, 3.2    (of the largest, after 200 steps) each step rounds the state
FRAGILE = frozenset(
    """log_softmax special_log_softmax instance_norm adaptive_avg_pool3d prod logsumexp special_logsumexp nanmean
    cosine_similarity cdist pdist cov corrcoef trapezoid cross linalg_cross bilinear
    index_add index_put index_reduce put scatter_reduce col2im logit special_logit
    special_ndtr special_i0e special_erfcx special_log_ndtr special_ndtri
    mse_loss kl_div cross_entropy_loss nll_loss nll_loss_nd
    lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell""".split()
)
CONSTRUCTORS = frozenset(
    """zeros ones full empty eye scalar_tensor zeros_like ones_like full_like empty_like
    new_zeros new_ones new_full new_empty""".split()
)
PERIODIC = frozenset(
    """sin cos tan sinc special_sinc floor ceil round special_round trunc fix frac remainder fmod floor_divide""".split()
)
STAYS_FLOAT: dict[str, frozenset[str]] = {
    "it takes complex numbers, for which torch has next to no kernels in half precision": frozenset(
        """complex polar real imag angle conj resolve_conj resolve_neg view_as_real view_as_complex stft istft
        fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2
        fft_fftn fft_ifftn fft_rfftn fft_irfftn fft_fftshift fft_ifftshift fft_fftfreq fft_rfftfreq""".split()
    ),
    "torch has no kernel of half precision for it, on any device": frozenset(
        """linalg_inv inverse linalg_pinv pinverse linalg_solve linalg_solve_triangular triangular_solve linalg_lstsq
        linalg_cholesky cholesky linalg_qr qr linalg_svd svd linalg_eig linalg_eigh linalg_eigvals linalg_eigvalsh
        linalg_det det linalg_slogdet slogdet logdet linalg_matrix_exp matrix_exp linalg_matrix_power matrix_power
        linalg_matrix_norm quantile nanquantile""".split()
    ),
    "it computes or reads positions, and half precision has too few digits for those of pixels and tokens": frozenset(
        """arange linspace logspace grid_sampler grid_sampler_2d grid_sampler_3d affine_grid_generator
        roi_align nms deform_conv2d""".split()
    ),
    "in another dtype it draws other random numbers": frozenset(
        """rand randn randint randperm rand_like randn_like randint_like normal bernoulli multinomial poisson
        native_dropout""".split()
    ),
    "it reads memory by strides, which a cast may change": frozenset("as_strided".split()),
    "it is a training loss of several steps, each of which would round": frozenset(
        """cosine_embedding_loss ctc_loss hinge_embedding_loss margin_ranking_loss multi_margin_loss multilabel_margin_loss
        poisson_nll_loss soft_margin_loss triplet_margin_loss""".split()
    ),
    "it computes in float64": frozenset("float_power".split()),
    "its other results have other sizes in half precision": frozenset("embedding_bag".split()),
}
CASTS = frozenset("to type_as _to_copy".split())
NO_FLOATS = frozenset(
    """size dim numel len stride sym_size sym_numel sym_stride sym_storage_offset is_floating_point is_complex""".split()
)
_NO_KERNEL_IN_EITHER = frozenset(
    """avg_pool3d cdist pdist _upsample_bilinear2d_aa _upsample_bicubic2d_aa
    special_erfcx special_log_ndtr special_ndtri""".split()
)
NO_KERNEL: dict[torch.dtype, frozenset[str]] = {
    torch.bfloat16: _NO_KERNEL_IN_EITHER,
    torch.float16: _NO_KERNEL_IN_EITHER,
}
FLOAT_PARAMETERS = {"batch_norm": ("weight", "bias", "running_mean", "running_var")}
"""Operands that stay float beside a half input, on the CPU and on CUDA: that is more exact, and costs nothing."""

NAMED = frozenset().union(
    MATRIX, MOVES, FOLLOWS, DECIDES, INSIDE, FRAGILE, CONSTRUCTORS, PERIODIC, *STAYS_FLOAT.values(), CASTS, NO_FLOATS
)
"""Every op of the table."""
