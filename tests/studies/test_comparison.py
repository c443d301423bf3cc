"""Several studies by one command: which, from what, and the table in the end."""

import argparse
import json
import math
import shutil
import statistics

import pyarrow as pa
import pytest
import yaml
from scipy import stats

from ekd_ray.cli import request, tune_command
from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.errors import UserError
from ekd_ray.losses.methods import with_method
from ekd_ray.results.records import STUDY_FILE, RunRecord, trial_folder, trial_name
from ekd_ray.results.study import Study
from ekd_ray.results.study_reader import write_parquet
from ekd_ray.studies.comparison import (
    Cell,
    collect_cells,
    compare_studies,
    comparison_table,
    find_studies,
    place_studies,
    welch,
    write_comparison,
)

BASE = DistillConfig(dataset="synthetic", student="resnet8", method="none")


def studies(*argv, home=None):
    parser = argparse.ArgumentParser()
    tune_command.add_arguments(parser)
    parser.set_defaults(home=home)
    asked = request.study_request(parser.parse_args([*map(str, argv)]))
    return {name: study.config for name, study in asked.studies.items()}


def test_all_pairs_share_one_budget():
    configs = studies("--pairs", "all", "--epochs", 8, "--trials", 5)
    assert len(configs) == 14
    assert {name.rpartition("/")[2] for name in configs} == {"ekd"}
    assert {(c.trials, c.distill.epochs) for c in configs.values()} == {(5, 8)}
    vgg = configs["vgg13-MobileNetV2/ekd"].distill
    assert (vgg.teacher, vgg.student, vgg.lr) == ("vgg13", "MobileNetV2", 0.01)


def test_pairs_times_methods():
    configs = studies(
        "--pairs", "resnet56-resnet20,vgg13-vgg8", "--methods", "kd-standardized,dkd+ekd"
    )
    assert list(configs) == [
        "resnet56-resnet20/kd-standardized",
        "resnet56-resnet20/dkd+ekd",
        "vgg13-vgg8/kd-standardized",
        "vgg13-vgg8/dkd+ekd",
    ]
    assert configs["vgg13-vgg8/kd-standardized"].distill.standardize
    assert configs["resnet56-resnet20/dkd+ekd"].authors["log_prior"] == -0.93


def test_every_pair_takes_its_teacher_from_the_zoo(tmp_path):
    for name in ("vgg13", "wrn_40_2"):
        (tmp_path / f"{name}_vanilla").mkdir()
        (tmp_path / f"{name}_vanilla" / "ckpt_epoch_240.pth").write_bytes(b"-")
    configs = studies("--pairs", "vgg13-vgg8,wrn_40_2-wrn_16_2", "--teacher-zoo", tmp_path)
    found = [config.distill.teacher_weights for config in configs.values()]
    assert found == [
        str(tmp_path / f"{name}_vanilla" / "ckpt_epoch_240.pth") for name in ("vgg13", "wrn_40_2")
    ]
    with pytest.raises(UserError, match="resnet56"):
        studies("--pairs", "resnet56-resnet20", "--teacher-zoo", tmp_path)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--pairs", "all", "--pair", "vgg13-vgg8"], "drop --pair"),
        (["--pairs", "vgg13-vgg9"], "vgg13-vgg8"),
        (["--pairs", "vgg13-vgg8,"], "different names"),
        (["--pair", "vgg13-vgg8", "--methods", "kd,kd"], "different names"),
        (["--pair", "vgg13-vgg8", "--methods", "kd,dkt"], "dkd"),
        (["--pair", "vgg13-vgg8", "--methods", "kd", "--method", "kd"], "not both"),
        (["--pair", "vgg13-vgg8", "--teacher-zoo", "/nowhere"], "/nowhere"),
    ],
)
def test_mistakes(argv, words):
    with pytest.raises(UserError, match=words):
        studies(*argv)


def write_study(folder, rows):
    """A finished study as confirm leaves it: rows (name, config, test accuracies by seed)."""
    folder.mkdir(parents=True)
    header = {"format_version": 1, "study": StudyConfig(distill=BASE).to_dict()}
    (folder / "study.yaml").write_text(yaml.safe_dump(header))
    plain = [
        {"stage": "select", "name": "trial 3", "seed": seed, "val_top1": 0.5, "test_top1": None,
         "reason": None, "config": json.dumps(BASE.to_dict()), "folder": "x"}
        for seed in (1, 2)
    ]  # fmt: skip
    for name, config, values in rows:
        for seed, value in enumerate(values):
            plain.append(
                {"stage": "final", "name": name, "seed": seed, "val_top1": None,
                 "test_top1": value, "reason": None if value is not None else "diverged",
                 "config": json.dumps(config.to_dict()), "folder": "x"}
            )  # fmt: skip
    write_parquet(folder / "confirm.parquet", pa.Table.from_pylist(plain))


def test_rows_are_methods_and_columns_are_pairs(tmp_path):
    kd, ekd = with_method(BASE, "kd"), with_method(BASE, "ekd")
    alone, longer = BASE, BASE.replace(epochs=480)
    write_study(tmp_path / "a-b" / "ekd", [
        ("trial 3", ekd, (0.62, 0.60)), ("none", alone, (0.5, 0.54)),
        ("authors' values", ekd, (0.6, 0.6)),
    ])  # fmt: skip
    write_study(tmp_path / "a-b" / "mlkd", [
        ("trial 3", kd, (0.66, 0.68)), ("none", longer, (0.55, 0.55)),
    ])  # fmt: skip
    write_study(tmp_path / "c-d" / "ekd", [("trial 3", ekd, (0.7, 0.7)), ("kd", kd, (0.6,))])
    places = [("a-b", "ekd"), ("a-b", "mlkd"), ("c-d", "ekd")]
    studies = {place: Study.load(tmp_path.joinpath(*place)) for place in places}
    cells = collect_cells({**studies, ("c-d", "mlkd"): "every trial failed"})
    found = {(cell.row, cell.pair): cell.text() for cell in cells}
    assert found == {
        ("ekd, searched", "a-b"): "61.00 ± 1.41",
        ("student alone", "a-b"): "52.00 ± 2.83",
        ("ekd, authors' values", "a-b"): "60.00 ± 0.00",
        ("mlkd, searched", "a-b"): "67.00 ± 1.41",
        ("student alone (settings of mlkd)", "a-b"): "55.00 ± 0.00",
        ("ekd, searched", "c-d"): "70.00 ± 0.00",
        ("KD", "c-d"): "60.00",
        ("mlkd, searched", "c-d"): "failed",
    }
    write_comparison(tmp_path, cells)
    table = (tmp_path / "comparison.md").read_text().splitlines()
    assert table[2] == "| student alone | 52.00 ± 2.83 |  |"
    assert [line.split(" | ")[0].removeprefix("| ") for line in table[2:]] == [
        "student alone", "student alone (settings of mlkd)", "KD", "ekd, authors' values",
        "ekd, searched", "mlkd, searched",
    ]  # fmt: skip
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert [Cell(**cell) for cell in written] == cells
    assert comparison_table(cells).row_count == 6


@pytest.mark.parametrize("order", [("few", "many"), ("many", "few")])
def test_of_a_shared_baseline_that_with_most_seeds_is_shown(tmp_path, order):
    kd = with_method(BASE, "kd")
    for name, values in (("few", (0.5,)), ("many", (0.5, 0.7))):
        write_study(tmp_path / name, [("trial 3", kd, (0.6,)), ("none", BASE, values)])
    studies = {("a-b", f"kd in {name}"): Study.load(tmp_path / name) for name in order}
    found = {cell.row: cell.text() for cell in collect_cells(studies)}
    assert found["student alone"] == "60.00 ± 14.14"
    assert sorted(found) == ["kd in few, searched", "kd in many, searched", "student alone"]


def test_studies_are_found_by_folder_or_below_one(tmp_path):
    for place in ("many/a-b/ekd", "many/a-b/kd", "one"):
        write_study(tmp_path / place, [("trial 3", BASE, (0.5,))])
    found = place_studies(find_studies([str(tmp_path / "many"), str(tmp_path / "one")]))
    assert [study.path for study in found.values()] == [
        tmp_path / place for place in ("many/a-b/ekd", "many/a-b/kd", "one")
    ]
    # All of one pair and method: only their paths tell them apart.
    assert set(found) == {("none-resnet8", f"none in {study.path}") for study in found.values()}
    assert [*find_studies([str(tmp_path)])] == [str(tmp_path / "one")]
    (tmp_path / ".hidden").mkdir()
    shutil.copy(tmp_path / "one" / STUDY_FILE, tmp_path / ".hidden")
    again = [str(tmp_path), f"{tmp_path / 'one'}/"]
    assert [*find_studies(again)] == [str(tmp_path / "one")], "once, and nothing hidden"
    with pytest.raises(UserError, match="holds no study"):
        find_studies([str(tmp_path / "many" / "a-b" / "kd") + "/trials"])


def test_single_runs_beside_studies_are_left_out(tmp_path):
    """As a teacher's and a reproduction's in `runs/*`."""
    write_study(tmp_path / "study", [("trial 3", BASE, (0.5,))])
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.yaml").write_text(BASE.to_yaml())
    with pytest.warns(UserWarning, match="teacher is left out: it is a single run"):
        found = find_studies([str(tmp_path / "study"), str(tmp_path / "teacher")])
    assert [*found] == [str(tmp_path / "study")]


def test_data_sets_are_named_where_they_differ(tmp_path):
    write_study(tmp_path / "a", [])
    write_study(tmp_path / "b", [])
    header = yaml.safe_load((tmp_path / "b" / "study.yaml").read_text())
    header["study"]["distill"]["dataset"] = "folder:/pictures/birds"
    (tmp_path / "b" / "study.yaml").write_text(yaml.safe_dump(header))
    assert list(place_studies(find_studies([str(tmp_path / "a"), str(tmp_path / "b")]))) == [
        ("none-resnet8 (synthetic)", "none"), ("none-resnet8 (birds)", "none")
    ]  # fmt: skip


def test_the_command_prints_the_table_and_leaves_out_what_is_unfinished(tmp_path, launch):
    ekd = with_method(BASE, "ekd")
    write_study(tmp_path / "done", [("trial 3", ekd, (0.62, 0.60)), ("none", BASE, (0.5, 0.5))])
    write_study(tmp_path / "begun", [])
    code, out, err = launch("compare", "done", "begun", "--out", "tables")
    assert (code, err) == (0, "left out: begun has no final run yet\n")
    assert "61.00 ± 1.41" in out and "student alone" in out
    assert "none, searched" in out, "its path would tell it from nothing that is shown"
    assert "61.00 ± 1.41" in (tmp_path / "tables" / "comparison.md").read_text()
    cells = json.loads(launch("compare", "done", "--json")[1])
    assert {(cell["row"], cell["n"]) for cell in cells} == {
        ("none, searched", 2), ("student alone", 2)
    }  # fmt: skip
    code, out, err = launch("compare", "begun")
    assert (code, out) == (2, "") and "nothing to compare" in err


def test_the_costs_of_two_studies_stand_in_their_own_columns(tmp_path):
    found = []
    for name, trials in (("this", 3), ("other", 1)):
        for number in range(trials):
            folder = trial_folder(tmp_path / name, number)
            folder.mkdir(parents=True)
            record = RunRecord(
                folder=folder, stage=RunStage.SEARCH, name=trial_name(number), number=number
            )
            record.close("failed", reason="diverged")
        found.append(Study(path=tmp_path / name, config=StudyConfig(distill=BASE), header={}))
    rows = compare_studies(*found).to_pylist()
    row = next(row for row in rows if row["figure"] == "trials")
    assert (row["this"], row["other"], row["difference"]) == (3, 1, 2)


def test_two_seeds_on_a_side_give_no_interval():
    few, enough = (0.5, 0.6), (0.5, 0.52, 0.55)
    assert welch(few, enough) == welch(enough, few) == (None, None)
    assert None not in welch(enough, (0.6, 0.61, 0.63))


def test_the_interval_is_welchs():
    """By hand (Welch 1947): degrees of freedom that follow from both variances."""
    first, second = (1.0, 2.0, 3.0), (4.0, 4.0, 8.0, 8.0, 6.0)
    parts = [statistics.variance(values) / len(values) for values in (first, second)]
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 4)
    half = stats.t.ppf(0.975, freedom) * math.sqrt(sum(parts))
    assert welch(first, second) == pytest.approx((-4 - half, -4 + half))
