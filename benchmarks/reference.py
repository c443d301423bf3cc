"""Distillation in the manner of the published research code: what ekd_ray is compared with.

Pictures are PIL images that worker processes crop and flip one by one, all arithmetic is
float32 in the default memory layout, the teacher is asked in every step, and the meters read
the loss and the accuracy from the device in every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from ekd_ray.data import ImageArrays, dataset_info, load_dataset
from ekd_ray.models import build_model, save_weights

TEMPERATURE, CE_WEIGHT, KD_WEIGHT = 4.0, 0.1, 0.9
LOADER_WORKERS = 2

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Pictures(Dataset[tuple[Tensor, int]]):
    """A data set's training pictures as PIL images, with the CIFAR augmentation."""

    def __init__(self, arrays: ImageArrays, ids: np.ndarray) -> None:
        info = dataset_info(arrays.name)
        chosen = np.asarray(arrays.images)[ids].transpose(0, 2, 3, 1)
        self.pictures = [Image.fromarray(np.ascontiguousarray(image)) for image in chosen]
        self.labels = np.asarray(arrays.labels)[ids].tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(info.image_size, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(info.mean, info.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.pictures[index]), self.labels[index]


def random_teacher(name: str, dataset: str, path: Path) -> nn.Module:
    """A teacher that has learned nothing, and its checkpoint at `path`: as slow as any other."""
    info = dataset_info(dataset)
    teacher = build_model(name, info.num_classes)
    save_weights(
        teacher, path, model_name=name, num_classes=info.num_classes, mean=info.mean,
        std=info.std, log_prior=None, dataset=dataset,
    )  # fmt: skip
    return teacher


def training_pictures(dataset: str, count: int, data_root: str | None) -> Pictures:
    """The first `count` training pictures of a data set."""
    arrays = load_dataset(dataset, "train", data_root=data_root)
    assert isinstance(arrays, ImageArrays)
    return Pictures(arrays, np.arange(count))


def kd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    temperature: float = TEMPERATURE,
    ce_weight: float = CE_WEIGHT,
    kd_weight: float = KD_WEIGHT,
) -> Tensor:
    """Hinton et al. (2015), by default with the usual weights: logits [B, C], target [B] -> 0-d."""
    soft = nn.functional.kl_div(
        nn.functional.log_softmax(student / temperature, 1),
        nn.functional.softmax(teacher / temperature, 1),
        reduction="batchmean",
    )
    hard = nn.functional.cross_entropy(student, target)
    return ce_weight * hard + kd_weight * temperature**2 * soft


class Meter:
    """Running average of a figure, read by the host at once."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def update(self, value: Tensor, count: int) -> None:
        """Add a 0-d value that stands for `count` samples."""
        self.total += value.item() * count
        self.count += count


class Reference:
    """One student under one teacher, stepped on batches of pictures."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        pictures: Pictures,
        *,
        batch_size: int,
        lr: float = 0.05,
        loss: Loss = kd_loss,
        device: torch.device | str = "cpu",
        loader_workers: int = LOADER_WORKERS,
    ) -> None:
        self.device, self.loss = torch.device(device), loss
        self.student, self.teacher = student.to(device), teacher.eval().to(device)
        self.loader = DataLoader(
            pictures,
            batch_size=batch_size,
            shuffle=True,
            num_workers=loader_workers,
            pin_memory=self.device.type == "cuda",
            drop_last=True,
        )
        self.optimizer = torch.optim.SGD(
            student.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4
        )
        self.meters = {name: Meter() for name in ("loss", "top1", "top5")}

    def batches(self) -> Iterator[Any]:
        """Batches without end: a new iterator of the loader every epoch, as the code does it."""
        while True:
            yield from self.loader

    def step(self, images: Tensor, target: Tensor) -> None:
        """One training step."""
        images = images.to(self.device, non_blocking=True)
        target = target.to(self.device, non_blocking=True)
        self.student.train()
        student_logits = self.student(images)
        with torch.no_grad():
            teacher_logits = self.teacher(images)
        loss = self.loss(student_logits, teacher_logits, target)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        ranked = student_logits.detach().topk(5, 1).indices == target[:, None]
        self.meters["loss"].update(loss.detach(), len(target))
        self.meters["top1"].update(ranked[:, :1].any(1).float().mean(), len(target))
        self.meters["top5"].update(ranked.any(1).float().mean(), len(target))
