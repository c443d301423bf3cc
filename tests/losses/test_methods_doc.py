"""docs/methods.md says what the code does: methods, settings, defaults and references."""

import ast
import functools
import re
from pathlib import Path

import pytest

from ekd_ray.config import DistillConfig
from ekd_ray.losses import EVIDENCE_FUNCTIONS
from ekd_ray.losses.mlkd import TEMPERATURES
from ekd_ray.losses.objective import METHOD_SETTINGS, METHODS, TERM_WEIGHTS, resolve_method

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
UNUSED = "-"


def rows_of(first):
    """The table whose header starts with `first`: the header's cells, then the rows'."""
    lines = iter(TEXT.splitlines())
    for line in lines:
        if line.startswith(f"| {first} |"):
            next(lines)
            table = [line]
            for row in lines:
                if not row.startswith("|"):
                    break
                table.append(row)
            return [[cell.strip() for cell in row.strip("|").split("|")] for row in table]
    raise AssertionError(f"no table starts with {first!r}")


def code(cell):
    """The code spans of a cell."""
    return re.findall(r"`([^`]+)`", cell)


def references():
    """Every `file.py::name` of the page; files are short, see its first paragraph."""
    return sorted(set(re.findall(r"`(\w+\.py)::(\w+)`", TEXT)))


@functools.cache
def names_in(file):
    """What a file defines at its top level."""
    folder = ROOT / ("tests/losses" if file.startswith("test_") else "ekd_ray/losses")
    names = set()
    for node in ast.parse((folder / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


def test_every_table_is_rectangular():
    for first in ("symbol", "term", "method", "option", "setting", "default"):
        table = rows_of(first)
        assert len(table) > 1
        assert {len(row) for row in table} == {len(table[0])}, first


@pytest.mark.parametrize(("file", "name"), references())
def test_every_reference_exists(file, name):
    assert name in names_in(file), f"{file} defines no {name}"


def test_files_that_are_named_exist():
    for path in re.findall(r"`([\w/]+/[\w.]+\.(?:py|yaml))`", TEXT):
        assert (ROOT / path).is_file(), path
    for file in re.findall(r"`(\w+\.py)`", TEXT):
        assert names_in(file), file


def test_every_method_has_its_row_and_its_references():
    header, *rows = rows_of("method")
    assert [code(row[0]) for row in rows] == [[name] for name in METHODS]
    for row in rows:
        for column in ("code", "test"):
            found = code(row[header.index(column)])
            assert found and all("::" in reference for reference in found), row[0]
        assert all(ref.startswith("test_") for ref in code(row[header.index("test")]))
        assert not any(ref.startswith("test_") for ref in code(row[header.index("code")]))


def test_every_option_has_its_row():
    named = [name for row in rows_of("option")[1:] for name in code(row[0])]
    options = [f"evidence={kind}" for kind in EVIDENCE_FUNCTIONS]
    options += ["standardize", "log_prior", "learn_log_prior", "teacher_log_prior"]
    options += [name for name in METHOD_SETTINGS if name.startswith("prior_kl")]
    options += [name for name in METHOD_SETTINGS if name.endswith("_warmup")]
    assert sorted(named) == sorted({*options})


def test_the_methods_of_an_option_are_those_that_use_it():
    groups = {
        "evidential ones": {name for name, entry in METHODS.items() if entry.evidential},
        "those with `ekd`": {name for name, entry in METHODS.items() if "ekd" in entry.terms},
    }
    header, *rows = rows_of("option")
    for row in rows:
        cell = row[header.index("methods")]
        if cell == "see the terms":
            continue
        named = groups.get(cell) or set(code(cell))
        for option in code(row[0]):
            setting = option.partition("=")[0]
            assert named == {m for m, entry in METHODS.items() if setting in entry.uses}, option


def test_every_term_has_its_weight_and_ramp():
    rows = rows_of("term")[1:]
    found = {}
    for row in rows:
        (term,), (weight,), ramp = code(row[0]), code(row[1]), code(row[2])
        found[term] = (weight, ramp[0] if ramp else None)
        assert bool(ramp) == (row[2] != UNUSED)
    assert found == TERM_WEIGHTS


def test_every_setting_is_explained():
    rows = rows_of("setting")[1:]
    assert sorted(code(row[0])[0] for row in rows) == sorted(METHOD_SETTINGS)
    assert all(row[2] for row in rows)


def shown(value):
    """A default as the table writes it."""
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return "on" if value else "off"
    return value if isinstance(value, str) else f"{value:g}"


def test_the_defaults_are_the_resolved_ones():
    header, *rows = rows_of("default")
    assert [name for cell in header[1:] for name in code(cell)] == list(METHODS)
    assert sorted(code(row[0])[0] for row in rows) == sorted(METHOD_SETTINGS)
    for column, (method, entry) in enumerate(METHODS.items(), start=1):
        config = resolve_method(DistillConfig(method=method, epochs=240))
        stated = {code(row[0])[0]: row[column] for row in rows}
        expected = {
            name: shown(getattr(config, name)) if name in entry.uses else UNUSED
            for name in METHOD_SETTINGS
        }
        assert stated == expected, method


def test_the_temperatures_of_mlkd_are_the_codes():
    (listed,) = re.findall(r"`Ts = \{T, ([\d, ]+)\}`", TEXT)
    assert tuple(float(value) for value in listed.split(",")) == TEMPERATURES


def test_links_within_the_page_resolve():
    headings = re.findall(r"^#+ (.+)$", TEXT, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= anchors
