"""Checkpoints of other projects: which kind of file it is, what lies in it, which set of weights.

Nothing in a file is executed. Tensors and numbers are read; harmless objects beside them
(`argparse.Namespace`, paths, enums, classes of a project) become empty stand-ins of their names.
"""

from __future__ import annotations

import contextlib
import math
import pickle
import re
import sys
import tarfile
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from ekd_ray.config.phrases import joined
from ekd_ray.errors import UserError, unknown_name
from ekd_ray.files import open_plain

# Names under which DataParallel, torch.compile, FSDP and checkpointing hold a network, or a part.
_TRANSPARENT = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# And those under which it hangs in Lightning and others.
WRAPPERS = (
    *_TRANSPARENT, "model", "net", "network", "backbone", "student", "teacher", "ema",
    "ema_model", "model_ema", "_forward_module",
)  # fmt: skip
# Of them two beside each other are two networks, in a file of a distillation.
_ROLES = {"student", "teacher", "ema", "ema_model", "model_ema"}
# Entries beside a network that are no part of one: losses and metrics of Lightning, the counts of
# swa_utils and thop.
_BESIDE = re.compile(
    r"(criterion|loss(es|_\w+)?|(train|val|test)?_?(acc\w*|metrics?|confmat))\..*"
    r"|(.*\.)?(n_averaged|total_ops|total_params)"
)
_AVERAGED = re.compile(r"ema|swa|averag|shadow", re.IGNORECASE)
_STATES_OF_OTHERS = re.compile(r"optim|sched|scaler|^amp|criterion|loss", re.IGNORECASE)
_DEEPEST = 4

_MOST_GLOBALS = 50  # of other projects in one pickle
# Modules of Python whose objects stand beside weights; of the others none is let in.
_HARMLESS = {
    "argparse", "pathlib", "datetime", "collections", "decimal", "uuid", "types", "typing", "enum",
}  # fmt: skip
# Python's own types, which a `defaultdict(list)` or a configuration with types names.
_TYPES = {"bool", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object",
          "range", "set", "slice", "str", "tuple", "type"}  # fmt: skip

_ACCURACIES = (
    "best_prec1", "best_acc1", "best_acc", "best_top1", "best_accuracy", "val_acc", "val_top1",
    "val_accuracy", "test_acc", "test_top1", "test_accuracy", "prec1", "acc1", "top1", "acc",
    "accuracy",
)  # fmt: skip
_CLASS_NAMES = ("class_names", "classes", "class_to_idx", "idx_to_class", "label_names")
_MOST_CLASSES = 100_000

# First bytes of what people save as .pth, and what it is.
_ARCHIVE = "unpack it, and give the file of weights that lies in it"
_AGAIN = "the download went wrong; fetch the file itself, and look at its size"
_CODE = "save model.state_dict() of it, best as safetensors"
_ARRAYS = "convert its arrays to a state_dict of tensors, and save that"
_HEADS: tuple[tuple[re.Pattern[bytes], str, str], ...] = (
    (re.compile(rb"version https://git-lfs"), "is a pointer of Git LFS and no checkpoint, the "
     "weights were not fetched", "run `git lfs pull` in its repository, or download the file"),
    (re.compile(rb"\s*<"), "is a web page (HTML) and no checkpoint", _AGAIN),
    (re.compile(rb"\s*[{\[]"), "is JSON text and no checkpoint", _AGAIN),
    (re.compile(rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd"),
     "is a compressed archive and no checkpoint", _ARCHIVE),
    (re.compile(rb"\x93NUMPY"), "is an array of NumPy and no checkpoint", _ARRAYS),
    (re.compile(rb"\x89HDF"), "is a file of Keras (HDF5) and no checkpoint of PyTorch",
     "convert it to a state_dict of PyTorch"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Claims:
    """A file's own words about its weights; None and empty where it says nothing.

    `accuracy` is in [0, 1], whatever its unit there. `architecture` is as other projects name it.
    """

    accuracy: float | None = None
    class_names: tuple[str, ...] = ()
    architecture: str | None = None


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One set of weights of a file: `key` names it, `others` those that were not taken."""

    layout: str
    state: dict[str, Tensor]
    key: str | None = None
    others: tuple[str, ...] = ()
    claims: Claims = Claims()


def refusal(path: Path, problem: str, cure: str = "copy or download it again") -> UserError:
    """The error for a weight file, one line."""
    # The representation of the path escapes what would break the line.
    return UserError(f"the weights file {str(path)!r} {problem}: {cure}.")


def damaged(path: Path) -> UserError:
    """The error for a file that cannot be read to its end."""
    return refusal(path, "is truncated, damaged or no checkpoint")


def is_safetensors(path: Path) -> bool:
    """Whether the file starts as safetensors do: a length of 8 bytes, then a JSON object.

    Raises UserError if the file is missing, no plain file, unreadable, empty, or of a kind that
    holds no state_dict.
    """
    try:
        with open_plain(path, cure="check the path of the weights") as file:
            head = file.read(512)
    except OSError as error:
        cure = "check its disk"
        raise refusal(path, f"cannot be read ({error.strerror})", cure) from error
    if not head:
        raise refusal(path, "is empty")
    # Tested before the pickle marks: a header length may begin with the same byte as a pickle.
    if head[8:9] == b"{":
        return True
    if head.startswith(b"PK"):
        _check_zip(path)
        return False
    if head.startswith(b"\x80"):
        return False
    for pattern, problem, cure in _HEADS:
        if pattern.match(head):
            raise refusal(path, problem, cure)
    if head[257:262] == b"ustar" or tarfile.is_tarfile(path):
        raise refusal(path, "is a tar archive and no checkpoint", _ARCHIVE)
    problem = "truncated" if path.suffix == ".safetensors" else "no checkpoint"
    raise refusal(
        path, f"is {problem}, it begins neither as safetensors nor as a file of torch.save"
    )


def _check_zip(path: Path) -> None:
    """Refuse an archive that torch.save has not written; a damaged one is left to torch."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception as error:  # damage comes as errors of every kind
        raise damaged(path) from error
    last = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in last:
        raise refusal(path, "is a TorchScript program and no state_dict", _CODE)
    if names and all(name.endswith(".npy") for name in names):
        raise refusal(path, "holds arrays of NumPy (.npz) and no checkpoint", _ARRAYS)
    if "data.pkl" not in last:
        first = f" (first: {names[0]!r})" if names else ""
        raise refusal(
            path, f"is a ZIP archive of {len(names)} files{first} and no checkpoint", _ARCHIVE
        )


def read_checkpoint(path: Path, key: str | None = None) -> Checkpoint:
    """The weights of a file that is not ours, names as they are there.

    Args:
        key: which of several sets of weights, as `Checkpoint.key`; None for the only one, or for
            the one that was trained where the others are averages of it.

    Raises:
        UserError: no such set, none at all, or several that are no averages of each other.
    """
    content = _read_content(path)
    found = dict(_sets_of_weights(content))
    if not found:
        raise _no_weights(path, content)
    if key is not None and key not in found:
        names = [name for name in found if name]
        if not names:
            raise refusal(path, f"has one set of weights, got teacher_key {key!r}", "leave it out")
        raise unknown_name("teacher_key", key, names, keys=("teacher_key",))
    chosen = _choose(path, found) if key is None else key
    state = found[chosen]
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise refusal(path, f"holds no state_dict, {_odd_entry(name, value)}", _BARE)
    return Checkpoint(
        layout="mdistiller" if chosen == "model" else "plain",
        state=dict(state),
        key=chosen or None,
        others=tuple(name for name in found if name != chosen),
        claims=_claims(content),
    )


# The last file, while somebody reads it again and again.
_kept: ContextVar[dict[object, object] | None] = ContextVar("kept", default=None)


@contextlib.contextmanager
def checkpoints_kept() -> Iterator[None]:
    """Inside, a file of weights that is read again is not unpickled again; it costs its memory."""
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def file_stamp(path: Path) -> tuple[int, int]:
    """(bytes, modification time in ns), by which a change of a file is seen."""
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns


def _read_content(path: Path) -> object:
    """All that a file of safetensors or torch.save holds."""
    plain = is_safetensors(path)
    kept, stamp = _kept.get(), (path.absolute(), file_stamp(path))
    if kept is not None and stamp in kept:
        return kept[stamp]
    try:
        content = safetensors.torch.load_file(path) if plain else _unpickle(path)
    except UserError:
        raise
    except Exception as error:
        raise damaged(path) from error
    if kept is not None:
        kept.clear()
        kept[stamp] = content
    return content


_BARE = "give a file with named tensors, bare or under 'model' or 'state_dict'"


def _odd_entry(name: object, value: object) -> str:
    """Why an entry cannot be one of a state_dict."""
    if not isinstance(name, str):
        return f"its entry {str(name)!r} is named by a {type(name).__name__} and no text"
    return f"its entry {name!r} is a {type(value).__name__} and no tensor"


def _no_weights(path: Path, content: object) -> UserError:
    """The error for a pickle without weights."""
    if isinstance(content, _StandIn):
        name = type(content).__name__.rpartition(".")[2]
        return refusal(path, f"holds a whole pickled {name}, whose code would have to run", _CODE)
    if isinstance(content, Mapping):
        if "param_groups" in content or any("optim" in str(key) for key in content):
            return refusal(
                path, "holds the state of an optimizer and no weights",
                "give the checkpoint of the model, which is saved beside it",
            )  # fmt: skip
        for key in ("model", "state_dict"):
            if key in content:
                content = content[key]
                break
        if isinstance(content, _StandIn):
            return _no_weights(path, content)
        if isinstance(content, Mapping):
            for name, value in content.items():
                if not isinstance(name, str) or not isinstance(value, Tensor):
                    problem = f"holds no state_dict, {_odd_entry(name, value)}"
                    return refusal(path, problem, _BARE)
    return refusal(path, f"holds a {type(content).__name__} and no state_dict", _BARE)


def _sets_of_weights(
    content: object, place: str = "", depth: int = 0
) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """(name, state_dict) of all that may be a network; the name is '' for the file itself."""
    if not isinstance(content, Mapping) or depth > _DEEPEST or "param_groups" in content:
        return
    values = [*content.values()]
    nested = any(isinstance(value, Mapping) and value for value in values)
    if not nested and any(isinstance(value, Tensor) and value.dim() for value in values):
        roles = _networks_of_roles(content)
        for role, state in roles.items():
            yield f"{place}.{role}".lstrip("."), state
        if not roles:
            yield place, content
        return
    for key, value in content.items():
        if isinstance(key, str) and not _STATES_OF_OTHERS.search(key):
            yield from _sets_of_weights(value, f"{place}.{key}".lstrip("."), depth + 1)


def _networks_of_roles(state: Mapping[Any, Any]) -> dict[str, dict[str, Any]]:
    """The networks in a state_dict that has several, by their roles; empty for one."""
    kept = peelings({str(name): value for name, value in state.items()})[-1]
    firsts = {name.partition(".")[0] for name in kept}
    if len(firsts) < 2 or not firsts <= _ROLES | {"model", "net"} or not firsts & _ROLES:
        return {}
    return {
        first: {name: value for name, value in kept.items() if name.startswith(f"{first}.")}
        for first in sorted(firsts)
    }


def _choose(path: Path, found: Mapping[str, Mapping[Any, Any]]) -> str:
    for usual in ("", "model", "state_dict"):
        if usual in found:
            return usual
    trained = [name for name in found if not _AVERAGED.search(name)] or [*found]
    if len(trained) > 1:
        raise refusal(
            path,
            f"holds {len(trained)} sets of weights ({joined([repr(name) for name in trained])})",
            "say which with --teacher-key NAME",
        )
    return trained[0]


def peelings(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A state_dict without what is no weight, then with one wrapper less each, to the last; then
    without wrappers of its parts, such as `features.module.`."""
    plain = {name: value for name, value in state.items() if not _BESIDE.fullmatch(name)}
    found = [plain or dict(state)]
    while True:
        first = next(iter(found[-1]), "").partition(".")[0]
        if first not in WRAPPERS or not all(name.startswith(f"{first}.") for name in found[-1]):
            break
        peeled = {name.removeprefix(f"{first}."): value for name, value in found[-1].items()}
        found.append({name: v for name, v in peeled.items() if not _BESIDE.fullmatch(name)})
    bare = {_without_inner(name): value for name, value in found[-1].items()}
    if bare.keys() != found[-1].keys() and len(bare) == len(found[-1]):
        found.append(bare)
    return found


def _without_inner(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _TRANSPARENT)


# Reading a pickle without executing it.


class _StandIn(dict[Any, Any]):
    """An object of a class that is not imported: takes all that a pickle gives it, does nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> _StandIn:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None:
        pass

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)


class _MappingStandIn(_StandIn):
    """A stand-in of a class that is a `dict` (EasyDict, addict, CfgNode of yacs), which torch fills
    only if it is of the exact type: its objects become `OrderedDict`, whose attributes a pickle
    may set."""

    def __new__(cls, *args: object, **kwargs: object) -> Any:
        return OrderedDict()


def _numpy_globals() -> list[Any]:
    """The scalars and arrays of NumPy, under their names of all its versions."""
    makers = {"scalar": np.float64(1).__reduce__()[0], "_reconstruct": np.ones(1).__reduce__()[0]}
    allowed: list[Any] = [np.dtype, np.ndarray]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        allowed += [(maker, f"{module}.{name}") for name, maker in makers.items()]
    kinds = [np.dtype(code) for code in "?bBhHiIlLqQefd"]
    return [*allowed, *{type(kind) for kind in kinds}, *{kind.type for kind in kinds}]


def _unpickle(path: Path) -> object:
    allowed = _numpy_globals()
    for _ in range(2 * _MOST_GLOBALS):
        try:
            with warnings.catch_warnings(), torch.serialization.safe_globals(allowed):
                # Torch warns of odd pickle protocols; whether the file is good is what we answer.
                warnings.simplefilter("ignore")
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            # torch shows the class of ours whose object is no plain dict to it.
            shown = str(error) if "SETITEM" in str(error) else ""
            entry = next((e for e in _named(allowed) if repr(e[0]) in shown), None)
            if entry is not None:
                allowed[allowed.index(entry)] = _stand_in(entry[1], _MappingStandIn)
                continue
            # torch names what the file asked for, in one of two wordings.
            found = re.search(r"(?:GLOBAL |safe_globals\(\[)([\w.]+)", str(error))
            asked = found[1] if found else ""
            names = _spellings(asked)
            if not _is_harmless(asked) or names[0] in (entry[1] for entry in _named(allowed)):
                raise refusal(
                    path,
                    "was refused and not executed, because its pickle holds more than tensors"
                    f"{f' ({asked})' if asked else ''} or is damaged",
                    "ask its owner for the state_dict alone, best as safetensors",
                ) from error
            allowed += [_stand_in(name, _StandIn) for name in names]
        except Exception as error:  # the unpickler meets damage with errors of every kind
            raise damaged(path) from error
    raise refusal(path, f"holds objects of more than {_MOST_GLOBALS} classes", _CODE)


def _spellings(name: str) -> list[str]:
    """The names by which pickles call a type of Python, which torch tells without its module; of
    all else the name itself."""
    bare = name.removeprefix("builtins.").removeprefix("__builtin__.")
    return [f"builtins.{bare}", f"__builtin__.{bare}"] if bare in _TYPES else [name]


def _stand_in(name: str, base: type[_StandIn]) -> tuple[type[_StandIn], str]:
    """A class for a name of a pickle, and the name, which is the class's too."""
    return type(name, (base,), {}), name


def _named(allowed: Sequence[Any]) -> list[tuple[Any, str]]:
    return [entry for entry in allowed if isinstance(entry, tuple)]


def _is_harmless(name: str) -> bool:
    """Whether an object of this name may be left out: of another project, or plain data.

    What Python has to run commands and to open files is refused: a file that asks for it is no
    checkpoint.
    """
    if len(_spellings(name)) > 1:
        return True
    module = name.partition(".")[0]
    # torch's protocol calls Python's modules as Python 2 did (`commands` for `subprocess`).
    of_python = {*sys.stdlib_module_names, *IMPORT_MAPPING, *(old for old, _ in NAME_MAPPING)}
    return module in _HARMLESS | {"__main__"} or module not in of_python | {"torch", "numpy", ""}


# Claims.


def _claims(content: object) -> Claims:
    if not isinstance(content, Mapping):
        return Claims()
    metrics = content.get("metrics")
    places = [content, *([metrics] if isinstance(metrics, Mapping) else [])]
    numbers = [_accuracy(place.get(name)) for name in _ACCURACIES for place in places]
    names = [_class_names(content.get(name)) for name in _CLASS_NAMES]
    architecture = content.get("arch")
    return Claims(
        accuracy=next((number for number in numbers if number is not None), None),
        class_names=next(filter(None, names), ()),
        architecture=architecture if isinstance(architecture, str) else None,
    )


def _accuracy(value: object) -> float | None:
    """A figure as a share, None where it is none; above 1 it is in per cent."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return None
    number = float(value)
    number = number / 100 if number > 1 else number
    return number if math.isfinite(number) and 0 < number <= 1 else None


def _class_names(value: object) -> tuple[str, ...]:
    """Names in the order of the logits, from a list or either direction of a mapping."""
    if isinstance(value, Mapping) and 0 < len(value) <= _MOST_CLASSES:
        pairs = [(k, v) if isinstance(k, int | np.integer) else (v, k) for k, v in value.items()]
        if not all(isinstance(index, int | np.integer) for index, _ in pairs):
            return ()
        if sorted(index for index, _ in pairs) != list(range(len(pairs))):
            return ()
        value = [name for _, name in sorted(pairs, key=lambda pair: pair[0])]
    if not isinstance(value, list | tuple) or not 0 < len(value) <= _MOST_CLASSES:
        return ()
    return tuple(value) if all(isinstance(name, str) for name in value) else ()
