"""Conformance of every registered method: a new entry of METHODS is covered by being there."""

import dataclasses
import itertools
import math
import typing

import pytest
import torch
from torch.distributions import Categorical, Dirichlet, kl_divergence
from torch.nn import functional

from ekd_ray.config import DistillConfig
from ekd_ray.errors import UserError
from ekd_ray.losses.objective import (
    METHOD_SETTINGS,
    METHODS,
    TERMS,
    Objective,
    ramp,
    resolve_method,
    with_method,
)

torch.set_num_threads(1)

FIELDS = {field.name: field for field in dataclasses.fields(DistillConfig)}
HINTS = typing.get_type_hints(DistillConfig)
# Terms between student and target; all others are between student and teacher.
TARGET_TERMS = {"ce", "prior_kl"}


def build(method, **values):
    return Objective(resolve_method(DistillConfig(method=method, **values)))


def draw(seed=0, batch=6, classes=7, scale=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        scale * torch.randn(2, batch, classes, generator=generator, dtype=torch.float64)
    ).to(dtype)
    target = torch.randint(classes, (batch,), generator=generator)
    return student, teacher, target


def weights_of(method):
    return [name for name in METHODS[method].uses if name.endswith("_weight")]


def everything_on(method):
    """Distinct non-zero weights for every term of a method, without ramps."""
    uses = METHODS[method].uses
    weights = {name: 0.5 + 0.25 * i for i, name in enumerate(weights_of(method))}
    return weights | {name: 0 for name in uses if name.endswith("_warmup")}


def variants():
    """(method, settings): plain, and each option of the table that the method uses."""
    for method, entry in METHODS.items():
        options = [{}]
        if "standardize" in entry.uses:
            options.append({"standardize": True})
        for name in entry.uses:
            if name.endswith("evidence"):
                options += [{name: kind} for kind in FIELDS[name].metadata["choices"]]
        if "learn_log_prior" in entry.uses:
            options += [{"learn_log_prior": True}, {"learn_log_prior": True, "log_prior": -1.2}]
        if "teacher_log_prior" in entry.uses:
            options.append({"log_prior": -1.2, "teacher_log_prior": 0.4})
        if "temperature" in entry.uses:
            options.append({"temperature": 3.0})
        for option in options:
            yield method, {**everything_on(method), **option}
        if "prior_kl_weight" in entry.uses:
            yield method, {}  # as by default: no regularisation, ramps on


def variant_id(value):
    if isinstance(value, str):
        return value
    shown = {k: v for k, v in value.items() if not k.endswith(("_weight", "_warmup"))}
    return ",".join(f"{k}={v}" for k, v in shown.items()) or ("plain" if value else "defaults")


every_variant = pytest.mark.parametrize(("method", "values"), list(variants()), ids=variant_id)
every_method = pytest.mark.parametrize("method", METHODS)


def test_the_variants_cover_the_table():
    covered = {(method, name) for method, values in variants() for name in values}
    assert covered == {(method, name) for method in METHODS for name in METHODS[method].uses}


# Values and gradients


def extreme_logits(dtype):
    big = torch.tensor([1e4, -1e4, 0.0, 88.0, -100.0, 700.0], dtype=torch.float64)
    rows = [big.roll(i) for i in range(6)]
    rows += [torch.full((6,), value, dtype=torch.float64) for value in (1e4, -1e4, 0.0)]
    rows += [1e4 * torch.eye(6, dtype=torch.float64)[0], -1e4 * torch.eye(6).double()[0]]
    return torch.stack(rows).to(dtype)


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_value_and_gradient_at_extreme_logits(method, values, dtype):
    objective = build(method, **values)
    logits = extreme_logits(dtype)
    for shift, label in itertools.product((0, 1, 6), (0, 1)):
        student = logits.clone().requires_grad_()
        target = torch.full((len(logits),), label)
        total, terms = objective(student, logits.roll(shift, 0), target, epoch=1)
        inputs = [student, *objective.parameters()]
        gradients = torch.autograd.grad(total, inputs)
        assert torch.isfinite(total)
        assert all(torch.isfinite(term) for term in terms.values()), terms
        assert all(torch.isfinite(gradient).all() for gradient in gradients)


@every_variant
def test_the_order_of_the_batch_does_not_matter(method, values):
    objective = build(method, **values)
    student, teacher, target = draw()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    one = objective(student, teacher, target, epoch=2)[0]
    other = objective(student[order], teacher[order], target[order], epoch=2)[0]
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    mixed = objective(student, teacher[order], target, epoch=2)[0]
    assert METHODS[method].needs_teacher == bool((mixed - one).abs() > 1e-6)


@every_variant
def test_the_loss_is_a_mean_over_the_batch(method, values):
    """Twice the same samples are the same loss."""
    objective = build(method, **values)
    student, teacher, target = draw()
    once = objective(student, teacher, target, epoch=2)[0]
    twice = objective(
        student.repeat(2, 1), teacher.repeat(2, 1), target.repeat(2), epoch=2
    )[0]  # fmt: skip
    torch.testing.assert_close(once, twice, rtol=1e-12, atol=1e-12)


@every_variant
def test_nothing_to_distil_when_student_equals_teacher(method, values):
    if values.get("teacher_log_prior") is not None:
        pytest.skip("their Dirichlets differ although the logits do not")
    objective = build(method, **values)
    logits, other, target = draw()
    terms = objective(logits, logits.clone(), target, epoch=1)[1]
    distilled = {name: value for name, value in terms.items() if name not in TARGET_TERMS}
    assert bool(distilled) == METHODS[method].needs_teacher
    assert all(abs(float(value)) < 1e-10 for value in distilled.values()), distilled
    apart = objective(logits, other, target, epoch=1)[1]
    assert all(float(apart[name]) > 1e-3 for name in distilled), apart


@every_variant
def test_float32_agrees_with_float64(method, values):
    objective = build(method, **values)
    results = []
    for dtype in (torch.float32, torch.float64):
        student, teacher, target = draw(dtype=dtype)
        student.requires_grad_()
        total = objective(student, teacher, target, epoch=2)[0]
        (gradient,) = torch.autograd.grad(total, student)
        assert total.dtype == gradient.dtype == dtype
        results.append((total.double().detach(), gradient.double()))
    (low, low_gradient), (high, high_gradient) = results
    torch.testing.assert_close(low, high, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(low_gradient, high_gradient, rtol=1e-3, atol=1e-5)


@every_variant
def test_float32_inside_autocast(method, values):
    objective = build(method, **values)
    student, teacher, target = draw(dtype=torch.bfloat16)
    student.requires_grad_()
    expected = objective(student.float(), teacher.float(), target, epoch=2)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, terms = objective(student, teacher, target, epoch=2)
    assert total.dtype == torch.float32
    assert {term.dtype for term in terms.values()} == {torch.float32}
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-6)
    total.backward()
    assert torch.isfinite(student.grad).all() and student.grad.abs().max() > 0


@every_variant
def test_no_gradient_reaches_the_teacher(method, values):
    student, teacher, target = draw()
    student.requires_grad_()
    teacher.requires_grad_()
    objective = build(method, **values)
    total, terms = objective(student, teacher, target, epoch=2)
    total.backward()
    assert teacher.grad is None
    assert student.grad.abs().max() > 0
    assert not any(term.requires_grad for term in terms.values())
    assert total.dim() == 0 and all(term.dim() == 0 for term in terms.values())


# Weights


@pytest.mark.parametrize(
    ("method", "name"), [(method, name) for method in METHODS for name in weights_of(method)]
)
def test_every_weight_is_multiplied_once(method, name):
    student, teacher, target = draw()

    def total(weight):
        objective = build(method, **{**everything_on(method), name: weight})
        return objective(student, teacher, target, epoch=1)

    (one, terms), (two, same), (four, _) = total(1.0), total(2.0), total(4.0)
    moved = two - one
    assert abs(float(moved.detach())) > 1e-3
    torch.testing.assert_close(four - two, 2 * moved, rtol=1e-10, atol=1e-10)
    assert all(torch.equal(terms[key], same[key]) for key in terms), "reported unweighted"
    term = name.removesuffix("_weight")
    if term in terms:
        torch.testing.assert_close(moved, terms[term], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("method", "name"), [(method, name) for method in METHODS for name in weights_of(method)]
)
def test_a_weight_alone_gives_exactly_its_term(method, name):
    off = dict.fromkeys(weights_of(method), 0.0)
    objective = build(method, **{**everything_on(method), **off, name: 1.0})
    student, teacher, target = draw()
    total, terms = objective(student, teacher, target, epoch=1)
    assert terms
    assert torch.equal(total.detach(), sum(terms.values()).to(total))
    doubled = build(method, **{**everything_on(method), **off, name: 2.0})
    assert torch.equal(doubled(student, teacher, target, epoch=1)[0], 2 * total)


@every_method
def test_terms_of_weight_zero_are_not_computed(method):
    called = []

    def spy(name, function):
        def wrapper(*args):
            called.append(name)
            return function(*args)

        return wrapper

    student, teacher, target = draw()
    for off in weights_of(method):
        values = {**everything_on(method), off: 0.0}
        if not any(values[name] for name in weights_of(method)):
            with pytest.raises(UserError, match="every loss weight"):
                build(method, **values)
            continue
        objective = build(method, **values)
        spies = {name: spy(name, term) for name, term in objective.method.terms.items()}
        objective.method = dataclasses.replace(objective.method, terms=spies)
        called.clear()
        _, terms = objective(student, teacher, target, epoch=1)
        assert called == list(terms) == list(objective.weights(1))
        skipped = set(spies) - set(called)
        assert skipped, off
        assert off.removesuffix("_weight") not in called


@every_method
def test_all_terms_are_computed_when_all_weights_are_on(method):
    student, teacher, target = draw()
    total, terms = build(method, **everything_on(method))(student, teacher, target, epoch=1)
    assert list(terms) == [name for name in TERMS if name in METHODS[method].terms]
    weights = build(method, **everything_on(method)).weights(1)
    expected = sum(weights[name] * value for name, value in terms.items())
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)


# Ramps


@pytest.mark.parametrize(
    ("epoch", "warmup", "value"),
    [(1, 4, 0.25), (2, 4, 0.5), (4, 4, 1.0), (5, 4, 1.0), (1, 1, 1.0), (1, 0, 1.0), (9, 0, 1.0),
     (1, 30, 1 / 30), (30, 30, 1.0), (240, 30, 1.0)],
)  # fmt: skip
def test_ramp(epoch, warmup, value):
    assert ramp(epoch, warmup) == value


@pytest.mark.parametrize(
    ("method", "name"),
    [(m, n) for m in METHODS for n in METHODS[m].uses if n in ("ekd_warmup", "prior_kl_warmup")],
)
def test_warm_ups_ramp_their_own_weight_only(method, name):
    term = name.removesuffix("_warmup")
    plain = build(method, **everything_on(method))
    slow = build(method, **{**everything_on(method), name: 4})
    for epoch, share in ((1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0), (5, 1.0)):
        full, weights = plain.weights(epoch), slow.weights(epoch)
        assert weights.pop(term) == share * full.pop(term)
        assert weights == full


# Knobs


def another(name, value):
    """Legal values of a setting other than `value`."""
    limits, hint = FIELDS[name].metadata, HINTS[name]
    if limits["choices"]:
        return [choice for choice in limits["choices"] if choice != value]
    if hint is bool:
        return [not value]
    if int in (hint, *typing.get_args(hint)):
        return [(value or 0) + 5]
    return [0.7 if value is None else 1.5 * value + 0.1]


def knobs():
    return [(method, name) for method in METHODS for name in METHODS[method].uses]


@pytest.mark.parametrize(("method", "name"), knobs())
def test_every_setting_that_a_method_uses_moves_its_loss(method, name):
    base = {**everything_on(method)}
    base |= {key: 10 for key in METHODS[method].uses if key.endswith("_warmup")}
    student, teacher, target = draw()

    def total(**values):
        objective = build(method, **{**base, **values})
        return float(objective(student, teacher, target, epoch=3)[0].detach())

    default = base.get(name, getattr(build(method, **base).config, name))
    for value in another(name, default):
        assert abs(total(**{name: value}) - total()) > 1e-4, value


@pytest.mark.parametrize(
    ("method", "name"),
    [(m, n) for m in METHODS for n in METHOD_SETTINGS if n not in METHODS[m].uses],
)
def test_a_setting_that_would_do_nothing_is_refused(method, name):
    (value, *_) = another(name, FIELDS[name].default)
    with pytest.raises(UserError, match=f"{name} is not used by method '{method}'") as refused:
        resolve_method(DistillConfig(method=method, **{name: value}))
    users = [key for key in METHODS if name in METHODS[key].uses]
    assert str(value) in str(refused.value)
    assert f"({', '.join(users)})" in str(refused.value)


def test_unknown_method():
    with pytest.raises(UserError, match=r"unknown method 'edk'.*Known: .*ekd"):
        resolve_method(DistillConfig(method="edk"))


@every_method
def test_the_table_is_consistent(method):
    entry = METHODS[method]
    assert set(entry.terms) <= set(TERMS)
    assert set(entry.defaults) <= set(entry.uses) <= set(DistillConfig.names())
    resolved = resolve_method(DistillConfig(method=method))
    assert resolve_method(resolved) == resolved
    for name in entry.uses:
        if not name.endswith("log_prior"):  # the teacher decides
            assert getattr(resolved, name) is not None, name


DEFAULTS = {
    "none": {"ce_weight": 1.0},
    "evidential": {"ce_weight": 1.0, "prior_kl_weight": 0.0, "learn_log_prior": False},
    "kd": {"temperature": 4.0, "ce_weight": 0.1, "kd_weight": 0.9, "standardize": False},
    "ekd": {
        "temperature": 1.0, "ce_weight": 1.0, "kd_weight": 4.5, "ekd_weight": 4.5,
        "ekd_warmup": 30, "evidence": "log1p_softplus", "prior_kl_weight": 0.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("method", DEFAULTS)
def test_defaults_are_the_published_ones(method):
    config = resolve_method(DistillConfig(method=method))
    assert {name: getattr(config, name) for name in DEFAULTS[method]} == DEFAULTS[method]


@pytest.mark.parametrize(("epochs", "warmup"), [(240, 30), (8, 1), (480, 60), (1, 0)])
def test_the_default_warm_up_is_in_proportion(epochs, warmup):
    assert resolve_method(DistillConfig(method="ekd", epochs=epochs)).ekd_warmup == warmup


def test_given_values_are_kept():
    config = resolve_method(DistillConfig(method="ekd", kd_weight=0.0, ekd_warmup=0))
    assert (config.kd_weight, config.ekd_warmup) == (0.0, 0)


@pytest.mark.parametrize(("before", "after"), list(itertools.permutations(METHODS, 2)))
def test_with_method_starts_the_method_afresh(before, after):
    """The old method's settings vanish, the run's stay, the given values win."""
    config = build(before, **everything_on(before), lr=0.7, epochs=16).config
    changed = with_method(config, after, ce_weight=0.3)
    expected = DistillConfig(method=after, lr=0.7, epochs=16, ce_weight=0.3)
    assert changed == resolve_method(expected)


# The log prior


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].evidential])
@pytest.mark.parametrize(
    ("values", "start"),
    [
        ({}, 0.0),
        ({"log_prior": -1.2}, -1.2),
        ({"learn_log_prior": True}, 1.0),
        ({"learn_log_prior": True, "log_prior": -1.2}, -1.2),
    ],
    ids=str,
)
def test_the_log_prior_starts_where_it_should_and_travels_in_the_state(method, values, start):
    objective = build(method, **everything_on(method), **values)
    learned = values.get("learn_log_prior", False)
    assert objective.log_prior_value == pytest.approx(start, abs=1e-7)
    assert objective.log_prior.dtype == torch.float32
    assert [name for name, _ in objective.named_parameters()] == ["log_prior"] * learned
    torch.testing.assert_close(objective.state_dict()["log_prior"], torch.tensor(start))
    if learned:
        student, teacher, target = draw()
        objective(student, teacher, target, epoch=1)[0].backward()
        assert objective.log_prior.grad.abs() > 1e-4


@pytest.mark.parametrize("method", [m for m in METHODS if not METHODS[m].evidential])
def test_softmax_methods_have_no_log_prior(method):
    objective = build(method)
    assert objective.log_prior_value is None
    assert not objective.state_dict()


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].needs_teacher])
def test_a_missing_teacher_is_a_programming_error(method):
    student, _, target = draw()
    with pytest.raises(ValueError, match=f"'{method}' needs teacher_logits"):
        build(method)(student, None, target, epoch=1)


@pytest.mark.parametrize("method", [m for m in METHODS if not METHODS[m].needs_teacher])
def test_methods_without_a_teacher_take_none(method):
    student, teacher, target = draw()
    objective = build(method, **everything_on(method))
    without, given = (objective(student, t, target, epoch=1)[0] for t in (None, teacher))
    assert torch.equal(without, given)


# Totals recomputed from METHODS.md, section 1 and 2, with torch.distributions in float64

EVIDENCE = {
    "log1p_softplus": lambda z: torch.log1p(torch.log1p(torch.exp(z))),
    "softplus": lambda z: torch.log1p(torch.exp(z)),
    "exp": torch.exp,
    "relu": lambda z: torch.clamp(z, min=0),
}


def expected_cross_entropy(concentration, target):
    """`psi(S) - psi(a_y)`, the mean of -log p_y under Dir(a)."""
    rows = torch.arange(len(target))
    chosen = torch.digamma(concentration[rows, target])
    return (torch.digamma(concentration.sum(dim=1)) - chosen).mean()


def standardized(z):
    deviation = torch.sqrt(((z - z.mean(1, keepdim=True)) ** 2).sum(1, keepdim=True) / (7 - 1))
    return (z - z.mean(1, keepdim=True)) / (1e-7 + deviation)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize(("temperature", "ce", "kd"), [(4.0, 0.1, 0.9), (2.5, 1.0, 9.0)])
def test_kd_is_the_formula(temperature, ce, kd, standardize):
    student, teacher, target = draw(seed=3)
    z_s, z_t = (standardized(z) if standardize else z for z in (student, teacher))
    divergence = kl_divergence(
        Categorical(logits=z_t / temperature), Categorical(logits=z_s / temperature)
    ).mean()
    cross_entropy = -Categorical(logits=student).log_prob(target).mean()
    expected = ce * cross_entropy + kd * temperature**2 * divergence
    objective = build(
        "kd", temperature=temperature, ce_weight=ce, kd_weight=kd, standardize=standardize
    )
    torch.testing.assert_close(
        objective(student, teacher, target, epoch=1)[0], expected, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("evidence", EVIDENCE)
@pytest.mark.parametrize("epoch", [1, 5, 10, 40])
@pytest.mark.parametrize(
    "values",
    [
        {"log_prior": -1.25},
        {"log_prior": -1.25, "teacher_log_prior": 0.5, "temperature": 2.0},
        {"log_prior": 0.25, "prior_kl_weight": 0.5, "prior_kl_evidence": "relu"},
    ],
    ids=str,
)
def test_ekd_is_the_formula(values, epoch, evidence):
    student, teacher, target = draw(seed=4)
    prior = math.exp(values["log_prior"])
    prior_t = math.exp(values.get("teacher_log_prior", values["log_prior"]))
    temperature = values.get("temperature", 1.0)
    a_s = torch.exp(student / temperature) + prior
    a_t = torch.exp(teacher / temperature) + prior_t
    first = kl_divergence(Categorical(probs=a_t), Categorical(probs=a_s)).mean()
    grow = EVIDENCE[evidence]
    second = kl_divergence(
        Dirichlet(grow(teacher / temperature) + prior_t),
        Dirichlet(grow(student / temperature) + prior),
    ).mean()
    expected = 0.7 * expected_cross_entropy(torch.exp(student) + prior, target)
    expected = expected + 4.5 * temperature**2 * first
    expected = expected + min(epoch / 10, 1) * 1.5 * temperature**2 * second
    if "prior_kl_weight" in values:
        wrong = 1 - functional.one_hot(target, 7).double()
        towards = EVIDENCE[values["prior_kl_evidence"]](student) * wrong + prior
        flat = Dirichlet(torch.full_like(student, prior))
        expected += min(epoch / 20, 1) * 0.5 * kl_divergence(Dirichlet(towards), flat).mean()
    objective = build(
        "ekd", ce_weight=0.7, kd_weight=4.5, ekd_weight=1.5, ekd_warmup=10, evidence=evidence,
        **{"prior_kl_warmup": 20, **values},
    )  # fmt: skip
    total = objective(student, teacher, target, epoch=epoch)[0]
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", ["evidential", "none"])
def test_methods_without_a_teacher_are_the_formula(method):
    student, _, target = draw(seed=5)
    expected = -Categorical(logits=student).log_prob(target).mean()
    values = {"ce_weight": 0.7}
    if method == "evidential":
        expected = expected_cross_entropy(torch.exp(student) + math.exp(-0.75), target)
        values["log_prior"] = -0.75
    total = build(method, **values)(student, None, target, epoch=1)[0]
    torch.testing.assert_close(total, 0.7 * expected, rtol=1e-6, atol=0)
