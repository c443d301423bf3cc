"""KD through torchdistill, the field's framework, on the same pictures and models."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.reference import CE_WEIGHT, KD_WEIGHT, LOADER_WORKERS, TEMPERATURE, Pictures


class Torchdistill:
    """A torchdistill distillation box with its own loader, loss and optimizer."""

    def __init__(
        self, student: nn.Module, teacher: nn.Module, pictures: Pictures, *, batch_size: int
    ) -> None:
        from torchdistill.core.distillation import get_distillation_box

        criterion = {
            "key": "WeightedSumLoss",
            "kwargs": {
                "sub_terms": {
                    "kd": {
                        "criterion": {
                            "key": "KDLoss",
                            "kwargs": {
                                "student_module_path": ".",
                                "student_module_io": "output",
                                "teacher_module_path": ".",
                                "teacher_module_io": "output",
                                "temperature": TEMPERATURE,
                                "alpha": CE_WEIGHT,
                                "beta": KD_WEIGHT,
                                "reduction": "batchmean",
                            },
                        },
                        "weight": 1.0,
                    }
                }
            },
        }
        config = {
            "num_epochs": 1,
            "train_data_loader": {
                "dataset_id": "train",
                "sampler": {"class_or_func": torch.utils.data.RandomSampler},
                "kwargs": {
                    "batch_size": batch_size,
                    "num_workers": LOADER_WORKERS,
                    "drop_last": True,
                },
            },
            "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
            "student": {"forward_proc": "forward_batch_only"},
            "optimizer": {
                "key": "SGD",
                "kwargs": {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4},
            },
            "criterion": criterion,
        }
        # torchdistill freezes, but leaves the mode to its caller.
        self.box = get_distillation_box(
            teacher.eval(), student, {"train": pictures}, config, torch.device("cpu"), None,
            False, 1,
        )  # fmt: skip
        self.loss = 0.0

    def batches(self) -> Iterator[Any]:
        """Batches without end."""
        for epoch in itertools.count():
            self.box.pre_epoch_process(epoch=epoch)
            yield from self.box.train_data_loader

    def step(self, images: torch.Tensor, target: torch.Tensor, supplement: Any) -> None:
        """One training step, with the reading of the loss that its examples do."""
        loss = self.box.forward_process(images, target, supplement)
        self.box.post_forward_process(loss=loss)
        self.loss = loss.item()
