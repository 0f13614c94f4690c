"""Statements in methods of a bounded length: TorchScript compiles one huge function in quadratic time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ir_tools.emit.emitted_text import Statement, method_text


def grouped(statements: Sequence[Statement], chunk_size: int) -> list[list[Statement]]:
    """Statements in groups of about `chunk_size` lines; one that is longer stands alone."""
    groups: list[list[Statement]] = []
    size = chunk_size
    for statement in statements:
        if size + len(statement.lines) > chunk_size:
            groups.append([])
            size = 0
        groups[-1].append(statement)
        size += len(statement.lines)
    return groups


def chunk_name(number: int) -> str:
    return f"_chunk_{number}"


def chunk_methods(
    groups: list[list[Statement]], result_reads: set[str], types: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """The chunk methods by name, and the lines of forward that call them."""
    last_chunk_reading = {name: i for i, group in enumerate(groups) for s in group for name in s.reads}
    last_chunk_reading.update(dict.fromkeys(result_reads, len(groups)))
    methods: dict[str, str] = {}
    calls = []
    for i, group in enumerate(groups):
        written = [name for s in group for name in s.writes]
        inside = set(written)
        live_in = list(dict.fromkeys(name for s in group for name in s.reads if name not in inside))
        live_out = [name for name in written if last_chunk_reading.get(name, -1) > i]
        method = chunk_name(i)
        methods[method] = _chunk_method(method, group, live_in, live_out, types)
        call = f"self.{method}({', '.join(live_in)})"
        calls.append(f"{', '.join(live_out)} = {call}" if live_out else call)
    return methods, calls


def _chunk_method(name: str, group: list[Statement], live_in: list[str], live_out: list[str], types: Mapping[str, str]) -> str:
    given = [types[v] for v in live_out]
    returned = given[0] if len(given) == 1 else f"Tuple[{', '.join(given)}]" if given else "None"
    lines = [line for s in group for line in s.lines]
    lines.append(f"return {', '.join(live_out) or 'None'}")
    return method_text(name, [f"{v}: {types[v]}" for v in live_in], returned, lines)
