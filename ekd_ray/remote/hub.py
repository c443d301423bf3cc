"""Folders on the Hugging Face hub: pushed in one commit, fetched into the hub's own cache.

Token, address and cache are huggingface_hub's business (`hf auth login`, HF_TOKEN, HF_ENDPOINT,
HF_HOME): nothing here reads or takes one.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from ekd_ray.errors import UserError, check_installed

PREFIX = "hf:"
_PART = r"[A-Za-z0-9][\w.-]{0,95}"
_NAME = re.compile(rf"({_PART}/{_PART})(?:@([\w.][\w./-]*))?", re.ASCII)


class HubName(NamedTuple):
    """A repository of the hub, and a branch, tag or commit of it (None: its main branch)."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{PREFIX}{self.repo}" + (f"@{self.revision}" if self.revision else "")


def parse_hub_name(text: str) -> HubName:
    """`owner/name[@revision]`, with or without `hf:` before it; raises `UserError`."""
    found = _NAME.fullmatch(text.removeprefix(PREFIX))
    if found is None:
        raise UserError(f"a repository of the hub is owner/name[@revision], got {text!r}.")
    return HubName(found[1], found[2])


def check_login(needed_by: str) -> None:
    """Ask the hub whose token this machine has.

    Raises:
        UserError: huggingface_hub is not installed, there is no token, the hub does not take it,
            or cannot be reached.
    """
    check_installed("huggingface_hub", needed_by=needed_by, extra="hub")
    from huggingface_hub import HfApi

    with _one_sentence("the hub"):
        HfApi().whoami()


def push_folder(
    folder: Path,
    name: HubName,
    files: Sequence[str],
    *,
    owned: Sequence[str],
    private: bool,
    message: str,
) -> str:
    """Put files of a folder into a model repository, in one commit; returns the commit's address.

    The repository and the branch `name.revision` are made if they are not there. What the
    repository holds besides stays, but for names that fit a pattern of `owned`.

    Args:
        files: paths relative to `folder`; owned: patterns of names that an earlier push may have
            left and that are removed; private: of a repository that is made here.

    Raises:
        UserError: see `check_login`; the token may not write there; the upload broke off.
    """
    check_login(f"pushing to {name}")
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    with _one_sentence(str(name)):
        api.create_repo(name.repo, private=private, exist_ok=True)
        if name.revision:
            api.create_branch(name.repo, branch=name.revision, exist_ok=True)
        there = api.list_repo_files(name.repo, revision=name.revision)
        old = [
            path
            for path in there
            if path not in files and any(fnmatch(path, pattern) for pattern in owned)
        ]
        commit = api.create_commit(
            name.repo,
            [
                *(CommitOperationDelete(path_in_repo=path) for path in old),
                *(CommitOperationAdd(path, folder / path) for path in files),
            ],
            commit_message=message,
            revision=name.revision,
        )
    return str(commit.commit_url)


def fetch_folder(name: HubName, patterns: Sequence[str]) -> Path:
    """The files of a model repository that fit a pattern, in the hub's cache.

    Without a network, what an earlier call has fetched.

    Raises:
        UserError: huggingface_hub is not installed, there is no such repository or revision, the
            token may not read it, or the hub cannot be reached.
    """
    check_installed("huggingface_hub", needed_by=str(name), extra="hub")
    from huggingface_hub import snapshot_download

    with _one_sentence(str(name)):
        return Path(
            snapshot_download(name.repo, revision=name.revision, allow_patterns=[*patterns])
        )


@contextlib.contextmanager
def _one_sentence(what: str) -> Iterator[None]:
    """Errors of huggingface_hub, and of whatever it fetches with, as a `UserError`."""
    from huggingface_hub import errors

    login = "run `hf auth login` or set HF_TOKEN"
    try:
        yield
    except errors.LocalTokenNotFoundError:
        raise UserError(f"{what} needs a token of the Hugging Face hub: {login}.") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{what} has no such revision: check what follows the @.") from None
    except errors.RepositoryNotFoundError:  # also: one that the token may not read
        raise UserError(
            f"{what} is not on the hub, or not to be read with this machine's token: check the "
            f"name, or {login}."
        ) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        said = (error.server_message or error.response.reason_phrase or "").strip()
        first = f": {said.splitlines()[0][:200].rstrip('.')}" if said else ""
        cure = {401: login, 403: "give the token the right to write there"}.get(
            status, "try again later"
        )
        raise UserError(f"{what} was refused by the hub ({status}{first}): {cure}.") from None
    except UserError:
        raise
    except Exception as error:  # of the network, in a form that depends on its version
        found = error
        while found.__cause__ and isinstance(found.__cause__, Exception):
            found = found.__cause__  # the library wraps it, in pages of text
        reason = (str(found).strip() or type(found).__name__).splitlines()[0][:200].rstrip(".")
        raise UserError(
            f"the hub could not be asked for {what} ({reason}): check the network, HF_ENDPOINT and "
            "HF_HUB_OFFLINE."
        ) from None
