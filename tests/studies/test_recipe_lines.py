"""A mistake in a recipe is told with the file and the line on which it stands."""

import pytest
import yaml

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.errors import UserError
from ekd_ray.studies.overlay import Given, lay_over
from ekd_ray.studies.recipes import Recipe

BASE = """\
description: what the recipes of this test share
distill:
  dataset: digits
  teacher: resnet20
  student: resnet8
  lr: 0.1
  epochs: 8
space:
  kd_weight: {low: 0.5, high: 20, log: true}
  evidence:
    choices:
      - relu
      - exp
  ekd_weight:
    low: 1
    high: 9
    step: 2
    when: {evidence: relu}
  ekd_warmup: {low: 0, high: 8}
authors:
  kd_weight: 4.5
  evidence: relu
first_points:
  - kd_weight: 1
  - kd_weight: 2
    evidence: exp
trials: 4
methods:
  kd:
    authors:
      temperature: 4
  dkd:
    distill:
      ce_weight: 1
    space:
      dkd_beta: {low: 1, high: 8}
    authors:
      dkd_beta: 8
    first_points:
      - dkd_beta: 2
  any:
    distill: {method: ekd}
    space:
      method: {choices: [ekd, kd]}
      temperature: {low: 1, high: 5, when: {method: kd}}
      log_prior: {low: -2, high: 2, when: {method: ekd}}
"""
CHILD = """\
# A recipe with a base.
extends: base.yaml
distill:
  seed: 3
space:
  batch_size:
    choices: [32, 64]
baselines: [none]
"""
TEXTS = {"base": BASE, "child": CHILD}

# The line with "#!" is the one that the error must name.
MISTAKES = {
    "bound": ("base", "lr: 0.1", "lr: -1 #!", "lr must be > 0, got -1"),
    "type": ("base", "epochs: 8", "epochs: many #!", "epochs must be a whole number, got 'many'"),
    "nested": ("base", "epochs: 8", "lr_milestones:\n    - 0.5\n    - x #!", "lr_milestones[1]"),
    "order": ("base", "epochs: 8", "lr_min: 5 #!", "lr_min must be <= lr (0.1), got 5"),
    "unused": ("base", "epochs: 8", "dkd_beta: 3 #!", "dkd_beta is not used by method 'ekd'"),
    "method": ("base", "epochs: 8", "method: edk #!", "unknown method 'edk'"),
    "low > high": ("base", "low: 1\n", "low: 10 #!\n", "space.ekd_weight: low must be <= high (9)"),
    "not a number": ("base", "high: 9", "high: [9] #!", "space.ekd_weight.high must be a number"),
    "an item": ("base", "- exp", "- rleu #!", "evidence must be one of"),
    "when": ("base", "{evidence: relu}", "\n      evidence: rleu #!", "asks for evidence = rleu"),
    "authors": ("base", "kd_weight: 4.5", "kd_weight: 45 #!", "first point has kd_weight = 45"),
    "authors' bound": ("base", "kd_weight: 4.5", "lr: 0 #!", "lr must be > 0, got 0"),
    "point of a kind": ("base", "- kd_weight: 1", "- kd_weight: {a: 1} #!", "kd_weight = {'a': 1}"),
    "section": ("base", "trials: 4", "teacher_training: 5 #!", "teacher_training must be"),
    "another value": ("child", "seed: 3", "seed: 3\n  lr: -1 #!", "lr must be > 0, got -1"),
    "searched": ("child", "batch_size:", "batchsize: #!", "unknown searched setting 'batchsize'"),
    "points": ("child", "baselines: [none]", "first_points: [5] #!", "first_points must be a list"),
    "extends": ("child", "extends: base.yaml", "extends: 3 #!", "extends must be a file name"),
    "table": ("base", "ce_weight: 1", "ce_weight: -1 #!", "ce_weight must be >= 0, got -1"),
    "table's authors": ("base", "beta: 8", "beta: 80 #!", "first point has dkd_beta = 80"),
    "table's key": ("base", "dkd:\n", "dkd:\n    spcae: 1 #!\n", "key in methods.dkd: 'spcae'"),
    "table in the child": (
        "child", "baselines: [none]", "methods: {dkd: {distill: {\n  lr: -1}}} #!", "lr must be > 0"
    ),
    "another's authors": ("base", "temperature: 4", "temperature: 9 #!", "has temperature = 9"),
}  # fmt: skip
METHOD = {"another's authors": "any"}


def write(folder, file=None, old="", new=""):
    """The two recipes, one of them with a mistake; returns the line that is marked."""
    texts = dict(TEXTS)
    if file:
        assert texts[file].count(old) == 1, old
        texts[file] = texts[file].replace(old, new)
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    marked = [i for i, line in enumerate(texts[file or "base"].splitlines(), 1) if "#!" in line]
    return marked[0] if marked else None


def assert_placed(done, path, line, words):
    code, out, err = done
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {path}:{line}: ") and words in err, err
    assert err.count("\n") == 1 and err.count(".yaml") == 1, err


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_told_with_its_line(case, launch, tmp_path):
    file, old, new, words = MISTAKES[case]
    line = write(tmp_path, file, old, new)
    method = METHOD.get(case, "dkd" if case.startswith("table") else None)
    flags = ("--method", method) if method else ()
    assert_placed(launch("space", "show", "child.yaml", *flags), f"{file}.yaml", line, words)


def test_the_recipes_are_sound_without_the_mistakes(launch, tmp_path):
    write(tmp_path)
    for flags in ((), ("--method", "dkd"), ("--method", "any")):
        code, _, err = launch("space", "show", "child.yaml", *flags)
        assert (code, err) == (0, "")


@pytest.mark.parametrize("flags", [(), ("--methods", "ekd,dkd"), ("--epochs", 4)])
@pytest.mark.parametrize("case", ["bound", "low > high", "another value", "type"])
def test_a_study_says_the_line_under_flags_too(case, flags, launch, tmp_path):
    """The flags change other settings than the one that is wrong, or stumble over it."""
    file, old, new, words = MISTAKES[case]
    line = write(tmp_path, file, old, new)
    done = launch("tune_cifar", "--dry-run", "--space", "child.yaml", *flags)
    assert_placed(done, f"{file}.yaml", line, words)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("student: resnet8", "student: resnet9 #!", "unknown model 'resnet9'"),
        ("dataset: digits", "dataset: digitz #!", "unknown dataset 'digitz'"),
        ("lr: 0.1", "validation_fraction: 0 #!", "validation_fraction must be > 0"),
        ("trials: 4", "sampler: grid\nscheduler: none", "kd_weight has endlessly many values"),
        ("trials: 4", "sampler: gp #!", "sampler gp learns only from trials of full length"),
    ],
)
def test_names_that_only_a_study_looks_up(old, new, words, launch, tmp_path):
    line = write(tmp_path, "base", old, new) or 9  # kd_weight's range
    done = launch("tune_cifar", "--dry-run", "--space", "child.yaml")
    assert_placed(done, "base.yaml", line, words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--set", "lr=-2"), "lr must be > 0, got -2"),
        (("--set", "kd_weight=range:5:1"), "space.kd_weight: low must be <= high (1), got 5"),
        (("--set", "batch_size=choice:0,32"), "batch_size must be >= 1, got 0"),
        (("--set", "first_points=[{kd_weight: 50}]"), "first point has kd_weight = 50"),
        (("--student", "resnet9"), "unknown model 'resnet9'"),
        (("--set", "dkd_beta=3"), "dkd_beta is not used by method 'ekd'"),
        (("--trials", 0), "trials must be >= 1, got 0"),
        (("--method", "edk"), "unknown method 'edk'"),
    ],
    ids=str,
)
def test_the_mistake_of_a_flag_has_no_line(flags, words, launch, tmp_path):
    write(tmp_path)
    code, out, err = launch("tune_cifar", "--dry-run", "--space", "child.yaml", *flags)
    assert (code, out) == (2, "") and err.startswith("error: ") and words in err
    assert ".yaml" not in err


@pytest.mark.parametrize(
    ("old", "new", "flag", "words"),
    [
        ("lr: 0.1", "lr: -1", "lr=-2", "lr must be > 0, got -2"),
        ("low: 0.5", "low: 50", "kd_weight=range:5:1", "low must be <= high (1), got 5"),
        ("trials: 4", "trials: 0", "trials=-1", "trials must be >= 1, got -1"),
    ],
)
def test_a_flag_over_a_mistake_of_the_recipe_has_no_line(old, new, flag, words, launch, tmp_path):
    write(tmp_path, "base", old, new)
    code, _, err = launch("tune_cifar", "--dry-run", "--space", "child.yaml", "--set", flag)
    assert code == 2 and words in err and ".yaml" not in err


def test_a_scaled_warm_up_is_on_no_line(launch, tmp_path):
    """The values of the message are then nowhere in the file."""
    write(tmp_path, "base", "{low: 0, high: 8}", "{low: 9, high: 4}")
    code, _, err = launch("tune_cifar", "--dry-run", "--space", "child.yaml", "--epochs", 16)
    assert code == 2
    assert err == "error: space.ekd_warmup: low must be <= high (8), got 18.\n"


@pytest.mark.parametrize("case", ["bound", "authors' bound"])
def test_one_run_of_a_recipe(case, launch, tmp_path):
    file, old, new, words = MISTAKES[case]
    line = write(tmp_path, file, old, new)
    done = launch("distill", "--dry-run", "--space", "child.yaml")
    assert_placed(done, f"{file}.yaml", line, words)


def test_a_config_file(launch, tmp_path):
    (tmp_path / "run.yaml").write_text(DistillConfig(dataset="digits").to_yaml())
    lines = (tmp_path / "run.yaml").read_text().splitlines()
    number = lines.index("epochs: 240") + 1
    (tmp_path / "run.yaml").write_text("\n".join(lines).replace("epochs: 240", "epochs: 0"))
    done = launch("distill", "--dry-run", "--config", "run.yaml")
    assert_placed(done, "run.yaml", number, "epochs must be >= 1, got 0")
    (tmp_path / "run.yaml").write_text("dataset: digits")
    code, _, err = launch("distill", "--dry-run", "--config", "run.yaml", "--epochs", 0)
    assert (code, err) == (2, "error: --epochs must be >= 1, got 0.\n")


def test_a_number_of_the_flags_that_nobody_could_write(tmp_path):
    (tmp_path / "recipe.yaml").write_text("trials: 5")
    recipe = lay_over(Recipe.load(tmp_path / "recipe.yaml"), Given(settings={"trials": 10**5000}))
    with pytest.raises(UserError, match="trials"), recipe.locate_errors():
        _ = recipe.config


def test_a_study_that_is_continued(launch, tmp_path):
    study = StudyConfig(space={"lr": {"low": 2, "high": 1}}, trials=7)
    header = yaml.safe_dump({"format_version": 1, "study": study.to_dict()}, sort_keys=False)
    (tmp_path / "study.yaml").write_text(header)
    number = header.splitlines().index("      low: 2") + 1
    done = launch("tune_cifar", "--dry-run", "--resume", "--out", ".")
    assert_placed(done, "study.yaml", number, "space.lr: low must be <= high (1), got 2")
