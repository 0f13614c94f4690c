"""Replace the dialect's own ops by the plain ATen ops they stand for.

    conv_act(x, w, b, residual, act)      ->  act(conv(x, w, b) + residual)
    linear_act(x, w, b, residual, act)    ->  act(linear(x, w, b) + residual)
    quant_stub(x)                         ->  x
"""

from passes.lower.lowering import lowering_pass
from passes.lower.targets import ATEN

lower_aten = lowering_pass(ATEN, __doc__)
