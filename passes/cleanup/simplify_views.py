"""Join permutations in a row into one, and reshapes in a row into one, or into nothing.

    permute(permute(x, a), b)  ->  permute(x, c)  or  x            c[i] = a[b[i]]
    permute(x, 0 1 2 ...)      ->  x
    reshape(reshape(x))        ->  reshape(x)  or  x
    reshape(x, its shape)      ->  x

permute: also transpose, t, mT, numpy_T, movedim.   reshape: also flatten, unflatten, squeeze, unsqueeze.

What a reshape gives may lie in memory otherwise than what it is given; where the joined one would, it is refused.
"""

import math

from ir_tools.rewrite import Rule, Value, rule_pass


def permutations(op, x: Value):
    return op.permutation(op.permutation(x, ..., name="first"), ..., name="second")


def permutation(op, x: Value):
    return op.permutation(x, ..., name="y")


def reshapings(op, x: Value):
    return op.reshaping(op.reshaping(x, ..., name="first"), ..., name="second")


def reshaping(op, x: Value):
    return op.reshaping(x, ..., name="y")


def axes_are_known(first, second):
    """Where each axis goes is known now."""
    return None not in (first.axis_order, second.axis_order)


def axes_stay(y):
    """No axis moves."""
    return y.axis_order == sorted(y.axis_order) if y.axis_order is not None else None


def shape_stays(x, y):
    """The result has the shape of the operand."""
    return x.shape is not None and x.shape == y.shape


def joined_permutation(op, x, first, second):
    order = [first.axis_order[axis] for axis in second.axis_order]
    return x if order == sorted(order) else op.permute(x, order)


def joined_reshaping(op, x, second):
    if second.shape is None or x.shape == second.shape:
        return x
    sizes = [size if isinstance(size, int) else -1 for size in second.shape]
    if sizes.count(-1) > 1 or (-1 in sizes and not math.prod(sizes)):
        return op.decline("more than one size of the result is dynamic")
    return op.reshape(x, sizes)


def operand(x):
    return x


simplify_views = rule_pass(
    "simplify_views",
    [
        Rule("permute(permute(x)) -> permute(x)", match=permutations, when=(axes_are_known,), replace=joined_permutation),
        Rule("permute(x) -> x", match=permutation, when=(axes_stay,), replace=operand),
        Rule("reshape(x) -> x", match=reshaping, when=(shape_stays,), replace=operand,
             takes_runtime_numbers=True),
        Rule("reshape(reshape(x)) -> reshape(x)", match=reshapings, replace=joined_reshaping,
             takes_runtime_numbers=True),
    ],
    effects=(),
    doc=__doc__,
)
