"""Image classifiers by name, and their weights from own or foreign files.

Papers: He et al. 2016 (ResNet), Zagoruyko & Komodakis 2016 (Wide ResNet).
"""

from ekd_ray.models.weights import WeightsMetadata, load_weights, read_metadata, save_weights
from ekd_ray.models.zoo import build_model, model_names

__all__ = [
    "build_model",
    "model_names",
    "load_weights",
    "save_weights",
    "read_metadata",
    "WeightsMetadata",
]
