"""A teacher's logits on disk: one row for every (sample, view), asked for once.

A table is a folder `<cache>/teachers/<teacher>-<dataset>-<key>/` of three files: `meta.json`
with all that decides a row, `rows.bin` (uint16 [N * V, W], sparse) and `words.bin` (uint32
[N * V]). A row's check word is a hash of its bits, its position and the table's key,
never 0. A reader trusts a row whose word fits and takes any other for missing: never written,
half written, or damaged. So readers need no lock, and several processes fill a table at once;
the worst that can happen is that two of them compute the same row.

Writing goes through `pwrite` and reading through a memory map: on a full disk the former
fails with an error, a map with SIGBUS. That is so of a file in memory (tmpfs) where a hole of it
is read, too: so words have their room from the start, and a row is read only where it has a word.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ekd_ray.config.phrases import short_name
from ekd_ray.data import counter_hash, default_cache_dir
from ekd_ray.errors import UserError
from ekd_ray.files import (
    close_to_others,
    file_name,
    is_own_entry,
    make_private,
    read_json,
    remove_path,
    temporary_folder,
    write_json,
)

FORMAT_VERSION = 2  # a part of the key: other formats are other tables
CHECKED_ROWS = 1 << 16  # whose words are compared together
_LARGEST_HALF = 65504.0
Rows = npt.NDArray[np.uint16]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """How the logits of one sample become W words of 16 bits, and back.

    Dense rows hold every class as float16. With `top` = k they hold the k largest logits,
    their classes, and one value for all the rest, chosen so that the softmax mass of the
    rest is exact. The teacher's logits are *defined* as what a row gives back, whether they
    come from a table or from the network: a cached run equals a live one bit for bit.
    """

    num_classes: int
    top: int | None = None

    @property
    def width(self) -> int:
        """W, words of 16 bits in a row."""
        return self.num_classes if self.top is None else 2 * self.top + 1

    def encode(self, logits: Tensor) -> Tensor:
        """Float logits [B, C] -> int16 [B, W] on the same device (the bits of the row)."""
        logits = logits.float().clamp(-_LARGEST_HALF, _LARGEST_HALF)
        if self.top is None:
            return logits.half().view(torch.int16)
        values, classes = logits.topk(self.top, dim=1)
        others = logits.scatter(1, classes, -torch.inf)
        highest = others.amax(dim=1, keepdim=True)
        mass = (others - highest).exp().sum(dim=1, keepdim=True)
        # The log of a mean of 1 is exactly 0, so that rounding twice is rounding once.
        rest = highest + (mass / (self.num_classes - self.top)).log()
        return torch.cat(
            [values.half().view(torch.int16), classes.short(), rest.half().view(torch.int16)], 1
        )

    def decode(self, rows: Tensor) -> Tensor:
        """int16 [B, W] -> float32 logits [B, C] on the same device."""
        if self.top is None:
            return rows.view(torch.float16).float()
        k = self.top
        values = rows[:, :k].contiguous().view(torch.float16).float()
        rest = rows[:, 2 * k :].contiguous().view(torch.float16).float()
        # Classes beyond 32,767 would be negative as int16: the mask makes them whole again.
        classes = rows[:, k : 2 * k].long() & 0xFFFF
        return rest.repeat(1, self.num_classes).scatter(1, classes, values)

    def rounded(self, logits: Tensor) -> Tensor:
        """These logits as a table would give them back: float32 [B, C]."""
        return self.decode(self.encode(logits))


@dataclass(frozen=True, kw_only=True)
class TableSpec:
    """All that decides a table: its shape, and what its rows are a function of."""

    num_samples: int
    num_views: int
    row_format: RowFormat
    facts: Mapping[str, Any]

    @property
    def size(self) -> int:
        """Bytes of the full table."""
        return self.num_samples * self.num_views * (2 * self.row_format.width + 4)

    @property
    def identity(self) -> dict[str, Any]:
        """Plain values for meta.json."""
        return {
            "format_version": FORMAT_VERSION,
            "num_samples": self.num_samples,
            "num_views": self.num_views,
            "num_classes": self.row_format.num_classes,
            "top": self.row_format.top,
            **self.facts,
        }

    @property
    def key(self) -> str:
        """24 hex digits: equal rows, equal key."""
        text = json.dumps(self.identity, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def folder(self) -> Path:
        """Where the table belongs."""
        name = file_name(f"{self.facts['teacher']}-{short_name(self.facts['dataset'])}")
        return tables_dir() / f"{name}-{self.key}"


def tables_dir() -> Path:
    """The folder of all tables, `<cache>/teachers`."""
    return default_cache_dir().absolute() / "teachers"


class TeacherTable:
    """An open table. Make one with `open_table`.

    `writable` is False for a table that this process may only read (another user's, or on a
    read-only mount).
    """

    def __init__(self, folder: Path, spec: TableSpec) -> None:
        self.folder, self.spec = folder, spec
        names = ("rows.bin", "words.bin")
        self.writable = all(os.access(folder / name, os.W_OK) for name in names)
        mode = os.O_RDWR if self.writable else os.O_RDONLY
        self._rows_fd = os.open(folder / "rows.bin", mode)
        try:
            self._words_fd = os.open(folder / "words.bin", mode)
        except BaseException:
            os.close(self._rows_fd)
            raise
        count, width = spec.num_samples * spec.num_views, spec.row_format.width
        self._rows = np.memmap(folder / "rows.bin", np.uint16, "r", shape=(count, width))
        self._words = np.memmap(folder / "words.bin", np.uint32, "r", shape=(count,))
        self._factors = counter_hash(0, np.arange(width)) | np.uint64(1)
        self._salt = np.uint64(int(spec.key[:16], 16))
        # Cold random reads cost 2 ms a batch; sequential ones nearly nothing.
        for descriptor in (self._words_fd, self._rows_fd):
            with contextlib.suppress(OSError, AttributeError):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close both files; reading and writing are over."""
        os.close(self._rows_fd)
        os.close(self._words_fd)

    def _check_words(self, rows: Rows, positions: Ids) -> npt.NDArray[np.uint32]:
        bits = (rows.astype(np.uint64) * self._factors).sum(axis=1, dtype=np.uint64)
        mixed = counter_hash(0, (bits ^ self._salt).view(np.int64), positions)
        return (mixed >> np.uint64(32)).astype(np.uint32) | np.uint32(1)

    def read(self, sample_ids: Ids, view_ids: Ids) -> tuple[Rows, npt.NDArray[np.bool_]]:
        """(rows uint16 [B, W], found bool [B]) of samples and views, int64 [B] each.

        Rows that are not found hold anything.
        """
        positions = np.asarray(sample_ids, np.int64) * self.spec.num_views + view_ids
        # The word first: a writer stores it last, so a word that is there has its row.
        words = self._words[positions]
        written = words != 0
        rows = np.zeros((len(positions), self.spec.row_format.width), np.uint16)
        rows[written] = self._rows[positions[written]]
        return rows, words == self._check_words(rows, positions)

    def write(self, sample_ids: Ids, view_ids: Ids, rows: Rows) -> None:
        """Store rows uint16 [B, W]; raises OSError (a full disk), harmless to readers."""
        positions = np.asarray(sample_ids, np.int64) * self.spec.num_views + view_ids
        rows = np.ascontiguousarray(rows)
        words = self._check_words(rows, positions)
        for position, row, word in zip(positions.tolist(), rows, words, strict=True):
            _write_all(self._rows_fd, row.tobytes(), position * row.nbytes)
            _write_all(self._words_fd, word.tobytes(), position * 4)

    def filled(self) -> int:
        """Number of rows that were ever written (a word that is not 0)."""
        return int(np.count_nonzero(self._words))

    def sound(self) -> tuple[int, int]:
        """(sound, damaged) numbers of written rows: every check word is compared."""
        found = [fits for _, _, fits in self.checked_rows()]
        good = sum(int(fits.sum()) for fits in found)
        return good, sum(map(len, found)) - good

    def checked_rows(self) -> Iterator[tuple[Ids, Rows, npt.NDArray[np.bool_]]]:
        """All written rows, part by part: positions int64 [B], rows uint16 [B, W], sound bool [B].

        Row (sample, view) has position sample * num_views + view.
        """
        written = np.flatnonzero(self._words)
        for start in range(0, len(written), CHECKED_ROWS):
            positions = written[start : start + CHECKED_ROWS]
            rows = np.asarray(self._rows[positions])
            yield positions, rows, self._words[positions] == self._check_words(rows, positions)


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    if os.pwrite(descriptor, data, offset) != len(data):
        raise OSError(28, "No space left on device")


def open_table(spec: TableSpec) -> TeacherTable:
    """Open the table of `spec`, made empty (and sparse) if it is not there.

    Raises:
        OSError: the cache folder cannot be written.
    """
    folder = spec.folder()
    if not _is_whole(folder, spec):
        _create(folder, spec)
    return TeacherTable(folder, spec)


def _is_whole(folder: Path, spec: TableSpec) -> bool:
    count = spec.num_samples * spec.num_views
    try:
        meta = read_json(folder / "meta.json")
        sizes = [(folder / name).stat().st_size for name in ("rows.bin", "words.bin")]
    except (OSError, UserError):
        return False
    fits = meta == spec.identity and sizes == [2 * count * spec.row_format.width, 4 * count]
    return fits and is_own_entry(folder)


def _create(folder: Path, spec: TableSpec) -> None:
    """A new folder beside the place, renamed into it; another process may come first."""
    make_private(folder.parent)
    temporary = temporary_folder(folder)
    try:
        count = spec.num_samples * spec.num_views
        for name, size in (("rows.bin", 2 * spec.row_format.width), ("words.bin", 4)):
            with open(temporary / name, "wb") as file:
                file.truncate(count * size)
                if name == "words.bin" and count and hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, count * size)
        write_json(temporary / "meta.json", spec.identity)
        close_to_others(temporary)
        if folder.exists() and not _is_whole(folder, spec):
            folder.rename(temporary / "damaged")
            remove_path(temporary / "damaged")
        try:
            temporary.rename(folder)
        except OSError:
            if not _is_whole(folder, spec):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@dataclass(frozen=True, kw_only=True)
class TableInfo:
    """One table on disk: what it is, its rows, bytes on disk and bytes when full."""

    folder: Path
    meta: dict[str, Any]
    rows: int
    filled: int
    bytes_used: int
    bytes_full: int
    modified: float


def table_folders() -> list[Path]:
    """The folder of every table of the cache, whole or not, by name."""
    return sorted(tables_dir().glob("[!.]*"))


def list_tables() -> Iterator[TableInfo]:
    """Every whole table of the cache, by name."""
    for folder in table_folders():
        spec = read_spec(folder)
        if spec is None:
            continue
        table = TeacherTable(folder, spec)
        stats = [(folder / name).stat() for name in ("rows.bin", "words.bin")]
        yield TableInfo(
            folder=folder,
            meta=spec.identity,
            rows=spec.num_samples * spec.num_views,
            filled=table.filled(),
            bytes_used=sum(512 * status.st_blocks for status in stats),
            bytes_full=spec.size,
            modified=max(status.st_mtime for status in stats),
        )
        table.close()


def read_spec(folder: Path) -> TableSpec | None:
    """The spec of a table folder, None if it is none (or of another format)."""
    try:
        meta = read_json(folder / "meta.json")
        names = ("num_samples", "num_views", "num_classes", "top")
        samples, views, classes, top = (meta.pop(name) for name in names)
        del meta["format_version"]
        counts = (samples, views, classes, *(() if top is None else (top, classes - top)))
        texts = (meta["teacher"], meta["dataset"])
    except (UserError, KeyError, AttributeError, TypeError):
        return None
    if not all(type(count) is int and count > 0 for count in counts):
        return None
    if not all(isinstance(text, str) for text in texts):
        return None
    spec = TableSpec(
        num_samples=samples,
        num_views=views,
        row_format=RowFormat(num_classes=classes, top=top),
        facts=meta,
    )
    return spec if _is_whole(folder, spec) else None


def find_table(name: str) -> Path:
    """The folder of a table by its name or the beginning of it; raises `UserError`."""
    found = [folder for folder in table_folders() if folder.name.startswith(name)]
    if len(found) != 1:
        tables, begin = (f"{len(found)} tables", "begin") if found else ("no table", "begins")
        raise UserError(
            f"{tables} of the teacher cache {begin} with {name!r}: see ekd-ray cache ls."
        )
    return found[0]
