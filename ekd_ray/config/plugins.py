"""Other people's code: plugins, which register models, data sets and methods.

A plugin is a module with its source. It runs on the user's word only: it was named by a flag or an
argument, is installed as an entry point, or is named by a file that the user trusts. From then on
its source goes wherever the work goes: into every Ray process, into a study's folder, into the
bundle; and its SHA-256 is part of the fingerprints of the runs that use it.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import re
import struct
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Concatenate, ParamSpec, TypeVar

from ekd_ray.config.ensembles import is_ensemble, member_names
from ekd_ray.errors import UserError, shorten
from ekd_ray.files import expand_home, read_text, write_text

ENTRY_POINTS = "ekd_ray.plugins"
SOURCES = "plugins"  # the folder of their sources, in a study or a bundle
_STAMP = re.compile(r"[\w.]+@[0-9a-f]{64}\b")
GIVEN = "given_"  # begins the names of plugins without a file
MAIN = "__main__"  # a script or a notebook, which no other process can import
# Of a package with more source than that only the hash travels: it must be installed everywhere.
LARGEST = 2_000_000
LIBRARIES = ("torchvision", "timm")  # whose models have names of the same form, `timm:resnet18`

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """A module and the source that it is made of.

    Attributes:
        name: what is imported, `my_parts` or `package.module`.
        files: the source of the module, or of the whole package that it is in, by path below the
            folder from which it is imported. None where there is too much of it to carry.
        sha256: of paths and sources.
        origin: where it was found, for people.
    """

    name: str
    files: dict[str, str] | None
    sha256: str
    origin: str

    @classmethod
    def of_files(cls, name: str, files: dict[str, str], origin: str) -> Plugin:
        """The plugin with this source."""
        digest = hashlib.sha256()
        for path, text in sorted(files.items()):
            digest.update(f"{path}\0{len(text)}\0{text}".encode())
        return cls(name=name, files=files, sha256=digest.hexdigest(), origin=origin)

    @property
    def stamp(self) -> str:
        """`NAME@SHA256`, as configurations have it."""
        return f"{self.name}@{self.sha256}"


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A model, data set or method that was registered: by whom, and how to do so again."""

    origin: str
    table: MutableMapping[str, Any]
    register: Callable[[], object]


_loaded: dict[str, Plugin] = {}
_parts: dict[tuple[str, str], _Part] = {}
_origins: list[str | None] = []  # of what is registered now: a plugin, MAIN, or None of our own
_trusts_files = False


# The user's word


def load_plugin(reference: str) -> Plugin:
    """Import a plugin, a module by name or a FILE.py, on the user's word; once.

    Raises:
        UserError: it is not there, fails when it is imported, or another one has its name.
    """
    if reference.endswith(".py"):
        return _load(_read_file(expand_home(reference).absolute()))
    return _load(_find_module(reference))


def trust_files(*, trust: bool = True) -> None:
    """Let files (recipes, studies, bundles) name plugins in this process, which are then run."""
    global _trusts_files
    _trusts_files = trust


@contextlib.contextmanager
def files_trusted(trust: bool) -> Iterator[None]:
    """`trust_files` for a while, if `trust` is true; else as before."""
    before = _trusts_files
    trust_files(trust=trust or before)
    try:
        yield
    finally:
        trust_files(trust=before)


@functools.cache
def load_installed() -> None:
    """Import the plugins that installed packages declare; one that fails is left out and said."""
    from importlib import metadata  # takes as long as the rest of a command's help

    for entry in metadata.entry_points(group=ENTRY_POINTS):
        try:
            _load(_find_module(entry.module))
        except UserError as error:
            warnings.warn(f"the installed plugin {entry.name} is left out: {error}", stacklevel=2)


def stamps_in_study(values: Mapping[str, Any]) -> Any:
    """The stamps that the content of a study.yaml names; () where it is damaged."""
    for key in ("study", "distill", "plugins"):
        values = values.get(key) or {} if isinstance(values, Mapping) else {}
    return values or ()


def load_named(stamps: Iterable[str], folder: Path, *, named_by: Path) -> None:
    """Load the plugins that a file names by their stamps, if they were not loaded before.

    Args:
        folder: holds their sources, if anything does.

    Raises:
        UserError: the user has not allowed it, or the source is lost or another one.
    """
    check_stamps(stamps)
    _load_imported()
    if all(map(_is_loaded, stamps)):
        return
    load_installed()
    missing = dict(stamp.split("@", 1) for stamp in stamps if not _is_loaded(stamp))
    for name, digest in missing.items():
        if known := _loaded.get(name):
            raise UserError(
                f"{named_by} was made with another {name} (SHA-256 {digest[:12]}...) than "
                f"{known.origin} ({known.sha256[:12]}...): give the one that it was made with."
            )
    files = {name: folder / f"{name}.py" for name in missing}
    _require_trust([str(f) if f.is_file() else name for name, f in files.items()], named_by)
    found = []
    for name, digest in missing.items():
        sources = _read_sources(folder, name)
        found += [Plugin.of_files(name, sources, str(folder)) if sources else _find_module(name)]
        if found[-1].sha256 != digest:
            raise UserError(
                f"the plugin {name} of {named_by} must have the SHA-256 {digest}, got "
                f"{found[-1].sha256} ({found[-1].origin}): it is not the code that this was made "
                "with."
            )
    _load_all(found)


def load_references(references: Iterable[str], *, named_by: Path) -> list[Plugin]:
    """The plugins that a recipe names, modules or files beside it, loaded if the user allows it.

    Raises:
        UserError: the user has not allowed it, or as `load_plugin`.
    """
    _load_imported()
    files = {ref: str(named_by.parent / ref) if ref.endswith(".py") else ref for ref in references}
    if not all(map(_was_given, files.values())):
        load_installed()
    missing = [ref for ref, file in files.items() if not _was_given(file)]
    if missing:
        _require_trust(missing, named_by)
    return [load_plugin(file) for file in files.values()]


def _require_trust(names: list[str], named_by: Path) -> None:
    if _trusts_files:
        return
    listed, given = ", ".join(names), " ".join(f"--plugin {name}" for name in names)
    raise UserError(
        f"{named_by} names code that is not ekd_ray's own and would be run ({listed}): read it, "
        f"then give {given}, or --trust-plugins (in Python trust_plugins=True) for all of it."
    )


def _load_imported() -> None:
    """Know the modules that register parts and that the user's own program has imported."""
    for part in _parts.values():
        if part.origin != MAIN and part.origin not in _loaded:
            _loaded[part.origin] = _find_module(part.origin)


def _was_given(reference: str) -> bool:
    if not reference.endswith(".py"):
        return reference in _loaded
    known = _loaded.get(Path(reference).stem)
    return known is not None and known.stamp == _read_file(Path(reference).absolute()).stamp


def _is_loaded(stamp: str) -> bool:
    known = _loaded.get(stamp.partition("@")[0])
    return known is not None and known.stamp == stamp


# Registering


def registers(
    kind: str, table: MutableMapping[str, Any]
) -> Callable[[Callable[Concatenate[str, P], T]], Callable[Concatenate[str, P], T]]:
    """Decorate a function that registers a part by its name: from then on its origin is known.

    A script or a notebook may register a part again, which replaces it.

    Args:
        kind: `model`, `dataset` or `method`; table: what the function adds the part to.
    """

    def decorate(register: Callable[Concatenate[str, P], T]) -> Callable[Concatenate[str, P], T]:
        @functools.wraps(register)
        def note(name: str, *args: P.args, **kwargs: P.kwargs) -> T:
            caller = sys._getframe(1).f_globals.get("__name__", MAIN)
            origin = _origin(caller)
            known = _parts.get((kind, name)) if isinstance(name, str) else None
            if known and known.origin == origin == MAIN:
                table.pop(name, None)
                _, replaced = _pickled_parts.pop(id(known), (known, None))
                if replaced:
                    _loaded.pop(replaced.name, None)
            with _registering(origin):
                result = register(name, *args, **kwargs)
            if origin is not None:
                again = functools.partial(note, name, *args, **kwargs)
                _parts[kind, name] = _Part(origin=origin, table=table, register=again)
            return result

        return note

    return decorate


def _origin(caller: str) -> str | None:
    """The plugin that a module which registers something belongs to; None for ekd_ray's own."""
    if _origins and _origins[-1] == MAIN:
        return MAIN
    if caller.partition(".")[0] == __package__.partition(".")[0]:
        return None
    if _origins and _origins[-1] is not None:
        return _origins[-1]
    spec = getattr(sys.modules.get(caller), "__spec__", None)
    importable = spec is not None and spec.name == caller  # not in exec or runpy
    return caller if importable else MAIN


def current_origin() -> str | None:
    """The plugin, or MAIN, that something is being registered by; None for ekd_ray's own."""
    return _origins[-1] if _origins else None


def is_of(stamps: Iterable[str], origin: str) -> bool:
    """Whether one of these plugins is that origin."""
    names = {stamp.partition("@")[0] for stamp in stamps}
    if origin == MAIN:
        return any(name.startswith(GIVEN) for name in names)
    return origin in names


@contextlib.contextmanager
def _registering(origin: str | None) -> Iterator[None]:
    """Parts that are registered inside come from there."""
    _origins.append(origin)
    try:
        yield
    finally:
        _origins.pop()


def given_in_python() -> contextlib.AbstractContextManager[None]:
    """Parts that are registered inside have no source of their own, and are pickled by value."""
    return _registering(MAIN)


def stamps_of(parts: Iterable[tuple[str, str | None]]) -> tuple[str, ...]:
    """The stamps of the plugins that parts, by (kind, name), come from; none of ekd_ray's own.

    Raises:
        UserError: a part was registered where its source cannot be found.
    """
    found = set()
    each = [(kind, part) for kind, name in parts for part in member_names(name or "")]
    for kind, name in each:
        part = _parts.get((kind, name))
        if part is not None:
            found.add(_plugin_of(part).stamp)
        elif kind == "model" and (module := module_in_name(name)) in _loaded:
            found.add(_loaded[str(module)].stamp)
    return tuple(sorted(found))


def check_stamps(stamps: Any) -> None:
    """Raise `UserError` unless these are stamps of plugins."""
    listed = isinstance(stamps, list | tuple) and all(isinstance(stamp, str) for stamp in stamps)
    if not (listed and all(map(_STAMP.fullmatch, stamps))):
        got = stamps if not listed else next(s for s in stamps if not _STAMP.fullmatch(s))
        raise UserError(
            f"plugins of a run are listed as NAME@SHA256, got {shorten(got)}: give --plugin NAME.",
            keys=("plugins",),
        )


def check_loaded(stamps: Iterable[str]) -> None:
    """Raise `UserError` unless what is loaded is what these stamps name."""
    _load_imported()
    for stamp in stamps:
        if not _is_loaded(stamp):
            name, _, digest = stamp.partition("@")
            known = _loaded.get(name)
            raise UserError(
                f"this configuration was made with the plugin {name} of SHA-256 {digest}, got "
                f"{known.sha256 if known else 'none of that name'}: give the one it was made with.",
                keys=("plugins",),
            )


def module_in_name(model: str) -> str | None:
    """The module of a model that is named as `package.module:function`; None for other names."""
    module, colon, function = model.partition(":")
    known = module in LIBRARIES or is_ensemble(model)
    if not colon or not function.isidentifier() or known:
        return None
    return module if all(part.isidentifier() for part in module.split(".")) else None


def is_loaded(module: str) -> bool:
    """Whether a module was loaded as a plugin."""
    return module in _loaded


def _plugin_of(part: _Part) -> Plugin:
    if part.origin == MAIN:
        return _pickled(part)
    _load_imported()
    return _loaded[part.origin]


_pickled_parts: dict[int, tuple[_Part, Plugin]] = {}


def _pickled(part: _Part) -> Plugin:
    """A part of a script or a notebook as a plugin: pickled by value, in a file that registers it.

    Its hash is good for this process alone: what is to be resumed in another belongs in a file.
    """
    known = _pickled_parts.get(id(part))
    if known is not None:
        return known[1]
    import cloudpickle  # only parts without a file need it

    try:
        data = cloudpickle.dumps(part.register)
    except Exception as error:
        raise UserError(
            f"what was registered in this script cannot be sent to other processes ({error}): "
            "put it into a file of its own, and give that as a plugin."
        ) from error
    if len(data) > LARGEST:
        raise UserError(
            f"what was registered in this script is {len(data) / 1e6:.0f} MB with all that it "
            f"refers to, more than {LARGEST / 1e6:.0f}: let it read its data from a file."
        )
    text = (
        '"""A part that was given in Python, pickled by value."""\n\n'
        "import base64\nimport pickle\n\n"
        f"pickle.loads(base64.b64decode({base64.b64encode(data)!r}))()\n"
    )
    name = f"{GIVEN}{hashlib.sha256(data).hexdigest()[:12]}"
    plugin = Plugin.of_files(name, {f"{name}.py": text}, "this script or notebook")
    _pickled_parts[id(part)] = part, plugin
    _loaded[name] = plugin
    return plugin


# Where their sources go


@dataclass(frozen=True)
class LoadedPlugins:
    """Plugins by their stamps; where this is unpickled, they are loaded.

    Whatever Ray carries to its processes has one, so that names are known there.
    """

    stamps: tuple[str, ...] = ()

    def __reduce__(self) -> tuple[Callable[..., LoadedPlugins], tuple[tuple[Plugin, ...]]]:
        return _receive, (tuple(map(_find_loaded, self.stamps)),)


def _find_loaded(stamp: str) -> Plugin:
    """The plugin of a stamp; raises `UserError` for a part that was registered anew since."""
    if not _is_loaded(stamp):
        raise UserError(
            f"the plugin {stamp[:40]}... is not loaded any more, because its part was registered "
            "anew: do this before, or put the part into a file."
        )
    return _loaded[stamp.partition("@")[0]]


def _receive(plugins: tuple[Plugin, ...]) -> LoadedPlugins:
    _load_all(plugin for plugin in plugins if plugin.name not in _loaded)
    return LoadedPlugins(tuple(plugin.stamp for plugin in plugins))


def describe_plugins(stamps: Iterable[str]) -> list[str]:
    """Plugins that are loaded for people: name, the beginning of the hash, where it was found."""
    found = map(_find_loaded, stamps)
    return [f"{plugin.name}, SHA-256 {plugin.sha256[:12]}..., {plugin.origin}" for plugin in found]


def write_sources(folder: Path, stamps: Iterable[str]) -> list[str]:
    """Write the sources of plugins to `<folder>/plugins`; returns their paths below `folder`."""
    names = []
    for stamp in stamps:
        for path, text in sorted((_find_loaded(stamp).files or {}).items()):
            write_text(folder / SOURCES / path, text)
            names.append(f"{SOURCES}/{path}")
    return names


def names_plugins(path: Path) -> bool:
    """Whether a configuration's file has stamps of plugins; reads it as text."""
    return _STAMP.search(read_text(path)) is not None


def _read_sources(folder: Path, name: str) -> dict[str, str]:
    """The files of a module, or of the package that it is in, below the folder it lies in."""
    top = name.partition(".")[0]
    found = [*folder.glob(f"{top}.py"), *(folder / top).rglob("*.py")]
    cure = f"it is of the plugin {name}"
    return {p.relative_to(folder).as_posix(): read_text(p, cure=cure) for p in found}


# Finding and importing


def _read_file(path: Path) -> Plugin:
    name = path.stem
    if not name.isidentifier() or name.startswith("__"):
        raise UserError(f"a plugin's file must be named as a module is, got {path}: rename it.")
    text = read_text(path, cure="name a plugin's source")
    spec = None if name in _finder.modules else importlib.util.find_spec(name)
    if spec and not (spec.origin and Path(spec.origin).absolute() == path):
        raise UserError(f"the plugin {path} has the name of an installed module: rename it.")
    _check_fresh(path)
    return Plugin.of_files(name, {path.name: text}, str(path))


def _check_fresh(path: Path) -> None:
    """Raise `UserError` if a file was changed after this process imported it as a module.

    The compiled file beside it knows of which source it is, by time and size (PEP 552).
    """
    for module in list(sys.modules.values()):
        if getattr(module, "__file__", None) != str(path):
            continue
        with contextlib.suppress(OSError, TypeError):
            header = Path(module.__cached__).read_bytes()[4:16]
            there = path.stat()
            now = struct.pack("<II", int(there.st_mtime) & 0xFFFFFFFF, there.st_size & 0xFFFFFFFF)
            if header[:4] == bytes(4) and header[4:] != now:
                raise UserError(
                    f"{path} was changed after it was imported here: start a new process "
                    "(restart the kernel of a notebook)."
                )


def _folder_of(origin: str, spec: importlib.machinery.ModuleSpec) -> Path:
    """The folder from which a module, or the package that starts at `origin`, is imported."""
    folder = Path(origin).absolute().parent
    return folder.parent if spec.submodule_search_locations else folder


def _find_module(name: str) -> Plugin:
    """An importable module with its source, which is read and not yet run."""
    if known := _loaded.get(name):
        return known
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", name):
        raise UserError(f"a plugin is a module or a FILE.py, got {shorten(name)}.")
    top = name.partition(".")[0]
    spec = importlib.util.find_spec(top)
    if spec is None:
        raise UserError(
            f"there is no module {shorten(top)}: install it, or give the plugin as a FILE.py."
        )
    if spec.origin is None:
        raise UserError(
            f"the package {shorten(top)} has no __init__.py: add one, which may be empty."
        )
    folder = _folder_of(spec.origin, spec)
    files = _read_sources(folder, top)
    if not files:
        raise UserError(f"the module {shorten(top)} has no source: give the plugin as a FILE.py.")
    for path in files:
        _check_fresh(folder / path)
    found = Plugin.of_files(name, files, str(folder))
    return replace(found, files=None) if sum(map(len, files.values())) > LARGEST else found


def _load_all(plugins: Iterable[Plugin]) -> None:
    """Import plugins, which may import each other."""
    plugins = list(plugins)
    for plugin in plugins:
        if not _is_importable(plugin):
            _finder.add(plugin)
    for plugin in plugins:
        _load(plugin)


def _load(plugin: Plugin) -> Plugin:
    """Import a plugin's module, from its source where it cannot be imported as it is."""
    name = plugin.name
    if known := _loaded.get(name):
        if known.sha256 != plugin.sha256 and known.origin == plugin.origin:
            raise UserError(
                f"{plugin.origin} was changed after it was loaded here: start a new process "
                "(restart the kernel of a notebook)."
            )
        if known.sha256 != plugin.sha256:
            raise UserError(
                f"there are two plugins {name}, {known.origin} and {plugin.origin}: rename one."
            )
        return known
    _loaded[name] = plugin
    added = [] if _is_importable(plugin) else _finder.add(plugin)
    before = {*sys.modules}
    try:
        with _registering(name):
            importlib.import_module(name)
        _check_complete(plugin, {*sys.modules} - before)
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)  # reads the sources
        _forget(name, added)
        if isinstance(error, UserError) or not isinstance(error, Exception | SystemExit):
            raise
        paths = {*(plugin.files or ())}
        lines = [f.lineno for f in frames if any(f.filename.endswith(path) for path in paths)]
        line = f", line {lines[-1]}" if lines else ""
        raise UserError(
            f"the plugin {plugin.origin}{line} fails: {type(error).__name__}: {error}"
        ) from error
    return plugin


def _check_complete(plugin: Plugin, imported: Iterable[str]) -> None:
    """Refuse a file that imports others of its folder, which would be missing elsewhere."""
    folder = Path(plugin.origin).parent
    if not plugin.origin.endswith(".py"):
        return
    for name in imported:
        file = getattr(sys.modules.get(name), "__file__", None)
        if file and Path(file).parent == folder and name not in _loaded:
            raise UserError(
                f"the plugin {plugin.origin} imports {name} beside it, which does not travel with "
                f"it: give --plugin {Path(file).name} before it, or make a package of both."
            )


def _forget(name: str, modules: Iterable[str]) -> None:
    """Take back what a plugin that failed had done so far."""
    _loaded.pop(name, None)
    for module in modules:
        _finder.modules.pop(module, None)
        sys.modules.pop(module, None)
    for (kind, part), entry in list(_parts.items()):
        if entry.origin == name:
            entry.table.pop(part, None)
            del _parts[kind, part]


def _is_importable(plugin: Plugin) -> bool:
    """Whether the import system by itself finds this very source."""
    if plugin.files is None:
        return True
    top = plugin.name.partition(".")[0]
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # a module without a spec
        return False
    if spec is None or spec.origin is None:
        return False
    sources = _read_sources(_folder_of(spec.origin, spec), top)
    return Plugin.of_files("", sources, "").sha256 == plugin.sha256


class _SourceFinder(importlib.abc.MetaPathFinder, importlib.abc.ExecutionLoader):
    """Imports modules from the sources of plugins, without a file on the disk."""

    def __init__(self) -> None:
        self.modules: dict[str, tuple[str, str]] = {}  # name -> (file, source)

    def add(self, plugin: Plugin) -> list[str]:
        """Make the modules of a plugin importable; returns their names."""
        names = []
        for path, text in (plugin.files or {}).items():
            parts = [*PurePosixPath(path).with_suffix("").parts]
            if parts[-1] == "__init__":
                parts.pop()
            names.append(".".join(parts))
            one_file = plugin.origin.endswith(path)
            self.modules[names[-1]] = (plugin.origin if one_file else path, text)
        return names

    def find_spec(
        self, fullname: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.modules:
            return None
        return importlib.util.spec_from_loader(fullname, self)

    def get_source(self, fullname: str) -> str:
        return self.modules[fullname][1]

    def get_filename(self, fullname: str) -> str:
        return self.modules[fullname][0]

    def is_package(self, fullname: str) -> bool:
        return self.modules[fullname][0].endswith("__init__.py")


_finder = _SourceFinder()
sys.meta_path.insert(0, _finder)
