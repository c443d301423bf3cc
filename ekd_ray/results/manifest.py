"""The MANIFEST of a bundle: which files belong to it, and the SHA-256 of each."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ekd_ray.errors import UserError
from ekd_ray.files import sha256_file, write_text

MANIFEST = "MANIFEST"


def write_manifest(folder: Path, names: Iterable[str]) -> None:
    """List files of a folder with their hashes, in the form that `sha256sum --check` reads."""
    lines = [f"{sha256_file(folder / name)}  {name}\n" for name in names]
    write_text(folder / MANIFEST, "".join(lines))


def manifest_problems(folder: Path, needed: Iterable[str], optional: Iterable[str]) -> list[str]:
    """What is wrong with a bundle's files, a sentence each; empty if nothing is.

    Nothing outside the folder is read, whatever the manifest says. Files that begin with a
    dot, which clones of repositories have, are left out.
    """
    needed = tuple(needed)
    known = {*needed, *optional}
    problems, listed = [], set()
    for line in (folder / MANIFEST).read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        if name not in known:
            problems.append(f"{MANIFEST} lists {name!r}, which is no file of a bundle.")
            continue
        listed.add(name)
        problems += _file_problems(folder, name, digest)
    problems += [f"{MANIFEST} does not list {name}." for name in needed if name not in listed]
    there = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    problems += [
        f"{name} is there, but {MANIFEST} does not list it."
        for name in there
        if name not in {*listed, *needed, MANIFEST}
    ]
    return problems


def _file_problems(folder: Path, name: str, digest: str) -> list[str]:
    if not (folder / name).is_file():
        return [f"{name} is missing."]
    try:
        same = sha256_file(folder / name) == digest
    except OSError as error:
        raise UserError(f"cannot read {folder / name} ({error.strerror}): copy it again.") from None
    return [] if same else [f"{name} was changed: its SHA-256 is not the one in {MANIFEST}."]
