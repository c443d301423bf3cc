"""The launchers' flags, how they become a configuration, and how mistakes end."""

import argparse
import contextlib
import json

import pytest
from launchers_run import DIGITS

from ekd_ray.cli import distill_command, flags, request, teacher_command, tune_command
from ekd_ray.cli.main import all_parsers, root_parser
from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.data import dataset_info
from ekd_ray.errors import UserError


def parsed(command, *argv):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args([*map(str, argv)])


def study(*argv):
    return request.study_request(parsed(tune_command, *argv)).studies[""].config


def one_run(*argv):
    return request.run_request(parsed(distill_command, *argv)).run


# From flags to a configuration


def test_flags_override_the_recipe():
    config = study(
        *DIGITS, "--student", "resnet14", "--train-subset", 500, "--seed", 3, "--trials", 5,
        "--seeds", 4, "--top-k", 6, "--max-concurrent", 2, "--workers-per-trial", 2,
        "--cpus-per-trial", 3, "--gpus-per-trial", 0.5, "--teacher-normalization", "half",
        "--decode-threads", 9,
    )  # fmt: skip
    run = config.distill
    assert (run.dataset, run.teacher, run.student) == ("digits", "resnet20", "resnet14")
    assert (run.train_subset, run.seed, config.seed) == (500, 3, 3)
    assert run.teacher_normalization == "half"
    assert (run.decode_threads, study(*DIGITS).distill.decode_threads) == (9, "auto")
    assert (config.trials, config.confirm_seeds, config.confirm_top_k) == (5, 4, 6)
    assert (config.max_concurrent, config.workers_per_trial) == (2, 2)
    assert (config.cpus_per_trial, config.gpus_per_trial) == (3, 0.5)
    assert (run.batch_size, run.schedule) == (16, "cosine"), "the rest is the recipe's"


def test_every_flag_that_is_a_whole_number_takes_it_as_people_write_it():
    found = {}
    for parser in all_parsers(root_parser()):
        for action in parser._actions:
            with contextlib.suppress(Exception):
                if type(action.type("7")) is int:
                    found[f"{parser.prog} {action.dest}"] = action.type
    assert {name: (read("1_000"), read("1e3")) for name, read in found.items()} == dict.fromkeys(
        found, (1000, 1000)
    )
    for name in ("tune extend", "tune trials", "space show points", "cache fill threads"):
        assert f"ekd-ray {name}" in found


@pytest.mark.parametrize("text", ["1.5", "1e400", "nan", "1e-3", "many", ""])
def test_no_other_number_is_a_whole_one(text):
    with pytest.raises(ValueError, match=r"invalid literal|could not convert"):
        flags.whole_number(text)


def test_a_number_of_seeds_or_auto():
    config = study(*DIGITS, "--seeds", "auto", "--set", "confirm_seeds_cap=6")
    assert (config.confirm_seeds, config.most_seeds) == ("auto", 6)
    with pytest.raises(UserError, match="must be a whole number or auto, got 'many'"):
        study(*DIGITS, "--seeds", "many")


def test_set_fixes_a_setting_which_is_then_not_searched():
    config = study(*DIGITS, "--set", "kd_weight=2", "--set", "lr=5e-4", "--set", "trials=7")
    assert (config.distill.kd_weight, config.distill.lr, config.trials) == (2.0, 5e-4, 7)
    assert set(config.space) == {"ce_weight", "ekd_weight", "evidence", "temperature"}


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("log_prior=null", "log_prior", None),
        ("lr_milestones=[0.5, 0.75]", "lr_milestones", (0.5, 0.75)),
        ("teacher_normalization=0.5,0.5,0.5/1,1,1", "teacher_normalization", "0.5,0.5,0.5/1,1,1"),
    ],
)
def test_set_reads_yaml(text, name, value):
    assert getattr(study(*DIGITS, "--set", text).distill, name) == value


def test_epochs_scale_the_recipe():
    config = study("--pair", "resnet32x4-resnet8x4", "--epochs", 8)
    assert (config.distill.epochs, config.authors["ekd_warmup"]) == (8, 1)
    config = study("--pair", "resnet32x4-resnet8x4")
    assert (config.distill.epochs, config.authors["ekd_warmup"]) == (240, 30)


def test_another_method_drops_what_belongs_to_the_recipes():
    config = study(*DIGITS, "--method", "kd", "--epochs", 8)
    assert config.distill == DistillConfig(
        dataset="digits", teacher="resnet20", student="resnet8", method="kd", epochs=8,
        batch_size=16, lr=0.02, schedule="cosine",
    )  # fmt: skip
    assert set(config.space) == {"ce_weight", "kd_weight", "temperature"}
    assert config.authors == {"temperature": 4.0, "ce_weight": 0.1, "kd_weight": 0.9}
    assert config.first_points == ()


def test_one_run_takes_the_authors_values_unless_set():
    config = one_run("--pair", "resnet110-resnet20")
    assert (config.log_prior, config.kd_weight, config.ekd_weight) == (-0.86, 4.5, 1.0)
    config = one_run("--pair", "resnet110-resnet20", "--set", "kd_weight=2")
    assert (config.kd_weight, config.ekd_weight) == (2.0, 1.0)
    config = one_run(*DIGITS, "--method", "kd")
    assert (config.kd_weight, config.temperature, config.ekd_weight) == (0.9, 4.0, None)


def test_one_run_from_a_file(tmp_path):
    path = tmp_path / "distill.yaml"
    path.write_text(DistillConfig(dataset="digits", lr=0.3).to_yaml())
    config = one_run("--config", path, "--seed", 5, "--set", "kd_weight=2")
    assert config == DistillConfig(dataset="digits", lr=0.3, seed=5, kd_weight=2)


def test_one_run_is_continued_by_its_folder_alone(tmp_path):
    config = one_run(*DIGITS, "--set", "kd_weight=2", "--epochs", 3)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert one_run("--resume", "--out", tmp_path) == config


def test_one_run_searches_nothing():
    with pytest.raises(UserError, match="one run searches nothing: give --set kd_weight a value"):
        one_run(*DIGITS, "--set", "kd_weight=log:1:3")


def test_a_recipe_is_found_by_teacher_and_student_too():
    flags = ("--dataset", "digits", "--teacher", "resnet20", "--student", "resnet8")
    assert study(*flags) == study(*DIGITS)
    other = study("--teacher", "resnet56", "--student", "resnet8")
    assert (other.distill.teacher, other.distill.student) == ("resnet56", "resnet8")
    assert other.authors is None and other.space


@pytest.mark.parametrize(
    "flags", [("--teacher-weights", "t.pt"), ("--set", "teacher_weights=t.pt")], ids=str
)
def test_paths_are_as_seen_from_here(flags, tmp_path, monkeypatch):
    """Trials run in other folders."""
    monkeypatch.chdir(tmp_path)
    assert study(*DIGITS, *flags).distill.teacher_weights == str(tmp_path / "t.pt")


def test_the_data_root_comes_from_the_environment_unless_given(tmp_path, monkeypatch):
    monkeypatch.setenv("EKD_DATA_ROOT", str(tmp_path / "env"))
    assert study(*DIGITS).data_root == str(tmp_path / "env")
    assert study(*DIGITS, "--data-root", tmp_path / "flag").data_root == str(tmp_path / "flag")


@pytest.mark.parametrize(("evidential", "method"), [(True, "evidential"), (False, "none")])
def test_a_teacher_is_a_run_without_a_teacher(evidential, method):
    given = ["--model", "resnet20", "--dataset", "digits", "--epochs", "3"]
    args = parsed(teacher_command, *given, *["--evidential"] * evidential)
    config = request.teacher_request(args).run
    assert (config.student, config.method, config.epochs) == ("resnet20", method, 3)
    assert config.learn_log_prior == evidential


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("kd_weight=log:0.5:20", {"low": 0.5, "high": 20, "log": True}),
        ("batch_size=range:16:64:16", {"low": 16, "high": 64, "step": 16}),
        ("nesterov=choice:true,false", {"choices": [True, False]}),
    ],
)
def test_set_searches_a_range(text, spec):
    name, before = text.partition("=")[0], study(*DIGITS)
    config = study(*DIGITS, "--set", text)
    assert config.space == {**before.space, name: spec}
    assert config.distill == before.distill


def test_set_says_where_in_its_range_to_look_first():
    before = study(*DIGITS)
    config = study(*DIGITS, "--set", "kd_weight=prior:2:high")
    assert [*config.space] == [*before.space]
    prior = {"center": 2, "confidence": "high"}
    assert config.space["kd_weight"] == {**before.space["kd_weight"], "prior": prior}
    with pytest.raises(UserError, match=r"prior:CENTER\[:CONFIDENCE\]"):
        study(*DIGITS, "--set", "kd_weight=prior:2:high:3")


@pytest.mark.parametrize("text", ["trials=5", "epochs=9", "epochs=choice:7,9"])
def test_a_flag_and_another_value_by_set_contradict(text):
    flags = ("--trials", 3, "--epochs", 7)
    assert study(*DIGITS, *flags, "--set", "trials=3", "--set", "epochs=7")
    with pytest.raises(UserError, match="is given twice"):
        study(*DIGITS, *flags, "--set", text)


def test_the_last_set_of_a_setting_stands():
    fixed, searched = "kd_weight=2", "kd_weight=log:1:3"
    assert "kd_weight" not in study(*DIGITS, "--set", searched, "--set", fixed).space
    assert study(*DIGITS, "--set", fixed, "--set", searched).space["kd_weight"]["high"] == 3


def test_extend_adds_to_the_trials_of_the_study(tmp_path):
    told = study(*DIGITS, "--trials", 5).to_dict()
    (tmp_path / "study.yaml").write_text(json.dumps({"study": told}))
    flags = ("--resume", "--out", tmp_path, "--extend", 3)
    assert study(*flags).trials == study(*DIGITS, *flags).trials == 8


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--extend", 3), "add --resume and --out RUN"),
        (("--extend", 3, "--out", "run"), r"add --resume\."),
        (("--extend", 3, "--resume"), "add --out RUN"),
        (("--extend", 0, "--resume", "--out", "run"), "--extend >= 1"),
        (("--extend", 3, "--trials", 4, "--resume", "--out", "run"), "--trials 4"),
    ],
)
def test_bad_extend(flags, words):
    with pytest.raises(UserError, match=words):
        study(*DIGITS, *flags)


@pytest.mark.parametrize("setting", ["lr=fast", "epochs=-1", "validation_fraction=1.5"])
def test_what_a_flag_got_wrong_is_in_no_file(setting, monkeypatch):
    """Of settings, too, that follow the data."""
    info = dataset_info("digits")
    monkeypatch.setattr("ekd_ray.data.dataset_info", lambda *_, **__: info)
    with pytest.raises(UserError) as refused:
        study("--dataset", "folder:pictures", "--set", "image_size=32", "--set", setting)
    assert str(refused.value).startswith(setting.partition("=")[0]), str(refused.value)


def test_a_flag_that_was_given_is_the_first_to_be_blamed():
    args = parsed(tune_command, *DIGITS, "--epochs", 7)
    assert "epochs" in request.study_request(args).studies[""].given


def test_a_continued_run_needs_its_folder_and_no_more(tmp_path):
    with pytest.raises(UserError, match="add --out RUN"):
        study("--resume")
    run = DistillConfig(dataset="digits", student="resnet20", method="none", lr=0.07)
    (tmp_path / "config.yaml").write_text(run.to_yaml())
    args = parsed(teacher_command, "--resume", "--out", tmp_path)
    assert request.teacher_request(args).run == run
    for more in ([], ["--resume", "--evidential"], ["--resume", "--candidates", 2]):
        with pytest.raises(UserError, match="--model NAME"):
            request.teacher_request(parsed(teacher_command, "--out", tmp_path, *more))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kd_weight=log:0.5", "--set kd_weight takes log:LOW:HIGH.* got 'log:0.5'"),
        ("kd_weight=choice:1,,2", "--set kd_weight takes"),
        ("kd_weight=1,2", "kd_weight takes one value, got '1,2'.*kd_weight=choice:A,B"),
        ("kd_weight=choice:", "--set kd_weight takes .* got choice: nothing"),
        ("kd_weight=range:1:", "--set kd_weight takes .* got range:1: nothing"),
        ("kd_weight=choice: 1,2", "--set kd_weight takes .* got choice: '1,2'"),
        ("kd_weight=rang:1:4", "--set kd_weight takes log:LOW:HIGH.* got 'rang:1:4'"),
        ("auto_augment=a,b", "auto_augment takes one value, got 'a,b'.*auto_augment=choice:A,B"),
        ("lr", "--set takes KEY=VALUE, got 'lr'"),
        ("lrr=1", "unknown setting 'lrr'.*Did you mean 'lr'"),
        ("=1", "unknown setting ''"),
        ("teacher_training.epochs=4", r"--set 'teacher_training=\{epochs: VALUE\}'"),
        ("teacher_epochs=4", r"--set 'teacher_training=\{epochs: N\}'"),
        ("temperature=1 .. 4 (log)", "takes log:LOW:HIGH.* got '1 .. 4"),
        ("lr=0.1..0.5", "takes log:LOW:HIGH.* got '0.1..0.5'"),
        ("lr=", "lr must be a number, got None"),
        ("lr=[1", "--set lr"),
    ],
)
def test_bad_set(text, message):
    with pytest.raises(UserError, match=message):
        study(*DIGITS, "--set", text)


def test_dry_run_prints_the_plan_and_leaves_nothing(launch, tmp_path):
    code, out, err = launch("tune_cifar", "--dry-run", *DIGITS, "--epochs", 8, "--trials", 5)
    assert (code, err) == (0, "")
    assert "5 trials" in out and "8 epochs" in out
    assert not list(tmp_path.iterdir())


def test_dry_run_as_json_is_the_configuration(launch):
    code, out, err = launch("tune_cifar", "--dry-run", "--json", *DIGITS, "--trials", 5)
    assert (code, err) == (0, "")
    config = StudyConfig.from_dict(json.loads(out))
    assert (config.trials, config.distill.student) == (5, "resnet8")


def test_a_space_can_be_looked_at(launch, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "distill: {student: resnet8, method: none, batch_size: 32}\n"
        "space: {lr: {low: 0.01, high: 0.1, log: true}, momentum: {choices: [0.5, 0.9]}}\n"
        "first_points: [{lr: 0.05}]\n"
    )
    code, out, err = launch("space", "show", "mine.yaml", "--points", 3)
    assert (code, err) == (0, "")
    assert "0.01 .. 0.1 (log)" in out and "batch_size: 32" in out
    first, again = (
        json.loads(launch("space", "show", "mine.yaml", "--points", 3, "--json")[1])
        for _ in range(2)
    )
    assert first == again and len(first["points"]) == 3
    assert all(0.01 <= point["lr"] <= 0.1 for point in first["points"])
    assert first["distill"]["batch_size"] == 32


@pytest.mark.parametrize(("kind", "name"), [((), "StudyConfig"), (("DistillConfig",), None)])
def test_the_schema_of_recipes_is_printed(kind, name, launch):
    code, out, err = launch("space", "schema", *kind)
    assert (code, err) == (0, "")
    assert json.loads(out)["title"] == (name or kind[0])
