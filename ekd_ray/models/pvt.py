"""Pyramid Vision Transformer, version 1 (Wang et al. 2021, "Pyramid Vision Transformer").

Four stages of spatial-reduction attention (section 3.3 of the paper) on ever fewer and wider
tokens; the class token joins the last stage. Parameter names are those of the authors' code.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ekd_ray.models.transformer import IMAGE_SIZE, Block, attend, init_linear_layers, require_size

# PVT-Tiny (table 1 of the paper), stage by stage.
_PATCH = (4, 2, 2, 2)
_WIDTH = (64, 128, 320, 512)
_BLOCKS = (2, 2, 2, 2)
_HEADS = (1, 2, 5, 8)
_REDUCTION = (8, 4, 2, 1)
_EXPANSION = (8, 8, 4, 4)


class PatchEmbed(nn.Module):
    """Tokens of square patches: `[B, C, H, W]` -> `[B, (H / patch) * (W / patch), width]`."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


class SpatialReductionAttention(nn.Module):
    """Attention whose keys and values are tokens of `reduction` x `reduction` neighbours.

    `[B, N, width]` -> the same shape. N is `side * side` where `reduction` is above 1; a
    reduction of 1 is plain attention, of any N.
    """

    def __init__(self, width: int, heads: int, reduction: int, side: int) -> None:
        super().__init__()
        self.heads, self.reduction, self.side = heads, reduction, side
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        if reduction > 1:
            self.sr = nn.Conv2d(width, width, reduction, stride=reduction)
            self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        reduced = x
        if self.reduction > 1:
            grid = x.transpose(1, 2).unflatten(2, (self.side, self.side))
            reduced = self.norm(self.sr(grid).flatten(2).transpose(1, 2))
        key, value = self.kv(reduced).chunk(2, dim=-1)
        return self.proj(attend(self.q(x), key, value, self.heads))


class PvtTiny(nn.Module):
    """PVT-Tiny: images `[B, 3, 224, 224]` -> logits `[B, num_classes]`, floating point.

    No dropout and no stochastic depth. Weights are drawn from torch's global generator:
    truncated normal (std 0.02) for linear layers, position tables and the class token, torch's
    default for convolutions. The forward raises UserError for images of another size.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        side, channels = IMAGE_SIZE, 3
        for index, (patch, width) in enumerate(zip(_PATCH, _WIDTH, strict=True)):
            side //= patch
            positions = nn.Parameter(torch.empty(1, side * side + (index == 3), width))
            attentions = (
                SpatialReductionAttention(width, _HEADS[index], _REDUCTION[index], side)
                for _ in range(_BLOCKS[index])
            )
            blocks = (Block(a, width, _EXPANSION[index], eps=1e-6) for a in attentions)
            # The published names have no list level: patch_embed1 ... block4.
            self.add_module(f"patch_embed{index + 1}", PatchEmbed(channels, width, patch))
            self.register_parameter(f"pos_embed{index + 1}", positions)
            self.add_module(f"block{index + 1}", nn.ModuleList(blocks))
            nn.init.trunc_normal_(positions, std=0.02)
            channels = width
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.cls_token = nn.Parameter(torch.empty(1, 1, channels))
        self.head = nn.Linear(channels, num_classes)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        init_linear_layers(self)

    def forward(self, x: Tensor) -> Tensor:
        require_size(x, (IMAGE_SIZE, IMAGE_SIZE), "PVT_Ti")
        side = IMAGE_SIZE
        for stage, patch in enumerate(_PATCH, start=1):
            x = getattr(self, f"patch_embed{stage}")(x)
            if stage == 4:
                x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
            x = x + getattr(self, f"pos_embed{stage}")
            for block in getattr(self, f"block{stage}"):
                x = block(x)
            side //= patch
            if stage < 4:
                x = x.transpose(1, 2).unflatten(2, (side, side))
        return self.head(self.norm(x)[:, 0])
