"""YAML as settings are written in it: scalars, and what is refused with its line."""

import math

import pytest
import yaml

from ekd_ray.config import DistillConfig
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
        # YAML 1.2's core schema: what 1.1 took for switches, sixtieths and dates are texts.
        *((text, text) for text in ("on", "off", "yes", "No", "y", "1:30", "1_000", "2020-01-01")),
        ("0o17", 15),
        ("017", 17),
        ("0x1F", 31),
        ("0b11", "0b11"),
        ("+12", 12),
        ("TRUE", True),
        ("-.INF", -math.inf),
        ("~", None),
        ("=", "="),
    ],
)
def test_yaml_scalars(text, value):
    parsed = parse_yaml(text, where="test")
    assert parsed == value and type(parsed) is type(value)


TEXTS = ["5e-4", "0E0", "1e5", ".5", "null", "true", "3", "a: b", "1:30", "0o17", "on", "=", "<<"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_that_looks_like_another_value_stays_a_text(text):
    written = dump_yaml({"name": text})
    assert parse_yaml(written, where="test") == {"name": text}
    assert yaml.safe_load(written) == {"name": text}  # which reads YAML 1.1


def bomb(levels, width):
    """Lists of lists, each of which refers to the one before: width ** levels values."""
    refers = (f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels))
    return "\n".join([f"a0: &a0 [{', '.join('x' * width)}]", *refers])


WITHOUT_END = {
    "bomb": (bomb(12, 10), "more than"),
    "bomb of keys": ("a: &a {" + ", ".join(f"k{i}: 1" for i in range(9000)) + "}\n"
                     + "\n".join(f"b{i}: {{<<: *a}}" for i in range(9)), "more than"),
    "itself": ("&a [*a]", "refers to itself"),
    "itself, deeper": ("a: &a {b: [1, {c: *a}]}", "refers to itself"),
    "itself, merged": ("a: &a {<<: *a}", "refers to itself"),
    "deep": ("[" * 100_000, "nested deeper"),
    "deep blocks": ("- " * 5_000, "nested deeper"),
    "many": ("[" + "1," * 60_000 + "]", "more than"),
    "digits": ("a: " + "9" * 5_000, "digits"),
    "hexadecimal": ("a: [1, 0x1" + "0" * 5_000 + "]", "digits"),
    "octal": ("? 0o1" + "0" * 5_000 + "\n: 1", "digits"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "word"), WITHOUT_END.values(), ids=WITHOUT_END)
def test_what_would_not_end_is_refused(text, word):
    with pytest.raises(UserError, match=word) as refused:
        parse_yaml(text, where="test")
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    "text",
    ["a: !!bool maybe", "a: !!int 1_0", "a: !!int \u0663", "a: !!float '\u0663'", "!!map [ab, cd]",
     "? !!bool no\n: 1", "a: !!str {b: 1}", "a: !!merge b", "a: !b c", "a: ! c", "[!<tag:x> b]",
     "a: !!python/object:x y"],
)  # fmt: skip
def test_a_tag_is_refused(text):
    """It would make a value of a text that the core schema takes for another, or for none."""
    with pytest.raises(UserError, match="a tag"):
        parse_yaml(text, where="test")


def test_references_are_read():
    text = "a: &a {x: 1}\nb: *a\nc: {<<: *a, y: [*a]}"
    assert parse_yaml(text, where="test") == {
        "a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1, "y": [{"x": 1}]}
    }  # fmt: skip
    assert parse_yaml(bomb(3, 10), where="test")["a2"][9][9] == ["x"] * 10


def test_a_file_beyond_the_size_is_refused(tmp_path):
    (tmp_path / "large.yaml").write_text("a: " + "x" * (2 * 2**20))
    with pytest.raises(UserError, match="bytes"):
        YamlFile.read(tmp_path / "large.yaml")


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
        b"[1]: 2", b"{a: 1}: 2", b"a: !!timestamp 2020-01-01", b"a: !!int abc",
        b"a: " + b"[" * 3000,
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


def test_a_switch_is_set_by_a_flag():
    """`--set teacher_cache=off`, as the README has it; to YAML 1.1 `off` is false."""
    for text in ("on", "off", "auto"):
        value = parse_yaml(text, where="--set")
        assert value == text and DistillConfig(teacher_cache=value).teacher_cache == text
    assert DistillConfig(teacher_cache=False).teacher_cache == "off"  # as JSON and Python have it
