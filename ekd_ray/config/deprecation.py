"""How a name, flag or setting is given up: a minor version long it warns and works."""

from __future__ import annotations

import warnings


def warn_deprecated(old: str, new: str, *, gone_in: str, stacklevel: int = 3) -> None:
    """Warn that `old` will be gone in version `gone_in` ("0.3"), and to use `new`.

    `gone_in` is the minor version after the next one to be published, so that every user has met
    the warning; tests/config/test_deprecation.py fails once it has come and the call is still
    there. It is a FutureWarning, because Python shows these to everybody.

    Args:
        stacklevel: 3 for the caller of the function that calls this one.
    """
    warnings.warn(
        f"{old} is deprecated and will be gone in ekd_ray {gone_in}: use {new}.",
        FutureWarning,
        stacklevel=stacklevel,
    )
