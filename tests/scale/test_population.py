"""Populations without a cluster: the schedulers under a controller that trains by arithmetic."""

from __future__ import annotations

import functools
import json
import math
import random
from typing import Any

import pytest
from population_studies import EPOCHS, EVERY, SPACE, TRIALS, study_of
from ray.train._internal.session import _TrainingResult
from ray.tune.experiment import Trial

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.engine.resolve import resolve
from ekd_ray.errors import UserError
from ekd_ray.scale import population
from ekd_ray.scale.samplers import check_sampler, make_scheduler
from ekd_ray.scale.space import Space
from ekd_ray.scale.worker import Job
from ekd_ray.studies.pipeline import check_study

# Trials that train by arithmetic


@functools.cache
def settings_at(text: str, epoch: int) -> DistillConfig:
    """Of settings as JSON; building a configuration is what takes time here."""
    return DistillConfig.from_dict(json.loads(text)).at_epoch(epoch)


def gain(settings: DistillConfig, epoch: int) -> float:
    """What an epoch adds to a member's score: best at lr 0.05 first, at 0.005 later."""
    wanted = 0.05 if epoch <= EPOCHS // 2 else 0.005
    return 1 - abs(math.log(settings.lr / wanted)) - 10 * settings.weight_decay


class Controller:
    """As much of Tune's controller as a scheduler sees: `slots` members train at once.

    A checkpoint is (epoch, score). `order` decides who reports next, `dies` maps a member to
    the epoch in which its process dies, `retries` says how often it is started again.
    """

    search_alg = None

    def __init__(
        self, config: StudyConfig, settings: list[dict[str, Any]], *, order: int = 0,
        slots: int = 3, dies: dict[int, int] | None = None, retries: int = 0,
    ) -> None:  # fmt: skip
        self.scheduler: Any = make_scheduler(config)
        self.every = config.perturbation
        self.order, self.slots = random.Random(order), slots
        self.dies = dies or {}
        self.state: dict[Trial, tuple[int, float]] = {}
        for number, entry in enumerate(settings):
            job = Job(
                name="m", number=number, folder=f"f{number}", settings=entry, data_root=None,
                threads=1,
            )  # fmt: skip
            trial = Trial(
                "member", config=job.as_config(), stub=True, trial_id=f"m{number}",
                max_failures=retries,
            )  # fmt: skip
            self.state[trial] = (0, 0.0)
            self.scheduler.on_trial_add(self, trial)

    def get_trials(self) -> list[Trial]:
        return list(self.state)

    get_live_trials = get_trials

    def pause_trial(self, trial: Trial, should_checkpoint: bool = True) -> None:
        trial.set_status(Trial.PAUSED)

    def _schedule_trial_save(self, trial: Trial, result: Any = None) -> Any:
        return self.state[trial]

    def leave(self, trial: Trial, checkpoint: Any) -> None:
        manager = trial.run_metadata.checkpoint_manager
        manager._latest_checkpoint_result = _TrainingResult(checkpoint=checkpoint, metrics={})

    def run(self) -> None:
        """Until all have ended."""
        running: list[Trial] = []
        while True:
            while len(running) < self.slots:
                chosen = self.scheduler.choose_trial_to_run(self)
                if chosen is None:
                    break
                chosen.set_status(Trial.RUNNING)
                if chosen.checkpoint is not None:
                    self.state[chosen] = chosen.checkpoint
                running.append(chosen)
            if not running:
                return
            trial = self.order.choice(running)
            if not self.epoch(trial):
                running.remove(trial)

    def epoch(self, trial: Trial) -> bool:
        """One epoch of a member; whether it goes on at once."""
        job = Job.from_config(trial.config)
        done, score = self.state[trial]
        epoch = done + 1
        if self.dies.get(job.number) == epoch:
            del self.dies[job.number]
            self.die(trial)
            return False
        score += gain(settings_at(json.dumps(job.settings), epoch), epoch)
        self.state[trial] = (epoch, score)
        result = {"epoch": epoch, "val_top1": score, "training_iteration": epoch}
        if epoch == EPOCHS:
            assert self.scheduler.on_trial_result(self, trial, result) == "CONTINUE"
            self.scheduler.on_trial_complete(self, trial, result)
            trial.set_status(Trial.TERMINATED)
            return False
        if epoch % self.every == 0:
            self.leave(trial, (epoch, score))
        decision = self.scheduler.on_trial_result(self, trial, result)
        if decision == "PAUSE":
            trial.set_status(Trial.PAUSED)
        return decision == "CONTINUE"

    def die(self, trial: Trial) -> None:
        trial.run_metadata.num_failures += 1
        again = trial.should_recover()
        trial.set_status(Trial.ERROR)
        self.scheduler.on_trial_error(self, trial)
        if again:
            trial.set_status(Trial.PENDING)
            self.state[trial] = trial.checkpoint or (0, 0.0)
            self.scheduler.on_trial_add(self, trial)

    def lineages(self) -> dict[int, DistillConfig]:
        """The final configuration of every member that came to its end."""
        return {
            Job.from_config(t.config).number: DistillConfig.from_dict(
                Job.from_config(t.config).settings
            )
            for t in self.state
            if t.status == Trial.TERMINATED
        }


def initial(config: StudyConfig) -> list[dict[str, Any]]:
    points = Space(config.space).sample(config.trials, seed=0)
    return [resolve(config.distill.replace(**point)).to_dict() for point in points]


def race(scheduler: str, **options: Any) -> Controller:
    config = options.pop("config", study_of(scheduler))
    controller = Controller(config, initial(config), **options)
    controller.run()
    return controller


@pytest.fixture(scope="module")
def raced() -> dict[str, Controller]:
    return {name: race(name) for name in ("pbt", "pb2")}


@pytest.mark.parametrize("scheduler", ["pbt", "pb2"])
def test_a_members_lineage_is_the_training_that_it_is_scored_for(scheduler, raced):
    """Its settings by epoch add up to its score, whatever it took over from whom."""
    controller = raced[scheduler]
    found = controller.lineages()
    assert len(found) == TRIALS
    for trial, (epoch, score) in controller.state.items():
        config = found[Job.from_config(trial.config).number]
        epochs = range(1, epoch + 1)
        assert epoch == EPOCHS
        assert score == pytest.approx(sum(gain(config.at_epoch(e), e) for e in epochs), abs=1e-9)


@pytest.mark.parametrize("scheduler", ["pbt", "pb2"])
def test_changes_come_at_comparisons_within_the_space_and_none_in_vain(scheduler, raced):
    found = raced[scheduler].lineages().values()
    changed = [change for config in found for change in config.changes]
    after = set(range(EVERY[scheduler] + 1, EPOCHS + 1, EVERY[scheduler]))
    assert {change["epoch"] for change in changed} <= after
    assert {change["epoch"] for change in changed} - {EVERY[scheduler] + 1}
    for config in found:
        for name, parameter in Space(SPACE).parameters.items():
            values = [getattr(config.at_epoch(epoch), name) for epoch in range(1, EPOCHS + 1)]
            assert all(parameter.contains(value) for value in values)
    assert len({json.dumps(config.to_dict()) for config in found}) == TRIALS, "two are equal"


@pytest.mark.parametrize("scheduler", ["pbt", "pb2"])
def test_a_population_does_better_than_its_members_alone(scheduler, raced):
    starts = [DistillConfig.from_dict(entry) for entry in initial(study_of(scheduler))]
    alone = [sum(gain(config, e) for e in range(1, EPOCHS + 1)) for config in starts]
    scores = [score for _, score in raced[scheduler].state.values()]
    assert max(scores) >= max(alone) - 1e-9
    assert sum(scores) / TRIALS > sum(alone) / TRIALS + 1


@pytest.mark.parametrize("scheduler", ["pbt", "pb2"])
def test_neither_the_slots_nor_who_comes_first_decides(scheduler, raced):
    again = race(scheduler, order=5, slots=8)
    assert again.lineages() == raced[scheduler].lineages()


def test_the_seed_decides(raced):
    other = race("pbt", config=study_of("pbt", seed=1))
    assert other.lineages() != raced["pbt"].lineages()


def test_nothing_is_left_in_the_global_generators():
    random.seed(3)
    expected = random.random()
    random.seed(3)
    race("pbt")
    assert random.random() == expected


@pytest.mark.parametrize("slots", [1, 3, 8])
@pytest.mark.parametrize("dies", [{0: 1}, {3: 3}, {2: 5, 4: 5, 7: 12}])
def test_members_that_fail_keep_nobody_waiting(dies, slots):
    controller = race("pbt", dies=dict(dies), slots=slots)
    assert len(controller.lineages()) == TRIALS - len(dies)
    assert [s for t, (s, _) in controller.state.items() if t.status == Trial.TERMINATED] == (
        [EPOCHS] * (TRIALS - len(dies))
    )


def test_a_retried_member_is_compared_where_it_would_have_been(raced):
    """Dead before, between and after comparisons: it goes on from its checkpoint, at its turn."""
    controller = race("pbt", dies={1: 2, 3: 8, 5: 11}, retries=1)
    assert controller.lineages() == raced["pbt"].lineages()


def test_resumed_members_that_are_apart_are_not_mixed_up():
    """One is a whole interval ahead: it waits at the next comparison, and all end."""
    config = study_of("pbt")
    controller = Controller(config, initial(config))
    for trial in controller.state:
        controller.leave(trial, (6, 9.0) if trial.trial_id == "m0" else (4, 0.5))
    take_over, epochs = controller.scheduler._exploit, []

    def seen(tune: Any, worse: Trial, better: Trial) -> None:
        epochs.append((controller.state[worse][0], controller.state[better][0]))
        take_over(tune, worse, better)

    controller.scheduler._exploit = seen
    controller.run()
    assert epochs == [(6, 6)] * 2 + [(9, 9)] * 2
    found = controller.lineages()
    assert len(found) == TRIALS
    assert {c["epoch"] for config in found.values() for c in config.changes} <= {7, 10}


def test_pbt_moves_choices_and_snaps_to_steps():
    space = {
        "evidence": {"choices": ["log1p_softplus", "softplus", "exp"]},
        "kd_weight": {"low": 1.0, "high": 5.0, "step": 0.5},
    }
    shared = DistillConfig(
        dataset="digits", student="resnet8", teacher="resnet8", method="ekd", epochs=EPOCHS
    )
    config = study_of("pbt", distill=shared, space=space)
    points = Space(space).sample(TRIALS, seed=0)
    settings = [shared.replace(**point).to_dict() for point in points]
    controller = Controller(config, settings)
    controller.run()
    changes = [change for c in controller.lineages().values() for change in c.changes]
    assert {"evidence", "kd_weight"} <= {name for change in changes for name in change}
    assert all(change.get("kd_weight", 1.0) * 2 % 1 == 0 for change in changes)


@pytest.mark.parametrize(
    ("entry", "beyond", "nearest"),
    [
        ({"low": 0.1, "high": 0.9}, 1.08, 0.9),
        ({"low": 0.1, "high": 0.9}, 0.08, 0.1),
        ({"low": 0.1, "high": 0.9}, 0.3, 0.3),
        ({"low": 0.25, "high": 0.75, "step": 0.25}, 0.6, 0.5),
    ],
)
def test_a_perturbed_value_stays_in_its_range(entry, beyond, nearest):
    assert population._nearest(Space({"momentum": entry}).parameters["momentum"], beyond) == nearest


def test_pb2_explores_a_logarithmic_range_by_its_logarithm():
    scheduler: Any = make_scheduler(study_of("pb2"))
    assert scheduler._hyperparam_bounds["lr"] == [math.log(0.001), math.log(0.1)]
    assert scheduler._hyperparam_bounds["weight_decay"] == [0.0, 0.01]


# What a population cannot be


@pytest.mark.parametrize("scheduler", ["pbt", "pb2"])
@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"sampler": "tpe"}, "draws its members at random, got sampler tpe: set sampler=random"),
        (
            {"space": {**SPACE, "batch_size": {"low": 8, "high": 64}, "epochs": {"choices": [9]}}},
            "batch_size, epochs cannot change: fix it with",
        ),
        (
            {
                "space": {
                    "standardize": {"choices": [True, False]},
                    "momentum": {"low": 0.1, "high": 0.9, "when": {"standardize": [True]}},
                }
            },
            "needs every parameter in every member, and momentum has a condition",
        ),
        ({"trials": 1}, "needs trials >= 2, got 1"),
        ({"perturbation_epochs": 13}, "perturbation_epochs must be <= 11, got 13"),
        ({"workers_per_trial": 2}, "got workers_per_trial 2: set workers_per_trial=1"),
        ({"budget_epochs": 100}, "budgets and stop_below limit nothing"),
        ({"max_concurrent": 2}, "max_concurrent limits nothing"),
    ],
)
def test_what_a_population_cannot_have_is_refused_with_the_cure(scheduler, values, said):
    config = study_of(scheduler, **values)
    if "space" in values and "standardize" in values["space"]:
        config = config.replace(distill=config.distill.replace(method="kd", teacher="resnet8"))
    with pytest.raises(UserError, match=said) as refused:
        check_sampler(config, Space(config.space))
    assert str(refused.value).startswith(f"scheduler {scheduler} ")


def test_changes_of_its_own_are_refused():
    shared = study_of("pbt").distill.replace(changes=[{"epoch": 2, "lr": 0.1}])
    with pytest.raises(UserError, match="makes the changes itself"):
        check_study(study_of("pbt", distill=shared))


def test_a_learned_prior_cannot_be_searched_by_a_population():
    shared = study_of("pbt").distill.replace(method="evidential", learn_log_prior=True)
    config = study_of("pbt", distill=shared, space={"log_prior": {"low": 0.0, "high": 1.0}})
    with pytest.raises(UserError, match="log_prior cannot change"):
        check_sampler(config, Space(config.space))


def test_pb2_needs_ranges():
    space = {**SPACE, "momentum": {"choices": [0.8, 0.9]}}
    with pytest.raises(UserError, match="scheduler pb2 needs ranges, and momentum has choices"):
        check_study(study_of("pb2", space=space))
    check_study(study_of("pbt", space=space))


def test_the_interval_is_an_eighth_of_the_run():
    assert study_of("pbt", perturbation_epochs=None).perturbation == 1
    shared = DistillConfig(epochs=240)
    assert StudyConfig(distill=shared).perturbation == 30
