"""The part of a run that learns: the student and its objective, and the optimizer of both."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from ekd_ray.config import DistillConfig
from ekd_ray.engine import ranks
from ekd_ray.engine.teacher.source import TeacherLogits
from ekd_ray.engine.torch_private import untraced_optimizer
from ekd_ray.losses.objective import Objective

SGD, AdamW = untraced_optimizer(torch.optim.SGD), untraced_optimizer(torch.optim.AdamW)


class Learner(nn.Module):
    """Student and objective as one module, so that DDP and checkpoints see all parameters.

    With `compiled` the student trains as one compiled program. It is evaluated as it is: other
    batch sizes and batch norm's other mode would each cost a compilation.
    """

    def __init__(self, student: nn.Module, objective: Objective, *, compiled: bool = False) -> None:
        super().__init__()
        self.student = student
        self.objective = objective
        self._student: Callable[[Tensor], Tensor] = student.__call__
        if compiled:
            # Trials that follow each other in a process are other modules: without this the
            # ninth would silently run uncompiled. What they compiled is kept on disk.
            torch.compiler.reset()
            self._student = torch.compile(student.forward, dynamic=False)

    def forward(
        self,
        inputs: Tensor,
        teacher: TeacherLogits | None,
        target: Tensor,
        epoch: int,
        strong_inputs: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Loss, logits and terms of the batch of all ranks, on each of them.

        Args:
            inputs, strong_inputs: this rank's rows, as the student sees them.
            teacher, target: of the rows of all ranks, because losses couple the samples of a
                batch (medians, Gram matrices).

        Returns:
            The 0-d total (see `Objective.forward`), the student's logits [B, C] and the 0-d
            unweighted terms by name.
        """
        views = [self._student(inputs)]
        if strong_inputs is not None:
            # A pass of its own, as published: each view has its own batch statistics.
            views.append(self._student(strong_inputs))
        views = ranks.gather_columns(views, len(target))
        total, terms = self.objective(
            views[0],
            teacher.weak if teacher else None,
            target,
            epoch,
            student_strong=views[1] if len(views) > 1 else None,
            teacher_strong=teacher.strong if teacher else None,
        )
        return total, views[0], terms


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
