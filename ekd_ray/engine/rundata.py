"""The images of one run: a subset of the training set, split, staged on the device."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch

from ekd_ray.config import DistillConfig
from ekd_ray.config.targets import PictureCounts
from ekd_ray.data import (
    Batch,
    EncodedImages,
    ImageArrays,
    Stage,
    dataset_info,
    epoch_order,
    load_dataset,
    num_test,
    stage_images,
    stratified_split,
    stratified_subset,
    training_labels,
)
from ekd_ray.data.drawn_views import DrawnViews
from ekd_ray.data.strong_views import strong_augment, strong_base_views, strong_draws
from ekd_ray.engine.decoding import decoding_threads
from ekd_ray.engine.resolve import input_normalization, left_out, split_sizes
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.errors import UserError

# A batch, its images uint8 [B, 3, S, S] and labels int64 [B], and where pictures are mixed the
# shares float32 [B, C] of the classes.
TrainingViews = tuple[Batch, torch.Tensor, torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True, kw_only=True)
class RunData:
    """Training images with the ids that train and the ids that validate.

    `train_ids` and `validation_ids` are int64 indices into `images`; the latter is empty
    when the configuration holds nothing out. `train_labels` are the classes of the former.
    `ood_images` and `ood_ids` are those of a second data set, None and empty unless the
    configuration names one. `drawn` makes the views that are trained on, where those of `images`
    are not all there is to them.
    """

    images: Stage
    train_ids: np.ndarray
    train_labels: np.ndarray
    validation_ids: np.ndarray
    num_classes: int
    class_names: tuple[str, ...]
    fingerprint: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    ood_images: Stage | None
    ood_ids: np.ndarray
    drawn: DrawnViews | None

    @property
    def num_views(self) -> int:
        """Views of each training sample."""
        return self.drawn.config.view_pool if self.drawn else self.images.num_views

    def stream(self, batches: Iterable[Batch]) -> Generator[TrainingViews, None, None]:
        """As `Stage.stream` has it, the views that a run trains on, and the classes' shares."""
        drawn = self.drawn
        with closing(
            self.images.stream(batches, drawn.below) if drawn else self.images.stream(batches)
        ) as stream:
            for batch, images, labels in stream:
                if drawn:
                    yield batch, *drawn.finish(images, labels, batch.sample_ids, batch.view_ids)
                else:
                    yield batch, images, labels, None

    def views(self, sample_ids: np.ndarray, view_ids: np.ndarray) -> torch.Tensor:
        """The views uint8 [B, 3, S, S] that a run trains on, of ids int64 [B] on the host."""
        if self.drawn is None:
            return self.images.views(sample_ids, view_ids)[0]
        pictures = self.images.views(*self.drawn.below(sample_ids, view_ids))
        return self.drawn.finish(*pictures, sample_ids, view_ids)[0]


def split_ids(
    config: DistillConfig, labels: np.ndarray, data_root: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(train_ids, validation_ids) of a configuration: what it leaves out goes first, then the
    subset is drawn, then the split."""
    ids = np.arange(len(labels), dtype=np.int64)
    ids = np.setdiff1d(ids, left_out(config, "train", data_root))
    if config.train_subset is not None:
        ids = ids[stratified_subset(labels[ids], config.train_subset, config.split_seed)]
    train, validation = stratified_split(labels[ids], config.validation_fraction, config.split_seed)
    return ids[train], ids[validation]


def count_pictures(config: DistillConfig, data_root: str | None) -> PictureCounts:
    """How many pictures of a study's data there are to judge by, without decoding any."""
    labels, smallest = training_labels(config.dataset, data_root=data_root), None
    if labels is not None and config.validation_fraction:
        held = labels[split_ids(config, labels, data_root)[1]]
        smallest = int(np.unique(held, return_counts=True)[1].min(initial=len(held)))
    test = num_test(config.dataset, data_root=data_root)
    return PictureCounts(
        validation_images=split_sizes(config, data_root)[1],
        smallest_class_images=smallest,
        test_images=None if test is None else test - len(left_out(config, "test", data_root)),
    )


def load_run_data(config: DistillConfig, *, data_root: str | None, device: torch.device) -> RunData:
    """Load and split the training set of a resolved configuration. Never opens the test split."""
    arrays = load_dataset(config.dataset, "train", data_root=data_root)
    if config.data_fingerprint not in (None, arrays.fingerprint):
        raise UserError(
            f"{config.dataset} under {data_root or 'the default data root'} is not the data of "
            f"this configuration: its fingerprint must be {config.data_fingerprint}, got "
            f"{arrays.fingerprint}."
        )
    train_ids, validation_ids = split_ids(config, arrays.labels, data_root)
    return _run_data(config, "train", arrays, train_ids, validation_ids, data_root, device)


def load_test_data(
    config: DistillConfig, *, stage: RunStage, data_root: str | None, device: torch.device
) -> RunData:
    """The test split, as `RunData` without training ids.

    Raises:
        ValueError: a run of this stage must not open it.
    """
    stage.check_may_test()
    arrays = load_dataset(config.dataset, "test", data_root=data_root)
    everything = np.arange(len(arrays.labels), dtype=np.int64)
    everything = np.setdiff1d(everything, left_out(config, "test", data_root))
    return _run_data(config, "test", arrays, everything[:0], everything, data_root, device)


def _run_data(
    config: DistillConfig,
    split: str,
    arrays: ImageArrays | EncodedImages,
    train_ids: np.ndarray,
    validation_ids: np.ndarray,
    data_root: str | None,
    device: torch.device,
) -> RunData:
    info = dataset_info(config.dataset, data_root=data_root)
    normalization = input_normalization(config, info)
    outside, outside_ids = None, validation_ids[:0]
    threads = decoding_threads(config, device)
    if config.ood_dataset is not None and len(validation_ids):
        # Its same split: test images stay unseen until the end there too.
        ood = load_dataset(config.ood_dataset, split, data_root=data_root)
        scheme = dataset_info(ood.name, data_root=data_root).view_scheme
        outside = stage_images(ood, device, scheme=scheme, threads=threads)
        count = min(len(ood), len(validation_ids))
        # Not by classes: there may be more of them than images to draw.
        outside_ids = np.sort(epoch_order(len(ood), config.split_seed, 0)[:count])
    images = stage_images(
        arrays, device, scheme=config.augment or info.view_scheme, image_size=config.image_size,
        pool=config.view_pool, seed=config.view_seed, threads=threads,
    )  # fmt: skip
    drawn = None
    if config.draws_views and len(train_ids):
        drawn = DrawnViews(
            config=config, base_views=images.num_views, image_size=images.image_size,
            num_classes=arrays.num_classes, partners=train_ids,
        )  # fmt: skip
    return RunData(
        images=images,
        train_ids=train_ids,
        train_labels=arrays.labels[train_ids],
        validation_ids=validation_ids,
        num_classes=arrays.num_classes,
        class_names=arrays.class_names,
        fingerprint=arrays.fingerprint,
        mean=normalization.mean,
        std=normalization.std,
        ood_images=outside,
        ood_ids=outside_ids,
        drawn=drawn,
    )


def strong_images(
    config: DistillConfig, data: RunData, samples: np.ndarray, strong_ids: np.ndarray
) -> torch.Tensor:
    """Strong views uint8 [B, 3, H, W]: functions of `view_seed`, sample and strong id alone."""
    seed, num_views = config.view_seed, data.images.num_views
    base = strong_base_views(samples, strong_ids, seed=seed, num_views=num_views)
    images, _ = data.images.views(samples, base)
    return strong_augment(images, strong_draws(samples, strong_ids, seed=seed))
