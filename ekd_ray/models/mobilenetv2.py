"""MobileNetV2 of half width for 32 x 32 images (Sandler et al. 2018, "MobileNetV2").

The variant of RepDistiller and mdistiller (`mobile_half`): expansion 6, ReLU in place of ReLU6,
strides for small images, no dropout; parameter names are theirs.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from ekd_ray.models.resnet import build_stage, init_convolutions

# (expansion, channels at half width, blocks, stride of the first block), stage by stage.
_STAGES = (
    (1, 8, 1, 1),
    (6, 12, 2, 1),
    (6, 16, 3, 2),
    (6, 32, 4, 2),
    (6, 48, 3, 1),
    (6, 80, 3, 2),
    (6, 160, 1, 1),
)
_STEM, _HEAD = 16, 1280


class InvertedResidual(nn.Module):
    """1 x 1 expansion, 3 x 3 depthwise and 1 x 1 linear convolution (section 3.3 of the paper).

    `[B, in_planes, H, W]` -> `[B, planes, H / stride, W / stride]`; the input is added where the
    shape stays. As published, the 1 x 1 expansion is there for an expansion of 1 as well.
    """

    def __init__(self, in_planes: int, planes: int, stride: int, expansion: int) -> None:
        super().__init__()
        self.residual = stride == 1 and in_planes == planes
        inner = in_planes * expansion
        self.conv = nn.Sequential(
            *_conv_bn_relu(in_planes, inner, 1),
            *_conv_bn_relu(inner, inner, 3, stride=stride, groups=inner),
            nn.Conv2d(inner, planes, 1, bias=False),
            nn.BatchNorm2d(planes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """MobileNetV2, width 0.5: images `[B, 3, H, W]` -> logits `[B, num_classes]`, floating point.

    Weights are drawn from torch's global generator: Kaiming normal (fan-out) for convolutions,
    N(0, 0.01) for the classifier, zero for its bias.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(*_conv_bn_relu(3, _STEM, 3, stride=2))
        self.blocks = nn.ModuleList()
        in_planes = _STEM
        for expansion, planes, blocks, stride in _STAGES:
            block = partial(InvertedResidual, expansion=expansion)
            self.blocks.append(build_stage(block, in_planes, planes, blocks, stride))
            in_planes = planes
        self.conv2 = nn.Sequential(*_conv_bn_relu(in_planes, _HEAD, 1))
        linear = nn.Linear(_HEAD, num_classes)
        # The published name is classifier.0.
        self.classifier = nn.Sequential(linear)
        init_convolutions(self)
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for stage in self.blocks:
            x = stage(x)
        return self.classifier(F.adaptive_avg_pool2d(self.conv2(x), 1).flatten(1))


def _conv_bn_relu(
    in_planes: int, planes: int, kernel: int, *, stride: int = 1, groups: int = 1
) -> tuple[nn.Module, ...]:
    padding = kernel // 2
    return (
        nn.Conv2d(in_planes, planes, kernel, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(planes),
        nn.ReLU(inplace=True),
    )
