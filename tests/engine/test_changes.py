"""Settings that change while training: in force from their epoch on, and the same run whether
its first part was its own or another member's checkpoint."""

from __future__ import annotations

import shutil

import pytest
import torch
from engine_runs import Killed, assert_same_run, kill_at_step, state, untimed, watch_steps

from ekd_ray.config import DistillConfig
from ekd_ray.config.distill_config import CHANGEABLE
from ekd_ray.engine.changes import continues, enter_epoch
from ekd_ray.engine.distill import CHECKPOINT, distill
from ekd_ray.engine.resolve import resolve
from ekd_ray.engine.train_teacher import teacher_config
from ekd_ray.errors import UserError
from ekd_ray.losses.objective import METHODS, Objective, resolve_method, with_method

SOLVER = ("lr", "lr_min", "momentum", "weight_decay")
# Of the better member in epochs 1 and 2, then what the worse one goes on with.
LINEAGES = {
    "sgd": ({"momentum": 0.8}, {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.01}),
    "adamw": (
        {"optimizer": "adamw", "lr": 0.005, "schedule": "cosine", "lr_warmup": 3},
        {"lr": 0.01, "lr_min": 0.001, "weight_decay": 0.1},
    ),
    "evidential": (
        {"method": "evidential", "prior_kl_weight": 0.1, "prior_kl_warmup": 4},
        {"log_prior": -1.0, "prior_kl_weight": 1.0, "prior_kl_evidence": "exp"},
    ),
    "ekd": (
        {"method": "ekd", "ekd_warmup": 4, "kd_weight": 2.0},
        {"temperature": 3.0, "ekd_weight": 9.0, "kd_weight": 1.0, "evidence": "relu"},
    ),
}


def stop_after(epoch):
    def on_epoch(row):
        if row["epoch"] == epoch:
            raise Killed

    return on_epoch


@pytest.fixture(scope="module")
def lineage(tiny, with_teacher):
    """(the better member, the worse one after taking over before epoch 3) by name."""

    def made(name):
        values, change = LINEAGES[name]
        values = dict(values)
        teacher = with_teacher if values.get("method") == "ekd" else {}
        base = tiny(epochs=4, **teacher)
        better = with_method(base, values.pop("method", "none"), **values)
        return better, better.replace(changes=[{"epoch": 3, **change}])

    return made


@pytest.mark.parametrize("name", LINEAGES)
def test_taking_over_a_checkpoint_is_the_same_run_as_its_schedule(name, lineage, tmp_path):
    better, heir = lineage(name)
    with pytest.raises(Killed):
        distill(
            better, out=tmp_path / "better", on_epoch=stop_after(2), threads=1, checkpoint_seconds=0
        )
    (tmp_path / "heir").mkdir()
    shutil.copy(tmp_path / "better" / CHECKPOINT, tmp_path / "heir")
    torch.manual_seed(7)
    taken_over = distill(heir, out=tmp_path / "heir", threads=1)
    straight = distill(heir, threads=1)
    assert_same_run(taken_over, straight, state(straight))
    unchanged = distill(better, out=tmp_path / "better", threads=1)
    assert untimed(unchanged.history)[:2] == untimed(straight.history)[:2]
    assert untimed(unchanged.history)[2] != untimed(straight.history)[2]


def test_a_run_killed_inside_the_changed_epoch_goes_on_exactly(lineage, tmp_path, monkeypatch):
    """Killed at the second step of epoch 3, whose settings have just changed."""
    _, heir = lineage("sgd")
    straight = distill(heir, threads=1)
    with monkeypatch.context() as patch:
        kill_at_step(patch, 3 + 3 + 2)
        with pytest.raises(Killed):
            distill(heir, out=tmp_path, threads=1, checkpoint_steps=1)
    assert_same_run(distill(heir, out=tmp_path, threads=1), straight, state(straight))


def test_a_checkpoint_serves_the_runs_that_share_its_past(lineage, tmp_path):
    better, heir = (resolve(config) for config in lineage("sgd"))
    with pytest.raises(Killed):
        distill(heir, out=tmp_path, on_epoch=stop_after(2), threads=1, checkpoint_seconds=0)
    path = tmp_path / CHECKPOINT
    other = better.replace(changes=[{"epoch": 3, "lr": 0.2}])
    earlier = better.replace(changes=[{"epoch": 2, "lr": 0.2}])
    assert [continues(c, path) for c in (better, heir, other, earlier)] == [True] * 3 + [False]
    with pytest.raises(Killed):
        distill(heir, out=tmp_path, on_epoch=stop_after(3), threads=1, checkpoint_seconds=0)
    assert [continues(c, path) for c in (better, heir, other)] == [False, True, False]
    with pytest.raises(UserError, match="belongs to another configuration"):
        distill(other, out=tmp_path, threads=1)


# Every setting that may change


def resolved(name, value):
    """(before, the same with the change in epoch 2) under a method that reads the setting."""
    method = next((key for key in reversed(METHODS) if name in METHODS[key].uses), "none")
    started = {"prior_kl_weight": 0.5, "prior_kl_warmup": 0, "ekd_warmup": 0, "kd_warmup": 0}
    used = {key: entry for key, entry in started.items() if key in METHODS[method].uses}
    config = with_method(DistillConfig(lr=0.05, schedule="cosine", epochs=4), method, **used)
    return config, resolve_method(config.replace(changes=[{"epoch": 2, name: value}]))


def total(objective):
    draw = torch.Generator().manual_seed(0)
    four = [2 * torch.randn(8, 5, generator=draw) for _ in range(4)]
    target = torch.arange(8) % 5
    return objective(
        four[0], four[1], target, 2, student_strong=four[2], teacher_strong=four[3]
    )[0].item()  # fmt: skip


@pytest.mark.parametrize("name", [name for name in CHANGEABLE if name not in SOLVER])
def test_a_changed_loss_setting_is_the_one_that_is_computed(name):
    value = {"standardize": True, "evidence": "exp", "prior_kl_evidence": "exp"}.get(name, 1.7)
    before, changed = resolved(name, value)
    objective = Objective(changed)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    enter_epoch(changed, 1, optimizer, objective)
    first = total(objective)
    enter_epoch(changed, 2, optimizer, objective)
    assert first == total(Objective(before))
    assert total(objective) == total(Objective(before.replace(**{name: value}))) != first


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("name", SOLVER)
def test_a_changed_solver_setting_reaches_the_step(name, kind):
    _, changed = resolved(name, 0.04)
    optimizer, objective = kind([torch.zeros(1)], lr=1.0), Objective(changed)
    now = enter_epoch(changed, 2, optimizer, objective)
    assert getattr(now, name) == 0.04
    (group,) = optimizer.param_groups
    if name in group and name != "lr":
        assert group[name] == 0.04
    assert group["weight_decay"] == now.weight_decay


def test_the_changed_learning_rate_is_that_of_the_steps(tiny, monkeypatch):
    rates = []

    def before(count, run, batch):
        rates.append(run.optimizer.param_groups[0]["lr"])

    watch_steps(monkeypatch, before)
    distill(tiny(lr_milestones=[1.0], changes=[{"epoch": 2, "lr": 0.01}]), threads=1)
    assert rates[1:] == [0.05] * 3 + [0.01] * 2, "of the step before: three make an epoch"


# What goes with the method


def test_a_change_that_the_method_does_not_read_is_refused():
    config = DistillConfig(method="kd", changes=[{"epoch": 2, "ekd_weight": 3.0}])
    with pytest.raises(UserError, match=r"ekd_weight is not used by method 'kd', got 3\.0"):
        resolve_method(config)


def test_the_loss_cannot_be_switched_off_half_way():
    config = DistillConfig(method="none", changes=[{"epoch": 2, "ce_weight": 0.0}])
    with pytest.raises(UserError, match="every loss weight"):
        resolve_method(config)


def test_another_method_and_a_teacher_keep_no_foreign_changes():
    changes = [{"epoch": 2, "ekd_weight": 3.0}, {"epoch": 5, "lr": 0.02, "kd_weight": 1.0}]
    config = DistillConfig(method="ekd", changes=changes)
    assert with_method(config, "none").changes == ({"epoch": 5, "lr": 0.02},)
    assert teacher_config(config, "resnet8", {"epochs": 2}).changes == ()
