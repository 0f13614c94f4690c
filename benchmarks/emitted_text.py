"""Whether a change of the code changes what is emitted: record everything in one tree, compare in another.

    python -m benchmarks.emitted_text record --out recorded         in the tree before the change
    python -m benchmarks.emitted_text compare --with recorded       in the tree after it; exits with 1 on any difference

The cases are the sample of the zoo, with the default passes and with its half pipeline, and random models through random ones,
front ends and engines. Random models are recorded as text, and tuning records are replayed: both trees do the same, even
where they would draw or measure something else. A folder per case holds:

    case.json       what was done                               constants.txt   all in the file that is no text, by its digest
    emitted.txt     the text that was given to TorchScript      outputs.txt     digests of the outputs
    saved.txt       the text that torch put into the file       report.json     the rest of the report, and the manifest
    sites.json      sites of rewrites and refusals, by pass     reasons.json    the reasons of the refusals
    tuning.json     what `report.tuning_records.save` wrote     error.txt       what `optimize` raised, if it did

This file runs in both trees: it imports what users import, and watches what torch gets to compile. Left out are seconds and the
speed comparison; `___torch_mangle_7` and the like, numbers that torch counts in the whole process, are counted per file.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import linecache
import pickletools
import random
import re
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from benchmarks.zoo_models import SAMPLE, read_list
from benchmarks.zoo_one import HALF
from ir_tools.torch_compat import pytree
from ir_tools.torch_compat.jit import watch_compiled_methods
from passes import CATALOGUE, DEFAULT, load, optimize

PARTS = tuple(
    "emitted.txt saved.txt sites.json constants.txt outputs.txt tuning.json reasons.json report.json error.txt".split()
)
FRONTENDS = ("trace",) * 8 + ("fx", "fx", "script", "script", "export")
# Engines, and what goes last: where that is no lowering, `optimize` adds the one that measures.
LOWERED = (("onednn_ops", ()), ("onednn_ops", ("lower_onednn:variant=fused",)), ("aten", ()))
CAST = "cast_half:on_slower=keep"  # what is given must not depend on which was faster
LEFT_OUT = ("choices", "seconds", "capture_seconds", "emit_seconds", "speed", "tuning_records", "records")  # or in another file
SHOWN = 30  # lines of a difference

Case = dict[str, Any]
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def zoo_cases() -> Iterator[Case]:
    for title in SAMPLE:
        for kind, names in (("float32", DEFAULT), ("half", HALF)):
            passes = [CAST if name == "cast_half" else name for name in names]
            yield {"name": f"{title.replace(':', '.')}.{kind}", "zoo": title, "passes": passes, "options": {}}


def random_cases(seed: int) -> Iterator[Case]:
    """Without end. The same seed gives the same ones, for as long as `passes.testing` draws them so."""
    import hypothesis
    from hypothesis import strategies as st

    from passes.testing import pipelines, random_models

    @st.composite
    def cases(draw: st.DrawFn) -> Case:
        model = draw(random_models(dtypes=(torch.float32, torch.float32, torch.float64)))
        (engine, last), frontend = draw(st.sampled_from(LOWERED)), draw(st.sampled_from(FRONTENDS))
        left_out = ("lower_", draw(st.sampled_from(("lower_", *["cast_half"] * 4))))
        names = draw(pipelines([name for name in CATALOGUE if not name.startswith(left_out)]))
        passes = [CAST if name == "cast_half" else name for name in names] + list(last)
        made = {"source": model.source, "seed": model.seed, "dtype": str(model.dtype).removeprefix("torch.")}
        return {**made, "passes": passes, "options": {"engine": engine, "frontend": frontend}}

    drawn: list[Case] = []
    test = hypothesis.settings(database=None, deadline=None)(hypothesis.given(cases())(lambda case: drawn.append(case)))
    numbers = random.Random(seed)
    for number in count():
        while not drawn:  # some bytes give no model
            test.hypothesis.fuzz_one_input(numbers.randbytes(4096))  # type: ignore[attr-defined]
        yield {"name": f"random.{number:04}", **drawn.pop()}


def model_and_arguments(case: Case) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The model of a case in eval mode, and the arguments of a call: the same ones every time."""
    if "zoo" in case:
        entry = next(entry for entry in read_list() if entry.title == case["zoo"])
        return entry.build(), *entry.arguments()
    file, source, namespace = f"<{case['name']}>", case["source"], {"__name__": "random_model"}
    exec(compile(source, file, "exec"), namespace)
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # torch.jit.script reads it there
    torch.set_default_dtype(getattr(torch, case["dtype"]))
    torch.manual_seed(case["seed"])
    try:
        model: nn.Module = namespace["Model"]().eval().requires_grad_(False)
        for norm in (m for m in model.modules() if getattr(m, "running_var", None) is not None):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.3, 2)
            for tensor in norm.parameters():
                tensor.uniform_(0.5, 1.5)
        return model, namespace["example_inputs"](), {}
    finally:
        torch.set_default_dtype(torch.float32)


def watch() -> list[str]:
    """Set this process up; a list that from now on gets every text of methods that torch's Python hands to its C++."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    texts: list[str] = []
    watch_compiled_methods(texts.append)
    # The first class of each name in a process is the only one whose name torch does not mangle.
    optimize(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), "lower_onednn:variant=fused", example_inputs=torch.randn(1, 3, 8, 8))
    if not any(text.startswith("def forward(") for text in texts):
        sys.exit("no text was seen: the emitter calls something else of torch's, and this file has to watch that")
    return texts


def outcome(case: Case, tuning: Path | None, texts: list[str]) -> dict[str, str]:
    """The parts of a case, by the names of their files. `tuning`: records to replay."""
    model, args, kwargs = model_and_arguments(case)
    options, parts = {**case["options"], **({} if tuning is None else {"tuning_records": tuning})}, dict[str, str]()
    for verify in ("each", "off"):  # a random model may amplify rounding beyond what is allowed
        texts.clear()
        try:
            calls = {"example_inputs": args or None, "example_kwargs": kwargs}
            fast = optimize(model, case["passes"], verify=verify, **calls, **options)
            break
        except Exception as error:  # a refusal, or a fault: it has to stay as it is
            parts["error.txt"] = parts.get("error.txt", "") + f"verify={verify}: {type(error).__name__}: {error}\n"
    else:
        return parts
    # Behind the model may come the one without a pass, that is only there to be timed.
    own = next(i for i, text in enumerate(texts) if text.startswith("def forward("))
    parts["emitted.txt"] = "\n".join(texts[: own + 1])
    report = fast.report.to_dict()
    sites = [{key: step.pop(key) for key in ("name", "rewrites", "refusals")} for step in report["steps"]]
    reasons = [[refusal.pop("reason") for refusal in step["refusals"]] for step in sites]
    with tempfile.TemporaryDirectory() as folder:
        file, record = Path(folder, "model.pt"), Path(folder, "tuning.json")
        fast.save(file)
        manifest = load(file).manifest  # compares the outputs with those in the file
        parts["saved.txt"], parts["constants.txt"] = contents(file)
        if fast.report.tuning_records is not None:
            fast.report.tuning_records.save(record)
            parts["tuning.json"] = record.read_text()
    torch.manual_seed(0)
    with torch.no_grad():
        outputs = pytree.tree_leaves(fast(*args, **kwargs))
    parts["outputs.txt"] = "\n".join(digest(leaf) for leaf in outputs if isinstance(leaf, torch.Tensor))
    parts["sites.json"], parts["reasons.json"] = json.dumps(sites, indent=1), json.dumps(reasons, indent=1)
    rest = json.loads(json.dumps([report, manifest]), object_hook=lambda d: {k: d[k] for k in d if k not in LEFT_OUT})
    parts["report.json"] = json.dumps(rest, indent=1)
    return parts


def contents(file: Path) -> tuple[str, str]:
    """Of a saved model: its text, and a line on each other thing in it, such as the memory of a constant."""
    text, lines, seen = "", "", dict[str, str]()
    with zipfile.ZipFile(file) as archive:
        for path in archive.namelist():
            data, name = archive.read(path), path.partition("/")[2]
            if name.endswith(".py"):
                text += counted_anew(f"# {name}\n{data.decode()}\n", seen)
            elif name in ("data.pkl", "constants.pkl"):
                operations = "\n".join(f"{operation.name} {argument}" for operation, argument, _ in pickletools.genops(data))
                lines += f"{name}: {hashed(counted_anew(operations, {}).encode())}\n"
            elif not name.endswith((".debug_pkl", "/serialization_id", "/manifest.json")):
                lines += f"{name}: {hashed(data)}\n"
    return text, lines


def counted_anew(text: str, seen: dict[str, str]) -> str:
    """Names that torch makes unique by a number, numbered in the order of their appearance."""
    return re.sub(r"___torch_mangle_\d+", lambda found: seen.setdefault(found[0], f"___torch_mangle_#{len(seen)}"), text)


def digest(tensor: torch.Tensor) -> str:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return f"{tensor.dtype} {list(tensor.shape)} strides {list(tensor.stride())} {hashed(data)}"


def hashed(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:24]


@app.command()
def record(
    out: Annotated[Path, typer.Option(help="A new folder.")],
    fuzz: Annotated[int, typer.Option(help="How many random models, not counting those that are refused.")] = 500,
    seed: Annotated[int, typer.Option(help="Of the random models.")] = 0,
) -> None:
    """Write down what this tree emits."""
    texts, start = watch(), time.perf_counter()
    for cases, wanted in ((zoo_cases(), 2 * len(SAMPLE)), (random_cases(seed), fuzz)):
        while wanted > 0:
            case = next(cases)
            (folder := out / case["name"]).mkdir(parents=True)
            (folder / "case.json").write_text(json.dumps(case, indent=1))
            parts, before = outcome(case, None, texts), None
            # Measuring has a budget. What came after it was spent is measured the next time, until the record has all.
            while (tuning := parts.get("tuning.json")) != before:
                (folder / "tuning.json").write_text(before := tuning)
                parts = outcome(case, folder / "tuning.json", texts)
            for name, text in parts.items():
                (folder / name).write_text(text)
            wanted -= "emitted.txt" in parts
            print(f"{case['name']}: {', '.join(parts)}; {time.perf_counter() - start:.0f} s", flush=True)


@app.command()
def compare(
    recorded: Annotated[Path, typer.Option("--with", help="The folder that `record` wrote.")],
    only: Annotated[str, typer.Option(help="Cases with this in their names.")] = "",
) -> None:
    """Do in this tree what was recorded, and show every difference."""
    texts, start, same, different = watch(), time.perf_counter(), dict.fromkeys(PARTS, 0), dict[str, None]()
    cases = sorted(recorded.glob(f"*{only}*/case.json"))
    for case in cases:
        files = {name: case.with_name(name) for name in PARTS if case.with_name(name).exists()}
        before = {name: file.read_text() for name, file in files.items()}
        after = outcome(json.loads(case.read_text()), files.get("tuning.json"), texts)
        same = {name: number + (before.get(name) == after.get(name)) for name, number in same.items()}
        for name in (name for name in PARTS if before.get(name) != after.get(name)):
            different[case.parent.name] = None
            pair = (part.get(name, "").splitlines() for part in (before, after))
            lines = list(difflib.unified_diff(*pair, f"recorded/{case.parent.name}/{name}", "here", n=1, lineterm=""))
            print(*lines[:SHOWN], f"({max(0, len(lines) - SHOWN)} more lines)", sep="\n", flush=True)
    print(*(f"{name:14} {number} of {len(cases)} identical" for name, number in same.items()), *different, sep="\n")
    print(f"{len(cases) - len(different)} of {len(cases)} cases identical; {time.perf_counter() - start:.0f} s")
    sys.exit(1 if different or not cases else 0)


if __name__ == "__main__":
    app()
