"""Models of plugins: registered, named as module:function, or given in Python."""

import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import ekd_ray
from ekd_ray.config import DistillConfig, StudyConfig, plugins
from ekd_ray.config.plugins import LoadedPlugins, load_plugin, stamps_of
from ekd_ray.engine.resolve import resolve
from ekd_ray.errors import UserError
from ekd_ray.models import build_model, model_names, register_model, zoo
from ekd_ray.models.given import as_model_name, write_given_weights
from ekd_ray.studies.pipeline import check_study

ROOT = Path(ekd_ray.__file__).parents[1]
DIGITS = {"dataset": "digits", "train_subset": 300, "epochs": 1}


class Tiny(nn.Module):
    """Conv, norm, mean, head: with a buffer that no layer can draw."""

    def __init__(self, num_classes=10, width=4):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, num_classes)
        self.register_buffer("scale", torch.tensor(3.0))

    def forward(self, images):
        return self.head(self.norm(self.conv(images)).relu().mean((2, 3)) * self.scale)


@pytest.fixture(autouse=True)
def apart(monkeypatch):
    for name in ("_loaded", "_parts", "_pickled_parts"):
        monkeypatch.setattr(plugins, name, {})
    before = dict(zoo.REGISTERED)
    yield
    zoo.REGISTERED.clear()
    zoo.REGISTERED.update(before)


@pytest.mark.parametrize("name", ["resnet8", "DeiT_Ti", "timm:x", "a b", ""])
def test_a_name_that_is_taken_or_no_word_is_refused(name):
    with pytest.raises(UserError, match=r"already|letters"):
        register_model(name, Tiny)


def test_a_registered_model_is_one_of_the_zoo():
    register_model("my-tiny", Tiny)
    with pytest.raises(UserError, match="already"):
        register_model("my-tiny", Tiny)
    assert "my-tiny" in model_names()
    model = build_model("my-tiny", 7)
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 7)
    assert (model.ekd_name, model.ekd_num_classes) == ("my-tiny", 7)
    with pytest.raises(UserError, match="Did you mean 'my-tiny'"):
        build_model("my-tyni", 7)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": 3}, "name must be a text, got 3"),
        ({"build": 3}, "build must be a function, got 3"),
        ({"normalization": "hal"}, "unknown normalization 'hal'. Did you mean 'half'"),
        ({"normalization": "0.5/0,0,0"}, "normalization must be a name or"),
        ({"normalization": (0.5, 0.5)}, "normalization must be a text"),
    ],
)
def test_a_model_that_is_registered_wrongly_is_refused_at_once(wrong, message):
    with pytest.raises(UserError, match=f"^{message}"):
        register_model(**{"name": "wrong", "build": Tiny} | wrong)
    assert "wrong" not in model_names()


def fails(num_classes):
    raise RuntimeError("no room")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (fails, r"cannot be built for 10 classes \(RuntimeError: no room\)"),
        (lambda num_classes: 3, "must return an nn.Module, got int"),
        (lambda num_classes: Tiny(3), r"logits of shape \[B, 10\].*got \[1, 3\]"),
        (lambda num_classes: nn.Identity(), r"logits of shape \[B, 10\].*got \[1, 3, 32, 32\]"),
    ],
)
def test_a_model_that_does_not_serve_is_refused_before_compute(build, message):
    register_model(f"bad-{abs(hash(message))}", build)
    with pytest.raises(UserError, match=message):
        resolve(DistillConfig(student=f"bad-{abs(hash(message))}", method="none", **DIGITS))


def test_the_weights_of_a_plugins_teacher_are_checked_against_its_network(tmp_path):
    """Their classifier is under no known name, and their file does not say what it holds."""
    build = lambda num_classes: nn.Sequential(  # noqa: E731
        nn.Flatten(), nn.Linear(3 * 32 * 32, 5), nn.Linear(5, num_classes)
    )
    register_model("flat", build, normalization="half")
    run = DistillConfig(student="resnet8", teacher="flat", method="kd", **DIGITS)
    torch.save(build(10).state_dict(), tmp_path / "good.pth")
    found = resolve(run.replace(teacher_weights=str(tmp_path / "good.pth")))
    assert found.teacher_normalization == "0.5,0.5,0.5/0.5,0.5,0.5"
    named = run.replace(teacher_weights=str(tmp_path / "good.pth"), teacher_normalization="cifar10")
    assert resolve(named).teacher_normalization.startswith("0.4914")
    torch.save(build(9).state_dict(), tmp_path / "nine.pth")
    with pytest.raises(UserError, match=r"nine.pth.*\[9, 5\]|nine.pth.*classes"):
        resolve(run.replace(teacher_weights=str(tmp_path / "nine.pth")))


def test_a_model_named_by_its_function(tmp_path):
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\nVALUE = 3\n"
        "def small(n):\n    return nn.Sequential(nn.Flatten(), nn.LazyLinear(n))\n"
    )
    with pytest.raises(UserError, match=r"unknown model .my_nets:small.*--plugin FILE"):
        build_model("my_nets:small", 10)
    plugin = load_plugin(str(tmp_path / "my_nets.py"))
    run = DistillConfig(student="my_nets:small", method="none", **DIGITS)
    found = resolve(run)
    assert found.plugins == (plugin.stamp,) and resolve(found) == found
    assert found.fingerprint() != run.fingerprint()
    for name in ("my_nets:large", "my_nets:VALUE"):
        with pytest.raises(UserError, match="has no function"):
            build_model(name, 10)


def test_the_code_of_a_configuration_is_checked(tmp_path):
    (tmp_path / "my_nets2.py").write_text("from torch import nn\nsmall = nn.Identity\n")
    plugin = load_plugin(str(tmp_path / "my_nets2.py"))
    other = f"my_nets2@{'0' * 64}"
    with pytest.raises(UserError, match=f"of SHA-256 {'0' * 64}, got {plugin.sha256}"):
        resolve(DistillConfig(plugins=(other,), student="resnet8", method="none", **DIGITS))


# Given in Python


def test_a_module_is_its_architecture_with_weights_drawn_anew():
    given = Tiny()
    with torch.no_grad():
        given.norm.running_mean.fill_(5)
    given(torch.zeros(2, 3, 8, 8)).sum().backward()
    before = {name: value.clone() for name, value in given.state_dict().items()}
    name = as_model_name(given)
    assert as_model_name(given) == name and as_model_name("resnet8") == "resnet8"
    torch.manual_seed(5)
    one = build_model(name, 10)
    torch.manual_seed(5)
    two = build_model(name, 10)
    torch.manual_seed(5)
    fresh = Tiny()
    for key, value in fresh.state_dict().items():
        assert torch.equal(one.state_dict()[key], value), "as its constructor draws them"
        assert torch.equal(two.state_dict()[key], value)
    assert one.conv.weight.grad is None and one.conv is not two.conv
    assert all(torch.equal(given.state_dict()[key], value) for key, value in before.items())
    assert given.conv.weight.grad is not None, "the module itself stays as it was"


def test_tied_weights_stay_tied():
    given = nn.Sequential(nn.Flatten(), nn.Linear(192, 192), nn.Linear(192, 192), nn.Linear(192, 3))
    given[2].weight = given[1].weight
    built = build_model(as_model_name(given), 3)
    assert built[1].weight is built[2].weight


class Token(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(3))


def test_what_cannot_be_drawn_anew_is_refused():
    with pytest.raises(UserError, match=r"Sequential.*1\.token.*build\(num_classes\)"):
        as_model_name(nn.Sequential(nn.Flatten(), Token()))
    unpicklable = nn.Sequential(nn.Flatten())
    unpicklable.lock = threading.Lock()
    with pytest.raises(UserError, match="cannot be sent"):
        as_model_name(unpicklable)


def test_a_given_module_and_its_weights_arrive_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("EKD_CACHE_DIR", str(tmp_path / "cache"))
    given = Tiny().eval()
    name = as_model_name(given)
    path = write_given_weights(given)
    assert path == write_given_weights(given)
    images = torch.rand(2, 3, 8, 8)
    stamps = stamps_of([("model", name)])
    state = pickle.dumps(
        (LoadedPlugins(stamps), name, str(path), images, given(images).detach(), stamps)
    )
    (tmp_path / "state.pkl").write_bytes(state)
    code = (
        "import pickle, torch\n"
        "_, name, path, images, logits, stamps = pickle.load(open('state.pkl', 'rb'))\n"
        "from ekd_ray.models import build_model, load_weights\n"
        "from ekd_ray.config.plugins import stamps_of\n"
        "model = build_model(name, 10).eval(); found = load_weights(model, path)\n"
        "assert torch.equal(model(images), logits) and found.num_classes == 10\n"
        "assert stamps_of([('model', name)]) == stamps\n"
        "assert type(model).__module__ == 'test_registered_models', 'by value: it is not there'\n"
        "print('equal')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.stdout == "equal\n", done.stderr


def test_a_builder_of_a_module_is_named_by_it():
    name = as_model_name(Tiny)
    assert name == f"{Tiny.__module__}:Tiny"
    assert stamps_of([("model", name)])[0].startswith(f"{Tiny.__module__}@")
    assert build_model(name, 4).head.out_features == 4


def test_a_builder_without_a_name_of_its_own():
    one, two = (as_model_name(lambda n, w=w: Tiny(n, w)) for w in (3, 5))
    assert one != two and one.startswith("lambda-")
    assert build_model(two, 7).conv.out_channels == 5


def test_a_module_is_what_it_is_when_it_is_given():
    given = nn.Sequential(nn.Flatten(), nn.Linear(48, 10))
    first = as_model_name(given)
    given.append(nn.Linear(10, 3))
    given.requires_grad_(False)
    built = build_model(as_model_name(given), 3)
    assert len(built) == 3 and len(build_model(first, 10)) == 2
    assert all(parameter.requires_grad for parameter in built.parameters())


def test_a_study_has_the_plugins_of_all_its_parts(tmp_path, monkeypatch):
    """Also of parts that no flag named, and where its teacher is still to be trained."""
    module = Tiny.__module__
    name = as_model_name(Tiny)
    shared = DistillConfig(teacher=name, student="resnet8", method="kd", **DIGITS)
    space = {"temperature": {"low": 1.0, "high": 4.0}}
    study = StudyConfig(distill=shared, space=space, teacher_training={"epochs": 1})
    assert [stamp.partition("@")[0] for stamp in check_study(study).distill.plugins] == [module]
