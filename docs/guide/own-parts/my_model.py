"""A model of one's own: a small convolutional network for images of any size."""

from torch import nn

import ekd_ray as ekd


def build_tiny(num_classes: int, width: int = 16) -> nn.Module:
    """Images [B, 3, H, W] -> logits [B, num_classes]."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, num_classes),
    )


def build_wide(num_classes: int) -> nn.Module:
    """The teacher: the same, four times as wide."""
    return build_tiny(num_classes, width=64)


ekd.register_model("tiny", build_tiny)
ekd.register_model("wide", build_wide)
