"""Output that commands share: results for programs, plans for people."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

from ekd_ray.errors import spell_controls


def print_text(text: str, **options: Any) -> None:
    """`print` for people: foreign text is shown, not obeyed."""
    print(spell_controls(text), **options)


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
        print_text(text)


def set_up_ray(address: str | None, *, keep_logs: bool = False) -> None:
    """Make the cluster of --address the one that Ray is told of; `keep_logs` is --keep-ray-logs."""
    from ekd_ray.scale.cluster import ADDRESS  # loads ray
    from ekd_ray.scale.ray_folder import KEEP

    if address:
        os.environ[ADDRESS] = address
    if keep_logs:
        os.environ[KEEP] = "1"
