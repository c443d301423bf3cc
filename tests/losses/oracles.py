"""The mathematics of METHODS.md in plain float64 loops: what the losses are compared with.

Nothing here comes from `ekd_ray.losses`. Logits are [B, C] arrays, targets [B] integers.
"""

import math

import numpy as np
from scipy import special, stats

EVIDENCE = {
    "log1p_softplus": lambda z: math.log1p(math.log1p(math.exp(z))),
    "softplus": lambda z: math.log1p(math.exp(z)),
    "exp": math.exp,
    "relu": lambda z: max(z, 0.0),
}


def softmax(logits, temperature):
    rows = []
    for row in logits:
        mass = [math.exp(z / temperature) for z in row]
        rows.append([a / sum(mass) for a in mass])
    return np.array(rows)


def expectation(logits, temperature, log_prior):
    """`a / S`, `a = exp(z / T) + e^lambda`."""
    rows = []
    for row in logits:
        mass = [math.exp(z / temperature) + math.exp(log_prior) for z in row]
        rows.append([a / sum(mass) for a in mass])
    return np.array(rows)


def standardized(logits):
    """`(z - mean) / (1e-7 + std)` of each row, sample standard deviation."""
    rows = []
    for row in logits:
        mean = sum(row) / len(row)
        std = math.sqrt(sum((z - mean) ** 2 for z in row) / (len(row) - 1))
        rows.append([(z - mean) / (1e-7 + std) for z in row])
    return np.array(rows)


def mean_kl(p_teacher, p_student):
    """`KL(p_t || p_s)`, mean over the rows."""
    total = 0.0
    for t_row, s_row in zip(p_teacher, p_student, strict=True):
        total += sum(t * math.log(t / s) for t, s in zip(t_row, s_row, strict=True))
    return total / len(p_teacher)


def decoupled_kl(p_student, p_teacher, target, alpha, beta):
    """`alpha * TCKD + beta * NCKD`, one row and one class at a time."""
    total = 0.0
    for s, t, y in zip(p_student, p_teacher, target, strict=True):
        rest_s, rest_t = (sum(p) - p[y] for p in (s, t))
        tckd = t[y] * math.log(t[y] / s[y]) + rest_t * math.log(rest_t / rest_s)
        nckd = 0.0
        for c in range(len(s)):
            if c != y:
                nckd += t[c] / rest_t * math.log((t[c] / rest_t) / (s[c] / rest_s))
        total += alpha * tckd + beta * nckd
    return total / len(p_student)


def cross_entropy(logits, target):
    p = softmax(logits, 1.0)
    return -sum(math.log(row[y]) for row, y in zip(p, target, strict=True)) / len(p)


def evidential_cross_entropy(logits, target, log_prior):
    """`psi(S) - psi(a_y)`."""
    total = 0.0
    for row, y in zip(logits, target, strict=True):
        mass = [math.exp(z) + math.exp(log_prior) for z in row]
        total += special.digamma(sum(mass)) - special.digamma(mass[y])
    return total / len(logits)


def dirichlet_kl(a, b):
    """`KL(Dir(a) || Dir(b))` of one pair of concentrations."""
    value = special.gammaln(sum(a)) - special.gammaln(sum(b))
    for x, y in zip(a, b, strict=True):
        value -= special.gammaln(x) - special.gammaln(y)
        value += (x - y) * (special.digamma(x) - special.digamma(sum(a)))
    return value


def distribution_kd(student, teacher, temperature, log_prior, teacher_log_prior, kind):
    """`T^2 * KL(Dir(a_t) || Dir(a_s))`, `a = evidence(z / T) + e^lambda`."""
    total = 0.0
    for s_row, t_row in zip(student, teacher, strict=True):
        a_s = [EVIDENCE[kind](z / temperature) + math.exp(log_prior) for z in s_row]
        a_t = [EVIDENCE[kind](z / temperature) + math.exp(teacher_log_prior) for z in t_row]
        total += dirichlet_kl(a_t, a_s)
    return temperature**2 * total / len(student)


def prior_kl(logits, target, log_prior, kind):
    """`KL(Dir(evidence * (1 - onehot) + e^lambda) || Dir(e^lambda))`."""
    prior, total = math.exp(log_prior), 0.0
    for row, y in zip(logits, target, strict=True):
        wrong = [prior + (EVIDENCE[kind](z) if c != y else 0.0) for c, z in enumerate(row)]
        total += dirichlet_kl(wrong, [prior] * len(wrong))
    return total / len(logits)


def share_at_or_below_the_median(values):
    limit = np.percentile(values, 50)
    return sum(bool(value <= limit) for value in values) / len(values)


def gram_gap(p_student, p_teacher):
    """`||P_t P_t' - P_s P_s'||^2 / rows`, one pair of rows at a time."""
    total = 0.0
    for i in range(len(p_student)):
        for j in range(len(p_student)):
            t = sum(a * b for a, b in zip(p_teacher[i], p_teacher[j], strict=True))
            s = sum(a * b for a, b in zip(p_student[i], p_student[j], strict=True))
            total += (t - s) ** 2
    return total / len(p_student)


def mlkd_alignments(weak, strong, temperature, predict, predict_instance):
    """instance, class and batch alignment, unweighted, in the form of the released code.

    `weak` and `strong` are (student, teacher); `predict(side, logits, T)` gives
    probabilities, `predict_instance` those of the instance alignment (standardised or not).
    """
    confidence = predict("teacher", weak[1], 1.0)
    m = share_at_or_below_the_median([max(row) for row in confidence])
    c = share_at_or_below_the_median([sum(column) for column in confidence.T])
    temperatures = [temperature, 3.0, 5.0, 2.0, 6.0]

    def kd(view, at):
        p_s, p_t = (
            predict_instance("student", view[0], at),
            predict_instance("teacher", view[1], at),
        )
        return at**2 * mean_kl(p_t, p_s)

    def pair(at):
        return predict("student", weak[0], at), predict("teacher", weak[1], at)

    instance = m * sum(kd(weak, at) for at in temperatures)
    instance += kd(strong, temperature) + kd(strong, 3.0) + kd(strong, 5.0)
    instance += kd(weak, 2.0) + kd(weak, 6.0)
    class_gap = batch_gap = 0.0
    for at in temperatures:
        p_s, p_t = pair(at)
        class_gap += gram_gap(p_s.T, p_t.T)
        batch_gap += gram_gap(p_s, p_t)
    return {"instance": instance, "class": c * class_gap, "batch": m * batch_gap}


def two_way_kl(p, q):
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def refined(confidence, correlation, ranks, target, temperatures, alpha, beta):
    """RLD, one row at a time, from probabilities (student, teacher) at both temperatures.

    `ranks` are the teacher's logits, and `temperatures` those of confidence and correlation.
    """
    total = 0.0
    for s, t, p, q, z, y in zip(*confidence, *correlation, ranks, target, strict=True):
        total += alpha * temperatures[0] ** 2 * two_way_kl(max(t), s[y])
        kept = [c for c in range(len(z)) if z[c] < z[y]]
        if kept:
            p, q = (np.array([[row[c] for c in kept]]) for row in (p, q))
            total += beta * temperatures[1] ** 2 * mean_kl(q / q.sum(), p / p.sum())
    return total / len(target)


def powered(p_student, p_teacher, exponent, weighted):
    """WTTM, or TTM, one row at a time."""
    total = 0.0
    for s, t in zip(p_student, p_teacher, strict=True):
        n = sum(t**exponent)
        total += (n if weighted else 1) * mean_kl([t**exponent / n], [s])
    return total / len(p_student)


def unlikeness(p_student, p_teacher, temperature, inter, intra):
    """DIST, by scipy's correlation."""
    rows, columns = (
        np.mean([stats.pearsonr(*pair).statistic for pair in zip(a, b, strict=True)])
        for a, b in ((p_student, p_teacher), (p_student.T, p_teacher.T))
    )
    return temperature**2 * (inter * (1 - rows) + intra * (1 - columns))


def on_target(p_student, p_teacher, target):
    """WKD's part of the label."""
    rows = zip(p_student, p_teacher, target, strict=True)
    return -np.mean([t[y] * math.log(s[y]) for s, t, y in rows])


def transport(p_student, p_teacher, target, cost, epsilon, iterations):
    """WKD's transport between the other classes, by Sinkhorn's iterations, one row at a time."""
    total = 0.0
    for s, t, y in zip(p_student, p_teacher, target, strict=True):
        kept = [c for c in range(len(s)) if c != y]
        s, t = (p[kept] / p[kept].sum() for p in (s, t))
        kept_cost = cost[np.ix_(kept, kept)]
        kernel = np.exp(-kept_cost / epsilon)
        u = np.full(len(kept), 1 / len(kept))
        for _ in range(iterations):
            v = t / (kernel.T @ u + 1e-8)
            u = s / (kernel @ v + 1e-8)
        total += (u[:, None] * kernel * kept_cost * v).sum()
    return total / len(target)


def terms(config, batch, cosines):
    """Every unweighted term of a method by name, from the settings and a batch of arrays.

    `cosines` are between the classes, in the teacher's classifier. A learned temperature is taken
    where it starts, `t_start + t_end * sigmoid(1)`.
    """
    base = config.method.removesuffix("+ekd")
    evidential = config.method == "evidential" or config.method.endswith("ekd")
    weak, strong = (batch.student, batch.teacher), (batch.student_strong, batch.teacher_strong)
    views = [weak, strong] if base == "mlkd" else [weak]
    y = batch.target
    at = config.temperature
    if base == "ctkd":
        at = config.ctkd_t_start + config.ctkd_t_end / (1 + math.exp(-1))
    prior = config.log_prior
    if prior is None:
        prior = 1.0 if config.learn_log_prior else 0.0
    own = prior if config.teacher_log_prior is None else config.teacher_log_prior

    def predict(side, logits, temperature):
        if evidential:
            return expectation(logits, temperature, prior if side == "student" else own)
        return softmax(logits, temperature)

    def predict_standardized(side, logits, temperature):
        logits = standardized(logits) if config.standardize else logits
        return predict(side, logits, temperature)

    def both(temperature):
        return (
            predict_standardized("student", batch.student, temperature),
            predict_standardized("teacher", batch.teacher, temperature),
        )

    found = {}
    if evidential:
        found["ce"] = sum(evidential_cross_entropy(s, y, prior) for s, _ in views)
    else:
        found["ce"] = sum(cross_entropy(s, y) for s, _ in views)
    if base in ("kd", "ctkd", "ekd", "dkd"):
        p_s, p_t = both(at)
        if base == "dkd":
            kl = decoupled_kl(p_s, p_t, y, config.dkd_alpha, config.dkd_beta)
        else:
            kl = mean_kl(p_t, p_s)
        found["kd"] = at**2 * kl
    if base == "rld":
        own_at = config.rld_confidence_temperature
        found["kd"] = refined(
            both(own_at), both(at), batch.teacher, y, (own_at, at), config.rld_alpha,
            config.rld_beta,
        )  # fmt: skip
    if base in ("ttm", "wttm"):
        found["kd"] = powered(*both(1.0), config.ttm_exponent, weighted=base == "wttm")
    if base == "dist":
        found["kd"] = unlikeness(*both(at), at, config.dist_inter, config.dist_intra)
    if base == "wkd":
        cost = np.maximum(1 - np.exp(-config.wkd_sharpen * (1 - cosines)), 0) + 1e-8
        found["kd"] = on_target(*both(1.0), y)
        found["transport"] = transport(
            *both(at), y, cost, config.wkd_epsilon, config.wkd_iterations
        )
    if base == "mlkd":
        found |= mlkd_alignments(weak, strong, at, predict, predict_standardized)
    if config.method.endswith("ekd"):
        second_at = config.ekd_temperature
        found["ekd"] = sum(
            distribution_kd(s, t, second_at, prior, own, config.evidence) for s, t in views
        )
    if evidential:
        found["prior_kl"] = sum(prior_kl(s, y, prior, config.prior_kl_evidence) for s, _ in views)
    return found


def total(config, batch, cosines, epoch):
    """`ce_weight * ce + ...`, with the ramps `min(epoch / warmup, 1)`."""

    def ramp(warmup):
        return min(epoch / warmup, 1.0) if warmup else 1.0

    weight = {
        "ce": config.ce_weight,
        "instance": config.kd_weight,
        "class": config.kd_weight,
        "batch": config.kd_weight,
        "prior_kl": config.prior_kl_weight * ramp(config.prior_kl_warmup),
    }
    if config.kd_weight is not None:
        weight["kd"] = config.kd_weight * ramp(config.kd_warmup)
    if config.wkd_decay is not None:
        share = max(0.0, (epoch - config.wkd_decay) / (config.epochs - config.wkd_decay))
        weight["transport"] = config.wkd_weight * (1 + math.cos(math.pi * share)) / 2
    if config.ekd_weight is not None:
        weight["ekd"] = config.ekd_weight * ramp(config.ekd_warmup)
    return sum(weight[name] * value for name, value in terms(config, batch, cosines).items())
