"""Names of local variables in emitted text."""

from __future__ import annotations

import keyword
import re

# Names that stand for something else in emitted text, or in the text that torch writes into a file: a variable of that
# name would hide it.
_SPOKEN_FOR = {
    *("self", "torch", "number", "Tensor", "List", "Tuple", "Dict", "Optional", "Device"),
    *("int", "float", "bool", "str", "complex", "len", "sorted", "ord", "getattr", "RuntimeError"),
    *("annotate", "uninitialized", "unchecked_cast", "NoneType", "Ellipsis"),
    *keyword.kwlist,
}


class LocalNames:
    """Gives each variable a legal name of its own, as near as can be to the one wanted."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._taken

    def fresh(self, wanted: str) -> str:
        """`batch['mask']` becomes `batch_mask`; a name already given gets a number."""
        base = wanted
        if not (wanted.isidentifier() and wanted.isascii()):
            base = re.sub(r"[^0-9A-Za-z_]+", "_", wanted).strip("_") or "value"
        if base[0].isdigit():
            base = f"_{base}"
        if base in _SPOKEN_FOR:
            base = f"{base}_"
        name, count = base, 1
        while name in self._taken:
            count += 1
            name = f"{base}_{count}"
        self._taken.add(name)
        return name
