"""What every test of the data's errors asks of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ekd_ray.errors import UserError


def message(call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The text of the UserError that a call raises; it must be one line and a sentence."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text
