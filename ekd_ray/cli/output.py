"""Output that commands share: results for programs, plans for people."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

from ekd_ray.errors import spell_controls


def print_text(text: str, **options: Any) -> None:
    """`print` for people: foreign text is shown, not obeyed."""
    print(spell_controls(text), **options)


def wrap_words(text: str, width: int) -> str:
    """The text with lines of at most so many signs, broken between words and continued below the
    text behind a label (`estimate   3 min`); a line with a command stays, to be copied."""
    return "\n".join(
        line
        if len(line) <= width or "ekd-ray " in line or "python " in line
        else textwrap.fill(
            line, width, subsequent_indent=" " * _text_column(line, width),
            break_long_words=False, break_on_hyphens=False, drop_whitespace=True,
        )
        for line in text.split("\n")
    )  # fmt: skip


def _text_column(line: str, width: int) -> int:
    found = re.match(r"\S+\s{2,}|\s*", line)
    column = found.end() if found else 0
    return column if column < width // 2 else 0


def show_passing(text: str) -> None:
    """A line on standard error that the next one replaces; nothing where that is no terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def show_scanned(done: int, total: int) -> None:
    """How many pictures have been looked at, where that takes a while."""
    show_passing(f"looking at the pictures: {done:,} of {total:,} ..." if done < total else "")


@contextlib.contextmanager
def show_during(text: str, *, quiet: bool = False) -> Iterator[None]:
    """Show a line (`show_passing`) for the duration of what would otherwise be silent."""
    if not quiet:
        show_passing(text)
    try:
        yield
    finally:
        if not quiet:
            show_passing("")


def print_json(value: Any) -> None:
    """Results for programs, on standard output."""
    print_text(json.dumps(value, indent=2, sort_keys=True))


def print_plan(text: str, values: dict[str, Any], *, as_json: bool) -> None:
    """A plan on standard output: in words, or the configuration as JSON."""
    if as_json:
        print_json(values)
    else:
        print_text(wrap_words(text, _terminal_width()))


def _terminal_width() -> int:
    """The width of standard output; as good as none where that is no terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize


def set_up_ray(address: str | None, *, keep_logs: bool = False) -> None:
    """Make the cluster of --address the one that Ray is told of; `keep_logs` is --keep-ray-logs."""
    from ekd_ray.scale.cluster import ADDRESS  # loads ray
    from ekd_ray.scale.ray_folder import KEEP

    if address:
        os.environ[ADDRESS] = address
    if keep_logs:
        os.environ[KEEP] = "1"
