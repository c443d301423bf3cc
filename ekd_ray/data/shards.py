"""Shards: the Parquet files of the Hugging Face hub, and the Arrow files of `save_to_disk`."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ekd_ray.config.yaml_files import parse_yaml
from ekd_ray.data.counter import Int64Array
from ekd_ray.data.decode import readable
from ekd_ray.data.registry import HUB_PREFIX, DatasetInfo, check_class_names
from ekd_ray.data.sources import EncodedBatch, EncodedSource, check_int64, one_line, row_name
from ekd_ray.errors import UserError
from ekd_ray.files import check_plain, expand_home, parse_json, read_json, read_text

_READ_AHEAD = 1 << 20  # bytes that Arrow buffers, instead of a whole column of a row group
_IMAGE_COLUMNS = ("img", "image")
_SPLIT_NAMES = ("train", "test", "validation", "valid", "val")
_HUB = HUB_PREFIX.rstrip(":")
Shards = tuple[Path, ...]


class ShardSource(EncodedSource):
    """The shards of one split, read in order.

    The columns of a data set that is known by name are those of the hub; those of `hf:PATH` are
    found by what the files declare, and its classes too.
    """

    def __init__(self, info: DatasetInfo, split: str, files: Shards) -> None:
        super().__init__(info, split, files)
        self._names_declared = False

    def declared_classes(self) -> tuple[str, ...]:
        """The class names in the metadata of the first shard, or (). Raises UserError."""
        with _open_table(self.files[0]) as table:
            label = self._find_columns(self.files[0], table.schema)[1]
            return _declared_names(table.schema, label)

    def is_labelled(self) -> bool:
        """Whether the first image has a label. Raises UserError."""
        with _open_table(self.files[0]) as table:
            label = self._find_columns(self.files[0], table.schema)[1]
            first = table.read_column(label).slice(0, 1).to_pylist()
            return first not in ([None], [-1])

    def all_labels(self) -> Int64Array:
        """The labels of all images, int64 [N]. Raises UserError."""
        parts = []
        for path in self.files:
            with _open_table(path) as table:
                label = self._find_columns(path, table.schema)[1]
                parts.append(_integers(path, table.read_column(label)))
        labels = np.concatenate(parts)
        if not labels.size:
            raise UserError(f"{self.files[0]} holds no rows.")
        return labels

    def check(self) -> None:
        """Read footers, schemas and labels. Raises UserError."""
        self.parts = {}
        highest = -1
        for path in self.files:
            with _open_table(path) as table:
                label = self._find_columns(path, table.schema)[1]
                self.parts[str(path)] = table.num_rows
                labels = _integers(path, table.read_column(label))
                highest = max(highest, self._check_labels(path, labels))
        if sum(self.parts.values()) == 0:
            raise UserError(f"{self.files[0]} holds no rows.")
        # A training set without declared names shows its number of classes in no other way.
        name, count = self.info.name, self.info.num_classes
        named = self.info.class_names or self._names_declared or self.split != "train"
        if not named and highest != count - 1:
            raise UserError(
                f"the train shards in {self.files[0].parent} have labels up to {highest}, but "
                f"{name} has the labels 0 to {count - 1}; put the files of {name} there."
            )

    def count(self) -> int:
        """Number of rows, from the footers. Raises UserError."""
        count = 0
        for path in self.files:
            with _open_table(path) as table:
                count += table.num_rows
        return count

    def stated_rows(self) -> tuple[int, str]:
        """The number of rows by the hub's card beside the files, and its path; 0: it says none."""
        first = self.files[0]
        name = first.parent.name if first.parent.name in _SPLIT_NAMES else first.stem.split("-")[0]
        folders = first.parents[: 3 if name == first.parent.name else 2]
        for card in (folder / "README.md" for folder in folders):
            if card.is_file():
                return _rows_of_card(card, name, {folder.name for folder in folders}), str(card)
        return 0, ""

    def encoded_batches(self, rows: int) -> Iterator[EncodedBatch]:
        """Yield all images in order, `rows` at once. Raises UserError.

        Memory stays bounded by two batches and a page of the file, however large its row groups
        are.
        """
        self.check()
        for path in self.files:
            start = 0
            with _open_table(path) as table:
                image, label = self._find_columns(path, table.schema)
                for batch in table.batches(rows, image, label):
                    images = batch.column(image).field("bytes").to_pylist()
                    labels = batch.column(label).to_numpy().astype(np.int64)
                    if None in images:
                        bad = start + images.index(None)
                        raise UserError(
                            f"row {bad} of {path} has no image bytes; fetch the file again."
                        )
                    names = [row_name(path, start + row) for row in range(len(images))]
                    yield EncodedBatch(names, images, labels, images)
                    start += len(labels)

    def _find_columns(self, path: Path, schema: Any) -> tuple[str, str]:
        """Names of the image and the label column; sets `class_names`. Raises UserError."""
        import pyarrow as pa  # takes a while, and folders and generated data need none

        wanted = (_IMAGE_COLUMNS, self.info.files.label_columns)
        image, label = (next((n for n in names if n in schema.names), None) for names in wanted)
        if self.info.kind == _HUB:
            image = image or _declared_column(schema, "Image")
            label = label or _declared_column(schema, "ClassLabel")
        if image is None or label is None:
            raise UserError(
                f"{path} has the columns {', '.join(schema.names)}, but {self.info.name} needs "
                f"{' and '.join('/'.join(names) for names in wanted)}."
            )
        kind = schema.field(image).type
        binary = pa.types.is_struct(kind) and any(
            field.name == "bytes"
            and (pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type))
            for field in kind
        )
        for column, legal, needed in (
            (image, binary, "be a struct with binary 'bytes'"),
            (label, pa.types.is_integer(schema.field(label).type), "hold integers"),
        ):
            if not legal:
                got = one_line(schema.field(column).type)
                raise UserError(f"column {column!r} of {path} must {needed}, got {got}.")
        count, known = self.info.num_classes, self.info.class_names
        names = _declared_names(schema, label)
        check_class_names(str(path), names)
        if names and known and self.info.kind == _HUB and names != known:
            raise UserError(
                f"{path} declares other classes than the training split of {self.info.name} "
                f"({', '.join(names[:3])}, ... and not {', '.join(known[:3])}, ...); give all "
                "splits the same."
            )
        if names and count and len(names) != count:
            raise UserError(
                f"{path} declares {len(names)} classes, but {self.info.name} has {count}; put the "
                f"files of {self.info.name} there."
            )
        self._names_declared |= bool(names)
        self.class_names = names or known or tuple(map(str, range(count)))
        return image, label

    def _check_labels(self, path: Path, labels: Int64Array) -> int:
        """The highest label, -1 if there are none; UserError unless each row has a legal one."""
        wrong = np.flatnonzero((labels < 0) | (labels >= self.info.num_classes))
        if wrong.size:
            label, name = labels[wrong[0]], self.info.name
            cure = f"put the {'labelled validation shards' if label < 0 else 'files'} of {name}"
            raise UserError(
                f"row {wrong[0]} of {path} has the label {label}, but {name} has the labels 0 to "
                f"{self.info.num_classes - 1}; {cure} there."
            )
        return int(labels.max(initial=-1))


def _integers(path: Path, column: Any) -> Int64Array:
    """A column of labels as int64 [N]; UserError where one is missing."""
    if column.null_count:
        first = column.is_null().to_pylist().index(True)
        raise UserError(f"row {first} of {path} has no label.")
    values = column.to_numpy(zero_copy_only=False)
    check_int64(values, f"the label column of {path}")
    labels: Int64Array = values.astype(np.int64)
    return labels


def _rows_of_card(card: Path, split: str, folders: set[str]) -> int:
    """`num_examples` of a split in the head of a README.md, 0 where that is not told."""
    with contextlib.suppress(UserError, LookupError, TypeError, ValueError, AttributeError):
        found = parse_yaml(read_text(card).split("---\n", 2)[1], where=str(card))["dataset_info"]
        infos = found if isinstance(found, list) else [found]
        # Of several configurations that of the folder with its name.
        own = [info for info in infos if len(infos) == 1 or info["config_name"] in folders]
        rows = {entry["name"]: entry["num_examples"] for entry in own[0]["splits"]}
        return int(rows.get(split, 0))
    return 0


# ---- which files are those of a split


def search_shards(base: Path, name: str, prefixes: tuple[str, ...]) -> dict[str, Shards]:
    """{"train": shards, "test": shards} of the first folder that has any, or {}."""
    for folder in (base, base / "data", base / "plain_text", base / name):
        train = _find_shards(folder, "train")
        test = next((found for prefix in prefixes if (found := _find_shards(folder, prefix))), ())
        if train and test:
            return {"train": train, "test": test}
        if train or test:
            lone, other = (train, prefixes[0]) if train else (test, "train")
            raise UserError(
                f"{folder} has {lone[0].name}, but no {other}-*-of-*.parquet; put the missing "
                "files there."
            )
    return {}


def find_hub_source(info: DatasetInfo, split: str) -> ShardSource:
    """The source of a split of `hf:PATH`, a folder or a Parquet file in it. Raises UserError.

    There or in the subfolder of its only configuration lie <split>-00000-of-00002.parquet ...,
    <split>.parquet, <split>/*.parquet or, of `save_to_disk`, <split>/*.arrow.
    """
    path = _hub_path(info.name)
    folder = path.parent if path.is_file() else path
    with readable(folder):
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    bases = [folder, *(folder / name for name in names if not name.startswith("."))]
    found = [base for base in bases if _split_shards(base, "train")]
    if not found:
        raise UserError(
            f"there is no training split in {folder}; {info.name} needs train-*-of-*.parquet, "
            "train.parquet, train/*.parquet or train/*.arrow there."
        )
    if len(found) > 1 and found[0] != folder:
        choices = ", ".join(f"hf:{base}" for base in found[:3])
        raise UserError(f"{folder} holds several configurations; name one of them: {choices}.")
    if split == "train":
        return ShardSource(info, split, _split_shards(found[0], "train"))
    prefixes = info.files.held_out_shards
    sides = [shards for prefix in prefixes if (shards := _split_shards(found[0], prefix))]
    if not sides:
        raise UserError(
            f"{info.name} has a training split in {found[0]}, but none of {', '.join(prefixes)}; "
            "put pictures there that no training sees, e.g. by train_test_split of `datasets`."
        )
    sources = [ShardSource(info, split, shards) for shards in sides]
    # The test labels of a competition are not public: all are -1, and validation has some.
    return next((source for source in sources if source.is_labelled()), sources[0])


def _hub_path(name: str) -> Path:
    path = name.removeprefix(HUB_PREFIX)
    if not path:
        raise UserError(f"the data set {name!r} names no folder; give hf:PATH.")
    found = expand_home(path)
    if not found.exists():
        raise UserError(
            f"there is no folder {found}; hf:PATH names one on this disk, such as `hf download "
            "--repo-type dataset OWNER/NAME --local-dir PATH` makes."
        )
    return found


def _split_shards(base: Path, split: str) -> Shards:
    """The split's files in any layout of the hub, in order, or (). Raises UserError."""
    if found := _find_shards(base, split):
        return found
    if (base / f"{split}.parquet").is_file():
        return (base / f"{split}.parquet",)
    folder = base / split
    if (folder / "state.json").is_file():
        return _saved_shards(folder)
    return tuple(sorted(folder.glob("*.parquet")))


def _saved_shards(folder: Path) -> Shards:
    """The files that `save_to_disk` lists; others may lie beside them. Raises UserError."""
    path = folder / "state.json"
    try:
        files = read_json(path)["_data_files"]
        return tuple(folder / Path(file["filename"]).name for file in files)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"cannot read {path} ({type(error).__name__}); save it to disk again."
        ) from error


def _find_shards(folder: Path, split: str) -> Shards:
    """The split's files `<split>-00000-of-00002.parquet` ... in order; () if there are none.

    Raises UserError if the set is incomplete or two sets are mixed.
    """
    pattern = re.compile(rf"{split}-(\d+)-of-(\d+)(-[0-9a-f]+)?\.parquet")
    found = sorted(
        (int(match[1]), int(match[2]), path)
        for path in folder.glob(f"{split}-*.parquet")
        if (match := pattern.fullmatch(path.name))
    )
    if not found:
        return ()
    numbers, total = [number for number, _, _ in found], found[0][1]
    one_set = {of for _, of, _ in found} == {total} and max(numbers) < total
    if not one_set or len(set(numbers)) < len(numbers):
        names = ", ".join(path.name for _, _, path in found[:4])
        raise UserError(f"{folder} mixes shards of different {split} sets ({names}); keep one set.")
    if missing := sorted(set(range(total)) - set(numbers)):
        name = f"{split}-{missing[0]:05d}-of-{total:05d}.parquet"
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"the shard {name}{more} is missing in {folder}; fetch it again.")
    return tuple(path for _, _, path in found)


# ---- reading one file


class _ParquetTable:
    """A Parquet file, of which a few rows are in memory at a time."""

    def __init__(self, file: Any) -> None:
        self.file, self.schema, self.num_rows = file, file.schema_arrow, file.metadata.num_rows

    def read_column(self, name: str) -> Any:
        return self.file.read(columns=[name]).column(name).combine_chunks()

    def batches(self, rows: int, image: str, label: str) -> Iterator[Any]:
        yield from self.file.iter_batches(rows, columns=[f"{image}.bytes", label])


class _ArrowTable:
    """An Arrow stream that is mapped into memory: nothing is copied before it is used."""

    def __init__(self, table: Any) -> None:
        self.table, self.schema, self.num_rows = table, table.schema, table.num_rows

    def read_column(self, name: str) -> Any:
        return self.table.column(name).combine_chunks()

    def batches(self, rows: int, image: str, label: str) -> Iterator[Any]:
        yield from self.table.select([image, label]).to_batches(max_chunksize=rows)


@contextlib.contextmanager
def _open_table(path: Path) -> Iterator[_ParquetTable | _ArrowTable]:
    """An open shard; what Arrow or the system says about a bad file becomes a UserError."""
    import pyarrow as pa  # takes a while, and folders and generated data need none
    import pyarrow.parquet as pq

    check_plain(path)
    try:
        if path.suffix == ".arrow":
            with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
                yield _ArrowTable(stream.read_all())
        else:
            with pq.ParquetFile(path, buffer_size=_READ_AHEAD, pre_buffer=False) as file:
                yield _ParquetTable(file)
    except (pa.ArrowException, OSError) as error:
        kind = "Arrow" if path.suffix == ".arrow" else "Parquet"
        raise UserError(
            f"cannot read the {kind} file {path} ({one_line(error)}); it may be incomplete: "
            "fetch it again."
        ) from error


def _features(schema: Any) -> dict[str, Any]:
    """The `huggingface` metadata of each column, or {} where it has none."""
    try:
        found = parse_json((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _declared_names(schema: Any, label: str) -> tuple[str, ...]:
    """Class names from the `huggingface` metadata, or () where it has none."""
    try:
        names = _features(schema)[label]["names"]
    except (KeyError, TypeError):
        return ()
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return tuple(names)
    return ()


def _declared_column(schema: Any, kind: str) -> str | None:
    """The only column that is declared to be of a kind, or None."""
    found = [
        name
        for name, feature in _features(schema).items()
        if isinstance(feature, dict) and feature.get("_type") == kind and name in schema.names
    ]
    return found[0] if len(found) == 1 else None
