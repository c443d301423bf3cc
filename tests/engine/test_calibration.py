"""Temperature and prediction sets: against plain minimisers, counting, and the promise itself."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ekd_ray.engine.distill import distill
from ekd_ray.engine.measure.calibration import (
    FILE,
    SET_COVERAGES,
    Calibration,
    fit_temperature,
    fit_thresholds,
    make_sets,
    measure_sets,
)
from ekd_ray.engine.measure.metrics import log_probabilities
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.errors import UserError
from ekd_ray.files import write_json
from ekd_ray.results.finish import finish_run
from ekd_ray.results.records import RunRecord


def draw(n, classes=5, sure=1.0, seed=0):
    """Logits that are `sure` times those by which their targets were drawn."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    target = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    return sure * logits, target


@pytest.mark.parametrize("sure", [0.5, 1.0, 3.0])
def test_the_temperature_undoes_what_made_a_network_too_sure(sure):
    logits, target = draw(20_000, sure=sure)
    found = Calibration.fit(logits.float(), target, None).temperature
    assert found == pytest.approx(sure, rel=0.05)


@pytest.mark.parametrize("log_prior", [None, -1.0, 2.0])
def test_no_other_temperature_is_likelier(log_prior):
    """Against SciPy on a plain float64 loss, and by a grid."""
    from scipy.optimize import minimize
    from scipy.special import log_softmax

    logits, target = draw(300, sure=2.5)
    log_p = log_probabilities(logits, log_prior)
    found = fit_temperature(log_p, target)

    def loss(temperature):
        scaled = log_softmax(log_p.numpy() / temperature, axis=1)
        return -scaled[np.arange(300), target.numpy()].mean()

    best = minimize(lambda x: loss(float(x[0])), [1.0], bounds=[(0.05, 20)], tol=1e-12)
    assert found == pytest.approx(float(best.x[0]), rel=1e-3)
    assert loss(found) <= min(map(loss, np.geomspace(0.05, 20, 400))) + 1e-12


def test_of_very_many_images_some_tell_the_temperature(monkeypatch):
    monkeypatch.setattr("ekd_ray.engine.measure.calibration.MOST_FITTED", 100)
    logits, target = draw(250, sure=2.0)
    found = Calibration.fit(logits, target, None)
    some = Calibration.fit(logits[::3], target[::3], None)
    assert found.temperature == some.temperature and found.images == 250
    assert found.set_thresholds != some.set_thresholds


def test_a_network_without_errors_is_not_made_certain():
    target = draw(50)[1]
    sure = 9.0 * torch.nn.functional.one_hot(target, 5)
    assert Calibration.fit(sure, target, None).temperature == 1.0
    assert Calibration.fit(-sure, target, None).temperature == pytest.approx(100, rel=1e-3)


@pytest.mark.parametrize("count", [3, 20, 199, 200])
def test_each_of_n_plus_one_images_is_covered_as_often_as_promised(count):
    """The finite-sample rule, exactly: each image in turn is the one to come."""
    logits, target = draw(count + 1)
    log_p = log_probabilities(logits, None)
    scores = -log_p[range(count + 1), target]
    fits = [
        fit_thresholds(log_p[others], target[others])
        for others in (torch.arange(count + 1) != i for i in range(count + 1))
    ]
    for step, share in enumerate(SET_COVERAGES):
        kept = [math.inf if fit[step] is None else fit[step] for fit in fits]
        inside = float((scores <= torch.tensor(kept)).double().mean())
        assert share - 1e-9 <= inside <= share + 1 / (count + 1)
        assert (kept[0] == math.inf) == (math.ceil((count + 1) * share - 1e-9) > count)


def test_sets_of_other_images_hold_their_class_as_often_as_promised():
    logits, target = draw(4000, sure=4.0)  # too sure, which the thresholds do not mind
    fitted = Calibration.fit(logits[:2000], target[:2000], None)
    log_p = log_probabilities(logits[2000:], None)
    thresholds = {share: fitted.threshold(share) for share in (0.5, 0.8, 0.9, 0.95)}
    found = measure_sets(log_p, target[2000:], thresholds)
    for share in thresholds:
        spread = 3 * math.sqrt(2 * share * (1 - share) / 2000)
        assert found[f"set_coverage_{100 * share:g}"] > share - spread
        inside = (-log_p <= thresholds[share])[range(2000), target[2000:]].double().mean()
        assert abs(float(inside) - share) < spread
    sizes = [found[f"set_size_{100 * share:g}"] for share in thresholds]
    assert sizes == sorted(sizes) and sizes[0] >= 1


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), low=st.floats(0, 5), more=st.floats(0, 5))
def test_what_holds_for_every_set(seed, low, more):
    log_p = log_probabilities(draw(9, seed=seed)[0], None)
    sets, larger = make_sets(log_p, low), make_sets(log_p, low + more)
    assert sets.gather(1, log_p.argmax(1, keepdim=True)).all()
    assert (sets <= larger).all()
    assert (make_sets(log_p.flip(1), low) == sets.flip(1)).all()
    # No class outside is likelier than one inside.
    inside, outside = log_p.masked_fill(~sets, math.inf), log_p.masked_fill(sets, -math.inf)
    assert (inside.amin(1) >= outside.amax(1)).all()


def test_a_share_is_rounded_up_and_kept_within_what_is_known():
    logits, target = draw(99)
    fitted = Calibration.fit(logits, target, None)
    assert fitted.threshold(0.901) == fitted.threshold(0.905) >= fitted.threshold(0.9)
    assert fitted.threshold(0.5) == fitted.set_thresholds[0]
    for share in (0.49, 0.996, 1.0, -1, math.nan):
        with pytest.raises(UserError, match=r"0\.5 to 0\.995"):
            fitted.threshold(share)
    with pytest.raises(UserError, match=r"99 validation images.*at most 0\.99\."):
        fitted.threshold(0.995)


def test_what_is_written_is_read_and_nothing_else(tmp_path):
    logits, target = draw(30)
    fitted = Calibration.fit(logits, target, None)
    fitted.save(tmp_path)
    assert Calibration.load(tmp_path) == fitted
    values = dataclasses.asdict(fitted)
    for damage in (
        {"temperature": "1"}, {"temperature": 0.0}, {"temperature": 1e9}, {"images": 0},
        {"images": True}, {"set_thresholds": [1.0]}, {"set_thresholds": None},
        {"set_thresholds": ["x"] * 100}, {"set_thresholds": [-1.0] * 100},
    ):  # fmt: skip
        write_json(tmp_path / FILE, {**values, **damage})
        with pytest.raises(UserError, match="is damaged"):
            Calibration.load(tmp_path)
    write_json(tmp_path / FILE, [1])
    with pytest.raises(UserError):
        Calibration.load(tmp_path)


def test_a_run_of_the_confirm_stage_leaves_its_own(tiny, tmp_path):
    """On the images that it has held out, without the test split, and no other run does."""
    from ekd_ray.data import load_dataset
    from ekd_ray.engine.rundata import split_ids

    config = tiny(epochs=1, validation_fraction=0.5)
    result = distill(config, threads=1)
    for stage in (RunStage.SELECT, RunStage.SINGLE):
        folder = tmp_path / stage
        folder.mkdir()
        record = RunRecord(folder=folder, stage=stage, name="x", config=config.to_dict())
        finish_run(record, result, data_root=None)
        assert (folder / FILE).exists() == (stage is RunStage.SELECT)
    found = Calibration.load(tmp_path / RunStage.SELECT)
    held = split_ids(result.config, load_dataset("synthetic", "train").labels)[1]
    assert found.images == len(held) > 0
