"""ResNet-18, -34 and -50 for 32 x 32 images (He et al. 2016, table 1, with a 3 x 3 stem).

Four stages as for ImageNet, but a 3 x 3 stem of 64 channels at stride 1 and no max pooling, as
in mdistiller (and pytorch-cifar): shortcuts are called `shortcut` and the classifier `linear`.
The ImageNet forms are `torchvision:resnet18`, `torchvision:resnet34`, `torchvision:resnet50`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ekd_ray.models.resnet import init_convolutions

# Blocks in the four stages.
_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with batch norm, added to the shortcut, then ReLU.

    `[B, in_planes, H, W]` -> `[B, planes, H / stride, W / stride]`.
    """

    expansion = 1

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

    `[B, in_planes, H, W]` -> `[B, 4 * planes, H / stride, W / stride]`.
    """

    expansion = 4

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, self.expansion * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(self.expansion * planes)
        self.shortcut = _shortcut(in_planes, self.expansion * planes, stride)

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
        block = Bottleneck if depth >= 50 else BasicBlock
        times = block.expansion
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _stage(block, 64, 64, blocks[0], 1)
        self.layer2 = _stage(block, 64 * times, 128, blocks[1], 2)
        self.layer3 = _stage(block, 128 * times, 256, blocks[2], 2)
        self.layer4 = _stage(block, 256 * times, 512, blocks[3], 2)
        self.linear = nn.Linear(512 * times, num_classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def _stage(
    block: type[BasicBlock] | type[Bottleneck],
    in_planes: int,
    planes: int,
    blocks: int,
    stride: int,
) -> nn.Sequential:
    first = block(in_planes, planes, stride)
    rest = (block(planes * block.expansion, planes, 1) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)


def _shortcut(in_planes: int, planes: int, stride: int) -> nn.Sequential:
    """A 1 x 1 convolution with batch norm where the shape changes, else the identity."""
    if stride == 1 and in_planes == planes:
        return nn.Sequential()
    return nn.Sequential(
        nn.Conv2d(in_planes, planes, 1, stride=stride, bias=False), nn.BatchNorm2d(planes)
    )
