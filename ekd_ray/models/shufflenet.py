"""ShuffleNet V1 and V2 for 32 x 32 images (Zhang et al. 2018; Ma et al. 2018).

The variants of RepDistiller and mdistiller: a 1 x 1 stem at stride 1 without max pooling, then
three stages that halve the image; parameter names are theirs. V1 has 3 groups and 240, 480 and
960 channels, V2 is the one of width 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_STEM, _GROUPS = 24, 3


def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    """Interleave the channels of `groups` equal parts: `[B, C, H, W]` -> the same shape."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class GroupedUnit(nn.Module):
    """Unit of V1 (figure 2 b and c): grouped 1 x 1, shuffle, depthwise 3 x 3, grouped 1 x 1.

    Stride 1 adds the input: `[B, in_planes, H, W]` -> the same shape, `planes == in_planes`.
    Stride 2 appends the average-pooled input: -> `[B, planes + in_planes, H / 2, W / 2]`.
    The ReLU after the depthwise convolution, which the paper has not, is as published.
    """

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        # As in the paper: the stem has too few channels for groups.
        self.first_groups = 1 if in_planes == _STEM else _GROUPS
        inner = planes // 4
        self.conv1 = nn.Conv2d(in_planes, inner, 1, groups=self.first_groups, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, planes, 1, groups=_GROUPS, bias=False)
        self.bn3 = nn.BatchNorm2d(planes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = shuffle_channels(out, self.first_groups)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        if self.stride == 1:
            return F.relu(out + x, inplace=True)
        pooled = F.avg_pool2d(x, 3, stride=2, padding=1)
        return F.relu(torch.cat([out, pooled], 1), inplace=True)


class ShuffleV1(nn.Module):
    """ShuffleNet V1: images `[B, 3, H, W]` -> logits `[B, num_classes]`, floating point.

    Weights are drawn from torch's global generator with torch's defaults, as published.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, _STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM)
        self.layer1 = _grouped_stage(_STEM, 240, 4)
        self.layer2 = _grouped_stage(240, 480, 8)
        self.layer3 = _grouped_stage(480, 960, 4)
        self.linear = nn.Linear(960, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


class SplitUnit(nn.Module):
    """Unit of V2 at stride 1 (figure 3 c): half of the channels pass, half are convolved.

    `[B, planes, H, W]` -> the same shape.
    """

    def __init__(self, planes: int) -> None:
        super().__init__()
        half = planes // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        kept, out = x.chunk(2, dim=1)
        out = F.relu(self.bn1(self.conv1(out)), inplace=True)
        out = self.bn2(self.conv2(out))
        out = F.relu(self.bn3(self.conv3(out)), inplace=True)
        return shuffle_channels(torch.cat([kept, out], 1), 2)


class DownUnit(nn.Module):
    """Unit of V2 at stride 2 (figure 3 d): two convolved branches side by side.

    `[B, in_planes, H, W]` -> `[B, planes, H / 2, W / 2]`. Convolutions 1 and 2 are the short
    branch, 3 to 5 the long one.
    """

    def __init__(self, in_planes: int, planes: int) -> None:
        super().__init__()
        half = planes // 2
        self.conv1 = nn.Conv2d(
            in_planes, in_planes, 3, stride=2, padding=1, groups=in_planes, bias=False
        )
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv2 = nn.Conv2d(in_planes, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(in_planes, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = nn.Conv2d(half, half, 3, stride=2, padding=1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        short = self.bn1(self.conv1(x))
        short = F.relu(self.bn2(self.conv2(short)), inplace=True)
        long = F.relu(self.bn3(self.conv3(x)), inplace=True)
        long = self.bn4(self.conv4(long))
        long = F.relu(self.bn5(self.conv5(long)), inplace=True)
        return shuffle_channels(torch.cat([short, long], 1), 2)


class ShuffleV2(nn.Module):
    """ShuffleNet V2, width 1: images `[B, 3, H, W]` -> logits `[B, num_classes]`, floating point.

    As published, the stages have 4, 8 and 4 units. Weights are drawn from torch's global
    generator with torch's defaults, as published.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, _STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM)
        self.layer1 = _split_stage(_STEM, 116, 4)
        self.layer2 = _split_stage(116, 232, 8)
        self.layer3 = _split_stage(232, 464, 4)
        self.conv2 = nn.Conv2d(464, 1024, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1024)
        self.linear = nn.Linear(1024, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def _grouped_stage(in_planes: int, planes: int, units: int) -> nn.Sequential:
    # The first unit appends its input, so it adds only what is missing.
    first = GroupedUnit(in_planes, planes - in_planes, 2)
    return nn.Sequential(first, *(GroupedUnit(planes, planes, 1) for _ in range(units - 1)))


def _split_stage(in_planes: int, planes: int, units: int) -> nn.Sequential:
    return nn.Sequential(
        DownUnit(in_planes, planes), *(SplitUnit(planes) for _ in range(units - 1))
    )
