"""Which ops the models of the zoo are made of: `zoo_ops.txt`, which tests hold against the op table of half precision.

    python -m benchmarks.zoo_ops                        # captures every model, one after another, and writes the file
    python -m benchmarks.zoo_ops --only 'timm:.*vit'    # prints the ops of some models

Counted are ops that read or give floating point numbers, by name, as they are captured or as the passes leave them that come
before `cast_half`.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from torch import fx

from benchmarks.zoo_models import Entry, read_list
from ir_tools.errors import first_line
from ir_tools.frontends.capture import capture
from ir_tools.frontends.source import prepare
from ir_tools.ir import Program, facts
from ir_tools.ir.dialect import short_name
from ir_tools.ir.regions import is_region
from passes import DEFAULT
from passes.driver.pipeline import plan
from passes.driver.step import run_steps

LIST = Path(__file__).with_name("zoo_ops.txt")
HEAD = """\
# Ops of the zoo that read or give floating point numbers, and how many of its models have them.
# Made by `python -m benchmarks.zoo_ops` from {found} of {all} models; no front end captures the others.
"""
BEFORE_HALF = (*DEFAULT, "use_stable_forms")


def float_ops(program: Program) -> set[str]:
    """The names of the ops that read or give floating point or complex tensors, those inside branches and loops too."""
    return {short_name(n.target) for n in program.all_calls if not is_region(n) and _has_floats([n, *n.all_input_nodes])}


def _has_floats(nodes: list[fx.Node]) -> bool:
    return any(v.dtype.is_floating_point or v.dtype.is_complex for node in nodes for v in facts.tensors(node))


def ops_of(entry: Entry) -> set[str]:
    """The float ops of one model, captured by the front end that `optimize` would take, before and behind the passes."""
    program = capture(prepare(entry.build(), [entry.arguments()])).program
    rewritten, _ = run_steps(program, plan(BEFORE_HALF, "aten"), [])
    return float_ops(program) | float_ops(rewritten)


def read_ops(path: Path = LIST) -> dict[str, int]:
    """Op name -> number of models."""
    lines = (line.split() for line in path.read_text().splitlines() if not line.startswith("#"))
    return {name: int(count) for name, count in lines}


def captured(entries: list[Entry]) -> Iterator[set[str]]:
    """The ops of each model that can be captured; a line for each goes to stderr."""
    for entry in entries:
        start = time.perf_counter()
        try:
            ops = ops_of(entry)
        except Exception as error:  # a model may raise any error; the others go on
            print(f"{entry.title}: {type(error).__name__}: {first_line(error)}", file=sys.stderr, flush=True)
            continue
        finally:
            gc.collect()
        print(f"{entry.title}: {len(ops)} ops, {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
        yield ops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression that the model's name must match somewhere")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    entries = [e for e in read_list() if re.search(options.only, e.title)]
    found = list(captured(entries))
    for ops in found:
        counts.update(ops)
    lines = "".join(f"{name} {count}\n" for name, count in sorted(counts.items()))
    if options.only:
        print(lines, end="")
    else:
        LIST.write_text(HEAD.format(found=len(found), all=len(entries)) + lines)


if __name__ == "__main__":
    main()
