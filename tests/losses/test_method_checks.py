"""The conformance suite refuses faulty methods: one fault each, and the check that finds it."""

import dataclasses

import pytest
import torch
from torch.nn import functional

from ekd_ray.errors import UserError
from ekd_ray.losses import (
    CE_WEIGHT,
    CROSS_ENTROPY,
    KD_CE_WEIGHT,
    KD_TERM,
    KD_WEIGHT,
    METHODS,
    TEMPERATURE,
    Method,
    MethodSetting,
    Term,
    at_least_float32,
    register_method,
)
from ekd_ray.losses import kd_loss as right
from ekd_ray.losses.method_checks import method_cases
from ekd_ray.testing import check_method, check_training, feature_shapes, run_check

torch.set_num_threads(1)

KD = METHODS["kd"]
SETTINGS = (TEMPERATURE, KD_CE_WEIGHT, KD_WEIGHT)


def with_loss(loss, *settings, **options):
    """KD whose loss is a function of what the methods' losses get."""
    term = Term(names=("kd",), weight="kd_weight", loss=lambda out: {"kd": loss(out)}, **options)
    return Method(settings=(*SETTINGS, *settings), terms=(CROSS_ENTROPY, term))


def kl(out, temperature=None):
    return right(out.student, out.teacher, temperature or out.temperature)


def naive(out):
    """exp overflows."""
    p, q = (
        (z / out.temperature).exp() / (z / out.temperature).exp().sum(1, keepdim=True)
        for z in (out.teacher, out.student)
    )
    return (p * (p / q).log()).sum(1).mean()


calls = []


def remembering(out):
    calls.append(float(kl(out).detach()))
    return kl(out) + 1e-3 * len(calls)


class WrongSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 1.1 * gradient


def cancelling(out):
    return right(out.student + 1e6 - 1e6, out.teacher, out.temperature)


def leaky(out):
    log_p = functional.log_softmax(at_least_float32(out.teacher), 1)
    return (log_p.exp() * (log_p - functional.log_softmax(out.student, 1))).sum(1).mean()


UNUSED = MethodSetting(name="test_unused", kind=float, default=0.5, doc="does nothing")
BAD_RANGE = MethodSetting(
    name="test_range", kind=float, default=0.5, low=0, high=1, doc="x", search={"low": 0, "high": 2}
)
UNDOCUMENTED = MethodSetting(name="test_undocumented", kind=float, default=0.5, doc="")
SHARE = MethodSetting(name="test_share", kind=float, default=0.5, low=0, high=1, doc="a share")
HIDDEN = torch.tensor(0.3)

# What is wrong, and the check that says so.
FAULTY = {
    "overflow": (with_loss(naive), "check_finite"),
    "order": (with_loss(lambda out: kl(out) * (1 + out.student[0, 0].sigmoid())), "check_order"),
    "no teacher used": (
        with_loss(lambda out: out.student.square().mean()), "check_order",
    ),
    "a sum": (with_loss(lambda out: kl(out) * len(out.student)), "check_mean"),
    "memory": (with_loss(remembering), "check_repeat"),
    "rounding": (with_loss(cancelling), "check_precision"),
    "not 0-d": (with_loss(lambda out: kl(out)[None]), "check_teacher"),
    "a gradient to the teacher": (with_loss(leaky), "check_teacher"),
    "no gradient to the student": (
        Method(
            settings=(TEMPERATURE, KD_WEIGHT),
            terms=(
                Term(
                    names=("kd",), weight="kd_weight",
                    loss=lambda out: {"kd": kl(out).detach()},
                ),
            ),
        ),
        "check_teacher",
    ),
    "upside down": (with_loss(lambda out: -kl(out), is_divergence=True), "check_divergence"),
    "no divergence": (with_loss(lambda out: 1 + kl(out), is_divergence=True), "check_divergence"),
    "half a divergence": (
        with_loss(lambda out: kl(out) - (out.student - out.teacher.detach()).square().mean(),
                  is_divergence=True),
        "check_divergence",
    ),
    "strong view unused": (
        dataclasses.replace(with_loss(kl), strong_view=True, terms=(
            Term(names=("kd",), weight="kd_weight", loss=lambda out: {"kd": kl(out)}),),
            settings=(TEMPERATURE, KD_WEIGHT)),
        "check_teacher",
    ),
    "weight twice": (with_loss(lambda out: out.settings.kd_weight * kl(out)), "check_weights"),
    "weight of nothing": (with_loss(lambda out: 0.0 * kl(out)), "check_weights"),
    "unused setting": (with_loss(kl, UNUSED), "check_settings"),
    "illegal range": (
        with_loss(lambda out: out.settings.test_range * kl(out), BAD_RANGE), "check_entry",
    ),
    "no help": (
        with_loss(lambda out: out.settings.test_undocumented * kl(out), UNDOCUMENTED),
        "check_entry",
    ),
    "names twice": (
        Method(
            settings=SETTINGS,
            terms=(CROSS_ENTROPY, dataclasses.replace(KD_TERM, names=("ce",),
                   loss=lambda out: {"ce": kl(out)})),
        ),
        "check_entry",
    ),
    "wrong slope": (with_loss(lambda out: WrongSlope.apply(kl(out))), "check_gradient"),
    "an item": (with_loss(lambda out: kl(out, kl(out).item() + 1.0)), "check_readback"),
    "a branch": (
        with_loss(
            lambda out: kl(out) if out.settings.test_share < 0.7 else 2 * kl(out), SHARE,
        ),
        "check_readback",
    ),
    "a number of a setting": (
        with_loss(lambda out: float(out.settings.test_share) * kl(out), SHARE), "check_readback",
    ),
    "a name that it does not say": (
        Method(
            settings=SETTINGS,
            terms=(CROSS_ENTROPY,
                   Term(names=("kd", "more"), weight="kd_weight", loss=lambda o: {"kd": kl(o)})),
        ),
        "check_order",
    ),
}  # fmt: skip


@pytest.fixture
def registered():
    """Register a method for one test; its settings stay."""
    yield lambda method: register_method("faulty", method)
    METHODS.pop("faulty", None)


def refusals(method, shapes=(), only=""):
    """The checks that a method fails, and what they say."""
    found = {}
    for check, case in method_cases(method, shapes):
        if only not in check.__name__:
            continue
        try:
            run_check(check, case)
        except AssertionError as error:
            found.setdefault(check.__name__, str(error))
    return found


@pytest.mark.parametrize("fault", FAULTY)
def test_a_faulty_method_is_refused(fault, registered):
    method, expected = FAULTY[fault]
    registered(method)
    found = refusals("faulty", only=expected)
    assert expected in found
    assert "method 'faulty'" in found[expected]


def test_a_right_method_is_refused_by_none(registered):
    registered(with_loss(kl, is_divergence=True))
    assert refusals("faulty") == {}


def test_an_entry_is_checked_without_a_name():
    before = {*METHODS}
    check_method(with_loss(lambda out: 0.5 * kl(out)))
    assert {*METHODS} == before
    with pytest.raises(AssertionError, match="no mean over the batch"):
        check_method(with_loss(lambda out: kl(out) * len(out.student)))
    assert {*METHODS} == before


def test_an_unknown_name_is_the_users_mistake():
    with pytest.raises(UserError, match="unknown method 'edk'"):
        check_method("edk")


# ---------------------------------------------------------------- training


def only_in_training(out):
    """Right on 7 classes and more, as the other checks have them, but not on what is trained."""
    return kl(out) if out.student.shape[1] != 10 else kl(out) * float("nan")


class ShapeOfTests:
    """Raises at the batch size that the miniature training has."""

    def __call__(self, out):
        if len(out.student) == 6 and out.student.shape[1] == 10:
            raise ValueError("six of ten")
        return kl(out)


epochs = []


def worse_by_the_call(out):
    epochs.append(1)
    return kl(out) + 0.1 * len(epochs)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (only_in_training, "cannot be trained: train_loss became nan"),
        (ShapeOfTests(), "cannot be trained: ValueError: six of ten"),
        (worse_by_the_call, "does not learn|other figures"),
        (lambda out: -kl(out) + kl(out).detach() * 2, "does not learn"),
    ],
)
def test_a_method_that_cannot_be_trained_is_refused(loss, message, registered):
    registered(with_loss(loss))
    with pytest.raises(AssertionError, match=message):
        check_training("faulty", kd_weight=100.0)


# ---------------------------------------------------------------- features


def of_features(loss, layers=("layer3",), **options):
    weight = MethodSetting(name="test_weight", kind=float, default=1.0, low=0, doc="a weight")
    term = Term(names=("f",), weight="test_weight", loss=lambda out: {"f": loss(out)}, **options)
    return Method(settings=(CE_WEIGHT, weight), terms=(CROSS_ENTROPY, term), features=layers)


def gap(out):
    pairs = zip(out.student_features, out.teacher_features, strict=True)
    return sum((s.mean((2, 3)) - t.mean((2, 3))).square().mean() for s, t in pairs)


@pytest.mark.parametrize(
    ("loss", "layers", "expected"),
    [
        (lambda out: gap(out), ("layer3", "layer2"), None),
        (lambda out: gap(out), ("layer3", ("layer2.0", "layer2")), None),
        (lambda out: out.student_features[0].mean() * out.teacher.detach().mean(),
         ("layer3", "layer2"), "no gradient reaches the student by the layer 'layer2'"),
        (lambda out: out.student_features[0].square().sum(1).sqrt().mean(),
         ("layer3",), "is not finite"),
        (lambda out: (out.student_features[0] / out.student_features[0].sum()).mean(),
         ("layer3",), "check_finite|is not finite|no mean over the batch"),
    ],
)  # fmt: skip
def test_methods_of_features_are_checked(loss, layers, expected, registered):
    method = registered(of_features(loss, layers))
    found = refusals("faulty", feature_shapes(method, "resnet8", "resnet14"))
    if expected is None:
        assert found == {}
    else:
        assert any(part in message for part in expected.split("|") for message in found.values()), (
            found
        )


def test_features_need_a_teacher():
    method = dataclasses.replace(of_features(gap), needs_teacher=False)
    with pytest.raises(UserError, match="compares features with those of no teacher"):
        register_method("faulty", method)
