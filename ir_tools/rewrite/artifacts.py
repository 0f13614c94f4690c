"""Artifacts: what a pass is given beside its Program, and what it gives beside the new one. Their classes are its signature.

    def cast_half(program: Block, log: RewriteLog, ranges: Ranges, *, dtype=...) -> tuple[Block, Casts]

            needs  {Ranges}     parameters between the log and the options
            gives  (Casts,)     what the function returns behind the Program; `Casts | None` where it may have none to give

Any class will do. `Kind()` is the empty artifact, for a pass that is called without one; a class that cannot be made so is an
error then. `a + b` is what the bodies of regions gave together, and what was needed and given. An artifact that a pass fills,
like a table, may be given back as it is: the same object is not added.

In a compilation, what a pass gives goes to all later passes that need the class, instead of what earlier passes gave. A pass
that adds to it needs and gives it.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, overload

from ir_tools.errors import PassesError

A = TypeVar("A")


class PassSignatureError(PassesError, TypeError):
    """A pass whose signature does not say what it needs or gives, or which gives something else than it says."""


class Artifacts:
    """Artifacts, one of each class.

    >>> artifacts = Artifacts(["x"])
    >>> artifacts.give(["y"])
    >>> artifacts[list], artifacts.get(dict)
    (['x', 'y'], None)
    """

    def __init__(self, *artifacts: Any):
        self._by_class = {type(artifact): artifact for artifact in artifacts}

    def __getitem__(self, kind: type[A]) -> A:
        """The artifact of a class. Raises `KeyError` where there is none."""
        if kind not in self._by_class:
            have = ", ".join(other.__name__ for other in self._by_class) or "none"
            raise KeyError(f"there is no artifact {kind.__name__}; there are: {have}")
        return self._by_class[kind]  # type: ignore[no-any-return]

    @overload
    def get(self, kind: type[A]) -> A | None: ...

    @overload
    def get(self, kind: type[A], otherwise: A) -> A: ...

    def get(self, kind: type[A], otherwise: A | None = None) -> A | None:
        """The artifact of a class, or what is given for the case that there is none."""
        return self._by_class.get(kind, otherwise)

    def put(self, artifact: Any) -> None:
        """Enter an artifact in place of another one of its class."""
        self._by_class[type(artifact)] = artifact

    def give(self, artifact: Any) -> None:
        """Add an artifact to the one of its class, if there is one. Raises `PassSignatureError` where the class has no sum."""
        kind = type(artifact)
        have = self._by_class.get(kind)
        if have is not None and have is not artifact:
            if not hasattr(kind, "__add__"):
                raise PassSignatureError(
                    f"there are two artifacts {kind.__name__}, of the blocks of a Program or needed and given, and no sum "
                    f"of them: give {kind.__name__} a method __add__"
                )
            artifact = have + artifact
        self._by_class[kind] = artifact

    def __contains__(self, kind: object) -> bool:
        return kind in self._by_class

    def __iter__(self) -> Iterator[Any]:
        return iter(self._by_class.values())


@dataclass(frozen=True)
class PassSignature:
    """The classes of artifacts that a pass needs, in the order of its parameters, and of those that it gives."""

    needs: tuple[type, ...]
    gives: tuple[type, ...]

    def inputs(self, name: str, artifacts: Artifacts) -> list[Any]:
        """What the pass `name` is called with: the artifacts that there are, empty ones for the others.

        Raises `PassSignatureError` for a class that has no empty artifact.
        """
        return [artifacts.get(kind) if kind in artifacts else _empty(name, kind) for kind in self.needs]

    def check(self, name: str, given: tuple[Any, ...]) -> None:
        """Raise `PassSignatureError` unless `given` is what the pass `name` says that it gives."""
        for artifact in given:
            if artifact is not None and type(artifact) not in self.gives:
                kind = type(artifact).__name__
                raise PassSignatureError(
                    f"the pass {name} gives {kind}, which its signature does not say: it returns tuple[Block, {kind}]"
                )
        if len(given) != len(self.gives):
            wanted = ", ".join(kind.__name__ for kind in self.gives)
            raise PassSignatureError(
                f"the pass {name} returns {len(given)} artifacts beside the Program, where its signature says {wanted}"
            )


def _empty(name: str, kind: type) -> Any:
    try:
        return kind()
    except TypeError as error:
        raise PassSignatureError(
            f"the pass {name} needs {kind.__name__}, it was given none, and {kind.__name__}() is none either: {error}"
        ) from error


@functools.lru_cache(maxsize=1024)
def pass_signature(function: Callable[..., Any]) -> PassSignature:
    """Read the signature of a pass. Raises `PassSignatureError` where an annotation is missing, unknown or no class.

    >>> def counts(program, log, ranges: dict, *, limit=3) -> tuple[object, set]: ...
    >>> pass_signature(counts)
    PassSignature(needs=(<class 'dict'>,), gives=(<class 'set'>,))
    """
    signature = inspect.signature(function)
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in signature.parameters.values() if p.kind in positional][2:]
    names = _names_known_to(function)
    try:
        result = _resolved(function, "result", signature.return_annotation, names)
    except PassSignatureError:
        if "tuple" in str(signature.return_annotation).lower():
            raise
        result = None  # a Program, by a name that is imported for type checkers alone
    given = typing.get_args(result)[1:] if typing.get_origin(result) is tuple else ()
    return PassSignature(
        tuple(_class_of(function, f"parameter {p.name}", p.annotation, names) for p in needed),
        tuple(_class_of(function, "result", part, names) for part in given),
    )


def _names_known_to(function: Callable[..., Any]) -> dict[str, Any]:
    """The names that the annotations of a function may use: of its module, and of the functions around it that it uses."""
    inner: Any = inspect.unwrap(function)
    while isinstance(inner, functools.partial):
        inner = inspect.unwrap(inner.func)
    if not hasattr(inner, "__code__") and not hasattr(inner, "__func__"):
        inner = type(inner).__call__  # an object that is called
    inner = getattr(inner, "__func__", inner)
    if not inspect.isfunction(inner):
        return vars(builtins)
    return {**vars(builtins), **inner.__globals__, **_values_around(inner)}


def _values_around(function: Any) -> dict[str, Any]:
    """What a function uses of those around it; without a name that is not bound yet, such as its own while it is decorated."""
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        with contextlib.suppress(ValueError):
            found[name] = cell.cell_contents
    return found


def _resolved(function: Callable[..., Any], what: str, hint: Any, names: dict[str, Any]) -> Any:
    """An annotation as an object: text is read, an alias followed, `Annotated` taken off."""
    if isinstance(hint, typing.ForwardRef):
        hint = hint.__forward_arg__
    if isinstance(hint, str):
        try:
            hint = eval(hint, dict(names))
        except Exception as error:
            raise PassSignatureError(
                f"the {what} of the pass {_name(function)} is annotated {hint!r}, which cannot be read ({error}): "
                "import or define it in the module of the pass, outside of functions and of TYPE_CHECKING"
            ) from error
        return _resolved(function, what, hint, names)
    if typing.get_origin(hint) is typing.Annotated:
        return _resolved(function, what, typing.get_args(hint)[0], names)
    if type(hint).__name__ == "TypeAliasType":  # `type Result = ...`, of Python 3.12
        return _resolved(function, what, hint.__value__, names)
    return hint


def _class_of(function: Callable[..., Any], what: str, hint: Any, names: dict[str, Any]) -> type:
    """The class of an artifact, out of `Kind` or `Kind | None`."""
    hint = _resolved(function, what, None if hint is inspect.Parameter.empty else hint, names)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = [part for part in typing.get_args(hint) if part is not type(None)]
        hint = _resolved(function, what, parts[0], names) if len(parts) == 1 else hint
    if not isinstance(hint, type):
        raise PassSignatureError(
            f"the {what} of the pass {_name(function)} needs the class of an artifact as its annotation, got {hint!r}: "
            "a pass is (program, log, artifacts of a class each, *, options)"
        )
    return hint


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)
