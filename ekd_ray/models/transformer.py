"""Parts that the vision transformers of the zoo share: image size, feed-forward, first weights."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ekd_ray.errors import UserError

#: Side in pixels of the images that the zoo's transformers are made for.
IMAGE_SIZE = 224


def require_size(images: Tensor, size: tuple[int, int], model_name: str) -> None:
    """Raise UserError unless `images` `[B, 3, H, W]` have H and W of `size`.

    The position table of a vision transformer fits one image size.
    """
    height, width = images.shape[-2:]
    if (height, width) != size:
        raise UserError(
            f"the model {model_name!r} takes images of {size[0]} x {size[1]} pixels, got "
            f"{height} x {width}: resize the images, or choose a model for their size."
        )


class Mlp(nn.Module):
    """Linear, GELU, linear on the last dimension: `[..., width]` -> `[..., width]`."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block around an attention: `[B, N, width]` -> the same shape."""

    def __init__(self, attention: nn.Module, width: int, expansion: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = attention
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, width * expansion)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Scaled dot-product attention with `heads` heads, before the output projection.

    `query` is `[B, N, D]`, `key` and `value` are `[B, M, D]`; returns `[B, N, D]`.
    """
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def init_linear_layers(model: nn.Module) -> None:
    """Truncated normal, std 0.02, for every linear layer in module order, and zero biases.

    Convolutions and layer norms keep torch's defaults, as in the published code.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Leave autocast on the device of `x`; the meta device, which counts costs, has none."""
    if torch.amp.is_autocast_available(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()
