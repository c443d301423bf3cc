"""The part of a run that learns: the student and its objective, and the optimizer of both."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ekd_ray.config import DistillConfig
from ekd_ray.engine import ranks
from ekd_ray.engine.features import record_features
from ekd_ray.engine.teacher.source import TeacherOutputs
from ekd_ray.losses.objective import Objective
from ekd_ray.losses.torch_private import untraced_optimizer

SGD, AdamW = untraced_optimizer(torch.optim.SGD), untraced_optimizer(torch.optim.AdamW)


class Learner(nn.Module):
    """Student and objective as one module, so that DDP and checkpoints see all parameters.

    `sums`, float64 [2 + T], has the running sums of an epoch: the loss, the share of correct
    answers and the T unweighted terms.
    """

    sums: Tensor

    def __init__(self, student: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.student = student
        self.objective = objective
        self.terms = tuple(objective.weights(1))  # those of any other epoch
        self.parts = objective.config.accumulation_steps
        sums = torch.zeros(2 + len(self.terms), dtype=torch.float64)
        self.register_buffer("sums", sums, persistent=False)

    def forward(
        self,
        inputs: Tensor,
        teacher: TeacherOutputs | None,
        target: Tensor,
        epoch: int | Tensor,
        strong_inputs: Tensor | None = None,
        shares: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Loss, logits and terms of the batch of all ranks, on each of them; adds to `sums`.

        Args:
            inputs, strong_inputs: this rank's rows, as the student sees them.
            teacher, target: of the rows of all ranks, because losses couple the samples of a
                batch (medians, Gram matrices).
            epoch: counted from 1, or `Objective.factors` of it.
            shares: those of the classes [B, C] in pictures that are mixed, of the rows of all
                ranks.

        Returns:
            The 0-d total (see `Objective.forward`), and without gradient the student's logits
            [B, C] and the 0-d unweighted terms by name.
        """
        weak, features = self._look(inputs)
        views = [weak]
        if strong_inputs is not None:
            # A pass of its own, as published: each view has its own batch statistics.
            views.append(self.student(strong_inputs))
        views = ranks.gather_columns(views, len(target))
        total, terms = self.objective(
            views[0],
            teacher.weak if teacher else None,
            target,
            epoch,
            shares=shares,
            student_strong=views[1] if len(views) > 1 else None,
            teacher_strong=teacher.strong if teacher else None,
            student_features=[ranks.gather_rows(feature, len(target)) for feature in features],
            teacher_features=teacher.features if teacher else (),
            class_cosines=teacher.class_cosines if teacher else None,
        )
        with torch.no_grad():
            correct = (views[0].argmax(dim=1) == target).double().mean()
            found = torch.stack([total, correct, *(terms[name] for name in self.terms)]).double()
            self.sums.add_(found / self.parts if self.parts > 1 else found)
        return total, views[0].detach(), terms

    def _look(self, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The student's logits, and its features where the method reads any."""
        layers = self.objective.method.student_layers
        if not layers:  # what is compiled has no hooks
            return self.student(inputs), []
        with record_features(self.student, layers) as features:
            logits = self.student(inputs)
        return logits, features

    def means(self, steps: int) -> dict[str, float]:
        """`train_loss`, `train_top1` and `loss_<term>`, the same on every rank (waits for the
        device)."""
        names = ("train_loss", "train_top1", *(f"loss_{name}" for name in self.terms))
        return dict(zip(names, ranks.from_first((self.sums / steps).tolist()), strict=True))


def make_optimizer(config: DistillConfig, learner: Learner) -> torch.optim.Optimizer:
    """The optimizer that the configuration names, over student and objective."""
    shared = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": True}
    if config.optimizer == "adamw":
        return AdamW(learner.parameters(), **shared)
    momentum = {"momentum": config.momentum, "nesterov": config.nesterov}
    optimizer = SGD(learner.parameters(), **shared, **momentum)
    if config.momentum:
        # By itself the fused kernel makes them in its first step, and leaves them as the memory was
        # if float16 skips that one.
        for parameter in learner.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return cast(torch.optim.Optimizer, optimizer)


class Averages:
    """Exponential moving averages of a learner's weights and statistics, as another `learner`.

    After n steps the decay is at most (1 + n) / (10 + n), so that the drawn weights are soon
    forgotten.
    """

    def __init__(self, learner: Learner, decay: float) -> None:
        self.learner = copy.deepcopy(learner).requires_grad_(False)
        self._decay = decay
        pairs = list(zip(_averaged(self.learner), _averaged(learner), strict=True))
        self._moved = [pair for pair in pairs if pair[0].is_floating_point()]
        self._counts = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def move(self, steps: int) -> None:
        """Towards the learner after a step, `steps` others having gone before; no host waits."""
        decay = min(self._decay, (1 + steps) / (10 + steps))
        averages, values = map(list, zip(*self._moved, strict=True))
        # `AveragedModel`, whose function this is, copies a count to the device and waits for it.
        get_ema_multi_avg_fn(decay)(averages, values, steps)
        for average, value in self._counts:
            average.copy_(value)


def _averaged(learner: Learner) -> Iterator[Tensor]:
    return itertools.chain(learner.parameters(), learner.student.buffers())
