"""Words that we do not write, in code, docs and reports: the field has better known ones (`docs/design.md`, habit 8)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(
    [path for folder in ("ir_tools", "passes", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")]
    + [path for path in (ROOT / "docs").glob("*.md") if path.name != "zoo.md"]  # the output of an earlier run, as it was
    + [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile")]
)
FILES.remove(Path(__file__))

INSTEAD: dict[str, str] = {
    r"stances?": "precision constraint",
    r"ways?|course": "compilation, or what is meant",
    r"told|tells?|telling": "reported, given",
    r"contestants?": "candidate",
    r"verdicts?": "speed comparison, trace validation, device placement",
    r"shadows?": "wrapper tensor",
    r"purif\w+": "functionalize",
    r"spell|spells|spelt|spelled|spelling|spellings|respell\w*": "canonicalize, print",
    r"readers?": "user of a value",
    r"laws?": "invariant",
    r"journals?|journaled": "rewrite log",
}
"""By pattern of a word: what to write. Words within names count, too: `a_reader`, `LawBroken`."""

INSTEAD_IN_TEXT: dict[str, str] = {
    r"forms?": "kernel variant, canonical form",
    r"choices?": "tuning record, option",
    r"signature of a (?:form|variant)": "workload key",
    r"(?-i:Product)": "Layer",
    r"places?": "location, site",
    r"of the run": "runtime value",
    r"not so:": "requirement not met:",
    r"no more than noise": "within measurement noise",
}
"""The same for whole words and phrases; as parts of names they may be meant well, as in `is_in_place`."""

FINE = (
    r"(?:canonical|stable) forms?|in(?:-| | its | their )places?|last place|places casts|"
    r"(?:rest|figure|report) of the run|\.choice\("
)
"""Meant well."""

OLD_NAMES = {
    "CHANGELOG.md": (
        r"`Journal`|`journal=`|`journal\.choices`|`value\.place`|`pass\.spellings`|LawBroken|hold_to_laws|"
        r"called choices|reader=|layout_tells|"
        r"forms of an op|\"choices\"|--choices|choices=|report\.choices"
    ),
    "ir_tools/rewrite/former_fields.py": r"def choices|\"choices\"|@choices",
    "ir_tools/rewrite/rule.py": r"def place|place of a value",
    "ir_tools/rewrite/shapes.py": r"\bjournal\b|\bspellings\b",
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
    "tests/ir_tools/test_rewrite_log.py": r"\bjournal=|Journal",
    "tests/passes/testing/test_exports.py": r"LawBroken|hold_to_laws",
    "tests/passes/tune/test_tuning_records.py": r"\"choices\"|\"form\"|no choices|were choices and variants forms",
    "tests/test_deprecation.py": r"\b(choices|place|spellings|journal)(?![a-z])|_the_place_|_spellings_|_journal_",
}
"""What users of an earlier release may still write; keys of files and text of emitted modules, which stay as they were."""


def matcher(patterns: dict[str, str]) -> re.Pattern[str]:
    """One group per pattern."""
    either = "|".join(f"({pattern.replace(' ', ' +')})" for pattern in patterns)
    return re.compile(rf"(?<![\w-])(?:{either})(?![\w-])", re.IGNORECASE)


IN_NAMES, IN_TEXT = matcher(INSTEAD), matcher(INSTEAD | INSTEAD_IN_TEXT)
MEANT_WELL = re.compile(FINE.replace(" ", " +"), re.IGNORECASE)
LINE_BREAK = re.compile(r"[\"']? *\n *(?:#|[rf]{0,2}[\"'])?")
NAME = re.compile(r"\b\w*(?:_|[a-z][A-Z])\w*")
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
"""Names that consist of several words, and the words in them."""


def blank(pattern: re.Pattern[str], text: str) -> str:
    return pattern.sub(lambda match: " " * len(match[0]), text)


def found(text: str, old_names: str = r"(?!)") -> list[str]:
    """What is not to be written, with lines. Strings, comments and paragraphs may go over several lines."""
    text = blank(re.compile(old_names), text)
    words = [(m.start(), m[0], m) for m in IN_TEXT.finditer(blank(MEANT_WELL, blank(LINE_BREAK, text)))]
    for name in NAME.finditer(text):
        words += [(name.start(), name[0], m) for word in WORD.findall(name[0]) if (m := IN_NAMES.fullmatch(word))]
    better = list((INSTEAD | INSTEAD_IN_TEXT).values())
    return [
        f"line {text.count(chr(10), 0, start) + 1}: {' '.join(word.split())} (better: {better[(m.lastindex or 1) - 1]})"
        for start, word, m in words
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_fields_words(path: Path) -> None:
    wrong = found(path.read_text(), OLD_NAMES.get(str(path.relative_to(ROOT)), r"(?!)"))
    assert not wrong


@pytest.mark.parametrize(
    "text, words",
    [
        ("as the Journal tells", ["Journal", "tells"]),
        ("use_stable_forms, in place of it, a place, in-place,\nis_in_place, in its\nplace", ["place"]),
        ("a Product of products", ["Product"]),
        ("def _write_way_in(last_reader): raise LawBroken", ["_write_way_in", "last_reader", "LawBroken"]),
        ("# a number of\n    # the run, the rest of\n    # the run", ["of the run"]),
        ('"the result of the "\n    f"run; not so: {it}"', ["of the run", "not so:"]),
        ("always, lawn, the course_grained", ["course_grained"]),
        ("test_what_is_told_and_not_counted, TellsDtype", ["test_what_is_told_and_not_counted", "TellsDtype"]),
    ],
)
def test_the_check_sees_what_it_looks_for(text: str, words: list[str]) -> None:
    assert {re.split(r": | \(better", line, maxsplit=1)[1].split(" (better")[0] for line in found(text)} == set(words)
