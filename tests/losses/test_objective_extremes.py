"""Numerical robustness: every method, option and evidence function, for any logits to 1e4."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_cases import build, every_method, settings_of

from ekd_ray.losses.method_checks import CORNERS, LIMIT, Batch, require_finite, variants
from ekd_ray.losses.methods import METHODS

torch.set_num_threads(1)

# What the variants leave free, within the bounds of the settings; T as extreme as is sensible.
FREE = {
    "log_prior": (-20.0, -1.2, 0.0, 20.0),
    "temperature": (0.01, 1.0, 4.0, 100.0),
    "ctkd_t_start": (0.01, 1.0, 20.0),
}


@st.composite
def cases(draw):
    """Logits from a small pool of values, so that ties, ones and giants meet in a row."""
    values = st.one_of(st.floats(-LIMIT, LIMIT, width=32), st.sampled_from(CORNERS))
    pool = torch.tensor(draw(st.lists(values, min_size=1, max_size=6)))
    batch = draw(st.sampled_from([1, 1, 2, 3, 8]))
    classes = draw(st.sampled_from([2, 3, 4, 5, 7, 10, 12, 20, 50, 100, 300, 1000]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def logits():
        picked = pool[torch.randint(len(pool), (batch, classes), generator=generator)]
        noise = draw(st.sampled_from([0.0, 1.0, 100.0]))
        return (picked + noise * torch.randn(batch, classes, generator=generator)).clamp(
            -LIMIT, LIMIT
        )

    student, teacher, student_strong, teacher_strong = (logits() for _ in range(4))
    if draw(st.booleans()):
        teacher, teacher_strong = student.clone(), student_strong.clone()
    target = torch.randint(classes, (batch,), generator=generator)
    found = Batch(student, teacher, target, student_strong, teacher_strong)
    return found.to(draw(st.sampled_from([torch.float32, torch.bfloat16])))


@every_method
@settings(max_examples=12, deadline=None)
@given(
    data=st.data(),
    batch=cases(),
    free=st.fixed_dictionaries({name: st.sampled_from(values) for name, values in FREE.items()}),
    g=st.sampled_from([1.0, 0.0, -30.0, 30.0, 1e4]),
    epoch=st.integers(1, 40),
)
def test_total_and_gradients_are_finite(method, data, batch, free, g, epoch):
    values = data.draw(st.sampled_from(variants(method)))
    used = {k: v for k, v in free.items() if k in settings_of(method) and k not in values}
    objective = build(method, **values, **used)
    if METHODS[method].learned_temperature:
        with torch.no_grad():
            objective.temperature_logit.fill_(g)
    require_finite(objective, batch, epoch)
