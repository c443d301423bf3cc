"""Several classifiers as one, whose logits are the log of a Dirichlet's concentration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ekd_ray.losses.dirichlet import log_concentration
from ekd_ray.losses.ensemble import ensemble_log_concentration


class Ensemble(nn.Module):
    """K classifiers of the same classes, each with its own normalisation of the images.

    Images [B, 3, H, W] of pixels in [0, 1] give `log a`, float32 [B, C], of the Dirichlet that has
    the members' moments (`ensemble_log_concentration`); its softmax is the mean of their class
    probabilities.

    Args:
        members: the networks, images [B, 3, H, W] -> logits [B, C]; 2 or more.

    What a member is read with are buffers, so that it travels with the weights: `mean` and `std`
    float32 [K, 3], of its images' channels; `evidential` bool [K], whether its logits are a
    Dirichlet's; `log_prior` float32 [K], that one's log of the prior mass per class.
    """

    mean: Tensor
    std: Tensor
    evidential: Tensor
    log_prior: Tensor

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        count = len(members)
        self.register_buffer("mean", torch.zeros(count, 3))
        self.register_buffer("std", torch.ones(count, 3))
        self.register_buffer("evidential", torch.zeros(count, dtype=torch.bool))
        self.register_buffer("log_prior", torch.zeros(count))

    def forward(self, images: Tensor) -> Tensor:
        """`log a` float32 [B, C] of images [B, 3, H, W]; no gradient flows."""
        mean, std = (of[:, :, None, None].to(images) for of in (self.mean, self.std))
        logits = torch.stack(
            [net((images - mean[k]) / std[k]).double() for k, net in enumerate(self.members)]
        )
        log_a = torch.stack(
            [log_concentration(z, prior) for z, prior in zip(logits, self.log_prior, strict=True)]
        )
        is_dirichlet = self.evidential[:, None]
        masses = torch.where(is_dirichlet[:, :, None], log_a, logits)
        precisions = log_a.logsumexp(dim=2).masked_fill(~is_dirichlet, torch.inf)
        return ensemble_log_concentration(masses.log_softmax(dim=2), precisions).float()
