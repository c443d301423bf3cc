"""Fingerprints: what they follow, what they ignore, and that they never change."""

import dataclasses

import pytest
from setting_fields import FIELDS, case_id, hint_of

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.config.settings import Settings, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Toy(Settings):
    """A configuration that never changes."""

    name: str = setting("a", "a name")
    size: int | None = setting(None, "a size", low=0)
    rate: float = setting(0.5, "a rate")
    parts: tuple[float, ...] = setting((1.0, 2.0), "parts")
    place: str | None = setting(None, "a folder", effect="free")


def test_fingerprint_is_frozen():
    """Studies on disk are recognised by it: a change of its making needs a migration."""
    assert Toy().fingerprint() == "bac713763e4672d4"
    assert Toy(size=3, place="/x").fingerprint() == "010338fb79a1e0c8"


# Further objectives must not repeat the metric; a constraint has a form of its own.
SPECIAL = {
    "objectives": ["val_ece"], "constraints": ["val_ece<=0.05"], "scheduler": "median",
    "mix_share": 0.5, "fitted": ["lr 0.1"], "plugins": [f"parts@{'0' * 64}"],
    "lr_milestones": [0.25], "rungs": [1, 3], "gpus_per_trial": 0.5,
}  # fmt: skip


def another(cls, field):
    """A legal value that is not the default."""
    kind, _ = hint_of(cls, field)
    limits = field.metadata
    if field.name == "distill":
        return DistillConfig(seed=1)
    if field.name in SPECIAL:
        return SPECIAL[field.name]
    if kind is tuple:
        return [*limits["choices"][:1]] if limits["choices"] else [{"lr": 1}, {"lr": 2}]
    if limits["choices"]:
        return next(choice for choice in limits["choices"] if choice != field.default)
    if kind is dict:
        return {"lr": 0.5}
    if kind is bool:
        return not field.default
    if kind is str:
        return "another"
    known = 0 if isinstance(field.default, str) else field.default
    start = known or (limits["low"] if kind is int else 0) or 0
    return start + (1 if kind is int else 0.01)


@pytest.mark.parametrize(("cls", "field"), FIELDS, ids=case_id)
def test_fingerprint_follows_the_settings_of_identity_and_no_other(cls, field):
    changed = cls(**{field.name: another(cls, field)})
    assert changed != cls()
    same = changed.fingerprint() == cls().fingerprint()
    assert same == (field.metadata["effect"] != "identity")


def test_study_fingerprint_ignores_places_of_the_shared_run():
    here = StudyConfig(distill=DistillConfig(teacher_weights="/a"))
    there = StudyConfig(distill=DistillConfig(teacher_weights="/b"))
    assert here.fingerprint() == there.fingerprint()


def test_fingerprint_does_not_depend_on_order_or_spelling():
    values = DistillConfig(lr=1.0, kd_weight=4.0).to_dict()
    backwards = dict(reversed(values.items()))
    assert DistillConfig(**backwards).fingerprint() == DistillConfig(**values).fingerprint()
    spelt = {**values, "lr": 1, "kd_weight": 4, "epochs": 240.0}
    assert DistillConfig(**spelt).fingerprint() == DistillConfig(**values).fingerprint()
    one = StudyConfig(authors={"a": 1, "b": 2})
    assert one.fingerprint() == StudyConfig(authors={"b": 2, "a": 1}).fingerprint()


def test_equal_settings_have_equal_fingerprints_minus_zero_included():
    plus, minus = DistillConfig(weight_decay=0.0), DistillConfig(weight_decay=-0.0)
    assert plus == minus
    assert plus.fingerprint() == minus.fingerprint()


def test_compile_counts_as_when_it_was_true_or_false():
    """The fingerprints of older runs are those that they were."""
    counted = {value: DistillConfig(compile=value).identity()["compile"]
               for value in ("auto", "off", "on", False, True)}  # fmt: skip
    assert counted == {"auto": False, "off": False, "on": True, False: False, True: True}
    assert (DistillConfig(compile=True).compile, DistillConfig(compile=False).compile) == (
        "on", "off",
    )  # fmt: skip
