"""ResNet-18, -34 and -50 for 32 x 32 images (He et al. 2016, table 1, with a 3 x 3 stem).

Four stages as for ImageNet, but a 3 x 3 stem of 64 channels at stride 1 and no max pooling, as
in mdistiller (and pytorch-cifar): shortcuts are called `shortcut` and the classifier `linear`.
The ImageNet forms are `torchvision:resnet18`, `torchvision:resnet34`, `torchvision:resnet50`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ekd_ray.models.resnet import build_projection, build_stage, init_convolutions

# Blocks in the four stages.
_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with batch norm, added to the shortcut, then ReLU.

    `[B, in_planes, H, W]` -> `[B, planes, H / stride, W / stride]`.
    """

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = _shortcut(in_planes, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x), inplace=True)


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 (with the stride) and 1 x 1 convolution, added to the shortcut, then ReLU.

    `[B, in_planes, H, W]` -> `[B, planes, H / stride, W / stride]`, a quarter as wide inside.
    """

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        inner = planes // 4
        self.conv1 = nn.Conv2d(in_planes, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes)
        self.shortcut = _shortcut(in_planes, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x), inplace=True)


class LargeResNet(nn.Module):
    """ResNet-depth: images `[B, 3, H, W]` -> logits `[B, num_classes]`, floating point.

    `depth` is 18, 34 (basic blocks) or 50 (bottlenecks); the zoo passes no other (KeyError).
    Weights are drawn from torch's global generator: Kaiming normal (fan-out) for convolutions,
    torch's default for the classifier.
    """

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        blocks = _BLOCKS[depth]
        block, times = (Bottleneck, 4) if depth >= 50 else (BasicBlock, 1)
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = build_stage(block, 64, 64 * times, blocks[0], 1)
        self.layer2 = build_stage(block, 64 * times, 128 * times, blocks[1], 2)
        self.layer3 = build_stage(block, 128 * times, 256 * times, blocks[2], 2)
        self.layer4 = build_stage(block, 256 * times, 512 * times, blocks[3], 2)
        self.linear = nn.Linear(512 * times, num_classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def _shortcut(in_planes: int, planes: int, stride: int) -> nn.Sequential:
    """A projection where the shape changes, else the identity."""
    same = stride == 1 and in_planes == planes
    return nn.Sequential() if same else build_projection(in_planes, planes, stride)
