"""A torchvision detector, end to end: anchors, decoding, non-maximum suppression with as many boxes as the data gives.

The torchvision here may lack its compiled operators (it is built for CUDA); then `nms` is written in Python for these tests.
"""

from __future__ import annotations

import pytest
import torch

from ir_tools.torchvision_ops import import_torchvision
from passes import load, optimize
from tests.models import SEED, randomize_batch_norm

torchvision = import_torchvision()


def suppressed(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """The boxes that overlap no better one by more than `iou_threshold`, best first."""
    left, kept = scores.argsort(descending=True), []
    while left.numel():
        kept.append(int(left[0]))
        left = left[1:][torchvision.ops.box_iou(boxes[left[:1]], boxes[left[1:]])[0] <= iou_threshold]
    return torch.tensor(kept, dtype=torch.int64)


@pytest.fixture(scope="module", autouse=True)
def nms():
    """An `nms` that works, whichever torchvision this is."""
    try:
        torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
        yield
    except RuntimeError:
        library = torch.library.Library("torchvision", "IMPL")
        library.impl("nms", suppressed, "CPU")
        yield
        library._destroy()


@pytest.fixture(scope="module")
def detector():
    detection = torchvision.models.detection
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(SEED)
        backbone = detection.backbone_utils._mobilenet_extractor(
            torchvision.models.mobilenet_v2(weights=None), fpn=True, trainable_layers=6, returned_layers=[4, 5]
        )
        anchors = detection.anchor_utils.AnchorGenerator(((32,), (64,), (128,)), ((1.0,),) * 3)
        sizes = {"min_size": 64, "max_size": 96, "detections_per_img": 6, "topk_candidates": 20}
        model = detection.RetinaNet(backbone, num_classes=3, anchor_generator=anchors, **sizes).eval()
        randomize_batch_norm(model)
        torch.nn.init.zeros_(model.head.classification_head.cls_logits.bias)  # scores worth a detection
    return model


def test_a_trace_of_a_detector_follows_the_data(detector, tmp_path):
    images = [torch.rand(3, 64, 80, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    fast = optimize(detector, "fuse_conv_bn_relu", example_inputs=([images[0]],), frontend="trace")
    folded = next(step for step in fast.report.steps if step.name == "fuse_conv_bn").rewrites
    norms = [m for m in detector.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(folded) == len(norms) > 40
    fast.save(tmp_path / "detector.pt")
    loaded = load(tmp_path / "detector.pt")
    for image in images:
        with torch.no_grad():
            (expected,) = detector([image])
        assert expected["boxes"].numel()
        for got in (fast([image])[0], loaded([image])[0]):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
