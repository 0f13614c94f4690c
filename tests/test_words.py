"""Words that we do not write, in code, docs and reports: the field has better known ones (`docs/design.md`, habit 8)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(
    [path for folder in ("ir_tools", "passes", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    + [path for path in (ROOT / "docs").glob("*.md") if path.name != "zoo.md"]
    + [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
)

INSTEAD: dict[str, str] = {
    r"stances?": "precision constraint",
    r"ways?|course": "compilation, or what is meant",
    r"told|tells?|telling": "reported, given",
    r"(?<!canonical )(?<!stable )forms?": "kernel variant, canonical form",
    r"choices?": "tuning record, option",
    r"signature of a (form|variant)": "workload key",
    r"Product": "Layer",
    r"contestants?": "candidate",
    r"verdicts?": "speed comparison, trace validation, device placement",
    r"shadows?": "wrapper tensor",
    r"(?<!in )(?<!in-)(?<!in its )(?<!in their )places?": "location, site",
    r"purif\w+": "functionalize",
    r"spell|spells|spelt|spelled|spelling|spellings|respell\w*": "canonicalize, print",
    r"(?<!rest )(?<!figure )(?<!report )of the run": "runtime value",
    r"readers?": "user of a value",
    r"laws?": "invariant",
    r"journals?": "rewrite log",
}
"""By pattern of a whole word: what to write."""

OLD_NAMES = {
    "ir_tools/rewrite/shapes.py": r"\bjournal\b",
    "ir_tools/rewrite/__init__.py": r"Journal",
    "passes/testing/__init__.py": r"LawBroken|hold_to_laws",
    "passes/driver/optimize.py": r"\bchoices: |\"choices\", choices",
    "passes/report/data.py": r"def choices|report\.choices|\"choices\"",
    "passes/cli/commands.py": r"\bchoices: |\"--choices\", choices",
    "passes/lower/lower_onednn.py": r"\"choices\"",
    "passes/driver/manifest.py": r"\"choices\"",
    "passes/tune/tuning_record.py": r"\"choices\"|\"form\"|once called choices, and variants forms",
    "benchmarks/emitted_text.py": r"\"choices\"",
    "ir_tools/emit/runtime_checks.py": r"place: str|format\(place",
}
"""What users of an earlier release may still write; keys of files and text of emitted modules, which stay as they were."""


def found(text: str, pattern: str) -> list[str]:
    return [m[0] for m in re.finditer(rf"(?<![\w-])({pattern})(?![\w-])", text, re.IGNORECASE if pattern != "Product" else 0)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_fields_words(path: Path) -> None:
    text = re.sub(OLD_NAMES.get(str(path.relative_to(ROOT)), r"(?!)"), "", path.read_text())
    wrong = [
        f"line {number}: {word!r} (better: {better})"
        for number, line in enumerate(text.splitlines(), start=1)
        for pattern, better in INSTEAD.items()
        for word in found(line, pattern)
    ]
    assert not wrong


def test_the_check_sees_what_it_looks_for() -> None:
    assert found("as the Journal tells", r"journals?") == ["Journal"]
    assert found("in place of it, a place", r"(?<!in )places?") == ["place"]
    assert not found("use_stable_forms, in-place", r"forms?|places?")
    assert found("a Product of products", r"Product") == ["Product"]
