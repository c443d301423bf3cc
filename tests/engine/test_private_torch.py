"""The private parts of torch are where `torch_private` expects them, and nowhere else in use."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

import ekd_ray

ROOM = Path(ekd_ray.__file__).parent


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize(
    "name", ["add_param_group", "zero_grad", "state_dict", "load_state_dict", "step"]
)
def test_the_methods_of_an_optimizer_are_wrapped(optimizer, name):
    """If they no longer are, `untraced_optimizer` has nothing left to do and can go."""
    method = getattr(optimizer, name)
    assert inspect.unwrap(method) is not method


def test_no_other_module_uses_a_private_name_of_torch():
    private = re.compile(
        r"(torch|torchvision|safetensors|tensorboard)(\.\w+)*\._[a-z]"  # torch._C, torch.nn._x
        r"|from (torch|torchvision|safetensors|tensorboard)[\w.]* import .*\b_[A-Za-z]"
        r"|_get_file_writer|inspect\.unwrap"
    )
    users = {
        path.relative_to(ROOM).as_posix()
        for path in ROOM.rglob("*.py")
        if any(private.search(line) for line in path.read_text().splitlines())
    }
    assert users == {"losses/torch_private.py"}
