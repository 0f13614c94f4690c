"""The table of constants: name -> tensor, which of them are state, and what finds one quickly.

One table serves all blocks of a Program. It keeps an index from storage to name and, per wanted name, the numbers that are
taken, up to date as constants come and go, so that adding one costs the same however many there are.

A draft must leave the Program that it edits as it was: a draft of a Program works on `copy()`, a draft of a body on
`child()`, which sees the table and adds to itself alone until `absorb` takes over what it added.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, MutableMapping

import torch


class ConstantTable(MutableMapping[str, torch.Tensor]):
    """Name -> detached tensor. Names are the user's parameter paths; a constant that a pass made is named `<path>@<pass>`.

    `state`: names of constants that the model itself writes into (a counter buffer).

    >>> table = ConstantTable()
    >>> table.enter("weight", torch.ones(2)), table.enter("weight", torch.zeros(2))
    ('weight', 'weight@2')
    >>> table.enter("other", table["weight"])         # the same storage is entered once
    'weight'
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]] = ()):
        self.state: frozenset[str] = frozenset()
        self._around: ConstantTable | None = None
        self._tensors: ChainMap[str, torch.Tensor] = ChainMap(dict(tensors))
        self._index: dict[tuple, str] | None = None  # made when first asked for: many drafts add no constant
        self._taken: dict[str, int] = {}

    # -- a mapping ----------------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        self._unlist(name)
        self._tensors[name] = tensor
        if self._index is not None:
            self._index[_identity(tensor)] = name

    def __delitem__(self, name: str) -> None:
        self._unlist(name)
        del self._tensors[name]
        self._taken.clear()  # a lower number may be free again

    def __repr__(self) -> str:
        return f"ConstantTable({', '.join(self)})"

    # -- adding -------------------------------------------------------------------------------------------------------

    def enter(self, name: str, tensor: torch.Tensor) -> str:
        """The name of `tensor` in the table. Equal storage is entered once; a name already taken gets a number."""
        known = self._named(_identity(tensor))
        if known is not None:
            return known
        name = self._free_name(name)
        self[name] = tensor
        return name

    def absorb(self, child: ConstantTable) -> None:
        """Take over what was added to `child`, or to its children, since it was made of this table."""
        if child is self:
            return
        if child._around is None:
            raise ValueError("the table is not one that was made of this one")
        self.absorb(child._around)
        self.update(child._tensors.maps[0])
        if child.state is not self.state:
            self.state |= child.state
        for name, count in child._taken.items():
            self._taken[name] = max(count, self._taken.get(name, 0))

    # -- copying ------------------------------------------------------------------------------------------------------

    def copy(self) -> ConstantTable:
        """A table of its own with the same tensors."""
        table = ConstantTable()
        table.state, table._tensors = self.state, self._tensors.copy()
        table._around, table._taken = self._around, dict(self._taken)
        table._index = None if self._index is None else dict(self._index)
        return table

    def child(self) -> ConstantTable:
        """A table that sees this one, and adds to itself alone."""
        table = ConstantTable()
        table.state, table._tensors = self.state, self._tensors.new_child()
        table._around = self
        return table

    # -- inside -------------------------------------------------------------------------------------------------------

    def _named(self, identity: tuple) -> str | None:
        if self._index is None:
            self._index = {_identity(t): name for name, t in self._tensors.maps[0].items()}
        found = self._index.get(identity)
        return found if found is not None or self._around is None else self._around._named(identity)

    def _unlist(self, name: str) -> None:
        tensor = self._tensors.maps[0].get(name)
        if self._index is not None and tensor is not None:
            identity = _identity(tensor)
            if self._index.get(identity) == name:
                del self._index[identity]

    def _free_name(self, name: str) -> str:
        count = self._count(name)
        return name if count == 0 else _numbered(name, count + 1)

    def _count(self, name: str) -> int:
        """How many of `name`, and of `name` with a number, are taken in a row from the first on."""
        count = max(self._taken.get(name, 0), self._around._count(name) if self._around is not None else 0)
        while _numbered(name, count + 1) in self:
            count += 1
        self._taken[name] = count
        return count


def _numbered(name: str, count: int) -> str:
    if count == 1:
        return name
    return f"{name}_{count}" if "@" in name else f"{name}@{count}"


def _identity(tensor: torch.Tensor) -> tuple:
    """Equal for two tensors that are the same view of the same storage."""
    if tensor.is_mkldnn or tensor.layout is not torch.strided or tensor.numel() == 0:
        return (id(tensor),)
    view = (tensor.data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)
    return (*view, tensor.is_conj(), tensor.is_neg())
