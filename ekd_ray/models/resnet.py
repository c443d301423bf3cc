"""Residual networks for 32 x 32 images (He et al. 2016, "Deep Residual Learning", section 4.2).

Depth is `6n + 2`: a 3 x 3 stem, three stages of `n` two-convolution blocks, global average
pooling and one linear classifier `fc`. Two kinds of shortcut exist in published weights:

- option B (`resnet20`, ...): a 1 x 1 convolution with batch norm where the shape changes, as in
  mdistiller and RepDistiller; parameter names are those of mdistiller.
- option A (`resnet20a`, ...): no parameters; the input is subsampled and padded with zero
  channels, as in the paper and in the akamaster weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Shortcut = Literal["A", "B"]


class PaddedShortcut(nn.Module):
    """Option A: every second pixel, and zero channels added evenly on both sides.

    `[B, C, H, W]` -> `[B, C + 2 * padding, ceil(H / 2), ceil(W / 2)]`, same dtype.
    """

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with batch norm, added to the shortcut, then ReLU.

    `[B, in_planes, H, W]` -> `[B, planes, H / stride, W / stride]`.
    """

    def __init__(self, in_planes: int, planes: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_planes != planes:
            self.downsample = (
                PaddedShortcut((planes - in_planes) // 2)
                if shortcut == "A"
                else build_projection(in_planes, planes, stride)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)), inplace=True)


class CifarResNet(nn.Module):
    """A CIFAR ResNet: images `[B, 3, H, W]` -> logits `[B, num_classes]`, floating point.

    `widths` are the channels of the stem and of the three stages. `depth` must be `6n + 2`;
    the zoo passes no other (ValueError). Weights are drawn from torch's global generator:
    Kaiming normal (fan-out) for convolutions, torch's default for the classifier.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int,
        *,
        widths: tuple[int, int, int, int] = (16, 16, 32, 64),
        shortcut: Shortcut = "B",
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth must be 6n + 2 with n >= 1, got {depth}")
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        block = partial(BasicBlock, shortcut=shortcut)
        self.layer1 = build_stage(block, widths[0], widths[1], blocks, 1)
        self.layer2 = build_stage(block, widths[1], widths[2], blocks, 2)
        self.layer3 = build_stage(block, widths[2], widths[3], blocks, 2)
        self.fc = nn.Linear(widths[3], num_classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        # Adaptive pooling: the published 8 x 8 average, and other image sizes work as well.
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def build_stage(
    block: Callable[[int, int, int], nn.Module],
    in_planes: int,
    planes: int,
    blocks: int,
    stride: int,
) -> nn.Sequential:
    """A row of `block(in_planes, planes, stride)`; the first changes channels and image size."""
    first = block(in_planes, planes, stride)
    return nn.Sequential(first, *(block(planes, planes, 1) for _ in range(blocks - 1)))


def build_projection(in_planes: int, planes: int, stride: int) -> nn.Sequential:
    """A 1 x 1 convolution with batch norm: a shortcut where the shape changes."""
    return nn.Sequential(
        nn.Conv2d(in_planes, planes, 1, stride=stride, bias=False), nn.BatchNorm2d(planes)
    )


def init_convolutions(model: nn.Module) -> None:
    """Kaiming-normal, fan-out, ReLU gain for every convolution, in module order, and zero biases.

    Batch norms keep torch's default, which is the published one (weight 1, bias 0).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
