"""Targets: how they are found, registered and refused, and what the pipeline asks of them."""

from __future__ import annotations

import doctest
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from ir_tools.emit.to_torchscript import emit
from passes import CATALOGUE, CaptureError, OptionError, load, optimize
from passes.driver.catalogue import find_passes
from passes.driver.pipeline import plan
from passes.lower.lowering import lowering_pass
from passes.lower.target import Target
from passes.lower.targets import ATEN, ONEDNN, available_target, find_target, forget_target, register_target

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
MODEL, X = nn.Sequential(nn.Linear(3, 4), nn.ReLU()).eval(), torch.randn(2, 3)


@pytest.fixture
def quick() -> Iterator[Target]:
    yield register_target(Target("quick", portable=True))
    forget_target("quick")


def test_the_lowerings_of_the_catalogue_are_made_from_their_targets() -> None:
    assert {p.name: p.target for p in CATALOGUE.values() if p.target} == {"lower_aten": ATEN, "lower_onednn": ONEDNN}
    assert CATALOGUE["lower_aten"].options == {} and CATALOGUE["lower_aten"].is_exact
    assert CATALOGUE["lower_onednn"].options == {"variant": "measured", "records": None}
    assert find_passes("lower_aten") == [CATALOGUE["lower_aten"]]


def test_a_registered_target_has_an_engine_and_a_lowering(quick: Target) -> None:
    assert find_target("quick") is quick
    (lowering,) = find_passes("lower_quick")
    assert lowering.name == "lower_quick" and lowering.target is quick
    fast = optimize(MODEL, ["fuse_conv_relu"], example_inputs=X, engine="quick")
    assert fast.report.engine == "quick" and "lower_quick" in [step.name for step in fast.report.steps]
    torch.testing.assert_close(fast(X), MODEL(X))
    same = optimize(MODEL, ["fuse_conv_relu", "lower_quick"], example_inputs=X)
    assert same.report.engine == "quick" and same.report.ops_left == fast.report.ops_left == {"linear": 1, "relu": 1}


def test_a_target_need_not_be_registered() -> None:
    report = optimize(MODEL, example_inputs=X, engine=Target("once"), dry_run=True)
    assert report.engine == "once" and report.steps[-1].name == "lower_once"


def test_a_target_has_an_emitter_of_its_own() -> None:
    target = Target("short", emitter=lambda program: emit(program, chunk_size=1))
    fast = optimize(MODEL, example_inputs=X, engine=target)
    assert hasattr(fast.scripted, "_chunk_1") and not hasattr(optimize(MODEL, example_inputs=X).scripted, "_chunk_1")
    torch.testing.assert_close(fast(X), MODEL(X))


def test_order_rules_hold_for_any_lowering(quick: Target) -> None:
    with pytest.raises(Exception, match="fuse_conv_relu must come before lower_quick: lowering replaces the ops"):
        plan(["lower_quick", "fuse_conv_relu"], "auto")
    with pytest.raises(OptionError, match="the pass lower_quick stands for engine='quick', but engine='aten' was given"):
        plan(["lower_quick"], "aten")
    assert [p.name for p in plan(["lower_quick"], "quick")] == ["remove_dead_code", "lower_quick"]


def test_a_program_that_a_target_lowered_is_not_lowered_again() -> None:
    register_target(Target("late"))
    try:
        optimize(MODEL, example_inputs=X, dry_run=True)
        register_target(Target("late", namespaces=frozenset({"aten"})))
        with pytest.raises(CaptureError, match="the model holds aten::linear: it was optimised already"):
            optimize(MODEL, example_inputs=X, dry_run=True)
    finally:
        forget_target("late")


def test_names_that_are_taken_are_refused(quick: Target) -> None:
    with pytest.raises(OptionError, match="a target's name is an identifier other than 'auto', got 'auto'"):
        register_target(Target("auto"))
    with pytest.raises(OptionError, match="the lowering 'lower_quick' is that of the target 'quick'"):
        register_target(Target("other", lowering="lower_quick"))
    register_target(Target("odd", lowering="cast_half"))
    try:
        with pytest.raises(OptionError, match="the lowering of the target 'odd' bears the name of the pass 'cast_half'"):
            plan([], "odd")
    finally:
        forget_target("odd")
    with pytest.raises(OptionError, match="engine must be one of 'auto', 'aten', 'onednn_ops', 'quick', got 'other'"):
        plan([], "other")


def test_auto_takes_what_is_available_and_a_name_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert available_target("auto", {GPU}) is ATEN
    if torch.backends.mkldnn.is_available():
        assert available_target("auto", {CPU}) is ONEDNN
        with pytest.raises(OptionError, match="runs on the CPU, and the inputs are on cuda:0; use engine='aten'"):
            available_target("onednn_ops", {CPU, GPU})
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert available_target("auto", {CPU}) is ATEN
    with pytest.raises(OptionError, match="engine='onednn_ops' needs a torch built with oneDNN, which this one is not; use"):
        available_target("onednn_ops", {CPU})


@pytest.mark.parametrize("name", ["kernel_provider", "targets"])
def test_the_examples_in_docstrings_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"passes.lower.{name}"))
    assert result.attempted and not result.failed


def test_a_loaded_file_says_what_it_needs(tmp_path: Path) -> None:
    for name in ("aten", "quick"):
        register_target(Target("quick", needs="a quick machine"))
        try:
            optimize(MODEL, example_inputs=X, engine=name).save(tmp_path / f"{name}.pt")
            assert load(tmp_path / f"{name}.pt").needs == {"aten": "any torch", "quick": "a quick machine"}[name]
        finally:
            forget_target("quick")
    loaded = load(tmp_path / "quick.pt")
    assert loaded.needs == "a quick machine"  # the file says so itself
    del loaded.manifest["needs"]  # as in older files
    assert loaded.needs == "" and load(tmp_path / "aten.pt").needs == "any torch"


def test_a_lowering_among_the_passes_is_checked_like_an_engine() -> None:
    chip = Target("chip", available=lambda devices: "needs a chip")
    for given in ({"engine": chip}, {"passes": [lowering_pass(chip)]}):
        with pytest.raises(OptionError, match="engine='chip' needs a chip; use engine='aten'"):
            optimize(MODEL, example_inputs=X, **given)


def test_what_an_unregistered_target_lowered_is_recognised() -> None:
    """`tests` has no namespace of its own: relu's stands for that of a kernel library."""
    target = Target("odd", namespaces=frozenset({"aten"}))
    for given in ({"engine": target}, {"passes": [lowering_pass(target)]}):
        with pytest.raises(CaptureError, match="it was optimised already"):
            optimize(MODEL, example_inputs=X, **given)


def test_passes_lower_to_one_target() -> None:
    one, other = Target("one"), Target("other")
    with pytest.raises(OptionError, match="lower_one and lower_other lower to two targets, 'one' and 'other'"):
        plan([lowering_pass(one), lowering_pass(other)], "auto")
    with pytest.raises(OptionError, match="lower_one and lower_one lower to two targets"):
        plan([lowering_pass(one), lowering_pass(Target("one"))], "auto")
    with pytest.raises(OptionError, match="stands for engine='one', but another target, engine='one' was given"):
        plan([lowering_pass(one)], Target("one"))
    assert plan([lowering_pass(one), lowering_pass(one)], one) and plan(["lower_onednn", "lower_aten"], "auto")


def test_a_target_whose_kernels_prepack_is_not_portable() -> None:
    with pytest.raises(OptionError, match="'odd' cannot be portable: what the kernels of oneDNN layers prepack stays"):
        Target("odd", ONEDNN.providers, portable=True)
    assert not ATEN.with_providers(ONEDNN.providers[0]).portable and ATEN.with_providers(ONEDNN.providers[1]).portable
    assert len({ATEN, ONEDNN, *ONEDNN.providers}) == 5  # they are keys of dicts
