"""A look at every picture before compute: what is skipped, odd, damaged, or there twice."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from ekd_ray.config.phrases import several
from ekd_ray.data.counter import Int64Array
from ekd_ray.data.datasets import find_split, load_dataset
from ekd_ray.data.decode import FORMATS, MOST_PICTURE, convert_to_rgb, orientation
from ekd_ray.data.sources import SPLITS, SUFFIXES, FolderSource, Source, one_line
from ekd_ray.data.store import READERS, EncodedImages, ImageArrays
from ekd_ray.errors import UserError
from ekd_ray.files import (
    close_to_others,
    default_cache_dir,
    is_own_entry,
    make_private,
    open_plain,
    read_json,
    write_json,
)

_VERSION = 3  # raise it when the same files would be called something else
_SAMPLE = 500  # pictures of a split that are decoded
_HEAD = 4096  # bytes by which pictures are first compared
_TAIL = 64  # bytes in which a whole file has its end
_BATCH = 1024  # pictures between two words of progress
_NAMED = 3

# How pictures of a kind are read.
_KINDS = {
    "of 16 bits": "scaled to 8 bits",
    "in CMYK": "converted to RGB",
    "with transparency": "read without it, by the colours beneath",
    "with several frames": "the first is taken",
    "with an EXIF orientation": "turned as it says",
    "of more than 89 megapixels": "slow to decode: make them smaller",
}
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}

Say = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Scan:
    """The findings.

    `damaged` has for each split [position, name, reason] of every such picture, of those that
    were decoded; `in_test` and `repeated` are the positions of training pictures that are test
    pictures, or earlier training pictures, too, byte for byte (`relabelled` of these have two
    labels); `notes` are sentences on what else is worth a word; `side` is the median of the
    pictures' shorter sides in pixels, where they are files.
    """

    images: dict[str, int]
    damaged: dict[str, list[tuple[int, str, str]]]
    in_test: list[int] = field(default_factory=list)
    repeated: list[int] = field(default_factory=list)
    relabelled: int = 0
    notes: list[str] = field(default_factory=list)
    side: int | None = None

    def check(self, name: str) -> None:
        """Raise UserError where a picture is damaged."""
        found = [entry for entries in self.damaged.values() for entry in entries]
        if not found:
            return
        named = ", ".join(f"{picture} ({reason})" for _, picture, reason in found[:_NAMED])
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        raise UserError(
            f"{several(len(found), 'picture')} of {sum(self.images.values()):,} of {name} cannot "
            f"be decoded: {named}{more}; restore or remove them, or leave them out with "
            "--skip-damaged (skip_damaged: true)."
        )

    def lines(self, *, size: int, skip_damaged: bool, exclude_duplicates: bool) -> list[str]:
        """Sentences for the plan and the bundle, on what the settings leave out too.

        Args:
            size: side of the square in pixels that is trained at.
        """
        lines = list(self.notes)
        if self.side and self.side != size:
            how = "enlarged" if self.side < size else "reduced"
            lines.append(f"shorter sides of {self.side} pixels (median), {how} to {size}")
        for split, found in self.damaged.items():
            if found and skip_damaged:
                count = several(len(found), "damaged picture")
                named = ", ".join(name for _, name, _ in found[:_NAMED])
                lines.append(f"{count} of {split} left out ({named})")
        kinds = {"a test picture": self.in_test, "an earlier training picture": self.repeated}
        counts = [
            f"{len(ids):,} repeat{'s' * (len(ids) == 1)} {kind}"
            for kind, ids in kinds.items()
            if ids
        ]
        if counts:
            labels = f", {self.relabelled:,} under another label" if self.relabelled else ""
            cure = "left out" if exclude_duplicates else "--exclude-duplicates leaves them out"
            lines.append(
                f"of {self.images['train']:,} training pictures {' and '.join(counts)}, byte for "
                f"byte{labels}: {cure}"
            )
        return lines

    def left_out(self, split: str, *, skip_damaged: bool, exclude_duplicates: bool) -> Int64Array:
        """Positions int64 in a split that the settings leave out, sorted."""
        ids = [position for position, _, _ in self.damaged[split]] if skip_damaged else []
        if exclude_duplicates and split == "train":
            ids += [*self.in_test, *self.repeated]
        return np.unique(np.asarray(ids, np.int64))


_known: dict[str, Scan] = {}


def scan_dataset(
    name: str,
    *,
    data_root: str | os.PathLike[str] | None = None,
    every: bool = False,
    say: Say = lambda done, total: None,
) -> Scan:
    """Look at all pictures of both splits, in parallel; the findings are cached.

    Headers are read and files compared, and those are decoded that lack their end; of the others
    500 of a split. The cache knows a picture by its size and time.

    Args:
        every: decode all.
        say: called with the numbers of pictures done and in all.

    Raises:
        UserError: files that are missing or unsuitable; not for a damaged picture.
    """
    sources = {split: find_split(name, split, data_root=data_root) for split in SPLITS}
    splits = {split: load_dataset(name, split, data_root=data_root) for split in SPLITS}
    where = [source.identity() for source in sources.values()]
    short = json.dumps([name, every, *where, *(arrays.fingerprint for arrays in splits.values())])
    if short in _known:
        return _known[short]
    stamp = hashlib.sha256()
    notes: list[str] = []
    for split, source in sources.items():
        stamp.update(splits[split].fingerprint.encode())
        if isinstance(source, FolderSource):
            index = source.index()
            stamp.update(index.sizes.tobytes() + index.times.tobytes())
            notes += _describe_skipped(split, source, index.labels)
    folder, kind = default_cache_dir() / "datasets", name.partition(":")[0]
    paths = {
        all_of: folder / f"{kind}-scan-{_VERSION}-{stamp.hexdigest()[:20]}-{word}.json"
        for all_of, word in ((True, "all"), (False, "sample"))
    }
    found = _read(paths[True]) or (None if every else _read(paths[False]))
    if found is None:
        places = {split: _place(source) for split, source in sources.items()}
        found = _look(splits, places, every=every, say=say)
        content = asdict(found)
        with contextlib.suppress(OSError):  # a cache that is read-only or full costs time alone
            make_private(folder)
            write_json(paths[every], {"scan": content, "sha256": _digest(content)})
            close_to_others(paths[every])
    # Names and what is skipped are of today.
    _known[short] = Scan(**{**asdict(found), "notes": [*notes, *found.notes]})
    return _known[short]


def _place(source: Source) -> str:
    """Where a split's data lie, which is left out of the names of its pictures."""
    if isinstance(source, FolderSource):
        return f"{source.side.absolute().parent}/"
    return f"{source.files[0].parent}/" if source.files else ""


def _read(path: Path) -> Scan | None:
    if not path.exists() or not is_own_entry(path):
        return None
    with contextlib.suppress(UserError):
        found = read_json(path)
        scan = found.get("scan")
        if isinstance(scan, dict) and found.get("sha256") == _digest(scan):
            return Scan(**scan)
    return None


def _digest(scan: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(scan, sort_keys=True).encode()).hexdigest()


def _describe_skipped(split: str, source: FolderSource, labels: Int64Array) -> Iterator[str]:
    """Files of a side that are no pictures to us, and classes that lack pictures."""
    if source.skipped:
        kinds = Counter(Path(path).suffix.lower() or "no ending" for path in source.skipped)
        text = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(_NAMED))
        yield (
            f"{several(len(source.skipped), 'file')} of {split} skipped ({text}; such as "
            f"{source.skipped[0]}): pictures end in {', '.join(SUFFIXES)}"
        )
    with os.scandir(source.side) as entries:
        lone = [e.name for e in entries if e.name.lower().endswith(SUFFIXES) and e.is_file()]
    if lone:
        yield (
            f"{several(len(lone), 'picture')} of {split} skipped ({min(lone)}): in no class folder"
        )
    empty = [
        n for n, c in enumerate(np.bincount(labels, minlength=len(source.class_names))) if not c
    ]
    if empty:
        first = source.class_names[empty[0]]
        yield f"{len(empty)} of {len(source.class_names)} classes have no {split} picture ({first})"
    alike = Counter(name.casefold() for name in source.class_names)
    if split == "train" and (same := [n for n in source.class_names if alike[n.casefold()] > 1]):
        yield f"class folders that differ by case alone: {', '.join(same[:_NAMED])}"


# ---- looking


class _Seen(NamedTuple):
    key: int  # equal for equal pictures, and for few others
    kinds: tuple[str, ...]
    damage: str | None
    side: int | None = None  # the shorter one, in pixels


def _look(
    splits: dict[str, ImageArrays | EncodedImages],
    places: dict[str, str],
    *,
    every: bool,
    say: Say,
) -> Scan:
    total, done = sum(map(len, splits.values())), 0
    keys: dict[str, Int64Array] = {}
    kinds: Counter[str] = Counter()
    examples: dict[str, str] = {}
    damaged: dict[str, list[tuple[int, str, str]]] = {split: [] for split in splits}
    sides: list[int] = []
    with warnings.catch_warnings(), ThreadPoolExecutor(READERS) as pool:
        warnings.simplefilter("ignore")  # PIL's, of what is counted here
        for split, arrays in splits.items():
            found = keys[split] = np.zeros(len(arrays), np.int64)
            step = 1 if every else max(1, len(arrays) // _SAMPLE)
            for start in range(0, len(arrays), _BATCH):
                say(done + start, total)
                ids = range(start, min(start + _BATCH, len(arrays)))
                for i, seen in zip(ids, pool.map(lambda i: _see(arrays, i, i % step == 0), ids),  # noqa: B023
                                   strict=True):  # fmt: skip
                    found[i] = seen.key
                    kinds.update(seen.kinds)
                    if seen.side is not None:
                        sides.append(seen.side)
                    if isinstance(arrays, EncodedImages) and (seen.kinds or seen.damage):
                        name = arrays.pictures.name(i).replace(places[split], "")
                        name = name.removeprefix("the image ") if places[split] else name
                        examples = dict.fromkeys(seen.kinds, name) | examples
                        if seen.damage:
                            damaged[split].append((i, name, seen.damage))
            done += len(arrays)
    say(total, total)
    notes = [
        f"{several(kinds[kind], 'picture')} {kind} ({examples[kind]}): {how}"
        for kind, how in _KINDS.items()
        if kinds[kind]
    ]
    in_test, repeated, relabelled = _find_equal(splits, keys)
    return Scan(
        images={split: len(arrays) for split, arrays in splits.items()},
        damaged=damaged, in_test=in_test, repeated=repeated, relabelled=relabelled, notes=notes,
        side=int(np.median(sides)) if sides else None,
    )  # fmt: skip


def _see(arrays: ImageArrays | EncodedImages, index: int, decode: bool) -> _Seen:
    if isinstance(arrays, ImageArrays):
        return _Seen(_key(arrays.images[index].tobytes()), (), None)
    key = -index - 1  # equal to none
    try:
        with _opened(arrays, index) as (file, size):
            head = file.read(_HEAD)
            key = _key(size.to_bytes(8, "little") + head)
            file.seek(max(0, size - _TAIL))
            tail = file.read()
            file.seek(0)
            with Image.open(file, formats=FORMATS) as image:
                kinds = tuple(_kinds_of(image))
                if decode or _ENDS.get(str(image.format), b"") not in tail:
                    convert_to_rgb(image, "it").load()
                return _Seen(key, kinds, None, min(image.size))
    except Exception as error:  # PIL raises a dozen kinds for damaged files
        # Its own text names a file object by address, which helps nobody.
        text = type(error).__name__ if "_io." in str(error) else one_line(error)
        return _Seen(key, (), text)


def _kinds_of(image: Any) -> Iterator[str]:
    held = {
        "of 16 bits": image.mode.startswith("I"),
        "in CMYK": image.mode == "CMYK",
        "with transparency": image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info,
        "with several frames": getattr(image, "is_animated", False),
        "with an EXIF orientation": orientation(image) != 1,
        "of more than 89 megapixels": image.width * image.height
        > (Image.MAX_IMAGE_PIXELS or 2**63),
    }
    return (kind for kind, holds in held.items() if holds)


@contextlib.contextmanager
def _opened(arrays: EncodedImages, index: int) -> Iterator[tuple[BinaryIO, int]]:
    """The picture as a file, and its size in bytes; of class folders it is not read whole."""
    path = arrays.pictures.path(index)
    if path is None:
        data = arrays.pictures.read(index)
        yield io.BytesIO(data), len(data)
        return
    with open_plain(path, most=MOST_PICTURE, cure="restore the image") as file:
        yield file, os.fstat(file.fileno()).st_size


def _key(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


def _find_equal(
    splits: dict[str, ImageArrays | EncodedImages], keys: dict[str, Int64Array]
) -> tuple[list[int], list[int], int]:
    """Training pictures that are in test, that repeat an earlier one, and how many of these have
    another label there."""
    test = splits["test"]
    both = np.concatenate([keys["test"], keys["train"]])
    _, inverse, counts = np.unique(both, return_inverse=True, return_counts=True)
    in_test: list[int] = []
    repeated: list[int] = []
    relabelled = 0
    first: dict[bytes, tuple[str, int, int]] = {}
    for row in np.flatnonzero(counts[inverse] > 1).tolist():  # test pictures come first
        split, i = ("test", row) if row < len(test) else ("train", row - len(test))
        content, label = _content(splits[split], i), int(splits[split].labels[i])
        there = content and first.setdefault(content, (split, i, label))
        if there and split == "train" and there[:2] != (split, i):
            (in_test if there[0] == "test" else repeated).append(i)
            relabelled += there[2] != label
    return in_test, repeated, relabelled


def _content(arrays: ImageArrays | EncodedImages, index: int) -> bytes | None:
    """A digest of the whole picture; None where it cannot be read, which was said before."""
    try:
        data = (
            arrays.images[index].tobytes()
            if isinstance(arrays, ImageArrays)
            else arrays.pictures.read(index)
        )
    except UserError:
        return None
    return hashlib.sha256(data).digest()
