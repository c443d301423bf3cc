"""Tokens-to-Token Vision Transformer (Yuan et al. 2021, "Tokens-to-Token ViT").

T2T-ViT-7: three soft splits (overlapping patches) with a linear-time transformer between them
(section 3.1 of the paper; Performer attention of Choromanski et al. 2021), then a plain ViT of
7 blocks. Parameter names are those of the authors' code.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ekd_ray.models.transformer import (
    IMAGE_SIZE,
    Block,
    attend,
    init_linear_layers,
    require_size,
    without_autocast,
)

# T2T-ViT-7 (table 2 of the paper).
_TOKEN_WIDTH, _WIDTH, _BLOCKS, _HEADS, _EXPANSION = 64, 256, 7, 4, 2


class TokenPerformer(nn.Module):
    """One-head transformer with attention linear in N: `[B, N, in_width]` -> `[B, N, width]`.

    Softmax attention is approximated with the positive random features of Performer (lemma 1:
    `phi(x) = exp(w x - |x|^2 / 2) / sqrt(m)`), `m = width / 2` orthogonal rows `w`. They are a
    buffer: drawn once, saved with the weights, never trained. The widths differ, so the values
    take the place of the input in the first residual sum, as published. Features and their
    products are computed in float32 at least, whatever autocast asks for: exponentials lose too
    much in bfloat16.
    """

    w: Tensor

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(in_width)
        self.kqv = nn.Linear(in_width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.features = width // 2
        rows = nn.init.orthogonal_(torch.empty(self.features, width))
        self.register_buffer("w", rows * math.sqrt(self.features))

    def forward(self, x: Tensor) -> Tensor:
        key, query, value = self.kqv(self.norm1(x)).chunk(3, dim=-1)
        with without_autocast(x):
            wide = torch.promote_types(key.dtype, torch.float32)
            key, query = self._phi(key.to(wide)), self._phi(query.to(wide))
            mixed = query @ (key.transpose(1, 2) @ value.to(wide))
            norm = query @ key.sum(1).unsqueeze(-1)
            attended = mixed / (norm + 1e-8)
        x = value + self.proj(attended.to(value.dtype))
        return x + self.mlp(self.norm2(x))

    def _phi(self, x: Tensor) -> Tensor:
        """Random features, `[B, N, width]` -> `[B, N, m]`."""
        exponent = x @ self.w.to(x.dtype).T - x.square().sum(-1, keepdim=True) / 2
        return exponent.exp() / math.sqrt(self.features)


class TokensToToken(nn.Module):
    """Soft splits with transformers between: `[B, 3, 224, 224]` -> `[B, 196, 256]`."""

    def __init__(self) -> None:
        super().__init__()
        self.attention1 = TokenPerformer(3 * 7 * 7, _TOKEN_WIDTH)
        self.attention2 = TokenPerformer(_TOKEN_WIDTH * 3 * 3, _TOKEN_WIDTH)
        self.project = nn.Linear(_TOKEN_WIDTH * 3 * 3, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention1(_soft_split(x, 7, stride=4, padding=2))
        x = self.attention2(_soft_split(_as_grid(x, IMAGE_SIZE // 4), 3, stride=2, padding=1))
        return self.project(_soft_split(_as_grid(x, IMAGE_SIZE // 8), 3, stride=2, padding=1))


class SelfAttention(nn.Module):
    """Multi-head self-attention without biases of query, key and value; shape kept."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        return self.proj(attend(query, key, value, self.heads))


class T2tVit7(nn.Module):
    """T2T-ViT-7: images `[B, 3, 224, 224]` -> logits `[B, num_classes]`, floating point.

    No dropout and no stochastic depth. Weights are drawn from torch's global generator:
    truncated normal (std 0.02) for linear layers and the class token; the sinusoid position
    table is a buffer. The forward raises UserError for images of another size.
    """

    pos_embed: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.tokens_to_token = TokensToToken()
        self.cls_token = nn.Parameter(torch.empty(1, 1, _WIDTH))
        tokens = (IMAGE_SIZE // 16) ** 2
        self.register_buffer("pos_embed", sinusoid_table(tokens + 1, _WIDTH))
        self.blocks = nn.ModuleList(
            Block(SelfAttention(_WIDTH, _HEADS), _WIDTH, _EXPANSION) for _ in range(_BLOCKS)
        )
        self.norm = nn.LayerNorm(_WIDTH)
        self.head = nn.Linear(_WIDTH, num_classes)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        init_linear_layers(self)

    def forward(self, x: Tensor) -> Tensor:
        require_size(x, (IMAGE_SIZE, IMAGE_SIZE), "T2T_ViT_7")
        x = self.tokens_to_token(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def _soft_split(grid: Tensor, kernel: int, *, stride: int, padding: int) -> Tensor:
    """Overlapping patches: `[B, C, H, W]` -> `[B, H / stride * W / stride, C * kernel ** 2]`."""
    return F.unfold(grid, kernel, padding=padding, stride=stride).transpose(1, 2)


def _as_grid(tokens: Tensor, side: int) -> Tensor:
    """`[B, side * side, width]` -> `[B, width, side, side]`."""
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def sinusoid_table(positions: int, width: int) -> Tensor:
    """Fixed position table `[1, positions, width]`, float32 (Vaswani et al. 2017, section 3.5).

    Column `2i` is `sin(p / 10000 ** (2i / width))`, column `2i + 1` the cosine of the same.
    """
    frequencies = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).float()[None]
