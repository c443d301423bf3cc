"""The user's mistakes end with code 2 and one sentence, before any compute is spent."""

import re

import pytest
from filelock import FileLock
from launchers_run import DIGITS, command
from PIL import Image

from ekd_ray.cli.main import run
from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.config.distill_config import DATASETS
from ekd_ray.errors import UserError, unknown_name
from ekd_ray.results import Bundle, Study
from ekd_ray.studies.training import check_run_folder

ALONE = (*DIGITS, "--method", "none", "--set", "batch_size=16")
NEW = ("--dataset", "digits", "--teacher", "resnet20", "--student")
MISTAKES = [
    (("--dataset", "cifar101", "--pair", "resnet32x4-resnet8x4"), "Did you mean 'cifar10"),
    (("--dataset", "digits", "--pair", "resnet20-resnet9"), "Did you mean 'resnet20-resnet8'"),
    (("--dataset", "digits"), "--pair"),
    ((*NEW, "resnet9"), "'resnet9'"),
    ((*DIGITS, "--trials", 0), "--trials must be >= 1, got 0"),
    ((*DIGITS, "--set", "optimizer=SDG"), "one of sgd, adamw, got 'SDG'. Did you mean 'sgd'?"),
    ((*DIGITS, "--set", "metric=val_acc"), "Did you mean 'val_top1'?"),  # as other tools say
    ((*DIGITS, "--set", "metric=val_loss"), "Did you mean 'val_nll'?"),
    ((*DIGITS, "--set", "tau=4"), "unknown setting 'tau'. Did you mean 'temperature'?"),
    ((*DIGITS, "--learning-rate", 0.1), "--learning-rate is a setting: write --set lr=VALUE"),
    ((*DIGITS, "--num-epochs", 3), "unknown flag '--num-epochs'. Did you mean '--epochs'?"),
    ((*NEW, "timm:resnet50.a1_x"), "unknown timm weights 'resnet50.a1_x'. Did you mean"),
    ((*DIGITS, "--epochs", 0), "--epochs must be >= 1, got 0"),
    ((*DIGITS, "--top-k", 0), "--top-k must be >= 1, got 0"),
    ((*DIGITS, "--gpus-per-worker", -1), "/--gpus-per-worker must be >= 0, got -1"),
    ((*DIGITS, "--gpus-per-trial", "foo"), "--gpus-per-trial/--gpus-per-worker must be a number"),
    ((*DIGITS, "--workers-per-trial", 2, "--set", "batch_size=1"), "workers must be <= 1"),
    ((*DIGITS, "--train-subset", 5000), "train_subset"),
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
        # A network that is trained alone has no teacher, and is offered none.
        (
            "train_teacher",
            ("--dataset", "digits", "--model", "resnet8", "--set", "teachr=x"),
            "Known: teacher_key, ",
        ),
        ("distill", ("--config", "none.yaml"), "cannot read none.yaml"),
        ("distill", (*ALONE, "--workers", "8:2"), "--workers takes N or MIN:MAX"),
        ("distill", (*ALONE, "--workers", 17), "workers must be <= 16"),
        ("distill", (*NEW, "resnet14", "--set", "epochs=1"), "--teacher-weights"),
        ("export_best", ("none", "--out", "best"), "none"),
    ],
)
def test_mistakes_in_the_other_launchers(name, argv, words, launch):
    code, out, err = launch(name, "--dry-run", *argv)
    assert_one_sentence(code, out, err)
    assert words in err


@pytest.mark.parametrize(("got", "meant"), [("name37", True), ("qqqq", False)])
def test_an_unknown_name_lists_the_ten_nearest_only(got, meant):
    message = str(unknown_name("thing", got, [f"name{i}x" for i in range(500)]))
    assert ("Did you mean 'name37x'?" in message) == meant
    listed = message.partition(" Known: ")[2]
    assert listed.count("name") == 10 and listed.endswith(" and 490 others.")


def test_settings_that_nobody_gives_are_not_offered():
    for name in ("fitte", "data_fingerprin"):
        for kind in (DistillConfig, StudyConfig):
            with pytest.raises(UserError) as refused:
                kind.from_dict({name: 1})
            assert not {"fitted", "data_fingerprint"} & {*re.findall(r"\w+", str(refused.value))}


def test_a_command_offers_no_setting_that_it_refuses(launch):
    """A network that is trained alone has no teacher; nor are a flag's dashes a likeness."""
    run = ("train-teacher", "--dataset", "digits", "--model", "resnet8", "--dry-run")
    for flag in ("--teacher", "--method", "--trials"):
        code, out, err = launch(*run, flag, "x")
        assert_one_sentence(code, out, err)
        assert f"unknown flag '{flag}'" in err and "Did you mean" not in err
    assert "write --set lr=" in launch(*run, "--lr", "1")[2]
    code, out, _ = launch("train-teacher", "--list-settings")
    assert code == 0 and " lr " in out
    assert not {"teacher", "method"} & {*re.findall(r"^  (\w+) ", out, re.MULTILINE)}


@pytest.mark.parametrize("kind", [Study, Bundle])
def test_what_load_reads_says_so_when_it_is_made_by_hand(kind):
    with pytest.raises(UserError, match=f"{kind.__name__}.load"):
        kind("runs/x")


def test_the_nearest_name_comes_first_and_a_known_data_set_is_one(launch):
    message = str(unknown_name("thing", "VIT", ["a", "b", "vit"]))
    assert "Did you mean 'vit'? Known: vit, a, b." in message
    _, _, err = launch("tune_cifar", "--dry-run", "--dataset", "vot", "--pair", "x")
    listed = re.search(r"Known: (.*?)\.", err)[1].split(", ")
    assert {*listed} <= {*DATASETS}


def test_a_damaged_teacher(launch, tmp_path):
    (tmp_path / "t.pth").write_bytes(b"PK\x03\x04 torn")
    code, out, err = launch("tune_cifar", "--dry-run", *DIGITS, "--teacher-weights", "t.pth")
    assert_one_sentence(code, out, err)
    assert "t.pth" in err


def test_an_unsuitable_folder_is_refused_before_anything_runs(launch, tmp_path, monkeypatch):
    from ekd_ray.studies import pipeline

    def too_late(*args, **kwargs):
        raise AssertionError("computing has begun")

    for name in ("load_dataset", "train_teacher", "connected", "search"):
        monkeypatch.setattr(pipeline, name, too_late)
    (tmp_path / "out" / "x").mkdir(parents=True)
    code, out, err = launch("tune_cifar", *DIGITS, "--quiet", "--out", tmp_path / "out")
    assert_one_sentence(code, out, err)
    assert "choose another --out" in err


def test_other_errors_keep_their_traceback():
    """Only the user's mistakes are one sentence: a bug must stay visible."""
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 // 0)


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


def test_a_choice_among_one_candidate_is_refused(launch, tmp_path):
    flags = ("--dataset", "synthetic", "--model", "resnet8", "--out", tmp_path / "run")
    code, out, err = launch("train_teacher", *flags, "--choose-by", "val_top1")
    assert_one_sentence(code, out, err)
    assert "--choose-by" in err and not (tmp_path / "run").exists()


def test_a_dry_run_refuses_the_folder_that_the_study_would_refuse(launch, tmp_path):
    (tmp_path / "else.txt").touch()
    for more in ((), ("--resume",)):
        code, out, err = launch("tune_cifar", *DIGITS, "--dry-run", "--out", tmp_path, *more)
        assert_one_sentence(code, out, err)
        assert "holds no study" in err


@pytest.mark.parametrize("several", [(), ("--candidates", 2)])
def test_a_run_that_another_process_trains_is_left_alone(several, launch, tmp_path):
    (tmp_path / ".result.json.tmp").touch()  # of a start that was killed
    flags = ("--dataset", "synthetic", "--model", "resnet8", "--out", tmp_path)
    with FileLock(tmp_path / ".lock"):
        code, out, err = launch("train_teacher", *flags, *several)
        assert_one_sentence(code, out, err)
        assert "is being run by another process" in err
        check_run_folder(tmp_path, DistillConfig(), resume=False)


@pytest.mark.parametrize(
    ("argv", "cure"),
    [
        ((*DIGITS, "--sampler", "gp"), "--set sampler=VALUE"),
        ((*DIGITS, "--weight-decay=0.1"), "--set weight_decay=VALUE"),
        (("--data", "here"), "write folder:here"),
        (("--data", "foldr:here"), "'folder'"),
        (("--data", "folder:here"), "to test/<class>/"),
        (("--data", "folder:split", "--pair", "resnet14-resnet8"), "--teacher T --student S"),
        (("--extend", "2", "--out", "runs/first"), "add --resume"),
    ],
)
def test_a_near_miss_is_told_what_was_meant(argv, cure, launch, tmp_path, monkeypatch):
    sides = [f"split/{side}/{name}" for side in ("train", "test") for name in ("cat", "dog")]
    for folder in ("here/cat", *sides):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "1.png")
    monkeypatch.chdir(tmp_path)
    code, out, err = launch("tune", *argv, "--dry-run")
    assert_one_sentence(code, out, err)
    assert cure in err


def test_a_folder_of_studies_is_told_from_a_study(launch, tmp_path):
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "runs" / "first" / "study.yaml").touch()
    code, out, err = launch("show", tmp_path / "runs")
    assert_one_sentence(code, out, err)
    assert str(tmp_path / "runs" / "first") in err
