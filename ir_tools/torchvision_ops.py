"""Import torchvision where its compiled operators cannot be loaded.

A torchvision built for CUDA does not load its library beside CPU torch, and then its own import fails: it registers
fake kernels for ``torchvision::nms`` and ``torchvision::qnms``, which do not exist. Its models need neither. So the
operators are declared here, with the schemas of torchvision 0.28, and raise when called.
"""

import importlib
import sys
import threading
from collections.abc import Callable
from types import ModuleType

import torch

_ROI = "Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width"
_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "box_iou_rotated": "(Tensor boxes1, Tensor boxes2) -> Tensor",
    "roi_align": f"({_ROI}, int sampling_ratio, bool aligned) -> Tensor",
    "qroi_align": "(Tensor input, Tensor rois, float input_scale, int input_zero_point, float rois_scale, "
    "int rois_zero_point, float spatial_scale, SymInt pooled_height, SymInt pooled_width, int sampling_ratio, "
    "bool aligned) -> Tensor",
    "roi_pool": f"({_ROI}) -> (Tensor, Tensor)",
    "ps_roi_align": f"({_ROI}, int sampling_ratio) -> (Tensor, Tensor)",
    "ps_roi_pool": f"({_ROI}) -> (Tensor, Tensor)",
    "deform_conv2d": "(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, SymInt stride_h, "
    "SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w, SymInt groups, "
    "SymInt offset_groups, bool use_mask) -> Tensor",
}

_lock = threading.Lock()
_library: torch.library.Library | None = None  # the operators live as long as this object


def import_torchvision() -> ModuleType:
    """Return the torchvision module; its missing operators are defined first, if the plain import needs them.

    Raises ModuleNotFoundError when torchvision is not installed, and whatever else its import raises.
    """
    with _lock:
        try:
            return importlib.import_module("torchvision")
        except RuntimeError as error:
            if "operator torchvision::" not in str(error):
                raise
        _define_missing_operators()
        for name in [name for name in sys.modules if name.startswith("torchvision.")]:
            del sys.modules[name]  # the failed import left them half set up
        torchvision = importlib.import_module("torchvision")
        _let_operators_speak_for_themselves()
        return torchvision


def _define_missing_operators() -> None:
    global _library
    if _library is None:
        _library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            _library.define(name + schema)
            _library.impl(name, _unavailable(name), "CompositeExplicitAutograd")


def _unavailable(name: str) -> Callable[..., None]:
    def kernel(*args: object) -> None:
        raise RuntimeError(
            f"torchvision::{name} is not available: this torchvision was built for CUDA and its compiled operators "
            "cannot be loaded beside CPU torch; install the builds of torch and torchvision that belong together, "
            "or use a model that does not need this operator"
        )

    return kernel


def _let_operators_speak_for_themselves() -> None:
    """Drop torchvision's own check, whose advice hides which operator was called."""
    for name, module in list(sys.modules.items()):
        if name.startswith("torchvision.ops.") and hasattr(module, "_assert_has_ops"):
            setattr(module, "_assert_has_ops", _accept)  # noqa: B010 (mypy knows no such attribute)


def _accept() -> None:
    """Stand in for torchvision's check; TorchScript compiles it where a model calls an operator."""
