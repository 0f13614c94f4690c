"""Lower convolutions and linears to oneDNN's fused kernels, with weights packed when the file is loaded.

    conv_act(x, w, b, act)               ->  mkldnn::_convolution_pointwise(x, pack(w), b, act)
    conv_act(x, w, b, r, act in {, relu})->  mkldnn::_convolution_pointwise.binary(x, r, pack(w), b, "add", act)
    linear_act(x, w, b, act)             ->  mkldnn::_linear_pointwise(x, pack(w), b, act)
    linear_act(x, w, b, r)               ->  mkldnn::_linear_pointwise.binary(x, r, pack(w), b, "add")
    conv2d, conv3d, linear               ->  the same without activation
    attention that fuse_attention fused  ->  scaled_dot_product_attention(q, k, v, mask, scale)
    mean(x, (2, 3)), adaptive_avg_pool2d(x, 1)  ->  avg_pool2d(x, (height, width))
    everything else of the dialect       ->  as in lower_aten

Which variant of a kernel (`passes/lower/variants`) is fastest is measured. By default layers and attention are fused, and means
stay. Where it is faster, residual and activation stay apart from the packed kernel, or all is left to ATen; attention is taken
apart again; means over pixels are pooled. `records` replays the tuning records of an earlier run; `variant=fused` takes the
defaults and measures nothing.

A sum with a residual that has no later user is written into the residual's memory. A packed convolution returns channels-last
results, and the ops between convolutions keep that layout, so it holds throughout; in a graph that writes in place or draws at
random, results are put back into the layout they had. oneDNN's fused relu and hardtanh return a number for NaN, where ATen
returns NaN.
"""

from passes.lower.lowering import lowering_pass
from passes.lower.targets import ONEDNN

lower_onednn = lowering_pass(ONEDNN, __doc__, renamed={"choose": "variant", "choices": "records"})
