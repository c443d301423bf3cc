"""torch, imported when the first tensor is computed with: settings of methods need none of it.

Every command that reads a configuration reads the methods' settings, and torch takes 2 s.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING


def import_late(name: str) -> ModuleType:
    """The module of a name, which is loaded when something of it, or it itself, is asked for.

    Raises:
        ModuleNotFoundError: there is none.
    """
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if TYPE_CHECKING:
    import torch
else:
    torch = import_late("torch")

__all__ = ["torch"]
