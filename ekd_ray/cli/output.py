"""Results for programs and plans for people, on standard output."""

from __future__ import annotations

import argparse
import json
from typing import Any


def print_json(value: Any) -> None:
    """Results for programs, on standard output."""
    print(json.dumps(value, indent=2, sort_keys=True))


def print_plan(text: str, values: dict[str, Any], args: argparse.Namespace) -> None:
    if args.json:
        print_json(values)
    else:
        print(text)
