"""Replace the dialect's own ops by the plain ATen ops they stand for.

    conv_act(x, w, b, residual, act)      ->  act(conv(x, w, b) + residual)
    linear_act(x, w, b, residual, act)    ->  act(linear(x, w, b) + residual)
    quant_stub(x)                         ->  x
"""

from ir_tools.rewrite import table_pass
from ir_tools.rewrite.decompositions import DECOMPOSITIONS

lower_aten = table_pass("lower_aten", DECOMPOSITIONS, effects=(), doc=__doc__)
