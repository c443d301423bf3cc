"""YAML as settings are written in it: scalars, and what is refused with its line."""

import pytest

from ekd_ray.config.yaml_files import YamlFile, dump_yaml, parse_yaml
from ekd_ray.errors import UserError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-4", 5e-4),
        (".5", 0.5),
        ("resnet8x4", "resnet8x4"),
        ("1e", "1e"),
        ("null", None),
    ],
)
def test_yaml_scalars(text, value):
    parsed = parse_yaml(text, where="test")
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize("text", ["5e-4", "0E0", "1e5", ".5", "null", "true", "3", "a: b", "1:30"])
def test_a_text_that_looks_like_another_value_stays_a_text(text):
    assert parse_yaml(dump_yaml({"name": text}), where="test") == {"name": text}


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("space:\n  lr: {low: 1}\n  kd_weight: {low: 1}\n  lr: {low: 2}\n", 4, "lr"),
        ("space: {a: {low: 1, low: 2}}", 1, "low"),
    ],
)
def test_duplicate_keys_are_refused_with_their_line(text, line, key, tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"twice\.yaml:{line}: duplicate key '{key}'"):
        YamlFile.read(path)


@pytest.mark.parametrize(
    "text",
    [
        b"", b"- 1", b"5", b"a: [1", b"a: 'x", b"\tb: 1", b"a: \xff", b"a: !!python/object:x y",
        b"[1]: 2", b"{a: 1}: 2", b"a: 2020-13-45", b"a: !!int abc", b"a: " + b"[" * 3000,
    ],
)  # fmt: skip
def test_broken_yaml_is_one_sentence_naming_the_file(text, tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_bytes(text)
    with pytest.raises(UserError, match=r"broken\.yaml") as refused:
        YamlFile.read(path)
    assert "\n" not in str(refused.value)


def test_unreadable_files(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(UserError, match="cannot read"):
            YamlFile.read(path)


LINES = """\
distill:
  lr: 0.1
shared: &shared
  low: 1
space:
  lr: {<<: *shared,
    high: 2}
  evidence:
    choices:
      - relu
      - exp
8: eight
"""


def place_of_error(folder, keys):
    """The text before the sentence of an error about the value to which `keys` lead."""
    (folder / "lines.yaml").write_text(LINES)
    with pytest.raises(UserError) as refused, YamlFile.read(folder / "lines.yaml").locate_errors():
        raise UserError("it is wrong.", keys=keys)
    return str(refused.value).removesuffix(": it is wrong.")


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (("distill", "lr"), 2),
        (("space", "lr", "high"), 7),
        (("space", "lr", "low"), 4),  # where the mapping stands that `<<` brings in
        (("space", "lr", "step"), 6),  # the last key on the way that is there
        (("space", "evidence", "choices", 1), 11),
        (("space", "evidence", "choices", "exp"), 9),
        ((8,), 12),
    ],
)
def test_the_line_of_a_value(keys, line, tmp_path):
    assert place_of_error(tmp_path, keys) == f"{tmp_path}/lines.yaml:{line}"


@pytest.mark.parametrize("keys", [None, (), ("trials",)])
def test_a_value_that_is_not_there_has_no_line(keys, tmp_path):
    assert place_of_error(tmp_path, keys) == f"{tmp_path}/lines.yaml"
