"""What learns in a run: the student and its objective, and the optimizer of both."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ekd_ray.config import DistillConfig
from ekd_ray.engine import ranks
from ekd_ray.losses.objective import Objective


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
        teacher_logits: Tensor | None,
        target: Tensor,
        epoch: int,
        strong_inputs: Tensor | None = None,
        teacher_strong: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Loss, logits and terms of the batch of all ranks, on each of them.

        Args:
            inputs, strong_inputs: this rank's rows, as the student sees them.
            teacher_logits, teacher_strong, target: of the rows of all ranks, for losses couple
                the samples of a batch (medians, Gram matrices).

        Returns:
            The 0-d total (see `Objective.forward`), the student's logits [B, C] and the 0-d
            unweighted terms by name.
        """
        logits = self._student(inputs)
        # A pass of its own, as published: each view has its own batch statistics.
        views = [logits] if strong_inputs is None else [logits, self._student(strong_inputs)]
        views = ranks.gather_columns(views, len(target))
        total, terms = self.objective(
            views[0],
            teacher_logits,
            target,
            epoch,
            student_strong=None if strong_inputs is None else views[1],
            teacher_strong=teacher_strong,
        )
        return total, views[0], terms


def _untraced(optimizer: type[torch.optim.Optimizer]) -> type[Any]:
    """An optimizer of torch as it is below what keeps `torch.compile` from tracing it.

    Nothing traces an optimizer here, and that layer imports the tracer at the first step: 2 s and
    80 MB of every trial's process.
    """
    names = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    plain = {name: inspect.unwrap(getattr(optimizer, name)) for name in names}
    step = torch.no_grad()(inspect.unwrap(optimizer.step))
    return type(optimizer.__name__, (optimizer,), {**plain, "step": step})


SGD, AdamW = _untraced(torch.optim.SGD), _untraced(torch.optim.AdamW)


def make_optimizer(config: DistillConfig, learner: Learner) -> torch.optim.Optimizer:
    """The optimizer that the configuration names, over student and objective."""
    parameters = list(learner.parameters())
    if config.optimizer == "adamw":
        return AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    return SGD(
        parameters,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=True,
    )
