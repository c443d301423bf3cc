"""Wide residual networks for 32 x 32 images (Zagoruyko & Komodakis 2016, "Wide ResNets").

Pre-activation blocks (batch norm and ReLU before each convolution), depth `6n + 4`, width
factor `k`. Parameter names are those of mdistiller. No dropout: none of the published
distillation pairs uses it.
"""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from ekd_ray.models.resnet import build_stage, init_convolutions


class WideBlock(nn.Module):
    """Pre-activation block: `[B, in_planes, H, W]` -> `[B, planes, H / stride, W / stride]`.

    Where the shape changes, the 1 x 1 convolution of the shortcut reads the *activated* input;
    elsewhere the shortcut is the raw input.
    """

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        # Decided by the width alone: with k = 1 the first block keeps its 16 channels.
        self.convShortcut = (
            nn.Conv2d(in_planes, planes, 1, stride=stride, bias=False)
            if in_planes != planes
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x), inplace=True)
        out = F.relu(self.bn2(self.conv1(active)), inplace=True)
        return self.conv2(out) + (x if self.convShortcut is None else self.convShortcut(active))


class WideResNet(nn.Module):
    """WRN-depth-widen: images `[B, 3, H, W]` -> logits `[B, num_classes]`, floating point.

    `depth` must be `6n + 4`; the zoo passes no other (ValueError). Weights are drawn from
    torch's global generator: Kaiming normal (fan-out) for convolutions, zero classifier bias.
    """

    def __init__(self, depth: int, widen: int, num_classes: int) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth must be 6n + 4 with n >= 1, got {depth}")
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = _stage(16, 16 * widen, blocks, 1)
        self.block2 = _stage(16 * widen, 32 * widen, blocks, 2)
        self.block3 = _stage(32 * widen, 64 * widen, blocks, 2)
        self.bn1 = nn.BatchNorm2d(64 * widen)
        self.fc = nn.Linear(64 * widen, num_classes)
        init_convolutions(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        x = F.relu(self.bn1(x), inplace=True)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def _stage(in_planes: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
    # The published names have a level `layer` between the stage and its blocks.
    layer = build_stage(WideBlock, in_planes, planes, blocks, stride)
    return nn.Sequential(OrderedDict(layer=layer))
