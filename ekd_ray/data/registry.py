"""The data sets that are known by name, and how one of your own becomes one of them."""

from __future__ import annotations

import inspect
import operator
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ekd_ray.config.plugins import load_installed, registers
from ekd_ray.data.generated import digits_split, synthetic_split
from ekd_ray.data.views import RESIZED_CROP, view_count
from ekd_ray.errors import UserError, meant_name, shorten, unknown_name

Triple = tuple[float, float, float]
Load = Callable[..., Any]

IMAGE_SIZES = (8, 1024)  # bounds of the side of an image, in pixels
_MOST_CLASSES = 1_000_000
_MOST_SHARED = 3  # classes that a message names
FOLDER_PREFIX, HUB_PREFIX = "folder:", "hf:"


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
    exactly `image_size` pixels a side and are decoded once.

    Data that a function returns (`load`) has no `files`; its pictures are stored again when
    `version`, the plugin that it is of or one of the `load_files` changes. What a registration
    leaves open is 0, "", () or None here (`is_complete`) until `ekd_ray.data.dataset_info` has
    looked at the training images.
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
    encoded: bool | None = False
    files: FileLayouts = FileLayouts()
    load: Load | None = None
    load_files: tuple[str, ...] = ()
    version: int = 1

    def __post_init__(self) -> None:
        check_class_names(self.name, self.class_names)

    @property
    def kind(self) -> str:
        """The name, or what stands before the PATH of one."""
        return self.name.partition(":")[0]

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to be found out from the images."""
        known = self.num_classes and self.image_size and self.std != UNKNOWN and self.view_scheme
        named = self.load is None or self.class_names
        return bool(known and named) and self.encoded is not None


def check_class_names(where: str, names: Iterable[str]) -> None:
    """Raise `UserError` for the name of a class that no line of a table can show."""
    for name in names:
        if not name.isprintable() and re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", name):
            raise UserError(
                f"{where} has a class with control characters in its name, {name[:40]!r}: "
                "rename it."
            )


def check_outside(name: str, classes: Iterable[str], own_classes: Iterable[str]) -> None:
    """Raise `UserError` if images of these classes are none from outside.

    Numbers are what classes without a name are called: they are the same only where all are.
    """
    there, here = ({label.casefold(): label for label in found} for found in (classes, own_classes))
    shared = [there[label] for label in there if label in here]
    if there.keys() != here.keys():
        shared = [label for label in shared if not label.isdecimal()]
    if shared:
        more = f" and {len(shared) - _MOST_SHARED} more" if len(shared) > _MOST_SHARED else ""
        named = f"{', '.join(shared[:_MOST_SHARED])}{more}"
        raise UserError(
            f"the out-of-distribution set {name} shares classes with the data set ({named}), whose "
            "images are none from outside: give one of other classes."
        )


UNKNOWN: Triple = (0.0, 0.0, 0.0)  # a standard deviation that nobody has given

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


@registers("dataset", DATASETS)
def register_dataset(
    name: str,
    load: Load,
    *,
    num_classes: int | None = None,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    view_scheme: str | None = None,
    class_names: Sequence[str] = (),
    files: Sequence[str] = (),
    version: int = 1,
) -> DatasetInfo:
    """Make a data set of your own known by a name, in this process; returns its constants.

    `load("train")` and `load("test")` return a split: either (images, labels), where images are
    uint8 [N, H, W, 3] or [N, H, W], or a map-style `torch.utils.data.Dataset` of (picture, label),
    where a picture is a PIL image, a uint8 array [H, W, 3] or [H, W], a uint8 tensor [3, H, W] or
    [1, H, W], or the bytes of a JPEG, PNG, WebP or BMP file. Labels are integers from 0. Leave
    augmentation, normalisation and the validation split to ekd_ray. A function with a parameter
    `data_root` gets the folder of `--data-root` (a `pathlib.Path`).

    It is called once on each machine: the pictures are stored in the cache, decoded where all are
    squares of one size of at most 128 pixels (or `view_scheme` is one of crops), else encoded
    (arrays and PIL images as PNG, losslessly).

    Args:
        name: letters, digits and "_.-"; not one that is taken.
        load: the function; a plugin that registers its data set is imported in every process.
        num_classes: found in the training labels (0 to C - 1, each at least once).
        image_size: pixels a side; that of the pictures, or 224 where they vary in size.
        mean: of each channel on the [0, 1] scale; that of the training images, or ImageNet's where
            they vary in size.
        std: standard deviation, given with `mean` or left out with it.
        view_scheme: "crop_flip" (below 64 pixels), "crop8_flip" or, where pictures vary in size,
            "resized_crop"; "crop" does not mirror, "none" augments nothing.
        class_names: a name for each label; else the dataset's `classes`, else "0", "1", ...
        files: what `load` reads, as paths or patterns below the data root: looked for before
            anything is computed, and read again when they change.
        version: raise it when `load` returns something else for a reason that is neither in its
            plugin's source nor in `files`.

    Raises:
        UserError: a value of another type or out of bounds, or a name that is taken.
    """
    _check_name(name, load)
    _check_load(name, load)
    names = _as_strings(f"class_names of {name}", class_names)
    channels = _check_channels(name, mean, std)
    count = len(names)
    if names or num_classes is not None:
        given = count if num_classes is None else num_classes
        count = _as_integer(f"num_classes of {name}", given, 2, _MOST_CLASSES)
    if names and count != len(names):
        raise UserError(
            f"num_classes of {name} must be as many as class_names, got {count} and {len(names)} "
            "names."
        )
    size = (
        0 if image_size is None else _as_integer(f"image_size of {name}", image_size, *IMAGE_SIZES)
    )
    if view_scheme is not None:
        view_count(view_scheme)
    fixed = view_scheme not in (None, "none")  # a scheme serves one kind of store
    info = DatasetInfo(
        name=name,
        num_classes=count,
        image_size=size,
        num_train=0,
        num_test=0,
        mean=channels[0],
        std=channels[1],
        view_scheme=view_scheme or "",
        class_names=names,
        encoded=view_scheme == RESIZED_CROP if fixed else None,
        load=load,
        load_files=_as_strings(f"files of {name}", files),
        version=_as_integer(f"version of {name}", version, 0, 2**63 - 1),
    )
    DATASETS[name] = info
    return info


def _check_name(name: str, load: Load) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise UserError(f"a data set's name has letters, digits and '_.-' alone, got {name!r}.")
    if not callable(load):
        raise UserError(f"load of {name} must be a function, got {type(load).__name__}.")
    if name in DATASETS:
        raise UserError(f"there is a data set {name!r} already; choose another name.")


def _check_load(name: str, load: Load) -> None:
    try:
        signature = inspect.signature(load)
    except (TypeError, ValueError):  # some builtins have none
        return
    try:
        signature.bind("train", **({"data_root": None} if takes_data_root(load) else {}))
    except TypeError:
        raise UserError(
            f"load of {name} must take the split, 'train' or 'test', as its first parameter, and "
            f"data_root where it wants the folder of --data-root; its parameters are {signature}."
        ) from None


def takes_data_root(load: Any) -> bool:
    """Whether a function that loads splits has the parameter `data_root`."""
    try:
        parameters = inspect.signature(load).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(p.name == "data_root" or p.kind is p.VAR_KEYWORD for p in parameters)


def _as_integer(what: str, value: Any, low: int, high: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = low - 1
    if isinstance(value, bool) or not low <= number <= high:
        raise UserError(f"{what} must be an integer from {low} to {high}, got {value!r}.")
    return number


def _as_strings(what: str, values: Any) -> tuple[str, ...]:
    """Different strings; paths become strings."""
    single = isinstance(values, str | bytes) or not isinstance(values, Iterable)
    found = (
        () if single else tuple(os.fspath(v) if isinstance(v, os.PathLike) else v for v in values)
    )
    if single or not all(isinstance(v, str) for v in found) or len(set(found)) < len(found):
        raise UserError(f"{what} must be a list of different strings, got {values!r}.")
    return found


def _check_channels(
    name: str, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[Triple, Triple]:
    if mean is None and std is None:
        return UNKNOWN, UNKNOWN
    try:
        given = np.asarray([mean, std])
    except (TypeError, ValueError):  # of two lengths
        given = np.empty(0)
    legal = given.shape == (2, 3) and given.dtype.kind in "iuf" and np.isfinite(given).all()
    if not legal or given.min() < 0 or given.max() > 1 or given[1].min() == 0:
        raise UserError(
            f"mean and std of {name} must be three numbers each on the [0, 1] scale, std > 0, got "
            f"{mean!r} and {std!r}; leave both out to have them computed."
        )
    means, deviations = given.tolist()
    return tuple(means), tuple(deviations)


def find_registered(name: str) -> DatasetInfo:
    """The registry's entry; raises UserError for an unknown name, with the nearest known one."""
    if name not in DATASETS:
        load_installed()
    if name not in DATASETS:
        if os.path.isdir(name):
            text = f"{shorten(name)} is a folder: write folder:{name}, or hf:{name} for Parquet."
            raise UserError(text, keys=())
        kind, _, path = name.partition(":")
        if path and (meant := meant_name(kind, ("folder", "hf"))):
            known = "Known: folder:PATH, hf:PATH."
            raise UserError(f"unknown kind of data {shorten(kind)}.{meant} {known}", keys=())
        raise unknown_name("dataset", name, DATASETS, keys=())
    return DATASETS[name]


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


def hub_info(name: str) -> DatasetInfo:
    """The constants of an `hf:PATH` data set, all of which its files tell."""
    return DatasetInfo(
        name=name,
        num_classes=0,
        image_size=0,
        num_train=0,
        num_test=0,
        mean=UNKNOWN,
        std=UNKNOWN,
        view_scheme="",
        encoded=None,
        files=FileLayouts(
            held_out_shards=("test", "validation", "valid", "val"),
            label_columns=("label", "fine_label", "labels"),
        ),
    )


# Their sizes are known, so that a plan need not make them.
_digits = register_dataset(
    "digits",
    digits_split,
    image_size=32,
    mean=(0.3052, 0.3052, 0.3052),
    std=(0.3240, 0.3240, 0.3240),
    view_scheme="crop",  # a mirrored digit is not a digit
    class_names=list("0123456789"),
)
_synthetic = register_dataset(
    "synthetic",
    synthetic_split,
    image_size=32,
    mean=(0.4711, 0.5159, 0.4952),
    std=(0.1710, 0.1781, 0.1653),
    view_scheme="crop_flip",
    class_names=[f"pattern{c}" for c in range(10)],
)
DATASETS["digits"] = replace(_digits, num_train=1_438, num_test=359)
DATASETS["synthetic"] = replace(_synthetic, num_train=2_000, num_test=500)
