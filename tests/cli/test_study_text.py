"""A study in the terminal: its plan, its figures."""

import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ekd_ray.cli import plan_text, study_text
from ekd_ray.cli.output import wrap_words
from ekd_ray.cli.terminal import leaderboard_table
from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.results.leaderboard import Leaderboard, Row
from ekd_ray.results.progress import Progress
from ekd_ray.results.study_reader import StudyReader
from ekd_ray.results.words import describe_better_on_test, describe_lead


def test_the_winners_score_in_the_search_comes_before_that_over_fresh_seeds():
    search = SimpleNamespace(number=3, value=lambda metric: 0.9)
    study = SimpleNamespace(config=StudyConfig(), ranked=lambda: [search])
    winner = Row(name="trial 3", number=3, config=DistillConfig(), val=(0.6, 0.8), winner=True)
    (line,) = study_text._selection_gap(study, winner)
    assert line == "winner's val_top1: 90.00 % in the search, 70.00 % over 2 fresh seeds"
    champion = Row(name="defaults", config=DistillConfig(), val=(0.6, 0.8), winner=True)
    assert study_text._selection_gap(study, champion) == []


words = st.text(st.characters(categories=("L", "N", "P")), min_size=1, max_size=9)


@given(
    st.lists(words, max_size=40), st.sampled_from(["", "estimate   ", "  "]), st.integers(30, 80)
)
def test_lines_are_broken_between_words(words, label, width):
    line = label + " ".join(words)
    found = wrap_words(line, width)
    assert found.split() == line.split()
    assert all(len(part) <= width for part in found.split("\n"))
    if len(line) <= width:
        assert found == line
    elif label.strip():
        assert all(part.startswith(" " * len(label)) for part in found.split("\n")[1:])


def test_a_command_is_not_broken():
    line = f"goes on by: ekd-ray tune --resume --out {'a' * 60}"
    assert wrap_words(f"{line}\n{'word ' * 9}", 40).split("\n")[0] == line


@pytest.mark.parametrize("bound", [False, True])
def test_constraints_are_named_where_there_are_some(bound):
    """Who is alone at the end has left the others behind."""
    config = StudyConfig(constraints=["val_ece<=0.1"] * bound)
    rows = [
        Row(name="trial 1", config=DistillConfig(), val=(0.5, 0.6, 0.6), winner=True),
        Row(name="defaults", config=DistillConfig(), val=(0.1, 0.2), entered_as="champion"),
    ]
    board = Leaderboard(rows, config)
    assert board.lead is None
    assert "2 seeds" in describe_lead(board)
    assert ("constraint" in describe_lead(board)) == bound


@pytest.mark.parametrize(
    ("metric", "own", "other", "better", "columns"),
    [
        ("val_nll", (1.0, 1.2), (0.9, 1.0), "below", ["val_nll", "test_nll", "test_top1 %"]),
        ("val_balanced_top1", (0.3, 0.4), (0.5, 0.4), "above",
         ["val_balanced_top1 %", "test_balanced_top1 %", "test_top1 %"]),
        ("val_balanced_top1", (0.6, 0.7), (0.5, 0.4), "", None),
        ("val_top1", (0.9, 0.9), (0.1, 0.1), "", ["val_top1 %", "test_top1 %", "test_nll"]),
    ],
)  # fmt: skip
def test_figures_of_the_test_split_are_in_the_studys_metric(metric, own, other, better, columns):
    """Accuracy stands beside it, and is that of a study that watches nothing else."""
    config, name = StudyConfig(metric=metric), metric.replace("val_", "test_")
    rows = [
        Row(name=row, config=DistillConfig(), val=(0.5, 0.5), test=tops, winner=row == "trial 1",
            test_metrics=tuple({"test_top1": tops[0], name: value} for value in values))
        for row, tops, values in (("trial 1", (0.9, 0.9), own), ("none", (0.1, 0.1), other))
    ]  # fmt: skip
    board = Leaderboard(rows, config)
    assert board.test_metric == name
    (found,) = StudyReader.differences(SimpleNamespace(leaderboard=lambda: board)).values()
    assert found.mean == pytest.approx(sum(own) / 2 - sum(other) / 2)
    assert bool(describe_better_on_test(board)) == bool(better)
    assert better in describe_better_on_test(board)
    heads = [column.header for column in leaderboard_table(board, config).columns]
    assert columns is None or heads[1:4] == columns
    assert len({*heads}) == len(heads)


def test_figures_of_two_studies_have_their_units():
    row = {"kind": "result", "figure": "test_top1", "this": 0.5, "other": 0.4, "difference": 0.1,
           "low": 0.05, "high": 0.15, "this_n": 3, "other_n": 3}  # fmt: skip
    cells = study_text._difference_cells(row)
    assert cells == ["50.00 %", "40.00 %", "+10.00", "+5.00 to +15.00"]
    few = study_text._difference_cells({**row, "low": None, "high": None, "this_n": 2})
    assert few[3] == "needs 3 seeds"
    cost = {**row, "kind": "cost", "figure": "trials", "this": 8.0, "other": 4.0, "difference": 4.0}
    assert study_text._difference_cells(cost) == ["8", "4", "+4", ""]


def test_a_full_run_is_not_said_to_equal_itself():
    name = "trial 2 (full run of trial 0)"
    row = Row(name=name, number=2, config=DistillConfig(), equals=("from runs/a",))
    assert study_text._other_names([row]) == [f"{name}: the same configuration as from runs/a"]
    assert study_text._other_names([Row(name=name, number=2, config=DistillConfig())]) == []
    (line,) = study_text._other_names([Row(name="defaults", number=2, config=DistillConfig())])
    assert line.endswith("as trial 2")
    row = Row(name="from a trial 5", number=2, config=DistillConfig())
    assert study_text._other_names([row])[0].endswith("as trial 2 of this study")


def test_nothing_is_better_than_the_best():
    rows = [
        Row(name="trial 1", config=DistillConfig(), test=(0.5, 0.6), winner=True),
        Row(name="none", config=DistillConfig(), test=(0.5, 0.6)),
    ]
    assert describe_better_on_test(Leaderboard(rows, StudyConfig())) == ""
    assert describe_better_on_test(Leaderboard(rows[1:], StudyConfig())) == ""


def test_a_difference_that_stands_beside_is_not_said_again():
    rows = [
        Row(name="trial 1", config=DistillConfig(), test=(0.5, 0.6), winner=True),
        Row(name="kd", config=DistillConfig(), test=(0.6, 0.7)),
    ]
    board = Leaderboard(rows, StudyConfig())
    assert "KD is 10.00 points above" in describe_better_on_test(board)
    assert describe_better_on_test(board, size=False).endswith("KD is above it.")


@pytest.mark.parametrize(("named", "driven", "text"), [
    (True, False, "stage: search; interrupted; trials: 2 of full length, 1 not ended"),
    (False, True, "running; trials: 2 of full length, 1 running"),
])  # fmt: skip
def test_a_stage_is_named_once(named, driven, text):
    trials = {"complete": 2, "running": 1}
    now = Progress(stage="search", trials=trials, asked=4, quiet_seconds=None, driven=driven)
    assert study_text.describe_stage(now, named=named) == text


def test_the_estimate_of_a_trial_is_what_halving_leaves_of_it():
    """Rungs after 1 and 6 of 8 epochs: 1 + 5 / 2 + 2 / 4 epochs, half a trial on average."""
    base = DistillConfig(dataset="digits", student="resnet8", method="none", epochs=8)
    few, more = (
        plan_text._study_flops(StudyConfig(distill=base, trials=trials)) for trials in (1, 3)
    )
    assert more - few == pytest.approx(plan_text.run_flops(base, None))


def test_the_estimate_says_that_it_is_of_a_whole_study_once_trials_have_begun(tmp_path):
    """A study's file is there before its plan is printed."""
    base = DistillConfig(dataset="digits", student="resnet8", method="none", epochs=1)
    space = {"lr": {"low": 0.01, "high": 0.1}}
    config = StudyConfig(distill=base, trials=2, space=space)

    def estimate():
        plan = plan_text.study_plan(config, tmp_path, begins=True)
        return next(line for line in plan.splitlines() if line.startswith("estimate"))

    (tmp_path / "study.yaml").touch()
    assert not estimate().endswith("all of it")
    (tmp_path / "trials" / "0000").mkdir(parents=True)
    assert estimate().endswith("all of it")


def test_a_row_keeps_validation_and_test_figures_apart():
    row = Row(
        name="kd", config=DistillConfig(),
        val_metrics=({"val_nll": 0.1},), test_metrics=({"test_nll": 0.2},),
    )  # fmt: skip
    assert (row.figures("val_nll"), row.figures("test_nll")) == ((0.1,), (0.2,))


def test_no_figure_of_a_table_is_cut_on_a_narrow_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    config = StudyConfig(metric="val_balanced_top1", constraints=["val_worst_recall>=0.1"])
    row = Row(name="defaults", config=DistillConfig(), val=(0.6, 0.8), test=(0.5,), winner=True)
    study_text._print([leaderboard_table([row], config)])
    text = capsys.readouterr().out
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    for name in ("configuration", *(f"{name} %" for name in config.watched), "test_ece"):
        assert name in text


def test_of_points_that_differ_there_is_a_number():
    points = [json.dumps({name: {"lr": value} for name, value in found.items()})
              for found in ({"a": 1, "b": 2}, {"a": 1, "c": 3, "d": 4})]  # fmt: skip
    texts = ["2, 1 of them not in the other", "3, 2 of them not in the other"]
    assert study_text._setting_texts(*points) == texts
    assert study_text._setting_texts("null", points[0])[0] == "0"
    assert study_text._setting_texts("[1, 2]", "0.5") == ["[1, 2]", "0.5"]
