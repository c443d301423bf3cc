"""Data sets that need no files: scikit-learn's handwritten digits and synthetic patterns."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ekd_ray.data.counter import STREAM_SYNTHETIC, Int64Array, bounded, counter_hash
from ekd_ray.data.splits import stratified_split

_SIZE = 32
_SEED = 20250  # of the digits' test split and of the synthetic patterns
_TEST_FRACTION = 0.2

UInt8Array = npt.NDArray[np.uint8]


def digits_split(split: str) -> tuple[UInt8Array, Int64Array]:
    """The 1,797 real 8x8 digits of scikit-learn as RGB 32x32, stratified 80/20.

    Returns images uint8 [N, 32, 32] and labels int64 [N]; N is 1,438 for "train" and 359 for
    "test".
    """
    from sklearn.datasets import load_digits

    bundle = load_digits()
    labels = bundle.target.astype(np.int64)
    sides = stratified_split(labels, _TEST_FRACTION, _SEED)
    index = sides[("train", "test").index(split)]
    gray = bundle.images[index].astype(np.int64)  # 0..16
    # Bilinear in integers, so that no library version or instruction set changes a pixel.
    weights = _bilinear_eighths(8, _SIZE)
    sharp = weights @ gray @ weights.T  # 0..16 * 64
    pixels = ((sharp * 255 + 512) // 1024).astype(np.uint8)
    return pixels, labels[index]


def _bilinear_eighths(size: int, target: int) -> Int64Array:
    """Interpolation matrix [target, size] with half-pixel centres; each row sums to 8."""
    factor = target // size
    matrix = np.zeros((target, size), dtype=np.int64)
    for row in range(target):
        eighths = (2 * row + 1) * 4 // factor - 4  # source position times eight
        left, part = divmod(eighths, 8)
        matrix[row, max(left, 0)] += 8 - part
        matrix[row, min(left + 1, size - 1)] += part
    return matrix


def synthetic_split(split: str) -> tuple[UInt8Array, Int64Array]:
    """Ten classes of coarse coloured patterns: 2,000 "train" or 500 "test" images.

    Each image is its class's pattern, a weaker pattern of another class (so that a teacher
    has something to say about the wrong classes) and noise. Returns images uint8
    [N, 32, 32, 3] and labels int64 [N], equally many of each class.
    """
    n, offset = {"train": (2000, 0), "test": (500, 1_000_000)}[split]
    stream = (STREAM_SYNTHETIC,)
    cells = np.arange(10 * 3 * 4 * 4)
    coarse = bounded(counter_hash(_SEED, *stream, 0, cells), 256).reshape(10, 3, 4, 4)
    patterns = np.kron(coarse, np.ones((8, 8), dtype=np.int64)) - 128  # [10, 3, 32, 32]
    ids = np.arange(n) + offset
    labels = np.arange(n, dtype=np.int64) % 10
    labels = labels[np.argsort(counter_hash(_SEED, *stream, 1, ids), kind="stable")]
    other = (labels + 1 + bounded(counter_hash(_SEED, *stream, 2, ids), 9)) % 10
    # Eight noise pixels from every 64 bits, in a fixed byte order.
    words = counter_hash(_SEED, *stream, 3, ids[:, None], np.arange(3 * _SIZE * _SIZE // 8))
    noise = words.astype("<u8").view(np.uint8).reshape(n, 3, _SIZE, _SIZE).astype(np.int64) - 128
    mixed = 128 + (6 * patterns[labels] + 4 * patterns[other] + 6 * noise) // 16
    return np.clip(mixed, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1), labels
