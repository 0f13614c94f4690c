"""The rewrite log: what earlier releases called it still works, and warns."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ir_tools.rewrite
from ir_tools.rewrite import RewriteLog
from passes import CATALOGUE
from tests.check import captured

X = torch.randn(2, 3)

PASS = CATALOGUE["remove_dropout"]
MODEL = nn.Sequential(nn.Dropout(), nn.ReLU()).eval()


def test_the_old_name_of_the_class() -> None:
    with pytest.warns(DeprecationWarning, match=r"Journal"):
        assert ir_tools.rewrite.Journal is RewriteLog
    with pytest.raises(AttributeError, match="has no attribute 'Diary'"):
        ir_tools.rewrite.Diary  # noqa: B018


def test_the_old_name_of_the_argument() -> None:
    new, old = RewriteLog(), RewriteLog()
    PASS(captured(MODEL, X), log=new)
    with pytest.warns(DeprecationWarning, match=r"journal= of a pass"):
        PASS(captured(MODEL, X), journal=old)
    assert old.rewrites == new.rewrites and len(new.rewrites) == 1
