"""A data set of one's own: discs, squares and crosses of any colour."""

import numpy as np

import ekd_ray as ekd

SIZE, CLASSES = 32, ("disc", "square", "cross")


def load(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, 32, 32, 3] and labels int64 [N] of a split, "train" or "test"."""
    rng = np.random.default_rng(0 if split == "train" else 1)
    count = 600 if split == "train" else 150
    labels = np.arange(count) % len(CLASSES)
    y, x = np.mgrid[:SIZE, :SIZE] - SIZE / 2
    images = rng.integers(0, 64, (count, SIZE, SIZE, 3))
    for image, label in zip(images, labels, strict=True):
        across, down = x + rng.integers(-4, 5), y + rng.integers(-4, 5)
        radius = rng.integers(5, 10)
        near = np.minimum(abs(across), abs(down)) < 2
        far = np.maximum(abs(across), abs(down))
        shape = (np.hypot(across, down) < radius, far < radius, near & (far < radius))[label]
        image[shape] = rng.integers(64, 256, 3)
    return images.astype(np.uint8), labels


ekd.register_dataset("shapes", load, class_names=CLASSES)
