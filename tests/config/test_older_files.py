"""Files from before `ekd_temperature`: the second order had the temperature of the first."""

import json

import pytest

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.losses.methods import METHODS, resolve_method


def older(method, **values):
    """A complete configuration as it was written then."""
    run = resolve_method(DistillConfig(method=method, **values)).to_dict()
    del run["ekd_temperature"]
    return json.loads(json.dumps({**run, "evidence": "log1p_softplus"}))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("temperature", [None, 3.5])
def test_an_older_run_means_what_it_meant(method, temperature):
    values = {}
    if temperature and "temperature" in METHODS[method].setting_names:
        values["temperature"] = temperature
    run = resolve_method(DistillConfig.from_dict(older(method, **values)))
    if "ekd" not in METHODS[method].term_names:
        assert run == resolve_method(DistillConfig(method=method, **values))
    else:
        assert run.evidence == "log1p_softplus"
        assert run.ekd_temperature == values.get("temperature", 1.0)
    study = StudyConfig.from_dict({"distill": older(method, **values)})
    assert resolve_method(study.distill) == run
    assert DistillConfig.from_dict(run.to_dict()) == run


def test_what_names_some_settings_only_has_the_defaults_of_now():
    run = resolve_method(DistillConfig.from_dict({"temperature": 3.0, "ekd_weight": 2.0}))
    assert (run.evidence, run.ekd_temperature) == ("softplus", 1.0)


@pytest.mark.parametrize("method", ["ekd", "kd"])
def test_runs_of_the_former_and_the_present_default_never_share_a_fingerprint(method):
    now = resolve_method(DistillConfig(method=method))
    given = now.replace(evidence="softplus")
    former = now.replace(evidence="log1p_softplus")
    assert now.fingerprint() == given.fingerprint() != former.fingerprint()
    assert now.identity()["evidence"] == "softplus"


def test_the_temperature_of_the_second_order_counts_where_there_is_one():
    ekd = resolve_method(DistillConfig(method="ekd", temperature=3.0))
    assert ekd.replace(ekd_temperature=3.0).fingerprint() != ekd.fingerprint()
    assert "ekd_temperature" not in resolve_method(DistillConfig(method="kd")).identity()
