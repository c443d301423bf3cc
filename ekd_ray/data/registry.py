"""The data sets that are known by name, and their constants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ekd_ray.data.counter import Int64Array
from ekd_ray.data.generated import digits_split, synthetic_split
from ekd_ray.data.views import RESIZED_CROP
from ekd_ray.errors import unknown_name

Triple = tuple[float, float, float]
Generator = Callable[[str], tuple[npt.NDArray[np.uint8], Int64Array]]


@dataclass(frozen=True, kw_only=True)
class FileLayouts:
    """The layouts in which a data set's files may lie; in a folder, the first found is read.

    `pickled_folder` holds the pickled batches of the original archive, `torchvision_class` their
    md5 and their download; `held_out` are the folders of the "test" split beside train/, which
    hold a folder a class; `held_out_shards` the prefixes of its Parquet files. Of several names
    the first that exists wins, and an empty tuple means that there is no such layout.
    `unpacked_folder` is what the original archive of pictures unpacks to; `label_columns` those
    of the Parquet files, the first that exists wins.
    """

    pickled_folder: str | None = None
    torchvision_class: str | None = None
    held_out: tuple[str, ...] = ()
    held_out_shards: tuple[str, ...] = ()
    unpacked_folder: str | None = None
    label_columns: tuple[str, ...] = ("label",)


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """Constants of one data set.

    `num_train` is the size of the training split as published (of the files found:
    `ekd_ray.data.num_train`), `num_test` of the test split (0: unknown); `mean` and `std` are
    per channel on the [0, 1] scale; `view_scheme` is the augmentation used when none is asked
    for; `class_names` is () where the files tell. Images of an `encoded` data set vary in size
    and are decoded on demand, to `image_size` unless another is asked for; all others have
    exactly `image_size` pixels a side and are decoded once. Data that a function makes
    (`generate`) has no `files`.
    """

    name: str
    num_classes: int
    image_size: int
    num_train: int
    num_test: int
    mean: Triple
    std: Triple
    view_scheme: str
    class_names: tuple[str, ...] = ()
    encoded: bool = False
    files: FileLayouts = FileLayouts()
    generate: Generator | None = None
    generator_version: int = 1  # part of the cache key of generated data


FOLDER_PREFIX = "folder:"

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

_INFOS = (
    DatasetInfo(
        name="cifar10",
        num_classes=10,
        image_size=32,
        num_train=50_000,
        num_test=10_000,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        view_scheme="crop_flip",
        class_names=tuple(_CIFAR10.split()),
        files=FileLayouts(
            pickled_folder="cifar-10-batches-py",
            torchvision_class="CIFAR10",
            held_out_shards=("test",),
        ),
    ),
    DatasetInfo(
        name="cifar100",
        num_classes=100,
        image_size=32,
        num_train=50_000,
        num_test=10_000,
        mean=(0.5071, 0.4867, 0.4408),
        std=(0.2675, 0.2565, 0.2761),
        view_scheme="crop_flip",
        class_names=tuple(_CIFAR100.split()),
        files=FileLayouts(
            pickled_folder="cifar-100-python",
            torchvision_class="CIFAR100",
            held_out_shards=("test",),
            label_columns=("fine_label", "label"),
        ),
    ),
    DatasetInfo(
        name="digits",
        num_classes=10,
        image_size=32,
        num_train=1_438,
        num_test=359,
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
        num_test=500,
        mean=(0.4711, 0.5159, 0.4952),
        std=(0.1710, 0.1781, 0.1653),
        view_scheme="crop_flip",
        class_names=tuple(f"pattern{c}" for c in range(10)),
        generate=synthetic_split,
    ),
    DatasetInfo(
        name="tiny_imagenet",
        num_classes=200,
        image_size=64,
        num_train=100_000,
        num_test=10_000,
        mean=(0.4802, 0.4481, 0.3975),
        std=(0.2302, 0.2265, 0.2262),
        view_scheme="crop8_flip",
        files=FileLayouts(
            # The archive's own test images have no labels; its validation images do.
            held_out=("val", "valid", "validation"),
            held_out_shards=("valid", "validation", "val", "test"),
            unpacked_folder="tiny-imagenet-200",
        ),
    ),
    DatasetInfo(
        name="imagenet",
        num_classes=1000,
        image_size=224,
        num_train=1_281_167,
        num_test=50_000,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        view_scheme=RESIZED_CROP,
        encoded=True,
        files=FileLayouts(
            held_out=("val", "validation"),
            held_out_shards=("validation", "val", "valid", "test"),
        ),
    ),
)
DATASETS: dict[str, DatasetInfo] = {info.name: info for info in _INFOS}


def find_registered(name: str) -> DatasetInfo:
    """The registry's entry; raises UserError for an unknown name, with the nearest known one."""
    try:
        return DATASETS[name]
    except (KeyError, TypeError):
        known = [*DATASETS, f"{FOLDER_PREFIX}PATH"]
        raise unknown_name("dataset", name, known, keys=()) from None


def folder_info(name: str, class_names: tuple[str, ...]) -> DatasetInfo:
    """The constants of a `folder:PATH` data set: ImageNet's, with its own classes, not counted."""
    return replace(
        DATASETS["imagenet"],
        name=name,
        num_classes=len(class_names),
        num_train=0,
        num_test=0,
        class_names=class_names,
        files=FileLayouts(held_out=("test", "val", "valid", "validation")),
    )
