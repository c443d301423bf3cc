"""A small stand-in for ImageNet, in either of its layouts.

Each class is a smooth coloured pattern, each picture its class's pattern under noise, and the
sizes vary a little.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SHARDS = {"train": 3, "validation": 2}


def class_name(label: int) -> str:
    """The folder name of a class, in the form of a WordNet id; sorts as the labels do."""
    return f"n{label:08d}"


def write_miniature(
    out: Path,
    *,
    classes: int,
    train_per_class: int,
    test_per_class: int,
    size: int,
    parquet: bool = False,
) -> None:
    """Write pictures of `size` to 1.25 * `size` pixels a side into `out`.

    Both layouts hold the same pictures in the same order.
    """
    out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 256, (classes, 4, 4, 3), dtype=np.uint8)
    for split, per_class in (("train", train_per_class), ("validation", test_per_class)):
        rows = []
        for label in np.repeat(np.arange(classes), per_class).tolist():
            shape = tuple(rng.integers(size, size * 5 // 4 + 1, 2).tolist())
            smooth = Image.fromarray(patterns[label]).resize(shape, Image.Resampling.BICUBIC)
            noise = rng.integers(-24, 25, (*shape[::-1], 3))
            pixels = (np.asarray(smooth) + noise).clip(0, 255).astype(np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "JPEG")
            rows.append((label, buffer.getvalue()))
        if parquet:
            _write_shards(out, split, rows, [class_name(label) for label in range(classes)])
        else:
            _write_folders(out / ("train" if split == "train" else "val"), rows)


def _write_folders(side: Path, rows: list[tuple[int, bytes]]) -> None:
    for number, (label, data) in enumerate(rows):
        path = side / class_name(label) / f"{number:06d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _write_shards(
    folder: Path, split: str, rows: list[tuple[int, bytes]], names: list[str]
) -> None:
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    total = SHARDS[split]
    for shard in range(total):
        part = rows[len(rows) * shard // total : len(rows) * (shard + 1) // total]
        images = pa.array([{"bytes": data, "path": "x.JPEG"} for _, data in part])
        table = pa.table({"image": images, "label": [label for label, _ in part]})
        table = table.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
        pq.write_table(table, folder / f"{split}-{shard:05d}-of-{total:05d}.parquet")
