"""Who may read and write what is left on a disk is up to the umask: 077 and 002."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from torch import nn

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.data import load_dataset
from ekd_ray.engine.distill import distill
from ekd_ray.engine.resolve import resolve
from ekd_ray.engine.teacher.table import RowFormat, TableSpec, open_table
from ekd_ray.files import atomic_path, temporary_folder, write_json
from ekd_ray.models import save_weights
from ekd_ray.results.finish import finish_run
from ekd_ray.results.records import single_run
from ekd_ray.results.study_reader import write_parquet
from ekd_ray.scale.storage import open_study
from ekd_ray.studies.pipeline import lock_folder, open_run


@pytest.fixture(params=[0o077, 0o002], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def check_modes(folder: Path, umask: int) -> list[Path]:
    """Everything below a folder, which has all the bits that the umask leaves, and no other.

    Only its owner may write a cache, whose locks are empty.
    """
    found = sorted(folder.rglob("*"))
    for path in found:
        full = 0o777 if path.is_dir() else 0o666
        mode = stat.S_IMODE(path.stat().st_mode)
        is_cached = "cache" in path.relative_to(folder).parts and path.suffix != ".lock"
        assert mode == full & ~(umask | 0o022 * is_cached), f"{path} has {mode:o}"
    return found


def test_files_and_folders_that_are_renamed_into_place(tmp_path: Path, umask: int) -> None:
    write_json(tmp_path / "new" / "a.json", {})
    write_parquet(tmp_path / "b.parquet", pa.table({"x": [1]}))
    save_weights(nn.Linear(1, 1), tmp_path / "c.safetensors", model_name="x", num_classes=1,
                 mean=None, std=None)  # fmt: skip
    temporary_folder(tmp_path / "d").rename(tmp_path / "d")
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "e") as temporary:
        raise ZeroDivisionError(temporary)
    assert len(check_modes(tmp_path, umask)) == 5


def test_a_run_its_study_and_its_cache(tmp_path: Path, umask: int, monkeypatch) -> None:
    monkeypatch.setenv("EKD_CACHE_DIR", str(tmp_path / "cache"))
    config = resolve(DistillConfig(
        dataset="synthetic", student="resnet8", method="none", train_subset=40, batch_size=20,
        validation_fraction=0.5, epochs=1, precision="float32",
    ))  # fmt: skip
    study = tmp_path / "study"
    open_run(study, StudyConfig(distill=config), resume=False)
    with lock_folder(study):
        open_study(study, StudyConfig(distill=config)).ask()
    run = single_run(config, tmp_path / "run")
    run.write_config()
    finish_run(run, distill(config, out=run.folder, threads=1), data_root=None, test=True)
    spec = TableSpec(num_samples=4, num_views=1, row_format=RowFormat(num_classes=3, top=None),
                     facts={"teacher": "t", "dataset": "d"})  # fmt: skip
    open_table(spec).close()
    load_dataset("synthetic", "train")
    names = {path.name for path in check_modes(tmp_path, umask)}
    assert {"study.yaml", "optuna.journal", "history.jsonl", "result.json", "model.safetensors",
            "rows.bin", "images.npy"} < names  # fmt: skip
