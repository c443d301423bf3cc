"""RLD, TTM, WTTM, DIST and WKD-L against plain float64 loops, and transport against linear
programming."""

import math

import numpy as np
import oracles
import pytest
import torch
from scipy import optimize

from ekd_ray.losses import class_cost, dist_loss, rld_loss, wasserstein_kd_loss, wttm_loss

torch.set_num_threads(1)


def draw(batch=6, classes=7, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(
        2, batch, classes, generator=generator, dtype=torch.float64
    )
    return student, teacher, torch.randint(classes, (batch,), generator=generator)


def probabilities(student, teacher, temperature):
    return [oracles.softmax(logits.tolist(), temperature) for logits in (student, teacher)]


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize(("alpha", "beta", "other"), [(1.0, 8.0, 1.0), (0.3, 2.0, 2.5)])
def test_rld_against_a_plain_loop(alpha, beta, other, standardize):
    student, teacher, target = draw()
    got = rld_loss(
        student, teacher, target, 4.0, confidence_temperature=other, alpha=alpha, beta=beta,
        standardize=standardize,
    )  # fmt: skip
    if standardize:
        student, teacher = (oracles.standardized(z.numpy()) for z in (student, teacher))
    plain = oracles.refined(
        probabilities(student, teacher, other), probabilities(student, teacher, 4.0),
        teacher.tolist(), target.tolist(), (other, 4.0), alpha, beta,
    )  # fmt: skip
    assert float(got) == pytest.approx(plain, rel=1e-10)


def test_a_row_of_which_rld_keeps_nothing_adds_nothing():
    student = torch.tensor([[0.3, 2.0, -1.0]], requires_grad=True)
    teacher, target = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([0])  # the label is the last
    loss = rld_loss(student, teacher, target, 4.0, alpha=0.0)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == 0 and (gradient == 0).all()


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("exponent", [0.1, 0.25, 1.0])
def test_wttm_against_a_plain_loop(weighted, exponent):
    student, teacher, _ = draw()
    got = wttm_loss(student, teacher, exponent, weighted=weighted)
    plain = oracles.powered(*probabilities(student, teacher, 1.0), exponent, weighted)
    assert float(got) == pytest.approx(plain, rel=1e-10)


@pytest.mark.parametrize(("inter", "intra", "temperature"), [(1.0, 1.0, 1.0), (2.0, 0.5, 4.0)])
def test_dist_is_scipys_correlation(inter, intra, temperature):
    student, teacher, _ = draw(scale=1.0)
    both = probabilities(student, teacher, temperature)
    plain = oracles.unlikeness(*both, temperature, inter, intra)
    got = dist_loss(student, teacher, temperature, inter=inter, intra=intra)
    assert float(got) == pytest.approx(plain, rel=1e-10)


def test_dist_is_nothing_between_equals_and_all_from_what_says_nothing():
    student, teacher, _ = draw()
    assert abs(float(dist_loss(teacher, teacher, 4.0))) < 1e-12
    flat = torch.zeros_like(student)
    assert float(dist_loss(flat, teacher, 4.0)) == pytest.approx(2 * 16)


def test_the_cost_between_classes_by_hand():
    cost = class_cost(torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]]).double(), sharpen=2.0)
    away, opposite = 1 - math.exp(-2), 1 - math.exp(-4)
    expected = [[0, away, opposite], [away, 0, away], [opposite, away, 0]]
    np.testing.assert_allclose(cost, np.array(expected) + 1e-8, atol=1e-12)


def random_cost(classes=7, sharpen=1.0):
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(classes, 5, generator=generator, dtype=torch.float64)
    return class_cost(rows, sharpen=sharpen)


@pytest.mark.parametrize("iterations", [1, 10])
def test_wkd_against_a_plain_loop(iterations):
    student, teacher, target = draw()
    cost = random_cost() + random_cost(sharpen=3.0).triu()  # its rows are the student's
    got = wasserstein_kd_loss(
        student, teacher, target, 3.0, cost=cost, weight=30.0,
        sinkhorn_iterations=iterations,
    )  # fmt: skip
    transport = oracles.transport(
        *probabilities(student, teacher, 3.0), target, cost.numpy(), 0.05, iterations
    )
    sure = oracles.on_target(*probabilities(student, teacher, 1.0), target)
    plain = sure + 30.0 * transport
    assert float(got) == pytest.approx(plain, rel=1e-9)


def test_the_transport_is_that_of_linear_programming_at_a_small_epsilon():
    student, teacher, target = draw(batch=1, classes=5)
    # Of costs much above epsilon the kernel is below the 1e-8 of the denominators.
    cost, kept = random_cost(5, sharpen=0.1), [c for c in range(5) if c != int(target[0])]
    with_transport, without = (
        wasserstein_kd_loss(
            student, teacher, target, 2.0, cost=cost, weight=weight, sinkhorn_epsilon=0.012,
            sinkhorn_iterations=5000,
        )
        for weight in (1.0, 0.0)
    )  # fmt: skip
    p_s, p_t = (oracles.softmax(z[:, kept].tolist(), 2.0)[0] for z in (student, teacher))
    sums = [np.kron(np.eye(4), np.ones(4)), np.kron(np.ones(4), np.eye(4))]
    exact = optimize.linprog(
        cost.numpy()[np.ix_(kept, kept)].ravel(), A_eq=np.vstack(sums),
        b_eq=np.concatenate([p_s, p_t]),
    ).fun  # fmt: skip
    assert float(with_transport - without) == pytest.approx(exact, rel=0.08)
    assert exact > 0.005


LOSSES = {
    "rld": lambda s, t, y: rld_loss(s, t, y, 4.0, standardize=True) + rld_loss(s, t, y, 4.0),
    "wttm": lambda s, t, y: wttm_loss(s, t, 0.1),
    "dist": lambda s, t, y: dist_loss(s, t, 4.0),
    "wkd": lambda s, t, y: wasserstein_kd_loss(s, t, y, 8.0, cost=random_cost(s.shape[1])),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0.0, 1.0, 1e4])
def test_values_and_gradients_are_finite(name, dtype, size):
    student, teacher, target = draw(scale=size)
    student, teacher = student.to(dtype).requires_grad_(), teacher.to(dtype).requires_grad_()
    loss = LOSSES[name](student, teacher, target)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert student.grad.isfinite().all() and teacher.grad is None


@pytest.mark.parametrize("name", LOSSES)
def test_float32_agrees_with_float64(name):
    student, teacher, target = draw()
    exact = LOSSES[name](student, teacher, target)
    torch.testing.assert_close(
        LOSSES[name](student.float(), teacher.float(), target).double(), exact, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s, t, y: wttm_loss(s, t, 0.0), "exponent must be > 0"),
        (lambda s, t, y: class_cost(s[0]), r"prototypes must be \[C, D\]"),
        (lambda s, t, y: class_cost(s, sharpen=-1), "sharpen must be > 0"),
        (lambda s, t, y: wasserstein_kd_loss(s, t, y, 1, cost=s), r"cost must be \[C, C\]"),
        (lambda s, t, y: wasserstein_kd_loss(
            s, t, y, 1, cost=random_cost(), sinkhorn_epsilon=0), "sinkhorn_epsilon"),
        (lambda s, t, y: wasserstein_kd_loss(
            s, t, y, 1, cost=random_cost(), sinkhorn_iterations=0), "sinkhorn_iterations"),
        (lambda s, t, y: rld_loss(s, t, y.float(), 1), "target must be int64"),
        (lambda s, t, y: rld_loss(s, t, y, 1, confidence_temperature=0),
         "confidence_temperature must be finite and > 0"),
        (lambda s, t, y: dist_loss(s, t, 0), "temperature must be finite and > 0"),
    ],
)  # fmt: skip
def test_wrong_input_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(*draw())
