"""`evaluate` on another data set: classes by name, images as the student needs them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import ekd_ray as ekd
from ekd_ray.data import load_dataset


def test_the_own_split_is_what_the_bundle_states(exported):
    found = ekd.evaluate(exported.path)
    assert found == exported.evaluate() == ekd.evaluate(exported, dataset=exported.config.dataset)


@pytest.fixture
def folder(tmp_path):
    """Pictures of 48 pixels of two of the classes, the later first, in folders by name."""
    arrays = load_dataset("synthetic", "test")
    for split in ("train", "test"):
        for label, name in ((7, "pattern7"), (2, "pattern2")):
            for index in np.flatnonzero(arrays.labels == label)[:9]:
                path = tmp_path / "pictures" / split / name / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image = Image.fromarray(arrays.images[index].transpose(1, 2, 0))
                image.resize((48, 48)).save(path)
    return tmp_path / "pictures"


def test_another_data_set_is_judged_by_the_names_of_its_classes(exported, folder):
    if exported.config.dataset != "synthetic":
        pytest.skip("the bundle is of other classes")
    found = ekd.evaluate(exported, dataset=f"folder:{folder}")
    paths = sorted(folder.glob("test/*/*.png"))
    names = exported.predict(paths).names
    right = [name == path.parent.name for name, path in zip(names, paths, strict=True)]
    assert found["test_top1"] == pytest.approx(np.mean(right))


def test_a_class_that_the_student_does_not_know_is_refused(exported, folder):
    for split in ("train", "test"):
        (folder / split / "pattern2").rename(folder / split / "stripes")
    with pytest.raises(ekd.UserError, match=r"unknown class of folder:.* 'stripes'"):
        ekd.evaluate(exported, dataset=f"folder:{folder}")
