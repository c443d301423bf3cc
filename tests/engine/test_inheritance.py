"""The student's uncertainty against the teacher's: correlations, divergence, epochs, refusals."""

from __future__ import annotations

import json
import math

import pytest
import torch
from engine_runs import CPU
from scipy.stats import entropy, spearmanr
from torch.distributions import Dirichlet

import ekd_ray.engine.teacher.source as teachers
from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.data import dataset_info, load_dataset
from ekd_ray.engine.distill import distill
from ekd_ray.engine.final import evaluate_test
from ekd_ray.engine.measure.inheritance import (
    FILE,
    Inheritance,
    compare_uncertainty,
    spearman,
)
from ekd_ray.engine.measure.ranking import auroc
from ekd_ray.engine.measure.teacher_pass import teacher_priors
from ekd_ray.engine.measure.uncertainty import uncertainty_metrics
from ekd_ray.engine.resolve import resolve
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.engine.rundata import split_ids
from ekd_ray.engine.teacher.joining import join_teachers
from ekd_ray.engine.teacher.source import live_teacher
from ekd_ray.errors import UserError
from ekd_ray.losses.methods import with_method
from ekd_ray.models import build_model, save_weights
from ekd_ray.studies.pipeline import check_study

torch.set_num_threads(1)


def draw(*shape, seed=0):
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rounded", [False, True])
def test_spearman_is_that_of_scipy_ties_included(rounded):
    one, other = draw(2, 200)
    other = other + one
    if rounded:
        one, other = one.round(), other.round()
    assert spearman(one, other) == pytest.approx(spearmanr(one, other).statistic, abs=1e-12)


def test_scores_that_are_all_equal_or_no_number_correlate_with_nothing():
    one = draw(5)
    assert math.isnan(spearman(one, torch.zeros(5)))
    assert math.isnan(spearman(one, torch.tensor([0, 1, 2, 3, math.nan])))


@pytest.mark.parametrize(
    ("log_prior", "teacher_log_prior"), [(None, None), (-0.5, 0.3), (0.2, None)]
)
def test_figures_are_those_of_distributions(log_prior, teacher_log_prior):
    student, teacher = draw(2, 50, 6).double()
    student = student + teacher

    def probabilities(logits, prior):
        return (
            logits.softmax(1) if prior is None else Dirichlet(logits.exp() + math.exp(prior)).mean
        )

    p_s, p_t = probabilities(student, log_prior), probabilities(teacher, teacher_log_prior)
    found = compare_uncertainty(
        student, teacher, log_prior=log_prior, teacher_log_prior=teacher_log_prior
    )
    assert found["teacher_kl"] == pytest.approx(entropy(p_t, p_s, axis=1).mean())
    expected = spearmanr(entropy(p_s, axis=1), entropy(p_t, axis=1)).statistic
    assert found["entropy_corr"] == pytest.approx(expected, abs=1e-9)
    evidence = [of.exp().sum(1) for of in (student, teacher)]
    assert found["vacuity_corr"] == pytest.approx(spearmanr(*evidence).statistic, abs=1e-9)


def test_who_says_what_the_teacher_says_has_inherited_all():
    logits = draw(30, 4)
    found = compare_uncertainty(logits, logits, log_prior=0.1, teacher_log_prior=0.1)
    assert found == pytest.approx({"vacuity_corr": 1, "entropy_corr": 1, "teacher_kl": 0})
    with pytest.raises(ValueError, match="teacher must have the shape"):
        compare_uncertainty(logits, logits[1:], log_prior=None, teacher_log_prior=None)


def test_mutual_information_ranks_strange_images():
    inside, outside, target = draw(40, 5), draw(60, 5, seed=1) - 2, torch.zeros(40).long()

    def mutual_information(logits):
        a = logits.double().exp() + math.exp(-0.3)
        total = a.sum(1, keepdim=True)
        p = a / total
        expected = -(p * (torch.digamma(a + 1) - torch.digamma(total + 1))).sum(1)
        return torch.from_numpy(entropy(p, axis=1)) - expected

    found = uncertainty_metrics(inside, target, log_prior=-0.3, ood_logits=outside)
    expected = auroc(mutual_information(inside), mutual_information(outside))
    assert found["mi_auroc"] == pytest.approx(expected)
    softmax = uncertainty_metrics(inside, target, log_prior=None, ood_logits=outside)
    assert "mi_auroc" not in softmax and "ood_auroc" in softmax


# In runs


@pytest.fixture(scope="module")
def taught(tiny, with_teacher):
    return lambda method="ekd", **values: with_method(
        tiny(), method, **{"augment": "none", **with_teacher, **values}
    )


@pytest.mark.parametrize("method", ["ekd", "kd"])
def test_every_epoch_compares_with_the_teacher_and_trains_as_without(
    method, taught, own_cache, monkeypatch
):
    config = taught(method, compare_teacher=True, teacher_cache="on")
    result, plain = distill(config, threads=1), distill(taught(method), threads=1)
    found = result.history[-1]
    assert {*found} - {*plain.history[-1]} == {
        "val_vacuity_corr", "val_entropy_corr", "val_teacher_kl"
    }  # fmt: skip
    assert {name: found[name] for name in plain.metrics if name != "seconds"} == {
        name: value for name, value in plain.metrics.items() if name != "seconds"
    }
    # By hand: the teacher and the student on the validation images.
    full = resolve(config)
    arrays = load_dataset("synthetic", "train")
    images = torch.from_numpy(arrays.images[split_ids(full, arrays.labels)[1]])
    teacher = live_teacher(full, 10, precision="float32", device=CPU)(images)
    facts = dataset_info("synthetic")
    mean, std = (torch.tensor(of).view(3, 1, 1) for of in (facts.mean, facts.std))
    with torch.no_grad():
        student = result.model.eval()((images / 255 - mean) / std)
    expected = spearmanr(student.logsumexp(1), teacher.logsumexp(1)).statistic
    assert found["val_vacuity_corr"] == pytest.approx(expected, abs=0.02)
    # The teacher's file has a prior, by which it is read whatever the method.
    prior, own = result.log_prior, teacher_priors(full)[1]
    assert (prior is None) == (method == "kd") and own is not None
    p_s, p_t = (
        of.double().softmax(1) if lam is None else Dirichlet(of.double().exp() + math.exp(lam)).mean
        for of, lam in ((student, prior), (teacher, own))
    )
    assert found["val_teacher_kl"] == pytest.approx(entropy(p_t, p_s, axis=1).mean(), rel=0.01)
    # A warm run asks no teacher.
    teachers._network.cache_clear()
    monkeypatch.setattr(teachers, "load_model", None)
    again = distill(config, threads=1)
    assert again.history[-1]["val_vacuity_corr"] == found["val_vacuity_corr"]


def test_a_method_without_a_teacher_has_nothing_to_compare(tiny):
    row = distill(tiny(compare_teacher=True, epochs=1), threads=1).metrics
    assert "val_vacuity_corr" not in row


def test_unless_it_is_asked_for_no_fingerprint_moves(taught):
    assert taught().fingerprint() == taught(compare_teacher=False).fingerprint()
    assert "compare_teacher" not in taught().identity()
    assert taught().fingerprint() != taught(compare_teacher=True).fingerprint()


def test_the_final_evaluation_keeps_it_for_every_set(taught, tmp_path):
    result = distill(taught(epochs=1, ood_dataset="digits"), threads=1)
    keep = tmp_path / "predictions.safetensors"
    evaluate_test(result, stage=RunStage.FINAL, data_root=None, keep=keep)
    found = Inheritance.load(keep.with_name(FILE))
    assert {*found.figures} >= {"test", "digits", "noise"}
    assert {*found.figures} == {*found.points}
    assert all(0 < len(of) <= 400 for of in found.points.values())
    assert found.figures["test"]["teacher_kl"] > 0
    teacher, student = torch.tensor(found.points["test"]).unbind(1)
    near = spearmanr(teacher, student).statistic
    assert found.figures["test"]["vacuity_corr"] == pytest.approx(near, abs=0.15)


def test_damage_of_what_was_kept_is_refused(tmp_path):
    path = tmp_path / FILE
    pair = (draw(9, 3), draw(9, 3, seed=1))
    Inheritance.of({"test": pair}, log_prior=None, teacher_log_prior=None).save(path)
    whole = json.loads(path.read_text())
    assert Inheritance.load(path).figures == whole["figures"]
    for broken in (
        {}, {**whole, "points": {}}, {**whole, "more": 1}, {"figures": {}, "points": {}},
        {**whole, "points": {"test": [[1.0]]}}, {**whole, "figures": {"test": {"teacher_kl": "x"}}},
    ):  # fmt: skip
        path.write_text(json.dumps(broken))
        with pytest.raises(UserError, match="is damaged"):
            Inheritance.load(path)


# In studies


def study(base, metric, **settings):
    space = {"lr": {"low": 0.01, "high": 0.1}}
    return StudyConfig(
        **{"distill": base, "metric": metric, "trials": 2, "space": space, **settings}
    )


def test_a_study_that_watches_it_compares(taught):
    checked = check_study(study(taught(), "val_vacuity_corr"))
    assert checked.distill.compare_teacher
    assert not check_study(study(taught(), "val_top1")).distill.compare_teacher


@pytest.mark.parametrize(
    ("method", "metric", "values", "word"),
    [
        ("ekd", "val_mi_auroc", {}, "--ood-dataset"),
        ("kd", "val_mi_auroc", {"ood_dataset": "digits"}, "method kd has no Dirichlet"),
        ("evidential", "val_vacuity_corr", {}, "method evidential has no teacher"),
    ],
)
def test_a_metric_that_trials_would_not_have_is_refused(method, metric, values, word, taught, tiny):
    base = taught(method, **values) if method != "evidential" else with_method(tiny(), method)
    with pytest.raises(UserError, match=word):
        check_study(study(base, metric))
    space = {"method": {"choices": ["ekd", "kd"]}}
    if metric == "val_mi_auroc" and values:
        with pytest.raises(UserError, match=word):
            check_study(study(taught(**values), metric, space=space))


def test_an_ensembles_total_concentration_is_what_its_student_is_held_against(tiny, tmp_path):
    files = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = build_model("resnet8", 10)
        files.append(tmp_path / f"{seed}.safetensors")
        save_weights(model, files[-1], model_name="resnet8", num_classes=10, mean=(0.5,) * 3,
                     std=(0.5,) * 3)  # fmt: skip
    joined = join_teachers(files, tmp_path / "joined.safetensors")
    config: DistillConfig = with_method(
        tiny(), "ekd", augment="none", teacher=joined.model, teacher_weights=str(joined.path),
        compare_teacher=True, epochs=1,
    )  # fmt: skip
    assert abs(distill(config, threads=1).metrics["val_vacuity_corr"]) <= 1
