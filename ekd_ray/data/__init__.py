"""Images in: data sets as arrays, honest splits, views as integers, counter-based batches."""

from ekd_ray.data.batches import (
    Batch,
    epoch_batches,
    epoch_order,
    epoch_samples,
    epoch_strong_ids,
    epoch_views,
    steps_per_epoch,
)
from ekd_ray.data.counter import counter_hash
from ekd_ray.data.datasets import (
    check_dataset,
    dataset_info,
    load_dataset,
    look_again,
    num_test,
    num_train,
    training_labels,
)
from ekd_ray.data.registry import (
    DATASETS,
    DatasetInfo,
    check_class_names,
    check_outside,
    register_dataset,
)
from ekd_ray.data.splits import fitted_held_out, held_out_size, stratified_split, stratified_subset
from ekd_ray.data.staging import (
    Stage,
    StagedImages,
    check_view_scheme,
    stage_images,
)
from ekd_ray.data.store import EncodedImages, ImageArrays
from ekd_ray.data.transfer import HostCopy, make_ahead, to_device
from ekd_ray.data.views import (
    RESIZED_CROP,
    apply_views,
    normalize,
    view_count,
)
from ekd_ray.files import default_cache_dir

__all__ = [
    # data sets
    "DATASETS",
    "DatasetInfo",
    "EncodedImages",
    "ImageArrays",
    "check_class_names",
    "check_dataset",
    "check_outside",
    "dataset_info",
    "default_cache_dir",
    "load_dataset",
    "look_again",
    "num_test",
    "num_train",
    "training_labels",
    "register_dataset",
    # splits
    "fitted_held_out",
    "held_out_size",
    "stratified_split",
    "stratified_subset",
    # views
    "RESIZED_CROP",
    "apply_views",
    "normalize",
    "view_count",
    # between host and device
    "HostCopy",
    "make_ahead",
    "to_device",
    # draws and batches
    "Batch",
    "Stage",
    "StagedImages",
    "check_view_scheme",
    "counter_hash",
    "epoch_batches",
    "epoch_order",
    "epoch_samples",
    "epoch_strong_ids",
    "epoch_views",
    "stage_images",
    "steps_per_epoch",
]
