"""The targets by name: the two that are built in, and those that users register.

    aten         plain ATen operators; its files move between devices
    onednn_ops   packed oneDNN kernels on the CPU
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from ir_tools.errors import OptionError
from passes.lower.target import Target
from passes.lower.variants.attention import ATTENTION_KERNELS
from passes.lower.variants.onednn import LAYER_KERNELS
from passes.lower.variants.pooling import POOLING_KERNELS

AUTO = "auto"


def onednn_is_there(devices: Collection[torch.device]) -> str | None:
    if not torch.backends.mkldnn.is_available():
        return "needs a torch built with oneDNN, which this one is not"
    elsewhere = sorted({str(device) for device in devices if device.type != "cpu"})
    return f"runs on the CPU, and the inputs are on {', '.join(elsewhere)}" if elsewhere else None


ATEN = Target("aten", portable=True, needs="any torch")

ONEDNN = Target(
    "onednn_ops",
    (LAYER_KERNELS, ATTENTION_KERNELS, POOLING_KERNELS),
    needs="oneDNN, the CPU; with bfloat16 weights AVX-512, which is checked when the file is loaded",
    available=onednn_is_there,
    namespaces=frozenset({"mkldnn"}),
    lowering="lower_onednn",
)

BUILT_IN = {target.name: target for target in (ATEN, ONEDNN)}
PREFERRED = ("onednn_ops", "aten")
"""What "auto" tries, in this order."""

_registered: dict[str, Target] = dict(BUILT_IN)


def register_target(target: Target) -> Target:
    """Let `engine="<name>"` mean `target`, and give it back. A target of this name is replaced, a built-in one too.

    Raises `OptionError` where the name of the target, or of its lowering, is taken by something else.

    >>> register_target(Target("quick")).lowering, find_target("quick").name
    ('lower_quick', 'quick')
    >>> forget_target("quick")
    """
    if target.name == AUTO or not target.name.isidentifier():
        raise OptionError(f"a target's name is an identifier other than {AUTO!r}, got {target.name!r}")
    for other in _registered.values():
        if other.lowering == target.lowering and other.name != target.name:
            raise OptionError(f"the lowering {target.lowering!r} is that of the target {other.name!r}; set another lowering=")
    _registered[target.name] = target
    return target


def forget_target(name: str) -> None:
    """Undo `register_target`: a target of ours is again what it was, another one is gone."""
    if name in BUILT_IN:
        _registered[name] = BUILT_IN[name]
    else:
        _registered.pop(name, None)


def registered_targets() -> list[Target]:
    """All targets that have a name for `engine=`."""
    return list(_registered.values())


def find_target(engine: str | Target) -> Target:
    """The target of that name, or the one given. Raises `OptionError` listing the names."""
    if isinstance(engine, Target):
        return engine
    named = [target for name, target in _registered.items() if name == engine]
    if not named:
        names = ", ".join(map(repr, (AUTO, *_registered)))
        raise OptionError(f"engine must be one of {names}, got {engine!r}")
    return named[0]


def available_target(engine: str | Target, devices: Collection[torch.device]) -> Target:
    """The target, if inputs on these devices can have it; of "auto" the first that can.

    Raises `OptionError` with the reason where it is not available.
    """
    if engine == AUTO:
        candidates = [_registered[name] for name in PREFERRED]
        return next((target for target in candidates if target.available(devices) is None), ATEN)
    target = find_target(engine)
    why_not = target.available(devices)
    if why_not is not None:
        raise OptionError(f"engine={target.name!r} {why_not}; use engine={ATEN.name!r}")
    return target
