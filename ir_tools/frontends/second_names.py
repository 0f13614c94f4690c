"""ATen's second names: `multiply` is `mul`, `concat` is `cat`, `arccos` is `acos`. A Program knows the first one only."""

from __future__ import annotations

import functools

import torch
from torch._ops import OpOverload

from ir_tools.ir.dialect import short_name

aten = torch.ops.aten

# ATen's second names, which TorchScript reads as the first (torch/csrc/jit/passes/normalize_ops.cpp). With a "_" behind
# both it is the op in place.
SECOND_NAMES: dict[str, str] = dict(
    pair.split("=")
    for pair in """absolute=abs adjoint=mH arccos=acos arccosh=acosh arcsin=asin arcsinh=asinh arctan=atan arctan2=atan2
    arctanh=atanh clip=clamp concat=cat concatenate=cat det=linalg_det divide=div fix=trunc ger=outer greater=gt
    greater_equal=ge inverse=linalg_inv less=lt less_equal=le linalg_matmul=matmul matrix_exp=linalg_matrix_exp
    matrix_power=linalg_matrix_power moveaxis=movedim multiply=mul negative=neg not_equal=ne
    orgqr=linalg_householder_product row_stack=vstack special_digamma=digamma special_erf=erf special_erfc=erfc
    special_erfinv=erfinv special_exp2=exp2 special_expit=sigmoid special_expm1=expm1 special_gammainc=igamma
    special_gammaincc=igammac special_gammaln=lgamma special_i0=i0 special_log1p=log1p special_log_softmax=log_softmax
    special_logit=logit special_logsumexp=logsumexp special_multigammaln=mvlgamma special_polygamma=polygamma
    special_psi=digamma special_round=round special_sinc=sinc special_softmax=softmax special_xlogy=xlogy subtract=sub
    swapaxes=transpose swapdims=transpose true_divide=div""".split()
)


@functools.cache
def usual_name(target: OpOverload) -> OpOverload:
    """`mul.Tensor` for `multiply.Tensor`; an op without a second name is itself."""
    name = short_name(target)
    in_place = "_" if name.endswith("_") else ""
    usual = SECOND_NAMES.get(name.removesuffix("_"))
    if target.namespace != "aten" or usual is None:
        return target
    packet = getattr(aten, usual + in_place, None)
    overloads = [getattr(packet, overload) for overload in packet.overloads()] if packet is not None else []
    return next((overload for overload in overloads if _takes_what(target, overload)), target)


def _takes_what(second: OpOverload, usual: OpOverload) -> bool:
    """Any call of `second` is one of `usual`: arguments of the same kinds, under the same names where they go by name."""
    ours, theirs = usual._schema.arguments, second._schema.arguments
    return len(ours) == len(theirs) and all(
        str(a.type) == str(b.type) and (a.name == b.name if b.kwarg_only else not a.kwarg_only)
        for a, b in zip(ours, theirs, strict=True)
    )
