"""Which runs read one table, and which may not."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch

import ekd_ray.engine.teacher.source as teachers
from ekd_ray.engine.resolve import resolve
from ekd_ray.engine.teacher.source import table_bytes, table_spec, uses_cache
from ekd_ray.losses.methods import METHODS, with_method


@pytest.fixture(scope="module")
def config(tiny, with_teacher):
    """A resolved run under the shared teacher."""
    return resolve(with_method(tiny(), "mlkd", **with_teacher))


@pytest.fixture(scope="module")
def spec(config, run_data):
    """The spec of a run's table; keywords are those of `table_spec`."""
    data = run_data(config)

    def made(changed=config, *, precision="float32", strong=False, data=data):
        return table_spec(changed, data, precision=precision, strong=strong)

    return made


SHARED = [
    {"seed": 5},
    {"train_subset": 100},
    {"validation_fraction": 0.0},
    {"split_seed": 3},
    {"student": "resnet20"},
    {"student_image_size": 64},
    {"method": "kd"},
    {"method": "ekd", "log_prior": -1.0},
    {"temperature": 2.0},
    {"epochs": 9, "lr": 0.2, "batch_size": 8},
    {"teacher_weights": "moved/elsewhere.safetensors"},
    {"teacher_cache": "on"},
    {"ood_dataset": "digits"},
]


@pytest.mark.parametrize("strong", [False, True])
@pytest.mark.parametrize("change", SHARED, ids=str)
def test_what_the_teacher_does_not_see_shares_its_table(change, strong, config, spec, run_data):
    changed = config.replace(**change)
    found = spec(changed, data=run_data(changed), strong=strong)
    assert found == spec(strong=strong)
    assert found.folder() == spec(strong=strong).folder()


APART = [
    {"teacher_sha256": "0" * 64},
    {"teacher": "resnet8x4"},
    {"teacher_normalization": "0,0,0/1,1,1"},
    {"teacher_top": 3},
    {"channels_last": False},
    {"augment": "crop"},
    {"dataset": "digits"},
]


@pytest.mark.parametrize("change", APART, ids=str)
def test_what_changes_a_row_has_a_table_of_its_own(change, config, spec, run_data):
    changed = config.replace(**change)
    data = run_data(changed.replace(train_subset=None))
    for strong in (False, True):
        assert spec(changed, data=data, strong=strong).key != spec(strong=strong).key


def test_arithmetic_data_and_the_strong_view_have_tables_of_their_own(spec, config, run_data):
    other_data = dataclasses.replace(run_data(config), fingerprint="0123456789abcdef")
    keys = {
        found.key
        for found in (
            spec(),
            spec(precision="bfloat16"),
            spec(data=other_data),
            spec(strong=True),
            spec(strong=True, precision="bfloat16"),
        )
    }
    assert len(keys) == 5
    assert {found.facts["device"] for found in (spec(), spec(strong=True))} == {"cpu"}


def test_only_where_float32_could_be_another_is_it_part_of_the_key(spec, config, run_data):
    """On CPUs it never was, and tables from before it was set are as good."""
    assert "float32" not in spec().facts
    data = run_data(config)
    stage = mock.Mock(wraps=data.images, device=torch.device("cuda"), image_size=32, num_views=162)
    stage.__len__ = lambda _: 1
    assert spec(data=dataclasses.replace(data, images=stage)).facts["float32"] == "ieee"


def test_drawn_views_have_a_table_for_each_seed_and_listed_ones_do_not(spec, config):
    other = config.replace(view_seed=7)
    assert spec(other) == spec()  # the 162 crops and flips
    assert spec(other, strong=True).key != spec(strong=True).key
    cropped = config.replace(augment="resized_crop"), other.replace(augment="resized_crop")
    assert spec(cropped[0]).key != spec(cropped[1]).key
    # As many views, of the same seed, but other pictures.
    pool = cropped[0].replace(view_pool=spec().num_views)
    assert spec(pool, strong=True).key != spec(pool).key


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"method": "kd"},
        {"augment": "none", "view_pool": 3},
        {"teacher_top": 4},
        {"dataset": "digits", "train_subset": None},
    ],
    ids=str,
)
def test_the_announced_bytes_are_those_of_the_tables(change, config, spec, run_data):
    changed = config.replace(**change)
    parts = [False, True] if METHODS[changed.method].strong_view else [False]
    sizes = [spec(changed, data=run_data(changed), strong=strong).size for strong in parts]
    assert table_bytes(changed) == sum(sizes)


def test_a_run_uses_the_cache_where_it_may_and_there_is_room(config, monkeypatch):
    assert uses_cache(config, None)
    assert not uses_cache(config.replace(teacher_cache="off"), None)
    assert not uses_cache(config.replace(method="none"), None)
    monkeypatch.setattr(teachers, "LARGEST_TABLE", 1000)
    assert not uses_cache(config, None)
    assert uses_cache(config.replace(teacher_cache="on"), None)
