"""Recipes: every file in search_spaces/ is a legal study with the authors' values."""

from pathlib import Path

import pytest

from ekd_ray.config import StudyConfig
from ekd_ray.errors import UserError
from ekd_ray.losses.methods import METHODS
from ekd_ray.scale.space import check_space, first_points, point_config
from ekd_ray.studies.fitting import with_epochs
from ekd_ray.studies.recipes import (
    SEARCH_SPACES,
    find_recipe,
    list_recipes,
    load_recipe,
    locate_recipe,
    merge,
)

RECIPES = sorted(SEARCH_SPACES.rglob("*.yaml"))
PAIRS = [p for p in RECIPES if p.parent != SEARCH_SPACES and not p.stem.startswith("_")]

# METHODS.md, section 1, CIFAR-100, both releases: lambda, kd, ekd, warm-up; ce ran as 1.
AUTHORS = {
    "resnet32x4-resnet8x4": (-1.22, 4.5, 4.5, 30),
    "resnet32x4-wrn_16_2": (-1.22, 4.5, 4.5, 30),
    "resnet32x4-wrn_40_2": (-1.22, 4.5, 4.5, 30),
    "resnet110-resnet20": (-0.86, 4.5, 1.0, 30),
    "resnet110-resnet32": (-0.86, 2.5, 2.5, 30),
    "resnet56-resnet20": (-0.93, 3.0, 2.0, 30),
    "wrn_40_2-wrn_16_2": (-1.16, 2.5, 2.5, 30),
    "wrn_40_2-wrn_40_1": (-1.21, 4.5, 2.0, 30),
    "wrn_40_2-resnet8x4": (-1.16, 6.0, 3.0, 30),
    "resnet32x4-ShuffleV2": (-1.22, 4.5, 4.5, 30),
    "wrn_40_2-MobileNetV2": (-1.21, 4.5, 4.5, 150),
    "vgg13-MobileNetV2": (-1.23, 4.5, 3.0, 150),
    "vgg13-vgg8": (-0.60, 4.5, 4.5, 30),
    "ResNet50-MobileNetV2": (-1.10, 4.5, 3.0, 150),
}


def relative(path):
    return str(path.relative_to(SEARCH_SPACES)) if isinstance(path, Path) else str(path)


def study_of(path, epochs=None):
    values = load_recipe(path)
    if epochs is not None:
        values = with_epochs(values, epochs)
    return StudyConfig.from_dict(values, where=str(path))


def write(folder, **texts):
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{next(iter(texts))}.yaml"


@pytest.mark.parametrize("path", RECIPES, ids=relative)
@pytest.mark.parametrize("epochs", [None, 1])
def test_every_recipe_is_a_legal_study(path, epochs):
    study = study_of(path, epochs)
    check_space(study)
    assert study.distill.method in METHODS
    assert epochs in (None, study.distill.epochs)
    for point in first_points(study):
        point_config(study.distill, point)


def test_every_method_searches_its_own_ranges():
    """Those of EKD, which recipes are written for, stand in the recipe that all start from."""
    default = SEARCH_SPACES / "default.yaml"
    for name, method in METHODS.items():
        space = load_recipe(default, name)["space"]
        assert {key: space[key] for key in space if key in method.space} == method.space


@pytest.mark.quick_ids("resnet56-resnet20", "imagenet", "vit/resnet56-DeiT")
@pytest.mark.parametrize("path", PAIRS, ids=relative)
@pytest.mark.parametrize("method", ["ekd", "dkd+ekd", "mlkd+ekd", "ctkd+ekd"])
def test_authors_values_with_a_second_order_are_the_current_releases(path, method):
    """`evidence` is searched: an author's point without it would be drawn with either."""
    values = load_recipe(path, method)
    assert values["authors"]["evidence"] == "softplus"
    assert values["space"]["evidence"] == {"choices": ["softplus", "log1p_softplus"]}
    assert values["space"]["kd_weight"]["low"] == 0.0


@pytest.mark.parametrize("pair", AUTHORS)
def test_authors_values_on_cifar100(pair):
    study = study_of(find_recipe(SEARCH_SPACES, "cifar100", pair))
    log_prior, kd_weight, ekd_weight, warmup = AUTHORS[pair]
    expected = {
        "log_prior": log_prior,
        "temperature": 1.0,
        "ce_weight": 1.0,
        "kd_weight": kd_weight,
        "evidence": "softplus",
        "ekd_weight": ekd_weight,
        "ekd_warmup": warmup,
    }
    assert study.authors == expected
    assert point_config(study.distill, study.authors).ekd_temperature == 1.0
    assert study.distill.teacher_normalization == "cifar100"


@pytest.mark.parametrize(
    "path", [path for path in PAIRS if path.parent.name.startswith("cifar")], ids=relative
)
def test_cifar_recipes_use_the_published_solver(path):
    run = point_config(study_of(path).distill, study_of(path).authors)
    assert (run.optimizer, run.momentum, run.nesterov) == ("sgd", 0.9, False)
    slow = run.student in ("MobileNetV2", "ShuffleV2")
    assert run.lr == (0.01 if slow else 0.05)
    assert (run.weight_decay, run.batch_size, run.epochs) == (5e-4, 64, 240)
    assert (run.schedule, run.lr_decay, run.lr_warmup) == ("step", 0.1, 0)
    assert [part * run.epochs for part in run.lr_milestones] == [150, 180, 210]
    assert (run.evidence, run.ekd_temperature, run.prior_kl_weight) == ("softplus", 1.0, 0.0)


# extends


def test_extends_merges_mappings_and_replaces_values(tmp_path):
    path = write(
        tmp_path,
        child="""
            extends: base.yaml
            description: a child
            distill: {lr: 0.2, seed: 3}
            trials: 9
            first_points: [{lr: 0.3}]
            space: {lr: null, kd_weight: {choices: [1, 2]}}
        """,
        base="""
            description: a base
            distill: {lr: 0.1, epochs: 8}
            trials: 4
            confirm_seeds: 2
            first_points: [{lr: 0.1}, {lr: 0.2}]
            space: {lr: {low: 0.1, high: 1}, kd_weight: {low: 1, high: 9}, ce_weight: {low: 1, high: 2}}
        """,  # noqa: E501
    )
    assert load_recipe(path) == {
        "distill": {"lr": 0.2, "seed": 3, "epochs": 8},
        "trials": 9,
        "confirm_seeds": 2,
        "first_points": [{"lr": 0.3}],
        "space": {"kd_weight": {"choices": [1, 2]}, "ce_weight": {"low": 1, "high": 2}},
    }


def test_a_recipe_of_the_package_is_extended_by_its_name_from_anywhere(tmp_path):
    path = write(tmp_path, mine="extends: vit/resnet56-DeiT_Ti\ntrials: 3")
    assert load_recipe(path) == {**load_recipe("vit/resnet56-DeiT_Ti"), "trials": 3}
    write(tmp_path, default="trials: 7")  # a file beside it is not what is named
    write(tmp_path, other="extends: default.yaml")
    write(tmp_path, default2="extends: default")
    assert load_recipe(tmp_path / "other.yaml") == {"trials": 7}
    assert load_recipe(tmp_path / "default2.yaml") == load_recipe("default")


def test_an_unknown_name_is_refused_where_it_stands(tmp_path):
    path = write(tmp_path, mine="trials: 3\nextends: vit/resnet56-DeiT")
    with pytest.raises(UserError, match=r"mine.yaml:2: unknown recipe.*mean 'vit/resnet56-DeiT_Ti"):
        load_recipe(path)


@pytest.mark.slow
def test_a_copy_of_any_recipe_says_the_same_elsewhere(tmp_path):
    """Because they extend each other by name."""
    for name in list_recipes():
        copy = tmp_path / "copy.yaml"
        copy.write_text(locate_recipe(name).read_text())
        assert load_recipe(copy) == load_recipe(name)


@pytest.mark.parametrize(
    ("home", "pair", "found"),
    [
        ("cifar10", "vgg13-vgg8", "cifar10/vgg13-vgg8"),
        (None, "vgg13-vgg8", "cifar100/vgg13-vgg8"),
        (None, "resnet20-resnet8", "digits/resnet20-resnet8"),
        (None, "cifar10/vgg13-vgg8", "cifar10/vgg13-vgg8"),
        ("digits", "vit/resnet56-DeiT_Ti", "vit/resnet56-DeiT_Ti"),
    ],
)
def test_a_pair_is_found_by_its_home_or_wherever_it_is(home, pair, found):
    assert find_recipe(SEARCH_SPACES, home, pair) == SEARCH_SPACES / f"{found}.yaml"


def test_a_pair_that_is_elsewhere_is_refused_with_its_place():
    with pytest.raises(UserError, match=r"for cifar10 'resnet20-resnet8'.*digits/resnet20-resnet8"):
        find_recipe(SEARCH_SPACES, "cifar10", "resnet20-resnet8")


@pytest.mark.parametrize("name", ["folder:pictures", "hf:data", "cifar10"])
def test_a_data_set_in_the_place_of_a_pair_is_told_from_one(name):
    with pytest.raises(UserError, match="names a data set"):
        find_recipe(SEARCH_SPACES, None, name)


def test_a_circle_of_extends_is_refused(tmp_path):
    path = write(tmp_path, a="extends: b.yaml", b="extends: c.yaml", c="extends: a.yaml")
    with pytest.raises(UserError, match="circle") as refused:
        load_recipe(path)
    assert all(f"{name}.yaml" in str(refused.value) for name in "abc")
    with pytest.raises(UserError, match="circle"):
        load_recipe(write(tmp_path, me="extends: me.yaml"))


def test_merge_changes_neither_side_and_never_mixes_ranges():
    base = {"space": {"lr": {"low": 1, "high": 2}}, "distill": {"seed": 1}}
    changes = {"space": {"lr": {"choices": [1]}}, "distill": {"lr": 3}}
    merged = merge(base, changes)
    assert merged == {"space": {"lr": {"choices": [1]}}, "distill": {"seed": 1, "lr": 3}}
    assert base == {"space": {"lr": {"low": 1, "high": 2}}, "distill": {"seed": 1}}
    assert changes == {"space": {"lr": {"choices": [1]}}, "distill": {"lr": 3}}


# Other budgets


@pytest.mark.parametrize(
    ("before", "after", "warmup", "scaled"),
    [
        (240, 120, 30, 15),
        (240, 1, 30, 1),  # a warm-up stays one
        (240, 480, 30, 60),
        (240, 8, 0, 0),  # none stays none
        (240, 240, 30, 30),
    ],
)
@pytest.mark.parametrize("name", ["ekd_warmup", "lr_warmup"])
def test_warm_ups_scale_with_the_budget(name, before, after, warmup, scaled):
    values = {
        "distill": {"epochs": before, name: warmup, "batch_size": 64},
        "authors": {name: warmup, "kd_weight": 30.0},
        "first_points": [{name: warmup, "lr": 30.0}],
        "trials": 30,
    }
    result = with_epochs(values, after)
    assert result["distill"] == {"epochs": after, name: scaled, "batch_size": 64}
    assert result["authors"] == {name: scaled, "kd_weight": 30.0}
    assert list(result["first_points"]) == [{name: scaled, "lr": 30.0}]
    assert result["trials"] == 30
    assert values["distill"]["epochs"] == before and values["authors"][name] == warmup


@pytest.mark.parametrize(
    ("entry", "scaled"),
    [
        ({"low": 10, "high": 60}, {"low": 1, "high": 2}),
        ({"low": 0, "high": 240}, {"low": 0, "high": 8}),
        ({"low": 30, "high": 240, "log": True}, {"low": 1, "high": 8, "log": True}),
        ({"low": 30, "high": 240, "step": 30}, {"low": 1, "high": 8, "step": 1}),
        ({"choices": [0, 30, 60, 120]}, {"choices": [0, 1, 2, 4]}),
        ({"choices": [None, 10, 20, 240]}, {"choices": [None, 1, 8]}),  # no choice twice
        # What is refused later is left as it is.
        ({"low": float("inf"), "high": 10**400}, {"low": float("inf"), "high": 10**400}),
        ({"choices": [[30], 30]}, {"choices": [[30], 30]}),
        (
            {"low": 30, "high": 60, "when": {"batch_size": [64, 128]}},
            {"low": 1, "high": 2, "when": {"batch_size": [64, 128]}},
        ),
    ],
)
def test_ranges_scale_with_the_budget(entry, scaled):
    values = {"space": {"ekd_warmup": entry, "lr": {"low": 30}}}  # 240 epochs are the default
    assert with_epochs(values, 8)["space"] == {"ekd_warmup": scaled, "lr": {"low": 30}}


@pytest.mark.parametrize("epochs", [None, 8])
@pytest.mark.parametrize(
    "text",
    [
        "distill: 5",
        "distill: {epochs: many}",
        "distill: {epochs: 0}\nauthors: {ekd_warmup: 3}",
        "distill: {epochs: 240}\nfirst_points: [3]",
        "distill: {epochs: 240}\nspace: [lr]",
    ],
)
def test_sections_of_a_wrong_kind_are_refused_in_one_sentence(text, epochs, tmp_path):
    """Under another budget too, which looks into the sections before they are checked."""
    with pytest.raises(UserError):
        study_of(write(tmp_path, odd=text), epochs)
