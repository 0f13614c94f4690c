"""Rewriting: rules, how they are matched and applied, and the three shapes of a pass."""

from ir_tools.rewrite.apply import apply_rules
from ir_tools.rewrite.build import Ops
from ir_tools.rewrite.rewrite_log import Journal, Refusal, Rewrite
from ir_tools.rewrite.rule import Call, Known, Rule, Value
from ir_tools.rewrite.shapes import Pass, graph_pass, replace_by_table, rule_pass, table_pass

__all__ = [
    "Call", "Journal", "Known", "Ops", "Pass", "Refusal", "Rewrite", "Rule", "Value",
    "apply_rules", "graph_pass", "replace_by_table", "rule_pass", "table_pass",
]  # fmt: skip
