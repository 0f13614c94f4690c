"""torch.compile, imported only when it is asked for."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any


def forget_compiled_code() -> None:
    """Drop all that torch.compile and torch.export keep between calls."""
    import torch._dynamo

    torch._dynamo.reset()


def freezing() -> AbstractContextManager[Any]:
    """A context in which torch.compile takes parameters for constants."""
    import torch._inductor.config as config

    return config.patch(freezing=True)  # type: ignore[attr-defined, no-any-return]
