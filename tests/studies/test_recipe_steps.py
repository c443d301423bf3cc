"""Every recipe is legal under every method, and takes a training step under its own."""

import json

import pytest
import torch

from ekd_ray.config import StudyConfig
from ekd_ray.data import dataset_info
from ekd_ray.engine.learner import Learner, make_optimizer
from ekd_ray.engine.resolve import student_size
from ekd_ray.engine.teacher.source import TeacherOutputs
from ekd_ray.losses.methods import METHODS, method_of, resolve_method
from ekd_ray.losses.objective import Objective
from ekd_ray.models import build_model
from ekd_ray.scale.space import Space, check_space, first_points, point_config
from ekd_ray.studies.recipes import SEARCH_SPACES, Recipe, load_recipe

RECIPES = sorted(p for p in SEARCH_SPACES.rglob("*.yaml") if not p.stem.startswith("_"))
PAIRS = [path for path in RECIPES if path.parent != SEARCH_SPACES]
QUICK = ("digits", "cifar100/resnet56-resnet20", "folder/fine-tune", "vit/resnet56-DeiT")
VARIANTS = sorted({*METHODS, *Recipe.load(SEARCH_SPACES / "default.yaml").written["methods"]})


def relative(path):
    return str(path.relative_to(SEARCH_SPACES))


def study_of(path, method=None):
    return StudyConfig.from_dict(load_recipe(path, method), where=str(path))


NAMES = ("dataset", "teacher", "student", "teacher_normalization")  # no method looks at them


@pytest.fixture(scope="module")
def check_once():
    """`check_space` of a study, whose space is sampled once however many pairs share it."""
    seen = set()

    def check(study):
        run = {name: v for name, v in study.distill.to_dict().items() if name not in NAMES}
        key = json.dumps([run, study.space])
        if key not in seen:
            check_space(study)
        seen.add(key)
        for point in first_points(study):
            Space(study.space).searched_part(point)

    return check


@pytest.mark.quick_ids(*QUICK)
@pytest.mark.parametrize("path", RECIPES, ids=relative)
def test_every_recipe_is_legal_under_every_method(path, check_once):
    recipe = Recipe.load(path)
    for method in VARIANTS:
        study = recipe.under(method).config
        check_once(study)
        wanted = "ekd" if method == "any" else method.removesuffix("-standardized")
        assert study.distill.method == wanted
        assert study.distill.standardize == method.endswith("-standardized")
        points = first_points(study)
        has_points = method_of(study.distill).needs_teacher and path in PAIRS
        assert bool(points) or not has_points, method
        for point in points:
            resolve_method(point_config(study.distill, point))


# METHODS.md, section 4, and the released configurations of RLD for ImageNet.
PUBLISHED = {
    ("cifar100/vgg13-vgg8", "ttm"): {"kd_weight": 45.0, "ttm_exponent": 0.1, "ce_weight": 1.0},
    ("cifar100/resnet32x4-resnet8x4", "wkd"): {
        "wkd_weight": 600.0, "temperature": 8.0, "wkd_sharpen": 1.0, "wkd_decay": 150,
    },
    ("imagenet/resnet34-resnet18", "wkd"): {
        "wkd_weight": 30.0, "temperature": 2.0, "wkd_sharpen": 1.0, "wkd_decay": 100,
    },
    ("imagenet/resnet50-mobilenetv1", "wkd"): {
        "wkd_weight": 25.0, "temperature": 2.0, "wkd_sharpen": 2.0,
    },
    ("cifar100/vgg13-vgg8", "dist"): {"dist_inter": 2.0, "dist_intra": 2.0, "temperature": 4.0},
    ("imagenet/resnet34-resnet18", "dist"): {
        "dist_inter": 1.0, "dist_intra": 1.0, "temperature": 1.0,
    },
    ("cifar100/vgg13-vgg8", "rld"): {"rld_beta": 8.0, "temperature": 4.0, "kd_warmup": 20},
    ("imagenet/resnet50-mobilenetv1", "rld"): {
        "rld_beta": 2.0, "temperature": 1.0, "kd_warmup": 1,
    },
    # Of EKD's prior and second order, the pair's own where the method has none.
    ("cifar100/resnet110-resnet20", "rld+ekd"): {
        "log_prior": -0.86, "ekd_weight": 1.0, "ekd_warmup": 30, "kd_weight": 1.0,
    },
    ("cifar100/vgg13-vgg8", "dkd+ekd"): {"log_prior": -1.23, "kd_weight": 0.5},
    ("imagenet/resnet34-resnet18", "wkd+ekd"): {
        "log_prior": -1.46, "ekd_weight": 0.05, "wkd_weight": 30.0,
    },
}  # fmt: skip


@pytest.mark.parametrize(("pair", "method"), PUBLISHED)
def test_the_newer_methods_start_from_the_published_values(pair, method):
    study = study_of(SEARCH_SPACES / f"{pair}.yaml", method)
    run = resolve_method(point_config(study.distill, study.authors))
    found = {name: getattr(run, name) for name in PUBLISHED[pair, method]}
    assert found == PUBLISHED[pair, method]


def test_patient_training_is_function_matching():
    """The released configurations of Beyer et al. 2022: no labels, every view mixed evenly."""
    study = study_of(SEARCH_SPACES / "patient.yaml", "kd")
    run = resolve_method(point_config(study.distill, study.authors))
    assert (run.ce_weight, run.kd_weight, run.mixup_alpha, run.mix_share) == (0.0, 1.0, 1.0, 1.0)
    assert (run.epochs, run.schedule, run.max_grad_norm) == (1200, "cosine", 1.0)
    assert not study_of(SEARCH_SPACES / "patient.yaml", "mlkd").distill.draws_views


def test_a_search_of_the_method_starts_from_everybodys_values():
    study = study_of(SEARCH_SPACES / "cifar100" / "resnet32x4-resnet8x4.yaml", "any")
    points = first_points(study)
    assert [point["method"] for point in points] == list(study.space["method"]["choices"])
    by_method = {point["method"]: point for point in points}
    assert by_method["ekd"]["log_prior"] == -1.22 and by_method["ekd"]["kd_weight"] == 4.5
    assert by_method["dkd"]["dkd_beta"] == 8.0 and by_method["kd"]["temperature"] == 4.0
    assert by_method["dkd+ekd"]["ekd_warmup"] == 20
    assert by_method["dist+ekd"]["log_prior"] == -1.22 and by_method["wkd"]["wkd_weight"] == 600.0


@pytest.mark.quick_ids(*QUICK)
@pytest.mark.parametrize("path", PAIRS, ids=relative)
def test_every_recipe_takes_a_training_step(path):
    study = study_of(path)
    config = resolve_method(point_config(study.distill, study.authors))
    info = dataset_info(config.dataset)
    side, classes = config.image_size or info.image_size, info.num_classes
    teacher = build_model(config.teacher, classes).eval()
    learner = Learner(build_model(config.student, classes), Objective(config)).train()
    optimizer = make_optimizer(config, learner)
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    inputs, target = images, torch.tensor([0, classes - 1])
    if config.student_image_size:
        inputs = torch.nn.functional.interpolate(images, (student_size(config),) * 2)
    with torch.no_grad():
        teacher_logits = teacher(images)
    before = [parameter.detach().clone() for parameter in learner.parameters()]
    loss, logits, _ = learner(inputs, TeacherOutputs(teacher_logits), target, 1)
    loss.backward()
    optimizer.step()
    assert loss.isfinite() and logits.shape == (2, classes)
    moved = [not torch.equal(a, b) for a, b in zip(before, learner.parameters(), strict=True)]
    assert sum(moved) > 0.9 * len(moved)
