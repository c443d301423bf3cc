"""Several classifiers as one, each with its own normalisation of the images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Ensemble(nn.Module):
    """K classifiers of the same classes; its logits are the log of their mean probabilities.

    Args:
        members: the networks, images [B, 3, H, W] -> logits [B, C]; 2 or more.

    What a member is read with are buffers, so that it travels with the weights: `mean` and `std`
    float32 [K, 3], of its images' channels, for pixels in [0, 1]; `evidential` bool [K], whether
    its logits are a Dirichlet's; `log_prior` float32 [K], that one's log of the prior mass per
    class.
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

    def answers(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(log-probabilities [K, B, C], log-precisions [K, B]) of each member, float64.

        Of an evidential member those of its Dirichlet's mean and its total concentration; a
        softmax's precision is infinite.
        """
        mean, std = (of[:, :, None, None].to(images) for of in (self.mean, self.std))
        masses = torch.stack(
            [net((images - mean[k]) / std[k]).double() for k, net in enumerate(self.members)]
        )
        prior = self.log_prior.double().masked_fill(~self.evidential, -math.inf)
        masses = torch.logaddexp(masses, prior[:, None, None])
        precisions = masses.logsumexp(dim=2).masked_fill(~self.evidential[:, None], math.inf)
        return masses.log_softmax(dim=2), precisions

    def forward(self, images: Tensor) -> Tensor:
        """The log of the mean class probabilities, float32 [B, C], of images [B, 3, H, W]."""
        logs, _ = self.answers(images)
        return (logs.logsumexp(dim=0) - math.log(len(logs))).float()
