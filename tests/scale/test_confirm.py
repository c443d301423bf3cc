"""Which finalists are given which seeds; runs are made up, files are real."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.engine.distill import Diverged
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.errors import UserError
from ekd_ray.results.records import RunRecord, read_record
from ekd_ray.scale import confirm
from ekd_ray.scale.worker import RUN, TrainOptions, train_run

FINALISTS = {f"trial {n}": DistillConfig(method="none", lr=0.01 * (n + 1)) for n in range(4)}
SEEDS = [1, 2, 3, 4]


@pytest.fixture
def selected(monkeypatch, tmp_path):
    """Run the select step on made-up scores: (winner, {finalist: seeds it was given}, rounds)."""

    def run(score, *, finalists=FINALISTS, resume=False, **settings):
        rounds = []

        def run_tuner(study, config, train, *, searcher, **_):
            while isinstance(suggested := searcher.suggest("t"), dict):
                run = RunRecord.from_dict(suggested[RUN])
                assert not resume
                value = score(run.name, run.seed)
                metrics = {} if value is None else {"val_top1": value, "val_nll": value}
                replace(run, metrics=metrics, reason="diverged" if value is None else None).write()

        def stage(title, total, epochs):
            rounds.append(total)

        monkeypatch.setattr(confirm, "run_tuner", run_tuner)
        config = StudyConfig(confirm_seeds=len(SEEDS), **settings)
        observer = SimpleNamespace(stage=stage)
        runs = confirm._select(tmp_path, config, finalists, SEEDS, observer)
        given = {name: [run.seed for run in runs if run.name == name] for name in finalists}
        return confirm._winner(tmp_path, runs, config), given, len(rounds)

    return run


def noise(name, seed):
    """What a seed does to all, and a little of each finalist's own."""
    return 0.05 * seed + 0.002 * ((int(name[-1]) * 7 + seed * 5) % 3)


def test_who_is_clearly_worse_is_given_no_further_seeds(selected):
    quality = {"trial 0": 0.60, "trial 1": 0.61, "trial 2": 0.40, "trial 3": 0.61}
    winner, given, rounds = selected(lambda name, seed: quality[name] + noise(name, seed))
    assert given["trial 2"] == [1, 2]
    assert given[winner] == SEEDS and winner in ("trial 1", "trial 3")
    assert rounds == 3


def test_a_race_that_is_decided_ends(selected):
    quality = {"trial 0": 0.30, "trial 1": 0.90, "trial 2": 0.40, "trial 3": 0.35}
    winner, given, rounds = selected(lambda name, seed: quality[name] + noise(name, seed))
    assert (winner, rounds) == ("trial 1", 1)
    assert set(map(tuple, given.values())) == {(1, 2)}


def test_for_a_loss_less_is_better(selected):
    quality = {"trial 0": 0.30, "trial 1": 0.90, "trial 2": 0.80, "trial 3": 0.95}
    winner, *_ = selected(lambda name, seed: quality[name] + noise(name, seed), metric="val_nll")
    assert winner == "trial 0"


@pytest.mark.parametrize(
    "settings",
    [{"confirm_elimination": False}, {"objectives": ["val_nll"]}, {"constraints": ["val_nll<=9"]}],
)
def test_all_seeds_for_all_where_one_metric_does_not_decide(selected, settings):
    quality = {"trial 0": 0.30, "trial 1": 0.90, "trial 2": 0.40, "trial 3": 0.35}
    winner, given, rounds = selected(
        lambda name, seed: quality[name] + noise(name, seed), **settings
    )
    assert (winner, rounds) == ("trial 1", 1)
    assert set(map(tuple, given.values())) == {tuple(SEEDS)}


def test_one_that_fails_is_out_and_a_single_finalist_gets_all_seeds(selected):
    def score(name, seed):
        return None if (name, seed) == ("trial 3", 2) else 0.5 + noise(name, seed)

    winner, given, _ = selected(score)
    assert given["trial 3"] == [1, 2] and winner != "trial 3"
    one = {"trial 4": FINALISTS["trial 0"].replace(lr=0.5)}
    winner, given, _ = selected(score, finalists=one)
    assert (winner, given) == ("trial 4", {"trial 4": SEEDS})


def test_a_resumed_select_step_asks_for_the_same_runs(selected, tmp_path):
    quality = {"trial 0": 0.60, "trial 1": 0.61, "trial 2": 0.40, "trial 3": 0.61}

    def score(name, seed):
        return quality[name] + noise(name, seed)

    first = selected(score)
    results = sorted(tmp_path.glob("confirm/*/result.json"))
    assert selected(score, resume=True) == (*first[:2], 0), "no run is left to do"
    assert sorted(tmp_path.glob("confirm/*/result.json")) == results


def test_if_all_fail_it_is_said(selected):
    with pytest.raises(UserError, match=r"every finalist of .* failed under a fresh seed"):
        selected(lambda name, seed: None)


@pytest.mark.parametrize("seed", [0, 7])
def test_confirm_seeds_are_fresh(seed):
    """The README's promise: no finalist is judged again under the seed that picked it."""
    config = StudyConfig(confirm_seeds=5)
    seeds = confirm.fresh_seeds(config, DistillConfig(seed=seed))
    assert len(set(seeds)) == 5 and seed not in seeds


def test_a_confirm_run_that_diverges_is_recorded_as_failed(monkeypatch, tmp_path):
    def diverge(*_, **__):
        raise Diverged("val_nll became nan in epoch 1")

    monkeypatch.setattr("ekd_ray.scale.worker.distill", diverge)
    config = DistillConfig(method="none")
    (run,) = confirm.plan_runs(tmp_path, RunStage.SELECT, {"none": config}, [1])
    assert train_run(run, print, options=TrainOptions(data_root=None, threads=1)) is None
    record = read_record(run.folder)
    assert (record.status, record.reason) == ("failed", "val_nll became nan in epoch 1")


def test_for_a_loss_the_highest_is_given_no_further_seeds(selected):
    quality = {"trial 0": 0.30, "trial 1": 0.80, "trial 2": 0.30, "trial 3": 0.30}
    _, given, _ = selected(lambda name, seed: quality[name] + noise(name, seed), metric="val_nll")
    assert given["trial 0"][:3] == [1, 2, 3]
    assert given["trial 1"] == [1, 2]


def test_final_runs_train_on_the_validation_images_too(monkeypatch, tmp_path):
    base = DistillConfig(dataset="digits", student="resnet8", method="none")
    stage, name = RunStage.SEARCH, "trial 0"
    trial = RunRecord(folder=tmp_path, stage=stage, name=name, number=0, config=base.to_dict())
    study = SimpleNamespace(finalists=lambda: [trial])
    planned = []

    def run_all(study, config, runs, observer):
        planned.extend(runs)
        return [replace(run, metrics={"val_top1": 0.5, "test_top1": 0.5}) for run in runs]

    monkeypatch.setattr(confirm.Study, "load", lambda run: study)
    monkeypatch.setattr(confirm, "fill_cache", lambda *_, **__: None)
    monkeypatch.setattr(confirm, "run_all", run_all)
    confirm.confirm(tmp_path, StudyConfig(distill=base), base, observer=None)
    held_out = {(run.stage, run.config["validation_fraction"]) for run in planned}
    assert held_out == {(RunStage.SELECT, 0.1), (RunStage.FINAL, 0.0)}
