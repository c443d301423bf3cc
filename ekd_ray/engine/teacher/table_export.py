"""A teacher's table as one file for other people's loops: Parquet or safetensors.

Both hold a row for each (image, view) whose check word fits, by image and then by view:

    image    int32 [N]         position in the data set's training split
    view     int32 [N]         which form of the image, see `describe_views`
    logits   float16 [N, C]    before any softmax: just what ekd_ray's own runs read

and for a table of the k largest logits, in place of the last:

    logits   float16 [N, k]
    classes  uint16 [N, k]     whose logits these are
    rest     float16 [N]       the logit of every other class, so that their softmax mass is exact

The metadata have one key, "ekd_ray", with JSON: `describe_table`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ekd_ray.config.phrases import short_name
from ekd_ray.data import RESIZED_CROP, view_count
from ekd_ray.data.views import view_scheme
from ekd_ray.engine.teacher.table import Ids, Rows, TableSpec, TeacherTable, read_spec
from ekd_ray.errors import UserError
from ekd_ray.files import atomic_path, check_file_place

EXPORT_VERSION = 1
METADATA = "ekd_ray"
SUFFIXES = (".parquet", ".safetensors")
Columns = dict[str, npt.NDArray[Any]]


def export_table(folder: Path, out: Path) -> int:
    """Write the sound rows of the table in `folder` to the file `out`; returns their number.

    Parquet is written part by part; safetensors is put together in memory first.

    Args:
        out: a new file; its suffix, .parquet or .safetensors, says which form.

    Raises:
        UserError: no table of this version, no sound row in it, another suffix, or `out` exists.
    """
    if out.suffix not in SUFFIXES:
        raise UserError(f"a table is exported to .parquet or .safetensors, got {str(out)!r}.")
    if out.exists():
        raise UserError(f"{out} exists: choose another --out, or remove it.")
    spec = read_spec(folder)
    if spec is None:
        raise UserError(f"{folder} is not a table of this version: remove it with rm.")
    check_file_place(out)
    table = TeacherTable(folder, spec)
    try:
        if not table.sound()[0]:
            raise UserError(f"{folder.name} has no rows yet: fill it first.")
        with atomic_path(out) as temporary:
            write = _write_parquet if out.suffix == ".parquet" else _write_safetensors
            return write(temporary, table, json.dumps(describe_table(spec), sort_keys=True))
    finally:
        table.close()


def describe_table(spec: TableSpec) -> dict[str, Any]:
    """The metadata of an exported table: the teacher, the data, the views, as plain values."""
    facts = spec.facts
    top = spec.row_format.top
    return {
        "format_version": EXPORT_VERSION,
        "teacher": facts["teacher"],
        "teacher_sha256": facts["teacher_sha256"],  # of its weights file
        "teacher_normalization": facts["normalization"],
        "precision": facts["precision"],
        "dataset": short_name(facts["dataset"]),  # a folder's path is nobody's business
        "data_fingerprint": facts["data_fingerprint"],
        "split": "train",
        "num_images": spec.num_samples,
        "num_classes": spec.row_format.num_classes,
        "top": top,
        "views": describe_views(spec),
    }


def describe_views(spec: TableSpec) -> dict[str, Any]:
    """How to make the picture that (image, view) names: `scheme`, `count`, numbers, and `rule`."""
    facts, views = spec.facts, "ekd_ray.data.views"
    found: dict[str, Any] = {"scheme": facts["view_scheme"], "image_size": facts["image_size"]}
    if facts["view_scheme"] == RESIZED_CROP:
        found |= {"seed": facts["view_seed"]}
        rule = (
            f"With bits = {views}.crop_bits([image], [view], seed)[0], cut "
            "crop_box(width, height, bits) from the picture of width x height pixels, resize it "
            "to image_size (bilinear with antialiasing), mirror it left to right if "
            "crop_flips(bits); ekd_ray.data.decode.decode_view(data, name, image_size, bits) "
            "does so."
        )
    elif (scheme := view_scheme(facts["view_scheme"])).count == 1:
        rule = (
            "The only view is the image as evaluation sees it (of a picture of another size the "
            "centre, resized)."
        )
    else:
        found |= {"padding": scheme.padding, "flip": scheme.flip}
        rule = (
            "view = (mirrored * s + dy) * s + dx with s = 2 * padding + 1: put `padding` black "
            "pixels on every side of the image, cut image_size x image_size from row dy and "
            "column dx, mirror that left to right if mirrored is 1."
        )
    drawn = facts.get("drawn_views")
    if not (facts["strong"] or drawn):
        return {**found, "count": spec.num_views, "strong": False, "rule": rule}
    # Of a pool of strong or drawn views; the rule above makes their base.
    found |= {"seed": facts["view_seed"], "base_rule": rule}
    found["base_count"] = view_count(facts["view_scheme"], spec.num_views)
    if drawn:
        rule = (
            "With a DrawnViews of ekd_ray.data.drawn_views (the run's configuration, base_count, "
            "image_size, the classes, and as partners the ids of its training images), "
            "below([image], [view]) names pictures and their views by base_rule; finish(images, "
            "labels, [image], [view]) makes the drawn view of them."
        )
        return {
            **found, "count": spec.num_views, "strong": False, "drawn_views": drawn, "rule": rule
        }  # fmt: skip
    strong = "ekd_ray.data.strong_views"
    rule = (
        f"base = {strong}.strong_base_views([image], [view], seed=seed, num_views=base_count)[0] "
        "is a view by base_rule; strong_augment(images, strong_draws([image], [view], seed=seed)) "
        "makes the strong view of it, with images uint8 [1, 3, H, W]."
    )
    return {**found, "count": spec.num_views, "strong": True, "rule": rule}


def _columns(spec: TableSpec, positions: Ids, rows: Rows) -> Columns:
    found: Columns = {
        "image": (positions // spec.num_views).astype(np.int32),
        "view": (positions % spec.num_views).astype(np.int32),
    }
    k = spec.row_format.top
    if k is None:
        return {**found, "logits": rows.view(np.float16)}
    return {
        **found,
        "logits": np.ascontiguousarray(rows[:, :k]).view(np.float16),
        "classes": np.ascontiguousarray(rows[:, k : 2 * k]),
        "rest": np.ascontiguousarray(rows[:, 2 * k]).view(np.float16),
    }


def _parts(table: TeacherTable) -> Iterator[Columns]:
    for positions, rows, fits in table.checked_rows():
        yield _columns(table.spec, positions[fits], rows[fits])


def _write_parquet(path: Path, table: TeacherTable, metadata: str) -> int:
    import pyarrow as pa  # slow import
    import pyarrow.parquet as pq

    def arrow(values: npt.NDArray[Any]) -> pa.Array:
        flat = pa.array(values.ravel())
        return (
            flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
        )

    writer, count = None, 0
    try:
        for part in _parts(table):
            batch = pa.table({name: arrow(values) for name, values in part.items()})
            batch = batch.replace_schema_metadata({METADATA: metadata})
            writer = writer or pq.ParquetWriter(path, batch.schema, compression="zstd")
            writer.write_table(batch)
            count += len(batch)
    finally:
        if writer:
            writer.close()
    return count


def _write_safetensors(path: Path, table: TeacherTable, metadata: str) -> int:
    from safetensors.numpy import save

    parts = list(_parts(table))
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    path.write_bytes(save(whole, metadata={METADATA: metadata}))  # save_file's is private (0600)
    return len(whole["image"])
