"""A generated data set in the layouts of ImageNet, for tests and demonstrations.

    python -m ekd_ray.data.miniature OUT --classes 1000 --train-per-class 2 --test-per-class 1

writes OUT/train/<class>/*.JPEG and OUT/val/<class>/*.JPEG, or, with --parquet, shards as they
are on the Hugging Face hub. Each class is a smooth coloured pattern, each picture its class's
pattern under noise, and the sizes vary a little.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ekd_ray.data.counter import STREAM_SYNTHETIC, bounded, counter_hash
from ekd_ray.errors import UserError

_GRID = 4  # a pattern is _GRID x _GRID colours, smoothly joined
_NOISE = 24  # amplitude of a pixel's noise, of 255
_QUALITY = 75
_SHARDS = {"train": 3, "validation": 2}
_FIRST_ID = 1000  # second counter; the data set "synthetic" uses 0 to 3


def write_miniature(
    out: str | os.PathLike[str],
    *,
    classes: int,
    train_per_class: int,
    test_per_class: int,
    size: int,
    parquet: bool = False,
    seed: int = 0,
) -> None:
    """Write a miniature of ImageNet into the new or empty folder `out`.

    Pictures are `size` to 1.25 * `size` pixels a side, and the same in both layouts, in the
    same order. Every draw comes from `seed` and the picture's number. Raises UserError for
    numbers below 1 (classes: 2), a folder that holds something, or one that cannot be written.
    """
    counts = {"train": train_per_class, "validation": test_per_class}
    for name, value, least in (
        ("classes", classes, 2),
        ("train_per_class", train_per_class, 1),
        ("test_per_class", test_per_class, 1),
        ("size", size, 8),
    ):
        if value < least:
            raise UserError(f"{name} must be >= {least}, got {value}.")
    out = Path(out)
    try:
        if out.exists() and any(out.iterdir()):
            raise UserError(f"{out} is not empty; name a new folder for the miniature.")
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.absolute().parent))
        try:
            folder.chmod(0o755)
            for split, per_class in counts.items():
                pictures = _pictures(split, classes, per_class, size, seed)
                if parquet:
                    _write_shards(folder, split, pictures, classes, classes * per_class)
                else:
                    _write_folders(folder / ("train" if split == "train" else "val"), pictures)
            os.replace(folder, out)  # an empty folder may be in the way
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    except OSError as error:
        raise UserError(
            f"cannot write the miniature to {out} ({error.strerror or error}); name a folder on "
            "a disk with room."
        ) from error


def class_name(label: int) -> str:
    """The folder name of a class, in the form of a WordNet id; sorts as the labels do."""
    return f"n{label:08d}"


def _pictures(
    split: str, classes: int, per_class: int, size: int, seed: int
) -> Iterator[tuple[int, str, bytes]]:
    """Yield (label, file name, JPEG) in the order of labels."""
    stream = (STREAM_SYNTHETIC, _FIRST_ID)
    cells = np.arange(classes * _GRID * _GRID * 3)
    colours = bounded(counter_hash(seed, *stream, 0, cells), 256).astype(np.uint8)
    patterns = colours.reshape(classes, _GRID, _GRID, 3)
    use = 1 if split == "train" else 2
    own_seeds = counter_hash(seed, *stream, use, np.arange(classes * per_class))
    for picture, own in enumerate(own_seeds.tolist()):
        label, number = divmod(picture, per_class)
        yield label, f"{class_name(label)}_{number}.JPEG", _draw(patterns[label], size, own)


def _draw(pattern: npt.NDArray[np.uint8], size: int, seed: int) -> bytes:
    from PIL import Image

    longest = size + size // 4
    bits = counter_hash(seed, np.arange(2 + 3 * longest**2 // 8 + 1))
    width, height = (size + bounded(bits[:2], longest - size + 1)).tolist()
    large = Image.fromarray(pattern).resize((width, height), Image.Resampling.BICUBIC)
    smooth = np.asarray(large, dtype=np.int16)
    # Eight pixels' noise from every 64 bits, in a fixed byte order.
    noise = bits[2:].astype("<u8").view(np.uint8)[: smooth.size].reshape(smooth.shape)
    pixels = smooth + (noise.astype(np.int16) - 128) * _NOISE // 128
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


def _write_folders(side: Path, pictures: Iterator[tuple[int, str, bytes]]) -> None:
    for label, name, data in pictures:
        folder = side / class_name(label)
        if not folder.is_dir():
            folder.mkdir(parents=True)
        (folder / name).write_bytes(data)


def _write_shards(
    folder: Path,
    split: str,
    pictures: Iterator[tuple[int, str, bytes]],
    classes: int,
    rows: int,
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = [class_name(label) for label in range(classes)]
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema(
        [("image", image), ("label", pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    total = min(_SHARDS[split], rows)
    for shard in range(total):
        count = rows * (shard + 1) // total - rows * shard // total
        path = folder / f"{split}-{shard:05d}-of-{total:05d}.parquet"
        with pq.ParquetWriter(path, schema) as writer:
            for start in range(0, count, 100):
                part = [next(pictures) for _ in range(min(100, count - start))]
                images = [{"bytes": data, "path": name} for _, name, data in part]
                labels = [label for label, _, _ in part]
                writer.write_table(pa.table([pa.array(images, image), labels], schema=schema))


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m ekd_ray.data.miniature",
        description="Write a generated miniature of ImageNet.",
    )
    parser.add_argument("out", metavar="OUT", help="a new or empty folder")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--train-per-class", type=int, default=2)
    parser.add_argument("--test-per-class", type=int, default=1)
    parser.add_argument("--size", type=int, default=224, help="least side in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parquet", action="store_true", help="shards instead of folders")
    try:
        write_miniature(**vars(parser.parse_args(arguments)))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
