"""The source of a run's teacher's logits: the live network, or the table of them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ekd_ray.config import DistillConfig
from ekd_ray.config.normalization import parse_normalization
from ekd_ray.config.plugins import stamps_of
from ekd_ray.data import HostCopy, dataset_info, normalize, num_train, to_device
from ekd_ray.data.drawn_views import count_views, drawn_settings
from ekd_ray.engine.determinism import FLOAT32, fixed_convolutions
from ekd_ray.engine.features import find_classifier, record_features
from ekd_ray.engine.precision import autocast, float32_head
from ekd_ray.engine.rundata import RunData
from ekd_ray.engine.teacher.classifier import read_rows, write_rows
from ekd_ray.engine.teacher.folding import fold_batch_norms
from ekd_ray.engine.teacher.table import (
    Ids,
    RowFormat,
    TableSpec,
    TeacherTable,
    open_table,
    tables_dir,
)
from ekd_ray.losses.methods import method_of
from ekd_ray.losses.moments import ensemble_log_concentration
from ekd_ray.models import load_model
from ekd_ray.models.ensemble import Ensemble

# The network sees a multiple of this many images. On a CPU the last bits of a row depend on how
# many are computed together: a matrix product of 1 to 3 rows (of a thread) takes another kernel.
ROWS_AT_ONCE = 16
# What a GPU computes for a table comes in batches of just this size: there the kernels, and so the
# last bits of a row, may change with any number of images.
ROWS_ON_GPU = 128

# `auto` uses no table larger than this, nor one that would take half of the free disk.
LARGEST_TABLE = 40 * 2**30


@dataclass(frozen=True)
class TeacherOutputs:
    """The outputs of a teacher for one batch, without gradient.

    `weak` and `strong` are its logits, float32 [B, C]: of the weak view, and of the strong one
    where the method looks at one. `features` are the outputs [B, ...] of its layers on the weak
    view, where the method reads any, and `class_cosines` float32 [C, C] those between the rows of
    its classifier, where the method reads them.
    """

    weak: Tensor
    strong: Tensor | None = None
    features: tuple[Tensor, ...] = ()
    class_cosines: Tensor | None = None


class LiveTeacher:
    """The teacher network itself, frozen and in evaluation mode, with its head in float32.

    It normalises its images itself: every teacher keeps the statistics it was trained
    with, whatever the student uses.
    """

    def __init__(
        self, model: nn.Module, normalization: str, *, precision: str, channels_last: bool
    ) -> None:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.model = model.eval().requires_grad_(False).to(memory_format=layout)
        for network in _members(self.model):
            float32_head(network)
        self.normalization = parse_normalization(normalization)
        self.precision = precision
        self.channels_last = channels_last

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits [B, C] float32 of uint8 images [B, 3, H, W], already augmented.

        Those of an ensemble are the log of the concentration of the members' Dirichlet.
        """
        mean, std = self.normalization.mean, self.normalization.std
        inputs = normalize(images, mean, std, channels_last=self.channels_last)
        # The bits of a row are not to depend on the run that happens to ask for it.
        with fixed_convolutions(), autocast(self.precision, images.device):
            if not isinstance(self.model, Ensemble):
                return self.model(inputs).float()
            return ensemble_log_concentration(*self.model.answers(inputs)).float()


class Teacher:
    """A run's teacher: logits by sample and view, out of its table where they are there.

    `table` is None without a cache. Rows that are missing are computed by the network, all of
    a batch at once, and stored. The network is not even loaded as long as none is missing.
    `layers` are those whose features are asked for as well, where there is no table.
    """

    def __init__(
        self,
        network: Callable[[], LiveTeacher],
        row_format: RowFormat,
        table: TeacherTable | None,
        layers: tuple[str, ...] = (),
    ) -> None:
        self._network, self._format, self.table = network, row_format, table
        self.layers = layers
        self.computed = 0
        self._unwritten: deque[tuple[HostCopy, Ids, Ids]] = deque()

    def logits(self, images: Tensor, sample_ids: Ids, view_ids: Ids) -> Tensor:
        """Logits float32 [B, C], on the images' device, without gradient.

        Args:
            images: uint8 [B, 3, H, W], the views themselves, needed for rows that are missing.
            sample_ids, view_ids: int64 [B] on the host.
        """
        if self.table is None:
            return self._format.rounded(self._asked(images))
        rows, found = self.table.read(sample_ids, view_ids)
        bits = to_device(rows.view(np.int16), images.device)
        if not found.all():
            missing = np.flatnonzero(~found)
            index = to_device(missing, images.device)
            computed = self._format.encode(self._asked(images.index_select(0, index)))
            bits = bits.index_copy(0, index, computed)
            if self.table.writable:
                copy = HostCopy(computed)
                self._unwritten.append((copy, sample_ids[missing], view_ids[missing]))
                self._write(waiting=1)
        return self._format.decode(bits)

    def features(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Logits as `logits` has them, and the outputs [B, ...] of `layers`, for the images."""
        with record_features(self._network().model, self.layers) as features:
            logits = self._format.rounded(self._asked(images))
        return logits, tuple(feature[: len(images)] for feature in features)

    @functools.cached_property
    def classifier(self) -> Tensor:
        """The rows float32 [C, D] of its last linear layer, on the host.

        Out of the folder of the table where they are there; else the network is loaded, and they
        are stored. Raises `UserError` where there is no such layer.
        """
        rows = read_rows(self.table.folder, self._format.num_classes) if self.table else None
        if rows is None:
            layer = find_classifier(self._network().model, self._format.num_classes)
            rows = layer.weight.detach().to("cpu", torch.float32).contiguous()
            if self.table and self.table.writable:
                with contextlib.suppress(OSError):  # a full disk: the next one asks again
                    write_rows(self.table.folder, rows)
        return rows

    def flush(self) -> None:
        """Write to the table what was computed and is not there yet (waits for the device)."""
        self._write(waiting=0)

    def _asked(self, images: Tensor) -> Tensor:
        count = len(images)
        self.computed += count
        fixed = self.table is not None and images.device.type != "cpu"
        lacking = -count % (ROWS_ON_GPU if fixed else ROWS_AT_ONCE)
        if lacking:
            images = torch.cat([images, images[-1:].expand(lacking, -1, -1, -1)])
        network = self._network()
        if not fixed:
            return network(images)[:count]
        return torch.cat([network(part) for part in images.split(ROWS_ON_GPU)])[:count]

    def _write(self, *, waiting: int) -> None:
        """Write computed rows to the table: those that the host has, and all but `waiting`.

        One batch behind, so that a GPU goes on while its last rows are on their way.
        """
        while self.table and self._unwritten:
            copy, sample_ids, view_ids = self._unwritten[0]
            if not copy.arrived and len(self._unwritten) <= waiting:
                return
            self._unwritten.popleft()
            try:
                self.table.write(sample_ids, view_ids, copy.values().numpy().view(np.uint16))
            except OSError as error:
                warnings.warn(
                    f"the teacher cache {self.table.folder} cannot be written ({error.strerror}): "
                    "going on with the live teacher.",
                    stacklevel=2,
                )
                self.table = None
                self._unwritten.clear()


def _members(model: nn.Module) -> list[nn.Module]:
    """The networks that give logits: those of an ensemble, or the model itself."""
    return list(model.members) if isinstance(model, Ensemble) else [model]


@functools.lru_cache(maxsize=2)
def _network(
    name: str, path: str, sha256: str, key: str | None, normalization: str, num_classes: int,
    image_size: int, precision: str, channels_last: bool, device: torch.device,
    plugins: tuple[str, ...], folded: bool,
) -> LiveTeacher:  # fmt: skip
    model = load_model(name, num_classes, path, key=key)
    if folded:
        for network in _members(model):
            fold_batch_norms(network, image_size)
    return LiveTeacher(
        model.to(device), normalization, precision=precision, channels_last=channels_last
    )


def _teachers_plugin(config: DistillConfig) -> tuple[str, ...]:
    """The stamp of the plugin that the teacher's code is of; empty without one."""
    return stamps_of([("model", config.teacher)])


def live_teacher(
    config: DistillConfig, num_classes: int, *, precision: str, device: torch.device
) -> LiveTeacher:
    """The network of a resolved configuration's teacher; loaded once per process."""
    assert config.teacher and config.teacher_weights and config.teacher_normalization
    assert config.image_size
    return _network(
        config.teacher, config.teacher_weights, config.teacher_sha256 or "", config.teacher_key,
        config.teacher_normalization, num_classes, config.image_size, precision,
        config.channels_last, device, _teachers_plugin(config),
        not method_of(config).features,  # a folded convolution gives its batch norm's output
    )  # fmt: skip


# Open tables of this process, by folder: trials that follow each other share the maps.
_tables: dict[Path, TeacherTable] = {}


def load_teacher(
    config: DistillConfig,
    data: RunData,
    *,
    precision: str,
    device: torch.device,
    strong: bool = False,
) -> Teacher:
    """The teacher of a resolved configuration; one network per process serves all its trials.

    With `strong`, of the strong views: their ids name other pictures, so their table is
    another.
    """
    layers = () if strong else method_of(config).teacher_layers
    network = functools.partial(
        live_teacher, config, data.num_classes, precision=precision, device=device
    )
    spec = table_spec(config, data, precision=precision, strong=strong)
    size = _table_bytes(config, len(data.images), data.num_views, data.num_classes)
    wanted = _wants_tables(config, size)
    return Teacher(network, spec.row_format, _open(config, spec, wanted=wanted), layers)


def evaluation_logits(
    config: DistillConfig, data: RunData, sample_ids: Ids, *, precision: str, device: torch.device
) -> Tensor:
    """The teacher's logits float32 [N, C], on the device, on images as evaluation sees them.

    They have a table of their own beside that of the views, so that a warm run needs no teacher.
    """
    spec = table_spec(config, data, precision=precision)
    facts = {**spec.facts, "view_scheme": "evaluation", "view_seed": None}
    spec = dataclasses.replace(spec, num_views=1, facts=facts)
    network = functools.partial(
        live_teacher, config, data.num_classes, precision=precision, device=device
    )
    table = _open(config, spec, wanted=_wants_tables(config, spec.size))
    teacher, parts, start = Teacher(network, spec.row_format, table), [], 0
    for images, _ in data.images.evaluation(sample_ids, ROWS_ON_GPU):
        ids = sample_ids[start : start + len(images)]
        start += len(images)
        parts.append(teacher.logits(images, ids, np.zeros_like(ids)))
    teacher.flush()
    return torch.cat(parts)


def table_spec(
    config: DistillConfig, data: RunData, *, precision: str, strong: bool = False
) -> TableSpec:
    """The table that a run reads, whether or not it is there."""
    drawn = strong or config.augment == "resized_crop" or data.drawn is not None
    facts: dict[str, Any] = {
        "teacher": config.teacher,
        "teacher_sha256": config.teacher_sha256,
        "normalization": config.teacher_normalization,
        "precision": precision,
        "device": data.images.device.type,
        "channels_last": config.channels_last,
        "batch_norms": "folded",
        "dataset": config.dataset,
        "data_fingerprint": data.fingerprint,
        "view_scheme": config.augment,
        "image_size": data.images.image_size,
        "strong": strong,
        "view_seed": config.view_seed if drawn else None,
    }
    if data.images.device.type != "cpu":  # a CPU has always computed it so
        facts["float32"] = FLOAT32
    if data.drawn is not None:
        facts["drawn_views"] = data.drawn.facts
    if config.teacher_key is not None:
        facts["teacher_key"] = config.teacher_key
    if plugin := _teachers_plugin(config):
        facts["teacher_plugin"] = ", ".join(plugin)
    return TableSpec(
        num_samples=len(data.images),
        num_views=config.view_pool if strong else data.num_views,
        row_format=RowFormat(num_classes=data.num_classes, top=config.teacher_top),
        facts=facts,
    )


def table_settings(config: DistillConfig) -> dict[str, Any]:
    """The settings that tell one table of a teacher and data set from another."""
    names = ("augment", "image_size", "view_seed", "teacher_top")
    return {name: getattr(config, name) for name in names} | drawn_settings(config)


def _open(config: DistillConfig, spec: TableSpec, *, wanted: bool) -> TeacherTable | None:
    """The table, or None where the settings or the disk say no.

    Under `auto` a table that is there is used even if a new one would not be made.
    """
    folder = spec.folder()
    never = config.teacher_cache == "off" or bool(method_of(config).features)
    if never or not (wanted or folder.exists()):
        return None
    table = _tables.get(folder)
    if table is not None and folder.exists():
        return table
    if table is not None:
        table.close()
    try:
        table = _tables[folder] = open_table(spec)
    except OSError as error:
        warnings.warn(
            f"the teacher cache {folder} cannot be used ({error.strerror}): going on with the "
            "live teacher.",
            stacklevel=2,
        )
        return None
    return table


def affordable(size: int) -> bool:
    """Whether `teacher_cache: auto` makes a table of `size` bytes when full: the disk has room."""
    folder = tables_dir()
    home = next(parent for parent in (folder, *folder.parents) if parent.exists())
    room = min(LARGEST_TABLE, shutil.disk_usage(home).free // 2)
    return size <= room and os.access(home, os.W_OK)


def table_bytes(config: DistillConfig, data_root: str | None = None) -> int:
    """Bytes of the full tables of a configuration's views of all training images."""
    info = dataset_info(config.dataset, data_root=data_root)
    samples = num_train(config.dataset, data_root=data_root)
    views = count_views(config, info.view_scheme)
    return _table_bytes(config, samples, views, info.num_classes)


def _table_bytes(config: DistillConfig, num_samples: int, num_views: int, num_classes: int) -> int:
    if method_of(config).strong_view:
        num_views += config.view_pool
    width = RowFormat(num_classes=num_classes, top=config.teacher_top).width
    return num_samples * num_views * (2 * width + 4)


def _wants_tables(config: DistillConfig, size: int) -> bool:
    if method_of(config).features:
        return False
    return config.teacher_cache == "on" or (config.teacher_cache == "auto" and affordable(size))


def uses_cache(config: DistillConfig, data_root: str | None) -> bool:
    """Whether a run of a configuration keeps its teacher's logits on disk."""
    if not method_of(config).needs_teacher:
        return False
    return _wants_tables(config, table_bytes(config, data_root))
