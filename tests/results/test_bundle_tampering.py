"""A bundle tells when anything in it was changed: one sentence, whatever was done to it."""

from __future__ import annotations

import json

import pytest

from ekd_ray.engine.final import WEIGHTS
from ekd_ray.errors import UserError
from ekd_ray.results import Bundle
from ekd_ray.results.bundle_files import FILES, write_manifest
from ekd_ray.results.records import MANIFEST


def change_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def complaints(path):
    """The sentences that opening and verifying a bundle gives; a crash fails the test."""
    try:
        found = list(Bundle.load(path).verify().problems)
    except UserError as error:
        found = [str(error)]
    assert not any("\n" in sentence for sentence in found)
    return found


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_every_flipped_byte_is_noticed(bundle, name):
    """First, middle and last byte of each file."""
    whole = (bundle.path / name).read_bytes()
    for position in (0, len(whole) // 2, len(whole) - 1):
        changed = bytearray(whole)
        changed[position] ^= 0x15
        (bundle.path / name).write_bytes(changed)
        found = complaints(bundle.path)
        assert found and any(name in sentence for sentence in found)
    (bundle.path / name).write_bytes(whole)
    assert complaints(bundle.path) == []


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_every_truncated_file_is_noticed(bundle, name, share):
    whole = (bundle.path / name).read_bytes()
    (bundle.path / name).write_bytes(whole[: int(share * len(whole))])
    found = complaints(bundle.path)
    assert found and any(name in sentence for sentence in found)


def test_a_file_too_many_is_noticed(bundle):
    (bundle.path / "setup.py").write_text("import this")
    assert complaints(bundle.path) == ["setup.py is there, but MANIFEST does not list it."]
    with open(bundle.path / MANIFEST, "a") as file:
        file.write(f"{'0' * 64}  setup.py\n")
    assert "MANIFEST lists 'setup.py', which does not belong to a bundle." in complaints(
        bundle.path
    )


def test_a_clone_of_a_repository_is_sound(bundle):
    (bundle.path / ".gitattributes").write_text("*.safetensors filter=lfs")
    (bundle.path / ".git").mkdir()
    assert complaints(bundle.path) == []


@pytest.mark.parametrize("text", ["{", "[]", '{"threads": 1}', '{"threads": 0, "packages": {}}'])
def test_a_damaged_environment_is_one_sentence_even_if_the_manifest_was_forged(bundle, text):
    (bundle.path / "environment.json").write_text(text)
    write_manifest(bundle.path, FILES)
    with pytest.raises(UserError, match=r"environment\.json is damaged"):
        Bundle.load(bundle.path).verify(evaluate=True)


@pytest.mark.parametrize(
    "change",
    [
        {"class_names": [1, 2]},
        {"class_names": ["one"]},
        {"class_names": None},
        {"model": {}},
        {"model": {"test_top1": "high"}},
        {"test": {"test_top1": 0.5}},
        {"workers": None},
        {"format_version": 0},
    ],
    ids=str,
)
def test_metrics_of_another_kind_are_damage(bundle, change):
    change_json(bundle.path / "metrics.json", **change)
    write_manifest(bundle.path, FILES)
    with pytest.raises(UserError, match=r"metrics\.json is damaged"):
        Bundle.load(bundle.path)


def test_elsewhere_the_accuracy_may_differ_by_half_a_point(bundle):
    """Another processor rounds otherwise; more than that no rounding explains."""
    stated = bundle.metrics["model"]["test_top1"]
    change_json(bundle.path / "environment.json", processor="abacus")
    for difference, ok in ((0.004, True), (0.006, False)):
        model = {**bundle.metrics["model"], "test_top1": stated + difference}
        change_json(bundle.path / "metrics.json", model=model)
        write_manifest(bundle.path, FILES)
        assert Bundle.load(bundle.path).verify(evaluate=True).ok is ok


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(bundle, name):
    (bundle.path / name).unlink()
    with pytest.raises(UserError, match=f"lacks {name}: export it again"):
        Bundle.load(bundle.path)
    problems = bundle.verify().problems  # opened before the file went
    assert len(problems) == 1
    assert name in problems[0]


def test_truncated_weights_are_noticed_even_if_the_manifest_was_forged(bundle):
    path = bundle.path / WEIGHTS
    path.write_bytes(path.read_bytes()[:-500])
    assert not bundle.verify().ok
    write_manifest(bundle.path, FILES)
    with pytest.raises(UserError, match=r"model\.safetensors") as caught:
        bundle.verify(evaluate=True)
    assert "\n" not in str(caught.value)


def test_an_embellished_accuracy_is_noticed_even_if_the_manifest_was_forged(bundle):
    model = {**bundle.metrics["model"], "test_top1": 0.99}
    change_json(bundle.path / "metrics.json", model=model)
    write_manifest(bundle.path, FILES)
    opened = Bundle.load(bundle.path)
    assert opened.verify().ok  # only evaluation can tell
    found = opened.verify(evaluate=True)
    assert [p for p in found.problems if "metrics.json says 0.99" in p]


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "sub/../model.safetensors", ""])
def test_a_manifest_that_names_foreign_files_is_a_problem(bundle, name):
    """Nothing outside the bundle is read or vouched for."""
    (bundle.path.parent / "x").write_text("secret")
    with open(bundle.path / MANIFEST, "a") as file:
        file.write(f"{'0' * 64}  {name}\n")
    found = bundle.verify(evaluate=True)
    assert found.problems == (f"{MANIFEST} lists {name!r}, which does not belong to a bundle.",)


def test_a_manifest_that_leaves_a_file_out_is_a_problem(bundle):
    lines = (bundle.path / MANIFEST).read_text().splitlines(keepends=True)
    (bundle.path / MANIFEST).write_text("".join(lines[1:]))
    assert bundle.verify().problems == (f"{MANIFEST} does not list {WEIGHTS}.",)
    (bundle.path / MANIFEST).write_text("")
    assert len(bundle.verify().problems) == len(FILES)


def test_a_binary_manifest_is_a_problem_not_a_crash(bundle):
    (bundle.path / MANIFEST).write_bytes(b"\xff\xfe\x00")
    assert not bundle.verify().ok


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format_version": 3}', "format version 3, and this ekd_ray reads up to 2: upgrade"),
        ("{", "metrics.json is damaged"),
        ("[]", "metrics.json is damaged"),
        ("{}", "metrics.json is damaged"),
        ('{"format_version": "new"}', "metrics.json is damaged"),
        ('{"format_version": 1, "class_names": "cat"}', "metrics.json is damaged"),
        ("[" * 100_000, "metrics.json is damaged"),
    ],
)
def test_newer_or_damaged_metrics_are_refused(bundle, text, message):
    (bundle.path / "metrics.json").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        Bundle.load(bundle.path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["lr: -1", "learning_rate: 1", "[,"])
def test_a_bad_configuration_is_refused(bundle, text):
    (bundle.path / "distill.yaml").write_text(text)
    with pytest.raises(UserError, match=r"distill\.yaml:1: "):
        Bundle.load(bundle.path)


def test_of_a_study_its_bundle_is_named(tmp_path):
    (tmp_path / "run" / "best").mkdir(parents=True)
    (tmp_path / "run" / "best" / MANIFEST).touch()
    with pytest.raises(UserError, match=r"run holds no bundle .*: give \S*run/best\."):
        Bundle.load(tmp_path / "run")


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_text("")])
def test_what_is_no_bundle_is_refused(tmp_path, make):
    make(tmp_path / "x")
    with pytest.raises(
        UserError, match=r"x holds no bundle \(no MANIFEST\)|there is no folder \S*x:"
    ):
        Bundle.load(tmp_path / "x")


def test_sources_of_plugins_are_listed_and_nothing_else_beside_them(bundle):
    names = [*FILES, "plugins/my_parts.py", "plugins/my_pack/__init__.py"]
    for name in names[len(FILES) :]:
        (bundle.path / name).parent.mkdir(parents=True, exist_ok=True)
        (bundle.path / name).write_text("x = 1\n")
    assert len(complaints(bundle.path)) == 2
    write_manifest(bundle.path, names)
    assert complaints(bundle.path) == []
    (bundle.path / "plugins/my_parts.py").write_text("x = 2\n")
    (bundle.path / "plugins/my_pack/more.py").write_text("")
    assert sorted(complaints(bundle.path)) == [
        "plugins/my_pack/more.py is there, but MANIFEST does not list it.",
        "plugins/my_parts.py was changed: its SHA-256 is not the one in MANIFEST.",
    ]


@pytest.mark.parametrize(
    "name", ["plugins/../x.py", "plugins//x.py", "plugins/x.sh", "x/plugins/y.py"]
)
def test_a_source_elsewhere_is_refused(bundle, name):
    with open(bundle.path / MANIFEST, "a") as file:
        file.write(f"{'0' * 64}  {name}\n")
    assert f"MANIFEST lists {name!r}, which does not belong to a bundle." in complaints(bundle.path)
