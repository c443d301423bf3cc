"""Teachers in a folder: mdistiller's layout, plain files, and what is said when none is there."""

import os

import pytest

from ekd_ray.errors import UserError
from ekd_ray.models import find_softmax_teacher, find_teacher, list_teachers

MDISTILLER = ["resnet32x4", "wrn_40_2", "vgg13", "ResNet50", "resnet56", "resnet110"]


def put(folder, *names, time=None):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"weights")
        if time is not None:
            os.utime(path, (time, time))
    return folder


def test_the_published_layout(tmp_path):
    put(tmp_path, *(f"{name}_vanilla/ckpt_epoch_240.pth" for name in MDISTILLER))
    for name in MDISTILLER:
        wanted = tmp_path / f"{name}_vanilla" / "ckpt_epoch_240.pth"
        assert find_teacher(tmp_path, name) == wanted
        assert find_teacher(str(tmp_path), name) == wanted
    assert list(list_teachers(tmp_path)) == sorted(MDISTILLER)


EVIDENTIAL = {
    "resnet56": "ResNet56/student_200",
    "resnet110": "ResNet110/student_best",
    "resnet32x4": "ResNet32x4/student_best",
    "ResNet50": "ResNet50/student_best",
    "wrn_40_2": "WRN_40_2/student_best",
    "vgg13": "VGG13/student_240",
}


@pytest.mark.parametrize("model", EVIDENTIAL)
def test_the_evidential_teachers_of_the_authors(tmp_path, model):
    """Alone they serve every method; beside mdistiller's, evidential methods."""
    put(tmp_path, *EVIDENTIAL.values(), "ResNet56/student_best", "resnet20/student_best")
    theirs = tmp_path / EVIDENTIAL[model]
    assert find_teacher(tmp_path, model) == theirs
    assert find_softmax_teacher(tmp_path, model) is None
    assert set(list_teachers(tmp_path)) == set(EVIDENTIAL)
    put(tmp_path, f"{model}_vanilla/ckpt_epoch_240.pth")
    plain = tmp_path / f"{model}_vanilla" / "ckpt_epoch_240.pth"
    assert find_teacher(tmp_path, model, evidential=True) == theirs
    assert find_teacher(tmp_path, model) == find_softmax_teacher(tmp_path, model) == plain


def test_a_missing_evidential_teacher_is_named_as_it_unpacks(tmp_path):
    put(tmp_path, "VGG13/student_best")
    (tmp_path / "VGG13" / "student_240").mkdir()  # a folder of that name is not the file
    with pytest.raises(UserError, match="Put them at VGG13/student_240 or vgg13_vanilla/ckpt_epo"):
        find_teacher(tmp_path, "vgg13", evidential=True)


def test_the_highest_epoch_counts_as_a_number(tmp_path):
    put(tmp_path / "vgg13_vanilla", "ckpt_epoch_240.pth", time=1000)
    put(tmp_path / "vgg13_vanilla", "ckpt_epoch_90.pth", "best.pth", time=2000)
    assert find_teacher(tmp_path, "vgg13").name == "ckpt_epoch_240.pth"


def test_else_the_newest_file_counts(tmp_path):
    put(tmp_path / "vgg13", "b.pth", time=3000)
    put(tmp_path / "vgg13", "a.safetensors", "c.pt", time=2000)
    put(tmp_path / "vgg13", "log.txt", ".hidden.pth", "latest", time=4000)
    assert find_teacher(tmp_path, "vgg13").name == "b.pth"
    put(tmp_path / "vgg13", "a.safetensors", time=5000)
    assert find_teacher(tmp_path, "vgg13").name == "a.safetensors"


def test_folders_come_before_files(tmp_path):
    for name in ("vgg13.safetensors", "vgg13.th", "vgg13.pt", "vgg13.pth", "vgg13/x.th"):
        put(tmp_path, name)
        assert find_teacher(tmp_path, "vgg13") == tmp_path / name
    put(tmp_path, "vgg13_vanilla/x.th")
    assert find_teacher(tmp_path, "vgg13") == tmp_path / "vgg13_vanilla" / "x.th"
    assert list(list_teachers(tmp_path)) == ["vgg13"]


def test_library_names_have_a_form_for_files(tmp_path):
    put(tmp_path, "timm_deit_tiny_patch16_224.pth", "torchvision_resnet34/a.pth")
    assert find_teacher(tmp_path, "timm:deit_tiny_patch16_224").suffix == ".pth"
    assert find_teacher(tmp_path, "torchvision:resnet34").name == "a.pth"
    assert list(list_teachers(tmp_path)) == [
        "timm:deit_tiny_patch16_224",
        "torchvision:resnet34",
    ]


def test_case_tells_models_apart(tmp_path):
    put(tmp_path, "resnet18_vanilla/a.pth", "ResNet18_vanilla/b.pth")
    assert find_teacher(tmp_path, "resnet18").name == "a.pth"
    assert find_teacher(tmp_path, "ResNet18").name == "b.pth"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet32", ["'resnet32'", "Did you mean 'resnet32x4'", "resnet32x4, vgg13"]),
        ("timm:x", ["'timm:x'", "timm_x_vanilla/ckpt_epoch_240.pth below it"]),
        ("../vgg13", ["no weights of '../vgg13'"]),
    ],
)
def test_a_missing_teacher_names_what_is_there(tmp_path, name, words):
    put(tmp_path, "resnet32x4_vanilla/a.pth", "vgg13.pth")
    with pytest.raises(UserError) as caught:
        find_teacher(tmp_path, name)
    message = str(caught.value)
    assert "\n" not in message
    for word in (*words, repr(str(tmp_path))):
        assert word in message


def test_an_empty_or_missing_folder(tmp_path):
    assert list_teachers(tmp_path) == {}
    with pytest.raises(UserError, match="None is known"):
        find_teacher(tmp_path, "vgg13")
    for path in (tmp_path / "none", put(tmp_path, "file.txt") / "file.txt"):
        with pytest.raises(UserError, match="cannot be read"):
            list_teachers(path)
