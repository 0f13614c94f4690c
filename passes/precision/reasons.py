"""Why ops stay in float, in sentences, and which of these sentences the printed report leaves out."""

# -- the numbers of an op (hazards.py) ----------------------------------------------------------------------------------

IS_WIDE = "a number in it exceeds the range of half precision; its result is clamped where it is cast"
READS_WIDE = "an operand may exceed the range of half precision"
IS_TINY = "it keeps values from zero or one by a number that half precision loses"
READS_TINY = "an operand is kept from zero or one by a number that half precision loses"
CONSTANT_LOST = "a constant operand is so small that half precision loses it"
READS_INTEGERS = "it computes with integers that half precision may not represent"
VALUE_CLAMPED = "a mask computed from it may exceed the range of half precision; it is clamped where it is cast"
CLAMPED = "a constant operand exceeds the range of half precision; it is clamped to that range"

# -- what was seen on data (unfit.py) -----------------------------------------------------------------------------------

OVERFLOWS = "on the example data its result exceeds the range of half precision, or nearly does"
LOSES = "on the example data its result is so small that half precision loses it"
READS_UNFIT = "on the example data an operand does not fit into half precision"
SOURCE_UNFIT = "on the example data a part of its result does not fit into half precision"
CANCELS = "on the example data it is a small difference of larger numbers that half precision cannot distinguish"

NOT_RUN = "its branch or loop was not run on the example data, so its ranges are unknown"

# -- what needs every digit (guards.py) ---------------------------------------------------------------------------------

IS_A_PHASE = "a sine, cosine or rounding is computed from it, for which half precision has too few digits after the point"
IS_GUARDED = "a later bound or difference needs more digits than half precision has"

# -- what is no arithmetic in float32 (eligibility.py) ------------------------------------------------------------------

IS_CONTROL_FLOW = "operands and results of branches and loops stay float"
IS_WRITTEN = "its operands or result are written in place"
IS_UNKNOWN = "unknown: the dtype of a value that comes out of a list or dict"
IS_A_CAST = "it casts to the dtype of another value"
HAS_FLOAT64 = "an operand or the result is float64"
HAS_OTHERS = "an operand or the result is complex, or of another half dtype"
IS_READ_WHOLE = "its results are used as one list"
MADE_IN_FLOAT = "its result is float, and none of its operands is"

# -- options, and the op table (constraints.py) -------------------------------------------------------------------------

KEEPS_FLOAT = "the model switches autocast off around it"
IS_KEPT = "the options keep it in float"
IS_SKIPPED = "this site is skipped"
FOLLOWS_FLOAT = "an operand is float, and at O1 the op follows its operands"
IS_FRAGILE = "norms, softmax, exponentials and long sums lose too many digits in half precision"
DECIDED = "it compares float values, or values with a number that half precision would round"
LACKS_A_KERNEL = "torch has no kernel for it in half precision on the CPU"
IS_RANDOM = "in another dtype it draws other random numbers"

EXPECTED = frozenset(
    (FOLLOWS_FLOAT, IS_FRAGILE, IS_A_CAST, READS_WIDE, READS_TINY, IS_A_PHASE, IS_GUARDED, DECIDED, KEEPS_FLOAT, MADE_IN_FLOAT,
     IS_CONTROL_FLOW, IS_SKIPPED)
)  # fmt: skip
"""Reasons that hold for whole kinds of ops by design: `explain` lists them, the printed report does not."""
