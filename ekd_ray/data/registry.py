"""The data sets that are known by name, and their constants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ekd_ray.data.counter import Int64Array
from ekd_ray.data.generated import digits_split, synthetic_split
from ekd_ray.errors import unknown_name

Triple = tuple[float, float, float]
Generator = Callable[[str], tuple[npt.NDArray[np.uint8], Int64Array]]


@dataclass(frozen=True, kw_only=True)
class CifarFiles:
    """Where a CIFAR data set's files are, in the two layouts that exist in the wild."""

    binary_folder: str  # of the original archive
    torchvision_class: str  # holds the md5 lists and the download
    label_columns: tuple[str, ...]  # of the Parquet files, first match wins


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """Constants of one data set.

    `num_train` is the size of the training split as published; `mean` and `std` are per
    channel on the [0, 1] scale; `view_scheme` is the augmentation used when none is asked
    for; exactly one of `files` and `generate` is set.
    """

    name: str
    num_classes: int
    image_size: int
    num_train: int
    mean: Triple
    std: Triple
    view_scheme: str
    class_names: tuple[str, ...]
    files: CifarFiles | None = None
    generate: Generator | None = None
    generator_version: int = 1  # part of the cache key of generated data


_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile
cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp
lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree
orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum
rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train
trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""

DATASETS: dict[str, DatasetInfo] = {
    info.name: info
    for info in (
        DatasetInfo(
            name="cifar10",
            num_classes=10,
            image_size=32,
            num_train=50_000,
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
            view_scheme="crop_flip",
            class_names=tuple(_CIFAR10.split()),
            files=CifarFiles(
                binary_folder="cifar-10-batches-py",
                torchvision_class="CIFAR10",
                label_columns=("label",),
            ),
        ),
        DatasetInfo(
            name="cifar100",
            num_classes=100,
            image_size=32,
            num_train=50_000,
            mean=(0.5071, 0.4867, 0.4408),
            std=(0.2675, 0.2565, 0.2761),
            view_scheme="crop_flip",
            class_names=tuple(_CIFAR100.split()),
            files=CifarFiles(
                binary_folder="cifar-100-python",
                torchvision_class="CIFAR100",
                label_columns=("fine_label", "label"),
            ),
        ),
        DatasetInfo(
            name="digits",
            num_classes=10,
            image_size=32,
            num_train=1_438,
            mean=(0.3052, 0.3052, 0.3052),
            std=(0.3240, 0.3240, 0.3240),
            view_scheme="crop",  # a mirrored digit is not a digit
            class_names=tuple("0123456789"),
            generate=digits_split,
        ),
        DatasetInfo(
            name="synthetic",
            num_classes=10,
            image_size=32,
            num_train=2_000,
            mean=(0.4711, 0.5159, 0.4952),
            std=(0.1710, 0.1781, 0.1653),
            view_scheme="crop_flip",
            class_names=tuple(f"pattern{c}" for c in range(10)),
            generate=synthetic_split,
        ),
    )
}


def dataset_info(name: str) -> DatasetInfo:
    """The registry's entry; raises UserError for an unknown name, with the nearest known one."""
    try:
        return DATASETS[name]
    except (KeyError, TypeError):
        raise unknown_name("dataset", name, DATASETS) from None
