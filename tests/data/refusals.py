"""Refusals of data sets, and the form that each of them has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ekd_ray.data import check_dataset, load_dataset
from ekd_ray.errors import UserError


def message(call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The text of the UserError that a call raises; it must be one line and a sentence."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def refused(name: str, root: Any = None, split: str = "train", checked: bool | None = True) -> str:
    """The text with which loading is refused; checking beforehand must say the same.

    It must see nothing wrong where `checked` is False, and is not asked where it is None.
    """
    text = message(load_dataset, name, split, data_root=root)
    if checked:
        assert message(check_dataset, name, data_root=root) == text
    elif checked is False:
        check_dataset(name, data_root=root)
    return text
