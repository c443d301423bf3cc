"""What the user believes of a parameter: the belief itself, and the samplers that know it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import kstest, truncnorm
from search_runs import FLOATS, MIXED, run, study_of

from ekd_ray.errors import UserError
from ekd_ray.results.study_model import encode_points
from ekd_ray.scale.model_sampler import Coordinates
from ekd_ray.scale.prior import EVEN, ODDS, SPREAD, Prior, fade
from ekd_ray.scale.samplers import SAMPLERS, STARTUP_TRIALS, check_sampler
from ekd_ray.scale.space import Space

KNOW = [name for name, kind in SAMPLERS.items() if kind.priors]


def of_range(center, confidence="high"):
    return Prior(center=center, value=center, confidence=confidence)


@pytest.mark.parametrize("confidence", SPREAD)
@pytest.mark.parametrize("center", [0.0, 0.3, 1.0])
def test_a_belief_of_a_range_is_a_truncated_normal_and_an_even_part(center, confidence):
    prior, spread = of_range(center, confidence), SPREAD[confidence]
    normal = truncnorm(-center / spread, (1 - center) / spread, loc=center, scale=spread)
    places = np.linspace(0, 1, 11)
    wanted = EVEN + (1 - EVEN) * normal.pdf(places)
    np.testing.assert_allclose(np.exp(prior.log_density(places)), wanted)
    whole = quad(lambda at: float(np.exp(prior.log_density(np.array([at])))[0]), 0, 1)[0]
    assert whole == pytest.approx(1, abs=1e-6)
    for rng in (np.random.default_rng(0), np.random.RandomState(0)):  # ours and Optuna's
        drawn = [prior.draw(rng) for _ in range(2000)]
        assert kstest(drawn, lambda at: EVEN * at + (1 - EVEN) * normal.cdf(at)).pvalue > 0.001


@pytest.mark.parametrize("confidence", ODDS)
def test_a_belief_of_a_choice_makes_it_so_many_times_as_likely(confidence):
    prior = Prior(center=1.0, value="b", confidence=confidence, choices=4)
    density = np.exp(prior.log_density(np.arange(4.0)))
    assert density.mean() == pytest.approx(1)
    assert (density[1] - EVEN) / (density[0] - EVEN) == pytest.approx(ODDS[confidence])
    drawn = np.array([prior.draw(np.random.default_rng(seed)) for seed in range(2000)])
    assert (drawn == 1).mean() == pytest.approx(density[1] / 4, abs=0.04)


def test_a_prior_fades_with_the_trials():
    assert fade(10) == 10 * fade(100) == 100 * fade(1000) and fade(0) == fade(1)


def with_priors(space, **centers):
    added = {name: {"center": at, "confidence": "high"} for name, at in centers.items()}
    return {name: {**entry, "prior": added.get(name)} for name, entry in space.items()}


def learning_rates(folder, sampler, count, seed=0, **centers):
    space = with_priors(FLOATS, **centers) if centers else FLOATS
    folder.mkdir()
    ran = run(folder, study_of(sampler, space=space, trials=count, seed=seed), count)
    return np.array([settings["lr"] for settings in ran])


@pytest.mark.parametrize("sampler", KNOW)
def test_every_other_start_up_trial_is_drawn_from_it(sampler, tmp_path):
    first = [learning_rates(tmp_path / f"{seed}", sampler, 2, seed, lr=0.08) for seed in range(12)]
    believed, even = np.median(np.array(first), axis=0)
    assert believed > 0.025 > even  # the even draw's median is 0.01


@pytest.mark.parametrize("sampler", KNOW)
def test_a_search_goes_on_where_it_is_told_and_ends_where_it_is_good(sampler, tmp_path):
    """The best rate of these made-up scores is 0.01; the user says 0.08."""
    wrong = learning_rates(tmp_path / "wrong", sampler, 24, lr=0.08)
    none = learning_rates(tmp_path / "none", sampler, 14)
    told, untold = (np.log(rates[STARTUP_TRIALS:14]).mean() for rates in (wrong, none))
    assert told > untold
    assert np.abs(np.log(wrong[-6:] / 0.01)).mean() < 1


def test_choices_steps_and_conditions_may_have_one(tmp_path):
    """Of a point each parameter counts by itself, and one that it lacks does not."""
    space = Space(with_priors(MIXED, batch_size=32, optimizer="sgd", nesterov=True))
    points = space.sample(30, seed=0)
    wanted = []
    for point in points:
        beliefs = {n: p for n, p in space.parameters.items() if p.prior and n in point}
        each = [p.prior.log_density(np.array([p.place(point[n])])) for n, p in beliefs.items()]
        wanted.append(np.sum(each))
    rows = encode_points(points, with_priors(MIXED))
    np.testing.assert_allclose(Coordinates(space).log_prior(rows), wanted)
    assert {len(point) for point in points} == {4, 5}
    ran = run(tmp_path, study_of("tpe", space=with_priors(MIXED, batch_size=32), trials=14), 14)
    assert {settings["batch_size"] for settings in ran} <= {16, 32, 48, 64}


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name not in KNOW])
def test_samplers_that_know_none_refuse_it(sampler):
    config = study_of(sampler, space=with_priors(FLOATS, lr=0.01))
    with pytest.raises(
        UserError, match=r"knows no priors, and lr has one: .* tpe, model"
    ) as refused:
        check_sampler(config, Space(config.space))
    assert refused.value.keys == ("space", "lr", "prior")


def test_a_range_whose_end_is_no_multiple_of_the_step_has_no_value_there():
    parameter = Space({"kd_weight": {"low": 0, "high": 9.9, "step": 4}}).parameters["kd_weight"]
    assert {parameter.value_at(at) for at in np.linspace(0, 1, 50)} == {0, 4, 8}
