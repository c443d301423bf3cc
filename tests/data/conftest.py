"""Small CIFAR look-alikes in both layouts, and one decoded copy of the real CIFAR-10."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from miniature import write_miniature
from PIL import Image

import ekd_ray.data.datasets as datasets
import ekd_ray.data.store as store
from ekd_ray.data import DATASETS, load_dataset

NAMES_10 = "airplane automobile bird cat deer dog frog horse ship truck".split()  # noqa: SIM905
NAMES_1000 = [f"n{i:08d}" for i in range(1000)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """No test sees the user's cache or data, nor another test's."""
    monkeypatch.setenv("EKD_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("EKD_DATA_ROOT", raising=False)
    monkeypatch.setattr(datasets, "_opened", {})


@pytest.fixture
def forget(monkeypatch):
    """Makes this process forget what it has opened."""
    return lambda: monkeypatch.setattr(datasets, "_opened", {})


@pytest.fixture
def builds(monkeypatch):
    """The entries that were built, in order."""
    paths = []
    build = store._build
    monkeypatch.setattr(store, "_build", lambda *args: (paths.append(args[0]), build(*args)))
    return paths


@pytest.fixture
def entries(tmp_path):
    """Lists the entries in a cache, by default this test's."""

    def listed(cache=tmp_path / "cache"):
        return sorted(p for p in (cache / "datasets").iterdir() if p.is_dir())

    return listed


def random_images(n: int, size: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 3, size, size), dtype=np.uint8)


def encode(image: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(buffer, kind)
    return buffer.getvalue()


def picture(width: int, height: int, seed: int = 0, kind: str = "PNG") -> bytes:
    """A smooth random picture of any size, encoded."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return encode(np.asarray(smooth).transpose(2, 0, 1), kind)


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    """Files by their path below `root`, with the folders they need."""
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


@pytest.fixture(scope="session")
def miniatures(tmp_path_factory):
    """{"folders": root, "parquet": root} of the same generated ImageNet, 1000 + 1000 images."""
    roots = {}
    for layout in ("folders", "parquet"):
        roots[layout] = tmp_path_factory.mktemp(layout)
        write_miniature(
            roots[layout] / "imagenet",
            classes=1000,
            train_per_class=1,
            test_per_class=1,
            size=24,
            parquet=layout == "parquet",
        )
    return roots


def write_parquet(
    path: Path,
    encoded: list[bytes | None],
    labels: list[int | None],
    *,
    image: str = "img",
    label: str = "label",
    names: list[str] | None = NAMES_10,
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [None if data is None else {"bytes": data, "path": "x.png"} for data in encoded]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({image: pa.array(rows, kind), label: pa.array(labels, pa.int64())})
    if names is not None:
        features = {image: {"_type": "Image"}, label: {"names": names, "_type": "ClassLabel"}}
        meta = {"huggingface": json.dumps({"info": {"features": features}})}
        table = table.replace_schema_metadata(meta)
    pq.write_table(table, path, row_group_size=7)
    return path


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Writes a small Parquet CIFAR-10 (20 train in one shard, 10 test); returns its root."""
    # As many as anybody writes there.
    published = dataclasses.replace(DATASETS["cifar10"], num_train=0, num_test=0)
    monkeypatch.setitem(DATASETS, "cifar10", published)
    folder = tmp_path / "root" / "cifar10"
    images = random_images(30)
    for split, part in (("train", slice(0, 20)), ("test", slice(20, 30))):
        chosen = [encode(image) for image in images[part]]
        labels = [i % 10 for i in range(len(chosen))]
        write_parquet(folder / f"{split}-00000-of-00001.parquet", chosen, labels)
    return tmp_path / "root"


@pytest.fixture
def shards(tmp_path):
    """A Parquet ImageNet with 20 training rows and 6 labelled validation rows; its root."""
    folder = tmp_path / "root/imagenet/data"
    for split, count, shards in (("train", 20, 2), ("validation", 6, 1)):
        data = [picture(20 + i, 30 - i, i, "JPEG") for i in range(count)]
        labels = [(i * 53) % 1000 for i in range(count)]
        for shard in range(shards):
            part = slice(shard * count // shards, (shard + 1) * count // shards)
            path = folder / f"{split}-{shard:05d}-of-{shards:05d}.parquet"
            write_parquet(path, data[part], labels[part], image="image", names=NAMES_1000)
    return tmp_path / "root"


@pytest.fixture(scope="session")
def real_cifar10(tmp_path_factory):
    """{"train": ..., "test": ...} of the real CIFAR-10, decoded once a session."""
    root = _REAL_ROOT
    if not root or not (Path(root) / "cifar10").is_dir():
        pytest.skip("EKD_DATA_ROOT names no folder with cifar10/")
    cache = tmp_path_factory.mktemp("real-cache")
    return {
        split: load_dataset("cifar10", split, data_root=root, cache_dir=cache)
        for split in ("train", "test")
    }


_REAL_ROOT = os.environ.get("EKD_DATA_ROOT")


@pytest.fixture(scope="session")
def real_root():
    return _REAL_ROOT


@pytest.fixture
def make():
    """The helpers above, for tests in this folder."""

    class Make:
        images = staticmethod(random_images)
        encode = staticmethod(encode)
        picture = staticmethod(picture)
        tree = staticmethod(write_tree)
        parquet = staticmethod(write_parquet)

    return Make
