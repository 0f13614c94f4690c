"""The IR: one `Program` for every front end, in a folder that imports none of its siblings."""

from ir_tools.ir.constant_table import ConstantTable
from ir_tools.ir.edit import Draft
from ir_tools.ir.program import Block, Program
from ir_tools.ir.provenance import Provenance, Record
from ir_tools.ir.shape_inference import FactError
from ir_tools.ir.signature import InputSpec, Signature
from ir_tools.ir.wellformed import IllFormedError, check_wellformed

__all__ = [
    "Block",
    "ConstantTable",
    "Draft",
    "FactError",
    "IllFormedError",
    "InputSpec",
    "Program",
    "Provenance",
    "Record",
    "Signature",
    "check_wellformed",
]
