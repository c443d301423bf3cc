"""Image classifiers by name, and their weights from own or foreign files.

Papers: He et al. 2016 (ResNet), Zagoruyko & Komodakis 2016 (Wide ResNet), Simonyan & Zisserman
2015 (VGG), Sandler et al. 2018 (MobileNetV2), Zhang et al. 2018 and Ma et al. 2018 (ShuffleNet),
Wang et al. 2021 (PVT), Yuan et al. 2021 (T2T-ViT).
"""

from ekd_ray.models.checkpoints import Claims, checkpoints_kept
from ekd_ray.models.pretrained import cached_weights, library_normalization, locate_weights
from ekd_ray.models.teacher_zoo import find_softmax_teacher, find_teacher, list_teachers
from ekd_ray.models.weights import (
    WeightsMetadata,
    load_backbone,
    load_model,
    load_weights,
    read_metadata,
    save_weights,
)
from ekd_ray.models.zoo import (
    ALIASES,
    build_model,
    is_of_library,
    is_own_model,
    model_names,
    model_normalization,
    register_model,
)

__all__ = [
    "build_model",
    "model_names",
    "is_of_library",
    "is_own_model",
    "model_normalization",
    "register_model",
    "ALIASES",
    "load_backbone",
    "load_model",
    "load_weights",
    "save_weights",
    "read_metadata",
    "WeightsMetadata",
    "Claims",
    "checkpoints_kept",
    "cached_weights",
    "locate_weights",
    "library_normalization",
    "find_softmax_teacher",
    "find_teacher",
    "list_teachers",
]
