"""Rewriting: rules, how they are matched and applied, and the three shapes of a pass."""

from typing import Any

from ir_tools.deprecation import warn_renamed
from ir_tools.errors import OptionError
from ir_tools.rewrite.apply import apply_rules
from ir_tools.rewrite.artifacts import Artifacts
from ir_tools.rewrite.build import Ops
from ir_tools.rewrite.rewrite_log import Refusal, Rewrite, RewriteLog
from ir_tools.rewrite.rule import Call, Known, Rule, Value
from ir_tools.rewrite.shapes import Pass, graph_pass, replace_by_table, rule_pass, table_pass

__all__ = [
    "Artifacts", "Call", "Known", "Ops", "OptionError", "Pass", "Refusal", "Rewrite", "RewriteLog", "Rule", "Value",
    "apply_rules", "graph_pass", "replace_by_table", "rule_pass", "table_pass",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "Journal":
        warn_renamed("ir_tools.rewrite.Journal", "RewriteLog")
        return RewriteLog
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
