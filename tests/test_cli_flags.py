"""The launchers' flags, how they become a configuration, and how mistakes end."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ekd_ray
from ekd_ray import cli
from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.errors import UserError

ROOT = Path(ekd_ray.__file__).parent.parent
LAUNCHERS = ROOT / "launchers"

SHARED = {
    "--help",
    "--dataset",
    "--data",
    "--ood-dataset",
    "--set",
    "--epochs",
    "--train-subset",
    "--seed",
    "--out",
    "--data-root",
    "--download",
    "--cpus-per-trial",
    "--resume",
    "--dry-run",
    "--quiet",
    "--json",
}
PAIR = {
    "--pair",
    "--teacher",
    "--student",
    "--teacher-weights",
    "--teacher-zoo",
    "--teacher-normalization",
    "--method",
    "--space",
}
SEARCH = {
    "--pairs",
    "--methods",
    "--trials",
    "--seeds",
    "--top-k",
    "--max-concurrent",
    "--workers-per-trial",
    "--gpus-per-trial",
}
FLAGS = {
    "train_teacher": SHARED | {"--model", "--evidential", "--test"},
    "distill": SHARED | PAIR | {"--config", "--test"},
    "tune_cifar": SHARED | PAIR | SEARCH,
    "tune_imagenet": SHARED | PAIR | SEARCH,
    "tune_vit": SHARED | PAIR | SEARCH,
    "cache": {"--help"},
    "export_best": {"--help", "--out", "--data-root", "--verify", "--dry-run", "--quiet", "--json"},
}
DIGITS = ("--dataset", "digits", "--pair", "resnet20-resnet8")


def command(name, *argv):
    """A launcher in its own process."""
    return subprocess.run(
        [sys.executable, str(LAUNCHERS / f"{name}.py"), *argv],
        capture_output=True, text=True, timeout=120,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture
def launch(monkeypatch, capsys, tmp_path):
    """A launcher in this process: (exit code, stdout, stderr). It starts no training."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EKD_DATA_ROOT", raising=False)

    def run(name, *argv):
        spec = importlib.util.spec_from_file_location(name, LAUNCHERS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.run(module.main)
        captured = capsys.readouterr()
        return left.value.code, captured.out, captured.err

    return run


def study(*argv):
    return cli.study_config(cli.parser("test", search=True).parse_args([*map(str, argv)]))


def one_run(*argv):
    parser = cli.parser("test")
    parser.add_argument("--config")
    return cli.distill_config(parser.parse_args([*map(str, argv)]))


# The surface


def test_there_is_a_line_for_every_launcher():
    assert {path.stem for path in LAUNCHERS.glob("*.py")} == set(FLAGS)


@pytest.mark.parametrize("name", FLAGS)
def test_the_flags_are_frozen(name):
    done = command(name, "--help")
    assert done.returncode == 0 and not done.stderr
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", done.stdout)) == FLAGS[name]


# From flags to a configuration


def test_flags_override_the_recipe():
    config = study(
        *DIGITS, "--student", "resnet14", "--train-subset", 500, "--seed", 3, "--trials", 5,
        "--seeds", 4, "--top-k", 6, "--max-concurrent", 2, "--workers-per-trial", 2,
        "--cpus-per-trial", 3, "--gpus-per-trial", 0.5, "--teacher-normalization", "half",
    )  # fmt: skip
    run = config.distill
    assert (run.dataset, run.teacher, run.student) == ("digits", "resnet20", "resnet14")
    assert (run.train_subset, run.seed, config.seed) == (500, 3, 3)
    assert run.teacher_normalization == "half"
    assert (config.trials, config.confirm_seeds, config.confirm_top_k) == (5, 4, 6)
    assert (config.max_concurrent, config.workers_per_trial) == (2, 2)
    assert (config.cpus_per_trial, config.gpus_per_trial) == (3, 0.5)
    assert (run.batch_size, run.schedule) == (16, "cosine"), "the rest is the recipe's"


def test_without_flags_the_recipe_stands():
    config = study(*DIGITS)
    assert (config.trials, config.confirm_seeds, config.distill.epochs) == (12, 3, 9)
    assert set(config.space) == {"ce_weight", "kd_weight", "ekd_weight", "temperature"}


def test_set_fixes_a_setting_which_is_then_not_searched():
    config = study(*DIGITS, "--set", "kd_weight=2", "--set", "lr=5e-4", "--set", "trials=7")
    assert (config.distill.kd_weight, config.distill.lr, config.trials) == (2.0, 5e-4, 7)
    assert set(config.space) == {"ce_weight", "ekd_weight", "temperature"}


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("evidence=relu", "evidence", "relu"),
        ("learn_log_prior=true", "learn_log_prior", True),
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


def test_the_recipes_own_method_changes_nothing():
    assert study(*DIGITS, "--method", "ekd") == study(*DIGITS)


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
    parser = cli.parser("test", pair=False)
    parser.add_argument("--model")
    parser.add_argument("--evidential", action="store_true")
    flags = ["--model", "resnet20", "--dataset", "digits", "--epochs", "3"]
    config = cli.teacher_run_config(parser.parse_args(flags + ["--evidential"] * evidential))
    assert (config.student, config.method, config.epochs) == ("resnet20", method, 3)
    assert config.learn_log_prior == evidential


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr", "--set takes KEY=VALUE, got 'lr'"),
        ("lrr=1", "unknown setting in --set: 'lrr'.*Did you mean 'lr'"),
        ("=1", "unknown setting in --set"),
        ("lr=abc", "lr must be a number, got 'abc'"),
        ("lr=-1", "lr must be > 0, got -1"),
        ("lr=.nan", "lr must be a finite number"),
        ("lr=", "lr must be a number, got None"),
        ("lr=[1", "--set lr"),
        ("epochs=1.5", "epochs must be a whole number, got 1.5"),
        ("evidence=rleu", "evidence must be one of"),
    ],
)
def test_bad_set(text, message):
    with pytest.raises(UserError, match=message):
        study(*DIGITS, "--set", text)


# Mistakes end with code 2 and one sentence

BAD_SPACES = {
    "key": ("trails: 3", "Did you mean 'trials'"),
    "setting": ("distill: {lrr: 1}", "Did you mean 'lr'"),
    "searched": ("space: {kd_wieght: {low: 1, high: 2}}", "Did you mean 'kd_weight'"),
    "empty": ("space: {}", "search space is empty"),
    "null": ("space: null", "search space is empty"),
    "swapped": ("space: {lr: {low: 2, high: 1}}", "low must be <= high (1), got 2"),
    "nan": ("space: {lr: {low: .nan, high: 1}}", "lr"),
    "step": ("space: {lr: {low: 0.1, high: 1, step: 0}}", "step"),
    "bound": ("space: {lr: {low: 0, high: 1}}", "lr must be > 0, got 0"),
    "syntax": ("space: {lr: [", "space.yaml:"),
    "twice": ("trials: 1\ntrials: 2", "space.yaml:2: duplicate key 'trials'"),
    "list": ("- 1", "must hold a YAML mapping"),
    "extends": ("extends: none.yaml", "none.yaml"),
}


@pytest.mark.parametrize("case", BAD_SPACES)
def test_mistakes_in_a_space_file(case, launch, tmp_path):
    text, words = BAD_SPACES[case]
    (tmp_path / "space.yaml").write_text(text)
    code, out, err = launch(
        "tune_cifar", "--dry-run", "--space", tmp_path / "space.yaml", "--dataset", "digits",
        "--teacher", "resnet20", "--student", "resnet8",
    )  # fmt: skip
    assert_one_sentence(code, out, err)
    assert words in err


NEW = ("--dataset", "digits", "--teacher", "resnet20", "--student")
MISTAKES = [
    (("--dataset", "cifar101", "--pair", "resnet32x4-resnet8x4"), "Did you mean 'cifar10"),
    (("--dataset", "digit", "--teacher", "resnet20", "--student", "resnet8"), "'digits'"),
    (("--dataset", "digits", "--pair", "resnet20-resnet9"), "Did you mean 'resnet20-resnet8'"),
    (("--dataset", "digits"), "--pair"),
    ((*NEW, "resnet9"), "'resnet9'"),
    ((*DIGITS, "--teacher", "resnet21"), "'resnet21'"),
    ((*DIGITS, "--method", "edk"), "'edk'"),
    ((*DIGITS, "--set", "method=edk"), "'edk'"),
    ((*DIGITS, "--trials", 0), "trials must be >= 1, got 0"),
    ((*DIGITS, "--epochs", 0), "epochs must be >= 1, got 0"),
    ((*DIGITS, "--epochs", -3), "epochs must be >= 1, got -3"),
    ((*DIGITS, "--seeds", 0), "confirm_seeds must be >= 1, got 0"),
    ((*DIGITS, "--top-k", 0), "confirm_top_k must be >= 1, got 0"),
    ((*DIGITS, "--max-concurrent", 0), "max_concurrent must be >= 1, got 0"),
    ((*DIGITS, "--workers-per-trial", 0), "workers_per_trial must be >= 1, got 0"),
    ((*DIGITS, "--cpus-per-trial", 0), "cpus_per_trial must be >= 1, got 0"),
    ((*DIGITS, "--gpus-per-trial", -1), "gpus_per_trial must be >= 0, got -1"),
    ((*DIGITS, "--train-subset", 0), "train_subset must be >= 1, got 0"),
    ((*DIGITS, "--train-subset", 5000), "train_subset"),
    ((*DIGITS, "--seed", -1), "seed must be >= 0, got -1"),
    ((*DIGITS, "--set", "validation_fraction=0"), "validation_fraction must be > 0"),
    ((*DIGITS, "--teacher-weights", "none.safetensors"), "none.safetensors"),
    ((*NEW, "resnet14"), "--teacher-weights"),
    (("--space", "none.yaml"), "cannot read none.yaml"),
    (("--dataset", "cifar10", "--pair", "resnet56a-resnet8", "--data-root", "."), "--data-root"),
]


def assert_one_sentence(code, out, err):
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert "Traceback" not in err


@pytest.mark.parametrize(("argv", "words"), MISTAKES, ids=lambda value: str(value)[-40:])
def test_mistakes_end_with_one_sentence(argv, words, launch, tmp_path):
    code, out, err = launch("tune_cifar", "--dry-run", *argv)
    assert_one_sentence(code, out, err)
    assert words in err
    assert not list(tmp_path.iterdir()), "a refused plan leaves nothing behind"


@pytest.mark.parametrize(
    ("name", "argv", "words"),
    [
        ("train_teacher", ("--dataset", "digits", "--model", "resnet9"), "'resnet9'"),
        ("train_teacher", ("--dataset", "digits", "--model", "resnet8", "--epochs", 0), "epochs"),
        ("train_teacher", ("--dataset", "cifar10", "--model", "resnet8"), "--data-root"),
        ("distill", ("--config", "none.yaml"), "cannot read none.yaml"),
        ("distill", (*DIGITS,), "--teacher-weights"),
        ("export_best", ("none", "--out", "best"), "none"),
    ],
)
def test_mistakes_in_the_other_launchers(name, argv, words, launch):
    code, out, err = launch(name, "--dry-run", *argv)
    assert_one_sentence(code, out, err)
    assert words in err


@pytest.mark.parametrize("content", [b"no weights", b"", b"PK\x03\x04 torn"])
def test_a_damaged_teacher(content, launch, tmp_path):
    (tmp_path / "t.pth").write_bytes(content)
    code, out, err = launch("tune_cifar", "--dry-run", *DIGITS, "--teacher-weights", "t.pth")
    assert_one_sentence(code, out, err)
    assert "t.pth" in err


@pytest.mark.parametrize(
    ("prepare", "flags", "words"),
    [
        (lambda out: out.write_text("a file"), (), "choose another --out"),
        (lambda out: (out / "x").mkdir(parents=True), (), "choose another --out"),
        (lambda out: None, ("--resume",), "no study to resume"),
    ],
)
def test_an_unsuitable_folder_is_refused_before_anything_runs(
    prepare, flags, words, launch, tmp_path, monkeypatch
):
    from ekd_ray import pipeline

    def too_late(*args, **kwargs):
        raise AssertionError("computing has begun")

    for name in ("load_dataset", "train_teacher", "connected", "search"):
        monkeypatch.setattr(pipeline, name, too_late)
    prepare(tmp_path / "out")
    code, out, err = launch("tune_cifar", *DIGITS, "--quiet", "--out", tmp_path / "out", *flags)
    assert_one_sentence(code, out, err)
    assert words in err


def test_an_interrupt_names_the_cure(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as left:
        cli.run(main)
    assert left.value.code == 130
    assert "--resume" in capsys.readouterr().err


def test_other_errors_keep_their_traceback():
    """Only the user's mistakes are one sentence: a bug must stay visible."""
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: 1 // 0)


def test_dry_run_prints_the_plan_and_leaves_nothing(launch, tmp_path):
    code, out, err = launch("tune_cifar", "--dry-run", *DIGITS, "--epochs", 8, "--trials", 5)
    assert (code, err) == (0, "")
    for words in ("digits", "resnet8", "resnet20", "5 trials", "8 epochs", "kd_weight", "estimate"):
        assert words in out
    assert not list(tmp_path.iterdir())


def test_dry_run_as_json_is_the_configuration(launch):
    code, out, err = launch("tune_cifar", "--dry-run", "--json", *DIGITS, "--trials", 5)
    assert (code, err) == (0, "")
    config = StudyConfig.from_dict(json.loads(out))
    assert (config.trials, config.distill.student) == (5, "resnet8")


@pytest.mark.parametrize(
    "argv",
    [
        ("--dataset", "digits", "--pair", "resnet20-resnet9"),
        (*DIGITS, "--teacher-weights", "/none/there.safetensors"),
    ],
    ids=["light", "heavy"],
)
def test_nothing_but_the_sentence_in_a_process_of_its_own(argv):
    """No warning of any library beside it."""
    done = command("tune_cifar", "--dry-run", *argv)
    assert_one_sentence(done.returncode, done.stdout, done.stderr)
