"""Drop what does nothing outside training.

    dropout(x, p, train=False)  ->  x         (dropout, alpha_dropout, feature_dropout, feature_alpha_dropout)
"""

from ir_tools.rewrite import Rule, Value, rule_pass


def dropout(op, x: Value):
    return op.dropout(x, ..., name="drop")


def alpha_dropout(op, x: Value):
    return op.alpha_dropout(x, ..., name="drop")


def feature_dropout(op, x: Value):
    return op.feature_dropout(x, ..., name="drop")


def feature_alpha_dropout(op, x: Value):
    return op.feature_alpha_dropout(x, ..., name="drop")


def dropout_is_off(drop):
    """The dropout is in inference mode, or its probability is zero."""
    return not drop.train or drop.p == 0


def operand(x):
    return x


remove_dropout = rule_pass(
    "remove_dropout",
    [
        Rule(f"{match.__name__}(x) -> x", match=match, requires=(dropout_is_off,), replace=operand)
        for match in (dropout, alpha_dropout, feature_dropout, feature_alpha_dropout)
    ],
    declares="exact",
    doc=__doc__,
)
