"""The confirm stage: who runs under which seeds; runs are made up, files are real."""

from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import yaml

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.engine.distill import Diverged
from ekd_ray.engine.resolve import resolve
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.errors import UserError
from ekd_ray.results.records import RunRecord, read_record
from ekd_ray.results.study import Study
from ekd_ray.results.study_reader import StudyReader
from ekd_ray.scale import confirm, run_list
from ekd_ray.scale.confirm import Entry
from ekd_ray.scale.search import _note_best
from ekd_ray.scale.worker import RUN, TrainOptions, train_run

BASE = DistillConfig(dataset="digits", student="resnet8", method="none", lr=0.02)
FINALISTS = [
    Entry(name=f"trial {n}", config=BASE.replace(lr=0.01 * (n + 1)), role="finalist", number=n)
    for n in range(4)
]
SEEDS = [1, 2, 3, 4]


@pytest.fixture
def made_up(monkeypatch):
    """Runs get their figures from `score(name, seed)`; None is a failure."""

    def use(score):
        def run_tuner(study, config, train, *, searcher, **_):
            while isinstance(suggested := searcher.suggest("t"), dict):
                run = RunRecord.from_dict(suggested[RUN])
                value = score(run.name, run.seed)
                metrics = {} if value is None else {"val_top1": value, "test_top1": value}
                replace(run, metrics=metrics, reason="diverged" if value is None else None).write()

        monkeypatch.setattr(run_list, "run_tuner", run_tuner)
        monkeypatch.setattr(confirm, "fill_cache", lambda *_, **__: None)

    return use


NOTES: list[str] = []
OBSERVER = SimpleNamespace(stage=lambda title, total, epochs: None, note=NOTES.append)


@pytest.fixture
def selected(made_up, tmp_path):
    """Run the select step on made-up scores: (records, {entry: seeds it was given})."""

    def run(score, *, entries=FINALISTS, **settings):
        made_up(score)
        config = StudyConfig(distill=BASE, **{"confirm_seeds": len(SEEDS), **settings})
        runs = confirm._select(tmp_path, config, BASE, entries, OBSERVER)
        return runs, {e.name: [run.seed for run in runs if run.name == e.name] for e in entries}

    return run


def noise(name, seed):
    """A seed's effect on all entries, and a little of each one's own."""
    return 0.05 * seed + 0.002 * ((int(name[-1]) * 7 + seed * 5) % 3)


def test_who_is_clearly_worse_is_given_no_further_seeds(selected):
    quality = {"trial 0": 0.60, "trial 1": 0.61, "trial 2": 0.40, "trial 3": 0.61}
    NOTES.clear()
    _, given = selected(lambda name, seed: quality[name] + noise(name, seed))
    assert given["trial 2"] == [1, 2] and given["trial 1"] == SEEDS
    assert NOTES and "trial 1" in NOTES[0] and "trial 2" not in NOTES[0]


def test_one_that_fails_is_out_and_a_single_one_gets_all_seeds(selected):
    def score(name, seed):
        return None if (name, seed) == ("trial 3", 2) else 0.5 + noise(name, seed)

    _, given = selected(score)
    assert given["trial 3"] == [1, 2] and given["trial 0"] == SEEDS
    one = [replace(FINALISTS[0], name="trial 4", config=BASE.replace(lr=0.5))]
    assert selected(score, entries=one)[1] == {"trial 4": SEEDS}


def test_a_resumed_select_step_asks_for_the_same_runs(selected, tmp_path):
    quality = {"trial 0": 0.60, "trial 1": 0.61, "trial 2": 0.40, "trial 3": 0.61}
    first = selected(lambda name, seed: quality[name] + noise(name, seed))
    results = sorted(tmp_path.glob("confirm/*/result.json"))
    lost = results[-1].parent  # as a kill leaves it
    results[-1].unlink()
    asked = []

    def score(name, seed):
        asked.append((name, seed))
        return quality[name] + noise(name, seed)

    assert selected(score) == first
    assert len(asked) == 1 and asked[0][0].replace(" ", "-") in lost.name
    assert sorted(tmp_path.glob("confirm/*/result.json")) == results


# The whole stage


@pytest.fixture
def searched(tmp_path):
    """A study with trials of the given learning rates, best first, as the search leaves it."""

    def write(rates, *, stopped=(), **settings):
        config = StudyConfig(
            distill=BASE, space={"lr": {"low": 0.001, "high": 1.0}},
            **{"confirm_seeds": 3, "baselines": ["none"], **settings},
        )  # fmt: skip
        for number, rate in enumerate(rates):
            trial = resolve(BASE.replace(lr=rate))
            RunRecord(
                folder=tmp_path / "trials" / f"{number:04d}", stage=RunStage.SEARCH,
                name=f"trial {number}", number=number, config=trial.to_dict(), params={"lr": rate},
                status="pruned" if number in stopped else "complete",
                history=[{"epoch": 1, "val_top1": 0.9 - number / 10}],
            ).write()  # fmt: skip
        header = {"format_version": 2, "study": config.to_dict()}
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(header))
        return config

    return write


def confirmed(folder, config):
    confirm.confirm(folder, config, resolve(BASE), OBSERVER)
    return Study.load(folder).leaderboard()


def test_a_champion_is_confirmed_by_its_name_where_a_trial_has_its_configuration(
    searched, made_up, tmp_path
):
    """Trial 1 tried the authors' values and was stopped; trial 0 is the best of the search."""
    made_up(lambda name, seed: {"authors' values": 0.7, "trial 0": 0.6}.get(name, 0.5) + seed / 100)
    config = searched([0.1, 0.05, 0.3], stopped=[1], confirm_top_k=1, authors={"lr": 0.05},
                      warm_points={"from a": {"lr": 0.05}, "from b": {"lr": 0.4}})  # fmt: skip
    board = confirmed(tmp_path, config)
    found = {row.name: (row.role, row.number, row.equals, len(row.val), len(row.test))
             for row in board}  # fmt: skip
    assert found == {
        "authors' values": ("winner", 1, ("from a",), 3, 3),
        "from b": ("champion", None, (), 3, 3),
        "defaults": ("champion", None, (), 3, 3),
        "none": ("baseline", None, (), 0, 3),
        "trial 0": ("finalist", 0, (), len(board[-1].val), 0),
    }
    assert Study.load(tmp_path).best().config.lr == 0.05


def test_a_configuration_that_was_stopped_and_run_in_full_has_the_number_of_the_full_run(
    searched, made_up, tmp_path
):
    """The other one has no score of full length; trial 1 and 2 have the authors' values."""
    made_up(lambda name, seed: 0.5)
    for champions, name in ((["authors"], "authors' values"), ([], "trial 2")):
        config = searched([0.1, 0.05, 0.05], stopped=[1], authors={"lr": 0.05}, champions=champions)
        numbers = {row.name: row.number for row in confirmed(tmp_path, config)}
        assert numbers == {name: 2, "trial 0": 0, "none": None}


def test_a_baseline_that_runs_as_a_champion_did_has_a_row_of_its_own(searched, made_up, tmp_path):
    """The authors' values, the defaults and the student alone are one configuration."""
    made_up(lambda name, seed: 0.7 if name == "authors' values" else 0.5)
    board = confirmed(tmp_path, searched([0.1], authors={"lr": BASE.lr}))
    assert [(row.name, row.role, row.equals, len(row.test)) for row in board] == [
        ("authors' values", "winner", ("defaults",), 3), ("none", "baseline", (), 3),
        ("trial 0", "finalist", (), 0),
    ]  # fmt: skip
    assert len([*tmp_path.glob("confirm/final-*")]) == 3


def test_a_champion_that_fails_cannot_win_and_is_told(searched, made_up, tmp_path):
    made_up(lambda name, seed: None if name == "defaults" and seed == 2 else 0.5)
    config = searched([0.1], champions=["defaults"])
    board = {row.name: row for row in confirmed(tmp_path, config)}
    assert board["trial 0"].winner
    assert (board["defaults"].failed, board["defaults"].test) == ("diverged", ())


def test_an_extended_study_runs_no_champion_again(searched, made_up, tmp_path):
    asked = []

    def score(name, seed):
        asked.append(name)
        return 0.5 + 0.1 * (name == "trial 1") + seed / 100

    made_up(score)
    confirmed(tmp_path, searched([0.1], champions=["defaults"], confirm_top_k=2))
    asked.clear()
    board = confirmed(tmp_path, searched([0.1, 0.2], champions=["defaults"], confirm_top_k=2))
    assert board[0].name == "trial 1" and set(asked) == {"trial 1"}


@pytest.mark.parametrize(("better", "said"), [(0.1, False), (-0.1, True)])
def test_an_extension_without_a_further_finalist_says_so(
    searched, made_up, tmp_path, better, said, monkeypatch
):
    made_up(lambda name, seed: 0.5 + seed / 100)
    config = searched([0.1], confirm_top_k=1)
    confirmed(tmp_path, config)
    config = searched([0.1, 0.2], confirm_top_k=1)
    header = {"format_version": 2, "study": config.to_dict(), "extended_from": 1}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(header))
    ranked = sorted(Study.load(tmp_path).records(), key=lambda trial: -better * trial.number)
    monkeypatch.setattr(StudyReader, "finalists", lambda self: ranked[:1])
    notes = Mock()
    confirm.confirm(tmp_path, config, resolve(BASE), notes)
    assert any("finalist" in str(call) for call in notes.note.call_args_list) == said


def test_those_confirmed_before_an_extension_can_still_win(searched, made_up, tmp_path):
    asked = []

    def score(name, seed):
        asked.append(name)
        return 0.5 - 0.1 * (name == "trial 1") + seed / 100

    made_up(score)
    confirmed(tmp_path, searched([0.1], champions=[], confirm_top_k=1))
    asked.clear()
    lucky = searched([0.1, 0.2], champions=[], confirm_top_k=1)
    first = tmp_path / "trials" / "0000"
    record = read_record(first)
    replace(record, history=[{"epoch": 1, "val_top1": 0.7}], metrics={"val_top1": 0.7}).write()
    board = confirmed(tmp_path, lucky)
    assert (board[0].name, board[0].winner) == ("trial 0", True)
    assert {row.name for row in board} >= {"trial 0", "trial 1"} and "trial 0" not in asked


def test_trials_of_an_extension_are_held_against_those_before(searched, tmp_path):
    said = []
    searched([0.1, 0.2])
    study = StudyReader.load(tmp_path)
    _note_best(study.records(), study.config, SimpleNamespace(note=said.append))
    assert len(said) == 1 and "90.00 % (trial 0)" in said[0]


def test_what_is_no_champion_by_the_setting_is_none():
    config = StudyConfig(distill=BASE, authors={"lr": 0.5}, warm_points={"from a": {"lr": 0.3}})
    rates = {name: c.lr for name, c in confirm.champions(config, BASE).items()}
    assert rates == {"authors' values": 0.5, "from a": 0.3, "defaults": 0.02}
    for name, left in (("authors", "authors' values"), ("warm-start", "from a")):
        assert list(confirm.champions(config.replace(champions=[name]), BASE)) == [left]
    # The recipe's own method settings are no defaults of the method.
    base = DistillConfig(method="kd", teacher="resnet20", kd_weight=7.0, lr=0.3)
    (defaults,) = confirm.champions(config.replace(champions=["defaults"]), base).values()
    assert (defaults.method, defaults.kd_weight, defaults.lr) == ("kd", 0.9, 0.3)
    assert (
        confirm.champions(StudyConfig(authors={"method": "kd"}), base.replace(teacher=None)) == {}
    )


def test_if_all_fail_it_is_said(searched, made_up, tmp_path):
    made_up(lambda name, seed: None)
    with pytest.raises(UserError, match=r"every configuration of .* failed under a fresh seed"):
        confirmed(tmp_path, searched([0.1]))


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
    (run,) = confirm.plan_runs(
        tmp_path, RunStage.SELECT, [Entry(name="none", config=config, role="champion")], [1]
    )
    assert train_run(run, print, options=TrainOptions(data_root=None, threads=1)) is None
    record = read_record(run.folder)
    assert (record.status, record.reason) == ("failed", "val_nll became nan in epoch 1")


def test_final_runs_train_on_the_validation_images_too(searched, made_up, tmp_path):
    made_up(lambda name, seed: 0.5)
    confirmed(tmp_path, searched([0.1]))
    held_out = {(r.stage, r.config["validation_fraction"]) for r in Study.load(tmp_path).runs[1:]}
    assert held_out == {(RunStage.SELECT, 0.1), (RunStage.FINAL, 0.0)}
