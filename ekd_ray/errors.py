"""The one exception whose message is meant for the person at the keyboard."""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib.util
import os
import re
import reprlib
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from typing import NoReturn

EXIT_INTERRUPTED = 130
Keys = tuple[str | int, ...]
MOST_LISTED = 10  # names in an error
SAME_COMMAND = "the same command with --resume"
# Where all are listed; of what people add by themselves: how.
_OWN = {
    "command": " `ekd-ray --help` says what each does.",
    "model": " One of your own needs --plugin FILE.py.",
    "method": " `ekd-ray space methods` lists them; one of your own needs --plugin FILE.py.",
    "dataset": " Pictures of your own are folder:PATH or hf:PATH; code that reads others needs "
    "--plugin FILE.py.",
}


class UserError(Exception):
    """A mistake in what the user gave: a flag, a file, a name, a value out of bounds.

    The message is one sentence that names the thing, the bound, the value got and the
    cure. Launchers print it without a traceback and exit with code 2.

    Args:
        keys: the keys that lead to the value, e.g. `("space", "lr", "low")`, by which its line
            in the file is found; None if no single value is to blame.
    """

    exit_code = 2

    def __init__(self, message: str, *, keys: Keys | None = None) -> None:
        super().__init__(spell_controls(message, keep=""))
        self.keys = keys


class Damaged(UserError):
    """A file of ours that is torn, changed, or holds what we never write."""

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(f"{path} is damaged: {reason}.")
        self.path = os.fspath(path)


class _Shortener(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write numbers of more than 4300 digits.
        return repr(x) if x.bit_length() <= 128 else f"a whole number of {x.bit_length()} bits"


_SHORT = _Shortener()
_SHORT.maxother = _SHORT.maxstring = 80


def shorten(value: object) -> str:
    """A value as an error shows it, in a line of moderate length."""
    return " ".join(_SHORT.repr(value).split())


def spell_controls(text: str, *, keep: str = "\n\t") -> str:
    """Foreign text for people: a sign that a terminal would obey or hide is spelt out.

    Escape sequences, marks that turn the direction of writing and halves of signs become `\\x1b`,
    `\\u202e`, ...; spaces of every width and those of `keep` stay.
    """
    if text.isprintable():
        return text
    return "".join(
        sign
        if sign.isprintable() or sign in keep or unicodedata.category(sign) == "Zs"
        else sign.encode("unicode_escape").decode()
        for sign in text
    )


def hide_secrets(url: str) -> str:
    """A URL as messages show it, whatever parser would find a password in it.

    All before the last `@`, and every value of an option, becomes `***`, but for plain names of
    users and `${NAME}`. Other texts stay as they are.
    """
    scheme, mark, rest = url.partition("://")
    if not mark:
        return url
    login, at, place = ("", "", rest) if rest.startswith("/") else rest.rpartition("@")
    if not re.fullmatch(r"[\w.+-]*(:\$\{\w+\})?", login):
        login = "***"
    place, question, query = place.partition("?")
    options = "&".join(
        part if re.fullmatch(r"\w+=\$\{\w+\}", part) else re.sub(r"^([\w+.]+=)?.*", r"\1***", part)
        for part in query.split("&")
        if part
    )
    return f"{scheme}{mark}{login}{at}{place}{question}{options}"


class Interrupted(Exception):
    """Work that was asked to stop before it was finished; `--resume` continues it."""


_continuation: str | None = None
_keeps = True


def continue_with(command: str | None, *, keeps: bool = True) -> None:
    """From now on messages name this command as the one that continues what was begun; None where
    nothing was begun yet.

    Args:
        keeps: it goes on where the work was; else it begins anew.
    """
    global _continuation, _keeps
    _continuation, _keeps = command, keeps


def continuing_command() -> str | None:
    """The command of `continue_with`, as it can be pasted into a shell."""
    return _continuation


def name_continuation() -> str:
    """The command that continues what was begun, for the middle of a sentence."""
    return f"`{_continuation}`" if _continuation else SAME_COMMAND


def _number_in(text: str) -> int | None:
    found = re.search(r"\b(?:os error|errno) (\d+)", text)
    return int(found[1]) if found else None


class Halted(UserError):
    """A stop that is no run's fault: nothing that was finished is lost, and the rest waits."""


class NoSpace(Halted):
    """A disk that is full."""


class OtherData(Halted):
    """Images that are not those that a study began with."""


def error_chain(error: BaseException) -> Iterator[BaseException]:
    """An error, then those that it comes of."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        yield found
        seen.add(id(found))
        found = found.__cause__ or found.__context__


def user_error(error: BaseException) -> UserError | None:
    """The `UserError` that an error is or was made of, as Ray makes one of what a task raised.

    Not one that was at hand by chance (`__context__`): that would hide another error.
    """
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        inner = getattr(found, "cause", None)  # Ray's; the text of its own is a traceback
        inner = inner if isinstance(inner, BaseException) else found.__cause__
        if isinstance(found, UserError) and not isinstance(inner, UserError):
            return found
        found = inner
    return None


def halting_error(error: BaseException) -> Halted | None:
    """The sentence for an error that comes of a full disk or of other data, directly or wrapped;
    else None."""
    for found in error_chain(error):
        if isinstance(found, Halted):
            return found
        # safetensors and pyarrow put the system's number into the text of errors of their own.
        number = getattr(found, "errno", None) or _number_in(str(found))
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            name = getattr(found, "filename", None)
            where = f" for {name}" if name else ""
            return NoSpace(
                f"no space is left on the disk{where} ({os.strerror(number)}): free some, then run "
                f"{name_continuation()}{'; what was finished is kept' if _keeps else ''}."
            )
    return None


@contextlib.contextmanager
def error_context(*keys: str | int) -> Iterator[None]:
    """Put `keys` before those of an error that is raised inside: it is about what they lead to."""
    try:
        yield
    except UserError as error:
        if error.keys is not None:
            error.keys = (*keys, *error.keys)
        raise


def end_process(sentence: str, code: int) -> NoReturn:
    """Say why and end this process from any thread, without cleaning up, as a SIGKILL would."""
    # A live table may have hidden the cursor. Not by `print`: another thread may hold its lock.
    cursor = "\r\x1b[?25h" if sys.stderr.isatty() else ""
    with contextlib.suppress(OSError):
        os.write(2, f"{cursor}{sentence}\n".encode())
    os._exit(code)


def require(condition: object, sentence: str) -> None:
    """Raise `AssertionError` with the sentence unless the condition holds, under `-O` too."""
    if not condition:
        raise AssertionError(sentence)


# Names that other tools have, and ours.
_ELSEWHERE = {
    "acc": "top1", "accuracy": "top1", "loss": "nll", "params": "parameters",
    "latency": "latency_ms", "learning_rate": "lr", "wd": "weight_decay", "bs": "batch_size",
    "tau": "temperature", "max_epochs": "epochs", "num_epochs": "epochs", "n_trials": "trials",
    "num_trials": "trials",
}  # fmt: skip


def usual_name(text: str) -> str:
    """A name without a flag's dashes and capitals; one that other tools have becomes ours."""
    plain = text.lstrip("-").casefold()
    split = "val_" if plain.startswith("val_") else ""  # of a metric
    rest = plain.removeprefix(split)
    return split + _ELSEWHERE.get(rest.replace("-", "_"), rest)


def unknown_name(
    kind: str, got: object, known: Iterable[object], *, keys: Keys | None = None
) -> UserError:
    """The error for a name that is not in a registry; suggests the nearest known ones."""
    text = f"unknown {kind} {shorten(got)}.{nearest_names(got, known)}{_OWN.get(kind, '')}"
    return UserError(text, keys=keys)


def nearest_names(got: object, known: Iterable[object]) -> str:
    """The end of an error's sentence: which name was meant, and the nearest that there are."""
    names = sorted(sorted({str(name) for name in known}), key=lambda name: _likeness(got, name),
                   reverse=True)  # fmt: skip
    if not names:
        return " None is known."
    more = len(names) - MOST_LISTED
    others = f" and {more} other{'s' * (more > 1)}" if more > 0 else ""
    return f"{meant_name(got, names[:1])} Known: {', '.join(names[:MOST_LISTED])}{others}."


def meant_name(got: object, known: Iterable[str]) -> str:
    """A sentence that asks whether the nearest name was meant; empty where none is near."""
    name = max(known, key=lambda name: _likeness(got, name), default="")
    return f" Did you mean {name!r}?" if _likeness(got, name)[0] >= 0.6 else ""


def _likeness(got: object, name: str) -> tuple[float, float]:
    """Two numbers from 0 to 1: in order, then whatever the order of the letters is, so that `lwo`
    is nearer to `low` than to `log`. Capitals count as small letters, a flag's dashes not."""
    typed, there = usual_name(str(got)[:100]), name.lstrip("-").casefold()
    matcher = difflib.SequenceMatcher(None, typed, there)
    return matcher.ratio(), matcher.quick_ratio()


def check_installed(package: str, *, needed_by: str, extra: str) -> None:
    """Raise `UserError` if an optional package is missing, naming the extra that has it."""
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"{needed_by} needs {package}, which is not installed: pip install 'ekd_ray[{extra}]'."
        )
