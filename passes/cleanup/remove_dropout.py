"""Drop what does nothing outside training.

    dropout(x, p, train=False)  ->  x         (dropout, alpha_dropout, feature_dropout, feature_alpha_dropout)
"""

from ir_tools.rewrite import Rule, Value, rule_pass


def dropout(op, x: Value):
    kinds = op.dropout, op.alpha_dropout, op.feature_dropout, op.feature_alpha_dropout
    return op.one_of(*(kind(x, ..., name="drop") for kind in kinds))


def dropout_is_off(drop):
    """The dropout is in inference mode, or its probability is zero."""
    return not drop.train or drop.p == 0


def operand(x):
    return x


remove_dropout = rule_pass(
    "remove_dropout",
    [Rule("dropout(x) -> x", match=dropout, requires=(dropout_is_off,), replace=operand)],
    effects=(),
    doc=__doc__,
)
