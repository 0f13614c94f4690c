"""The three shapes of a pass. A pass file's first import shows which one it is.

    rule_pass    many nodes to one: a tuple of `Rule`s
    table_pass   one node to few: a table from op to function, everything else left alone
    graph_pass   a function of the whole graph
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch
from torch import fx

from ir_tools.deprecation import warn_renamed
from ir_tools.errors import OptionError
from ir_tools.ir import Block, Draft
from ir_tools.ir.provenance import location, record, stand_for
from ir_tools.ir.regions import is_region
from ir_tools.rewrite.apply import apply_rules
from ir_tools.rewrite.artifacts import Artifacts, pass_signature
from ir_tools.rewrite.build import Ops, Shared
from ir_tools.rewrite.numeric_effects import NumericEffect, NumericEffects, declaration, declared, numeric_effects
from ir_tools.rewrite.rewrite_log import RewriteLog
from ir_tools.rewrite.rule import Call, Rule

B = TypeVar("B", bound=Block)


@dataclass(frozen=True)
class Pass:
    """A function `Block -> Block`. It returns the very object that it was given when it changes nothing.

    `name` equals its file and its test; `effects` are what it may do to numbers; `given` are options set by the user;
    `rules` are those of a pass made of rules; `renamed` maps the old names of options, which users may still give, to the new;
    `target` is what a lowering lowers to, None for any other pass; `reads_log_ranges`: it declared "lower_precision", when
    ranges were in the log, for one more release.
    """

    name: str
    function: Callable[..., Any]
    effects: NumericEffects
    doc: str = ""
    given: Mapping[str, Any] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    target: Any = field(default=None, repr=False, compare=False)
    reads_log_ranges: bool = False

    def __post_init__(self) -> None:
        old = isinstance(self.effects, str)  # what was `declares`
        object.__setattr__(self, "reads_log_ranges", self.reads_log_ranges or str(self.effects) == "lower_precision")
        object.__setattr__(self, "effects", declared(str(self.effects)) if old else numeric_effects(self.effects))

    def __call__(
        self,
        program: B,
        *,
        skip: Iterable[str] = (),
        log: RewriteLog | None = None,
        artifacts: Artifacts | None = None,
        journal: RewriteLog | None = None,
    ) -> B:
        """Run the pass; sites whose id is in `skip` are left alone; rewrites and refusals are written into `log`.

        What the pass `needs` it takes from `artifacts`, or takes an empty one; what it `gives` is added to them.
        """
        if journal is not None:
            if log is not None:
                raise OptionError(f"{self.name}: journal= is the old name of log=; give log alone")
            warn_renamed("journal= of a pass", "log=")
            log = journal
        if log is None:
            log = RewriteLog.skipping(skip)
        with log.working_with(artifacts) as artifacts:
            inputs = pass_signature(self.function).inputs(self.name, artifacts)  # once: the blocks of a Program share them
            return self._on(program, log, inputs, artifacts)

    def _on(self, block: B, log: RewriteLog, inputs: Sequence[Any], artifacts: Artifacts) -> B:
        """Run the function on the bodies of a block's regions, each as a block of its own, then on the block.

        In this order, because a lowering may let the block write into what a region gives it, if that is read no more.
        """
        if any(is_region(node) for node in block.calls):
            draft = Draft.of(block)
            draft.change_bodies(lambda body: self._on(body, log, inputs, artifacts))
            block = draft.finish()
        result = self.function(block, log, *inputs, **self.given)
        after, *given = result if isinstance(result, tuple) else (result,)
        pass_signature(self.function).check(self.name, tuple(given))
        for artifact in given:
            if artifact is not None:
                artifacts.give(artifact)
        return after  # type: ignore[no-any-return]

    @property
    def needs(self) -> frozenset[type]:
        """The classes of the artifacts that the pass takes beside a Program."""
        return frozenset(pass_signature(self.function).needs)

    @property
    def gives(self) -> frozenset[type]:
        """The classes of the artifacts that the pass gives beside a Program."""
        return frozenset(pass_signature(self.function).gives)

    @property
    def is_exact(self) -> bool:
        """The numbers stay as they are, bit for bit."""
        return not self.effects

    @property
    def declares(self) -> str:
        """The old word for `effects`."""
        warn_renamed("declares of a pass", "effects")
        return declaration(self.effects)

    @property
    def options(self) -> dict[str, Any]:
        """The options and their defaults."""
        return {name: p.default for name, p in _option_parameters(self.function).items()}

    @property
    def option_syntax(self) -> dict[str, str]:
        """How each option is written: `dtype=bfloat16|float16`, the default first; `keep_float=NAME+NAME`."""
        hints = typing.get_type_hints(self.function)
        return {name: f"{name}={_option_syntax(hints.get(name), default)}" for name, default in self.options.items()}

    @property
    def spellings(self) -> dict[str, str]:
        """The old name of `option_syntax`."""
        warn_renamed("spellings of a pass", "option_syntax")
        return self.option_syntax

    @property
    def summary(self) -> str:
        """The first line of the pass's docstring."""
        return self.doc.strip().splitlines()[0] if self.doc.strip() else ""

    @property
    def equation(self) -> str:
        """The equation or table that opens the docstring."""
        lines = self.doc.strip().splitlines()[1:]
        block: list[str] = []
        for line in lines:
            if line.startswith("    "):
                block.append(line[4:])
            elif block and line.strip():
                break
            elif block:
                block.append("")
        return "\n".join(block).strip()

    def with_options(self, **options: Any) -> Pass:
        """The pass with options set. Raises `OptionError` naming the option and what it may be."""
        parameters = _option_parameters(self.function)
        hints = typing.get_type_hints(self.function)
        read = {}
        for name, value in self._under_new_names(options).items():
            if name not in parameters:
                have = ", ".join(parameters) or "none"
                raise OptionError(f"the pass {self.name} has no option {name!r}; it has: {have}")
            read[name] = _read_option(f"{self.name}: {name}", value, hints.get(name))
        return replace(self, given={**self.given, **read})

    def _under_new_names(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options, with a `DeprecationWarning` for each that is given under its old name."""
        current = {}
        for name, value in options.items():
            new = self.renamed.get(name, name)
            if new != name:
                if new in options:
                    raise OptionError(f"{self.name}: {name} is the old name of {new}; give {new} alone")
                warn_renamed(f"the option {self.name}:{name}", f"{self.name}:{new}")
            current[new] = value
        return current

    def __str__(self) -> str:
        """The pass as text that names it in a pipeline: `cast_half:level=O1:keep_float=encoder+softmax`."""
        return ":".join([self.name, *(f"{k}={option_text(v)}" for k, v in self.given.items())])


def _read_option(what: str, value: Any, hint: Any) -> Any:
    """An option's value in the type of its annotation; a list of values, or a mapping, may be given as text.

    `Literal`: one of these; a `torch.dtype` for its name. `tuple[str, ...]`: a list, or "a+b". `Mapping[str, Literal]`: a dict,
    or "a=O1+b=float".
    """
    kind, alternatives = typing.get_origin(hint), typing.get_args(hint)
    if kind is Literal and isinstance(value, torch.dtype) and dtype_name(value) in alternatives:
        return dtype_name(value)
    if kind in (tuple, Mapping) and isinstance(value, str) and "," in value:
        raise OptionError(f"{what}: names are joined by '+', not by ',': got {value!r}")
    if kind is Literal and value not in alternatives:
        raise OptionError(f"{what} must be one of {', '.join(map(repr, alternatives))}, got {value!r}")
    if kind is tuple:
        parts = value.split("+") if isinstance(value, str) else value
        if not isinstance(parts, Iterable) or not all(isinstance(part, str) and part for part in parts):
            raise OptionError(f"{what} must be a list of names, or names joined by '+', got {value!r}")
        return tuple(parts)
    if kind is Mapping:
        parts = dict(part.partition("=")[::2] for part in value.split("+")) if isinstance(value, str) else value
        if not isinstance(parts, Mapping) or not all(isinstance(part, str) and part for part in parts):
            raise OptionError(f"{what} must be a dict from names, or text like 'name=value+name=value', got {value!r}")
        return {part: _read_option(f"{what}[{part!r}]", given, alternatives[1]) for part, given in parts.items()}
    return value


def _option_syntax(hint: Any, default: Any) -> str:
    """What an option may be, as text that `_read_option` takes; the default first."""
    kind, alternatives = typing.get_origin(hint), typing.get_args(hint)
    if kind is Literal:
        return "|".join(map(str, sorted(alternatives, key=lambda value: value != default)))
    if kind is tuple:
        return "NAME+NAME"
    if kind is Mapping:
        return f"NAME={_option_syntax(alternatives[1], None)}+NAME=..."
    return str(default) if default is not None else "TEXT"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def option_text(value: Any) -> str:
    """An option's value as `with_options` reads it from text."""
    if isinstance(value, Mapping):
        return "+".join(f"{k}={v}" for k, v in value.items())
    return "+".join(value) if isinstance(value, tuple) else str(value)


def _option_parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(function).parameters
    return {n: p for n, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


Effects = Collection[NumericEffect]


def _either(effects: Effects | None, declares: str | None) -> NumericEffects:
    """The effects of a pass, which an author may still give under the old name."""
    if effects is not None and declares is not None:
        raise OptionError("declares is the old name of effects; give effects alone")
    if effects is None and declares is None:
        raise OptionError("a pass needs effects=, what it may do to numbers: () for nothing, {'rounds'} for rounding, ...")
    return numeric_effects(effects) if effects is not None else declared(str(declares))


def rule_pass(
    name: str, rules: Sequence[Rule], *, effects: Effects | None = None, doc: str | None, declares: str | None = None
) -> Pass:
    """A pass that applies `rules`. `declares` is the old name of `effects`."""
    found = _either(effects, declares)

    def run(program: Block, log: RewriteLog) -> Block:
        return apply_rules(program, rules, log, name, exact=not found)

    return Pass(name, run, found, doc or "", rules=tuple(rules))


TableEntry = Callable[[Ops, Call], Any]


def table_pass(
    name: str,
    table: Mapping[Any, TableEntry],
    *,
    effects: Effects | None = None,
    doc: str | None,
    declares: str | None = None,
) -> Pass:
    """A pass that replaces each op of `table` by what its entry builds.

    An entry takes `(op, call)` and returns the new Value, or None to leave the op alone; `op.decline(why)` says why not.
    `declares` is the old name of `effects`.
    """

    def run(program: Block, log: RewriteLog) -> Block:
        return replace_by_table(program, table, name, log)

    return Pass(name, run, _either(effects, declares), doc or "")


def replace_by_table(program: Block, table: Mapping[Any, TableEntry], name: str, log: RewriteLog) -> Block:
    """What a `table_pass` does; for a pass whose table depends on its options.

    What it made itself stays: an entry may build an op that is in the table, and a second run finds nothing to do.
    """
    if not any(node.target in table for node in program.calls):
        return program
    draft = Draft.of(program)
    shared = Shared(mutated=draft.program.mutated_values)
    for node in draft.program.calls:
        draft.refresh(node)
        entry = table.get(node.target)
        site = f"{name}@{node.name}"
        if entry is not None and log.allows(site) and name not in record(node).passes:
            _replace_node(draft, node, entry, site, name, shared, log)
    return draft.finish()


def _replace_node(
    draft: Draft, node: fx.Node, entry: TableEntry, site: str, name: str, shared: Shared, log: RewriteLog
) -> None:
    if any(n in shared.mutated for n in (node, *node.all_input_nodes)):
        log.refused(site, name, location(node), "its operands or result are written in place")
        return
    with draft.before(node):
        ops = Ops(draft, name, node, shared)
        result = entry(ops, Call(node))
    if ops.declined:
        log.refused(site, name, location(node), ops.declined)
    if result is None:
        return
    for new in ops.made:
        stand_for(new, [node], name, site)
    draft.redirect(node, result._node)
    draft.remove(node)
    log.rewrote(site, name, location(node))


def graph_pass(
    *, effects: Effects | None = None, renamed: Mapping[str, str] | None = None, declares: str | None = None
) -> Callable[[Callable[..., Any]], Pass]:
    """Decorator: a function `(program, log, *, options) -> program` as a pass of the same name.

    It may need artifacts, `(program, log, ranges: Ranges, *, options)`, and give some, `-> tuple[Block, Casts]`:
    `ir_tools.rewrite.artifacts`. `renamed` maps old names of options to new ones: users may still give the old ones, and get a
    `DeprecationWarning`. `declares` is the old name of `effects`.
    """
    found = _either(effects, declares)
    old = declares == "lower_precision"

    def decorate(function: Callable[..., Any]) -> Pass:
        pass_signature(function)  # an annotation that says nothing is an error now
        doc = inspect.getmodule(function).__doc__  # type: ignore[union-attr]
        return Pass(function.__name__, function, found, doc or "", renamed=renamed or {}, reads_log_ranges=old)

    return decorate
