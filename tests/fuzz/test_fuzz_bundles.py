"""Bundles of which a stranger has changed anything are used, or refused in one sentence."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from mutations import Data, changed_file

from ekd_ray.results import Bundle
from ekd_ray.results.bundle_files import FILES, write_manifest
from ekd_ray.results.records import MANIFEST
from ekd_ray.results.reproduce import prepare

PICTURE = np.zeros((40, 48, 3), np.uint8)


@st.composite
def changed_bundles(draw: Any, files: dict[str, Data]) -> tuple[dict[str, Data], bool, str]:
    """(changed files by name, whether the manifest is forged for them, how it is used)."""
    names = draw(st.lists(st.sampled_from(sorted(files)), min_size=1, max_size=2, unique=True))
    changed = {name: draw(changed_file(Path(name).suffix, files[name])) for name in names}
    uses = ["predict", "predict", "predict", "evaluate", "reproduce"]
    return changed, draw(st.booleans()) and MANIFEST not in names, draw(st.sampled_from(uses))


def use_bundle(folder: Path, how: str, teacher: str) -> None:
    bundle = Bundle.load(folder)
    _ = repr(bundle), bundle._repr_html_()
    bundle.history(), bundle.environment()
    bundle.verify(evaluate=how == "evaluate")
    if how == "reproduce":
        prepare(bundle, teacher_weights=teacher)
    found = bundle.predict(PICTURE)
    assert found.probabilities.isfinite().all() and found.uncertainty.isfinite().all()


def test_bundles(exported, winner_config, tmp_path, fuzzer):
    names = [*FILES, MANIFEST]
    files = {name: Data((exported.path / name).read_bytes()) for name in names}
    folder = tmp_path / "best"
    use_bundle(exported.path, "reproduce", winner_config.teacher_weights)

    def use(given: tuple[dict[str, Data], bool, str]) -> None:
        changed, forged, how = given
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, data in {**files, **changed}.items():
            (folder / name).write_bytes(data)
        if forged:
            write_manifest(folder, FILES)
        use_bundle(folder, how, winner_config.teacher_weights)

    fuzzer.run("bundles", changed_bundles(files), use)
