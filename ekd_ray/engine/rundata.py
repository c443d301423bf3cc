"""The images of one run: a subset of the training set, split, staged on the device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ekd_ray.config import DistillConfig
from ekd_ray.data import (
    ImageArrays,
    StagedImages,
    dataset_info,
    load_dataset,
    stratified_split,
    stratified_subset,
)
from ekd_ray.errors import UserError


@dataclass(frozen=True, kw_only=True)
class RunData:
    """Training images with the ids that train and the ids that validate.

    `train_ids` and `validation_ids` are int64 indices into `images`; the latter is empty
    when the configuration holds nothing out.
    """

    images: StagedImages
    train_ids: np.ndarray
    validation_ids: np.ndarray
    num_classes: int
    class_names: tuple[str, ...]
    fingerprint: str
    view_scheme: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def split_ids(config: DistillConfig, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(train_ids, validation_ids) of a configuration: subset first, then the split."""
    ids = np.arange(len(labels), dtype=np.int64)
    if config.train_subset is not None:
        ids = stratified_subset(labels, config.train_subset, config.split_seed)
    train, validation = stratified_split(labels[ids], config.validation_fraction, config.split_seed)
    return ids[train], ids[validation]


def load_run_data(config: DistillConfig, *, data_root: str | None, device: torch.device) -> RunData:
    """Load and split the training set of a resolved configuration. Never opens the test split."""
    arrays = load_dataset(config.dataset, "train", data_root=data_root)
    if config.data_fingerprint not in (None, arrays.fingerprint):
        raise UserError(
            f"{config.dataset} under {data_root or 'the default data root'} is not the data of "
            f"this configuration: its fingerprint must be {config.data_fingerprint}, got "
            f"{arrays.fingerprint}."
        )
    train_ids, validation_ids = split_ids(config, arrays.labels)
    return _run_data(config, arrays, train_ids, validation_ids, device)


def load_test_data(
    config: DistillConfig, *, data_root: str | None, device: torch.device
) -> RunData:
    """The test split, as `RunData` without training ids. Only final evaluation calls this."""
    arrays = load_dataset(config.dataset, "test", data_root=data_root)
    everything = np.arange(len(arrays.labels), dtype=np.int64)
    return _run_data(config, arrays, everything[:0], everything, device)


def _run_data(
    config: DistillConfig,
    arrays: ImageArrays,
    train_ids: np.ndarray,
    validation_ids: np.ndarray,
    device: torch.device,
) -> RunData:
    info = dataset_info(config.dataset)
    return RunData(
        images=StagedImages(arrays, device),
        train_ids=train_ids,
        validation_ids=validation_ids,
        num_classes=arrays.num_classes,
        class_names=arrays.class_names,
        fingerprint=arrays.fingerprint,
        view_scheme=config.augment or info.view_scheme,
        mean=info.mean,
        std=info.std,
    )
