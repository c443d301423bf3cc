"""Which layout a data set's files have where they lie."""

from __future__ import annotations

import contextlib
from pathlib import Path

from ekd_ray.data.loaded import LoadedSource
from ekd_ray.data.registry import FOLDER_PREFIX, HUB_PREFIX, DatasetInfo
from ekd_ray.data.shards import ShardSource, find_hub_source, search_shards
from ekd_ray.data.sources import (
    SPLITS,
    ArchiveSource,
    FolderSource,
    Source,
    download_archive,
    folder_path,
    one_line,
)
from ekd_ray.errors import UserError


def find_source(info: DatasetInfo, split: str, root: Path, *, download: bool) -> Source:
    """The source of a split below `root`; fetched first if it is missing and `download` is set.

    Looked for in root/<name>/ and root/, there as the original's folder, then as class folders,
    then as Parquet (also in the hub's subfolders data/, plain_text/ and <name>/); `folder:PATH`
    and `hf:PATH` only in PATH. Both splits must be in the same place, so that training and test
    images never differ in their compression. Raises UserError.
    """
    if info.load is not None:
        return LoadedSource(info, split, root)
    if info.name.startswith(HUB_PREFIX):
        return find_hub_source(info, split)
    found = _search(info, split, root)
    if download and info.files.torchvision_class and (found is None or _is_damaged(found)):
        download_archive(info, root / info.name)
        found = _search(info, split, root)
    if found is None:
        raise _no_files(info, root)
    return found


def check_source(info: DatasetInfo, root: Path, *, download: bool) -> None:
    """Both splits are there and look sound, or `download` will bring them. Raises UserError."""
    fetched = download and info.files.torchvision_class is not None
    for split in SPLITS:
        hub = info.name.startswith(HUB_PREFIX)
        found = find_hub_source(info, split) if hub else _search(info, split, root)
        if found is None and not fetched:
            raise _no_files(info, root)
        if found is not None and not (fetched and isinstance(found, ArchiveSource)):
            found.check()
        if isinstance(found, ShardSource):
            _check_count(found)


def _check_count(source: ShardSource) -> None:
    """Raise UserError unless a split has as many rows as were published.

    As published of a data set that comes in one size only, or as its card says.
    """
    info, there = source.info, sum(source.parts.values())
    published = {"train": info.num_train, "test": info.num_test}
    count, says = published[source.split], info.name
    if info.files.held_out or info.name.startswith(HUB_PREFIX):
        count, says = source.stated_rows()
    if count and there != count:
        folder = source.files[0].parent
        raise UserError(
            f"the {source.split} shards in {folder} have {there:,} rows, but {says} has {count:,}: "
            "fetch them again, all of them; a part of a data set goes by hf:PATH, without a "
            "README.md that states another number."
        )


def _is_damaged(source: Source) -> bool:
    """Whether a download would mend it."""
    with contextlib.suppress(UserError):
        if isinstance(source, ArchiveSource):
            source.check()
        return False
    return True


def _no_files(info: DatasetInfo, root: Path) -> UserError:
    name, files = info.name, info.files
    folders, cure = f"{files.pickled_folder}/", ", or fetch them with --download"
    if files.pickled_folder is None:
        folders, cure = f"train/ and {files.held_out[0]}/", ""
    return UserError(
        f"no {name} files ({folders} or train-*-of-*.parquet) in {root / name} or {root}; name "
        f"their folder with --data-root (or EKD_DATA_ROOT){cure}."
    )


def _search(info: DatasetInfo, split: str, root: Path) -> Source | None:
    """The source in the first folder that has one, or None. Raises UserError."""
    if info.name.startswith(FOLDER_PREFIX):
        bases = [folder_path(info.name)]
    else:
        bases = [root / info.name, root]
        if info.files.unpacked_folder is not None:
            bases = [base / part for base in bases for part in (info.files.unpacked_folder, "")]
    try:
        found = (_search_folder(base, info, split) for base in bases)
        return next((source for source in found if source is not None), None)
    except OSError as error:  # a folder that may not be entered, an overlong name
        raise UserError(
            f"cannot look for {info.name} in {root} ({one_line(error)}); name a readable folder "
            "with --data-root."
        ) from error


def _search_folder(base: Path, info: DatasetInfo, split: str) -> Source | None:
    files = info.files
    if files.pickled_folder is not None and (base / files.pickled_folder).is_dir():
        return ArchiveSource(info, split, base / files.pickled_folder)
    if files.held_out and (base / "train").is_dir():
        held_out = [base / name for name in files.held_out if (base / name).is_dir()]
        if not held_out:
            names = ", ".join(f"{name}/" for name in files.held_out)
            raise UserError(f"{base} has train/, but none of {names}; put held-out images there.")
        return FolderSource(info, split, base / "train", held_out[0])
    if files.held_out_shards and (shards := search_shards(base, info.name, files.held_out_shards)):
        return ShardSource(info, split, shards[split])
    return None
