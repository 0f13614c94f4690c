"""What the providers of a target offer for one op: candidates, their variants, and the reasons of those that offer nothing.

Providers are written by others. A function of one that raises is a reason to go without its kernels, and no end of the
compilation; the reason names the provider. A kernel that fails when it is timed is none for this machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ir_tools.errors import PassesError, first_line
from ir_tools.rewrite import Call
from ir_tools.rewrite.subgraph import site_of
from passes.lower.kernel_provider import REFERENCE, Builder, KernelProvider, operands


@dataclass(frozen=True, eq=False)
class Candidate:
    """A provider that supports the subgraph which it sees in an op, and its variants there, the default first."""

    provider: KernelProvider
    subgraph: Any
    variants: Mapping[str, Builder]


Variants = dict[str, tuple[Builder, Candidate]]


class KernelFailed(Exception):
    """These variants do not run here, and why."""

    def __init__(self, names: Sequence[str], reason: str):
        super().__init__(reason)
        self.names, self.reason = names, reason


def raised(what: str, error: Exception) -> str:
    """`build raises ValueError: no such size`."""
    message = first_line(error)
    return f"{what} raises {type(error).__name__}" + (f": {message}" if message else "")


def ask(provider: KernelProvider, what: str, function: Callable[..., Any], *args: Any) -> Any:
    """What a function of the provider gives. Raises `KernelFailed` where it raises."""
    try:
        return function(*args)
    except Exception as error:  # anything: others wrote it
        raise KernelFailed([provider.name], f"{provider.name}: {raised(what, error)}") from error


def looking_at(providers: Sequence[KernelProvider], call: Call, reasons: list[str]) -> list[KernelProvider]:
    """The providers whose pattern may end in the op, and whose `when` holds."""
    found = []
    for provider in providers:
        try:
            if call.target in provider.ops and ask(provider, "when", provider.when, call):
                found.append(provider)
        except KernelFailed as failure:
            reasons.append(failure.reason)
    return found


def supporting(providers: Sequence[KernelProvider], op: Any, call: Call, reasons: list[str]) -> list[Candidate]:
    """The providers that support the op; in `reasons`, why the others do not.

    Raises `PassesError`, naming provider and site, where `supports` gives neither None nor a sentence.
    """
    candidates = []
    for provider in providers:
        try:
            subgraph, why_not = ask(provider, "subgraph", provider.subgraph_at, op, call)
            if subgraph is not None:
                why_not = _objection(provider, subgraph, op, call)
                if why_not is None:
                    candidates.append(Candidate(provider, subgraph, _variants_of(provider, subgraph)))
            if why_not:
                reasons.append(why_not if len(providers) == 1 else f"{provider.name}: {why_not}")
        except KernelFailed as failure:
            reasons.append(failure.reason)
    return candidates


def _objection(provider: KernelProvider, subgraph: Any, op: Any, call: Call) -> str | None:
    values = ask(provider, "subgraph", lambda: [value for _, value in operands(subgraph)])
    device = values[0].device if values else None
    answer = ask(provider, "supports", provider.supports, subgraph, device, tuple(value.dtype for value in values))
    if answer is None or (isinstance(answer, str) and answer):
        return answer
    raise PassesError(
        f"{site_of(op, call)}: supports of the kernel provider {provider.name!r} gives {answer!r}; "
        "it gives None where the kernel takes the subgraph, else a sentence that says why not"
    )


def _variants_of(provider: KernelProvider, subgraph: Any) -> Mapping[str, Builder]:
    variants = ask(provider, "variants", provider.variants_of, subgraph)
    if isinstance(variants, Mapping) and variants and all(map(callable, variants.values())):
        return variants
    raise KernelFailed([provider.name], f"{provider.name}: variants gives {variants!r}, which names no functions")


def variants_among(candidates: Sequence[Candidate]) -> Variants:
    """All variants by name, the default first. Those of several providers are called after their providers.

    The reference is one of them: a provider with several variants has it among these; else it is the last.
    """
    several, variants = len(candidates) > 1, {}
    for candidate in candidates:
        for name, builder in candidate.variants.items():
            if several:
                own = candidate.provider.name
                name = own if len(candidate.variants) == 1 else f"{own} {name}"
            variants[name] = builder, candidate
    if candidates and len(variants) == len(candidates):
        variants[REFERENCE] = candidates[-1].provider.reference, candidates[-1]
    return variants


def is_reference(name: str, variants: Variants) -> bool:
    builder, candidate = variants[name]
    return builder is candidate.provider.reference


def workload_of(candidates: list[Candidate], reasons: list[str]) -> str | None:
    """The workload key of the first candidate; where there are more, with their names, since others are measured too.

    None where one of them cannot be timed. Candidates whose functions raise are taken out of the list.
    """
    timed = [_answer(c, "can_be_timed", c.provider.can_be_timed, candidates, reasons) for c in list(candidates)]
    while candidates and all(timed):
        first, names = candidates[0], ", ".join(candidate.provider.name for candidate in candidates)
        key = _answer(first, "workload_key", first.provider.key_of, candidates, reasons)
        if key is not None:
            return key if len(candidates) == 1 else f"{key}, by {names}"
    return None


def _answer(
    candidate: Candidate, what: str, function: Callable[[Any], Any], candidates: list[Candidate], reasons: list[str]
) -> Any:
    """What the function gives; where it raises, or gives no text for a key, the candidate is one no longer."""
    try:
        answer = ask(candidate.provider, what, function, candidate.subgraph)
        if what == "workload_key" and not isinstance(answer, str):
            raise KernelFailed([], f"{candidate.provider.name}: {what} gives {answer!r}, which is no text")
        return answer
    except KernelFailed as failure:
        candidates.remove(candidate)
        reasons.append(failure.reason)
        return None if what == "workload_key" else True


def timed(variants: Variants) -> dict[str, Callable[[], Any]]:
    """The variants as calls on tensors. Those of one provider share the tensors. They raise `KernelFailed`."""
    calls: dict[str, Callable[[], Any]] = {}
    for candidate in dict.fromkeys(candidate for _, candidate in variants.values()):
        own = {name: builder for name, (builder, of) in variants.items() if of is candidate}
        try:
            found = candidate.provider.timed(candidate.subgraph, own)
        except Exception as error:  # anything: others wrote it
            reason = f"{candidate.provider.name}: {raised('on_tensors', error)}"
            raise KernelFailed(list(own), reason) from error
        calls |= {name: _naming(name, call, candidate.provider.name) for name, call in found.items()}
    return {name: calls[name] for name in variants}


def _naming(name: str, call: Callable[[], Any], provider: str) -> Callable[[], Any]:
    def run() -> Any:
        try:
            return call()
        except Exception as error:  # anything: others wrote it
            label = provider if name in (provider, REFERENCE) or name.startswith(f"{provider} ") else f"{provider} {name}"
            raise KernelFailed([name], f"{label}: {raised('the kernel, when it is timed,', error)}") from error

    return run
