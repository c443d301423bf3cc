"""The model of a study: against scikit-learn, a plain joint normal and finite differences."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import approx_fprime
from scipy.stats import norm
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.results.records import RunRecord
from ekd_ray.results.study_model import (
    Outcome,
    encode_points,
    fit_model,
    is_divergence,
    mean_basis,
    rank_by_model,
    record_outcome,
    thin_out,
)
from ekd_ray.results.surrogate import (
    BETA_MEAN,
    BETA_VARIANCE,
    JITTER,
    LEVEL_VARIANCE,
    Observations,
    Surrogate,
    _Hyper,
)
from ekd_ray.scale.model_sampler import (
    Coordinates,
    distinct_maxima,
    log_expected_improvement,
)
from ekd_ray.scale.space import Space

RNG = np.random.default_rng(0)
SPACE = {
    "method": {"choices": ["kd", "dkd"]},
    "temperature": {"low": 1.0, "high": 8.0},
    "kd_weight": {"low": 0.1, "high": 20.0, "log": True},
    "dkd_beta": {"low": 0.0, "high": 8.0, "step": 0.5, "when": {"method": ["dkd"]}},
}


def observe(count, levels=3, dims=3):
    inputs = RNG.random((count, dims))
    worth = np.sin(3 * inputs[:, 0]) - (inputs[:, 1] - 0.4) ** 2
    found = RNG.integers(0, levels, count) if levels > 1 else np.zeros(count, int)
    found[0] = 0
    return Observations(inputs, found, worth * (1 - 0.2 * found) + 0.05 * RNG.normal(size=count))


def rising(inputs):
    return 2 * inputs[:, 0] - 1


@pytest.mark.parametrize("basis", [None, rising])
def test_the_gradient_is_that_of_finite_differences(basis):
    model = Surrogate(observe(25), basis=basis)
    squares = ((model._inputs[:, None] - model._inputs[None]) ** 2).reshape(-1, 3)

    def at(vector):
        return model._negative_log_likelihood(_Hyper.from_vector(vector, 3, 2), squares)

    vector = model._hyper.to_vector() + 0.3 * RNG.normal(size=11)
    slow = approx_fprime(vector, lambda v: at(v)[0], 1e-6)
    np.testing.assert_allclose(at(vector)[1], slow, atol=2e-4, rtol=1e-4)


def test_of_full_length_alone_it_is_scikit_learns():
    seen = observe(20, levels=1)
    model, hyper = (found := Surrogate(seen)), found._hyper
    kernel = (
        ConstantKernel(math.exp(hyper.scale[0]), "fixed")
        * Matern(np.exp(hyper.lengths), "fixed", nu=2.5)
        + ConstantKernel(LEVEL_VARIANCE, "fixed")
        + WhiteKernel(math.exp(hyper.noise[0]) + JITTER, "fixed")
    )
    theirs = GaussianProcessRegressor(kernel, optimizer=None, alpha=0.0)
    theirs.fit(seen.inputs, model._targets)
    inputs = RNG.random((30, 3))
    mean, deviation = theirs.predict(inputs, return_std=True)
    latent = np.sqrt(deviation**2 - math.exp(hyper.noise[0]) - JITTER)
    ours = model.predict(inputs)
    np.testing.assert_allclose(ours[0], model._center + model._spread * mean, atol=1e-6)
    np.testing.assert_allclose(ours[1], model._spread * latent, rtol=1e-4)
    np.testing.assert_allclose(model.mean(inputs), ours[0])


def joint_oracle(model, inputs, pending):
    """Mean and deviation of a plain joint normal over everything, by its definition."""
    hyper = model._hyper
    points = np.vstack([inputs, pending, model._inputs])
    levels = np.concatenate([np.zeros(len(inputs) + len(pending), int), model._levels])
    m, count = rising(points), len(points)
    slopes = np.concatenate([[1.0], hyper.rho])
    gaps = np.concatenate([[0.0], np.exp(hyper.gap)])
    kernel = np.empty((count, count))
    for i in range(count):
        for j in range(count):
            r = math.sqrt(5) * np.linalg.norm((points[i] - points[j]) / np.exp(hyper.lengths))
            matern = (1 + r + r * r / 3) * math.exp(-r)
            shared = math.exp(hyper.scale[0]) * matern + BETA_VARIANCE * m[i] * m[j]
            kernel[i, j] = slopes[levels[i]] * slopes[levels[j]] * shared
            if levels[i] == levels[j]:
                kernel[i, j] += gaps[levels[i]] * matern + LEVEL_VARIANCE
    noise = np.exp(hyper.noise)[levels] + JITTER
    prior = BETA_MEAN * slopes[levels] * m
    first = len(inputs)

    def condition(known):
        among = kernel[np.ix_(known, known)] + np.diag(noise[known])
        return np.linalg.solve(among, kernel[np.ix_(known, range(first))])

    told = np.arange(first + len(pending), count)
    mean = prior[:first] + condition(told).T @ (model._targets - prior[told])
    known = np.arange(first, count)
    taken = np.einsum("ij,ij->j", kernel[np.ix_(known, range(first))], condition(known))
    return mean, np.sqrt(np.diag(kernel)[:first] - taken)


def test_hyperparameters_are_kept_for_more_observations_of_the_same_rungs():
    few, more, fewer_rungs = observe(12), observe(18), observe(18, levels=2)
    earlier = Surrogate(few, basis=rising)
    model = Surrogate(more, basis=rising, like=earlier)
    assert model._hyper is earlier._hyper
    inputs = RNG.random((6, 3))
    mean, deviation = joint_oracle(model, inputs, np.empty((0, 3)))
    found = model.predict(inputs)
    np.testing.assert_allclose(found[0], model._center + model._spread * mean, atol=1e-6)
    np.testing.assert_allclose(found[1], model._spread * deviation, rtol=1e-4)
    refitted = Surrogate(fewer_rungs, basis=rising, like=earlier)
    np.testing.assert_array_equal(
        refitted._hyper.to_vector(), Surrogate(fewer_rungs, basis=rising)._hyper.to_vector()
    )


@pytest.mark.parametrize("pending", [0, 3])
def test_over_levels_with_a_basis_it_is_the_joint_normal(pending):
    model = Surrogate(observe(18), basis=rising)
    inputs, waiting = RNG.random((6, 3)), RNG.random((pending, 3))
    mean, deviation = joint_oracle(model, inputs, waiting)
    found = model.predict(inputs, pending=waiting)
    np.testing.assert_allclose(found[0], model._center + model._spread * mean, atol=1e-6)
    np.testing.assert_allclose(found[1], model._spread * deviation, rtol=1e-4)


@pytest.mark.parametrize("basis", [None, rising])
def test_what_the_others_foretell_is_what_a_model_without_the_point_does(basis):
    """Each point is left out with its rungs; one of them diverged, and is foretold to nobody."""
    first = observe(14, levels=1)
    inputs = np.vstack([first.inputs, first.inputs, RNG.random((3, 3))])
    levels = np.repeat([0, 1, 1], [14, 14, 3])
    scores = np.concatenate([first.scores, first.scores - 1, np.zeros(3)])
    scores[4] = -math.inf
    model = Surrogate(Observations(inputs, levels, scores), basis=basis)
    hyper = model._hyper
    kernel = model._kernel(hyper, model._matern(hyper, inputs, inputs))
    away = model._away(hyper)
    found = model.leave_one_out()
    rows = [row for row in range(14) if row != 4]
    np.testing.assert_array_equal(found[0], scores[rows])
    for row, mean, deviation in zip(rows, *found[1:], strict=True):
        rest = np.flatnonzero((inputs != inputs[row]).any(axis=1))
        assert len(rest) == len(inputs) - 2
        by = np.linalg.solve(kernel[np.ix_(rest, rest)], kernel[rest, row])
        expected = model._targets[row] - away[row] + by @ away[rest]
        assert mean == pytest.approx(model._center + model._spread * expected)
        variance = kernel[row, row] - by @ kernel[rest, row]
        assert deviation == pytest.approx(model._spread * math.sqrt(variance))


def test_draws_have_the_mean_and_the_deviation_that_are_predicted():
    model, inputs = Surrogate(observe(20), basis=rising), RNG.random((5, 3))
    drawn = model.draw(inputs, 20_000, np.random.default_rng(0))
    mean, deviation = model.predict(inputs)
    np.testing.assert_allclose(drawn.mean(axis=0), mean, atol=0.05 * model._spread)
    np.testing.assert_allclose(drawn.std(axis=0), deviation, rtol=0.05)
    both = model.draw(inputs[[0, 0]], 100, np.random.default_rng(0))
    np.testing.assert_allclose(both[:, 0], both[:, 1], atol=1e-3 * model._spread)


def test_a_basis_that_misleads_is_turned_around():
    inputs = RNG.random((30, 3))
    seen = Observations(inputs, np.zeros(30, int), -rising(inputs) + 0.02 * RNG.normal(size=30))
    far = RNG.random((200, 3))
    assert np.corrcoef(Surrogate(seen, basis=rising).mean(far), -rising(far))[0, 1] > 0.98
    one = Observations(inputs[:1], np.zeros(1, int), np.zeros(1))
    assert np.corrcoef(Surrogate(one, basis=rising).mean(far), rising(far))[0, 1] > 0.9


def test_what_diverged_is_pulled_up_to_the_worst_that_counts():
    seen = observe(20, levels=1)
    scores = seen.scores.copy()
    scores[3] = -math.inf
    model = Surrogate(Observations(seen.inputs, seen.levels, scores))
    assert np.isfinite(model._targets).all() and model._targets[3] == model._targets.min()
    only = Surrogate(Observations(seen.inputs[:2], np.zeros(2, int), np.full(2, -math.inf)))
    assert np.isfinite(only.mean(seen.inputs)).all()


def test_rungs_say_something_of_full_length():
    """Where the level below was seen alone, the model expects it at full length too."""
    inputs = np.linspace(0, 1, 30)[:, None]
    worth = np.sin(4 * inputs[:, 0])
    levels = np.where(inputs[:, 0] < 0.5, 0, 1)
    levels[::2] = 1
    model = Surrogate(Observations(inputs, levels, worth - 3.0 * levels))
    upper = inputs[inputs[:, 0] > 0.6]
    assert np.corrcoef(model.mean(upper), np.sin(4 * upper[:, 0]))[0, 1] > 0.95


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_a_point_has_one_row_and_a_row_one_point(seed):
    coordinates = Coordinates(Space(SPACE))
    (row,) = coordinates.draw(np.random.default_rng(seed), 1)
    point = coordinates.point(row)
    assert Space(SPACE).searched_part(point) == point
    assert ("dkd_beta" in point) == (point["method"] == "dkd")
    again = encode_points([point], SPACE)
    assert coordinates.point(again[0]) == pytest.approx(point)
    steps = 0.5 / 8 if "dkd_beta" in point else 1e-9  # a step is rounded
    np.testing.assert_allclose(again[0], row, atol=steps)
    near = coordinates.move(row[None], np.random.default_rng(seed), 20)
    assert near.min() >= 0 and near.max() <= 1
    assert all(Space(SPACE).searched_part(coordinates.point(r)) for r in near)


@pytest.mark.parametrize("z", [-8.0, -5.5, -1.0, 0.0, 3.0])
def test_log_expected_improvement(z):
    slow = quad(lambda x: max(0.0, x + z) * norm.pdf(x), -z, -z + 40, epsabs=0, epsrel=1e-10)[0]
    found = log_expected_improvement(np.array([z]))[0]
    assert found == pytest.approx(math.log(slow), rel=1e-2)


def outcomes(count, best):
    """Trials of a study whose temperature is best at a value."""
    drawn = Space(SPACE).sample(count, seed=1)
    return [Outcome(params=p, scores={0: -abs(p["temperature"] - best)}) for p in drawn]


def test_the_first_points_are_what_all_studies_expect_most_of():
    basis = mean_basis([outcomes(25, 3.0), outcomes(25, 4.0)], SPACE)
    points = distinct_maxima(basis, Space(SPACE), 3)
    assert all(2.5 < point["temperature"] < 4.5 for point in points)
    rows = encode_points(points, SPACE)
    apart = [np.linalg.norm(a - b) for i, a in enumerate(rows) for b in rows[:i]]
    assert min(apart) >= 0.25 - 1e-9
    (lone,) = distinct_maxima(basis, Space(SPACE), 1)
    close = distinct_maxima(basis, Space(SPACE), 2, apart=0.0)
    assert close[0] == lone and np.linalg.norm(np.subtract(*encode_points(close, SPACE))) < 0.25
    grid = Coordinates(Space(SPACE)).draw(np.random.default_rng(5), 4000)
    assert abs(basis(grid).mean()) < 0.1 and abs(basis(grid).std() - 1) < 0.1


def test_a_model_of_many_trials_keeps_the_best_and_some_of_all():
    known = [Outcome(params={}, scores={0: float(7 * k % 100)}) for k in range(100)]
    known += [Outcome(params={}, scores={1: 99.0}), Outcome(params={}, scores={})]
    kept = thin_out(known, 20)
    assert len(kept) == 20 and kept == [one for one in known if one in kept]
    assert sum(one.scores.get(0, 0) >= 90 for one in kept) == 10
    assert fit_model([known[-1]], SPACE) is None


def test_a_run_that_diverged_is_told_from_one_that_died():
    assert is_divergence("train_loss became nan in epoch 2 of 9 (lr 3): lower lr.")
    assert not is_divergence("the trial's process died (killed, or out of memory)")
    assert not is_divergence(None)


ONE = {"lr": {"low": 0.0, "high": 1.0}}
CONFIG = StudyConfig(
    distill=DistillConfig(method="none", epochs=9), space=ONE, rungs=(1, 7), metric="val_nll"
)


def record(number, at, values, status="complete", reason=None):
    history = [{"epoch": e, "val_nll": v} for e, v in values.items()]
    return RunRecord(
        folder=Path(), stage=RunStage.SEARCH, name="x", number=number, params={"lr": at},
        status=status, reason=reason, history=history,
    )  # fmt: skip


def test_a_record_counts_at_every_rung_that_it_came_to():
    values = {1: 2.0, 2: 1.9, 7: 1.5, 9: 1.4}
    assert record_outcome(record(0, 0.5, values), CONFIG).scores == {2: -2.0, 1: -1.5, 0: -1.4}
    stopped = record(0, 0.5, {1: 2.0}, status="pruned")
    assert record_outcome(stopped, CONFIG).scores == {2: -2.0}
    lost = record(0, 0.5, {1: 2.0}, status="failed", reason="train_loss became nan in epoch 2")
    assert record_outcome(lost, CONFIG).scores == {0: -math.inf}
    died = record(0, 0.5, {}, status="failed", reason="the trial's process died")
    assert record_outcome(died, CONFIG).scores == {}


def test_the_luckiest_trial_is_not_the_best_one():
    """Of one among bad neighbours the model expects less than of those that are good together."""
    records = [record(k, k / 20, {9: 1.0 + abs(k / 20 - 0.7)}) for k in range(21)]
    records[2] = record(2, 0.1, {9: 0.98})  # its neighbours have 1.6
    ranked = sorted(records, key=lambda r: r.value("val_nll"))
    assert ranked[0].number == 2
    found = [r.number for r in rank_by_model(ranked, records, CONFIG)]
    assert set(found[:3]) <= set(range(11, 18)) and sorted(found) == [*range(21)]
    few = ranked[:3]
    assert rank_by_model(few, few, CONFIG) == few
