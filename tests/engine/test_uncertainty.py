"""Uncertainty against mpmath, Monte Carlo, scikit-learn, torchmetrics and plain loops."""

import itertools
import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from ekd_ray.engine.measure import uncertainty as module
from ekd_ray.engine.measure.ranking import aurc, auroc
from ekd_ray.engine.measure.uncertainty import (
    SCORES,
    dissonance,
    entropies,
    score_images,
    score_names,
    uncertainty,
    uncertainty_metrics,
)
from ekd_ray.errors import UserError
from ekd_ray.losses import vacuity


def aleatoric_entropy(logits, log_prior):
    return entropies(logits, log_prior)[0]


def epistemic_entropy(logits, log_prior):
    return entropies(logits, log_prior)[1]


PER_IMAGE = (dissonance, aleatoric_entropy, epistemic_entropy, uncertainty)
EVIDENTIAL = {"vacuity", "dissonance", "aleatoric_entropy", "epistemic_entropy"}


def draw(n=40, classes=7, scale=3.0, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    return logits.to(dtype), torch.randint(classes, (n,), generator=generator)


def exact_concentration(row, log_prior):
    """mpf of one row; an exponent of any size is exact enough at the working precision."""
    return [mpmath.exp(mpmath.mpf(z)) + mpmath.exp(mpmath.mpf(log_prior)) for z in row.tolist()]


def exact_entropies(logits, log_prior):
    """(aleatoric, epistemic) of each row from the definition, with 120 digits."""
    rows = []
    with mpmath.workdps(120):
        for row in logits:
            a = exact_concentration(row, log_prior)
            total = mpmath.fsum(a)
            digamma = mpmath.digamma(total + 1)
            aleatoric = -mpmath.fsum(x / total * (mpmath.digamma(x + 1) - digamma) for x in a)
            entropy = -mpmath.fsum(x / total * mpmath.log(x / total) for x in a)
            rows.append((float(aleatoric), float(entropy - aleatoric)))
    return torch.tensor(rows, dtype=torch.float64).unbind(1)


def slow_dissonance(logits, log_prior):
    """The definition, row by row, class by class, pair by pair, with 60 digits."""
    rows = []
    with mpmath.workdps(60):
        for row in logits:
            a = exact_concentration(row, log_prior)
            b = [mpmath.exp(mpmath.mpf(z)) / mpmath.fsum(a) for z in row.tolist()]
            value = mpmath.mpf(0)
            for k in range(len(b)):
                above, below = mpmath.mpf(0), mpmath.mpf(0)
                for j in range(len(b)):
                    if j != k:
                        above += b[j] * (1 - abs(b[j] - b[k]) / (b[j] + b[k]))
                        below += b[j]
                value += b[k] * above / below
            rows.append(float(value))
    return torch.tensor(rows, dtype=torch.float64)


def slow_aurc(scores, wrong):
    """The mean over every order that sorts the scores, for a handful of samples."""
    values = []
    for order in itertools.permutations(range(len(scores))):
        if all(scores[i] <= scores[j] for i, j in itertools.pairwise(order)):
            risks = [sum(wrong[i] for i in order[:k]) / k for k in range(1, len(order) + 1)]
            values.append(sum(risks) / len(risks))
    return sum(values) / len(values)


# ---------------------------------------------------------------- dissonance


@pytest.mark.parametrize("classes", [2, 3, 12])
@pytest.mark.parametrize("log_prior", [-20.0, -1.22, 3.0])
@pytest.mark.parametrize("scale", [0.1, 3.0, 100.0])
def test_dissonance_equals_its_definition(classes, log_prior, scale):
    logits, _ = draw(n=8, classes=classes, scale=scale)
    expected = slow_dissonance(logits, log_prior)
    torch.testing.assert_close(dissonance(logits, log_prior), expected, rtol=1e-11, atol=1e-14)


class LargestTensor(TorchDispatchMode):
    """Size in bytes of the largest tensor that an operation makes, views of `own` left out."""

    def __init__(self, own):
        super().__init__()
        self.own, self.bytes = own.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, torch.Tensor) and item.untyped_storage().data_ptr() != self.own:
                self.bytes = max(self.bytes, item.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("function", PER_IMAGE)
@pytest.mark.parametrize(("n", "classes"), [(4000, 100), (400, 1000)])
def test_memory_does_not_grow_with_the_images(function, n, classes):
    logits, _ = draw(n=n, classes=classes, dtype=torch.float32)
    with LargestTensor(logits) as largest:
        function(logits, -1.22)
    assert 2**18 < largest.bytes <= 2**20 < 8 * n * classes


@pytest.mark.parametrize("function", PER_IMAGE)
def test_pieces_do_not_show(function, monkeypatch):
    logits, _ = draw(n=23, classes=7)
    whole = function(logits, -1.22)
    for piece in (1, 7, 30):
        monkeypatch.setattr(module, "PIECE", piece)
        torch.testing.assert_close(function(logits, -1.22), whole, rtol=1e-13, atol=1e-15)


# ---------------------------------------------------------------- entropies


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("log_prior", [-20.0, -1.22, 3.0])
@pytest.mark.parametrize("scale", [0.1, 3.0, 100.0])
def test_entropies_equal_arbitrary_precision(classes, log_prior, scale):
    logits, _ = draw(n=8, classes=classes, scale=scale)
    aleatoric, epistemic = exact_entropies(logits, log_prior)
    found = aleatoric_entropy(logits, log_prior), epistemic_entropy(logits, log_prior)
    torch.testing.assert_close(found[0], aleatoric, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(found[1], epistemic, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("shift", [3.0, 10.0, 20.0, 40.0, 60.0])
@pytest.mark.parametrize("classes", [2, 10])
def test_epistemic_entropy_keeps_its_digits_with_much_evidence(classes, shift):
    """From 20 on, a difference of the two entropies in float64 would keep 7 digits or none."""
    logits, _ = draw(n=6, classes=classes, scale=1.0)
    logits += shift
    _, expected = exact_entropies(logits, -1.22)
    found = epistemic_entropy(logits, -1.22)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    limit = (classes - 1) / 2 / logits.exp().sum(1)
    if shift >= 20:
        torch.testing.assert_close(found, limit, rtol=1e-6, atol=0)


# ---------------------------------------------------------------- all per-image functions


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize("log_prior", [-1.22, 2.0])
def test_everything_is_finite_at_extreme_logits(dtype, classes, log_prior):
    mixed = draw(n=3, classes=classes, scale=1e4)[0].clamp(-1e4, 1e4)
    rows = [
        torch.full((classes,), -1e4),
        torch.full((classes,), 1e4),
        torch.eye(classes)[0] * 2e4 - 1e4,
        1e4 - torch.eye(classes)[0] * 2e4,
        torch.linspace(-1e4, 1e4, classes),
    ]
    logits = torch.cat((mixed, torch.stack(rows).double())).to(dtype)
    upper = (1.0, math.log(classes), math.log(classes), math.inf)
    for function, high in zip(PER_IMAGE, upper, strict=True):
        found = function(logits, log_prior)
        assert found.dtype == torch.float64 and found.shape == (8,)
        assert found.isfinite().all()
        if function is not uncertainty:
            assert (found >= 0).all() and (found <= high + 1e-9).all()
    assert uncertainty(logits, None).isfinite().all()
    values = uncertainty_metrics(logits, torch.zeros(8).long(), log_prior=log_prior)
    assert all(math.isfinite(value) for value in values.values())


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 9), scale=st.floats(0.1, 200))
def test_order_of_classes_and_images_does_not_matter(seed, classes, scale):
    logits, target = draw(n=9, classes=classes, scale=scale, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(9, generator=generator)
    columns = torch.randperm(classes, generator=generator)
    for function, log_prior in [*((f, -1.22) for f in PER_IMAGE), (uncertainty, None)]:
        found = function(logits[rows][:, columns], log_prior)
        expected = function(logits, log_prior)[rows]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    for log_prior in (-1.22, None):
        one = uncertainty_metrics(logits, target, log_prior=log_prior)
        two = uncertainty_metrics(logits[rows], target[rows], log_prior=log_prior)
        assert two == pytest.approx(one, rel=1e-9, abs=1e-12)


def test_uncertainty_is_the_log_odds_of_vacuity_and_of_an_error():
    logits, _ = draw()
    torch.testing.assert_close(uncertainty(logits, 0.7).sigmoid(), vacuity(logits, 0.7))
    error = 1 - logits.softmax(1).amax(1)
    torch.testing.assert_close(uncertainty(logits, None).sigmoid(), error)


@pytest.mark.parametrize("log_prior", [-1.22, None])
def test_uncertainty_does_not_saturate(log_prior):
    """All of these have probability 1.0 and vacuity 0.0, or vacuity 1.0, in float64."""
    margin = torch.tensor([800.0, 900.0, 1e3, 9e3, 1e4])
    sure = torch.stack((margin, -margin), 1)
    assert (uncertainty(sure, log_prior).diff() < 0).all()
    empty = torch.stack((-margin, -margin - 1), 1)
    if log_prior is not None:
        assert (uncertainty(empty, log_prior).diff() > 0).all()


# ---------------------------------------------------------------- scores


def exact_scores(a):
    """Those of a Dirichlet [C] of mpf, from their definitions, with the precision at hand."""
    total = mpmath.fsum(a)
    p = [x / total for x in a]
    digamma = mpmath.digamma(total + 1)
    entropy = -mpmath.fsum(x * mpmath.log(x) for x in p)
    expected = -mpmath.fsum(
        q * (mpmath.digamma(x + 1) - digamma) for q, x in zip(p, a, strict=True)
    )
    log_beta = mpmath.fsum(mpmath.loggamma(x) for x in a) - mpmath.loggamma(total)
    spread = mpmath.fsum((x - 1) * mpmath.digamma(x) for x in a)
    differential = log_beta + (total - len(a)) * mpmath.digamma(total) - spread
    top = max(p)
    return {
        "max_probability": mpmath.log((1 - top) / top),
        "entropy": entropy,
        "expected_entropy": expected,
        "mutual_information": entropy - expected,
        "differential_entropy": differential,
    }


FORMS = {
    "exp": mpmath.exp,
    "softplus": lambda z: mpmath.log(1 + mpmath.exp(z)),
    "relu": lambda z: max(z, mpmath.mpf(0)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("log_prior", [-20.0, -1.22, 3.0])
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_scores_equal_arbitrary_precision(form, log_prior, scale):
    logits, _ = draw(n=6, classes=5, scale=scale)
    expected = {name: [] for name in SCORES}
    with mpmath.workdps(120):
        prior = mpmath.exp(log_prior)
        for row in logits.tolist():
            found = [FORMS[form](mpmath.mpf(z)) for z in row]
            values = exact_scores([e + prior for e in found])
            values["vacuity"] = mpmath.log(5 * prior / mpmath.fsum(found))
            values["energy"] = -mpmath.log(mpmath.fsum(mpmath.exp(z) for z in row))
            for name, value in values.items():
                expected[name].append(float(value))
    for name, values in expected.items():
        found = score_images(name, logits, log_prior, evidence=form)
        assert found.tolist() == pytest.approx(values, rel=1e-10, abs=1e-12), name


def test_the_differential_entropy_equals_scipys_and_keeps_its_digits():
    from scipy.stats import dirichlet

    logits, _ = draw(n=20, classes=4, scale=2.0)
    expected = [dirichlet(a).entropy() for a in (logits.exp() + math.exp(-1.22)).numpy()]
    found = score_images("differential_entropy", logits, -1.22)
    assert found.tolist() == pytest.approx(expected, rel=1e-9)
    for shift in (2.0, 2.9, 30.0, 300.0):  # scipy's has no digit from 30 on
        with mpmath.workdps(400):
            rows = [exact_concentration(row + shift, -1.22) for row in logits[:3]]
            expected = [float(exact_scores(a)["differential_entropy"]) for a in rows]
        found = score_images("differential_entropy", logits[:3] + shift, -1.22)
        assert found.tolist() == pytest.approx(expected, rel=1e-11)


def test_scores_of_a_softmax_are_those_of_its_probabilities():
    logits, _ = draw()
    p = logits.softmax(1)
    found = {name: score_images(name, logits, None) for name in score_names(None)}
    expected = {
        "max_probability": torch.special.logit(1 - p.amax(1)),
        "entropy": torch.special.entr(p).sum(1),
        "energy": -logits.exp().sum(1).log(),
    }
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, msg=name)


def test_scores_of_a_concentration_with_its_prior_inside():
    logits, _ = draw()
    log_a = torch.logaddexp(logits, torch.tensor(0.5))
    for name in SCORES.keys() - {"vacuity", "energy"}:
        inside = score_images(name, log_a, -math.inf)
        torch.testing.assert_close(inside, score_images(name, logits, 0.5), msg=name)
    mass = math.log(logits.shape[1]) - log_a.logsumexp(1)
    torch.testing.assert_close(score_images("vacuity", log_a, -math.inf), mass)


@pytest.mark.parametrize("log_prior", [-1e3, -1.22, 2.0])
@pytest.mark.parametrize("name", SCORES)
def test_no_score_is_nan_at_extreme_logits(name, log_prior):
    logits = torch.cat((torch.eye(9) * 2e4 - 1e4, 1e4 - torch.eye(9) * 2e4, torch.zeros(1, 9)))
    found = score_images(name, logits, log_prior)
    assert found.isfinite().all() and len(found) == 19


@pytest.mark.parametrize("name", SCORES)
def test_the_order_of_the_classes_moves_no_score(name):
    logits, _ = draw(n=9)
    moved = score_images(name, logits.flip(1), -1.22)
    torch.testing.assert_close(moved, score_images(name, logits, -1.22), rtol=1e-9, atol=1e-12)


def test_a_score_that_there_is_not():
    with pytest.raises(UserError, match=r"vacuiti.*vacuity"):
        score_images("vacuiti", torch.zeros(1, 2), 0.0)
    with pytest.raises(UserError, match=r"evidential.*max_probability, entropy, energy"):
        score_images("vacuity", torch.zeros(1, 2), None)


# ---------------------------------------------------------------- rankings


def test_aurc_of_cases_solved_by_hand():
    scores = torch.tensor([0.1, 0.2, 0.3, 0.4])
    last = torch.tensor([False, False, False, True])
    assert aurc(scores, last) == pytest.approx((0 + 0 + 0 + 1 / 4) / 4)
    assert aurc(-scores, last) == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert aurc(torch.zeros(4), last) == pytest.approx(1 / 4)
    assert aurc(torch.tensor([-math.inf, 0.0, 1.0, math.inf]), last) == pytest.approx(1 / 16)


SAMPLES = st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(samples=SAMPLES)
def test_aurc_is_the_mean_over_all_orders_of_ties(samples):
    scores, wrong = zip(*samples, strict=True)
    found = aurc(torch.tensor(scores).double(), torch.tensor(wrong))
    assert found == pytest.approx(slow_aurc(scores, wrong), abs=1e-12)


@pytest.mark.parametrize("levels", [3, 10**6])
def test_auroc_equals_scikit_learn_and_torchmetrics(levels):
    from sklearn.metrics import roc_auc_score
    from torchmetrics.functional.classification import binary_auroc

    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(levels, (300,), generator=generator) / levels
    wrong = torch.rand(300, generator=generator) < 0.2 + 0.5 * scores
    found = auroc(scores[~wrong], scores[wrong])
    assert found == pytest.approx(roc_auc_score(wrong.numpy(), scores.numpy()), abs=1e-12)
    assert found == pytest.approx(float(binary_auroc(scores, wrong.long())), abs=1e-6)
    assert 0.55 < found < 0.95


def test_nan_is_passed_on():
    scores, wrong = torch.tensor([0.0, math.nan]), torch.tensor([True, False])
    assert math.isnan(aurc(scores, wrong))
    assert math.isnan(auroc(scores, scores[:1]))
    values = uncertainty_metrics(torch.full((2, 3), math.nan), torch.tensor([0, 1]), log_prior=0.0)
    assert all(math.isnan(value) for value in values.values())


# ---------------------------------------------------------------- metrics of a split


@pytest.mark.parametrize("log_prior", [None, -1.22])
def test_metrics_are_the_functions_above(log_prior):
    logits, target = draw(n=200)
    found = uncertainty_metrics(logits, target, log_prior=log_prior)
    assert all(type(value) is float for value in found.values())
    scores = 1 - logits.softmax(1).amax(1)
    expected = {}
    if log_prior is not None:
        scores = vacuity(logits, log_prior)
        aleatoric, epistemic = exact_entropies(logits, log_prior)
        conflict = slow_dissonance(logits, log_prior)
        parts = (scores, conflict, aleatoric, epistemic)
        names = ("vacuity", "dissonance", "aleatoric_entropy", "epistemic_entropy")
        expected = {name: float(x.mean()) for name, x in zip(names, parts, strict=True)}
    wrong = logits.argmax(1) != target
    risk = wrong[scores.argsort()].double().cumsum(0) / torch.arange(1, 201)
    expected |= {"aurc": float(risk.mean()), "error_auroc": auroc(scores[~wrong], scores[wrong])}
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("log_prior", [None, -1.22])
@pytest.mark.parametrize(("label", "risk"), [(0, 1.0), (1, 0.0)])
def test_where_all_are_right_or_all_wrong_there_is_no_error_auroc(log_prior, label, risk):
    logits, target = torch.tensor([[1.0, 2.0]]), torch.tensor([label])
    found = uncertainty_metrics(logits, target, log_prior=log_prior)
    assert set(found) == {"aurc"} | (EVIDENTIAL if log_prior is not None else set())
    assert found["aurc"] == risk


def test_dissonance_of_many_classes_is_that_of_evenly_spaced_rows(monkeypatch):
    logits, target = draw(n=30, classes=65)
    everyone = dissonance(logits, 0.0)
    found = uncertainty_metrics(logits, target, log_prior=0.0)["dissonance"]
    assert found == pytest.approx(float(everyone.mean()))
    for operations, rows in ((10.5 * 2.5 * 65**2, everyone[::3]), (1.0, everyone[:1])):
        monkeypatch.setattr(module, "DISSONANCE_OPERATIONS", operations)
        found = uncertainty_metrics(logits, target, log_prior=0.0)["dissonance"]
        assert found == pytest.approx(float(rows.mean()))
    few = logits[:, :64]
    found = uncertainty_metrics(few, target.clamp(max=63), log_prior=0.0)["dissonance"]
    assert found == pytest.approx(float(dissonance(few, 0.0).mean()))


def test_bad_input_is_refused():
    scores, wrong = torch.zeros(3), torch.zeros(3, dtype=torch.bool)
    with pytest.raises(ValueError, match="wrong must be bool"):
        aurc(scores, wrong.long())
    with pytest.raises(ValueError, match="wrong must be bool"):
        aurc(scores, wrong[:2])
    with pytest.raises(ValueError, match="uncertain must be"):
        auroc(scores, scores[:0])
    for function in PER_IMAGE:
        with pytest.raises(ValueError, match="logits must be"):
            function(torch.zeros(3, 1), 0.0)
    with pytest.raises(ValueError, match="log_prior must be finite"):
        dissonance(torch.zeros(3, 2), math.nan)
