"""Recipes: partial `StudyConfig`s in YAML, sharing bases through `extends:`.

A recipe is written for one method (`distill.method`); under `methods:` it may say what
changes for others, which `--method` chooses: `select_method`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ekd_ray.config import DistillConfig, StudyConfig, YamlFile
from ekd_ray.config.distill_config import DATASETS
from ekd_ray.config.method_settings import REGISTRY, load
from ekd_ray.config.plugins import (
    SOURCES,
    load_named,
    load_references,
    module_in_name,
    stamps_in_study,
)
from ekd_ray.config.yaml_files import Places, find_place
from ekd_ray.errors import Keys, UserError, error_context, meant_name, shorten, unknown_name
from ekd_ray.results.study_file import read_study_file
from ekd_ray.studies.fitting import check_rules

_PACKAGE = Path(__file__).resolve().parents[1]
# The recipes that come with ekd_ray: in the installed package, or beside it in a checkout.
SEARCH_SPACES = next(
    (found for room in (_PACKAGE, _PACKAGE.parent) if (found := room / "search_spaces").is_dir()),
    _PACKAGE / "search_spaces",
)

_OF_THE_FILE = ("extends", "description", "plugins", "fit")
MOST_BASES = 20  # of a recipe
# Authors' values that the pair's own method and its other evidential ones share.
_SECOND_ORDER = ("log_prior", "evidence", "ekd_weight", "ekd_warmup")
_SECTIONS = ("distill", "space", "authors", "teacher_training", "methods")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A study as a file describes it under a method, and where each of its values was read.

    Attributes:
        path: the file.
        values: keys of `StudyConfig`; flags may be laid over those of the file.
        method: what `select_method` was given.
        written: what the file and its bases say together, before a method was selected.
        places: the `FILE:LINE` of each value in `written`.
        given: the settings by name that were laid over it, but for the method.
        fits: by method, settings that follow the data and the user's batch -> their rules
            (`fitting.RULES`); under None of methods that the recipe does not name.
    """

    path: Path
    values: Mapping[str, Any]
    method: str | None = None
    written: Mapping[str, Any]
    places: Places
    given: frozenset[str] = frozenset()
    fits: Mapping[str | None, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path, method: str | None = None) -> Recipe:
        """A recipe with its bases merged in, under `method` instead of its own if given.

        `path` is a file, or the name of a recipe that comes with ekd_ray (`list_recipes`); so is
        `extends:`, a file being relative to the recipe. Mappings merge key by key, other values
        replace, and a key set to null under `space:` is removed. A setting that a file names is not
        fitted by a rule that one of its bases has for it under `fit:`. Plugins that the files name
        under `plugins:`, and modules of `student` and `teacher`, are loaded if the user allows it.

        Raises:
            UserError: unreadable or malformed YAML, an unknown key, an unknown method, a circle of
                `extends`, or a plugin that the user has not allowed.
        """
        written: dict[str, Any] = {}
        places: Places = {}
        stamps: set[str] = set()
        path = locate_recipe(path)
        files = _chain(path)[::-1]
        for file in files:
            values = {k: v for k, v in file.values.items() if k not in _OF_THE_FILE}
            written = merge(written, values)
            places |= file.places
            stamps |= _load_plugins(file)
        table = written.get("methods")
        methods = {None, *(table if isinstance(table, Mapping) else ())}
        fits: dict[str | None, Mapping[str, Any]] = {name: {} for name in methods}
        for file, name in itertools.product(files, methods):
            fits[name] = _merge_fit(fits[name], file, name)
        recipe = cls(path=path, values=written, written=written, places=places, fits=fits)
        with recipe.locate_errors(or_name_file=True):
            _check(written)
            if stamps:
                written["distill"] = {**(written.get("distill") or {}), "plugins": sorted(stamps)}
            for name, changes in (written.get("methods") or {}).items():
                with error_context("methods", name):
                    _check(changes, f"methods.{name}")
        return recipe.under(method)

    @property
    def name(self) -> str:
        """Its name in `list_recipes`, or its file."""
        path = self.path.absolute()
        if not path.is_relative_to(SEARCH_SPACES):
            return str(path)
        return path.relative_to(SEARCH_SPACES).with_suffix("").as_posix()

    @functools.cached_property
    def config(self) -> StudyConfig:
        """The study, checked; a value that is refused is located."""
        with self.locate_errors():
            return StudyConfig.from_dict(self.values, where=str(self.path))

    @classmethod
    def of_study(cls, path: str | Path, method: str | None = None) -> Recipe:
        """The study that the `study.yaml` of a run holds."""
        file = read_study_file(Path(path))
        written = file.values.get("study") or {}
        if not isinstance(written, Mapping):
            raise UserError(f"{path}: study must be a mapping of settings, got {shorten(written)}.")
        load_named(stamps_in_study(file.values), Path(path).parent / SOURCES, named_by=Path(path))
        places = {keys[1:]: place for keys, place in file.places.items() if keys[0] == "study"}
        recipe = cls(path=Path(path), values=written, written=written, places=places)
        return recipe.under(method)

    @property
    def fit(self) -> Mapping[str, Any]:
        """The rules under its method."""
        return self.fits.get(self.method, self.fits.get(None, {}))

    def under(self, method: str | None) -> Recipe:
        """The recipe under a method (see `select_method`)."""
        values = select_method(self.written, method)
        if values.get("space"):
            space = {name: spec for name, spec in values["space"].items() if spec is not None}
            values["space"] = space
        return replace(self, values=values, method=method)

    @contextlib.contextmanager
    def locate_errors(self, *, or_name_file: bool = False) -> Iterator[None]:
        """A `UserError` raised inside, about one of the values, names its file and line.

        Args:
            or_name_file: name the recipe where the value is in no file.
        """
        try:
            yield
        except UserError as error:
            place = self._find_place(error.keys or ()) or (or_name_file and self.path)
            if not place:
                raise
            raise UserError(f"{place}: {error}") from None

    def _find_place(self, keys: Keys) -> str | None:
        """The place of the value to which `keys` lead; None for one that is in no file."""
        there, value = _follow(self.values, keys)
        # Of a section no more is known than that something in it is missing.
        if not there or len(there) == 1 < len(keys):
            return None
        for way in self._written_keys(there):
            found, raw = _follow(self.written, way)
            if found == way:
                # A flag's value is in no file. Compared as text: NaN is not equal to itself.
                return find_place(self.places, way) if shorten(raw) == shorten(value) else None
        return None

    def _written_keys(self, keys: Keys) -> tuple[Keys, ...]:
        """Where `select_method` takes the value of `keys` from, the place that wins first."""
        if self.method is None or self.method == _own_method(self.written):
            return (keys,)
        table = ("methods", self.method, *keys)
        if keys[0] not in ("authors", "first_points"):
            return table, keys
        # Where the method itself is searched, each point is one method's authors' values.
        depth = 1 if keys[0] == "authors" else 2
        point = _follow(self.values, keys[:depth])[1]
        name = point.get("method") if isinstance(point, Mapping) else None
        rest = keys[depth:]
        return table, ("methods", str(name), "authors", *rest), ("authors", *rest)


def _merge_fit(base: Mapping[str, Any], file: YamlFile, method: str | None) -> dict[str, Any]:
    """The rules of a file, and those of its bases for settings that it does not name itself, as it
    is or under a method."""
    own = file.values.get("fit") or {}
    with file.locate_errors(), error_context("fit"):
        check_rules(own)
    table = file.values.get("methods")
    entry = table.get(method) if isinstance(table, Mapping) else None
    named: set[Any] = set()
    for values in (file.values, entry if isinstance(entry, Mapping) else {}):
        for section in map(values.get, ("distill", "space")):
            named |= {*(section if isinstance(section, Mapping) else ())}
    kept = {name: rule for name, rule in base.items() if name not in named}
    return {name: rule for name, rule in {**kept, **own}.items() if rule is not None}


def _load_plugins(file: YamlFile) -> set[str]:
    """Load the plugins that a recipe names, if the user allows it; returns their stamps."""
    named = file.values.get("plugins") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        with file.locate_errors():
            raise UserError(
                f"plugins must be a list of modules or FILE.py, got {shorten(named)}.",
                keys=("plugins",),
            )
    modules = (module_in_name(model) for model in _models_in(file.values))
    named = [*named, *(module for module in modules if module)]
    return {plugin.stamp for plugin in load_references(named, named_by=file.path)}


def _models_in(values: Any) -> Iterator[str]:
    """The names of students and teachers anywhere in a recipe."""
    if isinstance(values, list):
        values = dict(enumerate(values))
    if isinstance(values, Mapping):
        for key, value in values.items():
            if key in ("student", "teacher"):
                listed = value.get("choices") if isinstance(value, Mapping) else [value]
                yield from (model for model in listed or () if isinstance(model, str))
            yield from _models_in(value)


def load_recipe(path: str | Path, method: str | None = None) -> dict[str, Any]:
    """The values of `Recipe.load`."""
    return dict(Recipe.load(path, method).values)


def _check(values: Any, inside: str = "") -> None:
    """Raise `UserError` for an unknown key or a section of the wrong kind.

    Args:
        inside: the entry of `methods:` that the values are, `methods.dkd`.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{inside} must be a mapping, got {shorten(values)}.", keys=())
    legal = StudyConfig.names() if inside else ("methods", *StudyConfig.names())
    for key in values:
        if key not in legal:
            raise unknown_name(f"key in {inside}:" if inside else "key", key, legal, keys=(key,))
    dot = f"{inside}." if inside else ""
    for section in _SECTIONS:
        got = values.get(section)
        if not isinstance(got, Mapping | None):
            raise UserError(
                f"{dot}{section} must be a mapping, got {shorten(got)}.", keys=(section,)
            )
    points = values.get("first_points") or []
    if not isinstance(points, list) or not all(isinstance(point, Mapping) for point in points):
        raise UserError(
            f"{dot}first_points must be a list of mappings, got {shorten(points)}.",
            keys=("first_points",),
        )


def select_method(values: Mapping[str, Any], method: str | None) -> dict[str, Any]:
    """The values of a study under `method`, with the `methods:` table taken out.

    `method` is a key of `methods:` or a name of `METHODS`; None, and the recipe's own
    method, leave the rest as it is. Under another one the method settings of the recipe,
    their ranges, its first points and its authors' values go. The ranges of a name of
    `METHODS` come (`Method.space`), and what the table's entry says is laid over them; authors'
    values of its own lack of EKD's prior and second order are the recipe's. An entry that searches
    `method` itself starts from the authors' values of each of its choices.

    Raises:
        UserError: an unknown method.
    """
    rest = {key: value for key, value in values.items() if key != "methods"}
    table = values.get("methods") or {}
    distill = rest.get("distill") or {}
    if method is None or method == _own_method(values):
        return rest
    # Late: --help and a recipe's own method need no torch.
    from ekd_ray.losses.methods import METHODS

    load()
    if not isinstance(method, str) or method not in {*METHODS, *table}:
        raise unknown_name("method", method, [*METHODS, *(k for k in table if k not in METHODS)])
    changes = table.get(method) or {}
    if method in METHODS:
        changes = merge({"space": METHODS[method].space}, changes)
    space = rest.get("space") or {}
    stripped = {
        **rest,
        "distill": {k: v for k, v in distill.items() if k not in REGISTRY},
        "space": {k: v for k, v in space.items() if k not in REGISTRY and k != "method"},
        "authors": None,
        "first_points": [],
    }
    own = {} if (changes.get("distill") or {}).get("method") else {"distill": {"method": method}}
    result = merge(merge(stripped, changes), own)
    if result["authors"]:
        result["authors"] = _with_second_order(values, method, result["authors"])
    searched = ((changes.get("space") or {}).get("method") or {}).get("choices") or ()
    own_authors = {_own_method(values): rest.get("authors")}
    points = []
    for name in searched:
        point = (table.get(name) or {}).get("authors") or own_authors.get(name) or {}
        points.append({"method": name, **_with_second_order(values, name, point)})
    if points:
        result["authors"], *result["first_points"] = points
    return result


def _with_second_order(
    values: Mapping[str, Any], method: Any, authors: Mapping[str, Any]
) -> dict[str, Any]:
    """Authors' values of a method; of EKD's prior and second order they may be the recipe's own."""
    from ekd_ray.losses.methods import METHODS

    entry = METHODS.get(method) if isinstance(method, str) else None
    if entry is None or not (entry.evidential and entry.needs_teacher):
        return dict(authors)
    own = values.get("authors") or {}
    return {**{name: own[name] for name in _SECOND_ORDER if name in own}, **authors}


def _own_method(values: Mapping[str, Any]) -> Any:
    return (values.get("distill") or {}).get("method", DistillConfig().method)


def _chain(path: Path) -> list[YamlFile]:
    """A recipe and those that it extends, nearest first."""
    files: list[YamlFile] = []
    while True:
        file = YamlFile.read(path)
        resolved = [there.path.resolve() for there in (*files, file)]
        if resolved[-1] in resolved[:-1]:
            circle = " -> ".join(map(str, resolved))
            raise UserError(f"extends makes a circle: {circle}; remove one of the lines.")
        if len(files) >= MOST_BASES:
            raise UserError(f"{path} is extended over {MOST_BASES} times: remove a base.")
        files.append(file)
        base = file.values.get("extends")
        if base is None:
            return files
        with file.locate_errors():
            if not isinstance(base, str):
                raise UserError(
                    f"extends must be a file name or a recipe's name, got {shorten(base)}.",
                    keys=("extends",),
                )
            with error_context("extends"):
                path = locate_recipe(base, path.parent)


def _follow(values: Any, keys: Keys) -> tuple[Keys, Any]:
    """As many of the keys as lead somewhere, and what stands there."""
    for count, key in enumerate(keys):
        listed = isinstance(values, list) and isinstance(key, int) and key < len(values)
        if not listed and not (isinstance(values, Mapping) and key in values):
            return keys[:count], values
        values = values[key]
    return keys, values


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it, mapping by mapping."""
    result = dict(base)
    for key, value in changes.items():
        # A range is one value: {choices: ...} must not merge with {low: ..., high: ...}.
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        mergeable = both and not _is_range(value)
        result[key] = merge(result[key], value) if mergeable else value
    return result


def _is_range(value: Mapping[str, Any]) -> bool:
    return "low" in value or "choices" in value


def list_recipes(folder: Path = SEARCH_SPACES) -> list[str]:
    """The names of the recipes below a folder: `default`, `cifar100/vgg13-vgg8`, ..."""
    files = (path.relative_to(folder) for path in folder.rglob("*.yaml"))
    return sorted(path.with_suffix("").as_posix() for path in files)


def locate_recipe(name: str | Path, folder: Path | None = None) -> Path:
    """The file of a recipe: as it is called, or that of a name of `list_recipes`.

    Args:
        folder: where a file lies that is named by a relative path (None: here).

    Raises:
        UserError: neither.
    """
    path = Path(folder or "", name)
    if path.suffix in (".yaml", ".yml") or os.path.isfile(path):  # Path's own may raise
        return path
    known = list_recipes()
    if str(name) not in known:
        raise unknown_name("recipe", str(name), known, keys=())
    return SEARCH_SPACES / f"{name}.yaml"


def known_pairs(folder: Path, home: str) -> list[str]:
    """The pairs with a recipe in `<folder>/<home>/`; raises `UserError` where there is none."""
    known = sorted(p.stem for p in (folder / home).glob("*.yaml") if not p.stem.startswith("_"))
    if not known:
        homes = sorted({path.parent.name for path in folder.glob("*/*.yaml")} & {*DATASETS})
        raise UserError(
            f"no pair has a recipe for the data set {shorten(home)}.{meant_name(home, homes)} "
            f"There are some for {', '.join(homes)}; for other data give --teacher T --student S, "
            "or --space RECIPE (ekd-ray space list)."
        )
    return known


def find_recipe(folder: Path, home: str | None, pair: str) -> Path:
    """The recipe of a pair: `<folder>/<home>/<pair>.yaml`; `pair` may be `HOME/PAIR` by itself.

    Args:
        home: usually the data set; None for the default one's, then whichever has the pair.

    Raises:
        UserError: there is none; lists the pairs that there are.
    """
    if "/" in pair:
        home, _, pair = pair.rpartition("/")
    known = known_pairs(folder, home or DistillConfig().dataset)
    elsewhere = [name for name in list_recipes(folder) if name.endswith(f"/{pair}")]
    if pair in known:
        return folder / (home or DistillConfig().dataset) / f"{pair}.yaml"
    if home is None and len(elsewhere) == 1:
        return folder / f"{elsewhere[0]}.yaml"
    if pair.startswith(("folder:", "hf:")) or pair in DATASETS:
        raise UserError(
            f"{pair!r} names a data set, and a pair of networks is asked for: give it by "
            "--dataset, in Python by dataset=."
        )
    where = f" for {home}" if home else ""
    raise unknown_name(f"pair{where}", pair, elsewhere or known)
