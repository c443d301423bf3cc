"""Every recipe, under every method that it knows, resolves and takes a training step."""

import pytest
import torch

from ekd_ray.config import StudyConfig
from ekd_ray.data import dataset_info
from ekd_ray.engine import resolve as resolve_module
from ekd_ray.engine.learner import Learner, make_optimizer
from ekd_ray.engine.teacher.source import TeacherLogits
from ekd_ray.losses.methods import METHODS, method_of
from ekd_ray.losses.objective import Objective
from ekd_ray.models import build_model, save_weights
from ekd_ray.scale.space import check_space, first_points, point_config
from ekd_ray.studies.recipes import SEARCH_SPACES, load_recipe

torch.set_num_threads(1)

RECIPES = sorted(p for p in SEARCH_SPACES.rglob("*.yaml") if not p.stem.startswith("_"))
PAIRS = [path for path in RECIPES if path.parent != SEARCH_SPACES]
VARIANTS = (
    *("kd", "kd-standardized", "dkd", "dkd-standardized", "mlkd", "mlkd-standardized"),
    *("ctkd", "ctkd-standardized", "ekd", "dkd+ekd", "mlkd+ekd", "ctkd+ekd"),
    *("none", "evidential", "any"),
)


def relative(path):
    return str(path.relative_to(SEARCH_SPACES))


def study_of(path, method=None):
    return StudyConfig.from_dict(load_recipe(path, method), where=str(path))


def test_the_pairs_of_the_field_are_there():
    pairs = {path.stem for path in PAIRS if path.parent.name == "cifar100"}
    assert len(pairs) == 14
    assert pairs >= {"resnet32x4-ShuffleV2", "vgg13-vgg8", "ResNet50-MobileNetV2"}
    assert {path.stem for path in PAIRS if path.parent.name == "imagenet"} == {
        "resnet34-resnet18",
        "resnet50-mobilenetv1",
    }
    assert len([path for path in PAIRS if path.parent.name == "vit"]) == 4


@pytest.mark.parametrize("method", VARIANTS)
@pytest.mark.parametrize("path", RECIPES, ids=relative)
def test_every_recipe_is_legal_under_every_method(path, method):
    study = study_of(path, method)
    check_space(study)
    wanted = "ekd" if method == "any" else method.removesuffix("-standardized")
    assert study.distill.method == wanted
    assert study.distill.standardize == method.endswith("-standardized")
    needs_teacher = method_of(study.distill).needs_teacher
    points = [point_config(study.distill, point) for point in first_points(study)]
    assert bool(points) == needs_teacher or path.stem == "default"
    searched = set(study.space)
    assert searched <= {"method", "lr", "weight_decay"} | {
        name for entry in METHODS.values() for name in entry.setting_names
    }


def test_a_search_of_the_method_starts_from_everybodys_values():
    study = study_of(SEARCH_SPACES / "cifar100" / "resnet32x4-resnet8x4.yaml", "any")
    points = first_points(study)
    assert [point["method"] for point in points] == list(study.space["method"]["choices"])
    by_method = {point["method"]: point for point in points}
    assert by_method["ekd"]["log_prior"] == -1.22 and by_method["ekd"]["kd_weight"] == 4.5
    assert by_method["dkd"]["dkd_beta"] == 8.0 and by_method["kd"]["temperature"] == 4.0
    assert by_method["dkd+ekd"]["ekd_warmup"] == 20


@pytest.fixture
def resolved(tmp_path, monkeypatch):
    """Resolve a recipe's run against random teacher weights and data that is taken as given."""
    monkeypatch.setattr(resolve_module, "check_dataset", lambda *a, **k: None)
    monkeypatch.setattr(resolve_module, "num_train", lambda name, **k: dataset_info(name).num_train)

    def resolve(config):
        info = dataset_info(config.dataset)
        if method_of(config).needs_teacher:
            path = tmp_path / "teacher.safetensors"
            if not path.exists():
                save_weights(
                    build_model(config.teacher, info.num_classes), path, model_name=config.teacher,
                    num_classes=info.num_classes, mean=info.mean, std=info.std, log_prior=None,
                )  # fmt: skip
            config = config.replace(teacher_weights=str(path))
        return resolve_module.resolve(config)

    return resolve


@pytest.mark.parametrize("path", PAIRS, ids=relative)
def test_every_recipe_takes_a_training_step(path, resolved):
    """With its own networks under its own method; the others share the networks' logits."""
    study = study_of(path)
    config = resolved(point_config(study.distill, study.authors))
    classes = dataset_info(config.dataset).num_classes
    teacher = build_model(config.teacher, classes).eval()
    learner = Learner(build_model(config.student, classes), Objective(config)).train()
    optimizer = make_optimizer(config, learner)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, config.image_size, config.image_size, generator=generator)
    inputs, target = images, torch.tensor([0, classes - 1])
    if config.student_image_size:
        inputs = torch.nn.functional.interpolate(images, (resolve_module.student_size(config),) * 2)
    with torch.no_grad():
        teacher_logits = teacher(images)
    before = [parameter.detach().clone() for parameter in learner.parameters()]
    loss, logits, _ = learner(inputs, TeacherLogits(teacher_logits), target, 1)
    loss.backward()
    optimizer.step()
    assert loss.isfinite() and logits.shape == (2, classes)
    moved = [not torch.equal(a, b) for a, b in zip(before, learner.parameters(), strict=True)]
    assert sum(moved) > 0.9 * len(moved)
    for method in VARIANTS:
        other = study_of(path, method)
        for point in [*first_points(other), {}]:
            run = point_config(other.distill, point)
            leaf = logits.detach().requires_grad_()
            total, _ = Objective(run)(
                leaf, teacher_logits, target, 1,
                student_strong=leaf.flip(0), teacher_strong=teacher_logits.flip(0),
            )  # fmt: skip
            total.backward()
            assert total.isfinite() and leaf.grad.isfinite().all(), method
