"""Detectors of torchvision: SSD, Faster R-CNN and Mask R-CNN, with weights that are drawn."""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

from torch import nn

from normwise.lab.errors import UsageError, nearest
from normwise.lab.imports import reason

__all__ = ["DETECTORS", "detector"]

DETECTORS = (
    "torchvision:ssd300_vgg16",
    "torchvision:fasterrcnn_resnet50_fpn",
    "torchvision:fasterrcnn_resnet101_fpn",
    "torchvision:maskrcnn_resnet50_fpn",
    "torchvision:maskrcnn_resnet101_fpn",
)


def detector(name: str, classes: int, size: tuple[int, int]) -> nn.Module:
    """A detector that takes images in [0, 1], and targets in training, as torchvision's do.

    Its class 0 is the background. All layers are trained, BatchNorm included, which torchvision
    freezes in backbones that it downloads; nothing is downloaded. SSD scales images to 300×300
    pixels itself.

    Args:
        name: one in ``DETECTORS``.
        classes: how many, without the background.
        size: height and width of the images, in pixels.

    Raises:
        UsageError: for another name, or without torchvision.
    """
    if name not in DETECTORS:
        raise UsageError(f"unknown network {name!r}: {nearest(name, DETECTORS)}")
    try:
        detection: Any = import_module("torchvision.models.detection")
    except Exception as error:  # one that does not fit torch fails in its own ways
        raise UsageError(
            f'{name} needs torchvision ({reason(error)}): pip install "normwise[vision]"'
        ) from None
    if name == "torchvision:ssd300_vgg16":
        made: nn.Module = detection.ssd300_vgg16(
            weights=None, weights_backbone=None, num_classes=classes + 1
        )
        return made
    depth = re.findall(r"resnet\d+", name)[0]
    backbone = import_module("torchvision.models.detection.backbone_utils").resnet_fpn_backbone(
        backbone_name=depth, weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
    )
    kind = detection.MaskRCNN if "mask" in name else detection.FasterRCNN
    made = kind(backbone, num_classes=classes + 1, min_size=min(size), max_size=max(size))
    return made
