"""VGG networks for 32 x 32 images (Simonyan & Zisserman 2015, with batch norm).

The variants of RepDistiller and mdistiller: five blocks of 3 x 3 convolutions, global average
pooling and one linear `classifier` in place of the paper's three; parameter names are theirs.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ekd_ray.models.resnet import init_convolutions

# Channels of the convolutions, block by block: the paper's configurations A, B, D and E, and the
# 8-layer one of RepDistiller.
_CHANNELS: dict[int, tuple[tuple[int, ...], ...]] = {
    8: ((64,), (128,), (256,), (512,), (512,)),
    11: ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    13: ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512)),
    16: ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3),
    19: ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4),
}


class Vgg(nn.Module):
    """VGG-depth: images `[B, 3, H, W]` -> logits `[B, num_classes]`, floating point.

    `depth` is 8, 11, 13, 16 or 19; the zoo passes no other (KeyError). As published, 64 rows of
    pixels are halved four times and every other size three times. Weights are drawn from
    torch's global generator: Kaiming normal (fan-out) for convolutions, N(0, 0.01) for the
    classifier, zero for all biases.
    """

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        channels = _CHANNELS[depth]
        self.block0 = _block(3, channels[0])
        self.block1 = _block(channels[0][-1], channels[1])
        self.block2 = _block(channels[1][-1], channels[2])
        self.block3 = _block(channels[2][-1], channels[3])
        self.block4 = _block(channels[3][-1], channels[4])
        self.classifier = nn.Linear(channels[4][-1], num_classes)
        init_convolutions(self)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[2]
        for block in (self.block0, self.block1, self.block2):
            x = F.max_pool2d(block(x), 2)
        x = self.block3(x)
        if rows == 64:
            x = F.max_pool2d(x, 2)
        return self.classifier(F.adaptive_avg_pool2d(self.block4(x), 1).flatten(1))


def _block(in_planes: int, channels: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for planes in channels:
        layers += [
            nn.Conv2d(in_planes, planes, 3, padding=1),
            nn.BatchNorm2d(planes),
            nn.ReLU(inplace=True),
        ]
        in_planes = planes
    return nn.Sequential(*layers)
